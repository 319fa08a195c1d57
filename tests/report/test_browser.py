"""The page as a browser shows it: in headless Chromium, where there is one."""

import base64
import io
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from made_up import NAME, made_run, tile
from PIL import Image
from playwright.sync_api import Error, sync_playwright

from sparse_fcmae.evaluation.reconstruct import mask_in
from sparse_fcmae.report.page import in_page, record_of, write_page
from sparse_fcmae.report.record import RunReader
from sparse_fcmae.report.watch import Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CANVAS = "number => document.querySelectorAll('.tiles canvas')[number].toDataURL()"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, width=1200, theme="light"):
    """A page that has to stay without complaints in the console."""
    complaints = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(address)
    yield page
    assert complaints == []
    page.close()


def written(folders, path):
    """The address of the page of some runs."""
    write_page(record_of([RunReader(folder, in_page) for folder in folders]), path)
    return path.as_uri()


def pixel(page, number, x):
    """The colour of a pixel of a tile."""
    _, _, data = page.evaluate(CANVAS, number).partition(",")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((x, 10))


def until(holds):
    """Waits until something holds."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def set_range(page, name, value):
    page.eval_on_selector(name, "(node, v) => { node.value = v; node.dispatchEvent(new Event('input')); }", value)


def test_the_slider_goes_from_masked_to_filled_in(browser, run, tmp_path):
    with opened(browser, written([run], tmp_path / "page.html")) as page:
        until(lambda: pixel(page, 0, 127) == tile(12, 3, 0))
        assert page.text_content("#step + span") == "step 12"
        left, right = 1, 3  # columns
        for wipe, x, column in ((100, 0, left), (100, 127, left), (0, 0, right), (0, 127, right)):
            set_range(page, "#wipe", wipe)
            for row in range(2):
                assert pixel(page, row, x) == tile(12, column, row)
        set_range(page, "#wipe", 50)
        assert [pixel(page, 1, x) for x in (10, 64, 117)] == [
            tile(12, left, 1),
            (255, 255, 255),
            tile(12, right, 1),
        ]
        set_range(page, "#step", 0)
        until(lambda: pixel(page, 0, 10) == tile(4, left, 0))
        assert page.text_content("#step + span") == "step 4"
        page.select_option("#right", "predicted")
        assert pixel(page, 0, 117) == tile(4, 2, 0)


def test_the_slider_moves_by_keys(browser, run, tmp_path):
    with opened(browser, written([run], tmp_path / "page.html")) as page:
        page.focus("#wipe")
        page.keyboard.press("End")
        until(lambda: pixel(page, 0, 127) == tile(12, 1, 0))


def test_a_mask_is_painted(browser, run, tmp_path):
    with opened(browser, written([run], tmp_path / "page.html")) as page:
        page.click("#paint summary")
        cells = page.locator(".painter button")
        assert cells.count() == 2  # of 32 pixels each
        cells.nth(1).click()
        cells.nth(0).focus()
        page.keyboard.press(" ")
        page.keyboard.press(" ")
        assert [cells.nth(n).get_attribute("aria-pressed") for n in range(2)] == ["false", "true"]
        with page.expect_download() as saving:
            page.click("#save-mask")
        saving.value.save_as(tmp_path / "mask.png")
        assert f"--init {run} --data IMAGES --mask mask.png" in page.inner_text("#paint pre")
    assert mask_in(tmp_path / "mask.png", (1, 2)).tolist() == [[[False, True]]]


def test_a_chart_says_its_values_to_mouse_and_keys(browser, run, tmp_path):
    with opened(browser, written([run], tmp_path / "page.html")) as page:
        readout = "figure:has(#chart-loss) output"
        assert page.locator("#chart-loss .mark").count() == 1  # where nothing is learnt
        page.focus("#chart-loss")
        page.keyboard.press("Home")
        assert "steps: 1 at step 1, epoch 0.25" in page.inner_text(readout)
        page.keyboard.press("ArrowRight")
        assert "steps: 0.5 at step 2, epoch 0.5" in page.inner_text(readout)
        page.keyboard.press("End")
        assert "held-out images: 0.15385 at step 12, epoch 3" in page.inner_text(readout)
        chart = page.locator("#chart-grad_norm")
        chart.hover(position={"x": chart.bounding_box()["width"] - 8, "y": 60})
        assert "12 at step 12, epoch 3" in page.inner_text("figure:has(#chart-grad_norm) output")
        page.click("#log-loss")
        assert page.get_attribute("#log-loss", "aria-pressed") == "true"
        page.select_option("#over", "step")
        page.focus("#chart-loss")
        page.keyboard.press("Home")
        assert "steps: 1 at step 1" in page.inner_text(readout)


def test_names_are_text(browser, evaluated, tmp_path):
    with opened(browser, written([evaluated], tmp_path / "page.html")) as page:
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.locator(f"text={NAME}").count() >= 3
        assert page.locator("script").count() == 2
        canvas = page.locator(".confusion canvas")
        canvas.hover(position={"x": 5, "y": canvas.bounding_box()["height"] / 2})
        assert page.inner_text(".confusion output") == f"b taken for {NAME}: 3 of 10"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_runs_beside_each_other_fit_any_window(browser, tmp_path, theme, width):
    folders = [made_run(tmp_path / "short"), made_run(tmp_path / "long", steps=100_000, lr=2e-3)]
    with opened(browser, written(folders, tmp_path / "page.html"), width, theme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#chart-loss polyline").count() == 4
        assert page.evaluate(
            "[...document.querySelectorAll('#chart-loss polyline')].every(p => p.points.length <= 800)"
        )
        assert page.inner_text("tr.differs >> nth=0").split() == ["--epochs", "3", "25000"]
        page.uncheck("#show-0")
        assert page.locator("#chart-loss polyline").count() == 2
        back = "getComputedStyle(document.body).backgroundColor"
        assert (page.evaluate(back) == "rgb(255, 255, 255)") == (theme == "light")
        for shown in ("rgb(255, 255, 255)", "rgb(13, 17, 23)"):
            page.click("#theme")
            assert page.evaluate(back) == shown
        page.select_option("#whose", "1")
        assert page.text_content("#step + span") == "step 12"
        seconds = page.evaluate(
            "() => { const from = performance.now(); for (let i = 0; i < 20; i++) "
            "document.querySelector('#over').dispatchEvent(new Event('change')); return performance.now() - from; }"
        )
        print(f"drawing all charts anew: {seconds / 20:.1f} ms")


def test_a_page_that_is_watched_renews_itself(browser, run):
    with Server([RunReader(run, in_page)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, f"http://127.0.0.1:{server.server_port}/") as page:
            set_range(page, "#wipe", 100)
            page.evaluate("document.querySelector('#all-options').open = true")
            page.focus("#chart-loss")
            page.keyboard.press("Home")
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 13, "epoch": 3.25, "loss": 0.01}\n')
            until(lambda: "0.0100" in page.inner_text(".facts"))
            assert page.evaluate("document.querySelector('#all-options').open")
            assert "steps: 1 at step 1" in page.inner_text("figure:has(#chart-loss) output")
            assert page.evaluate("document.activeElement.id") == "chart-loss"
            assert pixel(page, 0, 127) == tile(12, 1, 0)
        server.shutdown()
