# ruff: noqa: INP001  # a script of the workflows, no package
"""Keep one open issue for every row of a leg that is worse or gone: open it once, close it after.

An issue is closed where its row was compared and is well: what was not compared tells nothing.

    issues.py LEG FOLDER        FOLDER holds what `lora-harness compare --json` wrote

Needs the `gh` command and its token. Runs on the standard library alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOUD = ("worse", "removed")
WELL = ("same", "better", None)
"""None is a row that is there, shown and not judged."""


def main(leg: str, folder: Path) -> None:
    """Bring the issues of one leg in line with tonight's comparisons."""
    label = f"nightly:{leg}"
    gh("label", "create", label, "--force", "--description", f"Rows that got worse, {leg} leg")
    found = comparisons(folder)
    wanted, mended = loud_rows(leg, found), well_rows(leg, found)
    opened = {one["title"]: one["number"] for one in issues(label)}
    for title, body in wanted.items():
        if title not in opened:
            gh("issue", "create", "--title", title, "--label", label, "--body", body)
            print(f"opened: {title}")
    for title, number in opened.items():
        if title in mended - wanted.keys():
            gh("issue", "close", str(number), "--comment", "Gone in tonight's comparison.")
            print(f"closed: {title}")


def comparisons(folder: Path) -> dict[str, dict[str, Any]]:
    """What was compared tonight, by the report's name."""
    read = {
        path.stem: json.loads(path.read_text(encoding="utf-8")).get("comparison")
        for path in sorted(folder.glob("*.json"))
    }
    return {name: comparison for name, comparison in read.items() if comparison}


def loud_rows(leg: str, comparisons: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Title and body of the issue that each loud row deserves."""
    found = {}
    for name, comparison in comparisons.items():
        for row in comparison["rows"]:
            if row["verdict"] not in LOUD:
                continue
            found[titled(leg, name, row, row["verdict"])] = "\n".join(
                (
                    f"`{code(row['why'])}`",
                    "",
                    f"old: `{code(row['old'])}`, new: `{code(row['new'])}`",
                    "",
                    f"Compared: `{code(comparison['old']['id'])}`, `{code(comparison['new']['id'])}`.",
                    "This issue closes itself when the row is no longer worse.",
                )
            )
    return found


def well_rows(leg: str, comparisons: dict[str, dict[str, Any]]) -> set[str]:
    """Titles of the issues that tonight's rows mend: of finished runs, what is there and not worse."""
    return {
        titled(leg, name, row, verdict)
        for name, comparison in comparisons.items()
        if comparison["new"]["finished"] is True
        for row in comparison["rows"]
        if row["verdict"] in WELL
        for verdict in LOUD
    }


def titled(leg: str, name: str, row: dict[str, Any], verdict: str) -> str:
    """The issue of a row, by leg, report, verdict and place."""
    place = f" ({row['where']})" if row["where"] else ""
    return f"{leg}: {name}: {verdict}: {row['name']}{place}"[:250]


def code(text: object) -> str:
    """A text that cannot leave its code span."""
    return str(text).replace("`", "ˋ")


def issues(label: str) -> list[dict[str, Any]]:
    """The open issues of a label."""
    said = gh(
        "issue",
        "list",
        "--label",
        label,
        "--state",
        "open",
        "--limit",
        "500",
        "--json",
        "number,title",
    )
    return json.loads(said)  # type: ignore[no-any-return]


def gh(*arguments: str) -> str:
    """What `gh` said; its failure is ours."""
    command = ("gh", *arguments)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
