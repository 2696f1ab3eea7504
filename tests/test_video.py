"""Videos are cut out frame by frame, with their alpha, sound and times."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet_hf import load_pipeline


av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from birefnet_hf.video import VideoError, cut_out_video, probe_video  # noqa: E402


def write_video(path: Path, num_frames: int = 6, size: tuple[int, int] = (64, 48), sound: bool = False) -> Path:
    """A bright square that moves over a dark ground at 10 frames per second; its sound is a tone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = container.add_stream("aac", rate=48000, layout="mono") if sound else None
        for index in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 20, np.uint8)
            pixels[10:30, 5 + index % 20 : 25 + index % 20] = 230
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            tone = np.sin(np.arange(4800 * num_frames) * 0.05, dtype=np.float32)[None] * 0.5
            frame = av.AudioFrame.from_ndarray(tone.astype(np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def brightness_mask(image: Image.Image, **_) -> Image.Image:
    """Stands in for a network with a mask that is known: soft, equal to the brightness."""
    return image.convert("L")


def read_alpha(path: Path) -> list[np.ndarray]:
    """Alpha of all frames, H×W in [0, 1]. FFmpeg's own VP9 decoder drops it, libvpx's does not."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.codec_context.name.startswith("vp9") or stream.codec_context.name == "libvpx-vp9":
            decoder = av.CodecContext.create("libvpx-vp9", "r")
            packets = list(container.demux(stream))
            frames = [frame for packet in packets if packet.size for frame in decoder.decode(packet)]
        else:
            frames = list(container.decode(stream))
    return [frame.reformat(format="rgba").to_ndarray()[:, :, 3] / 255 for frame in frames]


@pytest.mark.parametrize("suffix", [".webm", ".mov"])
def test_alpha_of_a_cut_out_is_the_soft_mask(tmp_path, suffix):
    source = write_video(tmp_path / "in.mp4")
    target = cut_out_video(source, tmp_path / f"out{suffix}", brightness_mask)
    alphas = read_alpha(target)
    assert len(alphas) == 6
    # Inside the square 230/255, outside 20/255: neither 0 nor 1, so a hard mask would fail.
    assert abs(alphas[0][20, 15] - 230 / 255) < 0.05
    assert abs(alphas[0][40, 60] - 20 / 255) < 0.05


def test_mp4_shows_the_new_background_and_keeps_sound_and_length(tmp_path):
    source = write_video(tmp_path / "in.mp4", num_frames=10, sound=True)
    done = []
    target = cut_out_video(
        source,
        tmp_path / "out.mp4",
        brightness_mask,
        background=torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1),
        threshold=0.5,
        progress=lambda count, total: done.append((count, total)),
    )
    info = probe_video(target)
    assert info.has_audio and info.num_frames == 10 and abs(info.seconds - 1.0) < 0.15
    assert done[-1] == (10, 10)
    with av.open(str(target)) as container:
        pixels = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert pixels[40, 60, 1] > 200 and pixels[40, 60, 0] < 60  # background green
    assert pixels[20, 15].min() > 200  # foreground still bright
    with av.open(str(target)) as container:
        loudness = max(np.abs(frame.to_ndarray()).max() for frame in container.decode(audio=0))
    assert loudness > 0.1


def test_smoothing_mixes_masks_of_one_scene_only(tmp_path):
    source = write_video(tmp_path / "in.mp4", num_frames=4)
    values = iter([100, 110, 250, 250])  # a small step, then another scene

    def steps(image: Image.Image, **_) -> Image.Image:
        return Image.new("L", image.size, next(values))

    target = cut_out_video(source, tmp_path / "out.mov", steps, smoothing=0.5, refine=False)
    means = [round(alpha.mean() * 255) for alpha in read_alpha(target)]
    assert means == pytest.approx([100, 105, 250, 250], abs=2)


def test_odd_sides_and_a_real_network(tmp_path, tiny_model_dir):
    source = write_video(tmp_path / "in.mp4", num_frames=2, size=(66, 50))
    pipe = load_pipeline(tiny_model_dir, device="cpu")
    target = cut_out_video(source, tmp_path / "out.webm", pipe, size=64)
    assert [alpha.shape for alpha in read_alpha(target)] == [(50, 66)] * 2


def test_bad_and_too_large_videos_are_refused_and_leave_nothing(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video at all" * 100)
    out = tmp_path / "out"
    with pytest.raises(VideoError, match="no video that can be read"):
        cut_out_video(broken, out / "a.webm", brightness_mask)
    source = write_video(tmp_path / "in.mp4", num_frames=30)
    with pytest.raises(VideoError, match="lasts 3 s, 1 s are allowed"):
        cut_out_video(source, out / "b.webm", brightness_mask, max_seconds=1)
    with pytest.raises(VideoError, match="64×48"):
        cut_out_video(source, out / "c.webm", brightness_mask, max_pixels=1000)
    with pytest.raises(ValueError, match="no transparency"):
        cut_out_video(source, out / "d.mp4", brightness_mask)

    def cancel(count: int, total: int) -> None:
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        cut_out_video(source, out / "e.webm", brightness_mask, progress=cancel)
    assert not list(out.glob("*")) and not list(out.glob(".*"))
