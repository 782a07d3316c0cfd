"""The built-in implementations keep the contract: checked here by hand, apart from the specs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.adapter import LoraConfig
from harness.registry import resolve

# PEFT warns of much that is meant here: an embedding among the targets, merging what is merged.
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("reference", "peft", "loralib", "transformers")
SEVERAL = ("reference", "peft", "transformers")
DTYPES = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16", "float64")}


class Toy(nn.Module):
    """An embedding, a wide layer, a head without a bias, and a norm between; nothing square."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(11)
        self.emb = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 7, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.fc(self.emb(x))))


CONFIG = LoraConfig(r=3, lora_alpha=8, target_modules=("emb", "fc", "head"))
TOKENS = torch.arange(10).reshape(2, 5)


@pytest.fixture(params=NAMES)
def adapter(request):
    return resolve(request.param)


@pytest.fixture
def reference():
    return resolve("reference")


def fill(adapter, model, seed=5, size=0.5):
    """Write random factors, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in adapter.factors(model).values():
            for f in parts:
                for tensor in (f.A, f.B) if f.bias is None else (f.A, f.B, f.bias):
                    draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.copy_(size * draw)
    return model


def deltas(adapter, model):
    """Scaling · B A of each factor, in float64."""
    return {
        name: [f.scaling * (f.B.detach().double() @ f.A.detach().double()) for f in parts]
        for name, parts in adapter.factors(model).items()
    }


def truth(adapter, model):
    """A Toy in float64 whose weights are W + scaling · B A."""
    expected = Toy()
    for name, (delta,) in deltas(adapter, model).items():
        weight = expected.get_submodule(name).weight
        weight.data += delta.T if name == "emb" else delta
    return expected


def far(actual, expected):
    """The largest difference, as a share of the largest expected value."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def trained(model):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_injection_changes_no_output(adapter):
    """A fresh adapter answers bit for bit as its base."""
    base = Toy()
    expected = base(TOKENS)

    assert torch.equal(adapter.inject(base, CONFIG)(TOKENS), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_output_is_the_equation(adapter, merged):
    """W + scaling · B A, in float64 to the last few bits, merged or not."""
    if merged and "merge" not in adapter.capabilities.features:
        pytest.skip(f"{adapter.name} does not merge")
    model = fill(adapter, adapter.inject(Toy(), CONFIG))
    expected = truth(adapter, model)(TOKENS)
    if merged:
        adapter.merge(model)

    assert far(model(TOKENS), expected) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_keeps_the_dtype_of_the_base(adapter, dtype):
    """In every dtype claimed the answer is of that dtype, and near the truth."""
    model = fill(adapter, adapter.inject(Toy(DTYPES[dtype]), CONFIG))
    actual = model(TOKENS)

    assert dtype in adapter.capabilities.dtypes
    assert actual.dtype == DTYPES[dtype]
    assert far(actual, truth(adapter, model)(TOKENS)) < 64 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("name", ["reference", "loralib"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_the_equation(name, groups, dilation):
    """ΔW of a convolution is scaling · B A in the weight's shape, whatever stride and padding."""
    adapter = resolve(name)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, dilation, groups).double())
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    model = fill(
        adapter, adapter.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=("0",)))
    )
    (delta,) = deltas(adapter, model)["0"]
    expected = functional.conv2d(x, weight + delta.view_as(weight), bias, 2, 1, dilation, groups)
    outputs = [model(x)]
    adapter.merge(model)
    outputs.append(model(x))

    assert max(far(y, expected) for y in outputs) < 1e-13


@pytest.mark.parametrize("name", ["reference", "loralib"])
def test_parts_of_a_fused_projection_are_apart(name):
    """Each wanted part has its own factors and rows; the rest of the weight stays."""
    adapter = resolve(name)
    model = Toy()
    weight = model.fc.weight.detach().clone()
    parts = {"fc": ((3, True), (3, False), (3, True))}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("fc",), enable_lora=parts)
    model = fill(adapter, adapter.inject(model, config))
    expected = weight.clone()
    for f, delta in zip(adapter.factors(model)["fc"], deltas(adapter, model)["fc"], strict=True):
        expected[f.rows] += delta
    rows = [f.rows for f in adapter.factors(model)["fc"]]
    adapter.merge(model)

    assert rows == [slice(0, 3), slice(6, 9)]
    assert far(adapter.base_weight(model, "fc"), expected) < 1e-13


def test_a_checkpoint_holds_the_adapter_and_loads_into_another(adapter):
    """The state goes through `torch.save` sizes and all: the outputs come back bit for bit."""
    config = LoraConfig(r=3, lora_alpha=8, target_modules=("fc", "head"))
    model = fill(adapter, adapter.inject(Toy(), config))
    state = {key: tensor.clone() for key, tensor in adapter.state_dict(model).items()}
    other = adapter.inject(Toy(), config)
    adapter.load_state_dict(other, state)

    assert len(state) == 4
    assert all("lora_" in key for key in state)
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("sin", ["missing", "left over", "another shape", "another prefix"])
def test_a_checkpoint_that_does_not_fit_raises(adapter, sin):
    """Nothing is loaded in silence."""
    model = adapter.inject(Toy(), LoraConfig(r=3, lora_alpha=8, target_modules=("fc", "head")))
    state = {key: tensor.clone() for key, tensor in adapter.state_dict(model).items()}
    first = next(iter(state))
    wrong = {
        "missing": {key: t for key, t in state.items() if key != first},
        "left over": state | {first.replace("fc", "cf"): state[first]},
        "another shape": state | {first: torch.zeros(2, 6, dtype=torch.float64)},
        "another prefix": {f"x.{key}": t for key, t in state.items()},
    }

    with pytest.raises((ValueError, RuntimeError)):
        adapter.load_state_dict(model, wrong[sin])


@pytest.mark.parametrize(("mode", "biases"), [("none", 0), ("lora_only", 1), ("all", 2)], ids=str)
def test_bias_modes_train_what_they_say(adapter, mode, biases):
    """none, those of adapted modules, all: trained, and saved."""
    config = LoraConfig(r=3, lora_alpha=8, target_modules=("fc",), bias=mode)
    model = adapter.inject(Toy(), config)

    assert len([name for name in trained(model) if name.endswith("bias")]) == biases
    assert len([key for key in adapter.state_dict(model) if key.endswith("bias")]) == biases
    assert len(trained(model)) == 2 + biases


def test_reference_restores_the_base_bit_for_bit(reference):
    """Fifty merges and unmerges in bfloat16 leave the very weights, and the very outputs."""
    model = fill(reference, reference.inject(Toy(torch.bfloat16), CONFIG))
    weights, expected = Toy(torch.bfloat16), model(TOKENS)
    for _ in range(50):
        reference.merge(model)
        reference.merge(model)
        reference.unmerge(model)

    assert torch.equal(model(TOKENS), expected)
    assert torch.equal(reference.base_weight(model, "fc"), weights.fc.weight)


def test_reference_merges_one_of_two_tied_weights(reference):
    """Merging the embedding leaves the head that shares its weight alone; unmerging ties them again."""
    model = Toy()
    model.head = nn.Linear(6, 11, bias=False).double()
    model.head.weight = model.emb.weight
    head = model.head.weight.detach().clone()
    model = reference.inject(model, LoraConfig(r=3, lora_alpha=8, target_modules=("emb",)))
    reference.merge(fill(reference, model))
    merged = model.head.weight.detach().clone()
    reference.unmerge(model)

    assert torch.equal(merged, head)
    assert model.head.weight is model.emb.weight


def test_reference_refuses_to_merge_nan(reference):
    """A ΔW that is not finite raises, and no layer is merged."""
    model = fill(reference, reference.inject(Toy(), CONFIG))
    reference.factors(model)["head"][0].B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        reference.merge(model)

    assert torch.equal(reference.base_weight(model, "fc"), Toy().fc.weight)


def test_reference_draws_by_the_seed_and_leaves_it_alone(reference):
    """The same seed gives the same factors, another seed others; torch's generator does not move."""
    drawn = []
    for seed in (1, 1, 2):
        model = Toy()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append(reference.factors(reference.inject(model, CONFIG))["fc"][0].A.detach())
        assert torch.equal(torch.get_rng_state(), before)

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", SEVERAL)
def test_disable_gives_the_base_and_comes_back(name):
    """Inside, the base's outputs bit for bit; after an exception, the adapter's, trainable as before."""
    adapter = resolve(name)
    model = fill(adapter, adapter.inject(Toy(), CONFIG))
    outputs, free = model(TOKENS), trained(model)
    inside = []

    def stumble():
        with adapter.disable(model):
            inside.append(model(TOKENS))
            raise KeyError

    with pytest.raises(KeyError):
        stumble()

    assert torch.equal(inside[0], Toy()(TOKENS))
    assert torch.equal(model(TOKENS), outputs)
    assert trained(model) == free


def test_reference_disables_what_is_merged(reference):
    """The unmerged weights act inside `disable`, in train and eval mode alike."""
    model = fill(reference, reference.inject(Toy(), CONFIG))
    reference.merge(model)
    with reference.disable(model):
        assert torch.equal(model(TOKENS), Toy()(TOKENS))


@pytest.mark.parametrize("name", SEVERAL)
def test_several_adapters_stay_apart(name):
    """Each acts alone, trains alone, and goes without trace; an unknown name raises."""
    adapter = resolve(name)
    model = fill(adapter, adapter.inject(Toy(), CONFIG))
    first = model(TOKENS)
    adapter.add(model, "two", LoraConfig(r=2, lora_alpha=5, target_modules=("head",)))
    free = trained(model)
    adapter.activate(model, "two")
    second = fill(adapter, model, seed=6)(TOKENS)
    expected = truth(adapter, model)(TOKENS)
    mine = trained(model)
    adapter.activate(model, "default")
    adapter.delete(model, "two")

    assert len(free) == 6
    assert len(mine) == 2
    assert far(second, expected) < 1e-13
    assert torch.equal(model(TOKENS), first)
    for call in (adapter.activate, adapter.delete):
        with pytest.raises(ValueError, match="nobody"):
            call(model, "nobody")


@pytest.mark.parametrize("name", SEVERAL)
def test_a_frozen_adapter_stays_frozen(name):
    """What was added with `trainable=False` does not train when activated; the other does again."""
    adapter = resolve(name)
    model = adapter.inject(Toy(), CONFIG)
    before = trained(model)
    adapter.add(model, "two", CONFIG, trainable=False)
    adapter.activate(model, "two")
    while_frozen = trained(model)
    adapter.activate(model, "default")

    assert while_frozen == []
    assert trained(model) == before


@pytest.mark.parametrize("name", ["reference", "peft"])
def test_a_combination_is_the_weighted_sum(name):
    """ΔW = Σ weight · ΔW, negative weights and unequal ranks too."""
    adapter = resolve(name)
    model = fill(adapter, adapter.inject(Toy(), CONFIG))
    one = deltas(adapter, model)
    adapter.add(model, "two", LoraConfig(r=5, lora_alpha=4, target_modules=CONFIG.target_modules))
    adapter.activate(model, "two")
    two = deltas(adapter, fill(adapter, model, seed=6))
    adapter.combine(model, ["default", "two"], [0.7, -1.3], "mix")
    adapter.activate(model, "mix")
    mixed = deltas(adapter, model)

    assert mixed.keys() == one.keys()
    assert max(far(mixed[k][0], 0.7 * one[k][0] - 1.3 * two[k][0]) for k in one) < 1e-13


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("trainable", [False, True])
def test_what_was_saved_loads_into_a_bare_base(name, trainable, tmp_path):
    """Factors and scaling come back, and train only if asked."""
    adapter = resolve(name)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=("fc", "head"), use_rslora=True)
    model = fill(adapter, adapter.inject(Toy(), config))
    adapter.save(model, tmp_path)
    loaded = adapter.load(Toy(), tmp_path, trainable=trainable)

    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert len(trained(loaded)) == (4 if trainable else 0)


@pytest.mark.parametrize("name", ["reference", "peft"])
def test_modules_to_save_are_trained_copies(name):
    """The copy trains and is saved whole; disabled, the base's own module acts."""
    adapter = resolve(name)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=("fc",), modules_to_save=("norm",))
    model = adapter.inject(Toy(), config)
    for key, parameter in model.named_parameters():
        if key in trained(model) and "norm" in key:
            parameter.data += 1
    with adapter.disable(model):
        disabled = model(TOKENS)

    assert len(trained(model)) == 4
    assert len(adapter.state_dict(model)) == 4
    assert not torch.equal(model(TOKENS), Toy()(TOKENS))
    assert torch.equal(disabled, Toy()(TOKENS))


@pytest.mark.parametrize("merged", [False, True])
def test_reference_trains_a_bias_on_B(reference, merged):
    """`lora_bias` adds scaling · bias to the output; merging makes a bias where the base has none."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=("head",), lora_bias=True, use_rslora=True
    )
    model = fill(reference, reference.inject(Toy(), config))
    (f,) = reference.factors(model)["head"]
    expected = truth(reference, model)(TOKENS) + f.scaling * f.bias.detach()
    if merged:
        reference.merge(model)

    assert f.scaling == 3
    assert far(model(TOKENS), expected) < 1e-13


@pytest.mark.parametrize("verb", ["load", "add", "activate", "combine"])
def test_reference_refuses_what_merging_would_spoil(reference, verb):
    """What would leave another adapter's ΔW in the weights raises while merged, and says so."""
    model = reference.inject(Toy(), CONFIG)
    state = reference.state_dict(model)
    reference.merge(model)
    calls = {
        "load": lambda: reference.load_state_dict(model, state),
        "add": lambda: reference.add(model, "two", CONFIG),
        "activate": lambda: reference.activate(model, "default"),
        "combine": lambda: reference.combine(model, ["default"], [1.0], "mix"),
    }

    with pytest.raises(RuntimeError, match=f"unmerge before you {verb}"):
        calls[verb]()


@pytest.mark.parametrize("merged", [False, True])
def test_reference_is_copied_and_pickled_whole(reference, merged):
    """A copy answers alike, unmerges by itself, and shares nothing."""
    model = fill(reference, reference.inject(Toy(), CONFIG))
    unmerged = model(TOKENS)
    if merged:
        reference.merge(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), model(TOKENS))
        reference.unmerge(other)
        assert torch.equal(other(TOKENS), unmerged)
        fill(reference, other, seed=9)
        assert not torch.equal(other(TOKENS), model(TOKENS))


def test_a_failed_injection_leaves_the_model_bare(reference):
    """A layer without an equation raises before anything is replaced."""
    model = Toy()
    with pytest.raises(ValueError, match="norm is a LayerNorm; what can be adapted is Linear"):
        reference.inject(model, LoraConfig(r=3, lora_alpha=8, target_modules=("fc", "norm")))

    assert type(model.fc) is nn.Linear
    assert model.fc.weight.requires_grad
    assert reference.inject(model, CONFIG) is model


def test_peft_says_that_it_adapts_a_projection_whole():
    """A part that the config leaves out would be adapted with the others."""
    parts = {"fc": ((3, True), (6, False))}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("fc",), enable_lora=parts)

    with pytest.raises(ValueError, match="PEFT has no enable_lora"):
        resolve("peft").inject(Toy(), config)


def test_loralib_says_what_it_cannot_cut():
    """Parts of unequal size, as in grouped-query attention, are told with their sizes."""
    parts = {"fc": ((5, True), (2, False), (2, True))}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("fc",), enable_lora=parts)

    with pytest.raises(
        ValueError, match=r"the parts of fc are 5, 2, 2 rows; loralib's MergedLinear"
    ):
        resolve("loralib").inject(Toy(), config)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_reference_merges_a_quantised_base(reference, kind):
    """The dense merged layer answers as the unmerged; unmerging gives back the very bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = (
        {"compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
    )
    layer = getattr(bitsandbytes.nn, kind)(64, 96, **given)
    model = nn.Sequential(layer).to("cpu")
    model = reference.inject(model, LoraConfig(r=3, lora_alpha=8, target_modules=("0",)))
    x = torch.randn(3, 64)
    expected = fill(reference, model)(x).detach()
    reference.merge(model)
    merged = model(x)
    reference.unmerge(model)

    assert far(merged, expected.double()) < 1e-5
    assert torch.equal(model(x), expected)
