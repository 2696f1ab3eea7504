"""The Space in a real headless Chromium: what a visitor does, down to the file on their disk."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)
playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytest.importorskip("gradio", reason="gradio is not installed: pip install gradio")

from test_space import load_app  # noqa: E402
from test_video import read_alpha, write_video  # noqa: E402


WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def url(tiny_model_dir):
    with pytest.MonkeyPatch.context() as monkeypatch:
        app = load_app(tiny_model_dir, monkeypatch)
        demo = app.build_app()
        yield demo.launch(prevent_thread_lock=True, quiet=True, css=app.CSS)[1]
        demo.close()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as chromium:
            yield chromium


def open_page(browser, url: str, width: int = 1280, scheme: str = "light"):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.locator("#start-image").wait_for()
    return page


def download(page, element: str, target: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"{element} a[download]").first.click()
    waiting.value.save_as(target)
    return target


def make_photo(path: Path, width: int = 60) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_two_users_upload_photos_and_download_their_own_alpha(browser, url, tmp_path):
    pages = {width: open_page(browser, url) for width in (60, 90)}
    for width, page in pages.items():
        page.locator("input[type=file]").first.set_input_files(make_photo(tmp_path / f"p{width}.png", width))
        page.locator("img[alt]").first.wait_for(state="attached")
    for page in pages.values():
        page.wait_for_timeout(1500)
        page.locator("#start-image").click()
    for width, page in pages.items():
        with Image.open(download(page, "#image-file", tmp_path / f"{width}.png")) as result:
            assert result.format == "PNG" and result.mode == "RGBA" and result.size == (width, 40)
            assert len(np.unique(np.asarray(result.getchannel("A")))) > 2


def test_batch_with_a_broken_file(browser, url, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page = open_page(browser, url)
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-input input[type=file]").set_input_files([make_photo(tmp_path / "a.png"), broken])
    page.wait_for_timeout(1500)
    page.locator("#start-batch").click()
    page.get_by_text("1 done, 1 failed").wait_for()
    assert "broken.png" in page.locator("#batch-report").inner_text()
    with zipfile.ZipFile(download(page, "#batch-file", tmp_path / "all.zip")) as archive:
        assert archive.namelist() == ["a.png"]


def test_video(browser, url, tmp_path):
    page = open_page(browser, url)
    page.get_by_role("tab", name="Video").click()
    source = write_video(tmp_path / "clip.mp4", num_frames=3)
    page.locator("input[type=file][accept*=video]").first.set_input_files(source)
    page.wait_for_timeout(2000)
    page.locator("#start-video").click()
    assert len(read_alpha(download(page, "#video-file", tmp_path / "out.webm"))) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_and_a_bad_address_a_message(browser, url, scheme):
    page = open_page(browser, url, width=375, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_placeholder("https://").fill("http://127.0.0.1/a.png")
    page.locator("#start-image").click()
    page.get_by_text("not public").first.wait_for()
    assert "Traceback" not in page.content()
