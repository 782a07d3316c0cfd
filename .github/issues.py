# ruff: noqa: INP001  # a script of the workflows, no package
"""Keep one open issue for every row of a leg that is worse or gone: open it once, close it after.

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


def main(leg: str, folder: Path) -> None:
    """Bring the issues of one leg in line with tonight's comparisons."""
    label = f"nightly:{leg}"
    gh("label", "create", label, "--force", "--description", f"Rows that got worse, {leg} leg")
    wanted = loud_rows(leg, folder)
    opened = {one["title"]: one["number"] for one in issues(label)}
    for title, body in wanted.items():
        if title not in opened:
            gh("issue", "create", "--title", title, "--label", label, "--body", body)
            print(f"opened: {title}")
    for title, number in opened.items():
        if title not in wanted:
            gh("issue", "close", str(number), "--comment", "Gone in tonight's comparison.")
            print(f"closed: {title}")


def loud_rows(leg: str, folder: Path) -> dict[str, str]:
    """Title and body of the issue that each loud row deserves."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))["comparison"]
        for row in comparison["rows"]:
            if row["verdict"] not in LOUD:
                continue
            place = f" ({row['where']})" if row["where"] else ""
            title = f"{leg}: {path.stem}: {row['verdict']}: {row['name']}{place}"[:250]
            found[title] = "\n".join(
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
