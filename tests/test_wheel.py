"""The three doors work for a stranger's package, both installed from wheels, in an empty folder."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds both wheels, over the libraries installed here, and an empty folder."""
    wheels = tmp_path_factory.mktemp("wheels")
    for tree in (ROOT, ROOT / "tests" / "acme"):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(tree)],
            check=True,
        )
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    packages = next(home.glob("lib/python*/site-packages"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--ignore-installed",
            "--target",
            str(packages),
            *map(str, wheels.glob("*.whl")),
        ],
        check=True,
    )
    # A plain path line: the libraries are seen, the editable install of this tree is not.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    empty = tmp_path_factory.mktemp("empty")

    def run(*args):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [home / "bin" / "python", *args],
            cwd=empty,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    run.folder = empty
    return run


def test_the_wheel_stands_by_itself(installed):
    """The installed package is the wheel's, specs and data included."""
    done = installed(
        "-c",
        "import harness, harness.specs, pathlib as p; h = p.Path(harness.__file__).parent; "
        "print('site-packages' in str(h), (h / 'py.typed').is_file(), (h / 'specs' / 'merge.py').is_file(),"
        " any(h.glob('data/**/*.safetensors')), any(h.glob('recipes/*.toml')), any(h.glob('specs/known/*.toml')))",
    )

    assert done.stdout.split() == ["True"] * 6, done.stdout + done.stderr


def test_the_command_line_judges_an_entry_point(installed):
    """`lora-harness check acme` finds README's shim by name, and it conforms in every core spec."""
    done = installed("-m", "harness.cli", "check", "acme")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("acme 2.3.1")
    assert "CONFORMS: " in done.stdout


def test_pytest_judges_with_nothing_in_the_folder(installed):
    """`pytest --adapter acme` in an empty folder."""
    done = installed(
        "-m", "pytest", "--adapter", "acme", "--tier", "smoke", "-p", "no:cacheprovider"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_the_decorator_judges_in_the_implementers_own_suite(installed):
    """Three lines in their tests."""
    (installed.folder / "test_acme.py").write_text(
        "from harness import parametrize_with_specs\n\n"
        '@parametrize_with_specs("acme_lora.adapter:AcmeAdapter", tier="smoke")\n'
        "def test_conforms(spec_case): spec_case.run()\n"
    )
    done = installed("-m", "pytest", "-p", "no:cacheprovider", "test_acme.py")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
