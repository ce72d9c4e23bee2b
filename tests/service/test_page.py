"""The page in a real Chromium: a picture in, previews, a result, its program, its history; errors in words; a phone."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from serving import Service, commanded, far_apart, file_of, picture_in, pixels, serving, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium"),
]
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """The page of the tiny model's server, on a desk; any error of its scripts fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    broken: list[str] = []
    made.on("pageerror", lambda error: broken.append(str(error)))
    made.goto(service.url)
    yield made
    context.close()
    assert broken == []


def give_picture(page: Page, picture: np.ndarray | None = None) -> None:
    data = file_of(pixels(5) if picture is None else picture)
    page.set_input_files("#file-input", {"name": "in.png", "mimeType": "image/png", "buffer": data})


def edit(page: Page, instruction: str, steps: int = 3, seed: int = 7) -> None:
    page.fill("#instruction", instruction)
    page.locator("#more-settings").evaluate("details => { details.open = true }")
    page.fill("#steps", str(steps))
    page.fill("#seed", str(seed))
    page.click("#edit-button")


def done(page: Page) -> None:
    page.wait_for_selector("#stage[data-state=done]", timeout=WAIT_MS)


def downloaded(page: Page) -> np.ndarray:
    with page.expect_download() as waiting:
        page.click("#download")
    return np.asarray(Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes())).convert("RGB"))


def test_a_picture_is_edited_as_the_server_edits_it_for_anybody(page: Page, service: Service) -> None:
    give_picture(page)
    edit(page, "make it night")
    done(page)
    same = picture_in(service.edit(file_of(pixels(5)), prompt="make it night", num_inference_steps=3, seed=7))
    assert far_apart(downloaded(page), same) == 0
    assert "7" in page.inner_text("#used-seed")


def test_previews_come_before_the_result_and_a_slider_compares(page: Page) -> None:
    states: list[str] = []
    page.expose_function("seen", lambda state: states.append(state))
    page.locator("#result-image").evaluate(
        "image => new MutationObserver(() => window.seen(document.querySelector('#stage').dataset.state))"
        ".observe(image, {attributes: true, attributeFilter: ['src']})"
    )
    give_picture(page)
    edit(page, "add a moon", steps=40)
    done(page)
    assert states.count("running") >= 2
    page.focus("#compare-range")
    before = page.input_value("#compare-range")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#compare-range") != before


def test_stop_ends_the_edit_on_the_server(page: Page, service: Service) -> None:
    give_picture(page)
    cancelled = service.metric("ip2p_edits_total", outcome="cancelled")
    edit(page, "make it night", steps=1000)
    page.wait_for_selector("#edit-button.stops")
    page.click("#edit-button")
    page.wait_for_selector("#edit-button:not(.stops)")
    until(lambda: service.metric("ip2p_edits_total", outcome="cancelled") == cancelled + 1, "a cancelled edit")


def test_variants_have_seeds_of_their_own_and_history_brings_an_edit_back(page: Page) -> None:
    give_picture(page)
    page.locator("#more-settings").evaluate("details => { details.open = true }")
    page.select_option("#variants-count", "3")
    edit(page, "turn it into a castle")
    done(page)
    expect(page.locator("#variants img")).to_have_count(3)
    first = page.get_attribute("#result-image", "src")
    page.fill("#instruction", "add a rainbow")
    page.click("#edit-button")
    page.wait_for_selector("#edit-button.stops")
    page.wait_for_selector("#edit-button:not(.stops)")
    done(page)
    assert page.get_attribute("#result-image", "src") != first
    page.locator("#history button").last.click()
    expect(page.locator("#instruction")).to_have_value("turn it into a castle")


def test_the_copied_commands_make_the_same_edit(page: Page, service: Service, tmp_path: Path) -> None:
    picture = pixels(5)
    (tmp_path / "in.png").write_bytes(file_of(picture))
    give_picture(page, picture)
    edit(page, 'it\'s "night" & $HOME `now`')
    done(page)
    wanted = downloaded(page)
    for button, run in (("#copy-curl", ["bash", "-c"]), ("#copy-python", [sys.executable, "-c"])):
        page.click(button)
        command = page.input_value("#command-text")
        before = set(tmp_path.iterdir())
        subprocess.run([*run, command], cwd=tmp_path, check=True, timeout=60, capture_output=True)
        (made,) = set(tmp_path.iterdir()) - before
        found = np.asarray(Image.open(made).convert("RGB"))
        assert far_apart(found, wanted) == 0
        made.unlink()


def test_what_the_server_refuses_is_said_in_words(page: Page) -> None:
    give_picture(page, pixels(1, 16, 16 * 9))  # sides of more than 8 to 1
    edit(page, "make it night")
    expect(page.locator("#problem")).to_contain_text("8 to 1", timeout=WAIT_MS)


def test_a_phone_sees_everything_without_scrolling_sideways(browser: Browser, service: Service) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(service.url)
    give_picture(page)
    edit(page, "make it night")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = page.evaluate(
        "[...document.querySelectorAll('button, input[type=number], select, summary')]"
        ".filter(one => one.offsetParent && one.getBoundingClientRect().height < 40).map(one => one.id)"
    )
    assert small == []
    context.close()


def test_a_browser_is_asked_for_the_key_and_then_edits(browser: Browser, edit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("sesame\n")
    with commanded(edit_folder, tmp_path / "log.txt", "--keys", str(tmp_path / "keys.txt"), key="sesame") as command:
        with pytest.raises(Error, match="INVALID_AUTH_CREDENTIALS"):  # it has asked its user, and there is none
            browser.new_context().new_page().goto(command.url)
        context = browser.new_context(http_credentials={"username": "anybody", "password": "sesame"})
        page = context.new_page()
        assert page.goto(command.url).status == 200
        give_picture(page)
        edit(page, "make it night")
        done(page)
        context.close()


def test_a_full_queue_is_waited_for_with_a_countdown(browser: Browser, edit_folder: Path) -> None:
    with serving(edit_folder, queue_limit_s=-1.0) as full:
        page = browser.new_context().new_page()
        page.goto(full.url)
        give_picture(page)
        edit(page, "make it night")
        page.wait_for_selector("#stop-trying")
        page.click("#stop-trying")
        page.wait_for_selector("#edit-button:not(.stops)")


def test_nothing_is_loaded_from_outside(page: Page, service: Service) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_load_state("networkidle")
    assert asked
    assert all(url.startswith((service.url, "data:", "blob:")) for url in asked)
