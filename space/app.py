"""BiRefNet in a browser: cut-outs of photos, of many files, and of videos. Run it with `python space/app.py`.

A thin client of `birefnet_hf`. Environment variables, all optional:

- BIREFNET_MODEL: model that is chosen at first (alias, Hub id or directory), default "nano".
- BIREFNET_MODELS: the models to choose from, separated by commas; default: all known ones.
- BIREFNET_CACHED_MODELS: how many stay in memory, default 2.
- BIREFNET_MAX_PIXELS, BIREFNET_MAX_FILE_MB, BIREFNET_MAX_FILES, BIREFNET_MAX_SECONDS: limits for photos and videos.
- BIREFNET_MCP=1: serve the endpoints as tools of the Model Context Protocol, too (needs gradio[mcp]).
"""

import atexit
import gc
import logging
import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from birefnet_hf import BackgroundRemovalPipeline, load_pipeline
from birefnet_hf.checkpoints_birefnet import CHECKPOINTS
from birefnet_hf.foreground import parse_background
from birefnet_hf.image_loading import load_image, save_image
from birefnet_hf.video import VideoError, apply_threshold, cut_out_video, render_picture


try:
    from spaces import GPU
except ImportError:  # not on ZeroGPU

    def GPU(function: Callable | None = None, **_: Any) -> Callable:
        return function if function is not None else lambda decorated: decorated


logger = logging.getLogger(__name__)

FALLBACK_MODEL = "nano"
DEFAULT_MODEL = os.environ.get("BIREFNET_MODEL", FALLBACK_MODEL)
MAX_PIXELS = int(os.environ.get("BIREFNET_MAX_PIXELS", 50_000_000))
MAX_FILE_MB = int(os.environ.get("BIREFNET_MAX_FILE_MB", 100))
MAX_FILES = int(os.environ.get("BIREFNET_MAX_FILES", 50))
MAX_SECONDS = float(os.environ.get("BIREFNET_MAX_SECONDS", 60))
MAX_FRAME_PIXELS = 4096 * 2304
URL_TIMEOUT = 20.0
KEEP_SECONDS = 3600

OWN_SIZE = "Model's own"
SIZES = [OWN_SIZE, "512", "1024", "1536", "2048"]
BACKGROUNDS = ["Transparent", "Colour", "Image", "Blur"]
VIDEO_FORMATS = {
    "WebM, transparent": ".webm",
    "ProRes 4444, transparent": ".mov",
    "MP4, on a background": ".mp4",
}
EXAMPLES = Path(__file__).parent / "examples"
WORK = Path(tempfile.mkdtemp(prefix="birefnet-space-"))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)


@dataclass(frozen=True)
class Options:
    """What the controls say."""

    model: str
    size: int | None
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

    def get(self, name: str) -> tuple[BackgroundRemovalPipeline, str]:
        """The pipeline of that model and a notice: empty, or that another model stands in for it."""
        try:
            return self._get(name), ""
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            logger.warning("Cannot load %s: %s", name, error)
            if name == FALLBACK_MODEL:
                raise gr.Error(f"The model {name} cannot be loaded.") from error
        try:
            pipe = self._get(FALLBACK_MODEL)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            logger.warning("Cannot load %s: %s", FALLBACK_MODEL, error)
            raise gr.Error(f"Neither {name} nor the small model {FALLBACK_MODEL} can be loaded.") from error
        notice = f"{name} cannot be fetched now; the small model {FALLBACK_MODEL} was used instead. Edges are coarser."
        return pipe, notice

    def _get(self, name: str) -> BackgroundRemovalPipeline:
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


MODELS = ModelCache(int(os.environ.get("BIREFNET_CACHED_MODELS", 2)))


class Photo(gr.Image):
    """An image input that hands over the file as it came: reading it, limits included, is the package's work."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


def model_choices() -> list[tuple[str, str]]:
    """Label and name of every model on offer, the default first."""
    labels = {FALLBACK_MODEL: "nano · small and quick, works offline"}
    for item in CHECKPOINTS:
        if item.alias:
            licence = "" if item.licence == "MIT" else f" ({item.licence})"
            labels.setdefault(item.alias, f"{item.alias} · {item.purpose}{licence}")
    listed = [name.strip() for name in os.environ.get("BIREFNET_MODELS", "").split(",") if name.strip()]
    names = dict.fromkeys([DEFAULT_MODEL, *(listed or labels)])
    return [(labels.get(name, Path(name).name), name) for name in names]


def request_folder() -> Path:
    """A folder of this request's own; those of an hour ago are removed."""
    for folder in WORK.iterdir():
        if time.time() - folder.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=WORK))


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
    try:
        if background == "Colour":
            backdrop = parse_background(_hex(colour))
        elif background == "Image":
            if not background_image:
                raise gr.Error("Choose a background image, or another background.")
            # Read here and not by its name: what a program sends is never taken for a colour or an address.
            backdrop = parse_background(load_image(background_image, max_pixels=MAX_PIXELS))
        else:
            backdrop = "blur" if background == "Blur" else None
    except ValueError as error:
        raise gr.Error(f"Background: {_message(error)}") from error
    number = None if size == OWN_SIZE else int(size)
    return Options(model, number, refine, backdrop, mask_only, threshold)


def _hex(colour: str) -> str | tuple[int, int, int]:
    """The colour picker says "rgba(12.3, 45.6, 78.9, 1)" after a click into it; PIL wants whole numbers."""
    if colour.startswith("rgba("):
        red, green, blue = (min(255, round(float(part))) for part in colour[5:-1].split(",")[:3])
        return (red, green, blue)
    if os.path.exists(colour):
        raise ValueError(f"{colour} is no colour.")
    return colour


def _message(error: Exception) -> str:
    """An error's text without the folders of this machine."""
    text = str(error)
    for folder in (str(WORK), os.environ.get("GRADIO_TEMP_DIR", ""), tempfile.gettempdir()):
        if folder and folder in text:
            words = [Path(word).name if word.startswith(folder) else word for word in text.split(" ")]
            text = " ".join(words)
    return text


@GPU
def process(source: str, options: Options) -> tuple[Image.Image, Image.Image, Image.Image, str]:
    """One photo, path or URL: the photo, its result, its mask and a notice about the model."""
    if not source.startswith(("http://", "https://")):
        if os.path.getsize(source) > MAX_FILE_MB * 2**20:
            raise ValueError(f"{Path(source).name} is larger than the {MAX_FILE_MB} MB allowed.")
    image = load_image(source, timeout=URL_TIMEOUT, max_pixels=MAX_PIXELS)
    pipe, notice = MODELS.get(options.model)
    resize = {} if options.size is None else {"size": options.size}
    try:
        mask = apply_threshold(pipe(image, output_type="mask", **resize), options.threshold)
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocators raise RuntimeErrors of their own for each device; any other error is a fault to be seen.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ValueError("There is not enough memory at this input size: choose a smaller one.") from error
    result = mask if options.mask_only else render_picture(image, mask, options.background, options.refine)
    return image, result, mask, notice


def cut_out_image(
    image: str | None,
    url: str = "",
    model: str = DEFAULT_MODEL,
    size: str = OWN_SIZE,
    refine: bool = True,
    background: str = "Transparent",
    colour: str = "#ffffff",
    background_image: str | None = None,
    mask_only: bool = False,
    threshold: float = 0.0,
) -> tuple[tuple[Image.Image, Image.Image], str, Image.Image, str]:
    """Removes or replaces the background of a photo.

    Args:
        image: The photo, a file.
        url: Address of a photo on the web, instead of a file.
        model: One of the models on offer.
        size: Side in pixels at which the network sees the photo, or "Model's own".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the result is the mask itself, in grey.
        threshold: 0 keeps edges soft; above, the mask is split at this value.

    Returns:
        Before and after; the result as a PNG file; the mask; a notice, mostly empty.
    """
    source = image or (url or "").strip()
    if not source:
        raise gr.Error("Choose a photo first, or paste its address.")
    if not image and not source.startswith(("http://", "https://")):
        raise gr.Error("An address starts with http:// or https://.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    try:
        photo, result, mask, notice = process(source, options)
    except ValueError as error:
        raise gr.Error(_message(error)) from error
    stem = Path(image).stem if image else "photo"
    target = request_folder() / f"{stem}_cutout.png"
    save_image(result, target)
    if notice:
        gr.Warning(notice)
    return (photo, result), str(target), mask, notice


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
) -> tuple[list[tuple[str, str]], str | None, str]:
    """Removes or replaces the background of many photos. One that cannot be read does not stop the others.

    Args:
        files: The photos.
        model: One of the models on offer.
        size: Side in pixels at which the network sees the photos, or "Model's own".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the results are the masks themselves, in grey.
        threshold: 0 keeps edges soft; above, masks are split at this value.

    Returns:
        The results with their names; all of them as a ZIP of PNG files; a report that names every failure.
    """
    if not files:
        raise gr.Error("Choose some photos first.")
    if len(files) > MAX_FILES:
        raise gr.Error(f"{len(files)} files are more than the {MAX_FILES} allowed at a time.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    folder = request_folder()
    results, failures, notice = [], [], ""
    names = _unique_names(files)
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        progress((index, len(files)), desc=Path(file).name)
        try:
            _, result, _, notice = process(file, options)
            save_image(result, folder / name)
            results.append((str(folder / name), name))
        except ValueError as error:
            failures.append(f"- **{Path(file).name}**: {_message(error)}")
    archive = _zip(folder, [name for _, name in results]) if results else None
    report = "\n".join([f"{len(results)} done, {len(failures)} failed.", *failures, notice]).strip()
    return results, archive, report


def _unique_names(files: list[str]) -> list[str]:
    """A PNG name for each file; those of one stem are numbered."""
    counts: Counter[str] = Counter()
    names = []
    for file in files:
        stem = Path(file).stem
        counts[stem.casefold()] += 1
        number = counts[stem.casefold()]
        names.append(f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
    return names


def _zip(folder: Path, names: list[str]) -> str:
    archive = folder / "cutouts.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:  # PNG is compressed already
        for name in names:
            target.write(folder / name, name)
    return str(archive)


@GPU(duration=120)
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
) -> tuple[str | None, str, str]:
    """Removes or replaces the background of a video; its sound is kept.

    Args:
        video: The video, a file.
        video_format: "WebM, transparent", "ProRes 4444, transparent" or "MP4, on a background".
        smoothing: Share of the frames before in each mask, 0 to 0.9; calms flicker.
        model: One of the models on offer.
        size: Side in pixels at which the network sees frames, or "Model's own".
        refine: Whether to take the old background's colour out of soft edges.
        background: "Transparent", "Colour", "Image" or "Blur".
        colour: Colour of the background, such as "#ffffff".
        background_image: Image for the background, a file.
        mask_only: Whether the result is the mask itself, in grey.
        threshold: 0 keeps edges soft; above, masks are split at this value.

    Returns:
        The video to look at (none for ProRes, which browsers do not play); the file; a notice, mostly empty.
    """
    if not video:
        raise gr.Error("Choose a video first.")
    if video_format not in VIDEO_FORMATS:
        raise gr.Error(f"The format is one of {list(VIDEO_FORMATS)}.")
    options = read_options(model, size, refine, background, colour, background_image, mask_only, threshold)
    suffix = VIDEO_FORMATS[video_format]
    if suffix == ".mp4" and options.background is None and not mask_only:
        raise gr.Error("MP4 has no transparency: choose a background under Options, or WebM.")
    if os.path.getsize(video) > MAX_FILE_MB * 2**20:
        raise gr.Error(f"The video is larger than the {MAX_FILE_MB} MB allowed.")
    progress(0, desc=f"Loading {model}")
    pipe, notice = MODELS.get(options.model)
    target = request_folder() / f"{Path(video).stem}_cutout{suffix}"
    try:
        cut_out_video(
            video,
            target,
            pipe,
            background=options.background,
            refine=refine,
            mask_only=mask_only,
            smoothing=smoothing,
            size=options.size,
            threshold=threshold,
            max_seconds=MAX_SECONDS,
            max_pixels=MAX_FRAME_PIXELS,
            progress=lambda done, total: progress((done, total or None), unit="frames"),
        )
    except (VideoError, ValueError) as error:
        raise gr.Error(_message(error)) from error
    if notice:
        gr.Warning(notice)
    return (None if suffix == ".mov" else str(target)), str(target), notice


CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.checkered img, .checkered video { background: repeating-conic-gradient(#bbb8 0% 25%, #fff8 0% 50%) 0 0 / 20px 20px; }
"""


def option_controls() -> list[gr.components.Component]:
    """The controls that nobody needs to touch, in one accordion; in the order that `read_options` takes."""
    with gr.Accordion("Options", open=False):
        model = gr.Dropdown(model_choices(), value=DEFAULT_MODEL, label="Model")
        background = gr.Radio(BACKGROUNDS, value="Transparent", label="Background")
        colour = gr.ColorPicker("#ffffff", label="Background colour", visible=False)
        picture = Photo(type="filepath", format="png", label="Background image", visible=False, height=160)
        refine = gr.Checkbox(True, label="Refine foreground", info="Takes the old background out of soft edges.")
        mask_only = gr.Checkbox(False, label="Mask only")
        size = gr.Dropdown(SIZES, value=OWN_SIZE, label="Input size")
        threshold = gr.Slider(0, 1, 0, step=0.05, label="Threshold", info="0 keeps edges soft.")
    background.change(
        lambda kind: (gr.update(visible=kind == "Colour"), gr.update(visible=kind == "Image")),
        background,
        [colour, picture],
        queue=False,
        api_visibility="private",
    )
    return [model, size, refine, background, colour, picture, mask_only, threshold]


def image_tab() -> None:
    with gr.Row():
        with gr.Column():
            photo = Photo(type="filepath", format="png", label="Photo", sources=["upload", "clipboard"], height=320)
            url = gr.Textbox("", label="or its address", placeholder="https://…", max_lines=1)
            start = gr.Button("Remove background", variant="primary", elem_id="start-image")
            controls = option_controls()
        with gr.Column():
            slider = gr.ImageSlider(
                type="pil", format="png", label="Before and after", elem_classes="checkered", height=420
            )
            download = gr.File(label="Download PNG", elem_id="image-file")
            notice = gr.Markdown()
            with gr.Accordion("Mask", open=False):
                mask = gr.Image(type="pil", format="png", label="Alpha", image_mode="L")
    outputs = [slider, download, mask, notice]
    start.click(
        cut_out_image,
        [photo, url, *controls],
        outputs,
        api_name="cut_out",
        concurrency_limit=1,
        concurrency_id="model",
    )
    samples = sorted(str(path) for path in EXAMPLES.glob("*.png"))
    if samples:
        gr.Examples(
            samples, photo, outputs, cut_out_image, run_on_click=True, cache_examples=False, api_visibility="private"
        )


def batch_tab() -> None:
    with gr.Row():
        with gr.Column():
            files = gr.File(file_count="multiple", type="filepath", label="Photos", elem_id="batch-input")
            start = gr.Button("Remove backgrounds", variant="primary", elem_id="start-batch")
            controls = option_controls()
        with gr.Column():
            gallery = gr.Gallery(label="Results", format="png", elem_classes="checkered", columns=3)
            archive = gr.File(label="Download ZIP", elem_id="batch-file")
            report = gr.Markdown(elem_id="batch-report")
    start.click(
        cut_out_batch,
        [files, *controls],
        [gallery, archive, report],
        api_name="cut_out_batch",
        concurrency_limit=1,
        concurrency_id="model",
    )


def video_tab() -> None:
    with gr.Row():
        with gr.Column():
            video = gr.Video(label=f"Video, up to {MAX_SECONDS:g} seconds", sources=["upload"], height=320)
            video_format = gr.Dropdown(list(VIDEO_FORMATS), value="WebM, transparent", label="Result")
            start = gr.Button("Remove background", variant="primary", elem_id="start-video")
            smoothing = gr.Slider(0, 0.9, 0, step=0.1, label="Smoothing over time", info="Calms flicker.")
            controls = option_controls()
        with gr.Column():
            result = gr.Video(label="Result", elem_classes="checkered", interactive=False)
            download = gr.File(label="Download", elem_id="video-file")
            notice = gr.Markdown()
    start.click(
        cut_out_clip,
        [video, video_format, smoothing, *controls],
        [result, download, notice],
        api_name="cut_out_video",
        concurrency_limit=1,
        concurrency_id="model",
    )


def build_app() -> gr.Blocks:
    """The page and its endpoints; files of Gradio's cache are deleted after an hour."""
    with gr.Blocks(title="BiRefNet", delete_cache=(KEEP_SECONDS // 2, KEEP_SECONDS)) as app:
        gr.Markdown("# Remove backgrounds with BiRefNet\nDrop a photo, get a cut-out with soft edges.")
        with gr.Tab("Image"):
            image_tab()
        with gr.Tab("Batch"):
            batch_tab()
        with gr.Tab("Video"):
            video_tab()
    return app.queue(max_size=32, default_concurrency_limit=1)


def launch(**options: Any) -> Any:
    """Serves the page; `options` go to Gradio's `launch`."""
    return build_app().launch(
        css=CSS,
        max_file_size=MAX_FILE_MB * 2**20,
        mcp_server=os.environ.get("BIREFNET_MCP") == "1",
        **options,
    )


if __name__ == "__main__":
    launch()
