"""The command `birefnet`: which files it reads and writes, what it reports, how it ends."""

import http.server
import io
import re
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import typer
from click.testing import Result
from PIL import Image
from tqdm import tqdm
from typer.testing import CliRunner

from birefnet_hf import cli, image_loading
from birefnet_hf.checkpoints_birefnet import CHECKPOINTS
from birefnet_hf.cli import Job, Outcome, OutputFormat, app, assign_targets, find_inputs, parse_size, process


def write_image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> Path:
    """A gradient, so that no two sizes and no two pixels look the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 0 * x], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(cli, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))


@pytest.fixture
def run(tiny_model_dir):
    """Runs the command with a tiny model; returns its exit code, and all it printed."""

    def invoke(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*map(str, arguments), "--model", str(tiny_model_dir), "--device", "cpu"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


def unwrap(text: str) -> str:
    """Text of a message box without its frame and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# Finding inputs and naming results


def names(arguments: list[str | Path], output: Path) -> dict[str, str]:
    inputs, problems = find_inputs(map(str, arguments), output)
    assert not problems
    return {
        Path(job.source).name: job.target.relative_to(output).as_posix()
        for job in assign_targets(inputs, output, None)
    }


def test_folders_are_searched_and_mirrored(tmp_path):
    for name in ("b.jpg", "trip/day 1/A.JPG", "trip/c.webp", ".hidden/d.jpg", "._e.jpg"):
        write_image(tmp_path / "photos" / name, format="jpeg")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert names([tmp_path / "photos"], tmp_path / "out") == {
        "b.jpg": "b.png",
        "A.JPG": "trip/day 1/A.png",
        "c.webp": "trip/c.png",
    }


def test_names_that_differ_by_suffix_alone_keep_it(tmp_path):
    for name in ("a.jpg", "A.png", "a.jpg.webp", "b.jpg", "v1.2.jpg"):
        write_image(tmp_path / name)
    assert names([tmp_path], tmp_path / "out") == {
        "a.jpg": "a.jpg.png",
        "A.png": "A.png.png",
        "a.jpg.webp": "a.jpg.webp.png",  # for a.jpg.png is that of a.jpg; plugins of web servers write such names
        "b.jpg": "b.png",
        "v1.2.jpg": "v1.2.png",
    }


def test_several_folders_get_one_each(tmp_path):
    for name in ("shoes/1.jpg", "bags/1.png"):
        write_image(tmp_path / name)
    assert names([tmp_path / "shoes", tmp_path / "bags"], tmp_path / "out") == {
        "1.jpg": "shoes/1.png",
        "1.png": "bags/1.png",
    }


def test_globs_mirror_what_follows_their_fixed_part(tmp_path, monkeypatch):
    for name in ("set1/x.jpg", "set2/x.jpg", "set2/y.png", "set2/deep/z.jpg"):
        write_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    inputs, _ = find_inputs(["set*/*.jpg"], Path("out"))
    assert [str(job.target) for job in assign_targets(inputs, Path("out"), None)] == [
        "out/set1/x.png",
        "out/set2/x.png",
    ]
    inputs, _ = find_inputs(["set2/**/*.jpg"], Path("out"))
    assert [str(item.name) for item in inputs] == ["deep/z.jpg", "x.jpg"]


def test_each_file_is_processed_once(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    inputs, _ = find_inputs(["a.jpg", "./a.jpg", "*.jpg", str(tmp_path)], Path("out"))
    assert [item.source for item in inputs] == ["a.jpg"]


def test_results_inside_an_input_folder_are_not_inputs(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "out" / "a.png")
    monkeypatch.chdir(tmp_path)
    for argument in (".", "**/*", str(tmp_path)):
        inputs, _ = find_inputs([argument], Path("out"))
        assert [Path(item.source).name for item in inputs] == ["a.jpg"], argument
    # A folder that holds the inputs is no reason to leave them out.
    for argument, output in (("out", "."), ("out/*.png", "out"), ("*.jpg", ".")):
        assert len(find_inputs([argument], Path(output))[0]) == 1, argument


def test_urls_become_safe_names(tmp_path):
    urls = {
        "https://example.org/cats/tom.jpg?size=1": "tom.png",
        "https://example.org/..%2f..%2fetc%2fpasswd": "passwd.png",
        "https://example.org/": "image.png",
        "https://example.org/caf%C3%A9 1.webp": "café_1.png",
        f"https://example.org/{'%E7%8C%AB' * 90}.jpg": f"{'猫' * 32}.png",
    }
    for url, expected in urls.items():
        [job] = assign_targets(find_inputs([url], tmp_path)[0], tmp_path, OutputFormat.PNG)
        assert job == Job(url, tmp_path / expected)


def test_two_images_never_share_a_result(tmp_path):
    first, second = write_image(tmp_path / "1" / "x.jpg"), write_image(tmp_path / "2" / "x.jpg")
    with pytest.raises(typer.BadParameter, match="would both be written to"):
        names([first, second], tmp_path / "out")


def test_inputs_are_never_replaced(tmp_path, run, no_model):
    photo = write_image(tmp_path / "a.png")
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for arguments in ([photo, "-o", photo], [photo, "-o", tmp_path], [photo, "-o", tmp_path / "link.png"]):
        code, output = run(*arguments)
        assert code == 2
        assert "never replace inputs" in unwrap(output)
    code, output = run(tmp_path, "-o", tmp_path)
    assert code == 2
    assert "is an input folder" in unwrap(output)
    assert photo.read_bytes() == before


def test_the_background_is_never_replaced(tmp_path, run, no_model):
    photo, beach = write_image(tmp_path / "in" / "beach.jpg"), write_image(tmp_path / "beach.png")
    before = beach.read_bytes()
    for output in (beach, tmp_path):
        code, text = run(photo, "-o", output, "--background", beach)
        assert code == 2
        assert "is the background" in unwrap(text)
    assert beach.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("512", (512, 512)), ("2560x1440", (1440, 2560)), ("64X32", (32, 64))]
)
def test_size_is_width_by_height(text, expected):
    assert parse_size(text) == expected


# Mistakes in the arguments end before a model is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg", "*.tiff"], "missing.jpg: no such file or folder; *.tiff: no image matches"),
        (["empty"], "empty: no images in this folder"),
        (["a.jpg", "--mask-only", "--background", "white"], "exclude each other"),
        (["a.jpg", "--size", "0"], "give one side, e.g. 1024, or WIDTHxHEIGHT"),
        (["a.jpg", "--size", "1024*768"], "give one side, e.g. 1024, or WIDTHxHEIGHT"),
        (["a.jpg", "b.jpg", "-o", "one.png"], "one.png is one file, but there are 2 images"),
        (["a.jpg", "-o", "one.jpg"], "results are written as .png or .webp"),
        (["a.jpg", "-o", "one.png", "--format", "webp"], "contradicts --format webp"),
        (["a.jpg", "-o", "a.jpg/out"], "Cannot write to a.jpg/out"),
    ],
)
def test_mistakes_cost_no_time(arguments, message, run, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg")
    code, output = run(*arguments, *([] if "-o" in arguments else ["-o", "out"]))
    assert code == 2
    assert message in unwrap(output)


def test_unwritable_folder(tmp_path, run, no_model, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", refuse)  # tests may run as root, who may write anywhere
    code, output = run(write_image(tmp_path / "a.jpg"), "-o", tmp_path / "out")
    assert code == 2
    assert "out: Permission denied." in unwrap(output)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--model", "lte"], "Did you mean 'lite'?"),
        (["--model", "weights.safetensors"], "is a file; pass a directory"),
        (["--device", "cuda:77"], 'device="cuda:77" is not there'),
        (["--size", "100"], "multiples of 32"),
        (["--background", "whitish"], "background='whitish' is neither a colour"),
    ],
)
def test_what_cannot_be_loaded_is_explained(option, message, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    write_image(tmp_path / "a.jpg")
    options = {"--model": str(tiny_model_dir), "--device": "cpu"} | {option[0]: option[1]}
    result = CliRunner().invoke(app, ["a.jpg", "-o", "out", *(text for pair in options.items() for text in pair)])
    assert result.exit_code == 2
    assert message in unwrap(result.output)


def test_without_a_network_the_package_offers_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    photo = write_image(tmp_path / "a.jpg")
    name = "nobody/there-is-no-such-model"
    result = CliRunner().invoke(app, [str(photo), "-o", str(tmp_path / "out"), "--model", name, "--device", "cpu"])
    assert result.exit_code == 2
    assert f"Cannot load {name}" in result.output
    assert "--model nano" in result.output


def test_help_names_every_alias_and_option():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = unwrap(result.output)
    for checkpoint in CHECKPOINTS:
        assert checkpoint.alias in text
    assert "rmbg (CC-BY-NC-4.0)" in text
    assert "birefnet photo.jpg -o cutout.png" in text


# Running


def test_single_file(tmp_path, run):
    photo = write_image(tmp_path / "a.jpg", size=(41, 23))
    code, output = run(photo, "-o", tmp_path / "new" / "cut.png")
    assert code == 0
    assert "1 written in" in output
    with Image.open(tmp_path / "new" / "cut.png") as cutout:
        assert (cutout.mode, cutout.size) == ("RGBA", (41, 23))


def test_folders_may_be_called_like_models_and_colours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png", size=(48, 32))
    for output in ("nano", "nano", "white"):  # the second time there are results in it
        arguments = ["a.png", "-o", output, "--model", "nano", "--background", "white", "--device", "cpu"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "white").iterdir()] == ["a.png"]


def test_the_network_of_the_package_finds_the_object(tmp_path, scene):
    """From the photo's file to those of cut-out, mask and composite, with weights that know objects."""
    image, inside = scene
    image.save(tmp_path / "ball.png")
    results = {"cutout": [], "mask": ["--mask-only"], "green": ["--background", "#00ff00"]}
    results["hard"] = ["--mask-only", "--threshold", str(102.5 / 255)]  # between two grey levels
    for name, options in results.items():
        target = str(tmp_path / f"{name}.png")
        arguments = [str(tmp_path / "ball.png"), "-o", target, "--model", "nano", "--device", "cpu", *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "nano on cpu, float32" in result.output
        with Image.open(target) as picture:
            results[name] = np.asarray(picture)
    cutout, mask, composite, hard = results.values()
    assert np.array_equal(cutout[..., 3], mask)
    assert np.array_equal(hard, np.where(mask > 102, 255, 0)) and not np.array_equal(hard, mask)
    assert mask[inside].mean() > 180 and mask[~inside].mean() < 40
    assert np.abs(composite[inside].mean(axis=0) - np.asarray(image)[inside].mean(axis=0)).max() < 50
    assert np.abs(composite[~inside].mean(axis=0) - (0, 255, 0)).max() < 50


def test_standard_input_and_output(tmp_path, tiny_model_dir):
    """Standard output holds the picture and nothing else."""

    def invoke(*arguments: str | Path, data: bytes | None = None) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--model", str(tiny_model_dir)], input=data)

    photo = write_image(tmp_path / "a.jpg")
    result = invoke("-", "-o", "-", "--format", "webp", data=photo.read_bytes())
    assert result.exit_code == 0 and "1 written" in result.stderr
    with Image.open(io.BytesIO(result.stdout_bytes)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGBA", (40, 30))
    result = invoke("-", "-o", tmp_path / "out", data=photo.read_bytes())
    assert result.exit_code == 0 and files_below(tmp_path / "out") == ["stdin.png"]
    result = invoke("-", "-o", "-", data=b"")
    assert (result.exit_code, result.stdout_bytes) == (1, b"") and "FAILED -: " in result.stderr
    result = invoke(photo, write_image(tmp_path / "b.jpg"), "-o", "-")
    assert result.exit_code == 2 and "takes one image" in result.stderr


def test_webp_is_lossless(tmp_path, run):
    photo = write_image(tmp_path / "a.png")
    run(photo, "-o", tmp_path / "a.webp", "--no-refine")
    run(photo, "-o", tmp_path / "b.png", "--no-refine")
    with Image.open(tmp_path / "a.webp") as webp, Image.open(tmp_path / "b.png") as png:
        assert webp.format == "WEBP"
        webp, png = np.array(webp), np.array(png)
    assert np.array_equal(webp[png[..., 3] > 0], png[png[..., 3] > 0])
    assert np.array_equal(webp[..., 3], png[..., 3])


def test_what_a_format_cannot_hold_is_reported(tmp_path, run):
    write_image(tmp_path / "in" / "long.png", size=(16400, 2))
    write_image(tmp_path / "in" / "short.png")
    code, output = run(tmp_path / "in", "-o", tmp_path / "out", "-f", "webp")
    assert code == 1
    assert re.search(r"FAILED .*long.png: .*16383", output)
    assert files_below(tmp_path / "out") == ["short.webp"]


def test_mask_and_background(tmp_path, run):
    photo = write_image(tmp_path / "a.jpg")
    assert run(photo, "-o", tmp_path / "out", "--mask-only", "-f", "webp")[0] == 0
    assert run(photo, "-o", tmp_path / "white.png", "--background", "white")[0] == 0
    backdrop = write_image(tmp_path / "backdrop.png", size=(9, 31))
    assert run(photo, "-o", tmp_path / "image.png", "--background", backdrop)[0] == 0
    modes = {}
    for name in ("out/a.webp", "white.png", "image.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (40, 30)
            modes[name] = image.mode
    assert modes == {"out/a.webp": "RGB", "white.png": "RGB", "image.png": "RGB"}  # WebP knows no grey


def test_broken_files_do_not_stop_the_others(tmp_path, run):
    folder = tmp_path / "in"
    whole = write_image(folder / "1.jpg", size=(90, 60)).read_bytes()
    (folder / "2 truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "3 empty.png").write_bytes(b"")
    (folder / "4 text.png").write_text("this is no image")
    (folder / "5 dangling.jpg").symlink_to(folder / "nowhere.jpg")
    write_image(folder / "6 one pixel.png", size=(1, 1))
    write_image(folder / "7 long.png", size=(20000, 10))
    write_image(folder / "8 cmyk.jpg", mode="CMYK")
    Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)).save(folder / "9 sixteen bits.png")
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(folder / "a palette.png", transparency=0)
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "b animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    write_image(folder / "c rotated.jpg", size=(40, 20), exif=exif)

    code, output = run(folder, folder / "5 dangling.jpg", tmp_path / "missing.jpg", "-o", tmp_path / "out", "-b", "3")
    assert code == 1
    failures = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 5
    for name in ("2 truncated.jpg", "3 empty.png", "4 text.png", "5 dangling.jpg", "missing.jpg"):
        assert sum(name in line for line in failures) == 1, name
    assert "8 written, 5 failed in" in output
    sizes = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            sizes[path.stem] = image.size
    assert sizes == {
        "1": (90, 60),
        "6 one pixel": (1, 1),
        "7 long": (20000, 10),
        "8 cmyk": (40, 30),
        "9 sixteen bits": (30, 20),
        "a palette": (8, 8),
        "b animated": (12, 10),
        "c rotated": (20, 40),
    }


def test_skip_existing(tmp_path, run, monkeypatch):
    folder = tmp_path / "in"
    for name in ("a.jpg", "b.jpg"):
        write_image(folder / name)
    write_image(tmp_path / "out" / "a.png", size=(3, 3))
    code, output = run(folder, "-o", tmp_path / "out", "--skip-existing")
    assert code == 0
    assert "1 written, 1 skipped in" in output
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (3, 3)
    monkeypatch.setattr(cli, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    code, output = run(folder, "-o", tmp_path / "out", "--skip-existing")
    assert code == 0
    assert output.strip() == "0 written, 2 skipped"


def test_results_of_an_earlier_run_are_replaced(tmp_path, run):
    photo = write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "out" / "a.png", size=(3, 3))
    assert run(photo, "-o", tmp_path / "out")[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (40, 30)
    assert files_below(tmp_path / "out") == ["a.png"]


def test_batch_size_does_not_change_results(tmp_path, run):
    folder = tmp_path / "in"
    for index in range(5):
        write_image(folder / f"{index}.jpg", size=(40 + index, 30))
    run(folder, "-o", tmp_path / "one")
    run(folder, "-o", tmp_path / "three", "--batch-size", "3")
    for name in files_below(tmp_path / "one"):
        with Image.open(tmp_path / "one" / name) as one, Image.open(tmp_path / "three" / name) as three:
            difference = np.abs(np.asarray(one).astype(int) - np.asarray(three))
        assert difference.max() <= 1


# The loop itself, with stand-ins for what it calls


class Recorder:
    """Stands in for reading, computing and writing; counts the images that are in memory."""

    def __init__(self, unusable: set[str] = frozenset(), unwritable: set[str] = frozenset()):
        self.unusable, self.unwritable = unusable, unwritable
        self.in_memory = self.most_in_memory = 0
        self.batches: list[list[str]] = []
        self.written: list[str] = []
        self.lock = threading.Lock()

    def read(self, source: str) -> str:
        with self.lock:
            self.in_memory += 1
            self.most_in_memory = max(self.most_in_memory, self.in_memory)
        return source

    def compute(self, images: list[str]) -> list[str]:
        self.batches.append(images)
        if self.unusable.intersection(images):
            raise RuntimeError("out of memory")
        return images

    def write(self, image: str, target: Path) -> None:
        time.sleep(0.002)  # slower than reading and computing
        with self.lock:
            self.in_memory -= 1
        if image in self.unwritable:
            raise OSError(28, "No space left on device")
        self.written.append(image)

    def run(self, count: int, batch_size: int) -> Outcome:
        outcome = Outcome(tqdm(disable=True))
        jobs = (Job(str(index), Path(f"{index}.png")) for index in range(count))
        process(jobs, self.read, self.compute, self.write, batch_size, outcome)
        return outcome


def test_few_images_are_in_memory():
    recorder = Recorder()
    outcome = recorder.run(count=200, batch_size=4)
    assert (outcome.written, outcome.failed) == (200, 0)
    assert sorted(recorder.written, key=int) == [str(index) for index in range(200)]
    assert {len(batch) for batch in recorder.batches} == {4}
    assert recorder.most_in_memory <= 20


def test_a_failing_batch_is_tried_image_by_image(capsys):
    recorder = Recorder(unusable={"5"}, unwritable={"2"})
    outcome = recorder.run(count=10, batch_size=4)
    assert (outcome.written, outcome.failed) == (8, 2)
    assert recorder.batches == [list("0123"), list("4567"), ["4"], ["5"], ["6"], ["7"], ["8", "9"]]
    errors = capsys.readouterr().err
    assert "FAILED 5: out of memory" in errors
    assert "FAILED 2: [Errno 28] No space left on device" in errors


def test_url_input(tmp_path, run, monkeypatch):
    """As for every URL, addresses that are not public are refused."""
    write_image(tmp_path / "served" / "tom cat.jpg")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code, output = run(f"{address}/tom%20cat.jpg", "-o", tmp_path / "out")
        assert code == 1 and "not public" in output
        monkeypatch.setattr(image_loading, "_is_public", lambda address: address == "127.0.0.1")
        code, output = run(f"{address}/tom%20cat.jpg", f"{address}/missing.jpg", "-o", tmp_path / "out")
        server.shutdown()
    assert code == 1
    assert re.search(r"FAILED .*missing.jpg.*404", output)
    assert files_below(tmp_path / "out") == ["tom_cat.png"]
