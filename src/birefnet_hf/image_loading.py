"""Opens whatever a user hands over as an upright RGB image, safely, and saves without half-written files."""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import logging
import mimetypes
import os
import secrets
import socket
import ssl
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError


logger = logging.getLogger(__name__)

IMAGE_TYPES = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray  # and what has `read`
ImageSource = str | os.PathLike[str] | bytes | io.IOBase | Image.Image | np.ndarray

# What is looked for in folders. Whether a file can be read depends on Pillow; one that cannot is reported.
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
    + (".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

DEFAULT_TIMEOUT = 30.0
MAX_DOWNLOAD_BYTES = 50 * 2**20
MAX_REDIRECTS = 5
# How folders begin whose content is not complete.
PARTIAL_PREFIX = ".partial-"

# What Pillow's decoders raise for broken files.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Special ranges that Python's `is_global` lets through: site-local, documentation, IPv4 dummy and 6to4 relay.
_SPECIAL = [ipaddress.ip_network(network) for network in ("fec0::/10", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24")]
# `warnings.catch_warnings` is for one thread at a time: of two, one would leave its filter behind for all.
_FILTERING = threading.Lock()
# Formats that are programs: Pillow has PostScript run by Ghostscript, with no limit of time, and WMF by Windows.
_PROGRAMS = {"EPS", "WMF"}


def _renew_lock() -> None:
    global _FILTERING
    _FILTERING = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread that held it is not there to release it in the copy
    os.register_at_fork(after_in_child=_renew_lock)


class ImageLoadError(ValueError):
    """An image cannot be read; the message names it and the reason."""

    def __init__(self, message: str):
        # Of a worker process PyTorch makes the whole traceback the message.
        is_traceback = message.startswith("Caught ImageLoadError")
        super().__init__(message.rpartition("ImageLoadError: ")[2].strip() if is_traceback else message)


def is_url(source: str) -> bool:
    """Whether a name stands for something on the web, where it might as well be a file's."""
    return source[:8].lower().startswith(("http://", "https://"))


def load_image(
    source: ImageSource,
    *,
    timeout: float | None = None,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    max_pixels: int | None = None,
    allow_private: bool = False,
) -> Image.Image:
    """Opens an image as upright 8-bit RGB.

    EXIF orientation is applied. Transparency is dropped and the colours below it are kept, as upstream does. 16-bit images
    are scaled to 8 bits, of animations the first frame is taken.

    Args:
        source: Path; http, https or data URL; an open binary file, or what else has `read`, or its bytes; PIL image of
            any mode; array H×W, H×W×1, H×W×3 or H×W×4, uint8, bool, or float in [0, 1].
        timeout: Seconds that fetching a URL may take in all, 30 by default.
        max_bytes: Largest file that is fetched, or read from a pipe.
        max_pixels: Largest image that is decoded; by default Pillow's own limit against decompression bombs, 179 million.
        allow_private: Whether URLs may lead to addresses that are not public. Only for URLs you wrote yourself.

    Returns:
        PIL image in mode RGB.

    Raises:
        ImageLoadError: there is no such file or address, or it holds no whole image, or one of PostScript, which would
            be run.
        TypeError: `source` is none of the above.
    """
    is_file = hasattr(source, "read") and not isinstance(source, io.TextIOBase | Image.Image)
    if not isinstance(source, IMAGE_TYPES) and not is_file:
        raise TypeError(
            f"An image is given as path, URL, binary file, bytes, PIL image or array, not as {type(source).__name__}."
        )
    name = "the image"
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if is_file and not isinstance(source, os.PathLike):
            if getattr(source, "seekable", bool)():
                source.seek(0)  # it may have just been written, or read by someone else
            source = source.read()
        if isinstance(source, str) and urlsplit(source).scheme in ("http", "https"):
            name = source
            source = fetch(source, timeout=timeout, max_bytes=max_bytes, allow_private=allow_private)
        elif isinstance(source, str) and source[:5].lower() == "data:":
            name = source[:40] + "…"
            source = _decode_data_url(source, max_bytes)
        elif isinstance(source, str | os.PathLike):
            source = os.fspath(source)
            name = source if len(source) <= 255 else f"{source[:40]}…"
            if not os.path.exists(source):
                hint = "" if name == source else " Base64 is given as a data URL: data:image/png;base64,…"
                raise ImageLoadError(f"{name or 'An empty path'}: there is no such file.{hint}")
            if os.path.isdir(source):
                raise ImageLoadError(f"{name} is a folder; name an image in it.")
            if not os.path.isfile(source):  # a pipe, such as the shell's <(…)
                with open(source, "rb") as file:
                    source = file.read(max_bytes + 1)
                if len(source) > max_bytes:
                    raise ImageLoadError(f"{name} gives more than the {max_bytes} bytes allowed.")
            elif os.path.getsize(source) == 0:
                raise ImageLoadError(f"{name} is empty.")
        if isinstance(source, bytes | bytearray | memoryview):
            if not source:
                raise ImageLoadError("the image is empty (no bytes).")
            source = io.BytesIO(source)
        if isinstance(source, Image.Image):
            return _upright_rgb(source, max_pixels)
        with _FILTERING, warnings.catch_warnings():
            # Between once and twice its limit Pillow only warns; `max_pixels` is there for who wants less.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source)
        with opened as image:
            return _upright_rgb(image, max_pixels)
    except ImageLoadError as error:
        raise (error if name in str(error) or name == "the image" else ImageLoadError(f"{name}: {error}")) from None
    except UnidentifiedImageError as error:
        is_video = (mimetypes.guess_type(name)[0] or "").startswith("video/")
        hint = " Videos are for birefnet_hf.video.cut_out_video." if is_video else ""
        raise ImageLoadError(f"{name} is no image, or of a format that Pillow does not know.{hint}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageLoadError(f"{name} cannot be read: {reason}.") from error


def _upright_rgb(image: Image.Image, max_pixels: int | None) -> Image.Image:
    if image.format in _PROGRAMS:
        raise ImageLoadError(f"{image.format} is not read: save it as PNG first.")
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageLoadError(f"{width}×{height} pixels are more than the {max_pixels} allowed; scale the image down.")
    if width == 0 or height == 0:
        raise ImageLoadError(f"the image is empty ({width}×{height} pixels).")
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # of whatever kind the damage makes it
        logger.warning("EXIF data cannot be read, the image is taken as it lies: %s", error)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as 8-bit RGB. Greys of more bits or in floating point are scaled; Pillow would clip them at 255.

    Raises:
        ImageLoadError: their values are not those of an image.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # "I", of 32 bits, may hold 8 or 16, as NumPy's do
        limits = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
        values = np.asarray(image)
        return Image.fromarray(_to_bytes(values, _find_limit(values, limits))).convert("RGB")
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def rgb_profile(image: Image.Image) -> bytes | None:
    """The ICC profile that gives an image's RGB values their meaning, e.g. of a camera with a wide gamut."""
    profile = image.info.get("icc_profile")
    # Its 16th to 19th byte name the colour space: a CMYK image's profile does not apply to what was made of it.
    return profile if profile and profile[16:20] == b"RGB " else None


def convert_colours(image: Image.Image, source: bytes | None, target: bytes | None) -> Image.Image:
    """An RGB image whose values mean by the profile `target` what they meant by `source`; None stands for sRGB.

    The image itself where both are the same, or one of them cannot be read.
    """
    if source == target:
        return image
    try:
        opened = [
            ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("sRGB")
            for profile in (source, target)
        ]
        return ImageCms.profileToProfile(image, *opened, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImportError, OSError, ImageCms.PyCMSError) as error:
        logger.warning("A colour profile cannot be read, the colours are taken as they are: %s", error)
        return image


def load_mask(source: str | Path | bytes | Image.Image, is_prediction: bool = False) -> Image.Image:
    """Reads a foreground mask from any of the forms in which masks are stored, see `read_mask`.

    Args:
        source: path, contents of a file, or PIL image.
        is_prediction: as in `read_mask`.

    Returns:
        PIL image of mode L, 0 (background) to 255 (foreground), upright by its EXIF orientation.

    Raises:
        ImageLoadError: there is no readable image, or its values are not those of a mask.
    """
    try:
        values, foreground = read_mask(open_upright(source), is_prediction)
    except UNREADABLE:
        raise
    except Exception as error:  # on damaged files Pillow raises nearly anything
        raise ImageLoadError(str(error)) from error
    is_done = values.dtype == np.uint8 and foreground == 255
    return Image.fromarray(values if is_done else _to_bytes(values, foreground))


def read_mask(image: Image.Image, is_prediction: bool = False) -> tuple[np.ndarray, int]:
    """The values of a foreground mask, in full depth.

    The value range is told from the largest value, 1, 255 or 65535, so that masks of 0 and 1 and those of 16 bits are
    read as what they mean. Colours count by their luminance. Of a palette that is not grey, index 0 is background and
    all else foreground (class maps). Where a mask has an alpha channel that is not opaque throughout, that is the mask.

    Args:
        image: of any mode.
        is_prediction: integers of 8 and 16 bits are what they are, however small: where a tool finds nothing, nothing is
            near 255.

    Returns:
        Values H×W from 0, and the one that stands for foreground: 1, 255 or 65535.

    Raises:
        ImageLoadError: the values are not those of a mask.
    """
    if image.mode == "P" and "transparency" not in image.info:
        colours = np.zeros((256, 3), dtype=np.uint8)  # a palette may end before the largest index
        stored = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        colours[: len(stored)] = stored
        levels = colours[np.asarray(image)]
        grey = (levels == levels[..., :1]).all()
        image = Image.fromarray(levels[..., 0] if grey else np.where(np.asarray(image), 255, 0).astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = alpha if alpha.getextrema()[0] < 255 else rgba.convert("RGB")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L")
    values = np.asarray(image)
    if image.mode == "L" and (is_prediction or values.max() > 1):
        return values, 255
    limits = (65535,) if is_prediction and image.mode.startswith("I") else (1, 255, 65535)
    return values, _find_limit(values, limits)


def open_upright(source: str | Path | bytes | Image.Image) -> Image.Image:
    """A decoded PIL image in the mode of the file, upright; ImageLoadError where there is none."""
    try:
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source)
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            image = Image.open(stream)
            image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except UNREADABLE as error:
        raise ImageLoadError(explain_unreadable(error)) from error


def explain_unreadable(error: BaseException) -> str:
    # Pillow's own message shows the file object, not the file.
    return "no image, or of an unknown format" if isinstance(error, UnidentifiedImageError) else str(error)


def _find_limit(values: np.ndarray, limits: Sequence[int]) -> int:
    """The first of the limits that no number exceeds; ImageLoadError where there is none, or some are below 0."""
    largest = float(values.max())
    limit = next((limit for limit in limits if largest <= limit), None)
    if limits[0] == 1 < largest < 2:  # overshoot of numbers up to 1, which would be black of those up to 255
        limit = None
    if limit is None or not values.min() >= 0:
        expected = " or ".join(map(str, limits))
        raise ImageLoadError(f"Values from {values.min():g} to {largest:g}: expected 0 to {expected}.")
    return limit


def _to_bytes(values: np.ndarray, limit: int) -> np.ndarray:
    """Numbers from 0 to the limit as uint8, 0 to 255."""
    return np.rint(values * (255.0 / limit)).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise ImageLoadError(f"an array of shape {array.shape} is no image; H×W, H×W×3 or H×W×4 are.")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageLoadError(f"an array of floats must lie in [0, 1], not [{array.min():g}, {array.max():g}].")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageLoadError(f"an array of type {array.dtype} is no image; use uint8, bool or float in [0, 1].")
    return Image.fromarray(array).convert("RGB")


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ImageLoadError(f"{url[:40]}… is no data URL: it has no comma before its data.")
    if len(data) > 2 * max_bytes:
        raise ImageLoadError(f"the data URL is longer than the {max_bytes} bytes allowed.")
    try:
        contents = unquote_to_bytes(data)
        if not header.lower().endswith(";base64"):
            return contents
        contents = b"".join(contents.split())  # as browsers do: broken into lines, and without padding
        return base64.b64decode(contents + b"=" * (-len(contents) % 4), validate=True)
    except binascii.Error as error:
        raise ImageLoadError(f"{url[:40]}… is not valid base64: {error}.") from error


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to an address that has been checked: the name is not resolved again, which could give another one."""

    def __init__(self, host: str, port: int, addresses: list[str], tls: ssl.SSLContext | None, timeout: float):
        super().__init__(host, port, timeout=timeout)
        self.addresses = addresses
        self.tls = tls
        self.deadline = time.monotonic() + timeout
        self.opened: list[socket.socket] = []  # `sock` is gone as soon as the server says that it will close

    def connect(self) -> None:
        for index, address in enumerate(self.addresses, start=1):
            try:
                sock = socket.create_connection((address, self.port), max(self.deadline - time.monotonic(), 0.001))
                break
            except OSError:  # a machine without IPv6, say
                if index == len(self.addresses):
                    raise
        self.sock = self._keep(sock)
        if self.tls is not None:
            secured = self.tls.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = self._keep(secured)
            secured.do_handshake()

    def _keep(self, sock: socket.socket) -> socket.socket:
        """Makes the socket known to `hang_up`, which may have come before it."""
        self.opened.append(sock)
        if time.monotonic() >= self.deadline:
            sock.close()
            raise TimeoutError
        return sock

    def hang_up(self) -> None:
        """Ends everything from outside: a server that sends a byte now and then never runs into a socket's timeout."""
        for sock in self.opened:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already, or another one stands for it now


def fetch(
    url: str,
    *,
    timeout: float | None = None,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    allow_private: bool = False,
) -> bytes:
    """Fetches a URL that a stranger may have written.

    Only http and https, only public addresses, checked again after every redirect; the connection goes to the very
    address that was checked, and proxies of the environment are not used.

    Args:
        url: What to fetch.
        timeout: Seconds for everything, redirects included; 30 by default. What the system's resolver may take for a
            name comes on top.
        max_bytes: Largest answer.
        allow_private: Whether addresses that are not public are allowed.

    Raises:
        ImageLoadError: the address is not allowed or does not answer, or the answer is too large, too slow or an error.
    """
    deadline = time.monotonic() + (DEFAULT_TIMEOUT if timeout is None else timeout)
    current = url
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(current)
        try:
            port = parts.port
        except ValueError as error:
            raise ImageLoadError(f"{current}: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageLoadError(f"{current} is no http or https address.")
        port = port or (443 if parts.scheme == "https" else 80)
        addresses = _resolve(parts.hostname, port, allow_private)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        remaining = deadline - time.monotonic()
        connection = _PinnedConnection(parts.hostname, port, addresses, tls, timeout=max(remaining, 0.001))
        watchdog = threading.Timer(max(remaining, 0.001), connection.hang_up)
        watchdog.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            path = quote(path, safe="/?&=%:@!$'()*+,;~[]-._")
            connection.request("GET", path, headers={"User-Agent": "birefnet_hf", "Accept": "image/*"})
            response = connection.getresponse()
            if time.monotonic() >= deadline:  # cut off within the headers, which then look complete
                raise TimeoutError
            location = (response.getheader("Location") or "").encode("latin-1").decode("utf-8", "replace")
            if response.status in (301, 302, 303, 307, 308) and location:
                current = urljoin(current, location)
                continue
            if response.status != 200:
                raise ImageLoadError(f"{url}: the server answers {response.status} {response.reason}.")
            return _read_body(response, url, max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ImageLoadError):
                raise
            if time.monotonic() >= deadline:
                raise ImageLoadError(f"{url} took longer than the time allowed.") from error
            raise ImageLoadError(f"{url} cannot be fetched: {error}.") from error
        finally:
            watchdog.cancel()
            connection.close()
    raise ImageLoadError(f"{url} redirects more than {MAX_REDIRECTS} times.")


def _read_body(response: http.client.HTTPResponse, url: str, max_bytes: int, deadline: float) -> bytes:
    too_large = f"{url} is larger than the {max_bytes} bytes allowed."
    if (response.length or 0) > max_bytes:
        raise ImageLoadError(too_large)
    expected, body = response.length, bytearray()
    while chunk := response.read1(2**16):
        body += chunk
        if len(body) > max_bytes:
            raise ImageLoadError(too_large)
        if time.monotonic() >= deadline:
            break
    if time.monotonic() >= deadline:  # also where the end of the body is that of the time
        raise ImageLoadError(f"{url} took longer than the time allowed.")
    if expected is not None and len(body) < expected:
        raise ImageLoadError(f"{url} broke off after {len(body)} of {expected} bytes.")
    return bytes(body)


def _resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """The addresses of the host; all that its name stands for must be public.

    Raises:
        ImageLoadError: the name is unknown, or leads to a private, loopback, link-local or otherwise special address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageLoadError(f"{host} is not known: {error}.") from error
    addresses = [info[4][0] for info in found]
    if not allow_private and not all(_is_public(address) for address in addresses):
        raise ImageLoadError(f"{host} leads to an address that is not public, which is not allowed.")
    return addresses


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # Addresses that carry an IPv4 address lead to that one.
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded:
            return _is_public(str(embedded))
    special = any(ip.version == network.version and ip in network for network in _SPECIAL)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not special


@contextlib.contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yields an empty folder whose files, when the block is left without an error, replace those of `folder`.

    Each file is replaced in one step, so that a reader, or an interruption, finds a complete file at any time. After an
    error nothing has changed, and a folder that was not there is not there.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Within the folder, which may be a volume or a link to another disk.
        with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL_PREFIX) as staging:
            yield Path(staging)
            for path in sorted(Path(staging).rglob("*")):
                target = folder / path.relative_to(staging)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    os.replace(path, target)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def save_image(image: Image.Image, path: str | os.PathLike[str], **parameters: Any) -> None:
    """Saves an image so that the file appears whole or not at all. The suffix names the format; WebP is lossless.

    Args:
        image: What to save.
        path: Where to; folders are created.
        **parameters: Passed to `PIL.Image.Image.save`.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
        ValueError: Pillow knows no format of that suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".webp":
        parameters = {"lossless": True, **parameters}
    elif suffix == ".png":  # more than twice as fast as Pillow's own 6, and at most a tenth larger
        parameters = {"compress_level": 4, **parameters}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        image.save(temporary, **parameters)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = [
    "UNREADABLE",
    "ImageLoadError",
    "ImageSource",
    "convert_colours",
    "explain_unreadable",
    "fetch",
    "is_url",
    "load_image",
    "load_mask",
    "open_upright",
    "read_mask",
    "rgb_profile",
    "save_image",
    "staged_files",
    "to_rgb",
]
