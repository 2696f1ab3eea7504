"""The Space's functions, and its endpoints as programs call them, on a tiny model."""

import importlib.util
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image


gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install gradio")
gradio_client = pytest.importorskip(
    "gradio_client", reason="gradio_client is not installed: pip install gradio_client"
)
pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from test_video import read_alpha, write_video  # noqa: E402


SPACE = Path(__file__).parent.parent / "space"


def load_app(model: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> ModuleType:
    """The Space's app.py as a module, started with these environment variables."""
    monkeypatch.setenv("BIREFNET_MODEL", str(model))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "space_app", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app(tiny_model_dir):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load_app(tiny_model_dir, monkeypatch, BIREFNET_MAX_PIXELS="2000000")


@pytest.fixture(scope="module")
def client(app):
    demo = app.build_app()
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, max_file_size=5 * 2**20)
    yield gradio_client.Client(url, verbose=False)
    demo.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def bomb(path: Path) -> Path:
    """A small file whose image has more pixels than are allowed."""
    Image.new("1", (2000, 2000)).save(path)
    return path


def test_image_endpoint_returns_a_png_with_soft_alpha(client, photo):
    _, file, mask, notice = client.predict(gradio_client.handle_file(photo), api_name="/cut_out")
    with Image.open(file) as result:
        assert result.format == "PNG" and result.mode == "RGBA" and result.size == (60, 40)
        alpha = np.asarray(result.getchannel("A"))
    assert len(np.unique(alpha)) > 2  # soft
    with Image.open(mask) as picture:
        assert (np.asarray(picture.convert("L")) == alpha).all()
    assert notice == ""


def test_options_of_the_image_endpoint(client, photo):
    def run(**options):
        file = client.predict(gradio_client.handle_file(photo), **options, api_name="/cut_out")[1]
        return np.asarray(Image.open(file))

    assert set(np.unique(run(mask_only=True, threshold=0.5))) <= {0, 255}
    assert run(background="Colour", colour="rgba(255.0, 0, 0, 1)", refine=False).shape == (40, 60, 3)
    assert run(background="Blur", size="512").shape == (40, 60, 3)
    with pytest.raises(Exception, match="not in the list of choices"):
        run(model="../secrets")


def test_batch_reports_the_broken_file_and_zips_the_others(client, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a photo")
    same_name = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 30), "red").save(same_name)
    files = [gradio_client.handle_file(path) for path in (photo, broken, same_name, bomb(tmp_path / "bomb.png"))]
    gallery, archive, report = client.predict(files, api_name="/cut_out_batch")
    assert len(gallery) == 2
    assert "2 done, 2 failed" in report and "broken.jpg" in report and "bomb.png" in report
    assert str(tmp_path) not in report and "/tmp" not in report
    with zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["photo.png", "photo (2).png"]
        assert Image.open(content.open("photo.png")).mode == "RGBA"


def test_video_endpoint_keeps_alpha(client, tmp_path):
    source = write_video(tmp_path / "clip.mp4", num_frames=3)
    _, file, _ = client.predict(gradio_client.handle_file(source), api_name="/cut_out_video")
    alphas = read_alpha(Path(file))
    assert len(alphas) == 3 and np.ptp(alphas[0]) > 0
    with pytest.raises(Exception, match="MP4 has no transparency"):
        client.predict(
            gradio_client.handle_file(source), video_format="MP4, on a background", api_name="/cut_out_video"
        )


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "http://localhost/a.png", "http://169.254.169.254/", "http://[::1]/a.png"]
)
def test_private_addresses_are_refused(client, url):
    with pytest.raises(Exception, match="not public"):
        client.predict(None, url=url, api_name="/cut_out")


def test_a_redirect_to_a_private_address_is_refused(app, monkeypatch):
    """A public server answers with a redirect: its name and connection are stood in for, the checks are real."""
    from birefnet_hf import image_loading

    class Answer:
        status, reason, length = 302, "Found", 0

        def getheader(self, name: str) -> str:
            return "http://127.0.0.1:1/secret.png"

    real = image_loading._resolve
    monkeypatch.setattr(
        image_loading,
        "_resolve",
        lambda host, *rest: ["93.184.216.34"] if host == "public.test" else real(host, *rest),
    )
    monkeypatch.setattr(image_loading._PinnedConnection, "request", lambda *args, **kwargs: None)
    monkeypatch.setattr(image_loading._PinnedConnection, "getresponse", lambda self: Answer())
    with pytest.raises(gr.Error, match="not public"):
        app.cut_out_image(None, url="http://public.test/a.png")


def test_bombs_files_as_addresses_and_nothing_are_refused(app, client, tmp_path):
    with pytest.raises(Exception, match="pixels are more than"):
        client.predict(gradio_client.handle_file(bomb(tmp_path / "bomb.png")), api_name="/cut_out")
    for url, message in [("/etc/passwd", "starts with http"), ("", "Choose a photo first")]:
        with pytest.raises(Exception, match=message):
            client.predict(None, url=url, api_name="/cut_out")


def test_two_users_at_once_get_their_own_results(client, tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (20, 34, 48, 62)]
    for path in paths:
        Image.new("RGB", (int(path.stem), 24), "blue").save(path)
    with ThreadPoolExecutor(4) as pool:
        files = list(
            pool.map(lambda path: client.predict(gradio_client.handle_file(path), api_name="/cut_out")[1], paths)
        )
    assert [Image.open(file).width for file in files] == [20, 34, 48, 62]


def test_models_are_loaded_once_dropped_and_replaced_by_the_fallback(app):
    loaded = []

    def load(name: str) -> object:
        loaded.append(name)
        if name == "lite":
            raise OSError("no connection")
        return object()

    cache = app.ModelCache(2, load)
    with ThreadPoolExecutor(4) as pool:
        assert len({id(cache.get("a")[0]) for _ in pool.map(lambda _: cache.get("a"), range(8))}) == 1
    assert loaded == ["a"]
    pipe, notice = cache.get("lite")
    assert pipe is cache.get("nano")[0] and "lite cannot be fetched" in notice
    cache.get("b")
    assert len(cache.pipelines) == 2 and "a" not in cache.pipelines


def test_old_folders_of_requests_are_removed(app):
    import os

    old = app.request_folder()
    os.utime(old, (0, 0))
    new = app.request_folder()
    assert new.is_dir() and not old.exists()


def test_running_out_of_memory_is_a_message_and_stops_nothing_else(app, photo, monkeypatch):
    class Full:
        calls = 0

        def __call__(self, image, **options):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            return Image.new("L", image.size, 128)

    pipe = Full()
    monkeypatch.setattr(app.MODELS, "get", lambda name: (pipe, ""))
    results, archive, report = app.cut_out_batch([str(photo), str(photo)])
    assert len(results) == 1 and "1 done, 1 failed." in report
    assert "not enough memory" in report
