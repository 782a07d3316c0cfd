"""Known releases show what shared/BUGS.md, section 5, says of them, by the spec that is about it.

Each release runs in a leg of `lora-harness matrix`, which installs it beside this environment: the slow
tier, and a package index, are needed. Where a release has two sins and one hides the other, the first is
set aside as known, as a user would.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from harness import matrix
from harness.cli import main

pytestmark = pytest.mark.slow

OLD = "transformers==4.41.2"
"""Of the time of PEFT 0.4 to 0.13."""

TRAINERS = {
    "transformers 4.48.0": (
        "transformers==4.48.0",
        "peft==0.14.0",
        "trl==0.13.0",
        "accelerate==1.3.0",
        "datasets==3.6.0",
    ),
    "trl 0.19.1": (
        "transformers==4.53.2",
        "peft==0.16.0",
        "trl==0.19.1",
        "accelerate==1.8.1",
        "datasets==3.6.0",
    ),
}

ASIDE = "set aside, to see what lies behind it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A release, and the one failure by which it is told.

    Attributes:
        leg: what is installed.
        adapter: what is on trial in it.
        spec: the spec that must fail.
        says: part of what was found, where one spec tells two sins apart.
        aside: specs that fail too and block it, each with its kind of failure.
    """

    leg: tuple[str, ...]
    spec: str
    adapter: str = "peft"
    says: str = ""
    aside: tuple[tuple[str, str], ...] = ()


RELEASES = {
    "peft 0.4.0: v_proj adapts qkv_proj": Release(
        leg=("peft==0.4.0", OLD), spec="targeting/exact-coverage", says="qkv_proj"
    ),
    "peft 0.4.0: a second adapter trains at once": Release(
        leg=("peft==0.4.0", OLD),
        spec="several/only-the-active-trains",
        aside=(("targeting/exact-coverage", "names"),),
    ),
    "peft 0.8.1: merging twice": Release(leg=("peft==0.8.1", OLD), spec="merge/idempotent"),
    "peft 0.9.0: lora_only trains no bias": Release(
        leg=("peft==0.9.0", OLD), spec="trainable/bias-modes", says="of them does not"
    ),
    "peft 0.9.0: leaving an inner disable enables": Release(
        leg=("peft==0.9.0", OLD), spec="several/disabled-nested", says="elements differ"
    ),
    "peft 0.11.1: factors in bfloat16": Release(
        leg=("peft==0.11.1", OLD), spec="training/small-steps-count", says="did not move"
    ),
    "peft 0.13.2: a misfit loads in silence": Release(
        leg=("peft==0.13.2", OLD), spec="checkpoint/misfit-is-loud", says="nothing was raised"
    ),
    "peft 0.17.1: a name with weight in it": Release(
        leg=("peft==0.17.1", "transformers==4.57.6"), spec="checkpoint/odd-names"
    ),
    "peft 0.20.0: lora_only's bias is not saved": Release(
        leg=("peft==0.20.0",), spec="trainable/bias-modes", says="is not, as it now is"
    ),
    "transformers 4.57.6: checkpointing enabled after injecting": Release(
        leg=("peft==0.17.1", "transformers==4.57.6"), spec="training/checkpointing-same-update"
    ),
    "transformers 4.48.0: four times the update": Release(
        leg=TRAINERS["transformers 4.48.0"], spec="training/trainer-update"
    ),
    "transformers 4.46.3: a loaded adapter trains": Release(
        leg=("transformers==4.46.3", "peft==0.13.2"),
        adapter="transformers",
        spec="checkpoint/load-trainability",
        says="lora_A",
    ),
    "transformers 5.2.0: a loaded adapter trains": Release(
        leg=("transformers==5.2.0",),
        adapter="transformers",
        spec="checkpoint/load-trainability",
        says="lora_A",
    ),
    "transformers 5.2.0: a loaded adapter drops in eval mode": Release(
        leg=("transformers==5.2.0",),
        adapter="transformers",
        spec="checkpoint/load-keeps-mode",
        says="two calls differ",
    ),
    "transformers 5.2.0: a quarter of the update": Release(
        leg=("transformers==5.2.0",), spec="training/trainer-update"
    ),
    "trl 0.19.1: no gradient under checkpointing": Release(
        leg=TRAINERS["trl 0.19.1"], spec="training/sft-trainer-checkpointing"
    ),
    "trl 1.15.0: no loss without Triton": Release(
        leg=("trl==1.15.0",), spec="training/sft-trainer-checkpointing", says="'apply'"
    ),
    "loralib 0.1.1: the merges of Embedding and MergedLinear": Release(
        leg=("loralib==0.1.1",), adapter="loralib", spec="merge/same-output"
    ),
    "loralib 0.1.1: eval merges nothing": Release(
        leg=("loralib==0.1.1",), adapter="loralib", spec="cost/merged-costs-what-the-base-costs"
    ),
}


@pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES)
def test_a_release_fails_the_spec_that_is_about_it(tmp_path, release):
    """What reached the users of a release is found in it, by name."""
    run = ["check", release.adapter, "--only", release.spec]
    if release.aside:
        known = tmp_path / "known.toml"
        known.write_text(
            "".join(
                f'[[known]]\nspec = "{spec}"\nkind = "{kind}"\nreason = "{ASIDE}"\n'
                'url = "https://example.org"\nexpires = 2100-01-01\n'
                for spec, kind in release.aside
            ),
            encoding="utf-8",
        )
        run += ["--known", str(known)]
    leg = matrix.run_leg(release.leg, run, matrix.kept())
    assert leg.report, leg.said
    (result,) = leg.report["results"]

    assert (result["spec"], result["outcome"]) == (release.spec, "failed")
    assert any(release.says in failure["actual"] for failure in result["failures"])


def test_two_releases_differ_in_exactly_what_was_fixed(tmp_path, capsys):
    """Between PEFT 0.8.1 and 0.8.2 one bug was mended, and one spec of the whole tier says so."""
    report = tmp_path / "matrix.json"
    legs = ["--leg", f"peft==0.8.1 {OLD}", "--leg", f"peft==0.8.2 {OLD}"]
    code = main(["matrix", *legs, "--json", str(report), "--", "check", "peft", "--limit", "300"])
    said = capsys.readouterr().out
    old, new = (leg["report"] for leg in json.loads(report.read_text(encoding="utf-8"))["legs"])
    after = {result["spec"]: result["outcome"] for result in new["results"]}
    differing = {
        result["spec"]: (result["outcome"], after[result["spec"]])
        for result in old["results"]
        if result["outcome"] != after[result["spec"]]
    }

    assert code == 1
    assert differing == {"merge/idempotent": ("failed", "passed")}
    assert "merge/idempotent" in said
