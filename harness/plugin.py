"""The pytest plugin: markers, the GPU tier, `--adapter`, and `parametrize_with_specs`.

    @parametrize_with_specs("acme.lora:adapter")
    def test_conforms(spec_case): spec_case.run()

Each implementation is judged in one process of its own for the whole pytest session; a spec is judged
when its test runs, with what it needs, and once. The exit code is the verdict's, as `check` has it.
Installed, the plugin is loaded into every suite of the environment: it leaves alone what holds no spec.
Nothing heavy is imported here.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.console import terminal_width
from harness.errors import UsageError
from harness.options import (
    OPTIONS,
    add_options,
    dest,
    given,
    gpu_tier,
    has_gpu,
    ours,
    own_tree,
    tier_of,
    usage_errors,
)
from harness.spec import SPEC_VERSION, TIERS, select
from harness.spec_case import ACTIVE, STATE, SpecCase, Specs, State, case_of, parametrize_with_specs

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from harness.adapter import Adapter

MARKERS = {
    "gpu": "needs a CUDA device; `pytest -m gpu` is the GPU tier",
    "slow": "takes more than a few seconds; nightly",
    "benchmark": "measures; compared pairwise, never gating on one clock",
    "distributed": "starts several processes that train together",
}
INCOMPLETE = 3
"""The exit code of a run that judged less than was asked."""
_ENDED = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}
"""How a run ends that was not stopped."""

# -- the options -----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options now where a conftest.py brought the plugin: its own are known by then."""
    files = (getattr(plugin, "__file__", None) for plugin in pluginmanager.get_plugins())
    if any(file and Path(file).name == "conftest.py" for file in files):
        add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, object, object]:
    """Add the options after those of the project's conftest.py, which crash on a name that is taken."""
    done = yield
    add_options(parser)
    return done


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, look at what was asked, and cap the GPU's memory."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[STATE] = State(config)
    with usage_errors(option="--spec"):
        if (tier := tier_of(config)) not in TIERS:
            raise UsageError(f"--tier {tier}: no such tier; give {', '.join(TIERS)}")
        if given(config, "--spec"):
            select(given(config, "--spec"))
        if given(config, "--gpu-budget"):
            from harness.measure.memory import parse_bytes

            budget = parse_bytes(given(config, "--gpu-budget"))
            device = given(config, "--device") or ("cuda" if gpu_tier(config) else "cpu")
            if device.startswith("cuda") and has_gpu():
                _cap(budget, device)
    if given(config, "--adapter") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        # No paths were named: the specs alone, and nothing of the project's is even imported.
        config.args = []
        config.args_source = pytest.Config.ArgsSource.ARGS


# -- the session's header --------------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is on trial, where something is."""
    adapters = given(config, "--adapter")
    if adapters:
        return _header(config, [] if config.option.collectonly else adapters, adapters)
    if own_tree(config):
        return _header(config, [], ["the built-in implementations, and the harness itself"])
    return []


def pytest_report_collectionfinish(
    config: pytest.Config, items: Sequence[pytest.Item]
) -> list[str]:
    """Say what is on trial where the project's own tests hold specs."""
    state = config.stash[STATE]
    if not state.tells or given(config, "--adapter") or config.option.collectonly:
        return []
    called = state.tally.called
    adapters = {called(case.adapter): case.adapter for item in items if (case := case_of(item))}
    if not adapters:
        return []
    return _header(config, adapters.values(), [])


def _header(
    config: pytest.Config, adapters: Iterable[str | Adapter], otherwise: Sequence[str]
) -> list[str]:
    """The header's lines: the implementations, started to ask their names, or what stands for them."""
    from harness import environment

    tally = config.stash[STATE].tally
    on_trial = []
    with usage_errors():
        for adapter in adapters:
            tally.judge(adapter, tier_of(config))
            on_trial.append(tally.told(tally.called(adapter)))
    libraries = environment.collect().get("libraries", {})
    names = ("torch", "transformers", "peft", "loralib", "trl")
    versions = [f"{name} {libraries[name]['version']}" for name in names if libraries.get(name)]
    model, device = given(config, "--model") or "tiny", given(config, "--device") or "cpu"
    conditions = f"model {model}, device {device}, seed 0, spec version {SPEC_VERSION}"
    lines = [
        f"on trial: {', '.join(on_trial or otherwise)}; {conditions}",
        f"libraries: {' · '.join(versions)}",
    ]
    foreign = [option for option in OPTIONS if not hasattr(config.option, dest(option))]
    if foreign:
        lines.append(f"options of this project, not of the harness: {', '.join(foreign)}")
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line,
        terminal_width(),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


# -- the specs as tests ----------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Put the specs of `--adapter` among the tests before -k and -m choose among all."""
    for adapter in given(config, "--adapter") or ():
        specs = Specs.from_parent(session, name=adapter, nodeid=adapter)
        items.extend(session.genitems(specs))
    for item in items:
        if case := case_of(item):
            item.user_properties.append(("spec", case.spec.id))
            config.stash[STATE].tally.called(case.adapter)


# -- the session -----------------------------------------------------------------------------------


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make this session the one that `SpecCase.run` speaks to; look at the implementations named."""
    config = session.config
    state = config.stash[STATE]
    ACTIVE.append(state)
    if not state.tells or config.option.collectonly:
        return
    with usage_errors():
        for adapter in given(config, "--adapter") or ():
            state.tally.judge(adapter, tier_of(config))
        if path := given(config, "--report"):
            from harness.report.schema import Recorder

            state.report = Recorder(
                path,
                kind="pytest",
                model=given(config, "--model"),
                spec_version=SPEC_VERSION,
                seed=0,
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Send what was judged with the test's report."""
    report = yield
    state = item.config.stash[STATE]
    if state.pending:
        report.lora_harness, state.pending = state.pending, []
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what was judged for the verdict at the end, and in the report."""
    if not ACTIVE or not ACTIVE[-1].tells:
        return
    state = ACTIVE[-1]
    state.tests += report.when == "setup"
    for row in getattr(report, "lora_harness", ()):
        found = state.tally.take(row)
        if state.report is not None:
            state.report.add("results", found)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """End the workers, and with the verdict's exit code where pytest's own says nothing is wrong."""
    config = session.config
    state = config.stash[STATE]
    state.tally.close()
    if not state.tells:
        return
    if exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        session.exitstatus = _exit_code(config, state) or exitstatus
    if state.report is not None:
        worst, verdicts = state.tally.worst, state.tally.verdicts().values()
        if len(verdicts) == 1 and worst:
            state.report.set("adapter", worst.adapter)
        state.report.set("verdict", worst.verdict if worst else "INCOMPLETE")
        state.report.set("required", sum(verdict.required for verdict in verdicts))
        state.report.set("ran", sum(verdict.ran for verdict in verdicts))
        collected = max(session.testscollected, state.tests)
        state.report.set("tests", {"collected": collected, "failed": session.testsfailed})
        # With -x the rest was not run.
        state.report.close(finished=exitstatus in _ENDED and state.tests >= collected)


def _exit_code(config: pytest.Config, state: State) -> int:
    """What the specs say; 0 also where there were none and none were asked for."""
    if config.option.collectonly:
        return 0
    worst = state.tally.worst
    if _no_gpu(config, state):
        return 0 if given(config, "--allow-no-gpu") and not worst else INCOMPLETE
    if worst is None:
        return INCOMPLETE if given(config, "--adapter") else 0
    return worst.exit_code


def _no_gpu(config: pytest.Config, state: State) -> bool:
    """Whether the GPU tier was asked for, of the harness, where there is no GPU."""
    concerns = ours(config) or state.tally.worst is not None
    return concerns and gpu_tier(config) and not has_gpu()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the workers of a session that ended before it began too."""
    state = config.stash.get(STATE, None)
    if state is not None:
        state.tally.close()
        if state in ACTIVE:
            ACTIVE.remove(state)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Say the verdicts, and INCOMPLETE where it is."""
    state = config.stash[STATE]
    if config.option.collectonly:
        return
    if _no_gpu(config, state):
        allowed = " (allowed by --allow-no-gpu)" if given(config, "--allow-no-gpu") else ""
        terminalreporter.write_line(
            f"INCOMPLETE: no CUDA device here, the GPU tier did not run{allowed}"
        )
    verdicts = state.tally.verdicts()
    if verdicts:
        from harness.telling import last_word

        for name, verdict in verdicts.items():
            terminalreporter.write_line(f"{state.tally.told(name)}\n  {last_word(verdict)}")
    elif given(config, "--adapter") and exitstatus in {0, pytest.ExitCode.NO_TESTS_COLLECTED}:
        terminalreporter.write_line("INCOMPLETE: no spec was judged")


# -- the GPU tier ----------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where there is no GPU: the session is INCOMPLETE, the test is not failed."""
    mine = case_of(item) is not None or ours(item.config)
    if mine and item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("no CUDA device")


def _cap(budget: int, device: str) -> None:
    """Hold this process to the budget, and each one that an implementation is judged in."""
    import os

    from harness.measure.clock import limit_gpu
    from harness.measure.memory import GPU_BUDGET

    os.environ[GPU_BUDGET] = str(budget)
    limit_gpu(budget, device)


__all__ = ["SpecCase", "parametrize_with_specs"]
