"""The process in which one implementation is judged: a line of JSON in, a line of JSON out.

An implementation may patch torch for all, print, hang or take the process down; here it can. What it
prints goes to standard error, so that only answers travel on the pipe.

    {"do": "describe"}                                 -> name, version, capabilities, torch's facts
    {"do": "prepare"}                                  -> a fresh process is started, for later
    {"do": "judge", "spec": id, "case": text}          -> failure or null, margins, notes
    {"do": "search", "spec": id, "explore": bool}      -> the same, the case found by hypothesis
    {"do": "diagnose", "spec": id, "case": text}       -> names of planted faults that behave the same
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from functools import cache
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from harness import environment, fresh
from harness.case import LAYER_SPECIMENS, Case
from harness.errors import UsageError
from harness.failure import Broken, NotRun, Refused, of_the_harness, raised
from harness.measure.memory import heed_gpu_budget
from harness.reach import kind_of
from harness.spec import Spec, catalogue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.adapter import Adapter
    from harness.tolerance import Margin


SMALL = frozenset({*LAYER_SPECIMENS, "tiny", "tiny-gqa"})
"""Specimens that cost less to keep than to look for."""


class _Counterexample(Exception):  # noqa: N818  # a find, not an error
    """What hypothesis shrinks."""


def serve(adapter: Adapter, requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    import torch

    torch.set_num_threads(1)
    # Judging makes and drops modules by the thousand: collecting every 700 is a tenth of its time.
    gc.set_threshold(50_000)
    warnings.simplefilter("ignore")
    specs = catalogue()
    for line in requests:
        request = json.loads(line)
        started = time.monotonic()
        try:
            found = answer(adapter, specs, request)
        except UsageError as error:
            found = {"usage": str(error)}
        found["seconds"] = round(time.monotonic() - started, 4)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


@cache
def ready(device: str) -> None:
    """Before the first tensor on a card: hold to the budget, and settle which kernels are taken.

    Those that round as was asked for and repeat bit for bit: which, no adapter chooses.

    A float32 product in TensorFloat32 rounds to 11 bits, and a sum may be taken in half precision; the
    fused attentions and some convolutions add their gradients up in any order (torch's notes on
    numerical accuracy and on reproducibility).
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return
    heed_gpu_budget(device)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    cudnn.deterministic = True
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def answer(adapter: Adapter, specs: dict[str, Spec], request: dict[str, Any]) -> dict[str, Any]:
    """What is asked, as JSON holds it: the requests and answers of this module's head."""
    if request["do"] == "describe":
        import torch

        c = adapter.capabilities
        # A copy of a process that has asked for its cards cannot use them.
        reached = torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()  # noqa: SLF001
        cards = torch.cuda.device_count() if reached else 0
        return {
            "devices": ["cpu", *(["cuda"] if cards else []), *(f"cuda:{k}" for k in range(cards))],
            "name": adapter.name,
            "version": adapter.version,
            "capabilities": {name: sorted(getattr(c, name)) for name in c.KNOWN},
            "environment": environment.of_torch(),
            "methods": [name for name in dir(adapter) if callable(getattr(adapter, name, None))],
        }
    if request["do"] == "prepare":
        fresh.start()
        return {}
    item = specs[request["spec"]]
    if request["do"] == "search":
        asked = {key: request[key] for key in ("dtype", "device") if request.get(key)}
        return search(adapter, item, explore=bool(request.get("explore")), asked=asked)
    case = Case.parse(request["case"])
    if request["do"] == "diagnose":
        from harness import diagnosis

        return {"looks_like": list(diagnosis.nearest(adapter, item, case))}
    return told(*judge(adapter, item, case), case)


def judge(
    adapter: Adapter, item: Spec, case: Case
) -> tuple[Broken | NotRun | None, list[Margin], list[str]]:
    """Judge one spec at one case: what is broken, or None; margins; notes."""
    from harness import surroundings
    from harness.seeding import seed_all
    from harness.trial import Trial

    ready(case.device)
    _set_modules_aside()
    seed_all(case.seed)
    around = surroundings.look()
    trial = Trial(adapter, case)
    broken: Broken | NotRun | None = None
    try:
        item.judge(trial)
    except (Broken, NotRun) as found:
        broken = found
    except Refused as refused:
        trial.notes.append(f"vacuous: {refused}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: whatever it raises is a failure
        if isinstance(error, UsageError) and of_the_harness(error):
            raise
        broken = raised(error)
    finally:
        trial.close_folders()
        for what, now in surroundings.put_back(around).items():
            trial.notes.append(f"left {what} at {now}; put back")
        if case.device != "cpu" or case.specimen not in SMALL:
            gc.collect()  # a large model in a ring of references would wait for the next case's
    return broken, trial.margins, trial.notes


_modules = 0


def _set_modules_aside() -> None:
    """Keep what modules made out of garbage collection: they stay, and to walk them takes longest."""
    global _modules  # noqa: PLW0603  # of the process, as the modules are
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.freeze()


def told(
    broken: Broken | NotRun | None, margins: list[Margin], notes: list[str], case: Case
) -> dict[str, Any]:
    """What a judgement found, as JSON."""
    said: dict[str, Any] = {"case": str(case), "failure": None, "notes": notes}
    used = max((m.used for m in margins), default=None)
    said["margin"] = used if used is None or used < float("inf") else None
    if isinstance(broken, NotRun):
        said["not_run"] = str(broken)
    elif broken is not None:
        said["failure"] = broken.record(case=str(case), reproduce="").as_dict()
    return said


def search(
    adapter: Adapter, item: Spec, *, explore: bool, asked: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Look for a failing case with hypothesis; the smallest it finds, or none.

    Derandomised unless `explore`: a verdict is the same every time. `asked` are fields that all cases
    have.
    """
    from hypothesis import HealthCheck, Phase, assume, given, settings

    assert item.search is not None
    found: list[tuple[Broken, Case]] = []
    margins: list[Margin] = []

    @settings(
        max_examples=400 if explore else 16,
        derandomize=not explore,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(item.search())
    def holds(case: Case) -> None:
        case = case.with_(**asked)
        assume(claimed(case, adapter.capabilities))
        broken, used, _ = judge(adapter, item, case)
        margins.extend(used)
        if isinstance(broken, Broken):
            found.append((broken, case))
            raise _Counterexample

    try:
        holds()
    except _Counterexample:
        broken, case = found[-1]
        return told(broken, margins, [], case)
    return told(None, margins, [], Case(way="search"))


def claimed(case: Case, capabilities: Any) -> bool:
    """Whether a case asks only for what is claimed: its specimen's kind of layer and its dtype."""
    kinds = capabilities.layers | capabilities.features
    return kind_of(case) in kinds and case.dtype in capabilities.dtypes


def main(adapter_name: str) -> int:
    """Serve on standard input and output; what goes wrong before that is an answer too."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from harness import registry

    try:
        adapter = registry.resolve(adapter_name)
    except UsageError as error:
        answers.write(json.dumps({"usage": str(error)}) + "\n")
        answers.flush()
        return 2
    fresh.ADAPTER = adapter_name
    serve(adapter, requests, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
