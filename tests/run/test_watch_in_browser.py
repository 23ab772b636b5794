"""The pages in headless Chromium: keyboard, narrow screens, light and dark, refresh.

Needs the package playwright (extra `dev`) and a Chromium or Chrome on PATH (`apt install chromium`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, step_metrics

from exgrpo_fast.run.live_page import Watch
from exgrpo_fast.run.report import make_page, write_page
from exgrpo_fast.run.sinks import JsonlSink

api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on PATH")


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        # Without its sandbox, which root and containers cannot have: the pages are our own.
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def tab(browser):
    """tab(address, width=1200, scheme='light') -> a page whose script errors fail the test."""
    contexts, errors = [], []

    def show(address: str, *, width: int = 1200, scheme: str = "light") -> Any:
        viewport = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield show
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("one", "two", "a-run-with-a-rather-long-name")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        make_run(folder, steps=20 + number, replay=number != 1)
        (folder / "config.yaml").write_text(
            f"method: exgrpo\nmodel: {{name: {'m' * 60}{number}}}\n"
        )
    return folders


@pytest.fixture(params=[1, 3], ids=["one run", "three runs"])
def address(request, runs, tmp_path: Path) -> str:
    file = tmp_path / "page.html"
    write_page(file, make_page(runs[: request.param]))
    return file.as_uri()


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_no_screen_scrolls_sideways(tab, address, width) -> None:
    page = tab(address, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    reach = "e => e.getBoundingClientRect().right <= innerWidth + 1 || !!e.closest('.wide, svg')"
    assert page.evaluate(f"[...document.querySelectorAll('main *')].every({reach})")


def contrast(page: Any, selector: str) -> float:
    """WCAG's ratio between the text of an element and the ground behind it."""
    return page.evaluate(
        """selector => {
            const element = document.querySelector(selector);
            const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(c => {
                c /= 255;
                return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            const luminance = c => 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
            let ground = element;
            while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
                ground = ground.parentElement;
            const style = getComputedStyle(element);
            const text = element.closest("svg") ? style.fill : style.color;
            const pair = [text, getComputedStyle(ground).backgroundColor];
            const [dark, light] = pair.map(c => luminance(channels(c))).sort((a, b) => a - b);
            return (light + 0.05) / (dark + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(tab, address, scheme) -> None:
    page = tab(address, scheme=scheme)
    for selector in ("h1", ".eyebrow", "figcaption h3", "figcaption p", ".keys span", "svg text"):
        assert contrast(page, selector) >= 4.5, selector
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(251, 250, 247)", "dark": "rgb(22, 24, 27)"}[scheme]


def test_the_keyboard_reaches_everything(tab, address) -> None:
    page = tab(address)
    wanted = page.evaluate(
        """() => {
            const reached = "figure[data-hover] svg, summary, pre, .wide, .prompt[tabindex]";
            window.wanted = [...document.querySelectorAll(reached)];
            return wanted.length;
        }"""
    )
    found = []
    for _ in range(wanted + 1):
        page.keyboard.press("Tab")
        found.append(page.evaluate("wanted.indexOf(document.activeElement)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or found[-1] == -1  # one sees where one is
    assert found[:wanted] == list(range(wanted))


def test_arrow_keys_walk_along_a_figure(tab, address) -> None:
    page = tab(address)
    page.evaluate("document.querySelector('figure[data-hover]').setAttribute('id', 'it')")
    while not page.evaluate("document.activeElement.closest('#it') !== null"):
        page.keyboard.press("Tab")

    def step() -> str:
        return page.locator("#it output").inner_text().split("\n")[0]

    steps = [step()]  # the last one, as soon as it has the focus
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "Home", "ArrowLeft", "End"):
        page.keyboard.press(key)
        steps.append(step())
    last, before = ("20", "19") if "reward from" in page.locator("#it svg").get_attribute("aria-label") else ("22", "21")  # fmt: skip
    assert steps == [f"step {at}" for at in (last, before, last, last, "0", "0", last)]
    page.keyboard.press("Escape")
    assert page.locator("figure.on").count() == 0


def test_the_pointer_shows_the_values_of_the_nearest_step(tab, runs, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", make_page(runs))
    page = tab((tmp_path / "page.html").as_uri())
    figure = page.locator("figure", has_text="Mean reward")
    figure.locator("svg").hover(position={"x": 40, "y": 50})  # at the left end of the axis
    assert figure.locator("output").inner_text().split("\n") == [
        "step 1", "one  0.201", "two  0.201", "a-run-with-a-rather-long-name  0.201",
    ]  # fmt: skip
    page.mouse.move(5, 5)  # beside the figures
    assert page.locator("figure.on").count() == 0


def test_sections_open_by_key(tab, runs, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", make_page(runs[:1]))
    page = tab((tmp_path / "page.html").as_uri())
    page.locator("summary", has_text="Configuration").focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").inner_text().startswith("Configuration")


# --- the live page --------------------------------------------------------------------------------


def test_a_new_step_appears_and_the_reader_loses_nothing(tab, runs) -> None:
    with Watch(runs[:1]) as watch:
        page = tab(watch.url)
        page.locator("summary", has_text="Environment").click()
        page.locator("figure", has_text="Gradient norm").locator("svg").focus()
        page.keyboard.press("ArrowLeft")
        page.mouse.wheel(0, -60)
        page.wait_for_timeout(300)
        state = """() => [scrollY, document.activeElement.getAttribute("aria-label").split(";")[0],
            document.querySelector("details[open] summary").textContent,
            document.querySelector(".on output").textContent.split("\\n")[0]]"""
        before = page.evaluate(state)
        assert before[0] > 1000 and before[1:] == ["Gradient norm", "Environment", "step 19"]
        page.evaluate("window.kept = document.querySelector('figure')")
        JsonlSink(runs[0] / "metrics.jsonl").log(21, step_metrics(21))
        api.expect(page.locator(".facts dd").first).to_have_text("21")
        assert page.evaluate(state) == before
        assert page.evaluate("kept === document.querySelector('figure')")
        assert page.evaluate("kept.dataset.hover.includes('[21.0,0.221]')")


def test_a_page_that_is_not_refreshed_any_more_says_so(tab, runs) -> None:
    with Watch(runs) as watch:
        page = tab(watch.url)
        page.wait_for_timeout(1500)
        assert page.locator("#connection").inner_text() == ""
    message = "No longer refreshed: exgrpo-fast watch has ended."
    api.expect(page.locator("#connection")).to_have_text(message)


def test_another_site_can_neither_frame_nor_read_it(tab, runs, tmp_path: Path) -> None:
    with Watch(runs[:1]) as watch:
        site = tmp_path / "evil.html"
        site.write_text("<!doctype html><title>evil</title>")
        page = tab(site.as_uri())
        read = "url => fetch(url).then(a => a.text()).then(t => t.length).catch(() => 'refused')"
        assert page.evaluate(read, watch.url) == "refused"
        framed = """url => new Promise(done => {
            const frame = document.createElement("iframe");
            frame.onload = () => { try { done(frame.contentDocument?.title ?? null) } catch { done(null) } };
            frame.src = url;
            document.body.append(frame);
        })"""
        assert page.evaluate(framed, watch.url) in (None, "")
