"""Phi-3 by name, by directory and by hub id."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from harness import hub, phi3
from harness.errors import UsageError

IDS = torch.arange(8, 40).view(2, 16)


@pytest.fixture(scope="module")
def tiny():
    return phi3.load("tiny")


@pytest.fixture
def copied(tmp_path):
    """A directory in the form of a Phi-3 checkpoint."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((phi3.directory() / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "published"),
    [("mini-4k", 3_821_079_552), ("mini-128k", 3_821_079_552), ("medium-4k", 13_960_238_080)],
)
def test_the_real_dimensions_have_the_published_number_of_parameters(name, published):
    """The named models have as many parameters as Microsoft's."""
    assert published == phi3.parameter_count(name)


def test_tiny_has_minis_proportions(tiny):
    """Like mini, tiny is deep, fused, ungrouped and nowhere square but in `o_proj`."""
    shapes = {
        name.rpartition(".")[2]: tuple(module.weight.shape)
        for name, module in tiny.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    assert set(shapes) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    assert [name for name, (o, i) in shapes.items() if o == i] == ["o_proj"]
    assert tiny.config.num_hidden_layers >= 12
    assert tiny.config.num_key_value_heads == tiny.config.num_attention_heads


def test_tiny_gqa_has_mediums_proportions():
    """tiny-gqa shares keys and values among as many heads as medium does."""
    small, real = phi3.config("tiny-gqa"), phi3.config("medium-4k")

    assert small.num_hidden_layers >= 12
    for one, other in (
        ("num_attention_heads", "num_key_value_heads"),
        ("intermediate_size", "hidden_size"),
    ):
        assert getattr(small, one) / getattr(small, other) == getattr(real, one) / getattr(
            real, other
        )


def test_tiny_is_small_enough_to_ship():
    """The weights of tiny take at most 4 MiB, and are of its own configuration."""
    assert (phi3.directory() / "model.safetensors").stat().st_size <= 4 * 2**20
    shipped = json.loads((phi3.directory() / "config.json").read_text(encoding="utf-8"))
    named = phi3.config("tiny").to_dict()
    assert {key: named[key] for key in ("vocab_size", "hidden_size", "intermediate_size")} == {
        key: shipped[key] for key in ("vocab_size", "hidden_size", "intermediate_size")
    }


def test_a_seed_names_a_model():
    """One seed gives the same weights again, another seed others, and the global seed none."""
    first = phi3.load("tiny-gqa", seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = phi3.load("tiny-gqa", seed=7)
    other = phi3.load("tiny-gqa", seed=8)

    assert torch.equal(before, torch.get_rng_state())
    for (name, one), two, three in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        assert one.dim() == 1 or not torch.equal(one, three), name


@pytest.mark.parametrize("name", ["tiny", "tiny-gqa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_dtype_is_the_one_asked_for(name, dtype):
    """Every parameter comes in the dtype that was asked for, and the model runs in it."""
    model = phi3.load(name, dtype=dtype)

    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_cache_are_settings(attention, use_cache):
    """The model says it uses the attention and the cache it was asked to use."""
    for name in ("tiny", "tiny-gqa"):
        model = phi3.load(name, attn_implementation=attention, use_cache=use_cache)

        assert model.config._attn_implementation == attention
        assert model.config.use_cache is use_cache
        assert (model(input_ids=IDS).past_key_values is not None) is use_cache


def test_a_directory_is_loaded_as_it_is(copied, tiny):
    """A checkpoint's directory gives the checkpoint's model, bit for bit."""
    assert torch.equal(phi3.load(copied)(input_ids=IDS).logits, tiny(input_ids=IDS).logits)


def _llama(folder):
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def _deeper(folder):
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"num_hidden_layers": 13}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json; point to a directory"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "no weights; put model.safetensors",
        ),
        (_llama, "its architecture is LlamaForCausalLM, not Phi3ForCausalLM; give a Phi-3"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json is not a JSON object",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"),
            "cannot be loaded",
        ),
        (
            _deeper,
            "its weights do not fit a Phi3ForCausalLM of its config.json, first at model.layers.12",
        ),
    ],
    ids=["no-config", "no-weights", "llama", "not-json", "cut-short", "other-depth"],
)
def test_a_spoilt_directory_is_told_in_one_line(copied, spoil, told):
    """What is wrong with a model directory is named, with how to mend it."""
    spoil(copied)

    with pytest.raises(UsageError) as caught:
        phi3.load(copied)

    assert told in str(caught.value)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        (
            "tiny-gq",
            {},
            "model 'tiny-gq': unknown; did you mean tiny-gqa? Known are tiny, tiny-gqa, mini-4k",
        ),
        ("./nowhere", {}, "model directory ./nowhere: does not exist; check the path"),
        ("tiny", {"dtype": "float8"}, "dtype 'float8': unknown; use one of float32, bfloat16"),
        (
            "tiny",
            {"attn_implementation": "flash"},
            "attention implementation 'flash': unknown; use one of eager",
        ),
        ("tiny", {"device": "abacus"}, "device 'abacus': this machine"),
    ],
)
def test_what_is_unknown_is_told_with_what_is_known(name, settings, told):
    """A name that means nothing is answered with names that do."""
    with pytest.raises(UsageError) as caught:
        phi3.load(name, **settings)

    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_flash_attention_that_is_not_installed_is_told(monkeypatch):
    """flash_attention_2 without its package names the package."""
    monkeypatch.setattr(phi3, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"flash_attn is not installed; install it, or say"):
        phi3.load("tiny", attn_implementation="flash_attention_2")


def test_a_hub_out_of_reach_is_told(monkeypatch):
    """A hub id that cannot be had names the obstacle, and does not wait for it."""

    def offline():
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(hub, "check_reachable", offline)

    with pytest.raises(
        UsageError, match=r"nobody/nothing: .*the hub cannot be reached\); go online"
    ):
        phi3.load("nobody/nothing")


def test_importing_the_module_is_light():
    """Neither torch nor transformers is imported before a model is asked for."""
    code = "import sys, harness.phi3, harness.chat; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert told.stdout.strip() == "set()"
