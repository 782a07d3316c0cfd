"""The page, opened from disk in a real Chromium."""

from __future__ import annotations

import json
import os
import re

import chromium
import pytest
import report_samples as samples

from harness.cli import main
from harness.report import html

TAG = "<script>window.pwned = true</script><img src=x onerror='window.pwned = true'>"

UNDRAWN = """
[...document.querySelectorAll('canvas')].filter((canvas) => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let at = 0; at < pixels.length; at += 4)
    if (pixels[at + 3] > 200) seen.add(`${pixels[at] >> 4},${pixels[at + 1] >> 4},${pixels[at + 2] >> 4}`);
  return seen.size < 2;
}).map((canvas) => canvas.getAttribute('aria-label'))
"""


OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"

SQUASHED = """
[...document.querySelectorAll('canvas')].filter((canvas) => {
  const { width, height } = canvas.getBoundingClientRect();
  return Math.abs(width / height / (canvas.width / canvas.height) - 1) > 0.02;
}).map((canvas) => canvas.getAttribute('aria-label'))
"""


def data(path):
    """What a page's script is given."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    return json.loads(found[1])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium, and CI must have one: apt-get install chromium")
        pytest.skip("no Chromium on this machine")
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every kind of page: a failed check, a mixture, a comparison, a history."""
    folder = tmp_path_factory.mktemp("pages")
    bad = samples.check("bad", {"merge/same-output": "failed", "merge/no-drift": "blocked"})
    bad["results"][25] |= {"sentence": TAG, "failures": [samples.failure(expected=TAG, where=TAG)]}
    old, new = samples.bench("old"), samples.bench("new", label=TAG)
    new["counters"][3]["value"] += 1
    pair = {"verdict": "worse", "ratio": 1.07, "low": 1.04, "high": 1.1, "against": "bench-old"}
    new["timings"][0]["paired"] = pair
    paths = [str(path) for path in samples.write(folder, bad, samples.finetune(), old, new)]
    year = folder / "year"
    year.mkdir()
    samples.write(year, *(samples.night(day, 100) for day in range(95, 105)))
    commands = {
        "check": ["report", paths[0]],
        "mixture": ["report", *paths[:3]],
        "comparison": ["compare", *paths[2:]],
        "history": ["report", str(year)],
    }
    many = [samples.bench(name, seed=at, budget=2**34 + at * 2**30) for at, name in enumerate("ab")]
    many += [samples.finetune("c"), samples.finetune("d", seed=1)]
    commands["several"] = ["report", *map(str, samples.write(folder, *many))]
    extreme = folder / "extreme"
    extreme.mkdir()
    nights = [samples.night(day, 80) | {"memory": _huge()} for day in (1, 2, 3)]
    nights[1]["counters"][0]["value"] = "NaN"
    for night in nights:
        night["timings"][0]["samples"] = [1.7e308, 1.7e308]
        night["timings"][0]["value"] = None
    samples.write(extreme, *nights)
    commands["extreme"] = ["report", str(extreme)]
    found = {}
    for name, arguments in commands.items():
        found[name] = folder / f"{name}.html"
        main([*arguments, "--html", str(found[name])])
    return found


PAGES = ("check", "mixture", "comparison", "history", "several", "extreme")


def _huge():
    """Two kinds of memory whose sum no float holds, beside two that can be drawn; ranks falling."""
    row = {"subject": "peft", "metric": "peak_bytes", "unit": "B"}
    return [
        row | {"kind": kind, "conditions": {"r": r}, "value": value}
        for r, value in ((128, 1e308), (64, 2**30), (8, 2**29))
        for kind in ("adapters", "gradients")
    ]


@pytest.mark.parametrize("name", PAGES)
def test_it_opens_without_an_error_or_a_request(browser, pages, name):
    """No console error, and nothing asked for but the file itself."""
    browser.view(1280)
    browser.open(pages[name].as_uri())

    assert browser.problems() == []
    assert browser.requests() == [pages[name].as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES[1:])
def test_every_chart_is_drawn(browser, pages, name, scheme):
    """Each canvas has marks on it, in light and in dark."""
    browser.view(1280, scheme=scheme)
    browser.open(pages[name].as_uri())

    assert browser.run("document.querySelectorAll('canvas').length") > 0
    assert browser.run(UNDRAWN) == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1600])
def test_it_is_as_wide_as_the_window(browser, pages, name, width):
    """Nothing makes the page scroll sideways, on a telephone or on a desk, folded or not."""
    browser.view(width)
    browser.open(pages[name].as_uri())
    browser.run(OPEN_ALL)

    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_failure_opens_by_keyboard(browser, pages):
    """Tab reaches the failed spec, Enter opens its record and goes there."""
    browser.view(1280)
    browser.open(pages["check"].as_uri())
    assert browser.run("document.querySelectorAll('details.spec[open]').length") == 0

    for _ in range(20):
        browser.press("Tab", 9)
        if browser.run("document.activeElement.classList.contains('failed')"):
            break
    browser.press("Enter", 13, "\r")
    browser.run("new Promise((done) => setTimeout(done, 50))")

    assert browser.run("document.querySelector('details.spec.failed').open") is True
    assert browser.run("document.activeElement.closest('details').className") == "spec failed"


def test_hostile_text_stays_text(browser, pages):
    """A script in a spec's text is shown as it is written, and does nothing."""
    for name in ("check", "comparison"):
        browser.open(pages[name].as_uri())

        assert browser.run("window.pwned === undefined") is True
        assert browser.run("document.querySelectorAll('main img').length") == 0
        assert TAG.partition(">")[0] in browser.run("document.body.textContent")


def test_the_history_shows_the_chosen_row(browser, pages):
    """Choosing another row draws it and lists its values."""
    browser.view(1280)
    browser.open(pages["history"].as_uri())
    rows = "document.querySelectorAll('[data-table] tbody tr').length"
    head = "document.querySelector('[data-table] th:nth-child(2)').textContent"
    before = browser.run(head)
    browser.run(
        "(() => { const select = document.querySelector('select');"
        " select.selectedIndex = select.options.length - 1;"
        " select.dispatchEvent(new Event('change')); })()"
    )

    assert browser.run(rows) == 10
    assert browser.run(head) != before
    assert browser.problems() == []


def test_it_prints_on_white(browser, pages):
    """Printed from a dark screen, the page is light and its failures are open."""
    browser.view(1280, scheme="dark")
    browser.open(pages["check"].as_uri())
    browser.run("dispatchEvent(new Event('beforeprint'))")

    assert browser.run("document.querySelectorAll('details.spec:not([open])').length") == 0
    ground = browser.run("getComputedStyle(document.documentElement).getPropertyValue('--sheet')")
    assert ground.strip() == "#ffffff"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details.spec[open]').length") == 0


def test_charts_keep_their_shape_on_paper(browser, pages):
    """Drawn anew for paper: no canvas is squashed, and every table of values is open and filled."""
    browser.view(1600)
    browser.open(pages["mixture"].as_uri())
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.view(718)
    browser.call("Emulation.setEmulatedMedia", media="print")

    assert browser.run(SQUASHED) == []
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.run("document.querySelectorAll('[data-long]:empty').length") == 0
    browser.call("Emulation.setEmulatedMedia", media="")


def test_a_long_table_is_built_when_it_is_opened(browser, pages):
    """A row a cost, with its badge, its place and its values."""
    browser.view(1280)
    browser.open(pages["comparison"].as_uri())
    rows = "[...document.querySelectorAll('[data-long]')].map((one) => one.querySelectorAll('tbody tr').length)"
    assert browser.run(rows)[:2] == [2, 0]
    browser.run(OPEN_ALL)
    browser.run("new Promise((done) => setTimeout(done, 100))")

    bench = samples.bench()
    counts = [len(bench[name]) for name in ("timings", "memory", "counters")]
    assert browser.run(rows) == [2, sum(counts) - 2, *counts]
    text = browser.run("document.querySelector('[data-long] tbody tr').textContent")
    assert text.startswith("▲ worsebase training-step flopsmini-4k, r=16")
    assert text.endswith("more (+6.7e-12 %)")


def test_runs_on_one_page_keep_their_lines_and_budgets(pages):
    """Two runs begun in the same minute are two lines, each with its own name and budget."""
    charts = data(pages["several"])["charts"]

    loss = next(chart for chart in charts if chart["title"] == "Loss")
    names = [series["name"] for series in loss["series"]]
    runs = ["(finetune-c)", "(finetune-d)"]
    assert len(names) == len(set(names)) == 4
    assert all(any(run in name for name in names) for run in runs)
    peak = next(chart for chart in charts if chart["title"] == "training-step peak bytes")
    assert len(peak["series"]) == 8
    assert [name for name, _ in peak["limits"]] == [
        "budget 16.00 GiB of bench mini-4k, 2026-01-02 03:00 (bench-a)",
        "budget 17.00 GiB of bench mini-4k, 2026-01-02 03:00 (bench-b)",
    ]
    stacks = [chart for chart in charts if chart["kind"] == "bar"]
    assert {name for chart in stacks for name, _ in chart["limits"]} == {
        "budget 16.00 GiB",
        "budget 17.00 GiB",
    }


def test_what_no_axis_holds_is_left_out_of_the_charts(pages):
    """A sum beyond a float, a NaN and an infinite median leave gaps; ranks stand in their order."""
    found = data(pages["extreme"])

    ranks = [chart for chart in found["charts"] if chart["x_label"] == "rank r"]
    (stack,) = (chart for chart in ranks if chart["kind"] == "bar")
    assert stack["x"] == ["8", "64", "128"]
    assert [series["y"][2] for series in stack["series"]] == [None, None]
    (history,) = found["histories"]
    costs = [row for row in history["rows"] if not row["name"].startswith("spec")]
    assert not [row for row in costs if any(isinstance(one, str) for one in row["values"])]


def test_claims_without_a_judgement_are_told(tmp_path):
    """Beside the verdict stand what works unclaimed, and what is claimed and was not judged."""
    claims = {"unclaimed": ["float64"], "unjudged": ["compile", TAG]}
    told, silent = samples.write(tmp_path, samples.check(**claims), samples.check("silent"))
    for path in (told, silent):
        main(["report", str(path), "--html", str(path.with_suffix(".html"))])

    text = told.with_suffix(".html").read_text()
    assert '<p class="facts">Works, but is not claimed: float64</p>' in text
    assert '<p class="facts">Claimed, not judged: compile, &lt;script&gt;' in text
    assert "Claimed, not judged" not in silent.with_suffix(".html").read_text()


def test_equal_results_have_records_of_their_own(tmp_path):
    """A spec told twice in the same words has two records, each with its id."""
    report = samples.check("twice", {"merge/same-output": "failed"})
    report["results"] += [one for one in report["results"] if one["outcome"] == "failed"]
    (path,) = samples.write(tmp_path, report)
    page = tmp_path / "page.html"
    main(["report", str(path), "--html", str(page)])

    ids = re.findall(r'id="(record-[^"]+)"', page.read_text())
    assert ids == ["record-0-0", "record-0-1"]


def test_a_bench_of_182_cells_fits_a_page(tmp_path, capsys):
    """Its 7,860 rows, shown or compared with another's, stay under 2 MB."""
    old, new = (samples.large_bench(name) for name in ("old", "new"))
    paths = [str(path) for path in samples.write(tmp_path, old, new)]
    page = tmp_path / "page.html"
    assert sum(len(old[name]) for name in ("counters", "memory", "timings")) >= 7_860

    assert main(["report", paths[1], "--html", str(page)]) == 0
    assert page.stat().st_size < 2_000_000
    assert main(["compare", *paths, "--html", str(page)]) == 0
    assert page.stat().st_size < 2_000_000
    capsys.readouterr()


def test_a_page_too_large_still_has_its_verdict_told(tmp_path, monkeypatch, capsys):
    """The terminal has heard what became of the rows before the page is refused."""
    monkeypatch.setattr(html, "LARGEST", 1000)
    paths = samples.write(tmp_path, samples.small("old"), samples.small("new"))

    assert main(["compare", *map(str, paths), "--html", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr()
    assert "same" in told.out.splitlines()[-1]
    assert "give fewer reports at once" in told.err


def test_every_chart_has_its_table(pages):
    """Beside each canvas stands a table of its values."""
    for name in PAGES:
        text = pages[name].read_text()

        figures = re.findall(r'<figure class="chart.*?</figure>', text, flags=re.DOTALL)
        assert len(figures) == len(re.findall("<canvas", text))
        assert all("<table" in one or "data-table" in one for one in figures)


def test_a_page_is_small_and_whole(pages):
    """Under 2 MB, with no address in it that is not the charts library's own."""
    for path in pages.values():
        text = path.read_text()

        assert len(text.encode()) < 2_000_000
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text.partition("<script")[0])


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("option", ["--html", "--markdown"])
def test_a_report_that_is_read_is_not_written_over(command, option, tmp_path, capsys):
    """A slip of the finger loses no night's run."""
    paths = samples.write(tmp_path, samples.check("old"), samples.check("new"))
    given = [str(path) for path in paths]
    before = paths[0].read_bytes()

    code = main([command, *given, option, given[0]])

    assert (code, paths[0].read_bytes()) == (2, before)
    assert capsys.readouterr().err == (
        f"lora-harness {command}: {option} {given[0]}: is a report that is read here, and would be lost; "
        "give another path\n"
    )
