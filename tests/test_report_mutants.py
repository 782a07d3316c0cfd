"""Damaged report files through the commands: an exit code and a sentence, never a traceback."""

from __future__ import annotations

import re

import pytest
import report_samples as samples
from report_mutants import mutants

from harness.cli import main

SENTENCE = re.compile(r"^lora-harness (compare|report): .+; .+$")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return samples.write(tmp_path_factory.mktemp("old"), samples.small("old"))[0]


@pytest.mark.parametrize("seed", range(5))
def test_five_hundred_damaged_reports_end_in_a_sentence(seed, old, tmp_path, capsys):
    """A hundred at a time: every one exits 0, 1, 2 or 3; at 2 one line says what and how to mend."""
    codes = set()
    path, page = tmp_path / "new.json", tmp_path / "page.html"
    for index, damaged in enumerate(mutants(100, seed=seed, of=samples.small("new"))):
        path.write_bytes(damaged)
        for arguments in (
            ["compare", str(old), str(path)],
            ["compare", str(path), str(old), "--markdown", "-"],
            ["report", str(path), "--html", str(page), "--markdown", "-", "--github"],
        ):
            code = main(arguments)

            told = capsys.readouterr()
            told.out.encode()
            assert code in {0, 1, 2, 3}, (seed, index)
            assert "Traceback" not in told.out + told.err
            assert "\x1b" not in told.out + told.err
            if code == 2:
                (line,) = told.err.splitlines()
                assert SENTENCE.match(line), line
            codes.add(code)

    assert codes >= {0, 2}
