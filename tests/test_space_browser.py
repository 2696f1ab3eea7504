"""The Space in a real headless Chromium: what a visitor does, down to the file on their disk."""

import re
import shutil
import time
import zipfile
from pathlib import Path

import huggingface_hub
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

from test_space import UNKNOWN_MODEL, bomb, load_app  # noqa: E402
from test_video import read_alpha, turn_clockwise, write_video  # noqa: E402


WAIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def app(tiny_model_dir):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        variables = {"BIREFNET_MODELS": f"nano,{UNKNOWN_MODEL}", "BIREFNET_MAX_PIXELS": "2000000"}
        yield load_app(tiny_model_dir, monkeypatch, BIREFNET_MAX_FILE_MB="2", **variables)


@pytest.fixture(scope="module")
def url(app):
    demo = app.build_app()
    yield app.launch(demo, prevent_thread_lock=True, quiet=True)[1]
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as chromium:
            yield chromium


@pytest.fixture(scope="module")
def visitors(browser):
    """A browser on a desk; its pages share nothing but the cache of the page's scripts."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    return context


def open_page(context, url: str, tab: str = "Image"):
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.locator("#start-image").wait_for()
    if tab != "Image":
        page.get_by_role("tab", name=tab).click()
    return page


def upload(page, element: str, files: Path | list[Path]) -> None:
    """Chooses files and waits until they have arrived."""
    with page.expect_response(lambda response: "/upload?" in response.url or response.url.endswith("/upload")):
        page.locator(f"{element} input[type=file]").set_input_files(files)


def download(page, element: str, target: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"{element} a[download]").first.click()
    waiting.value.save_as(target)
    return target


def make_photo(path: Path, width: int = 60) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def toast(page, text: str) -> None:
    """Waits for a message, which is no stack trace, and closes it."""
    page.locator(".toast-body").filter(has_text=text).first.wait_for()
    assert "Traceback" not in page.content()
    page.locator(".toast-close").first.click()


def test_two_users_upload_photos_and_download_their_own_alpha(visitors, url, tmp_path):
    pages = {width: open_page(visitors, url) for width in (60, 90)}
    for width, page in pages.items():  # an upload is all it takes
        upload(page, "#photo", make_photo(tmp_path / f"p{width}.png", width))
    for width, page in pages.items():
        with Image.open(download(page, "#image-file", tmp_path / f"{width}.png")) as result:
            assert result.format == "PNG" and result.mode == "RGBA" and result.size == (width, 40)
            assert len(np.unique(np.asarray(result.getchannel("A")))) > 2
        assert page.locator("#slider img").count() == 2


def test_an_example_runs_in_one_click_with_the_options(visitors, url, tmp_path):
    page = open_page(visitors, url)
    page.get_by_role("button", name="Options").first.click()
    page.get_by_label("Mask only").first.check()
    page.get_by_role("button", name="Example: lemur").first.click()
    with Image.open(download(page, "#image-file", tmp_path / "mask.png")) as result:
        assert result.mode == "L"
    # Behind the cut-out lies a checkerboard, not the page.
    behind = page.locator("#slider img.fixed").evaluate("image => getComputedStyle(image).backgroundImage")
    assert "conic-gradient" in behind


def test_photos_are_pasted(visitors, url, tmp_path):
    """By the field's own button, and by the keyboard wherever the cursor is, also where another photo lies."""
    page = open_page(visitors, url)
    for width in (60, 90, 70):
        page.evaluate(
            """async bytes => {
                const blob = new Blob([new Uint8Array(bytes)], {type: "image/png"});
                await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
            }""",
            list(make_photo(tmp_path / "p.png", width).read_bytes()),
        )
        if width == 60:
            page.locator("#photo").get_by_role("button", name="Paste from clipboard").click()
        else:
            page.keyboard.press("Control+V")
        page.wait_for_function(f"document.querySelector('#photo img')?.naturalWidth == {width}")
        if width == 60:
            page.locator("#start-image").click()
        page.wait_for_function(f"document.querySelector('#slider img')?.naturalWidth == {width}")
    with Image.open(download(page, "#image-file", tmp_path / "out.png")) as result:
        assert result.size == (70, 40)
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.locator("#photo").get_by_role("button", name="Remove Image").click()
    upload(page, "#photo", tmp_path / "broken.png")
    toast(page, "no image")
    assert page.locator("#image-file a[download]").count() == 0  # of the photo before


def test_photos_and_addresses_exclude_each_other(visitors, url, tmp_path):
    page = open_page(visitors, url)
    page.get_by_placeholder("https://").fill("http://127.0.0.1/a.png")
    upload(page, "#photo", make_photo(tmp_path / "p.png"))
    page.locator("#image-file a[download]").first.wait_for()
    assert page.get_by_placeholder("https://").input_value() == ""
    page.get_by_placeholder("https://").fill("http://127.0.0.1/a.png")
    page.locator("#photo img").wait_for(state="detached")
    page.get_by_placeholder("https://").press("Enter")
    toast(page, "not public")


@pytest.mark.parametrize("name", ["bomb.png", "broken.jpg", "large.png"])
def test_bad_files_give_messages(visitors, url, tmp_path, name):
    page = open_page(visitors, url)
    path = tmp_path / name
    if name == "bomb.png":
        bomb(path)
    else:
        path.write_bytes(b"no image" if name == "broken.jpg" else bytes(3 * 2**20))
    page.locator("#photo input[type=file]").set_input_files(path)
    toast(page, {"bomb.png": "pixels are more than", "broken.jpg": "no image"}.get(name, "maximum allowed"))


def test_a_model_that_cannot_be_fetched_is_noticed(visitors, url, tmp_path):
    page = open_page(visitors, url)
    page.get_by_role("button", name="Options").first.click()
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name=UNKNOWN_MODEL.split("/")[1]).click()
    upload(page, "#photo", make_photo(tmp_path / "p.png"))
    page.locator("#image-notice").get_by_text("the small built-in model nano was used").wait_for()
    toast(page, f"{UNKNOWN_MODEL} cannot be loaded now, so the small built-in model nano was used")
    page.locator("#image-file a[download]").first.wait_for()


@pytest.mark.parametrize("tab", ["Image", "Batch", "Video"])
def test_loading_a_model_shows_a_message(visitors, app, url, tmp_path, monkeypatch, tab):
    page = open_page(visitors, url, tab=tab)
    if tab == "Video":
        upload(page, "#video", write_video(tmp_path / "clip.mp4", num_frames=2))
        page.locator("#video video").wait_for()
    elif tab == "Batch":
        upload(page, "#batch-input", [make_photo(tmp_path / "a.png"), make_photo(tmp_path / "b.png")])
    monkeypatch.setattr(app, "MODELS", app.ModelCache(1))  # nothing is loaded any more
    real = app.MODELS.load

    def slow(name: str) -> object:
        time.sleep(3)
        return real(name)

    app.MODELS.load = slow
    if tab == "Image":
        upload(page, "#photo", make_photo(tmp_path / "p.png"))
    else:
        page.locator(f"#start-{tab.lower()}").click()
    page.get_by_text("Loading the model").first.wait_for()
    element = {"Image": "#image-file", "Batch": "#batch-file", "Video": "#video-file"}[tab]
    page.locator(f"{element} a[download]").first.wait_for()
    assert page.get_by_text("Loading the model").count() == 0


def test_batch_with_a_broken_file(visitors, url, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page = open_page(visitors, url, tab="Batch")
    upload(page, "#batch-input", [make_photo(tmp_path / "a.png"), broken])
    page.locator("#batch-input tr.file").nth(1).wait_for()
    page.locator("#start-batch").click()
    page.get_by_text("1 done, 1 failed").wait_for()
    assert "broken.png" in page.locator("#batch-report").inner_text()
    assert page.locator("#gallery img").count() == 1
    with zipfile.ZipFile(download(page, "#batch-file", tmp_path / "all.zip")) as archive:
        assert archive.namelist() == ["a.png"]


def open_video(context, url: str, video: Path):
    """A page with a video that is ready to be worked on."""
    page = open_page(context, url, tab="Video")
    upload(page, "#video", video)
    page.locator("#video video").wait_for()
    return page


def test_a_phones_video_becomes_webm(visitors, url, tmp_path):
    page = open_video(visitors, url, turn_clockwise(write_video(tmp_path / "clip.mp4", num_frames=3, sound=True)))
    page.locator("#start-video").click()
    alphas = read_alpha(download(page, "#video-file", tmp_path / "out.webm"))
    assert [alpha.shape for alpha in alphas] == [(64, 48)] * 3
    shown = page.locator("#video-result video")
    shown.wait_for()
    page.wait_for_function("document.querySelector('#video-result video').videoWidth == 48")


def test_prores_with_smoothing(visitors, url, tmp_path):
    page = open_video(visitors, url, write_video(tmp_path / "clip.mp4", num_frames=3))
    page.get_by_label("Format").first.click()
    page.get_by_role("option", name="ProRes").click()
    page.get_by_label("Smoothing over time").first.fill("0.5")
    page.locator("#start-video").click()
    assert len(read_alpha(download(page, "#video-file", tmp_path / "out.mov"))) == 3


def test_mp4_wants_a_background(visitors, url, tmp_path):
    page = open_video(visitors, url, write_video(tmp_path / "clip.mp4", num_frames=2))
    page.get_by_label("Format").first.click()
    page.get_by_role("option", name="MP4").click()
    page.locator("#start-video").click()
    toast(page, "MP4 has no transparency")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_and_a_bad_address_a_message(browser, url, scheme):
    phone = browser.new_context(viewport={"width": 375, "height": 800}, color_scheme=scheme)
    page = open_page(phone, url)
    for tab in ("Batch", "Video", "Image"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_placeholder("https://").fill("http://127.0.0.1/a.png")
    page.locator("#start-image").click()
    toast(page, "not public")


def test_the_example_clicked_last_is_the_one_that_is_shown(visitors, url, app, monkeypatch):
    real = app.compute

    def slowly(*arguments):
        time.sleep(1)
        return real(*arguments)

    monkeypatch.setattr(app, "compute", slowly)
    page = open_page(visitors, url)
    page.get_by_role("button", name="coffee").click()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="shuttle").click()
    page.locator("#image-file").get_by_text("shuttle").wait_for()


def test_a_stopped_batch_keeps_what_is_done(visitors, url, app, tmp_path, monkeypatch):
    real = app.compute

    def slowly(*arguments):
        time.sleep(1.5)
        return real(*arguments)

    monkeypatch.setattr(app, "compute", slowly)
    page = open_page(visitors, url, "Batch")
    upload(page, "#batch-input", [make_photo(tmp_path / f"{number}.png") for number in range(20)])
    page.locator("#start-batch").click()
    page.locator("#batch-report").get_by_text("2 of 20 photos").wait_for()
    page.locator("#gallery img").nth(1).wait_for()
    page.locator("#stop-batch").click()
    page.locator("#batch-report").get_by_text(re.compile("Stopped: [23] done")).wait_for()
    with zipfile.ZipFile(download(page, "#batch-file", tmp_path / "stopped.zip")) as archive:
        assert archive.namelist()[:2] == ["0.png", "1.png"] and len(archive.namelist()) in (2, 3)
    assert page.locator("#gallery input[type=file]").count() == 0  # results are no place to upload to
    page.wait_for_timeout(2000)
    assert not page.locator("#gallery .error").is_visible()


def test_who_stops_or_leaves_ends_the_video(visitors, url, app, tmp_path, monkeypatch):
    """Others wait for the model meanwhile."""
    real, ended = app.iterate_video, []

    def slowly(*arguments, **options):
        done, target = 0, Path(arguments[1])
        try:
            for done, total in real(*arguments, **options):
                time.sleep(0.1)
                yield done, total
        finally:
            ended.append((done, target))

    monkeypatch.setattr(app, "iterate_video", slowly)
    clip = write_video(tmp_path / "clip.mp4", num_frames=200)
    for number, leave in enumerate(("stop", "close"), start=1):
        page = open_video(visitors, url, clip)
        page.locator("#start-video").click()
        page.locator("#video-notice").get_by_text("of 200 frames").wait_for()
        if leave == "stop":
            page.locator("#stop-video").click()
            page.locator("#video-notice").get_by_text("Stopped.").wait_for()
            page.wait_for_timeout(2000)
            assert not page.locator("#video-result .error").is_visible()
        else:
            page.close()
        give_up = time.monotonic() + 30
        while len(ended) < number:
            assert time.monotonic() < give_up, leave
            time.sleep(0.1)
    assert all(0 < done < 200 and not list(target.parent.glob("*.webm")) for done, target in ended)
    page = open_page(visitors, url)
    upload(page, "#photo", make_photo(tmp_path / "p.png"))
    page.locator("#image-file a[download]").wait_for()
