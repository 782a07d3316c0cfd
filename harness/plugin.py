"""The pytest plugin: markers, the GPU tier, `--adapter`, and `parametrize_with_specs`.

    @parametrize_with_specs("acme.lora:adapter")
    def test_conforms(spec_case): spec_case.run()

Each implementation is judged in one process of its own for the whole pytest session; a spec is judged
when its test runs, with what it needs, and once. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.judge import Judge, Points
from harness.session import Session
from harness.spec import SPEC_VERSION, select
from harness.verdict import summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.adapter import Adapter
    from harness.judge import Result
    from harness.report.schema import Recorder
    from harness.spec import Spec, Tier

MARKERS = {
    "gpu": "needs a CUDA device; `pytest -m gpu` is the GPU tier",
    "slow": "takes more than a few seconds; nightly",
    "benchmark": "measures; compared pairwise, never gating on one clock",
    "distributed": "starts several processes that train together",
}
INCOMPLETE = 3
"""The exit code of a run that judged less than was asked."""


# -- the options and the session's header --------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the harness's options."""
    group = parser.getgroup("lora-harness", "LoRA harness")
    group.addoption(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="judge this implementation: peft, loralib, an entry point, or pkg.module:factory; repeatable",
    )
    group.addoption(
        "--spec",
        action="append",
        default=[],
        metavar="ID|FAMILY",
        help="with --adapter: judge this spec or family only; repeatable",
    )
    group.addoption(
        "--tier",
        choices=("smoke", "core", "full"),
        default="core",
        help="with --adapter: how much to judge",
    )
    group.addoption(
        "--model", default=None, help="the model of end-to-end tests, and of whole-model specs"
    )
    group.addoption("--device", default=None, help="cpu or cuda")
    group.addoption(
        "--gpu-budget",
        default=None,
        metavar="SIZE",
        help="the most GPU memory to use, such as 8GiB",
    )
    group.addoption(
        "--allow-no-gpu", action="store_true", help="let `-m gpu` pass where there is no GPU"
    )
    group.addoption("--report", default=None, metavar="PATH", help="write the run as a report")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, look at what was asked, and cap the GPU's memory."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[_STATE] = _State()
    try:
        if config.getoption("--spec"):
            select(config.getoption("--spec"))
        if config.getoption("--gpu-budget"):
            from harness.measure.memory import parse_bytes

            budget = parse_bytes(config.getoption("--gpu-budget"))
            on_gpu = (config.getoption("--device") or "").startswith("cuda") or _gpu_tier(config)
            if on_gpu and _has_gpu():
                _cap(budget)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is on trial."""
    from harness import environment

    libraries = environment.collect().get("libraries", {})
    names = ("torch", "transformers", "peft", "loralib", "trl")
    versions = [f"{name} {libraries[name]['version']}" for name in names if libraries.get(name)]
    on_trial = config.getoption("--adapter") or [
        "the built-in implementations, and the harness itself"
    ]
    model, device = config.getoption("--model") or "tiny", config.getoption("--device") or "cpu"
    return [
        f"on trial: {', '.join(on_trial)}; model {model}, device {device}, seed 0, spec version {SPEC_VERSION}",
        f"libraries: {' · '.join(versions)}",
    ]


# -- the specs as tests ------------------------------------------------------------------------


@dataclass(slots=True)
class SpecCase:
    """One spec on one implementation, ready to run."""

    adapter: str | Adapter
    spec: Spec

    def run(self) -> Result:
        """Judge; fail the test with the failure record, or skip it where there is nothing to judge."""
        __tracebackhide__ = True
        state = _ACTIVE[-1] if _ACTIVE else _State()
        judge = state.judge(self.adapter)
        result = judge.result(self.spec)
        judge.diagnose(result)
        state.seen(self.adapter, result)
        if result.outcome == "failed":
            from harness.telling import failure_text

            pytest.fail(failure_text(result), pytrace=False)
        if result.outcome in {"blocked", "not_claimed", "not_run"}:
            pytest.skip(f"{result.outcome.replace('_', ' ')}: {'; '.join(result.notes)}")
        return result


def parametrize_with_specs(
    adapter: str | Adapter, *, only: Sequence[str] = (), tier: Tier = "core"
) -> pytest.MarkDecorator:
    """Parametrise a test over the specs, as its argument `spec_case`.

    Args:
        adapter: `pkg.module:factory`, a known name, or the object itself.
        only: ids or families.
        tier: smoke, core or full.

    Raises:
        UsageError: a name in `only` matches nothing.
    """
    specs = select(only, tier)
    cases = [SpecCase(adapter, item) for item in specs.values()]
    return pytest.mark.parametrize("spec_case", cases, ids=list(specs))


class SpecItem(pytest.Item):
    """A spec of `pytest --adapter`, with no test file behind it."""

    def __init__(self, *, case: SpecCase, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case
        self.user_properties.append(("spec", case.spec.id))

    def runtest(self) -> None:
        """Judge the spec."""
        self.case.run()

    def reportinfo(self) -> tuple[str, None, str]:
        """The line a report shows."""
        return str(self.case.adapter), None, self.name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Put the specs of `--adapter` among the tests; alone, unless paths were named too."""
    adapters: list[str] = config.getoption("--adapter")
    if not adapters:
        for item in items:
            case = getattr(item, "callspec", None)
            if case is not None and isinstance(case.params.get("spec_case"), SpecCase):
                item.user_properties.append(("spec", case.params["spec_case"].spec.id))
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        items.clear()
    specs = select(config.getoption("--spec"), config.getoption("--tier"))
    for adapter in adapters:
        items.extend(
            SpecItem.from_parent(
                session,
                name=f"{adapter}::{id_}",
                nodeid=f"{adapter}::{id_}",
                case=SpecCase(adapter, item),
            )
            for id_, item in specs.items()
        )


# -- the session -------------------------------------------------------------------------------


class _State:
    """What a pytest session keeps: a judge for each implementation, and what became of each spec."""

    def __init__(self, config: pytest.Config | None = None) -> None:
        self.config = config
        self.judges: dict[object, Judge] = {}
        self.sessions: list[Session] = []
        self.results: list[Result] = []
        self.report: Recorder | None = None

    def judge(self, adapter: str | Adapter) -> Judge:
        """The judge of one implementation, started when first asked for."""
        from harness import known

        key = adapter if isinstance(adapter, str) else id(adapter)
        if key not in self.judges:
            session = Session(adapter)
            self.sessions.append(session)
            option = self.config.getoption if self.config else lambda _: None
            points = Points(
                None, option("--model"), option("--device"), None, option("--tier") or "core"
            )
            try:
                made = Judge(session, points)
            except UsageError as error:
                pytest.exit(str(error), returncode=2)
            made.known = known.built_in(made.name, made.version)
            self.judges[key] = made
        return self.judges[key]

    def seen(self, adapter: str | Adapter, result: Result) -> None:
        """Keep a result for the verdict at the end, and in the report."""
        self.results.append(result)
        if self.report is not None:
            name = adapter if isinstance(adapter, str) else adapter.name
            self.report.add("results", {**result.as_dict(), "adapter": name})

    def close(self) -> None:
        """End every implementation's process."""
        for session in self.sessions:
            session.close()


_STATE = pytest.StashKey[_State]()
_ACTIVE: list[_State] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make this session the one that `SpecCase.run` speaks to."""
    state = session.config.stash[_STATE]
    state.config = session.config
    _ACTIVE.append(state)
    if session.config.getoption("--report"):
        from harness.report.schema import Recorder

        try:
            state.report = Recorder(
                session.config.getoption("--report"),
                kind="pytest",
                model=session.config.getoption("--model"),
                spec_version=SPEC_VERSION,
                seed=0,
            )
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """End the workers; a run that judged nothing, or no GPU where one was asked for, is not green."""
    config = session.config
    state = config.stash[_STATE]
    state.close()
    if state in _ACTIVE:
        _ACTIVE.remove(state)
    ended_well = exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    if (
        _gpu_tier(config)
        and not config.getoption("--allow-no-gpu")
        and ended_well
        and not _has_gpu()
    ):
        session.exitstatus = INCOMPLETE
    if state.report is not None:
        for key, value in summary(state.results).items():
            state.report.set(key, value)
        state.report.set(
            "tests", {"collected": session.testscollected, "failed": session.testsfailed}
        )
        state.report.close(finished=exitstatus != pytest.ExitCode.INTERRUPTED)
    judged = [r for r in state.results if r.outcome in {"passed", "failed", "known"}]
    if config.getoption("--adapter") and exitstatus == pytest.ExitCode.OK and not judged:
        session.exitstatus = INCOMPLETE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say INCOMPLETE where it is."""
    if _gpu_tier(config) and not _has_gpu():
        allowed = " (allowed by --allow-no-gpu)" if config.getoption("--allow-no-gpu") else ""
        terminalreporter.write_line(
            f"INCOMPLETE: no CUDA device here, the GPU tier did not run{allowed}"
        )
    state = config.stash[_STATE]
    if config.getoption("--adapter") and state.results:
        must = [r for r in state.results if r.level == "MUST" and r.outcome != "not_claimed"]
        ran = [r for r in must if r.outcome in {"passed", "failed", "known"}]
        known = [r.spec for r in must if r.outcome == "known"]
        told = f"{len(ran)} of {len(must)} required specs ran"
        terminalreporter.write_line(
            told + (f"; known to fail: {', '.join(known)}" if known else "")
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where there is no GPU: the session is INCOMPLETE, the test is not failed."""
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("no CUDA device")


def _gpu_tier(config: pytest.Config) -> bool:
    """Whether `-m` asks for the GPU tier."""
    words = (config.getoption("-m") or "").split()
    return "gpu" in words and words[words.index("gpu") - 1 : words.index("gpu")] != ["not"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _cap(budget: int) -> None:
    """Hold this process to the budget, and each one that an implementation is judged in."""
    import os

    from harness.measure.clock import limit_gpu
    from harness.measure.memory import GPU_BUDGET

    os.environ[GPU_BUDGET] = str(budget)
    limit_gpu(budget)


__all__ = ["SpecCase", "parametrize_with_specs"]
