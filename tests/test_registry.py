"""A name finds an implementation, or one line says why not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from harness import registry
from harness.adapter import Adapter, Capabilities
from harness.errors import UsageError

SHIM = """
from harness.adapter import Capabilities

class Shim:
    name, version, capabilities = "mine", "1.0", Capabilities(features={"merge"})
    def inject(self, model, config): return model
    def factors(self, model): return {}
    def state_dict(self, model): return {}
    def load_state_dict(self, model, state): pass
    def merge(self, model): pass

number = 3
def broken(): raise RuntimeError("no\\nluck")
def nothing(): return None
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a user's own adapter in it."""
    (tmp_path / "mine_adapter.py").write_text(textwrap.dedent(SHIM), encoding="utf-8")
    (tmp_path / "mine_needy.py").write_text("import not_a_module\n", encoding="utf-8")
    (tmp_path / "mine_wrong.py").write_text("def f(:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_a_built_in_name_finds_its_implementation(name):
    """Each built-in name gives an adapter of that name, with a version."""
    adapter = registry.resolve(name)

    assert isinstance(adapter, Adapter)
    assert adapter.name == name
    assert adapter.version


def test_the_names_are_sorted_and_hold_the_built_in():
    """`names` is what `resolve` knows without a colon."""
    assert registry.names() == sorted(registry.names())
    assert {"loralib", "peft", "reference", "transformers"} <= set(registry.names())


def test_an_adapter_in_the_working_directory_is_found(here):
    """`pkg.module:factory` is looked for where the user stands."""
    assert registry.resolve("mine_adapter:Shim").name == "mine"


def test_a_folder_called_harness_beside_the_adapter_is_not_ours(here):
    """A process that does not look in the working directory for us still finds the user's adapter."""
    (here / "harness").mkdir()
    (here / "harness" / "__init__.py").write_text(
        "raise SystemExit('not ours')\n", encoding="utf-8"
    )
    code = "from harness import registry; print(registry.resolve('mine_adapter:Shim').name)"

    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=here, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr


def test_an_entry_point_is_found_by_name(here, monkeypatch):
    """An installed implementation goes by the name of its entry point; a built-in name wins."""
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("mine", "mine_adapter:Shim", registry.GROUP),
        EntryPoint("reference", "mine_adapter:Shim", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)

    assert "mine" in registry.names()
    assert registry.resolve("mine").name == "mine"
    assert registry.resolve("reference").name == "reference"


WRONG = {
    "refrence": "adapter 'refrence': no such name; did you mean 'reference'?",
    "acme-lora-of-mine": "adapter 'acme-lora-of-mine': no such name; give one of",
    "": "adapter '': no such name; give one of",
    ":": "adapter ':': nothing beside the colon; write pkg.module:factory",
    "nowhere_at_all:adapter": "adapter 'nowhere_at_all:adapter': no module 'nowhere_at_all' here; "
    "install it, or run where it lies",
    "mine_needy:adapter": "adapter 'mine_needy:adapter': mine_needy needs 'not_a_module', "
    "which is not installed",
    "mine_wrong:adapter": "adapter 'mine_wrong:adapter': importing mine_wrong raised SyntaxError: ",
    "mine_adapter:shim": "adapter 'mine_adapter:shim': mine_adapter has no 'shim'; "
    "did you mean 'Shim'?",
    "mine_adapter:number": "adapter 'mine_adapter:number': 'number' is of type int; "
    "name a function that takes nothing and returns an adapter",
    "mine_adapter:broken": "adapter 'mine_adapter:broken': the factory raised RuntimeError: no luck",
    "mine_adapter:nothing": "adapter 'mine_adapter:nothing': `name` is missing; it must be a string",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_wrong_is_told_in_one_line(spec, here):
    """Subject, what is wrong, how to mend it."""
    with pytest.raises(UsageError) as told:
        registry.resolve(spec)

    assert str(told.value).startswith(WRONG[spec])
    assert "\n" not in str(told.value)


class Whole:
    """An adapter with every method; each test takes one away or bends it."""

    name = "whole"
    version = "1.0"
    capabilities = Capabilities(features={"merge", "multi_adapter", "save"})

    def inject(self, model, config):
        return model

    def factors(self, model):
        return {}

    def state_dict(self, model):
        return {}

    def load_state_dict(self, model, state):
        pass

    def merge(self, model):
        pass

    def add(self, model, name, config, *, trainable=True):
        pass

    def activate(self, model, name):
        pass

    def delete(self, model, name):
        pass

    def save(self, model, directory):
        pass

    def load(self, base, directory, *, trainable=False):
        return base


BENT = {
    "version": (None, "adapter 'x': `version` is None; it must be a string"),
    "capabilities": (
        {"layers": {"linear"}},
        "adapter 'x': `capabilities` is {'layers': {'linear'}}; it must be a harness.Capabilities",
    ),
    "factors": (3, "adapter 'x': `factors` is 3; it must be a method: factors(model)"),
    "inject": (
        lambda model: model,
        "adapter 'x': `inject` takes (model); it must take inject(model, config)",
    ),
    "merge": (
        lambda: None,
        "adapter 'x': `merge` takes (); it must take merge(model)",
    ),
    "add": (
        lambda model, name, config: None,
        (
            "adapter 'x': `add` takes (model, name, config); "
            "it must take add(model, name, config, *, trainable=True)"
        ),
    ),
}


@pytest.mark.parametrize("member", BENT)
def test_a_member_that_is_not_as_agreed_is_named(member):
    """The line says which member, what it is, and what it must be."""
    bent, line = BENT[member]
    adapter = Whole()
    setattr(adapter, member, bent)

    with pytest.raises(UsageError) as told:
        registry.check(adapter, "x")

    assert str(told.value) == line


@pytest.mark.parametrize("member", ["version", "capabilities", "merge"])
def test_a_member_that_raises_is_named(member):
    """A property may ask for what is not there; that is one line, too."""

    def raises(_):
        raise RuntimeError("no\nluck")

    adapter = type("Raising", (Whole,), {member: property(raises)})()

    with pytest.raises(UsageError) as told:
        registry.check(adapter, "x")

    assert str(told.value) == f"adapter 'x': `{member}` raised RuntimeError: no luck"


def test_a_claim_without_its_method_is_named():
    """A feature claimed brings methods; one that is not there is told with the feature."""
    members = {n: getattr(Whole(), n) for n in dir(Whole) if not n.startswith("_")}
    del members["delete"]

    with pytest.raises(UsageError) as told:
        registry.check(SimpleNamespace(**members), "x")

    assert str(told.value) == (
        "adapter 'x': `delete` is missing; the feature 'multi_adapter' brings it: delete(model, name)"
    )


def test_a_class_is_not_an_adapter():
    """A factory that returns the class it should have called is told so."""
    with pytest.raises(UsageError, match="is the class Whole; it must be an instance of it"):
        registry.check(Whole, "x")


def test_an_adapter_with_more_arguments_than_asked_is_fine():
    """Optional parameters of its own do not keep an adapter out."""
    adapter = Whole()
    adapter.merge = lambda model, safe=False: None

    assert registry.check(adapter, "x") is adapter
