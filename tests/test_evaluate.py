"""scripts/evaluate.py: numbers, tables and pictures of models and of folders of predictions; bad data."""

import csv
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import PartialState
from conftest import load_script
from PIL import Image, ImageDraw, ImageFilter

from birefnet_hf.image_loading import load_mask
from birefnet_hf.metrics import METRICS, compute_metrics, summarize
from birefnet_hf.pipeline_birefnet import load_pipeline


SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
SIZES = {"a": (64, 48), "b": (50, 70), "c": (48, 48), "d": (90, 40)}  # width, height


evaluate = load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fresh_accelerate(caplog):
    caplog.set_level(logging.INFO, logger="birefnet_hf")
    yield
    PartialState._reset_state()


@pytest.fixture
def data(tmp_path) -> Path:
    """Noisy pictures with an ellipse (im), soft masks of it (gt), and predictions (pred) that are the worse the later."""
    root = tmp_path / "data"
    for name in ("im", "gt", "pred"):
        (root / name).mkdir(parents=True)
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((12, 10, width - 12, height - 10), fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(1))
        noise = np.random.default_rng(number).integers(0, 120, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        image.paste((230, 200, 60), mask=mask)
        image.save(root / "im" / f"{name}.jpg")
        mask.save(root / "gt" / f"{name}.png")
        shifted = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0, 1 + 3 * number, 0, 1, 0))
        shifted.point(lambda level: 30 + level * 190 // 255).save(root / "pred" / f"{name}.png")
    return root


def run(data: Path, output: Path, *more: object) -> int:
    given = [str(item) for item in more]
    given += [] if {"--model", "--predictions"} & set(given) else ["--predictions", str(data / "pred")]
    fixed = ["--data", str(data / "im"), "--masks", str(data / "gt"), "--device", "cpu", "--output-dir", str(output)]
    fixed += [] if "--num-workers" in given else ["--num-workers", "0"]
    return evaluate.main([*fixed, *given])


def read_json(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def values(output: Path) -> dict[str, float]:
    return {name: about["value"] for name, about in read_json(output)["metrics"].items()}


def read_rows(output: Path) -> list[dict[str, str]]:
    with open(output / "images.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(folder: Path, name: str) -> np.ndarray:
    return np.asarray(load_mask(folder / f"{name}.png"))


@pytest.mark.parametrize("convention", ["raw", "upstream"])
def test_numbers_are_those_of_the_metrics(data, tmp_path, convention, capsys):
    output = tmp_path / "out"
    assert run(data, output, "--convention", convention) == 0

    pairs = [(read(data / "pred", name), read(data / "gt", name)) for name in SIZES]
    expected = [compute_metrics(*pair, convention=convention) for pair in pairs]
    assert values(output) == pytest.approx(summarize(expected))
    for row, name, result in zip(read_rows(output), SIZES, expected, strict=True):
        assert row.pop("name") == str(data / "im" / f"{name}.jpg")
        assert {metric: float(value) for metric, value in row.items()} == pytest.approx(result.scores)
    content = read_json(output)
    assert (content["images"], content["skipped"]) == (4, [])
    assert content["metrics"]["mae"]["inputs"] == getattr(METRICS["mae"], convention)
    assert content["settings"]["convention"] == convention
    table = capsys.readouterr().out
    for name, value in summarize(expected).items():
        [line] = [line for line in table.splitlines() if line.lstrip().startswith(f"{METRICS[name].label} ")]
        assert f" {value:.4f} " in line and getattr(METRICS[name], convention) in line


def test_masks_as_predictions_are_perfect(data, tmp_path):
    """Also where they are stored as transparency."""
    for name in SIZES:
        hard = Image.open(data / "gt" / f"{name}.png").point(lambda level: 255 * (level > 128))
        hard.save(data / "gt" / f"{name}.png")
        hard.save(data / "pred" / f"{name}.png")
    mask = Image.open(data / "gt" / "b.png")
    Image.merge("RGBA", [*Image.open(data / "im" / "b.jpg").split(), mask]).save(data / "pred" / "b.png")
    assert run(data, tmp_path / "out") == 0
    for name, value in values(tmp_path / "out").items():
        if not name.startswith("mean_"):  # over thresholds, of which the last makes all foreground
            best = 1 if METRICS[name].higher_is_better else 0
            assert value == pytest.approx(best, abs=1e-3), name


def test_nearly_black_predictions_stay_so(data, tmp_path):
    """Nothing found is not everything found: a mask of 0 and 1 among the masks means something else."""
    for name in SIZES:
        Image.fromarray(np.uint8(read(data / "gt", name) > 128)).save(data / "pred" / f"{name}.png")
    assert run(data, tmp_path / "out", "--metrics", "mae") == 0
    expected = [compute_metrics(np.uint8(mask > 128), mask) for mask in (read(data / "gt", name) for name in SIZES)]
    assert values(tmp_path / "out")["mae"] == pytest.approx(summarize(expected)["mae"])


def test_contact_sheet_shows_the_worst_first(data, tmp_path):
    assert run(data, tmp_path / "out", "--worst", 2, "--worst-by", "mae", "--metrics", "mae") == 0
    order = sorted(
        SIZES, key=lambda name: -compute_metrics(read(data / "pred", name), read(data / "gt", name)).scores["mae"]
    )
    with Image.open(tmp_path / "out" / "worst.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
    heights = [round(256 * SIZES[name][1] / max(SIZES[name])) for name in order[:2]]
    assert pixels.shape == (24 + sum(height + 24 for height in heights), 4 * 256, 3)
    top = 24 + 20
    for name, height in zip(order[:2], heights, strict=True):
        width = round(256 * SIZES[name][0] / max(SIZES[name]))
        left = (256 - width) // 2
        image, mask, prediction, error = (
            pixels[top : top + height, column * 256 + left : column * 256 + left + width] for column in range(4)
        )
        top += height + 24

        def shown(picture: Image.Image, size: tuple[int, int] = (width, height)) -> np.ndarray:
            return np.asarray(picture.convert("RGB").resize(size)).astype(int)

        assert np.array_equal(mask, shown(Image.open(data / "gt" / f"{name}.png")))
        assert np.array_equal(prediction, shown(Image.open(data / "pred" / f"{name}.png")))
        assert np.array_equal(image, shown(Image.open(data / "im" / f"{name}.jpg")))
        difference = read(data / "pred", name).astype(int) - read(data / "gt", name)
        too_high, too_low = (Image.fromarray(part.clip(0).astype(np.uint8)) for part in (difference, -difference))
        assert np.array_equal(error[..., 0], shown(too_high)[..., 0])  # red
        assert np.array_equal(error[..., 1:], shown(too_low)[..., 1:])  # cyan


def test_a_model_and_its_saved_predictions_have_the_same_numbers(data, tiny_model_dir, tmp_path):
    saved = tmp_path / "saved"
    model = ["--model", tiny_model_dir, "--save-predictions", saved]
    assert run(data, tmp_path / "model", *model) == 0
    pipe = load_pipeline(tiny_model_dir, device="cpu", output_type="mask")
    for name in SIZES:
        expected = np.asarray(pipe(data / "im" / f"{name}.jpg"))
        assert np.array_equal(read(saved, name), expected)
        assert expected.shape == SIZES[name][::-1]
    assert not list(saved.glob(".*"))
    assert run(data, tmp_path / "saved_scores", "--predictions", saved) == 0
    assert values(tmp_path / "saved_scores") == values(tmp_path / "model")
    settings = read_json(tmp_path / "model")["settings"]
    assert (settings["device"], settings["dtype"]) == ("cpu", "torch.float32")

    assert run(data, tmp_path / "limited", *model, "--limit", 3, "--batch-size", 2, "--dtype", "bfloat16") == 0
    assert read_json(tmp_path / "limited")["images"] == 3
    rows = zip(read_rows(tmp_path / "limited"), read_rows(tmp_path / "model"), strict=False)
    assert all(float(one["mae"]) == pytest.approx(float(other["mae"]), abs=0.02) for one, other in rows)
    assert run(data, tmp_path / "small", *model[:2], "--size", 32, 64, "--limit", 1, "--metrics", "mae", "iou") == 0
    assert list(values(tmp_path / "small")) == ["mae", "iou"]


def test_iou_is_the_one_of_training(data, tiny_model_dir, tmp_path):
    from accelerate import Accelerator

    from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor
    from birefnet_hf.data import load_pairs
    from birefnet_hf.training import measure, validation_loader

    assert run(data, tmp_path / "out", "--model", tiny_model_dir) == 0
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True)
    processor = BiRefNetImageProcessor.from_pretrained(tiny_model_dir)
    loader = validation_loader(load_pairs(data / "im", data / "gt"), processor, accelerator, num_workers=0)
    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    summary, _ = measure(model, loader, processor, accelerator, metrics=["s_measure"], task="dis", sample_pictures=0)
    found = values(tmp_path / "out")
    assert found["iou"] == pytest.approx(summary["iou"], abs=2e-3)  # there without rounding to 8 bits
    assert found["s_measure"] == pytest.approx(summary["s_measure"], abs=2e-3)


def test_a_network_that_knows_objects_scores_well(data, scene, tmp_path):
    image, inside = scene
    for name in SIZES:  # same names, plain ground instead of noise
        width = 160 + 20 * list(SIZES).index(name)
        image.resize((width, 120)).save(data / "im" / f"{name}.jpg")
        Image.fromarray(inside).convert("L").resize((width, 120)).save(data / "gt" / f"{name}.png")
    names = ("iou", "mae", "s_measure", "max_f")
    assert run(data, tmp_path / "out", "--model", "nano", "--metrics", *names) == 0
    found = values(tmp_path / "out")
    assert found["iou"] > 0.7 and found["s_measure"] > 0.75 and found["max_f"] > 0.8
    assert found["mae"] < 0.15


def test_worker_processes_change_nothing(data, tmp_path):
    assert run(data, tmp_path / "here") == 0
    assert run(data, tmp_path / "there", "--num-workers", 2) == 0
    assert values(tmp_path / "there") == values(tmp_path / "here")
    for name in ("images.csv", "worst.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_have_the_same_result(data, tiny_model_dir, tmp_path):
    more = ["--model", tiny_model_dir, "--limit", 3, "--worst", 2]
    assert run(data, tmp_path / "one", *more) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", SCRIPT]
    command += ["--data", data / "im", "--masks", data / "gt", "--device", "cpu", "--output-dir", tmp_path / "two"]
    command += ["--num-workers", "1", *more]
    result = subprocess.run(
        list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("max F") == 1
    assert read_json(tmp_path / "two")["settings"]["processes"] == 2
    assert values(tmp_path / "two") == values(tmp_path / "one")
    for name in ("images.csv", "worst.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_unusable_predictions_are_all_named(data, tmp_path, caplog):
    (data / "pred" / "a.png").unlink()
    Image.new("L", (20, 30), 255).save(data / "pred" / "c.png")
    (data / "pred" / "d.png").write_bytes(b"no image")
    assert run(data, tmp_path / "out") == 1
    assert "3 sample(s)" in caplog.text
    for part in ("a.jpg: there is no prediction", "prediction c.png is 20×30", "mask 48×48", "d.png cannot be read"):
        assert part in caplog.text
    assert not (tmp_path / "out").exists()

    assert run(data, tmp_path / "out", "--on-bad-data", "skip") == 0
    content = read_json(tmp_path / "out")
    assert content["images"] == 1
    assert [Path(sample["name"]).name for sample in content["skipped"]] == ["a.jpg", "c.jpg", "d.jpg"]


def test_file_damaged_in_the_middle(data, tiny_model_dir, tmp_path, caplog):
    """The check at the start looks at the ends of files."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    (data / "im" / "b.jpg").unlink()
    path = data / "im" / "b.png"
    noise.save(path)
    content = bytearray(path.read_bytes())
    content[2000:2200] = bytes(200)
    path.write_bytes(content)
    model = ("--model", tiny_model_dir, "--batch-size", 3, "--metrics", "mae")
    assert run(data, tmp_path / "out", *model) == 1
    assert str(path) in caplog.text
    assert not (tmp_path / "out").exists()
    assert run(data, tmp_path / "out", *model, "--on-bad-data", "skip") == 0
    assert [Path(row["name"]).stem for row in read_rows(tmp_path / "out")] == ["a", "c", "d"]
    [skipped] = read_json(tmp_path / "out")["skipped"]
    assert skipped["name"] == str(path)


def test_results_never_replace_data(data, tiny_model_dir, tmp_path, caplog):
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    model = ("--model", tiny_model_dir)
    assert run(data, tmp_path / "out", *model, "--save-predictions", data / "gt") == 1
    assert run(data, tmp_path / "out", *model, "--save-predictions", data / "pred" / ".." / "im") == 1
    assert run(data, data / "pred") == 1
    assert caplog.text.count("choose another folder") == 3
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before


def test_a_folder_that_cannot_be_is_noticed_before_the_work(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", None)
    (tmp_path / "file").touch()
    assert run(data, tmp_path / "file") == 1 and run(data, tmp_path / "file" / "below") == 1
    assert "File exists" in caplog.text and "Not a directory" in caplog.text


def test_interrupted(data, tmp_path, caplog, monkeypatch):
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "read_sample", press)
    assert run(data, tmp_path / "out", "--num-workers", 1) == 130
    assert "Interrupted." in caplog.text


def test_embedded_images_of_one_name_are_refused(data, tmp_path, caplog):
    image, mask = ((data / kind / name).read_bytes() for kind, name in (("im", "b.jpg"), ("gt", "b.png")))
    rows = {"image": [{"path": "image.jpg", "bytes": image}] * 2, "mask": [{"path": "mask.png", "bytes": mask}] * 2}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(saved)
    argv = ["--data", str(saved), "--predictions", str(data / "pred"), "--device", "cpu", "--num-workers", "0"]
    assert evaluate.main(argv) == 1
    assert "Several images in the dataset are called image.jpg" in caplog.text


def test_images_of_one_name_are_refused(data, tmp_path, caplog):
    root = tmp_path / "root"
    for subset in ("one", "two"):
        (root / subset).mkdir(parents=True)
        for name in ("im", "gt"):
            (root / subset / name).symlink_to(data / name)
    argv = ["--predictions", str(data / "pred"), "--data", str(root), "--device", "cpu", "--num-workers", "0"]
    assert evaluate.main([*argv, "--subsets", "one", "two"]) == 1
    assert "have one name" in caplog.text
    own = ["--model", "nano", *argv[2:], "--size", "64", "64", "--metrics", "mae", "--subsets", "one", "two"]
    assert evaluate.main([*own, "--output-dir", str(tmp_path / "numbers")]) == 0
    names = [line.split(",")[0] for line in (tmp_path / "numbers" / "images.csv").read_text().splitlines()[1:]]
    assert len(set(names)) == len(names) == 2 * len(list((data / "im").iterdir()))
    assert evaluate.main([*argv, "--subsets", "two", "--metrics", "mae"]) == 0


def test_composed_cutouts_are_the_same_each_time(data, tiny_model_dir, tmp_path):
    cutouts = tmp_path / "cutouts"
    cutouts.mkdir()
    for name in SIZES:
        image, mask = (Image.open(data / folder) for folder in (f"im/{name}.jpg", f"gt/{name}.png"))
        Image.merge("RGBA", [*image.split(), mask]).save(cutouts / f"{name}.png")
    argv = ["--data", cutouts, "--cutouts", "--model", tiny_model_dir, "--device", "cpu", "--num-workers", "0"]
    for name in ("one", "two"):
        assert evaluate.main([*map(str, argv), "--output-dir", str(tmp_path / name), "--metrics", "mae", "iou"]) == 0
    assert values(tmp_path / "one") == values(tmp_path / "two")
    assert (tmp_path / "one" / "worst.png").read_bytes() == (tmp_path / "two" / "worst.png").read_bytes()
    for name, more in {"thin": ["--thin-probability", 1], "seed": ["--seed", 1]}.items():
        more = ["--output-dir", tmp_path / name, "--metrics", "mae", "iou", *more]
        assert evaluate.main([*map(str, [*argv, *more])]) == 0
        assert values(tmp_path / name) != values(tmp_path / "one")


def test_broken_mask_is_no_broken_prediction(data, tmp_path, caplog):
    name = next(iter(SIZES))
    (data / "gt" / f"{name}.png").write_bytes(b"nothing")
    assert run(data, tmp_path / "out", "--check", "off") == 1
    assert "the mask cannot be read" in caplog.text and "prediction" not in caplog.text


def test_number_without_meaning_is_null_in_json(data, tmp_path):
    """mBA where no mask has a boundary."""
    for name, size in SIZES.items():
        Image.new("L", size, 255).save(data / "gt" / f"{name}.png")
    assert run(data, tmp_path / "out", "--metrics", "mba", "--worst-by", "mba") == 0
    assert values(tmp_path / "out") == {"mba": None}
    assert all(math.isnan(float(row["mba"])) for row in read_rows(tmp_path / "out"))
    assert not (tmp_path / "out" / "worst.png").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--predictions", "p", "--model", "m"], "not allowed with"),
        ([], "one of the arguments --model --predictions is required"),
        (["--model", "m", "--metrics", "dice"], "there are no metrics dice: choose from max_f"),
        (["--model", "m", "--metrics", "mae", "--worst-by", "iou"], "add it to --metrics"),
        (["--predictions", "p", "--cutouts"], "no --predictions yet"),
        (["--predictions", "p", "--save-predictions", "q"], "are for a --model"),
        (["--model", "m", "--backgrounds", "walls"], "--backgrounds needs --cutouts"),
        (["--model", "m", "--batch-size", "0"], "must be at least 1"),
        (["--model", "m", "--cutouts", "--thin-probability", "20"], "is a chance, from 0 to 1"),
    ],
)
def test_wrong_options_are_explained(wrong, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--data", "d", *wrong])
    assert message in capsys.readouterr().err


def test_missing_model_or_data_is_an_error_message(data, tmp_path, caplog):
    assert run(data, tmp_path / "out", "--model", "no-such-alias") == 1
    assert run(data / "nowhere", tmp_path / "out", "--predictions", data / "pred") == 1
    assert "no-such-alias is no directory" in caplog.text
    assert f"There is no folder {data / 'nowhere' / 'im'}" in caplog.text
