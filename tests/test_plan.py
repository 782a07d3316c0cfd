"""The plan: what fits, what peaks, what to change; figures of FACTS at full size."""

from __future__ import annotations

import gc

import pytest
import torch

from harness import LoraConfig, phi3, plan, registry
from harness.adapters.reference import Reference
from harness.cli import main
from harness.errors import UsageError
from harness.measure import shapes
from harness.measure.counters import counting
from harness.measure.memory import format_bytes
from harness.measure.phases import batch_of, optimizer_of, training_step, vocabulary_of
from harness.report.schema import read

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

MINI = 3_821_079_552
MEDIUM = 13_960_238_080


@pytest.fixture(scope="module")
def mini():
    """mini-4k at 1,024 tokens, dense and NF4: one run on shapes alone."""
    grid = shapes.points(sequence=(1024,), batch=(1,), checkpointing=(False,))
    found = shapes.measure(registry.resolve("peft"), "mini-4k", grid)
    return {planned.point.quantization: planned for planned in found}


def test_parameters_of_mini_are_facts(mini):
    """3,821,079,552 and, at r 16 on all linear layers, 25,165,824."""
    dense = mini["none"]

    assert dense.base_parameters == MINI
    assert dense.lora_parameters == 25_165_824
    assert dense.weight_bytes == 2 * MINI


def test_matrix_work_of_mini_is_facts(mini):
    """14.98 GFLOP a token at 1,024 tokens, attention's own products aside."""
    products = {k: v for k, v in mini["none"].step.flops.items() if "attention" not in k}

    assert round(sum(products.values()) / 1024 / 1e9, 2) == 14.98


def test_static_kinds_of_mini_are_exact(mini):
    """bf16 base; PEFT's float32 factors and two moments of each; a step count a tensor."""
    peak = mini["none"].step.peak

    assert peak["adapters"] == 4 * 25_165_824
    assert peak["optimizer"] == 8 * 25_165_824 + 4 * 256
    assert 0 <= peak["base weights"] - 2 * MINI < 4096  # the rotary frequencies


def test_nf4_changes_the_base_and_a_layer_on_the_way(mini):
    """The peaks differ by what the base saves, less at most one dense copy of a weight."""
    dense, packed = mini["none"], mini["nf4"]
    saved = dense.weight_bytes - packed.weight_bytes
    largest = 2 * 3072 * 16384

    assert 0 <= packed.peak_bytes - (dense.peak_bytes - saved) <= largest


@pytest.mark.slow
def test_parameters_of_medium_are_facts():
    """13,960,238,080 and, at r 16, 55,705,600; grouped-query."""
    grid = shapes.points(sequence=(512,), batch=(1,), checkpointing=(True,), quantization=("none",))
    (found,) = shapes.measure(registry.resolve("peft"), "medium-4k", grid)

    assert found.base_parameters == MEDIUM
    assert found.lora_parameters == 55_705_600


def test_nf4_storage_by_hand():
    """128 numbers: 64 bytes, 2 scales, one float32 for them, and 273 float32 of tables."""
    assert shapes.nf4_bytes(128) == 64 + 2 + 4 * (1 + 273)


def test_nf4_storage_is_what_bitsandbytes_stores():
    """The formula against a weight that bitsandbytes quantised, every tensor of its state counted."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(192, 320)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    inner = state.state2
    held = [packed, state.absmax, state.code, state.offset, inner.absmax, inner.code]

    assert shapes.nf4_bytes(weight.numel()) == sum(t.numel() * t.element_size() for t in held)


def test_a_grid_with_no_cell_is_wrong_usage():
    """An axis without a value leaves nothing to plan."""
    with pytest.raises(UsageError, match=r"^the grid has no cell; give each of its axes"):
        shapes.points(batch=())


def test_a_value_given_twice_is_planned_once():
    """The run and its row are the same."""
    assert len(shapes.points(r=(8, 8), batch=(1,), sequence=(64, 64))) == 4


def test_between_two_points_tensors_are_real():
    """The caller's own work is no part of the plan, nor is a plan that is let go half-way."""
    grid = shapes.points(dtype=("float32",), sequence=(8,), quantization=("none",))
    found = shapes.measure(Reference(), "tiny", grid)
    next(found)
    between = type(torch.ones(2))
    next(found)
    found.close()

    assert between is torch.Tensor
    assert gc.get_freeze_count() == 0


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_budget_under_the_weights_says_by_how_much(capsys):
    """mini-4k in NF4 is 2.11 GiB."""
    code, out, err = run(capsys, "--budget", "1GiB")

    assert code == 2
    assert out == ""
    assert err == (
        "lora-harness plan: --budget: 1.00 GiB is 1.11 GiB less than the weights of mini-4k alone, "
        "2.11 GiB in NF4; give more, or a smaller model\n"
    )


def test_a_plan_takes_named_models_alone_and_says_so(capsys, tmp_path):
    """It offers neither a directory nor a hub id, which it would refuse."""
    code, _, err = run(capsys, "--budget", "8GiB", "--model", str(tmp_path))

    assert code == 2
    assert err.endswith("? Known are tiny, tiny-gqa, mini-4k, mini-128k, medium-4k\n")


@pytest.mark.parametrize("budget", ["8G", "much", "0"])
def test_a_budget_that_is_no_size_is_wrong_usage(capsys, budget):
    """One line, exit 2."""
    code, _, err = run(capsys, "--budget", budget)

    assert code == 2
    assert err.startswith(f"lora-harness plan: --budget: '{budget}' is no")


def test_a_target_of_nothing_is_wrong_usage(capsys):
    """Tokens of a step are counted from one."""
    code, _, err = run(capsys, "--budget", "8GiB", "--target", "0")

    assert code == 2
    assert err.startswith("lora-harness plan: --target: 0 tokens per step")


@pytest.fixture(scope="module")
def tiny_grid():
    """Tiny over checkpointing and quantization at one size."""
    grid = shapes.points(dtype=("float32",), batch=(1, 2), sequence=(64,))
    return list(shapes.measure(registry.resolve("peft"), "tiny", grid))


def test_a_miss_is_told_what_seen_point_fits(tiny_grid):
    """With room for all but the largest: one change that was seen to help, and its peak."""
    by_size = sorted(tiny_grid, key=lambda p: p.peak_bytes)
    told = plan.advice(by_size[-1], tiny_grid, by_size[-2].peak_bytes, registry.resolve("peft"))

    fitting = {format_bytes(p.peak_bytes) for p in by_size[:-1]}
    assert told.split(": ")[-1] in fitting


def test_a_miss_that_no_one_change_mends_names_its_largest_kind(tiny_grid):
    """With room for nothing: the kind that is most of it."""
    miss = max(tiny_grid, key=lambda p: p.peak_bytes)

    told = plan.advice(miss, tiny_grid, 1, registry.resolve("peft"))
    assert told.startswith(f"mostly {next(iter(miss.kinds))}: ")


@pytest.mark.parametrize(
    ("adapter", "seen", "remedy"),
    [
        ("peft", ("none", "nf4"), "a 4-bit base, and more than that alone"),
        ("peft", ("none",), "a 4-bit base"),
        ("loralib", ("none",), "a smaller model"),
    ],
)
def test_advice_says_no_more_than_was_seen_and_what_the_adapter_can_do(mini, adapter, seen, remedy):
    """That a change is too little is said of one that was tried; what is not claimed is none."""
    told = plan.advice(mini["none"], [mini[q] for q in seen], 1, registry.resolve(adapter))

    assert told == f"mostly base weights: {remedy}"


@pytest.mark.parametrize(
    ("adapter", "remedy"), [("peft", "gradient checkpointing"), ("loralib", "a shorter sequence")]
)
def test_activations_are_mended_as_the_adapter_can(tiny_grid, adapter, remedy):
    """By checkpointing where that is claimed."""
    (miss,) = (
        p
        for p in tiny_grid
        if (p.point.batch, p.point.checkpointing, p.point.quantization) == (2, False, "nf4")
    )

    told = plan.advice(miss, [miss], 1, registry.resolve(adapter))
    assert told == f"mostly saved activations: {remedy}"


@pytest.mark.parametrize(("r", "sequence"), [(8, 64), (256, 4)])
def test_several_batches_a_step_peak_where_a_real_run_does(r, sequence):
    """Two batches a step: where the backward peaks, and where the update does."""
    implementation = registry.resolve("reference")
    point = shapes.Point(r=r, dtype="float32", sequence=sequence)
    (planned,) = shapes.measure(implementation, "tiny", [point], target=2 * sequence)
    config = LoraConfig(r=r, lora_alpha=2.0 * r, target_modules="all-linear")
    model = implementation.inject(phi3.load("tiny"), config)
    model.train()
    batch = batch_of(model, batch=1, sequence=sequence)
    optimizer = optimizer_of(model)
    model(**batch).loss.backward()
    with counting(model, adapter=implementation, logits_width=vocabulary_of(model)) as count:
        training_step(model, batch, optimizer, count.ledger)
    real = count.result()

    assert planned.batches == 2
    assert ("optimizer step" in real.peak_at) is (r == 256)
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert planned.step.peak["gradients"] >= planned.step.peak["adapters"]


def test_one_batch_a_step_carries_nothing(tiny_grid):
    """A target within one batch is the step without a target."""
    one = next(p for p in tiny_grid if p.point.tokens == 64)
    (same,) = shapes.measure(registry.resolve("peft"), "tiny", [one.point], target=64)

    assert same == one


def test_what_is_not_claimed_is_left_out_and_said(capsys):
    """Loralib claims neither 4 bits nor checkpointing: such points do not fit, whatever they weigh."""
    code, out, _ = run(
        capsys,
        *("--adapter", "loralib", "--model", "tiny", "--budget", "1GiB", "--dtype", "float32"),
        *("--batch", "1", "--sequence", "16"),
    )

    assert code == 0
    assert "1 of 1 fit" in out
    assert "1 of 4 points left out: loralib does not claim quantized_base\n" in out
    assert "1 of 4 points left out: loralib does not claim gradient_checkpointing\n" in out


def test_a_sequence_past_the_models_context_is_told(capsys, tmp_path):
    """It fits the memory, and the model was never made for it."""
    path = tmp_path / "plan.json"
    note = "sequence 2049 is past the context of tiny, 2048 tokens"
    _, out, _ = run(
        capsys,
        *("--adapter", "reference", "--model", "tiny", "--budget", "1TiB", "--dtype", "float32"),
        *("--batch", "1", "--sequence", "8,2049", "--checkpointing", "off"),
        *("--quantization", "none", "--json", str(path)),
    )

    assert note in out
    assert note in read(path)["notes"]


def test_a_grid_of_which_nothing_is_claimed_is_wrong_usage(capsys):
    """Nothing is left to plan."""
    code, _, err = run(
        capsys,
        "--adapter",
        "loralib",
        "--budget",
        "1GiB",
        "--model",
        "tiny",
        "--quantization",
        "nf4",
    )

    assert code == 2
    assert err.startswith("lora-harness plan: --adapter loralib: no point of the grid is claimed")


class Looks(Reference):
    def inject(self, model, config):
        adapted = super().inject(model, config)
        assert all(p.isfinite().all() for p in adapted.parameters())
        return adapted


class Raises(Reference):
    def inject(self, model, config):
        raise KeyError("not today")


class Copies(Reference):
    def inject(self, model, config):
        for module in config.targets(model).values():
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
        return super().inject(model, config)


@pytest.mark.parametrize(
    ("adapter", "line"),
    [(Looks(), "it looks at the values of tensors"), (Raises(), "KeyError: 'not today'")],
)
def test_an_adapter_that_cannot_do_with_shapes_is_told_so(adapter, line):
    """One line; no traceback of torch's fake tensors."""
    with pytest.raises(
        UsageError, match=r"^--adapter reference: cannot be planned on sh"
    ) as caught:
        list(shapes.measure(adapter, "tiny", [shapes.Point(dtype="float32", sequence=8)]))

    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_copies_the_weights_is_planned_with_its_copies():
    """What it holds is counted, and what it let go is not."""
    point = shapes.Point(dtype="float32", sequence=8)
    (ours,) = shapes.measure(Copies(), "tiny", [point])
    (honest,) = shapes.measure(Reference(), "tiny", [point])

    assert ours.peak_bytes == honest.peak_bytes


def test_the_command_lists_what_fits_and_writes_it(capsys, tmp_path):
    """Both halves of the list, and a report whose kinds add up to the peak."""
    path = tmp_path / "plan.json"
    code, out, _ = run(
        capsys,
        *("--model", "tiny", "--budget", "6MiB", "--dtype", "float32", "--batch", "1,8"),
        *("--sequence", "64", "--checkpointing", "off", "--quantization", "none"),
        *("--json", str(path)),
    )
    report = read(path)

    assert code == 0 or "0 of 2 fit" in out
    assert "of 2 fit 6.00 MiB" in out
    assert "nearest misses, and what to change" in out
    assert report["finished"]
    assert report["budget"] == 6 * 2**20
    whole = [row for row in report["memory"] if "kind" not in row]
    kinds = [row for row in report["memory"] if "kind" in row]
    assert len(whole) == 2
    assert sum(row["value"] for row in kinds) == sum(row["value"] for row in whole)
