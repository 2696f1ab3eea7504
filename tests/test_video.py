"""Videos are cut out frame by frame, with their alpha, sound and times."""

import socket
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet_hf import load_pipeline


av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from birefnet_hf import video as video_module  # noqa: E402
from birefnet_hf.video import VideoError, cut_out_video, probe_video  # noqa: E402


BT709, UNSPECIFIED, BT601 = 1, 2, 5  # colour matrices by their numbers in FFmpeg


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


def write_frames(path: Path, frames: list[np.ndarray], times: list[int], **reformat: int) -> Path:
    """Frames at these times, in hundredths of a second. A path that ends in .h264 gets no times: it has no container."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10, options={"qp": "4"})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, 100)
        if reformat:
            video.codec_context.colorspace = reformat.pop("tag")
            video.codec_context.color_range = reformat["dst_color_range"]
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", **reformat)
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def times_of(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def turn_clockwise(path: Path) -> Path:
    """Notes in an MP4 file that it is to be shown turned by 90 degrees, as phones do that are held upright."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # type, then 40 bytes of other fields (ISO 14496-12, version 0)
    values = [0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000]
    content[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(content)
    return path


def mirror(path: Path) -> Path:
    """Notes in an MP4 file that it is to be shown mirrored left to right."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", -0x10000, 0, 0, 0, 0x10000, 0, 64 << 16, 0, 0x40000000)
    path.write_bytes(content)
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
        background="#00ff00",
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


def test_a_phones_video_is_turned_upright(tmp_path):
    """The square, left of the middle and above it in the file, is right of it and above after a turn to the right."""
    source = turn_clockwise(write_video(tmp_path / "in.mp4", num_frames=2))
    target = cut_out_video(source, tmp_path / "out.mov", brightness_mask, refine=False)
    alphas = read_alpha(target)
    assert [alpha.shape for alpha in alphas] == [(64, 48)] * 2
    rows, columns = np.nonzero(alphas[0] > 0.5)
    # In the file it covers columns 5 to 24 and rows 10 to 29 of 48.
    assert abs(rows.mean() - 14.5) < 2 and abs(columns.mean() - (47 - 19.5)) < 2


@pytest.mark.parametrize(
    ("matrix", "tag", "colour_range", "height"),
    [
        (BT709, BT709, 1, 64),
        (BT601, BT601, 1, 64),
        (BT601, BT601, 2, 64),  # 0 to 255, as phones and webcams write
        (BT601, UNSPECIFIED, 1, 64),  # small ones are taken for BT.601
        (BT709, UNSPECIFIED, 1, 720),  # and large ones for BT.709
    ],
)
@pytest.mark.parametrize("suffix", [".webm", ".mov", ".mp4"])
def test_colours_stay_and_are_named(tmp_path, matrix, tag, colour_range, height, suffix):
    """Whatever matrix and range a video has, its colours come out, in a video that says how to read them."""
    colours = np.array([[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 60]], np.uint8)
    pixels = np.broadcast_to(np.repeat(colours, 32, axis=0), (height, 192, 3)).copy()
    source = write_frames(
        tmp_path / "in.mp4", [pixels], [0], tag=tag, dst_colorspace=matrix, dst_color_range=colour_range
    )
    target = cut_out_video(
        source,
        tmp_path / f"out{suffix}",
        lambda image, **_: Image.new("L", image.size, 255),
        background=torch.zeros(3, 1, 1) if suffix == ".mp4" else None,
        refine=False,
    )
    with av.open(str(target)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (BT709, 1, BT709, BT709)
    rgb = frame.reformat(format="rgb24", src_colorspace=BT709).to_ndarray()
    middles = rgb[height // 2, 16::32].astype(int)
    assert np.abs(middles - colours).max() <= 5


def test_times_of_frames_are_kept_or_made_up(tmp_path):
    frames = [np.full((48, 64, 3), 40 * index, np.uint8) for index in range(5)]
    uneven = write_frames(tmp_path / "uneven.mp4", frames, [0, 10, 15, 60, 61])
    target = cut_out_video(uneven, tmp_path / "uneven.mov", brightness_mask, refine=False)
    assert times_of(target) == pytest.approx([0, 0.1, 0.15, 0.6, 0.61], abs=0.002)
    none = write_frames(tmp_path / "none.h264", frames, [0, 10, 20, 30, 40])
    assert times_of(none) == [None] * 5
    times = np.array(times_of(cut_out_video(none, tmp_path / "none.mov", brightness_mask, refine=False)))
    assert times == pytest.approx(np.arange(5) / 25, abs=0.002)  # what FFmpeg takes such a file's rate for


def test_a_mirrored_video_is_shown_as_players_do(tmp_path):
    source = mirror(write_video(tmp_path / "a.mp4", num_frames=1))
    with av.open(str(cut_out_video(source, tmp_path / "b.mp4", brightness_mask, background="black"))) as container:
        [frame] = container.decode(video=0)
        bright = frame.to_ndarray(format="gray") > 128
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    assert abs(rows.mean() - 19.5) < 2 and abs(columns.mean() - (63 - 14.5)) < 2


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
def test_pixels_become_square(suffix, tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    target = cut_out_video(tmp_path / "a.mp4", tmp_path / f"b{suffix}", brightness_mask, background="black")
    with av.open(str(target)) as container:
        [frame] = container.decode(video=0)
        assert (frame.width, frame.height) == (128, 48)
        assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)


def test_the_header_says_how_long_frames_of_a_variable_rate_last(tmp_path):
    times = [*range(0, 100, 10), 200, 300, 400]
    source = write_frames(tmp_path / "a.mp4", [np.full((48, 64, 3), 90, np.uint8)] * len(times), times)
    target = cut_out_video(source, tmp_path / "b.mp4", brightness_mask, background="black")
    assert times_of(target) == pytest.approx([time / 100 for time in times], abs=0.01)
    assert probe_video(target).seconds >= 4.0


def test_sound_may_change_within_a_recording(tmp_path):
    parts = []
    for start, (name, layout, rate) in enumerate((("one", "mono", 44100), ("two", "stereo", 48000))):
        with av.open(str(tmp_path / f"{name}.ts"), "w", format="mpegts") as container:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream("mp2", rate=rate, layout=layout)
            for index in range(5):
                picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
                picture.pts, picture.time_base = 10 * start + index, Fraction(1, 10)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
            channels = 2 if layout == "stereo" else 1
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, rate // 2 * channels), np.int16), format="s16", layout=layout
            )
            frame.rate, frame.pts, frame.time_base = rate, start * rate, Fraction(1, rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        parts.append((tmp_path / f"{name}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    target = cut_out_video(tmp_path / "both.ts", tmp_path / "b.mp4", brightness_mask, background="black")
    with av.open(str(target)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 48000 * 0.9


def test_what_cannot_be_written_is_not_blamed_on_the_source(tmp_path):
    source = write_video(tmp_path / "a.mp4", num_frames=40)
    program = f"""
import resource, signal
from birefnet_hf.video import cut_out_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    cut_out_video({str(source)!r}, {str(tmp_path / "out" / "b.mov")!r}, lambda image, **_: image.convert("L"))
except OSError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "OSError" in result.stdout and "cannot be written" in result.stdout and "b.mov" in result.stdout, result
    assert not list((tmp_path / "out").iterdir())


def test_playlists_texts_and_photos_are_no_videos(tmp_path):
    """A playlist would have the server read whatever files and addresses a visitor writes into it."""
    write_video(tmp_path / "secret.mp4")
    files = {
        "concat.txt": b"ffconcat version 1.0\nfile secret.mp4\n",
        "hls.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "disguised.mp4": b"ffconcat version 1.0\nfile secret.mp4\n",
        "letters.txt": b"FFmpeg draws these letters\n" * 50,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg")
    for name in [*files, "photo.jpg", "missing.mp4"]:
        with pytest.raises(VideoError, match=f"^{name} is no video that can be read") as caught:
            cut_out_video(tmp_path / name, tmp_path / "out.webm", brightness_mask)
        assert str(tmp_path) not in str(caught.value)


def test_names_are_those_of_files_and_nothing_is_fetched(tmp_path, monkeypatch):
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    source = write_video(tmp_path / "in.mp4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        for name in (f"http://127.0.0.1:{server.getsockname()[1]}/in.mp4", "concat:in.mp4", "file:in.mp4"):
            with pytest.raises(VideoError, match="no video that can be read: No such file"):
                cut_out_video(name, tmp_path / "out.webm", brightness_mask)
        with pytest.raises(TimeoutError):
            server.accept()
    source.rename("at 10:30.mp4")
    (tmp_path / "a:b").mkdir()
    assert cut_out_video("at 10:30.mp4", "a:b/out.webm", brightness_mask).is_file()


def test_unknown_codecs_are_refused_and_unreadable_names_are_not(tmp_path):
    source = write_video(tmp_path / "in.mp4")
    content = source.read_bytes()
    source.write_bytes(content.replace(b"VideoHandler", b"Vid\xe9oHandler"))  # Latin-1 where UTF-8 should be
    assert cut_out_video(source, tmp_path / "out.webm", brightness_mask).exists()
    source.write_bytes(content.replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match="coded in a way"):
        cut_out_video(source, tmp_path / "out.webm", brightness_mask)


def test_frames_far_larger_than_the_first_are_not_decoded(tmp_path):
    small = np.zeros((48, 64, 3), np.uint8)
    bomb = write_frames(tmp_path / "bomb.h264", [small] * 3, [0, 10, 20])
    large = write_frames(tmp_path / "large.h264", [np.zeros((480, 640, 3), np.uint8)], [0])
    bomb.write_bytes(bomb.read_bytes() + large.read_bytes())
    with pytest.raises(VideoError, match="size of the frames changes"):  # decoded
        cut_out_video(bomb, tmp_path / "out.webm", brightness_mask)
    with pytest.raises(VideoError, match="cannot be read to its end"):
        cut_out_video(bomb, tmp_path / "out.webm", brightness_mask, max_pixels=64 * 48)


def test_frames_of_another_size_and_too_many_are_refused(tmp_path):
    frames = [np.full((48, 64, 3), 40 * index, np.uint8) for index in range(3)]
    both = write_frames(tmp_path / "both.h264", frames, [0, 10, 20])
    other = write_frames(tmp_path / "other.h264", [frame[:32] for frame in frames], [0, 10, 20])
    both.write_bytes(both.read_bytes() + other.read_bytes())
    with pytest.raises(VideoError, match="size of the frames changes"):
        cut_out_video(both, tmp_path / "out.webm", brightness_mask)
    # Times in a file may be made up, so that hours of frames seem to be over in a moment.
    dense = write_frames(tmp_path / "dense.mp4", frames[:1] * 40, list(range(40)))
    cut_out_video(dense, tmp_path / "out.mov", brightness_mask, refine=False, max_seconds=0.5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(video_module, "MAX_RATE", 60)
        with pytest.raises(VideoError, match="longer than the 0.5 s allowed"):
            cut_out_video(dense, tmp_path / "out2.mov", brightness_mask, refine=False, max_seconds=0.5)
    assert not (tmp_path / "out2.mov").exists()


def test_a_video_is_never_replaced_by_its_result(tmp_path):
    source = write_video(tmp_path / "in.mp4").rename(tmp_path / "in.mov")
    content = source.read_bytes()
    (tmp_path / "link.mov").symlink_to(source)
    for target in (source, tmp_path / "link.mov"):
        with pytest.raises(ValueError, match="is the video itself"):
            cut_out_video(source, target, brightness_mask)
    with pytest.raises(VideoError, match="missing.mp4 is no video"):
        cut_out_video(tmp_path / "missing.mp4", source, brightness_mask)
    assert source.read_bytes() == content and (tmp_path / "link.mov").is_symlink()


@pytest.mark.slow
def test_long_sound_beside_a_short_picture_is_refused(tmp_path):
    """Its header says nothing of a length; while there is sound alone, who asks for frames is answered too."""
    source = tmp_path / "clip.mkv"
    with av.open(str(source), "w", options={"live": "1"}) as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("flac", rate=8000, layout="mono")
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        for second in range(30):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = 8000, 8000 * second, Fraction(1, 8000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert probe_video(source).seconds is None
    steps = list(video_module.iterate_video(source, tmp_path / "all.webm", brightness_mask))
    assert len(steps) >= 25 and {done for done, _ in steps} <= {0, 1}
    with pytest.raises(VideoError, match="sound is longer than the 5 s"):
        cut_out_video(source, tmp_path / "out.webm", brightness_mask, max_seconds=5)
    assert not (tmp_path / "out.webm").exists()


def test_memory_does_not_grow_with_the_length(tmp_path):
    """Peak memory of a fresh process after 20, 60 and 200 frames of 640×480 pixels."""
    script = tmp_path / "measure.py"
    script.write_text(
        """
import resource, sys
from birefnet_hf import load_pipeline
from birefnet_hf.video import cut_out_video
pipe = load_pipeline("nano", device="cpu", size=64)
def note(done, total):
    if done in (20, 60, 200):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
cut_out_video(sys.argv[1], sys.argv[2], pipe, progress=note)
""",
        encoding="utf-8",
    )
    source = write_video(tmp_path / "in.mp4", 200, size=(640, 480), sound=True)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out.webm")]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = [int(line) / 1024 for line in answer.stdout.split()[-3:]]
    print(f"peak after 20, 60 and 200 frames: {', '.join(f'{peak:.0f} MiB' for peak in peaks)}")
    # Within the first 60 frames the encoder fills its look-ahead. The rest would take 140 × 640 × 480 × 4 bytes =
    # 164 MiB if it were kept.
    assert peaks[2] - peaks[1] < 30, peaks


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


@pytest.mark.parametrize("curve", [16, 18], ids=["PQ", "HLG"])
def test_high_dynamic_range_becomes_the_ordinary_one(tmp_path, curve):
    """As phones record it: an orange of sRGB, brightest white, and what is brighter, encoded by the standards' formulas."""
    orange = np.array([200, 120, 40])
    light = ((orange / 255 + 0.055) / 1.055) ** 2.4  # 1 is white, of 203 cd/m²
    colours = np.stack([light, [1, 1, 1], [3, 3, 3]])
    # ITU-R BT.2087 from BT.709's primaries to BT.2020's; BT.2100's curves.
    wide = colours @ np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]).T
    if curve == 16:
        power = (wide * 203 / 10000) ** 0.1593017578125
        codes = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        shown = wide * 203 / 1000
        scene = shown * (shown @ [0.2627, 0.6780, 0.0593])[:, None] ** (1 / 1.2 - 1)
        logarithm = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        codes = np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)
    assert codes[1, 0] == pytest.approx({16: 0.58, 18: 0.75}[curve], abs=0.01)  # BT.2408's reference white
    pixels = np.repeat(np.rint(codes * 65535).astype(np.uint16), 32, axis=0)[None].repeat(48, axis=0)  # (48, 96, 3)
    with av.open(str(tmp_path / "phone.mkv"), "w") as container:
        video = container.add_stream("ffv1", rate=10)
        video.width, video.height, video.pix_fmt = 96, 48, "yuv420p10le"
        video.codec_context.colorspace = video.codec_context.color_primaries = 9
        video.codec_context.color_trc, video.codec_context.color_range = curve, 1
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le").reformat(format="yuv420p10le", dst_colorspace=9)
        frame.pts = 0
        container.mux(video.encode(frame))
        container.mux(video.encode(None))

    seen = []

    def mask(image: Image.Image, **_) -> Image.Image:
        seen.append(np.asarray(image))
        return Image.new("L", image.size, 255)

    cut_out_video(tmp_path / "phone.mkv", tmp_path / "out.mp4", mask, background="white", refine=False)
    [shown] = seen
    assert np.abs(shown[24, 16].astype(int) - orange).max() <= 3
    white, brighter = shown[24, 48], shown[24, 80]
    assert np.ptp(white) <= 2 and np.ptp(brighter) <= 2 and 240 <= white.min() < brighter.min()
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).color_trc == BT709
