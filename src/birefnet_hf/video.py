"""Cuts the foreground out of videos, frame by frame: what is held in memory does not grow with the length.

Needs PyAV (`pip install av`).
"""

import contextlib
import functools
import logging
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from .foreground import parse_background
from .pipeline_birefnet import render_picture


if TYPE_CHECKING:
    import av

    from .pipeline_birefnet import BackgroundRemovalPipeline

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# Mean change of alpha from which on the next frame counts as another scene, which smoothing must not mix.
SCENE_CHANGE = 0.15
# More frames per second than any camera's, for a video with a limit on its length: times in a file may be wrong.
MAX_RATE = 240
# Colour matrices, the range of 16 to 235, and the curves of high dynamic range by their numbers in FFmpeg.
_BT709, _UNSPECIFIED, _BT601, _BT2020 = 1, 2, 5, 9
_LIMITED = 1
_PQ, _HLG = 16, 18
# High dynamic range: what counts as white (cd/m², ITU-R BT.2408), HLG's nominal peak, and the share of white from which on
# light is compressed, so that what is brighter than white differs, too.
WHITE_NITS, HLG_PEAK_NITS, KNEE = 203.0, 1000.0, 0.75
_LUMINANCE_BT2020 = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
# What is read. FFmpeg also knows playlists, which name other files, and takes a text for a picture of its letters.
_CONTAINERS = "3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg,yuv4mpegpipe"


@dataclass(frozen=True)
class _Encoding:
    """How one output format is written: codecs, pixel format and encoder options."""

    video_codec: str
    audio_codec: str
    pixel_format: str
    options: dict[str, str]
    has_alpha: bool


# auto-alt-ref: libvpx refuses its hidden frames in videos with alpha.
_VP9 = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "5", "row-mt": "1", "auto-alt-ref": "0"}
_ENCODINGS: dict[str, _Encoding] = {
    "webm": _Encoding("libvpx-vp9", "libopus", "yuva420p", _VP9, has_alpha=True),
    "mov": _Encoding("prores_ks", "aac", "yuva444p10le", {"profile": "4444", "alpha_bits": "16"}, has_alpha=True),
    # bf: with frames that refer forward, the header's length leaves out the last ones of a variable rate.
    "mp4": _Encoding("libx264", "aac", "yuv420p", {"crf": "18", "preset": "fast", "bf": "0"}, has_alpha=False),
}


class VideoError(ValueError):
    """A video cannot be read or is beyond a limit; the message says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says.

    Attributes:
        width, height: Pixels, as stored (before rotation).
        seconds: Duration; None where the file does not say.
        num_frames: Estimated number of frames; 0 where the file does not say.
        has_audio: Whether there is a sound track.
    """

    width: int
    height: int
    seconds: float | None
    num_frames: int
    has_audio: bool


def probe_video(
    source: str | os.PathLike[str], *, max_seconds: float | None = None, max_pixels: int | None = None
) -> VideoInfo:
    """Reads a video's header and checks it against limits.

    Args:
        source: Video file.
        max_seconds: Longest video that is accepted.
        max_pixels: Largest frame that is accepted, width × height.

    Raises:
        VideoError: the file is no video, or beyond a limit.
    """
    import av

    try:
        with _open(source) as container:
            if not container.streams.video:
                raise VideoError(f"{Path(source).name} holds no video.")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(f"{Path(source).name} is coded in a way that FFmpeg does not know.")
            seconds = None if container.duration is None else container.duration / av.time_base
            rate = float(stream.average_rate or 0)
            info = VideoInfo(
                stream.codec_context.width,
                stream.codec_context.height,
                seconds,
                stream.frames or round((seconds or 0) * rate),
                bool(container.streams.audio),
            )
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{Path(source).name} is no video that can be read: {error.strerror}.") from error
    if max_pixels is not None and info.width * info.height > max_pixels:
        raise VideoError(f"Frames of {info.width}×{info.height} pixels are more than the {max_pixels} allowed.")
    if max_seconds is not None and info.seconds is not None and info.seconds > max_seconds:
        raise VideoError(f"The video lasts {info.seconds:.0f} s, {max_seconds:g} s are allowed; cut it first.")
    return info


def cut_out_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    pipe: "BackgroundRemovalPipeline",
    *,
    background: Any = None,
    refine: bool = True,
    mask_only: bool = False,
    smoothing: float = 0.0,
    size: Any = None,
    threshold: float = 0.0,
    max_seconds: float | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Removes or replaces the background of a video. Sound is kept, as are the times of the frames.

    Args:
        source: Video file; no playlist.
        target: File to write, whole or not at all: .webm (VP9 with alpha), .mov (ProRes 4444 with alpha) or .mp4
            (H.264, no alpha: needs a background or `mask_only`). Pixels become square; an odd last row or column is cut;
            high dynamic range (HLG, PQ) becomes the ordinary one.
        pipe: What computes the masks, see `load_pipeline`.
        background: A colour or an image, as `parse_background` takes it; "blur" for the blurred frame; None for
            transparency.
        refine: Whether to estimate the foreground's colours, see `refine_foreground`.
        mask_only: Whether to write alpha itself, in grey.
        smoothing: Share of the frames before in each mask, in [0, 1); 0.5 calms flicker and lags a little. Starts
            anew where the scene changes.
        size: Input size of the network instead of its own.
        threshold: In [0, 1]: 0 keeps alpha soft; above, it is split at this value.
        max_seconds, max_pixels: Limits, see `probe_video`; the length is also checked while reading.
        progress: Called with the number of frames done and the estimated number of all (0: unknown) after each. What it
            raises ends the work.

    Returns:
        `target`.

    Raises:
        VideoError: the video cannot be read or is beyond a limit.
        OSError: `target` cannot be written.
        ValueError: arguments that contradict each other, or `target` is the source.
    """
    steps = iterate_video(
        source,
        target,
        pipe,
        background=background,
        refine=refine,
        mask_only=mask_only,
        smoothing=smoothing,
        size=size,
        threshold=threshold,
        max_seconds=max_seconds,
        max_pixels=max_pixels,
    )
    with contextlib.closing(steps):
        for done, total in steps:
            if progress is not None:
                progress(done, total)
    return Path(target)


def iterate_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    pipe: "BackgroundRemovalPipeline",
    *,
    background: Any = None,
    refine: bool = True,
    mask_only: bool = False,
    smoothing: float = 0.0,
    size: Any = None,
    threshold: float = 0.0,
    max_seconds: float | None = None,
    max_pixels: int | None = None,
) -> Iterator[tuple[int, int]]:
    """As `cut_out_video`, one frame each time that the iterator is asked for more.

    Closing the iterator, or dropping the last reference to it, ends the work; then there is no target.

    Yields:
        The number of frames done and the estimated number of all (0: unknown), after each frame and second of sound. The
        target is there after the last.
    """
    import av

    target = Path(target)
    encoding = _ENCODINGS.get(target.suffix.lower().removeprefix("."))
    if encoding is None:
        raise ValueError(f"{target.name}: videos are written as .webm, .mov or .mp4.")
    if background is None and not mask_only and not encoding.has_alpha:
        raise ValueError("MP4 has no transparency; choose a background, or .webm or .mov.")
    if background is not None:
        background = parse_background(background)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must lie in [0, 1).")
    info = probe_video(source, max_seconds=max_seconds, max_pixels=max_pixels)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target.name} is the video itself: choose another file for the result.")

    previous: np.ndarray | None = None

    def render(frame: Image.Image) -> Image.Image:
        nonlocal previous
        resize = {} if size is None else {"size": size}
        alpha = np.asarray(pipe(frame, output_type="mask", **resize), dtype=np.float32)  # (H, W) in [0, 255]
        if smoothing and previous is not None and previous.shape == alpha.shape:
            if np.abs(alpha - previous).mean() <= SCENE_CHANGE * 255:
                alpha = smoothing * previous + (1 - smoothing) * alpha
        previous = alpha
        picture = render_picture(
            frame,
            Image.fromarray(alpha.round().astype(np.uint8)),
            output_type="mask" if mask_only else None,
            background=background,
            refine_foreground=refine,
            threshold=threshold,
            device=getattr(pipe, "device", "cpu"),
        )
        return picture.convert("RGB") if mask_only else picture

    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        frame_size = _frame_size(source, max_pixels)
        with _open(source, max_pixels) as reader:
            with _writing(target), av.open(_file_url(temporary), "w") as writer:
                yield from _transcode(reader, writer, encoding, render, frame_size, info, max_seconds)
        os.replace(temporary, target)
    except _ReadError as error:
        raise VideoError(f"{Path(source).name} cannot be read to its end: {error}.") from error
    except av.error.FFmpegError as error:
        raise VideoError(f"{Path(source).name} cannot be read to its end: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


class _ReadError(Exception):
    """The source cannot be read on, while the target is being written."""


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Says of what FFmpeg cannot write which file that is."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise OSError(error.errno, f"the video cannot be written: {error.strerror}", str(target)) from error


def _transcode(
    reader: "av.container.InputContainer",
    writer: "av.container.OutputContainer",
    encoding: _Encoding,
    render: Callable[[Image.Image], Image.Image],
    frame_size: tuple[int, int],
    info: VideoInfo,
    max_seconds: float | None,
) -> Iterator[tuple[int, int]]:
    """Sends every frame through `render` and sound through its encoder, in the file's order. Yields what is done of all."""
    import av

    video = reader.streams.video[0]
    video.thread_type = "SLICE"  # with a thread for each frame, errors of the last ones get lost
    audio = reader.streams.audio[0] if reader.streams.audio else None
    if audio is not None and audio.codec_context is None:
        logger.warning("The sound is coded in a way that FFmpeg does not know: it is left out.")
        audio = None
    start = (reader.start_time or 0) / av.time_base
    time_base, rate = video.time_base, video.average_rate or 25
    sound = writer.add_stream(encoding.audio_codec, rate=48000, layout="stereo") if audio else None
    # Both streams are there before the first packet: it writes the file's header.
    picture = writer.add_stream(encoding.video_codec, rate=rate, options=encoding.options)
    picture.width, picture.height = frame_size
    picture.pix_fmt = encoding.pixel_format
    picture.codec_context.time_base = time_base
    # Without these, players guess the colours by the size.
    picture.codec_context.colorspace = picture.codec_context.color_primaries = _BT709
    picture.codec_context.color_trc, picture.codec_context.color_range = _BT709, _LIMITED
    step = max(1, round(1 / (rate * time_base)))  # between frames whose times the file does not say
    count, last_pts = 0, -step
    resampler, sound_form = None, None
    heard = told = 0.0  # seconds of sound

    def done_of_all() -> tuple[int, int]:
        return count, max(info.num_frames, count) if info.num_frames else 0

    def send_sound(frame: "av.AudioFrame | None") -> None:
        for resampled in resampler.resample(frame) if resampler is not None else ():
            writer.mux(sound.encode(resampled))

    for frame in _decode(reader, [video] if audio is None else [video, audio]):
        if isinstance(frame, av.AudioFrame):
            if frame.pts is not None:
                frame.pts -= round(start / frame.time_base)
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if form != sound_form:  # as it changes within recordings of broadcasts
                send_sound(None)  # what the one before still holds
                coder = sound.codec_context
                resampler, sound_form = av.AudioResampler(coder.format, coder.layout, coder.sample_rate), form
            send_sound(frame)
            heard += frame.samples / frame.sample_rate
            if max_seconds is not None and heard > max_seconds + 1:
                raise VideoError(f"The sound is longer than the {max_seconds:g} s allowed; cut it first.")
            if heard >= told + 1:  # so that who waits can give up
                told = heard
                yield done_of_all()
            continue
        pts = last_pts + step if frame.pts is None else frame.pts - round(start / time_base)
        pts = max(pts, last_pts + 1, 0)  # encoders want times that grow
        if max_seconds is not None and (pts * time_base > max_seconds or count >= max_seconds * MAX_RATE):
            raise VideoError(f"The video is longer than the {max_seconds:g} s allowed; cut it first.")
        image = _upright(frame, video.sample_aspect_ratio)
        if image.size != frame_size:
            raise VideoError("The size of the frames changes within the video, which is not supported.")
        rendered = render(image)
        # Not `from_image`, which drops alpha.
        layout = "rgba" if rendered.mode == "RGBA" else "rgb24"
        encoded = av.VideoFrame.from_ndarray(np.asarray(rendered), format=layout)
        encoded = encoded.reformat(format=encoding.pixel_format, dst_colorspace=_BT709)
        encoded.color_primaries = encoded.color_trc = _BT709  # ProRes takes them from here
        encoded.pts, encoded.time_base = pts, time_base
        if frame.duration:
            encoded.duration = frame.duration
        writer.mux(picture.encode(encoded))
        count, last_pts = count + 1, pts
        yield done_of_all()
    if count:
        writer.mux(picture.encode(None))
        if sound is not None:
            send_sound(None)
            writer.mux(sound.encode(None))


def _file_url(path: str | os.PathLike[str]) -> str:
    """The path as FFmpeg takes it for a file: what comes before a colon would be a protocol to fetch with."""
    return f"file:{os.path.abspath(path)}"


def _open(source: str | os.PathLike[str], max_pixels: int | None = None) -> "av.container.InputContainer":
    """Opens a video so that frames far above `max_pixels`, of which its header says nothing, are not even decoded."""
    import av

    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    # Cameras write names in all kinds of encodings.
    container = av.open(_file_url(source), options=options, metadata_errors="replace")
    for stream in container.streams.video:
        if max_pixels is not None and stream.codec_context is not None:
            # Decoders count rows and columns that are cut off later.
            stream.codec_context.options = {"max_pixels": str(2 * max_pixels)}
    return container


def _frame_size(source: str | os.PathLike[str], max_pixels: int | None) -> tuple[int, int]:
    """Width and height of the first frame, upright; VideoError where there is none."""
    with _open(source, max_pixels) as reader:
        for frame in reader.decode(video=0):
            return _upright(frame, reader.streams.video[0].sample_aspect_ratio).size
    raise VideoError(f"{Path(source).name} holds no frame that can be read.")


def _decode(reader: "av.container.InputContainer", streams: list[Any]) -> Iterator["av.VideoFrame | av.AudioFrame"]:
    import av

    try:
        for packet in reader.demux(streams):
            yield from packet.decode()
    except av.error.FFmpegError as error:
        raise _ReadError(error.strerror) from error


def _upright(frame: "av.VideoFrame", pixel_ratio: Fraction | None) -> Image.Image:
    """The frame as RGB, as its display matrix says (phones), with even sides for chroma subsampling.

    High dynamic range becomes the ordinary one, and pixels that are not square (of width / height `pixel_ratio`) become
    so: that is how the network knows things.
    """
    matrix = frame.colorspace
    if matrix == _UNSPECIFIED:
        matrix = _BT709 if frame.height >= 720 else _BT601  # as players guess
    image = _tone_map(frame) if frame.color_trc in (_PQ, _HLG) else frame.to_image(src_colorspace=matrix)
    if pixel_ratio and pixel_ratio != 1:
        width, height = image.size
        size = (round(width * pixel_ratio), height) if pixel_ratio > 1 else (width, round(height / pixel_ratio))
        image = image.resize(size, Image.Resampling.BICUBIC)
    is_mirrored, rotation = _orientation(frame)
    if is_mirrored:
        image = ImageOps.mirror(image)
    if rotation:
        image = image.rotate(rotation, expand=True)
    return image.crop((0, 0, max(2, image.width // 2 * 2), max(2, image.height // 2 * 2)))


def _tone_map(frame: "av.VideoFrame") -> Image.Image:
    """A frame of high dynamic range (PQ of SMPTE ST 2084 or HLG of ITU-R BT.2100) as sRGB."""
    matrix = _BT2020 if frame.colorspace == _UNSPECIFIED else frame.colorspace
    codes = frame.reformat(format="rgb48le", src_colorspace=matrix).to_ndarray()  # (H, W, 3) uint16
    to_light, to_code = _light_of_codes(frame.color_trc), _codes_of_light()
    pixels = np.empty(codes.shape, dtype=np.uint8)
    for start in range(0, len(codes), 64):  # stays in the cache
        light = to_light[codes[start : start + 64]]  # 1 is white
        if frame.color_trc == _HLG:  # the scene's light, which screens show with more contrast
            light *= (light @ _LUMINANCE_BT2020)[..., None] ** 0.2 * (HLG_PEAK_NITS / WHITE_NITS)
        if frame.color_primaries != _BT709:
            light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
        brightest = light.max(axis=2, keepdims=True)
        beyond = np.maximum(brightest - KNEE, 0) / (1 - KNEE)
        rolled = np.minimum(brightest, KNEE) + (1 - KNEE) * (1 - np.exp(-beyond))
        light *= rolled / np.maximum(brightest, 1e-6)
        pixels[start : start + 64] = to_code[(light * 65535).astype(np.uint16)]
    return Image.fromarray(pixels)


@functools.cache
def _light_of_codes(curve: int) -> np.ndarray:
    """Light of each 16-bit code, float32: of PQ on the screen, 1 for white; of HLG in the scene, 1 for its peak."""
    code = np.linspace(0, 1, 65536)
    if curve == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = code ** (1 / m2)
    return (10000 / WHITE_NITS * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)).astype(np.float32)


@functools.cache
def _codes_of_light() -> np.ndarray:
    """8-bit sRGB of light in 65536 steps."""
    light = np.linspace(0, 1, 65536)
    codes = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * codes).astype(np.uint8)


def _orientation(frame: "av.VideoFrame") -> tuple[bool, int]:
    """Whether the frame is to be mirrored left to right, and then by how many degrees it is to be turned anticlockwise."""
    from av.sidedata.sidedata import Type

    stored = frame.side_data.get(Type.DISPLAYMATRIX)
    if stored is None:
        return False, 0
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(stored))  # x' = ax + cy, y' = bx + dy
    is_mirrored = a * d - b * c < 0
    if is_mirrored:
        a, b = -a, -b
    return is_mirrored, -round(math.degrees(math.atan2(b, a)))


__all__ = ["VideoError", "VideoInfo", "cut_out_video", "iterate_video", "probe_video"]
