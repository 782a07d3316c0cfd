"""The contract's own helps: what a LoraConfig finds, replaces and cuts, and what a checkpoint must fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.adapter import Capabilities, LoraConfig, load_exactly


class Model(nn.Module):
    """Names that end alike, a list, a head, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(2, 3)
        self.qkv_proj = nn.Linear(2, 9)
        self.layers = nn.ModuleList([nn.Linear(2, 3) for _ in range(12)])
        self.lm_head = nn.Linear(2, 5)
        self.alias = self.v_proj


def config(*targets, **fields):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets} | fields)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": True}, "r must be a whole number of at least 1, not True"),
        ({"r": 2.0}, "r must be a whole number of at least 1, not 2.0"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, not 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, not nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), not 1.0"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, not 'some'"),
        ({"target_modules": "q"}, "must be a tuple of names or \"all-linear\", not the string 'q'"),
        ({"target_modules": ()}, "target_modules is empty: name at least one module"),
    ],
)
def test_a_setting_that_means_nothing_raises(fields, line):
    """The message says the setting, the rule, and what was given."""
    with pytest.raises(ValueError, match=line):
        config("v_proj", **fields)


def test_scaling_is_alpha_over_r_or_its_root():
    """alpha/r, and alpha/√r under rsLoRA."""
    assert config("v_proj", r=4, lora_alpha=6).scaling == 1.5
    assert config("v_proj", r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("v_proj",), ["v_proj"]),
        (("qkv_proj", "v_proj"), ["v_proj", "qkv_proj"]),
        (("layers.1",), ["layers.1"]),
        (("alias",), ["v_proj"]),
        (("1", "11"), ["layers.1", "layers.11"]),
    ],
)
def test_a_name_is_equal_or_ends_in_a_dot_and_it(targets, found):
    """`v_proj` is not `qkv_proj`, layer 1 is not layer 11, a second name is the first's module."""
    assert list(config(*targets).targets(Model())) == found


def test_a_name_that_matches_nothing_raises():
    """All such names are told, and the model's type."""
    with pytest.raises(ValueError, match="target_modules: q_proj, proj match no module of Model"):
        config("v_proj", "q_proj", "proj").targets(Model())


def test_all_linear_leaves_the_head():
    """Every nn.Linear but `lm_head`, or but what `get_output_embeddings` gives."""
    model = Model()
    everything = config(target_modules="all-linear")
    by_name = everything.targets(model)
    model.get_output_embeddings = lambda: model.layers[3]
    by_method = everything.targets(model)

    assert len(by_name) == 14
    assert "lm_head" not in by_name
    assert "lm_head" in by_method
    assert "layers.3" not in by_method


def test_replace_puts_one_module_under_every_name():
    """The second name of a module leads to the same replacement."""
    model, made = Model(), []

    def make(name, module):
        made.append(name)
        return nn.Sequential(module)

    config("v_proj", "layers.2").replace(model, make)

    assert made == ["v_proj", "layers.2"]
    assert model.v_proj is model.alias
    assert isinstance(model.v_proj, nn.Sequential)
    assert isinstance(model.layers[2], nn.Sequential)
    assert type(model.qkv_proj) is nn.Linear


def test_replace_does_not_replace_the_model_itself():
    """There is nowhere to put what would stand in its place."""
    with pytest.raises(ValueError, match="the model itself cannot be replaced"):
        config("proj", target_modules=("",)).replace(nn.Linear(2, 3), lambda _, module: module)


def test_parts_are_the_rows_that_are_wanted():
    """A slice for each part that is wanted; None for a layer that is not fused."""
    cut = config("qkv_proj", enable_lora={"qkv_proj": ((4, True), (2, False), (3, True))})

    assert cut.parts("layers.0.qkv_proj") == [slice(0, 4), slice(6, 9)]
    assert cut.parts("vqkv_proj") is None
    assert cut.layout("qkv_proj") == ((4, True), (2, False), (3, True))


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (((4, True), (2, True)), "the parts of qkv_proj are 6 rows together, the layer has 9"),
        (((4, False), (5, False)), "qkv_proj has no part that is wanted"),
        ((), "the parts of qkv_proj are 0 rows together, the layer has 9"),
    ],
)
def test_parts_that_do_not_fit_raise(layout, line):
    """Sizes that do not add up, and nothing wanted, are told as soon as the layer is seen."""
    with pytest.raises(ValueError, match=line):
        config("qkv_proj", enable_lora={"qkv_proj": layout}).targets(Model())


def test_load_exactly_writes_into_the_live_tensors():
    """Values are copied and cast; the tensors stay the same objects."""
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    load_exactly(own, {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(1)})

    assert own["a"].sum() == 6
    assert own["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"a": torch.ones(2)}, r"1 missing \['b'\], 0 left over \[\]"),
        ({k: torch.ones(2) for k in "abc"}, r"0 missing \[\], 1 left over \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"b is \(3,\), should be \(2,\)"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_load_exactly_raises_before_it_writes(state, line):
    """What does not fit is told, and nothing is half loaded."""
    own = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=line):
        load_exactly(own, state)

    assert all(tensor.sum() == 0 for tensor in own.values())


def test_capabilities_take_any_collection_of_known_names():
    """Sets, tuples and lists become frozensets; the defaults are modest."""
    given = Capabilities(layers=["linear", "conv2d"], features={"merge"})

    assert given.layers == frozenset({"linear", "conv2d"})
    assert given.dtypes == frozenset({"float32"})
    assert given.bias == frozenset({"none"})
    assert Capabilities().features == frozenset()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"features": {"mrege"}}, "capabilities.features: unknown mrege; known are merge, unmerge"),
        ({"layers": "linear"}, "capabilities.layers must be a set of names, not 'linear'"),
        ({"features": {"unmerge"}}, "capabilities.features: unmerge needs merge; claim both"),
        (
            {"features": {"combine"}},
            "capabilities.features: combine needs multi_adapter; claim both",
        ),
    ],
)
def test_capabilities_nobody_knows_raise(fields, line):
    """A claim is spelled right or refused."""
    with pytest.raises(ValueError, match=line):
        Capabilities(**fields)
