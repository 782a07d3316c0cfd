"""The fingerprint of a machine: typed, with units, and naming nobody."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema

from harness import environment
from harness.report.schema import schema


def test_it_fits_the_schema_and_json():
    """What is collected is what a report may hold."""
    found = environment.collect()

    wanted = schema()["$defs"]["environment"] | {"$defs": schema()["$defs"]}
    jsonschema.validate(json.loads(json.dumps(found)), wanted)


def test_versions_are_those_installed():
    """Each library's version is the one its metadata has."""
    found = environment.collect()["libraries"]

    assert found["torch"]["version"] == metadata.version("torch")
    assert found["peft"]["version"] == metadata.version("peft")


def test_quantities_have_their_units():
    """Memory is in bytes, cores are counted."""
    machine = environment.collect()["machine"]

    assert machine["memory"]["unit"] == "B"
    assert machine["memory"]["value"] > 2**27
    assert machine["logical_cores"] == {"value": machine["logical_cores"]["value"], "unit": "1"}


def test_it_names_no_person_and_no_place():
    """Neither the host, nor the user, nor any path is in it."""
    text = json.dumps(environment.collect())

    for private in (platform.node(), str(Path.home()), f"/{getpass.getuser()}/", str(Path.cwd())):
        assert private not in text


def test_torch_is_not_imported_for_it():
    """Collecting costs no torch where torch is not loaded."""
    code = "import sys, harness.environment as e; e.collect(); print('torch' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_sources_of_installs_are_told(tmp_path, monkeypatch):
    """An index, a commit, an archive, a folder and an editable tree are told apart (PEP 610)."""
    cases = {
        "a": (None, ("index", None)),
        "b": (
            {"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            ("vcs", "c0ffee"),
        ),
        "c": ({"url": "https://x/y.whl", "archive_info": {}}, ("archive", None)),
        "d": ({"url": "file:///x", "dir_info": {}}, ("directory", None)),
        "e": ({"url": "file:///nowhere", "dir_info": {"editable": True}}, ("editable", None)),
        "f": ("not an object", ("index", None)),
    }
    for name, (origin, _) in cases.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if origin is not None:
            (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(tmp_path))

    found = {name: environment.library(name) for name in cases}
    assert {name: (one.source, one.commit) for name, one in found.items()} == {
        name: wanted for name, (_, wanted) in cases.items()
    }


def test_a_checkout_tells_its_commit_and_whether_it_is_dirty(tmp_path):
    """A clean tree is clean, an edited one is dirty, and no repository is neither."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    assert environment._checkout(tmp_path) == {"commit": None, "dirty": None}

    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    clean = environment._checkout(tmp_path)
    (tmp_path / "file").write_text("two")

    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    assert environment._checkout(tmp_path)["dirty"] is True


def test_gpus_are_read_off_the_driver(monkeypatch):
    """Each line of nvidia-smi is a GPU; what it cannot say is null."""
    said = "NVIDIA L4, 570.86.15, 23034, 2040, 2040, 6251, 72.00, 41\nNVIDIA T4, 570.86.15, 15360, [N/A], 1590, 5001, 70.00, 33"
    monkeypatch.setattr(environment, "printed", lambda *_command, **_options: said)

    first, second = environment._gpus()
    assert first["memory"] == {"value": 23034.0 * 2**20, "unit": "B"}
    assert first["temperature"] == {"value": 41.0, "unit": "Cel"}
    assert second["clock"] is None
    assert second["power_limit"] == {"value": 70.0, "unit": "W"}


def test_a_driver_without_a_card_is_no_gpu(monkeypatch):
    """It says so in words, and ends well."""
    monkeypatch.setattr(
        environment, "printed", lambda *_command, **_options: "No devices were found"
    )

    assert environment._gpus() == []
