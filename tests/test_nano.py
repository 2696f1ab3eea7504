"""The trained network that ships with the package."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import load_script
from packaging import version
from PIL import Image
from transformers import pipeline

from birefnet_hf import NANO, BiRefNetForImageSegmentation, load_pipeline
from birefnet_hf.checkpoints_birefnet import list_aliases, resolve_checkpoint
from birefnet_hf.synthesis import list_images


ROOT = Path(__file__).parents[1]


def intersection_over_union(prediction: np.ndarray, mask: np.ndarray) -> float:
    return (prediction & mask).sum() / (prediction | mask).sum()


def test_size_and_names():
    weights = Path(NANO) / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    model = BiRefNetForImageSegmentation.from_pretrained(NANO)
    assert model.dtype == torch.float16
    assert model.num_parameters() < 8e6
    assert resolve_checkpoint("nano") == resolve_checkpoint("Nano") == NANO
    assert list_aliases()[0] == "nano"


def test_a_model_in_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").touch()
    assert resolve_checkpoint("nano") == "nano"


def test_cuts_out_what_stands_out(scene):
    image, mask = scene
    cutout = load_pipeline("nano")(image)
    alpha = np.asarray(cutout.getchannel("A"))
    assert cutout.size == image.size
    assert intersection_over_union(alpha > 127, mask) > 0.85
    assert alpha[~mask].mean() < 25 and alpha[mask].mean() > 200


def test_stock_pipeline_gives_label_and_score(scene):
    image, mask = scene
    (segment,) = pipeline("image-segmentation", model=NANO)(image)
    assert segment["label"] == "foreground"
    assert 0.8 < segment["score"] <= 1
    assert intersection_over_union(np.asarray(segment["mask"]) > 0, mask) > 0.85


def test_bfloat16_keeps_soft_edges():
    """The backbone stays in float32: in bfloat16 a twentieth of the pixels would be further off."""
    photos = list_images(Path(__file__).parents[1] / "space" / "examples")
    assert len(photos) > 1
    exact, rounded = (
        load_pipeline("nano", output_type="mask", device="cpu", dtype=dtype) for dtype in (None, "bfloat16")
    )
    assert rounded.model.decoder.mask_head.weight.dtype == torch.bfloat16
    difference = [np.abs(np.asarray(exact(str(path)), int) - np.asarray(rounded(str(path)), int)) for path in photos]
    assert (np.concatenate([values.ravel() for values in difference]) <= 2).mean() >= 0.999


def test_the_backbone_never_becomes_bfloat16():
    """However the network becomes so, and wherever it goes from there."""
    loaded = BiRefNetForImageSegmentation.from_pretrained(NANO, dtype=torch.bfloat16)
    exact = BiRefNetForImageSegmentation.from_pretrained(NANO, dtype=torch.float32)
    cast = load_pipeline(copy.deepcopy(exact), dtype="bfloat16").model
    for model in (cast, copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).half().to(torch.bfloat16)):
        for (name, tensor), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name
    assert cast.to("meta").backbone.stages[0][0].weight.dtype == torch.float32
    assert exact.half().backbone.stages[0][0].weight.dtype == torch.float16


def test_bfloat16_is_saved_as_it_is(tmp_path):
    model = BiRefNetForImageSegmentation.from_pretrained(NANO, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = BiRefNetForImageSegmentation.from_pretrained(tmp_path)
    assert model.dtype == again.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in again.parameters()] == [tensor.dtype for tensor in model.parameters()]


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.13"), reason="5.12 casts what it offloads to disk"
)
def test_bfloat16_with_the_backbone_on_disk(tmp_path):
    """What stays in float32 is offloaded so, and counters stay integers."""
    modules = {"backbone": "disk", "squeeze_module": "cpu", "decoder": "cpu", "criterion": "cpu"}
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = BiRefNetForImageSegmentation.from_pretrained(NANO, dtype=torch.bfloat16)
    offloaded = BiRefNetForImageSegmentation.from_pretrained(
        NANO, dtype=torch.bfloat16, device_map=modules, offload_folder=tmp_path
    )
    whole.backbone.fusable_kinds = set()  # layer by layer, as it goes from the disk
    with torch.no_grad():
        assert torch.equal(offloaded(pixel_values).logits, whole(pixel_values).logits)
    assert {buffer.dtype for name, buffer in whole.named_buffers() if "num_batches" in name} == {torch.int64}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_loaded_file_is_let_go(tmp_path):
    folder = shutil.copytree(NANO, tmp_path / "copy")
    model = BiRefNetForImageSegmentation.from_pretrained(folder, dtype=torch.float32)  # the file is in float16
    assert model.backbone.stages[0][1].num_batches_tracked > 0
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_an_empty_scene_gives_no_object():
    alpha = load_pipeline("nano", output_type="mask")(Image.new("RGB", (200, 150), (90, 120, 160)))
    assert np.asarray(alpha).max() < 255
    assert np.asarray(alpha).mean() < 64


def test_every_training_of_make_nano_is_accepted():
    """The parts take hours: what one refuses of its settings should not wait for the ones before it."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    folders = re.search(r"foreach name,([A-Z ]+),", text)[1].split()
    output = subprocess.run(
        ["make", "--dry-run", "nano", *(f"{name}={name.lower()}" for name in folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    train = load_script(ROOT / "scripts" / "train.py")
    made, settings = set(), []
    for line in output.replace("\\\n", " ").splitlines():
        script, words = (
            (match[1], shlex.split(match[2])) if (match := re.search(r"(\w+)\.py (.*)", line)) else ("", [])
        )
        if script == "train":
            arguments = train.parse_arguments([str(ROOT / word) if word.endswith(".yaml") else word for word in words])
            assert arguments.model is None or arguments.model in made
            settings.append(words[words.index("--config") + 1])
            made.add(str(arguments.output_dir))
        elif script == "mean":
            assert all(word.split("/checkpoints/")[0] in made for word in words[:-1])
            made.add(words[-1])
        elif script == "pack":
            assert made.issuperset(words)
    assert sorted(settings) == sorted(
        f"scripts/nano/{path.name}" for path in (ROOT / "scripts" / "nano").glob("*.yaml")
    )


def test_log_tells_the_training_in_its_order():
    rows = [json.loads(line) for line in (ROOT / "scripts" / "nano" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    measured = [row["validation/iou"] for row in rows if "validation/iou" in row]
    assert measured[0] < 0.3 and measured[-1] > 0.9
    pack = load_script(ROOT / "scripts" / "nano" / "pack.py")
    assert (ROOT / "scripts" / "nano" / "curve.svg").read_text() == pack.curve(rows)
