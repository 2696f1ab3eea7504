"""Images of every kind, damaged files, and addresses that must not be fetched."""

import base64
import io
import multiprocessing
import os
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from birefnet_hf import image_loading, load_pipeline
from birefnet_hf.image_loading import ImageLoadError, fetch, load_image, save_image


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    array[..., 3] = np.where(array[..., 3] > 128, 255, 60)
    return Image.fromarray(array).convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **parameters) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **parameters)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBa", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes(mode):
    image = picture(mode)
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (40, 30))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_colours_below_it_kept():
    array = np.full((4, 5, 4), 40, np.uint8)
    array[..., 3] = 0
    assert (np.asarray(load_image(Image.fromarray(array))) == 40).all()
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (10, 20, 30)


def test_deep_images_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.round(ramp / 257).astype(np.uint8)
    for source in (tmp_path / "deep.png", Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(load_image(source))[..., 0], expected)
    unit = Image.fromarray((ramp / 65535).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(load_image(unit))[..., 1], expected)
    deep = Image.fromarray(ramp.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(load_image(deep))[..., 1], expected)
    for wrong in (np.full((2, 2), 1e6), np.full((2, 2), np.nan), np.full((2, 2), -1.0)):
        with pytest.raises(ImageLoadError, match="expected 0 to 1 or 255 or 65535"):
            load_image(Image.fromarray(wrong.astype(np.float32)))
    bytes_as_integers = Image.fromarray(expected.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(load_image(bytes_as_integers))[..., 2], expected)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(size=(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(upright))


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    data = bytearray(encoded(picture(size=(40, 30)), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"))
    assert load_image(bytes(data)).size == (40, 30)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    sound = encoded(picture(size=(40, 30)), "JPEG", exif=exif)
    # The resolution's type becomes text, over which Pillow stumbles (TypeError) only when it writes the data anew.
    damaged = sound.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert load_image(sound).size == (30, 40)
    assert damaged != sound
    assert load_image(damaged).size == (40, 30)


def test_whatever_a_decoder_raises_names_the_file(monkeypatch, tmp_path):
    picture().save(tmp_path / "odd.png")

    def fail(self):
        raise AttributeError("no such tile")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageLoadError, match="odd.png cannot be read: no such tile"):
        load_image(tmp_path / "odd.png")


def test_threads_leave_the_warning_filters_alone():
    before, data = list(warnings.filters), encoded(picture())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as executor:
            assert {image.size for image in executor.map(load_image, [data] * 400)} == {(40, 30)}
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def test_animations_give_their_first_frame(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    assert load_image(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)


def test_arrays():
    array = np.asarray(picture())
    np.testing.assert_array_equal(np.asarray(load_image(array)), array)
    np.testing.assert_array_equal(np.asarray(load_image(array / 255.0)), array)
    assert load_image(array[..., 0]).size == (40, 30)
    assert load_image(array[..., :1] > 100).getpixel((0, 0)) in ((0, 0, 0), (255, 255, 255))
    for wrong in (array.astype(np.int64), array * 1.0, array.transpose(2, 0, 1)[None], array[:0], array[..., :2]):
        with pytest.raises(ImageLoadError):
            load_image(wrong)
    with pytest.raises(TypeError, match="not as TextIOWrapper"), open(__file__, encoding="utf-8") as text:
        load_image(text)
    with pytest.raises(TypeError, match="not as int"):
        load_image(3)


def test_open_files(tmp_path):
    picture().save(tmp_path / "a.png")
    expected = np.asarray(picture())
    with open(tmp_path / "a.png", "rb") as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), expected)
    written = io.BytesIO()
    picture().save(written, "PNG")
    for _ in range(2):  # from the beginning, wherever others have left it
        np.testing.assert_array_equal(np.asarray(load_image(written)), expected)


def test_whatever_can_be_read(tmp_path):
    image = picture()
    with tempfile.NamedTemporaryFile(suffix=".png", dir=tmp_path) as file:
        image.save(file)
        file.seek(0)
        assert load_image(file).tobytes() == image.tobytes()
        content = Path(file.name).read_bytes()
    for form in (bytearray(content), memoryview(content)):
        assert load_image(form).tobytes() == image.tobytes()
        assert load_pipeline("nano", output_type="mask")(form).size == image.size


def test_bytes_and_data_urls():
    data = encoded(picture())
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    np.testing.assert_array_equal(np.asarray(load_image(url)), np.asarray(load_image(data)))
    wrapped = "DATA:image/png;BASE64," + base64.encodebytes(data).decode().rstrip("=\n")
    assert load_image(wrapped).tobytes() == load_image(data).tobytes()
    with pytest.raises(ImageLoadError, match="base64"):
        load_image("data:image/png;base64,@@@")
    with pytest.raises(ImageLoadError, match="is given as a data URL") as raised:
        load_image(base64.b64encode(data * 100).decode())
    assert len(str(raised.value)) < 200
    with pytest.raises(ImageLoadError, match="longer than"):
        load_image(url, max_bytes=10)


def test_extreme_shapes():
    assert load_image(Image.new("RGB", (1, 1))).size == (1, 1)
    assert load_image(encoded(Image.new("RGB", (20000, 10)))).size == (20000, 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "is empty"),
        ("text.png", b"this is no picture", "is no image"),
        ("clip.mp4", b"\x00\x00\x00\x20ftypisom", "is no image.*birefnet_hf.video.cut_out_video"),
        ("half.jpg", encoded(picture(size=(200, 200)), "JPEG")[:3000], "cannot be read"),
        ("half.png", encoded(picture(size=(200, 200)))[:3000], "cannot be read"),
        ("half.webp", encoded(picture(size=(200, 200)), "WEBP")[:500], "cannot be read|is no image"),
        ("half.gif", encoded(picture("P", size=(200, 200)), "GIF")[:1000], "cannot be read"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageLoadError, match=f"{name}.*({message})"):
        load_image(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageLoadError, match="nowhere.png: there is no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageLoadError, match="is a folder"):
        load_image(tmp_path)


def test_decompression_bombs(monkeypatch, tmp_path):
    bomb = encoded(Image.new("1", (3000, 3000)))
    with pytest.raises(ImageLoadError, match="more than the 1000000 allowed"):
        load_image(bomb, max_pixels=1_000_000)
    with pytest.raises(ImageLoadError, match="large.png"):
        (tmp_path / "large.png").write_bytes(bomb)
        load_image(tmp_path / "large.png", max_pixels=1_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000_000)
    with pytest.raises(ImageLoadError, match="decompression bomb"):
        load_image(bomb)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "fec0::1",
        "3fff::1",
        "192.0.0.8",
        "192.88.99.1",
    ],
)
def test_special_addresses_are_not_public(address):
    assert not image_loading._is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses(address):
    assert image_loading._is_public(address)


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `server.image` is what /image gives."""

    def do_GET(self):
        if self.path.startswith("/image") or self.path == "/caf%C3%A9":
            self.answer(200, self.server.image)
        elif self.path == "/loop":
            self.answer(302, b"", Location="/loop")
        elif self.path == "/away":
            self.answer(302, b"", Location="http://169.254.169.254/latest")
        elif self.path == "/file":
            self.answer(302, b"", Location="file:///etc/passwd")
        elif self.path == "/moved":
            self.answer(301, b"", Location="/image.png?size=1")
        elif self.path == "/abroad":  # as servers write it that do not encode
            self.answer(301, b"", Location="/café".encode().decode("latin-1"))
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 65536)
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif self.path == "/drip":  # of chunks whose length never ends, on a connection that is to be closed
            self.send_response(200)
            self.send_header("Connection", "close")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.drip()
        elif self.path == "/headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            self.drip()
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
        else:
            self.answer(404, b"no")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        for _ in range(60):
            self.wfile.write(b"0")
            self.wfile.flush()
            time.sleep(0.1)

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the client hangs up on purpose


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.image = encoded(picture())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fetching(server):
    for path in ("/image.png", "/moved", "/abroad", "/image of a cat.png?büro=1"):
        assert load_image(server + path, allow_private=True).size == (40, 30)
    with pytest.raises(ImageLoadError, match="404"):
        load_image(server + "/nothing", allow_private=True)


def test_private_addresses_are_refused(server, monkeypatch):
    with pytest.raises(ImageLoadError, match="not public"):
        load_image(server + "/image.png")
    with pytest.raises(ImageLoadError, match="not public"):
        load_image(server.replace("127.0.0.1", "localhost") + "/image.png")
    # A name that resolves to a public and a private address is refused as well.
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers)
    with pytest.raises(ImageLoadError, match="not public"):
        load_image("http://example.org/image.png")


def test_redirects_are_checked_again(server, monkeypatch):
    real = image_loading._is_public
    monkeypatch.setattr(image_loading, "_is_public", lambda ip: ip == "127.0.0.1" or real(ip))
    assert load_image(server + "/moved").size == (40, 30)
    with pytest.raises(ImageLoadError, match="not public"):
        load_image(server + "/away")
    with pytest.raises(ImageLoadError, match="no http or https address"):
        load_image(server + "/file")
    with pytest.raises(ImageLoadError, match="redirects more than 5 times"):
        load_image(server + "/loop")


def test_the_checked_address_is_the_one_connected_to(server, monkeypatch):
    """A name that resolves differently the second time (DNS rebinding) still leads to the first answer."""
    port = int(server.rsplit(":", 1)[1])
    calls = []

    def getaddrinfo(host, *args, **kwargs):
        calls.append(host)
        address = "127.0.0.1" if host in ("rebinding.example", "127.0.0.1") and calls.count(host) <= 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(image_loading, "_is_public", lambda ip: ip == "127.0.0.1")
    assert load_image(f"http://rebinding.example:{port}/image.png").size == (40, 30)
    assert calls.count("rebinding.example") == 1


def test_limits_of_size_and_time(server):
    with pytest.raises(ImageLoadError, match="larger than the 100 bytes"):
        fetch(server + "/image.png", max_bytes=100, allow_private=True)
    with pytest.raises(ImageLoadError, match="larger than the 1000000 bytes"):
        fetch(server + "/endless", max_bytes=1_000_000, allow_private=True)
    for path in ("/slow", "/drip", "/headers"):
        start = time.monotonic()
        with pytest.raises(ImageLoadError, match="longer than the time allowed"):
            fetch(server + path, timeout=0.5, allow_private=True)
        assert time.monotonic() - start < 3
    with pytest.raises(ImageLoadError, match="broke off after 1 of 1000"):
        fetch(server + "/short", allow_private=True)


def test_a_handshake_has_no_time_of_its_own():
    """A server whose first message of an encrypted connection comes byte by byte."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"\x16\x03\x03\x40\x00")  # so many bytes follow
            for _ in range(60):
                try:
                    accepted.sendall(b"x")
                except OSError:
                    return
                if stop.wait(0.1):
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(ImageLoadError, match="longer than the time allowed"):
            fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/a.png", timeout=0.5, allow_private=True)
    finally:
        stop.set()
        thread.join()
        listener.close()
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "url", ["http://", "https://[::1", "http://host:99999/a.png", "http://no-such-host.invalid/a.png"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(ImageLoadError):
        load_image(url)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_saving_is_lossless_and_atomic(suffix, tmp_path):
    image = picture("RGBA")
    path = tmp_path / "new" / f"cutout{suffix}"
    save_image(image, path)
    with Image.open(path) as saved:
        visible = np.asarray(image)[..., 3] > 0
        np.testing.assert_array_equal(np.asarray(saved)[visible], np.asarray(image)[visible])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # as readable as other new files

    before = path.read_bytes()
    with pytest.raises(ValueError, match="unknown file extension"):
        save_image(image, tmp_path / "new" / "cutout.nonsense")
    with pytest.raises((TypeError, ValueError)):
        save_image(image, path, **({"quality": "high"} if suffix == ".webp" else {"dpi": 3}))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_png_files_are_small(tmp_path):
    """The faster compression costs little, here with the photograph's mask as alpha."""
    folder = Path(__file__).parents[1] / "notebooks" / "images"
    cutout = load_image(folder / "lemur.jpg")
    with Image.open(folder / "lemur_mask.png") as mask:
        cutout.putalpha(mask.convert("L").resize(cutout.size))
    save_image(cutout, tmp_path / "ours.png")
    cutout.save(tmp_path / "pillow.png")
    assert (tmp_path / "ours.png").stat().st_size < 1.1 * (tmp_path / "pillow.png").stat().st_size
    with Image.open(tmp_path / "ours.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(cutout))


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_loads():
    """Data loaders' workers are forked; what a thread holds at that moment nobody gives back to them."""
    with image_loading._FILTERING:
        worker = multiprocessing.get_context("fork").Process(
            target=load_image, args=(encoded(picture()),), daemon=True
        )
        worker.start()
        worker.join(timeout=60)
    assert worker.exitcode == 0


def test_programs_are_no_images(tmp_path):
    """Pillow would have Ghostscript run PostScript, for as long as that takes."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
    (tmp_path / "photo.png").write_bytes(postscript)
    for source in (postscript, tmp_path / "photo.png", Image.open(io.BytesIO(postscript))):
        with pytest.raises(ImageLoadError, match="EPS is not read"):
            load_image(source)


def test_floating_point_that_overshoots_is_refused():
    """Not taken for the darkest of 255 greys."""
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert np.asarray(load_image(Image.fromarray(values))).max() == 255
    with pytest.raises(ImageLoadError, match="0 to 1.02"):
        load_image(Image.fromarray(values * np.float32(1.02)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_of_the_shell(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for content in (encoded(picture()), bytes(2000)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        if len(content) == 2000:
            with pytest.raises(ImageLoadError, match="more than the 1999 bytes"):
                load_image(tmp_path / "pipe", max_bytes=1999)
        else:
            assert load_image(tmp_path / "pipe").size == (40, 30)
        writer.join()
