"""BiRefNet in a browser: cut-outs of photos, of many files, and of videos. Run it with `python space/app.py`.

A thin client of `birefnet_hf`. Environment variables, all optional:

- BIREFNET_MODEL: model that is chosen at first (alias, Hub id or directory), default "nano".
- BIREFNET_MODELS: the models to choose from, separated by commas; default: all known ones.
- BIREFNET_CACHED_MODELS: how many stay in memory, default 2.
- BIREFNET_MAX_PIXELS, BIREFNET_MAX_FILE_MB, BIREFNET_MAX_FILES, BIREFNET_MAX_SECONDS, BIREFNET_MAX_MINUTES: limits for
  photos and videos, the last of the time that a video may take.
- BIREFNET_KEEP_SECONDS: after which time uploads and results are deleted, default 3600.
- BIREFNET_MCP=1: serve the endpoints as tools of the Model Context Protocol, too (needs gradio[mcp]).
"""

import asyncio
import atexit
import contextlib
import gc
import html
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


# Everything that visitors send and get lies in one folder that only this process's user may read, and that is removed
# at the end. Gradio reads the variable when components are made.
WORK = Path(tempfile.mkdtemp(prefix="birefnet-space-"))
os.environ["GRADIO_TEMP_DIR"] = str(WORK)
atexit.register(shutil.rmtree, WORK, ignore_errors=True)

try:
    from spaces import GPU  # before torch, which it prepares
except ImportError:  # not on ZeroGPU

    def GPU(function: Callable | None = None, **_: Any) -> Callable:
        return function if function is not None else lambda decorated: decorated


import gradio as gr  # noqa: E402
import torch  # noqa: E402
from gradio.data_classes import FileData  # noqa: E402
from PIL import Image, ImageColor  # noqa: E402

from birefnet_hf import BackgroundRemovalPipeline, load_pipeline  # noqa: E402
from birefnet_hf.checkpoints_birefnet import CHECKPOINTS, Checkpoint, get_checkpoint  # noqa: E402
from birefnet_hf.foreground import parse_background  # noqa: E402
from birefnet_hf.image_loading import ImageLoadError, fetch, is_url, load_image, save_image  # noqa: E402
from birefnet_hf.pipeline_birefnet import render_picture  # noqa: E402
from birefnet_hf.video import VideoError, iterate_video, probe_video  # noqa: E402


logger = logging.getLogger(__name__)

FALLBACK_MODEL = "nano"
DEFAULT_MODEL = os.environ.get("BIREFNET_MODEL") or FALLBACK_MODEL


def read_number(name: str, default: float) -> float:
    """A number above 0 from the environment; SystemExit names a variable that holds none."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if (number := float(text)) > 0:
            return number
    raise SystemExit(f"{name}={text!r} must be a number above 0.")


MAX_PIXELS = int(read_number("BIREFNET_MAX_PIXELS", 50_000_000))
MAX_FILE_MB = read_number("BIREFNET_MAX_FILE_MB", 100)
MAX_FILE_BYTES = int(MAX_FILE_MB * 2**20)
MAX_FILES = int(read_number("BIREFNET_MAX_FILES", 50))
MAX_SECONDS = read_number("BIREFNET_MAX_SECONDS", 60)
MAX_FRAME_PIXELS = 4096 * 2304
# Of computing a video, for which others wait: large frames take seconds each on a CPU.
MAX_MINUTES = read_number("BIREFNET_MAX_MINUTES", 15)
URL_TIMEOUT = 20.0
# How long a model that could not be loaded is not tried again: giving up on a network takes a minute or more.
RETRY_SECONDS = 300
KEEP_SECONDS = int(read_number("BIREFNET_KEEP_SECONDS", 3600))
MAX_WAITING = 32

OWN_SIZE = "Model's own"
PHOTO_SIZE = "As the photo, up to 2304"
SIZES = [OWN_SIZE, "512", "1024", "1536", "2048", PHOTO_SIZE]
BACKGROUNDS = ["Transparent", "Colour", "Image", "Blur"]
VIDEO_FORMATS = {
    "WebM, transparent": ".webm",
    "ProRes 4444, transparent": ".mov",
    "MP4, on a background": ".mp4",
}
# What browsers show as it is, turned as its EXIF data say.
SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".webp"}
EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_PHOTOS = [str(EXAMPLES / name) for name in ("lemur.jpg", "coffee.png", "shuttle.jpg")]
EXAMPLE_VIDEO = str(EXAMPLES / "coffee_pan.mp4")


@dataclass(frozen=True)
class Options:
    """What the controls say."""

    model: str
    size: int | dict[str, int] | None
    refine: bool
    background: Any
    mask_only: bool
    threshold: float


class ModelCache:
    """The models used last. Loading is serialised; a model that is dropped gives its memory back once it is idle."""

    def __init__(self, capacity: int, load: Callable[[str], BackgroundRemovalPipeline] = load_pipeline):
        self.capacity = max(1, capacity)
        self.load = load
        self.lock = threading.Lock()
        self.pipelines: OrderedDict[str, BackgroundRemovalPipeline] = OrderedDict()
        self.failures: dict[str, float] = {}  # name to time

    def is_ready(self, name: str) -> bool:
        """Whether `prepare` takes no time: the model is loaded, or known not to load."""
        return name in self.pipelines or self._failed_lately(name)

    def _failed_lately(self, name: str) -> bool:
        return time.monotonic() - self.failures.get(name, -RETRY_SECONDS) < RETRY_SECONDS

    def prepare(self, name: str) -> tuple[str, str]:
        """Loads a model.

        Returns:
            The name of the model that is there now, and a notice: empty, or that this one stands in for another.

        Raises:
            gr.Error: the fallback cannot be loaded either.
        """
        for candidate in dict.fromkeys([name, FALLBACK_MODEL]):
            if self._failed_lately(candidate):
                continue
            try:
                self.get(candidate)
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                logger.warning("Cannot load %s: %s", candidate, error)
                self.failures[candidate] = time.monotonic()
                continue
            if candidate == name:
                return name, ""
            return candidate, (
                f"**{name}** cannot be loaded now, so the small built-in model **{candidate}** was used: "
                "edges are coarser. Try again in some minutes, or choose another model."
            )
        raise gr.Error(f"Neither {name} nor the small model {FALLBACK_MODEL} can be loaded.")

    def get(self, name: str) -> BackgroundRemovalPipeline:
        """The model of that name, loaded if need be."""
        with self.lock:
            if name not in self.pipelines:
                while len(self.pipelines) >= self.capacity:
                    self.pipelines.popitem(last=False)
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                self.pipelines[name] = self.load(name)
            self.pipelines.move_to_end(name)
            return self.pipelines[name]


MODELS = ModelCache(max(1, int(read_number("BIREFNET_CACHED_MODELS", 2))))


class Photo(gr.Image):
    """An image input that hands over the file as it came: reading it, limits included, is the package's work."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


class Files(gr.File):
    """A field for many files whose schema has no references: among the parameters of an MCP tool they lead nowhere."""

    is_template = True

    def api_info(self) -> dict[str, Any]:
        file = FileData.model_json_schema()
        file["properties"]["meta"] = file.pop("$defs")["FileDataMeta"]
        return {"type": "array", "items": file}


def model_choices() -> list[tuple[str, str]]:
    """Label and name of every model on offer, the default first."""
    labels = {FALLBACK_MODEL: "nano · small and quick, for trying out, works offline"}
    labels |= {item.alias: _describe(item) for item in CHECKPOINTS if item.alias}
    listed = [name.strip() for name in os.environ.get("BIREFNET_MODELS", "").split(",") if name.strip()]
    names = dict.fromkeys([DEFAULT_MODEL, *(listed or labels)])
    return [(labels.get(name, Path(name).name), name) for name in names]


def _describe(item: Checkpoint) -> str:
    """For example "lite · general purpose, smaller and faster, 1024 pixels"."""
    parts = ["general purpose" if item.purpose == "general" else item.purpose]
    if item.backbone == "swin_v1_t":
        parts.append("smaller and faster")
    if item.size is None:
        parts.append("at the photo's own size")
    else:
        height, width = item.size
        parts.append(f"{width} pixels" if width == height else f"{width} × {height} pixels")
    if item.licence != "MIT":
        parts.append(f"licence {item.licence}")
    return f"{item.alias} · {', '.join(parts)}"


def request_folder() -> Path:
    """A folder for the results of one request."""
    results = WORK / "results"
    results.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(dir=results))


def sweep() -> None:
    """Removes results whose time is over, and uploads that broke off, of which Gradio knows nothing."""
    for path in (*WORK.glob("results/*"), *WORK.glob("tmp*")):
        with contextlib.suppress(OSError):  # another process may have been faster
            if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sweep_forever() -> None:
    while True:
        time.sleep(max(1, KEEP_SECONDS / 2))
        sweep()


def read_options(
    model: str,
    size: str,
    refine: bool,
    background: str,
    colour: str,
    background_image: str | None,
    mask_only: bool,
    threshold: float,
) -> Options:
    """Turns the controls' values into what the package takes; gr.Error says what is wrong with them."""
    if model not in {name for _, name in model_choices()}:
        raise gr.Error(f"The model {model} is not on offer here.")
    if size not in SIZES or background not in BACKGROUNDS:
        raise gr.Error(f"The input size is one of {SIZES}, the background one of {BACKGROUNDS}.")
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise gr.Error("The threshold lies between 0 and 1.")
    backdrop: Any = None
    if background == "Blur":
        backdrop = "blur"
    elif background == "Colour":
        backdrop = parse_background(read_colour(colour))
    elif background == "Image":
        if not background_image:
            raise gr.Error("Choose a background image, or another background.")
        # As a picture and not by its name: what a program sends is never taken for a colour or an address.
        backdrop = parse_background(read_photo(background_image))
    if size == OWN_SIZE:
        side = None
    else:
        side = get_checkpoint("dynamic").processor_size if size == PHOTO_SIZE else int(size)
    return Options(model, side, refine, backdrop, mask_only, threshold)


def read_colour(text: str) -> tuple[int, int, int]:
    """Red, green and blue of what the colour picker says: "#1a2b3c", or "rgba(12.3, 45.6, 78.9, 1)" after a click."""
    try:
        if text.startswith("rgba("):
            red, green, blue = (min(255, max(0, round(float(part)))) for part in text[5:-1].split(",")[:3])
        else:
            red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, OverflowError, AttributeError) as error:
        raise gr.Error(f"{text} is no colour; #1a2b3c is.") from error
    return red, green, blue


def check_file_size(path: str) -> None:
    if not os.path.exists(path):
        raise gr.Error("The file was kept for too short a time here: choose it again.")
    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise gr.Error(f"{Path(path).name} is larger than the {MAX_FILE_MB:g} MB allowed.")


async def download(url: str, cache_dir: str) -> str:
    """What Gradio does with an address in a field for files (of its API), but within the limits of size and time."""
    try:  # a result of ours is there already, and its address mostly a private one
        own = Path(unquote(urlsplit(url).path.partition("/gradio_api/file=")[2])).resolve()
        if own.is_relative_to(WORK) and own.is_file():
            return str(own)
    except (ValueError, OSError):  # no address, or no path
        pass
    try:
        content = await asyncio.to_thread(fetch, url, timeout=URL_TIMEOUT, max_bytes=MAX_FILE_BYTES)
    except ImageLoadError as error:
        raise gr.Error(html.escape(str(error), quote=False)) from error
    folder = Path(tempfile.mkdtemp(dir=cache_dir))
    name = re.sub(r"[^\w.-]+", "_", Path(urlsplit(url).path).name).strip(".")
    path = folder / (name[-60:] or "file")
    path.write_bytes(content)
    return str(path)


def read_photo(source: str) -> Image.Image:
    """The photo of a path or URL within the limits; gr.Error says why not."""
    if not is_url(source):
        check_file_size(source)
    try:
        return load_image(source, timeout=URL_TIMEOUT, max_bytes=MAX_FILE_BYTES, max_pixels=MAX_PIXELS)
    except ValueError as error:
        # A visitor knows their file by its name, not by the folder it lies in here.
        message = str(error) if is_url(source) else str(error).replace(source, Path(source).name)
        raise gr.Error(html.escape(message, quote=False)) from error  # Gradio shows messages as HTML


def prepare_model(name: str, progress: gr.Progress) -> tuple[str, str]:
    """Loads the model, with a message in the page if that takes time. Outside GPU functions: ZeroGPU runs those in
    other processes, and what they load is lost.

    Returns:
        As `ModelCache.prepare`.
    """
    if not MODELS.is_ready(name):
        progress(0, desc=f"Loading the model {name} (takes a while the first time)")
    name, notice = MODELS.prepare(name)
    if notice:
        gr.Warning(notice.replace("**", ""))  # not shown as Markdown there
    return name, notice


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Tells the visitor what to do where memory runs out; any other error is a fault, to be seen in the log."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocators raise RuntimeErrors of their own for each device.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise gr.Error("There is not enough memory at this input size: choose a smaller one.") from error


@GPU
def compute(photo: Image.Image, options: Options) -> tuple[Image.Image, Image.Image]:
    """The result for one photo and its mask. Raises nothing but gr.Error for the visitor: ZeroGPU hides other texts."""
    pipe = MODELS.get(options.model)
    resize = {} if options.size is None else {"size": options.size}
    with memory_explained():
        try:
            mask = pipe(photo, output_type="mask", threshold=options.threshold, **resize)
        except ValueError as error:  # of exported models, which know one size
            raise gr.Error(str(error)) from error
        if options.mask_only:
            return mask, mask
        result = render_picture(
            photo,
            mask,
            background=options.background,
            refine_foreground=options.refine,
            device=pipe.device,
        )
    return result, mask


def cut_out_image(
    image: str | None = None,
    url: str = "",
    model: str = DEFAULT_MODEL,
    size: str = OWN_SIZE,
    refine: bool = True,
    background: str = "Transparent",
    colour: str = "#ffffff",
    background_image: str | None = None,
    mask_only: bool = False,
    threshold: float = 0.0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 Gradio finds it by this default
) -> tuple[tuple[str, str], str, str, str]:
    """Removes or replaces the background of a photo.

    Args:
        image: The photo, a file.
        url: Address of a photo on the web, instead of a file.
        model: One of the models on offer.
        size: Side in pixels at which the network sees the photo, "Model's own", or "As the photo, up to 2304".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the result is the mask itself, in grey.
        threshold: 0 keeps edges soft; above, the mask is split at this value.

    Returns:
        Before and after, the result as a PNG file, the mask, and a notice, mostly empty.
    """
    source = image or (url or "").strip()
    if not source:
        raise gr.Error("Choose a photo first, or paste its address.")
    if not image and not is_url(source):
        raise gr.Error("An address starts with http:// or https://.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    photo = read_photo(source)
    name, notice = prepare_model(options.model, progress)
    progress(None)
    result, mask = compute(photo, replace(options, model=name))
    folder = request_folder()
    stem = shown_stem(image) if image else "photo"
    target, alpha = folder / f"{stem}_cutout.png", folder / f"{stem}_mask.png"
    save_image(result, target)
    save_image(mask, alpha)
    before = Path(image) if image else folder / "photo.png"
    if before.suffix.lower() not in SHOWN_BY_BROWSERS or not image:
        before = folder / f"{stem}.png"
        save_image(photo, before)
    return (str(before), str(target)), str(target), str(alpha), notice


def cut_out_batch(
    files: list[str] | None,
    model: str = DEFAULT_MODEL,
    size: str = OWN_SIZE,
    refine: bool = True,
    background: str = "Transparent",
    colour: str = "#ffffff",
    background_image: str | None = None,
    mask_only: bool = False,
    threshold: float = 0.0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 Gradio finds it by this default
) -> Iterator[tuple[Any, Any, str]]:
    """Removes or replaces the background of many photos. One that cannot be read does not stop the others.

    Args:
        files: The photos.
        model: One of the models on offer.
        size: Side in pixels at which the network sees the photos, "Model's own", or "As the photo, up to 2304".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the results are the masks themselves, in grey.
        threshold: 0 keeps edges soft; above, masks are split at this value.

    Returns:
        The results with their names, all of them as a ZIP of PNG files, and a report that names every failure. Before,
        how far it is, as for videos.
    """
    if not files:
        raise gr.Error("Choose some photos first.")
    if len(files) > MAX_FILES:
        raise gr.Error(f"{len(files)} files are more than the {MAX_FILES} allowed at a time.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    name, notice = prepare_model(options.model, progress)
    options = replace(options, model=name)
    folder = request_folder()
    results, failures = [], []
    for index, (file, target) in enumerate(zip(files, _unique_names(files), strict=True)):
        title = Path(file).name
        yield results or gr.skip(), gr.skip(), f"{index} of {len(files)} photos…"
        try:
            result, _ = compute(read_photo(file), options)
        except gr.Error as error:
            message = html.unescape(error.message)
            message = message if title in message else f"{title}: {message}"
            failures.append("- " + MARKDOWN.sub(r"\\\g<0>", message))
            continue
        save_image(result, folder / target)
        results.append((str(folder / target), target))
    archive = _zip(folder, [target for _, target in results]) if results else None
    report = "\n".join([f"{len(results)} done, {len(failures)} failed.", *failures, "", notice]).strip()
    yield results, archive, report


def shown_stem(file: str) -> str:
    """A file's name without its suffix and without leading dots, as Gradio hands out no hidden files."""
    return Path(file).stem.lstrip(".") or "photo"


def _unique_names(files: list[str]) -> list[str]:
    """A PNG name for each file; those of one stem are numbered, past names that end in such a number already."""
    names: dict[str, str] = {}  # by what file systems take for the same
    for file in files:
        stem = name = shown_stem(file)
        number = 1
        while name.casefold() in names:
            number += 1
            name = f"{stem} ({number})"
        names[name.casefold()] = f"{name}.png"
    return list(names.values())


def stop_batch(pictures: list[tuple[str, str]] | None) -> tuple[str | None, str]:
    """What is left of a batch that was stopped: the results that are there, as a ZIP, and a report."""
    if not pictures:
        return None, "Stopped."
    folder = request_folder()
    names = [Path(name or path).name for path, name in pictures]
    for (path, _), name in zip(pictures, names, strict=True):
        shutil.copyfile(path, folder / name)
    return _zip(folder, names), f"Stopped: {len(pictures)} done."


def _zip(folder: Path, names: list[str]) -> str:
    archive = folder / "cutouts.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:  # PNG is compressed already
        for name in names:
            target.write(folder / name, name)
    return str(archive)


def clip_seconds(video: str, *_: Any) -> int:
    """For how long ZeroGPU is asked for its GPU, from what `compute_clip` is called with."""
    return min(300, 30 + probe_video(video).num_frames // 8)


@GPU(duration=clip_seconds)
def compute_clip(video: str, target: str, options: Options, smoothing: float) -> Iterator[tuple[int, int]]:
    """Writes the result for one video; yields frames done and their number. Like `compute`, it raises gr.Error alone."""
    try:
        with memory_explained():
            yield from iterate_video(
                video,
                target,
                MODELS.get(options.model),
                background=options.background,
                refine=options.refine,
                mask_only=options.mask_only,
                smoothing=smoothing,
                size=options.size,
                threshold=options.threshold,
                max_seconds=MAX_SECONDS,
                max_pixels=MAX_FRAME_PIXELS,
            )
    except (VideoError, ValueError) as error:
        raise gr.Error(str(error)) from error


def cut_out_clip(
    video: str | None,
    video_format: str = "WebM, transparent",
    smoothing: float = 0.0,
    model: str = DEFAULT_MODEL,
    size: str = OWN_SIZE,
    refine: bool = True,
    background: str = "Transparent",
    colour: str = "#ffffff",
    background_image: str | None = None,
    mask_only: bool = False,
    threshold: float = 0.0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 Gradio finds it by this default
) -> Iterator[tuple[Any, Any, str]]:
    """Removes or replaces the background of a video; its sound is kept.

    Args:
        video: The video, a file.
        video_format: "WebM, transparent", "ProRes 4444, transparent" or "MP4, on a background".
        smoothing: Share of the frames before in each mask, 0 to 0.9; calms flicker.
        model: One of the models on offer.
        size: Side in pixels at which the network sees frames, "Model's own", or "As the photo, up to 2304".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the result is the mask itself, in grey.
        threshold: 0 keeps edges soft; above, masks are split at this value.

    Returns:
        The video to look at (none for ProRes, which browsers do not play), the file, and a notice, mostly empty. Before,
        how far it is: Gradio stops asking for more where the visitor has left, so that others need not wait.
    """
    if not video:
        raise gr.Error("Choose a video first.")
    if video_format not in VIDEO_FORMATS:
        raise gr.Error(f"The format is one of {list(VIDEO_FORMATS)}.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    suffix = VIDEO_FORMATS[video_format]
    if suffix == ".mp4" and options.background is None and not mask_only:
        raise gr.Error("MP4 has no transparency: choose a background under Options, or WebM.")
    check_file_size(video)
    try:
        probe_video(video, max_seconds=MAX_SECONDS, max_pixels=MAX_FRAME_PIXELS)
    except VideoError as error:
        raise gr.Error(str(error)) from error
    name, notice = prepare_model(options.model, progress)
    target = request_folder() / f"{shown_stem(video)}_cutout{suffix}"
    give_up = time.monotonic() + 60 * MAX_MINUTES
    for done, total in compute_clip(video, str(target), replace(options, model=name), smoothing):
        if time.monotonic() > give_up:
            raise gr.Error(
                f"After {MAX_MINUTES:g} minutes {done} of {total or 'its'} frames are done, and others wait: cut the video, or "
                "choose a smaller one."
            )
        yield gr.skip(), gr.skip(), f"{done} of {total} frames…" if total else f"{done} frames…"
    yield (None if suffix == ".mov" else str(target)), str(target), notice


CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important; }
.result-file:has(.empty), .notice:not(:has(p)) { display: none; }
#gallery .grid-wrap { min-height: 0; max-height: 75vh; }
.checkered { --light: #ffffff; --shade: #d4d4d8; }
.dark .checkered { --light: #52525b; --shade: #3f3f46; }
.checkered img, .checkered video {
    background: repeating-conic-gradient(var(--shade) 0% 25%, var(--light) 0% 50%) 0 0 / 20px 20px !important;
}
label:hover > input[type=radio]:checked { background-color: var(--checkbox-background-color-selected) !important; }
input:is([type=radio], [type=checkbox], [type=range]):focus-visible {
    outline: 2px solid var(--color-accent) !important;
    outline-offset: 2px;
}
input[type=range]::-webkit-slider-thumb { border: 3px solid var(--color-accent); }
input[type=range]::-moz-range-thumb { border: 3px solid var(--color-accent); }
input[role=combobox] { padding-right: 1.5em !important; text-overflow: ellipsis; }
"""
# What came of a click is in sight, also on a phone, where it lies below the controls.
SHOW_RESULT = """(...inputs) => {{
    document.getElementById("{}").scrollIntoView({{behavior: "smooth", block: "center"}});
    return inputs;
}}"""
# Gradio may end a run that was stopped with an error that says nothing, also later than the click is answered.
CLEAR_ERROR = """() => {{
    const end = Date.now() + 15000;
    const timer = setInterval(() => {{
        const error = document.querySelector("#{} .error");
        error?.parentElement.querySelector("button")?.click();
        if (error || Date.now() > end) clearInterval(timer);
    }}, 100);
}}"""
# A photo is pasted wherever the cursor is: the field itself listens to nothing. Another photo may lie in it.
# Example pictures get names for those who do not see them.
SCRIPT = """() => {
    const name = (button) => {
        const picture = button.querySelector("img, video");
        if (!picture?.src) return;
        button.setAttribute("aria-label", "Example: " + picture.src.split("/").pop().split(".")[0]);
        picture.setAttribute("alt", "");  // the button has the name
    };
    const nameAll = () => document.querySelectorAll(".gallery-item:not([aria-label])").forEach(name);
    new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true });
    nameAll();
    document.addEventListener("paste", async (event) => {
        const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
        const field = document.querySelector("#photo");
        if (!picture || !field?.offsetParent) return;
        event.preventDefault();
        for (let tries = 0; tries < 20; tries++) {
            const input = field.querySelector("input[type=file]");
            if (input) {
                const transfer = new DataTransfer();
                transfer.items.add(picture);
                input.files = transfer.files;
                return input.dispatchEvent(new Event("change", { bubbles: true }));
            }
            (field.querySelector("button[aria-label='Remove Image']") ?? field.querySelector("button[aria-label='Upload file']"))?.click();
            await new Promise((done) => setTimeout(done, 100));
        }
    });
}"""
# What Markdown would take for its own in the name of a file.
MARKDOWN = re.compile(r"[\\`*_\[\]<>#&~|]")
# Fonts of the visitor's own machine: nothing is fetched from elsewhere, and all letters come from one font.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
    input_placeholder_color="*neutral_500",
)


def option_controls() -> list[gr.components.Component]:
    """The controls that nobody needs to touch, in one accordion; in the order that `read_options` takes."""
    with gr.Accordion("Options", open=False):
        model = gr.Dropdown(model_choices(), value=DEFAULT_MODEL, label="Model", filterable=False)
        background = gr.Radio(BACKGROUNDS, value="Transparent", label="Background")
        colour = gr.ColorPicker("#ffffff", label="Background colour", visible=False)
        picture = Photo(type="filepath", format="png", label="Background image", visible=False, height=160)
        refine = gr.Checkbox(True, label="Refine foreground", info="Takes the old background out of soft edges.")
        mask_only = gr.Checkbox(False, label="Mask only")
        size = gr.Dropdown(
            SIZES,
            value=OWN_SIZE,
            label="Input size",
            filterable=False,
            info="In pixels. Best is the model's own; far from it, parts go missing.",
        )
        threshold = gr.Slider(0, 1, 0, step=0.05, label="Threshold", info="0 keeps edges soft.")
    background.change(
        lambda kind: (gr.update(visible=kind == "Colour"), gr.update(visible=kind == "Image")),
        background,
        [colour, picture],
        queue=False,
        api_visibility="private",
    )
    return [model, size, refine, background, colour, picture, mask_only, threshold]


def run_settings(result: gr.components.Component) -> dict[str, Any]:
    """Of every event that runs a model: one at a time for all tabs, and its result is shown."""
    return {
        "concurrency_limit": 1,
        "concurrency_id": "model",
        "show_progress_on": result,
        "js": SHOW_RESULT.format(result.elem_id),
    }


def image_tab() -> None:
    with gr.Row():
        with gr.Column():
            photo = Photo(
                type="filepath",
                format="png",
                label="Photo",
                placeholder="# Drop a photo here\nor click to choose one, or paste one",
                sources=["upload", "clipboard"],
                height=320,
                elem_id="photo",
            )
            examples = gr.Examples(EXAMPLE_PHOTOS, photo, label="or try one of these")
            url = gr.Textbox(
                "", label="or its address on the web", placeholder="https://…", max_lines=1, elem_id="url"
            )
            start = gr.Button("Remove background", variant="primary", elem_id="start-image")
            controls = option_controls()
        with gr.Column():
            slider = gr.ImageSlider(
                type="filepath", format="png", label="Before and after", elem_classes="checkered", elem_id="slider"
            )
            notice = gr.Markdown(label="Notice", elem_classes="notice", elem_id="image-notice")
            download = gr.File(label="Download PNG", elem_id="image-file", elem_classes="result-file")
            with gr.Accordion("Mask", open=False):
                mask = gr.Image(type="filepath", format="png", label="Alpha", image_mode="L", elem_id="mask")
    inputs, outputs = [photo, url, *controls], [slider, download, mask, notice]
    shared = run_settings(slider)
    # Should it fail, the results of another photo do not stay beside it.
    for event in (photo.upload, url.submit, examples.load_input_event.then):
        event(None, None, outputs, js="() => [null, null, null, '']", api_visibility="private")
    gr.on(
        [start.click, photo.upload, url.submit],
        cut_out_image,
        inputs,
        outputs,
        api_name="cut_out",
        trigger_mode="always_last",  # another photo while one is in work is not lost
        **shared,
    )
    examples.load_input_event.then(
        cut_out_image, inputs, outputs, api_visibility="private", trigger_mode="always_last", **shared
    )
    # A photo and an address never stand there together, or it would not be clear which one is meant.
    # `change`, since Gradio's `input` misses the first event, and so an address that is pasted.
    url.change(None, [url, photo], photo, js="(url, photo) => url ? null : photo", api_visibility="private")
    for event in (photo.upload, examples.load_input_event.then):
        event(None, None, url, js="() => ''", api_visibility="private")


def batch_tab() -> None:
    with gr.Row():
        with gr.Column():
            files = Files(file_count="multiple", type="filepath", label="Photos", elem_id="batch-input", height=200)
            examples = gr.Examples([[EXAMPLE_PHOTOS]], files, label="or try these")
            with gr.Row():
                start = gr.Button("Remove backgrounds", variant="primary", elem_id="start-batch")
                stop = gr.Button("Stop", elem_id="stop-batch")
            controls = option_controls()
        with gr.Column():
            gallery = gr.Gallery(
                label="Results",
                type="filepath",
                format="png",
                columns=2,
                object_fit="contain",
                elem_classes="checkered",
                elem_id="gallery",
                interactive=False,
            )
            report = gr.Markdown(label="Report", elem_classes="notice", elem_id="batch-report")
            archive = gr.File(label="Download ZIP", elem_id="batch-file", elem_classes="result-file")
    inputs, outputs = [files, *controls], [gallery, archive, report]
    shared = run_settings(gallery)
    runs = [
        start.click(cut_out_batch, inputs, outputs, api_name="cut_out_batch", **shared),
        examples.load_input_event.then(cut_out_batch, inputs, outputs, api_visibility="private", **shared),
    ]
    stopped = stop.click(stop_batch, gallery, [archive, report], cancels=runs, queue=False, api_visibility="private")
    stopped.then(None, None, None, js=CLEAR_ERROR.format(gallery.elem_id), api_visibility="private")


def video_tab() -> None:
    with gr.Row():
        with gr.Column():
            video = gr.Video(
                label=f"Video, up to {MAX_SECONDS:g} seconds", sources=["upload"], height=320, elem_id="video"
            )
            examples = gr.Examples([EXAMPLE_VIDEO], video, label="or try this one")
            video_format = gr.Dropdown(
                list(VIDEO_FORMATS), value="WebM, transparent", label="Format", filterable=False
            )
            with gr.Row():
                start = gr.Button("Remove background", variant="primary", elem_id="start-video")
                stop = gr.Button("Stop", elem_id="stop-video")
            smoothing = gr.Slider(0, 0.9, 0, step=0.1, label="Smoothing over time", info="Calms flicker.")
            controls = option_controls()
        with gr.Column():
            result = gr.Video(label="Result", elem_classes="checkered", interactive=False, elem_id="video-result")
            notice = gr.Markdown(label="Notice", elem_classes="notice", elem_id="video-notice")
            download = gr.File(label="Download", elem_id="video-file", elem_classes="result-file")
    inputs, outputs = [video, video_format, smoothing, *controls], [result, download, notice]
    shared = run_settings(result)
    runs = [
        start.click(cut_out_clip, inputs, outputs, api_name="cut_out_video", **shared),
        examples.load_input_event.then(cut_out_clip, inputs, outputs, api_visibility="private", **shared),
    ]
    stopped = stop.click(lambda: "Stopped.", None, notice, cancels=runs, queue=False, api_visibility="private")
    stopped.then(None, None, None, js=CLEAR_ERROR.format(result.elem_id), api_visibility="private")


def build_app() -> gr.Blocks:
    """The page and its endpoints; uploads and results are deleted after a while, and at the end."""
    with gr.Blocks(title="BiRefNet", delete_cache=(max(1, KEEP_SECONDS // 2), KEEP_SECONDS)) as app:
        gr.Markdown("# Remove backgrounds with BiRefNet\nDrop a photo, get a cut-out with soft edges.")
        with gr.Tab("Image"):
            image_tab()
        with gr.Tab("Batch"):
            batch_tab()
        with gr.Tab("Video"):
            video_tab()
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def find_files_in_lists() -> None:
    """Lets MCP tools take lists of files: Gradio looks for them where the schema has them, under "items"."""
    from gradio.mcp import GradioMCPServer  # not without the package mcp

    simplify = GradioMCPServer.simplify_filedata_schema

    def simplify_with_lists(server: GradioMCPServer, schema: dict[str, Any]) -> tuple[dict[str, Any], list[list]]:
        simplified, positions = simplify(server, schema)
        lists = [position[:-1] for position in positions if position[-1] == "items"]
        return simplified, positions + [[*place, index] for place in lists for index in range(MAX_FILES)]

    GradioMCPServer.simplify_filedata_schema = simplify_with_lists


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Serves the page with its limits and looks; `options` go to Gradio's `launch`, whose answer it returns."""
    if os.environ.get("SPACES_ZERO_GPU"):
        MODELS.prepare(DEFAULT_MODEL)  # what is on the GPU before the start, ZeroGPU moves there fastest
    settings = {
        "css": CSS,
        "js": SCRIPT,
        "theme": THEME,
        "max_file_size": MAX_FILE_BYTES,
        "i18n": gr.I18n(**{"en": {"common.complete": "Complete", "common.upload": "Upload"}}),
        "mcp_server": os.environ.get("BIREFNET_MCP") == "1",
        **options,
    }
    gr.processing_utils.async_ssrf_protected_download = download
    if settings["mcp_server"]:
        find_files_in_lists()
    threading.Thread(target=sweep_forever, daemon=True).start()
    return app.launch(**settings)


def end(*_: Any) -> None:
    """Removes the files of visitors and ends at once: what still computes cannot be waited for."""
    shutil.rmtree(WORK, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    launch(build_app())
