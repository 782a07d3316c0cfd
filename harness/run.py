"""The process of one run: a request in, training and proofs, a report out.

    python -m harness.run REQUEST.json

A process of its own, since one implementation may patch torch for all, and since the heavy libraries
are then imported once while the command line stays light. `harness.finetune` writes the request.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import library_log, process
from harness.console import note
from harness.errors import UsageError, first_line
from harness.run_folder import RunFolder, clear

if TYPE_CHECKING:
    import subprocess

    from harness.proof import Proof
    from harness.report.schema import Recorder
    from harness.training import Run

ORDER = (
    "only-lora-trains",
    "optimizer-holds-lora",
    "checkpoint-is-lora",
    "two-stage-load",
    "reload-same-logits",
    "merged-same-logits",
    "merged-same-replies",
    "loss-went-down",
    "eval-loss-went-down",
    "base-unchanged",
)
"""The properties in the order of the guide."""

EXIT = {"CONFORMS": 0, "DOES NOT CONFORM": 1, "INCOMPLETE": 3}


def main(path: str) -> int:
    """Do what the request asks; returns the exit code."""
    request: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    folder = RunFolder(path=Path(request["folder"]))
    library_log.divert(folder.path)
    run: list[Run] = []
    try:
        return _run(request, folder, run)
    except UsageError as error:
        print(f"lora-harness finetune: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"lora-harness finetune: interrupted; {_kept(folder, run)}", file=sys.stderr)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever the implementation on trial raises
        said = _not_its_fault(error, run)
        if not said:
            # It is told, and kept: an implementation that breaks down does not conform.
            with (folder.path / "library.log").open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
            print(
                f"lora-harness finetune: {request['adapter']} failed: {type(error).__name__}: "
                f"{first_line(error)}; the traceback is in {folder.path / 'library.log'}",
                file=sys.stderr,
            )
            return 1
        print(f"lora-harness finetune: {said}", file=sys.stderr)
    if not _worth(folder, run) and not request["resume"]:
        clear(folder)
    return 2


def _not_its_fault(error: BaseException, run: list[Run]) -> str:
    """What went wrong without the implementation: before it was asked, or for want of memory."""
    told = f"{type(error).__name__}: {first_line(error)}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, wherever the release keeps it
        return (
            f"the GPU's memory is used up ({first_line(error)}); --set "
            "training_config.per_device_train_batch_size lower, or ask lora-harness plan what fits"
        )
    if isinstance(error, Exception) and not (run and run[0].injecting):
        return (
            f"model, data or recipe: {told}; mend it, or try the quick recipe on the shipped data"
        )
    return ""


def _worth(folder: RunFolder, run: list[Run]) -> bool:
    """Whether anything was trained."""
    adapter = folder.path / "adapter.safetensors"
    return bool(folder.last_checkpoint() or adapter.is_file() or (run and run[0].steps))


def _kept(folder: RunFolder, run: list[Run]) -> str:
    """What an interrupted run leaves, and how to go on."""
    steps = run[0].steps if run else 0
    if (folder.path / "adapter.safetensors").is_file():
        told = (
            f"training was done, the proofs were not; the adapter and the log are in {folder.path}"
        )
        return f"{told}: go on with --resume" if folder.last_checkpoint() else told
    if folder.last_checkpoint():
        return (
            f"stopped at step {steps}; checkpoint and log are kept in {folder.path}: "
            "go on with --resume"
        )
    return "nothing was trained yet, nothing is kept"


def _run(request: dict[str, Any], folder: RunFolder, held: list[Run]) -> int:
    from harness import environment
    from harness.training import Run

    run = Run(request)
    held.append(run)
    library_log.settle()
    parameters = sum(p.numel() for p in run.base.parameters())
    adapter = {"name": run.adapter.name, "version": run.adapter.version}
    name = str(run.recipe.model["name"])
    print(
        f"{adapter['name']} {adapter['version']} on {name}: {len(run.expected)} modules, "
        f"r {run.config.r}, alpha {run.config.lora_alpha:g}: {sum(run.expected.values()):,} "
        f"parameters beside {parameters:,}",
        flush=True,
    )
    note(*run.notes)
    with _recorder(request)(
        folder.report,
        kind="finetune",
        adapter=adapter,
        model=name,
        seed=run.seed,
        recipe=run.recipe.as_dict(),
        environment=environment.collect(accelerator=run.device != "cpu"),
        notes=run.notes,
        artefacts={
            "folder": str(folder.path),
            "adapter": str(folder.path / "adapter.safetensors"),
            "log": str(folder.log),
        },
    ) as record:
        run.logged = lambda: record.set("training", run.curves())
        fresh: list[subprocess.Popen[bytes]] = []
        try:
            proofs = _judged(run, record, fresh)
        finally:
            for one in fresh:
                one.kill()
                one.wait()
        verdict = _verdict(proofs)
        record.set("results", [proof.as_dict() for proof in proofs])
        record.set("verdict", verdict)
        record.set("required", sum(p.outcome != "not_claimed" for p in proofs))
        record.set("ran", sum(p.outcome in {"passed", "failed"} for p in proofs))
    return EXIT[verdict]


def _judged(run: Run, record: Recorder, fresh: list[subprocess.Popen[bytes]]) -> list[Proof]:
    """Train and prove, each proof recorded as it comes; `fresh` takes the process of property 3."""
    from harness import merging

    answers = {"before": run.answers()}
    run.inject()
    proofs = run.fit()
    record.set("training", run.curves())
    _add(record, proofs)
    ids, mask, logits = run.probe()
    # On the CPU the fresh process works beside this one; on a card it waits for the memory.
    if run.device == "cpu":
        fresh.append(_reloading(run))
    answers["after"] = run.answers()
    record.set("answers", answers)
    _add(record, more := merging.prove(run, ids, mask, logits))
    proofs += more
    record.set("notes", run.notes)
    if not fresh:
        run.free()
        fresh.append(_reloading(run))
    _add(record, more := _reloaded(run, fresh[0]))
    return sorted(proofs + more, key=lambda p: ORDER.index(p.spec.partition("/")[2]))


def _recorder(request: dict[str, Any]) -> type[Recorder]:
    """The report's recorder, which writes to `--json` as well wherever it is asked to."""
    from harness.report.schema import Recorder, replace

    if not request.get("json"):
        return Recorder
    copy = Path(request["json"])

    class Twice(Recorder):
        def _write(self, *, durable: bool = False) -> None:
            super()._write(durable=durable)
            if self.path is not None:
                replace(copy, self.path.read_text("utf-8"), durable=durable)

    return Twice


def _verdict(proofs: list[Proof]) -> str:
    outcomes = {proof.outcome for proof in proofs}
    if "failed" in outcomes:
        return "DOES NOT CONFORM"
    return "INCOMPLETE" if "not_run" in outcomes else "CONFORMS"


def _add(record: Recorder, proofs: list[Proof]) -> None:
    record.add("results", [proof.as_dict() for proof in proofs])


def _reloading(run: Run) -> subprocess.Popen[bytes]:
    """Start the fresh process of property 3."""
    request = run.folder.path / "reload-request.json"
    request.write_text(
        json.dumps(
            {
                "folder": str(run.folder.path),
                "adapter": run.request["adapter"],
                "recipe": run.recipe.as_dict(),
                "seed": run.seed,
            }
        ),
        encoding="utf-8",
    )
    return process.beside("harness.reload", request)


def _reloaded(run: Run, fresh: subprocess.Popen[bytes]) -> list[Proof]:
    from harness import reload

    code = fresh.wait()
    path = run.folder.path / reload.FOUND
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        found = {"error": f"the fresh process ended with {code}; see library.log"}
    for name in (reload.PROBE, reload.FOUND, "reload-request.json"):
        (run.folder.path / name).unlink(missing_ok=True)
    return reload.prove(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
