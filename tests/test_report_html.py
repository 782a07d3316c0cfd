"""The page, opened from disk in a real Chromium."""

from __future__ import annotations

import os
import re

import chromium
import pytest
import report_samples as samples

from harness.cli import main

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
    found = {}
    for name, arguments in commands.items():
        found[name] = folder / f"{name}.html"
        main([*arguments, "--html", str(found[name])])
    return found


PAGES = ("check", "mixture", "comparison", "history")


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
    """Nothing makes the page scroll sideways, on a telephone or on a desk."""
    browser.view(width)
    browser.open(pages[name].as_uri())

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
