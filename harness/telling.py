"""How a verdict and the catalogue are told in a terminal, and the commands that do so."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.console import table, wrapped
from harness.report.words import CLAIMS
from harness.spec import SPEC_VERSION, catalogue, select

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from harness.judge import Result
    from harness.spec import Spec
    from harness.verdict import Verdict

MARKS = {
    "unmet": "!",  # a SHOULD that fails
    "passed": "✓",
    "failed": "✗",
    "known": "k",
    "blocked": "·",
    "not_claimed": " ",
    "not_run": "?",
}
LIBRARIES = ("torch", "transformers", "peft", "loralib", "trl")


def check_command(args: argparse.Namespace) -> int:
    """`lora-harness check`: judge, tell, write, and return the verdict's exit code."""
    from harness.report.schema import Recorder
    from harness.verdict import check

    case = None if args.case is None else Case.parse(args.case)
    live = sys.stdout.isatty()
    # What was asked stands before anything is judged: a killed run is compared by it.
    asked = {
        "model": args.model,
        "tier": args.tier,
        "device": case.device if case else args.device or "cpu",
        "dtype": case.dtype if case else args.dtype,
        "seed": case.seed if case else args.seed,
    }
    with Recorder(args.json, kind="check", spec_version=SPEC_VERSION, **asked) as report:

        def on_trial(named: dict[str, str], environment: dict[str, Any]) -> None:
            report.set("adapter", named)
            report.set("environment", environment)

        def progress(result: Result) -> None:
            report.add("results", result.as_dict())
            if live:
                print(f"\r\x1b[K{mark(result)} {result.spec}", end="", flush=True)

        verdict = check(
            args.adapter,
            only=args.only,
            tier=args.tier,
            case=case,
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            seed=args.seed,
            known=args.known,
            explore=args.explore,
            limit=args.limit,
            on_trial=on_trial,
            progress=progress,
        )
        for key, value in verdict.as_dict().items():
            report.set(key, value)
    if live:
        print("\r\x1b[K", end="")
    print(tell(verdict))
    return verdict.exit_code


def list_command(args: argparse.Namespace) -> int:
    """`lora-harness list`: the catalogue, a line a spec, or all of it as JSON."""
    specs = select(args.only, args.tier)
    if args.json:
        import json

        from harness.report.schema import replace

        records = [item.as_dict() for item in specs.values()]
        replace(
            args.json, json.dumps({"spec_version": SPEC_VERSION, "specs": records}, indent=1) + "\n"
        )
    for family, items in _families(specs.values()):
        print(f"\n{family}/")
        rows = [(f"  {item.id.split('/')[1]}", item.level, item.tier, item.claim) for item in items]
        width = max(len(row[0]) for row in rows)
        for name, level, tier, claim in rows:
            indent = width + 16
            print(
                wrapped(
                    claim,
                    initial_indent=f"{name:<{width}}  {level:<6}  {tier:<5} ",
                    subsequent_indent=" " * indent,
                )
            )
    print(f"\n{len(specs)} spec{'' if len(specs) == 1 else 's'}, spec version {SPEC_VERSION}")
    return 0


def tell(verdict: Verdict) -> str:
    """The whole verdict: what was on trial, the families, each failure, the last word."""
    blocks = [header(verdict), families(verdict.results)]
    blocks += [failure_text(result) for result in verdict.failed]
    known = [result for result in verdict.results if result.outcome == "known"]
    if known:
        blocks.append(
            "Known failures\n"
            + "\n".join(
                wrapped(
                    f"{result.spec}: {note.removeprefix('known: ')}",
                    initial_indent="  ",
                    subsequent_indent="    ",
                )
                for result in known
                for note in result.notes
                if note.startswith("known: ")
            )
        )
    not_run = [result for result in verdict.results if result.outcome == "not_run"]
    if not_run:
        blocks.append("Not run\n" + "\n".join(f"  {r.spec}: {'; '.join(r.notes)}" for r in not_run))
    if waiting := waits(verdict.results) + _blocked_elsewhere(verdict.results):
        blocks.append("Blocked\n" + "\n".join(waiting))
    for member, words in CLAIMS.items():
        if names := getattr(verdict, member):
            blocks.append(wrapped(f"{words}: {', '.join(names)}", subsequent_indent="    "))
    blocks.append(last_word(verdict))
    return "\n\n".join(blocks)


def _blocked_elsewhere(results: Sequence[Result]) -> list[str]:
    """A line for each cause that is not among what was asked for: what it blocks, how to see it."""
    judged = {result.spec for result in results}
    blocked: dict[str, list[str]] = {}
    for result in results:
        if (causes := _causes(result)) and judged.isdisjoint(causes):
            blocked.setdefault(", ".join(causes), []).append(result.spec)
    lines = []
    for needed, (first, *others) in blocked.items():
        more = f" and {len(others)} more" if others else ""
        lines.append(
            f"  {first}{more}: {'need' if more else 'needs'} {needed}, which was not found to hold; "
            f"see --only {needed.split(', ')[0]}"
        )
    return lines


def header(verdict: Verdict) -> str:
    """What is on trial."""
    libraries = verdict.environment.get("libraries", {})
    versions = [f"{name} {libraries[name]['version']}" for name in LIBRARIES if libraries.get(name)]
    name = f"{verdict.adapter['name']} {verdict.adapter['version']}"
    # A narrow terminal parts no library from its version.
    whole = (version.replace(" ", "\xa0") for version in versions)
    told = wrapped(" · ".join(whole)).replace("\xa0", " ")
    return f"{name}, {verdict.tier} tier, spec version {SPEC_VERSION}\n{told}"


def families(results: Iterable[Result]) -> str:
    """A line a family: a mark a spec, and how many of the claimed ones hold."""
    known = catalogue()
    rows = []
    for family, items in _families(known[result.spec] for result in results):
        ids = {item.id for item in items}
        mine = [result for result in results if result.spec in ids]
        claimed = [result for result in mine if result.outcome != "not_claimed"]
        passed = sum(result.outcome == "passed" for result in claimed)
        blocked = sum(result.outcome == "blocked" for result in claimed)
        told = f"{passed} of {len(claimed)} hold" if claimed else "not claimed"
        told += f", {blocked} blocked" if blocked else ""
        rows.append((family, "".join(mark(result) for result in mine), told))
    return table(rows)


def waits(results: Sequence[Result]) -> list[str]:
    """A line for each spec that blocks others, most first: how many wait for it."""
    judged = {result.spec for result in results}
    found = Counter(id_ for result in results for id_ in _causes(result) if id_ in judged)
    return [
        f"  {number} spec{' waits' if number == 1 else 's wait'} for {id_}"
        for id_, number in found.most_common()
    ]


def _causes(result: Result) -> list[str]:
    """What a blocked spec needs and does not have."""
    notes = result.notes if result.outcome == "blocked" else ()
    needs = next((note for note in notes if note.startswith("needs ")), None)
    return needs.removeprefix("needs ").split(", ") if needs else []


def mark(result: Result) -> str:
    """One character for what became of a spec."""
    unmet = result.outcome == "failed" and result.level == "SHOULD"
    return MARKS["unmet" if unmet else result.outcome]


def failure_text(result: Result) -> str:
    """One failed spec: what MUST hold, the first failure in full, the cases of the others."""
    item = catalogue()[result.spec]
    first, *others = result.failures
    facts = [*first.facts(), ("why", item.why), ("source", "; ".join(item.source))]
    if others:
        shown = "; ".join(failure.case or failure.actual for failure in others[:3])
        facts.append(
            ("also at", shown + (f" and {len(others) - 3} more" if len(others) > 3 else ""))
        )
    lines = [wrapped(item.claim, initial_indent="    ", subsequent_indent="    ")]
    for name, value in facts:
        head = f"{name:>14}  "
        # A command is copied whole.
        lines.append(
            head + value
            if name == "reproduce"
            else wrapped(value, initial_indent=head, subsequent_indent=" " * 16)
        )
    return "\n".join([f"{mark(result)} {result.spec}", *lines])


def last_word(verdict: Verdict) -> str:
    """The verdict in a line, with what it rests on."""
    counted = f"{verdict.ran} of {verdict.required} required specs ran"
    must = [result.spec for result in verdict.failed if result.level == "MUST"]
    should = [result.spec for result in verdict.failed if result.level == "SHOULD"]
    known = [result.spec for result in verdict.results if result.outcome == "known"]
    told = [counted]
    if must:
        told.append(f"{len(must)} failed: {', '.join(must)}")
    if known:
        told.append(f"{len(known)} known to fail: {', '.join(known)}")
    if should:
        told.append(f"{len(should)} SHOULD not met: {', '.join(should)}")
    return wrapped(f"{verdict.verdict}: {'; '.join(told)}", subsequent_indent="    ")


def _families(items: Iterable[Spec]) -> list[tuple[str, list[Spec]]]:
    grouped: dict[str, list[Spec]] = {}
    for item in items:
        grouped.setdefault(item.family, []).append(item)
    return list(grouped.items())
