"""The Space's functions, and its endpoints as programs call them, with the network that ships with the package."""

import asyncio
import base64
import contextlib
import http.server
import importlib.util
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from birefnet_hf import BiRefNetImageProcessor


gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install gradio")
gradio_client = pytest.importorskip(
    "gradio_client", reason="gradio_client is not installed: pip install gradio_client"
)
pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from test_video import read_alpha, write_video  # noqa: E402


SPACE = Path(__file__).parent.parent / "space"


def load_app(model: str | Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> ModuleType:
    """The Space's app.py as a module, started with these environment variables."""
    monkeypatch.setenv("BIREFNET_MODEL", str(model))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the app sets: an app that runs already gets its own back
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "space_app", module)
    spec.loader.exec_module(module)
    return module


UNKNOWN_MODEL = "nobody-here/no-such-model"


@pytest.fixture(scope="module")
def app():
    """The app, with another model on offer that does not exist."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # A variable of the environment is read when huggingface_hub is imported, long ago.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield load_app("nano", monkeypatch, BIREFNET_MAX_PIXELS="2000000", BIREFNET_MODELS=UNKNOWN_MODEL)


@pytest.fixture(scope="module")
def url(app):
    demo = app.build_app()
    yield app.launch(demo, prevent_thread_lock=True, quiet=True, max_file_size=5 * 2**20, mcp_server=True)[1]
    demo.close()


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


@pytest.fixture(scope="module")
def photo(scene, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    scene[0].save(path)
    return path


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Waits for what another thread or process brings about; on a busy machine that takes a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds} seconds"
        time.sleep(0.05)


def bomb(path: Path) -> Path:
    """A small file whose image has more pixels than are allowed."""
    Image.new("1", (2000, 2000)).save(path)
    return path


def test_image_endpoint_returns_a_png_with_soft_alpha(client, photo, scene):
    (before, after), file, mask, notice = client.predict(gradio_client.handle_file(photo), api_name="/cut_out")
    with Image.open(file) as result:
        assert result.format == "PNG" and result.mode == "RGBA" and result.size == scene[0].size
        alpha = np.asarray(result.getchannel("A"))
    assert len(np.unique(alpha)) > 2  # soft
    assert alpha[scene[1]].mean() > 200 and alpha[~scene[1]].mean() < 25
    with Image.open(mask) as picture:
        assert (np.asarray(picture.convert("L")) == alpha).all()
    assert Image.open(before).convert("RGB").tobytes() == Image.open(photo).tobytes()
    assert Path(after).read_bytes() == Path(file).read_bytes() and Path(file).name == "photo_cutout.png"
    assert notice == ""


def test_options_of_the_image_endpoint(client, photo):
    def run(**options):
        file = client.predict(gradio_client.handle_file(photo), **options, api_name="/cut_out")[1]
        return np.asarray(Image.open(file))

    original = np.asarray(Image.open(photo))
    assert set(np.unique(run(mask_only=True, threshold=0.5))) <= {0, 255}
    assert (run(refine=False)[..., :3] == original).all()  # the photo's own colours
    alpha = run(mask_only=True).astype(float)[..., None] / 255
    red = run(background="Colour", colour="rgba(255.0, 0, 0, 1)", refine=False)
    assert np.abs(red - (alpha * original + (1 - alpha) * (255, 0, 0))).max() <= 1.5
    on_itself = run(background="Image", background_image=gradio_client.handle_file(photo), refine=False)
    assert np.abs(on_itself.astype(int) - original).max() <= 1
    assert run(background="Blur", size="512").shape == original.shape
    for options, message in (
        ({"model": "../secrets"}, "not in the list of choices"),
        ({"background": "Colour", "colour": "/etc/passwd"}, "is no colour"),
        ({"background": "Image"}, "Choose a background image"),
    ):
        with pytest.raises(Exception, match=message):
            run(**options)


def test_endpoints_say_what_they_take(client):
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(described) == ["/cut_out", "/cut_out_batch", "/cut_out_video"]
    for endpoint in described.values():
        assert endpoint["description"].endswith(".")
        for parameter in endpoint["parameters"]:
            assert parameter["python_type"]["type"], parameter
            assert parameter["label"]
        assert not any(value["label"].startswith("value_") for value in endpoint["returns"])
    parameters = {item["parameter_name"]: item for item in described["/cut_out_video"]["parameters"]}
    assert parameters["video_format"]["python_type"]["type"].startswith("Literal['WebM, transparent'")
    assert not parameters["video"]["parameter_has_default"] and parameters["smoothing"]["parameter_default"] == 0


def test_tools_of_the_model_context_protocol(url, photo):
    """A client of the protocol lists the tools with their descriptions and lets one work on a picture."""
    pytest.importorskip("mcp", reason="mcp is not installed: pip install 'gradio[mcp]'")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    picture = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()

    async def talk() -> tuple:
        async with streamable_http_client(f"{url.rstrip('/')}/gradio_api/mcp/") as (read, write, *_):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = (await session.list_tools()).tools
                answer = await session.call_tool("cut_out_image", {"image": picture, "background": "Colour"})
                result = re.findall(r"http://\S+_cutout\.png", str(answer.content))[0]
                many = await session.call_tool("cut_out_batch", {"files": [picture, result], "mask_only": True})
                return tools, answer, many

    tools, answer, many = asyncio.run(talk())
    described = {tool.name: tool for tool in tools}
    assert list(described) == ["cut_out_image", "cut_out_batch", "cut_out_clip"]
    assert "Removes or replaces the background of a photo" in described["cut_out_image"].description
    properties = {name: tool.inputSchema["properties"] for name, tool in described.items()}
    assert properties["cut_out_image"]["background"]["enum"] == ["Transparent", "Colour", "Image", "Blur"]
    assert properties["cut_out_image"]["threshold"]["type"] == "number"
    assert "keeps edges soft" in properties["cut_out_image"]["threshold"]["description"]
    assert "calms flicker" in properties["cut_out_clip"]["smoothing"]["description"]
    files = properties["cut_out_batch"]["files"]
    assert files["items"]["type"] == "string" and "$ref" not in json.dumps(files)
    assert not answer.isError
    assert any(".png" in part.text for part in answer.content if part.type == "text")
    assert not many.isError and "2 done, 0 failed" in str(many.content)


def test_a_model_that_cannot_be_fetched_gives_way_to_nano_with_a_notice(app, client, photo, monkeypatch):
    """The real loading of a model that does not exist; the second time nobody waits for it."""
    monkeypatch.setattr(app, "MODELS", app.ModelCache(2))  # so that nano has to be loaded, too
    *_, notice = client.predict(gradio_client.handle_file(photo), model=UNKNOWN_MODEL, api_name="/cut_out")
    assert UNKNOWN_MODEL in notice and "nano" in notice
    monkeypatch.setattr(app.MODELS, "load", lambda name: pytest.fail(f"{name} is loaded again"))
    *_, report = client.predict([gradio_client.handle_file(photo)], model=UNKNOWN_MODEL, api_name="/cut_out_batch")
    assert "1 done, 0 failed." in report and notice in report


def test_sizes_reach_the_network(app, tiny_model_dir, tmp_path, monkeypatch):
    """A checkpoint for any size sees the photo at its own, others do where that is asked for."""
    dynamic = tmp_path / "dynamic"
    shutil.copytree(tiny_model_dir, dynamic)
    BiRefNetImageProcessor(size={"shortest_edge": 32, "longest_edge": 96}).save_pretrained(dynamic)
    monkeypatch.setenv("BIREFNET_MODELS", f"{tiny_model_dir},{dynamic}")
    monkeypatch.setattr(app, "MODELS", app.ModelCache(2))

    def seen(model: Path, size: str) -> tuple[int, int]:
        shapes = []
        pipe = app.MODELS.get(str(model))
        hook = pipe.model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append((args or tuple(kwargs.values()))[0].shape), with_kwargs=True
        )
        options = app.read_options(str(model), size, False, "Transparent", "#fff", None, False, 0.0)
        app.compute(Image.new("RGB", (64, 96)), options)
        hook.remove()
        return tuple(shapes[0][2:])

    assert seen(tiny_model_dir, app.OWN_SIZE) == (64, 64)
    assert seen(tiny_model_dir, "512") == (512, 512)
    assert seen(dynamic, app.OWN_SIZE) == (96, 64)
    assert seen(tiny_model_dir, app.PHOTO_SIZE) == (384, 256)  # at least 256, in the photo's proportions


def test_models_are_named_with_their_purpose(app, monkeypatch):
    monkeypatch.delenv("BIREFNET_MODELS")
    labels = {name: label for label, name in app.model_choices()}
    assert list(labels)[0] == app.DEFAULT_MODEL and "works offline" in labels["nano"]
    assert labels["lite"] == "lite · general purpose, smaller and faster, 1024 pixels"
    assert "photo's own size" in labels["dynamic"] and "CC-BY-NC" in labels["rmbg"]
    assert len(set(labels.values())) == len(labels)
    monkeypatch.setenv("BIREFNET_MODELS", "lite, nano")
    assert [name for _, name in app.model_choices()] == [app.DEFAULT_MODEL, "lite"]  # the default first, and once
    monkeypatch.setattr(app, "DEFAULT_MODEL", "my-model")
    assert [name for _, name in app.model_choices()] == ["my-model", "lite", "nano"]


def test_gpu_functions_load_nothing_and_travel_between_processes(tiny_model_dir, photo, tmp_path, monkeypatch):
    """ZeroGPU runs decorated functions in other processes: what goes in and out is pickled, what they load is lost, and
    of their errors only gr.Error comes through.
    """
    stand_in, inside = ModuleType("spaces"), []

    def GPU(function: Callable | None = None, **options: object) -> Callable:
        if function is None:
            return lambda decorated: GPU(decorated, **options)

        def run_all(*arguments: object) -> Iterator[object]:
            assert not callable(options.get("duration")) or options["duration"](*arguments) > 0
            inside.append(function.__name__)
            try:
                result = function(*pickle.loads(pickle.dumps(arguments)))
                for item in result if inspect.isgeneratorfunction(function) else [result]:
                    yield pickle.loads(pickle.dumps(item))
            except Exception as error:
                assert isinstance(error, gr.Error)
                raise pickle.loads(pickle.dumps(error)) from None
            finally:
                inside.append("")

        return run_all if inspect.isgeneratorfunction(function) else lambda *arguments: [*run_all(*arguments)][0]

    stand_in.GPU = GPU
    monkeypatch.setitem(sys.modules, "spaces", stand_in)
    app = load_app(tiny_model_dir, monkeypatch)
    real, loaded = app.MODELS.load, []

    def load(name: str) -> object:
        assert not inside or not inside[-1], f"{name} is loaded within {inside[-1]}"
        loaded.append(name)
        return real(name)

    app.MODELS.load = load
    app.cut_out_image(str(photo), background="Blur")
    list(app.cut_out_batch([str(photo)]))
    clip = write_video(tmp_path / "clip.mp4", num_frames=2)
    list(app.cut_out_clip(str(clip)))
    assert [name for name in inside if name] == ["compute", "compute", "compute_clip"]
    assert loaded == [str(tiny_model_dir)]
    monkeypatch.setattr(app, "MAX_SECONDS", 60)
    clip.write_bytes(clip.read_bytes()[:700])
    with pytest.raises(gr.Error):
        list(app.cut_out_clip(str(clip)))


def test_batch_reports_the_broken_file_and_zips_the_others(client, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a photo")
    same_name = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 30), "red").save(same_name)
    files = [gradio_client.handle_file(path) for path in (photo, broken, same_name, bomb(tmp_path / "bomb.png"))]
    gallery, archive, report = client.predict(files, api_name="/cut_out_batch")
    assert len(gallery) == 2
    assert "2 done, 2 failed" in report
    assert all(report.count(name) == 1 for name in ("broken.jpg", "bomb.png"))
    assert str(tmp_path) not in report and "/tmp" not in report
    with zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["photo.png", "photo (2).png"]
        assert Image.open(content.open("photo.png")).mode == "RGBA"


def test_names_and_addresses_are_shown_as_they_are(app, tmp_path):
    """In messages, which are HTML, and in the report, which is Markdown."""
    with pytest.raises(gr.Error, match="&lt;b&gt;bold"):
        app.cut_out_image(url="http://127.0.0.1/<b>bold")
    (tmp_path / "__a__[b](c)&.png").write_bytes(b"no image")
    *_, (_, _, report) = app.cut_out_batch([str(tmp_path / "__a__[b](c)&.png")])
    assert r"\_\_a\_\_\[b\](c)\&.png is no image" in report


@pytest.mark.parametrize("colour", ["rgba(inf, 0, 0, 1)", "blueish", None])
def test_what_is_no_colour_is_refused(app, photo, colour):
    assert app.read_colour("rgba(-5.2, 300, 12.6, 1)") == (0, 255, 13)
    with pytest.raises(gr.Error, match="is no colour"):
        app.cut_out_image(str(photo), background="Colour", colour=colour)
    with pytest.raises(gr.Error, match="between 0 and 1"):
        app.cut_out_image(str(photo), threshold=None)


def test_a_video_that_takes_too_long_is_given_up(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_MINUTES", 0.0)
    with pytest.raises(gr.Error, match="1 of 3 frames are done, and others wait"):
        list(app.cut_out_clip(str(write_video(tmp_path / "clip.mp4", num_frames=3))))


def test_no_result_of_a_batch_replaces_another(app):
    files = ["a/photo.png", "photo (2).png", "photo.jpg", "PHOTO.webp", "other.png"]
    names = app._unique_names(files)
    assert names == ["photo.png", "photo (2).png", "photo (3).png", "PHOTO (4).png", "other.png"]


def test_video_endpoint_keeps_alpha(client, tmp_path):
    source = write_video(tmp_path / "clip.mp4", num_frames=3)
    for video_format in ("WebM, transparent", "ProRes 4444, transparent"):
        shown, file, _ = client.predict(
            gradio_client.handle_file(source), video_format, smoothing=0.5, api_name="/cut_out_video"
        )
        alphas = read_alpha(Path(file))
        assert len(alphas) == 3 and np.ptp(alphas[0]) > 0
        assert (shown is None) == file.endswith(".mov")  # no browser plays ProRes
    with pytest.raises(Exception, match="MP4 has no transparency"):
        client.predict(
            gradio_client.handle_file(source), video_format="MP4, on a background", api_name="/cut_out_video"
        )


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/a.png", "http://localhost/a.png", "http://169.254.169.254/", "http://[::1]/a.png"]
)
def test_private_addresses_are_refused(client, address):
    with pytest.raises(Exception, match="not public"):
        client.predict(None, url=address, api_name="/cut_out")


def test_private_addresses_are_refused_as_files_too(client):
    """A program may send a file as an address, which Gradio fetches itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception):  # noqa: B017 what matters is that nobody knocks
            client.predict(file, api_name="/cut_out")
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_above_the_limit_are_refused(app, client, photo, tmp_path, monkeypatch):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(6 * 2**20))
    with pytest.raises(Exception, match="size"):
        client.predict(gradio_client.handle_file(large), api_name="/cut_out")
    monkeypatch.setattr(app, "MAX_FILE_BYTES", 0)  # whatever way a file came
    with pytest.raises(gr.Error, match="larger than the 100 MB"):
        app.cut_out_image(str(photo))


def test_an_endless_address_as_a_file_is_given_up(app, client, monkeypatch):
    """Gradio would fetch it all, into memory first."""
    from birefnet_hf import image_loading

    sent = 0

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while sent < 2**28:
                    sent += self.wfile.write(bytes(2**16))

        def log_message(self, *_):
            pass

    monkeypatch.setattr(app, "MAX_FILE_BYTES", 2**20)
    monkeypatch.setattr(image_loading, "_is_public", lambda address: True)  # the one address that a test can have
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception, match="larger than the 1048576 bytes"):
            client.predict(file, api_name="/cut_out")
        server.shutdown()
    assert 2**20 < sent < 2**26


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan"])
def test_a_limit_that_is_no_number_is_named(app, monkeypatch, value):
    monkeypatch.setenv("BIREFNET_MAX_FILE_MB", value)
    with pytest.raises(SystemExit, match="BIREFNET_MAX_FILE_MB"):
        app.read_number("BIREFNET_MAX_FILE_MB", 100)
    monkeypatch.setenv("BIREFNET_MAX_FILE_MB", "")
    assert app.read_number("BIREFNET_MAX_FILE_MB", 100) == 100


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


def test_models_are_loaded_once_and_dropped(app):
    loaded = []

    def load(name: str) -> object:
        loaded.append(name)
        return object()

    cache = app.ModelCache(2, load)
    with ThreadPoolExecutor(4) as pool:
        assert len({id(pipe) for pipe in pool.map(lambda _: cache.get("a"), range(8))}) == 1
    assert loaded == ["a"]
    cache.get("b")
    cache.get("a")
    cache.get("c")
    assert list(cache.pipelines) == ["a", "c"]  # b was used least lately


def test_uploads_and_results_are_deleted_after_a_while(tiny_model_dir, photo, monkeypatch):
    app = load_app(tiny_model_dir, monkeypatch, BIREFNET_KEEP_SECONDS="2")
    assert app.WORK.stat().st_mode & 0o077 == 0  # private
    demo = app.build_app()
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        client.predict(gradio_client.handle_file(photo), api_name="/cut_out")

        def kept() -> set[str]:
            return {path.name for path in app.WORK.rglob("photo*") if path.is_file()}

        assert kept() == {"photo.png", "photo_cutout.png", "photo_mask.png"}
        wait_until(lambda: not kept(), "deleting files")
        # Without another request: what of a batch nobody fetched, and an upload that broke off, of which Gradio knows
        # nothing.
        folder, upload = app.request_folder(), app.WORK / "tmpbroken"
        upload.write_bytes(b"half a photo")
        wait_until(lambda: not folder.exists() and not upload.exists(), "sweeping")
    finally:
        demo.close()


def test_running_out_of_memory_is_a_message_and_stops_nothing_else(app, photo, tmp_path, monkeypatch):
    class Full:
        calls, device = 0, "cpu"

        def __call__(self, image, **options):
            self.calls += 1
            if self.calls in (1, 3):
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            return Image.new("L", image.size, 128)

    pipe = Full()
    monkeypatch.setattr(app.MODELS, "get", lambda name: pipe)
    *_, (results, archive, report) = app.cut_out_batch([str(photo), str(photo)])
    assert len(results) == 1 and "1 done, 1 failed." in report
    assert "not enough memory" in report
    with pytest.raises(gr.Error, match="not enough memory"):
        list(app.cut_out_clip(str(write_video(tmp_path / "clip.mp4", num_frames=2))))


def test_hidden_names_and_files_that_are_gone(client, photo, tmp_path, app):
    hidden = tmp_path / ".hidden.png"
    shutil.copy(photo, hidden)
    _, file, *_ = client.predict(gradio_client.handle_file(hidden), api_name="/cut_out")
    assert Path(file).name == "hidden_cutout.png"
    with pytest.raises(gr.Error, match="choose it again"):
        app.cut_out_image(str(tmp_path / "deleted.png"))


def test_what_is_pushed_runs_by_itself(photo, tmp_path):
    """The folder that build.py writes, in a fresh process that knows no other copy of the package; a program calls it as
    the Space's README says, and at the end nothing of its visitors is left.
    """
    folder, temporary, visitor = tmp_path / "space", tmp_path / "temporary", tmp_path / "visitor"
    subprocess.run([sys.executable, SPACE / "build.py", folder], check=True, capture_output=True)
    temporary.mkdir()
    visitor.mkdir()
    Image.open(photo).save(visitor / "photo.jpg")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("BIREFNET", "PYTHON"))}
    variables |= {
        "PYTHONPATH": str(Path(np.__file__).parent.parent),  # with -S, links to packages elsewhere are not followed
        "GRADIO_SERVER_PORT": str(port),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    log = (tmp_path / "log").open("w+", encoding="utf-8")
    server = subprocess.Popen([sys.executable, "-S", "app.py"], cwd=folder, env=variables, stdout=log, stderr=log)
    try:

        def is_up() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            with socket.socket() as connection:
                return connection.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_up, "starting", seconds=120)
        [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        code = code.replace("http://127.0.0.1:7860", f"http://127.0.0.1:{port}") + "\nprint(cutout)\n"
        answer = subprocess.run([sys.executable, "-c", code], cwd=visitor, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        with Image.open(answer.stdout.splitlines()[-1]) as cutout:
            assert cutout.mode == "RGBA" and cutout.size == (320, 240)
        assert list(temporary.glob("birefnet-space-*"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()
    assert not list(temporary.glob("birefnet-space-*"))


def test_examples_are_there_with_their_licences(app):
    """Every photo and video that is pushed along is shown, and its line says under which terms."""
    shown = {Path(path).name for path in [*app.EXAMPLE_PHOTOS, app.EXAMPLE_VIDEO]}
    assert {path.name for path in app.EXAMPLES.iterdir()} == shown | {"SOURCES.md"}
    lines = (app.EXAMPLES / "SOURCES.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("|")[1].strip() for line in lines if "CC0" in line or "public domain" in line} == shown


def test_requirements_of_the_space_are_those_of_the_package():
    text = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    listed = {line for line in text.splitlines() if line and not line.startswith("#")}
    project = tomllib.loads((SPACE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [*project["optional-dependencies"]["video"], *project["optional-dependencies"]["space"]]
    needed = {*project["dependencies"], *(name for name in extras if not name.startswith("birefnet-hf"))}
    assert listed == needed
