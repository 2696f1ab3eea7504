"""Gathers the cut-outs of the last part of the training: drawings, and photographs with transparency.

    apt-get download tuxpaint-stamps-default openclipart-png
    for package in *.deb; do dpkg-deb -x "$package" debian; done
    python scripts/nano/cutouts.py DRAWINGS_DIR debian OUTPUT_DIR

OUTPUT_DIR/training gets what is trained on, OUTPUT_DIR/validation what is held out: the drawings that the earlier parts
hold out too, and one photograph in ten.
"""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from birefnet_hf.synthesis import list_images


STAMPS = "usr/share/tuxpaint/stamps"
STAMP_KINDS = [
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "medical",
    "military",
    "plants",
    "seasonal",
    "sports",
    "vehicles",
]
CLIPART = "usr/share/openclipart/png"
CLIPART_KINDS = [
    "animals",
    "buildings",
    "containers",
    "education",
    "electronics",
    "food",
    "office",
    "plants",
    "science",
    "tools",
    "transportation",
]
NUM_CLIPART = 500
# Photographs are what the network is for, and there are few of them.
PHOTO_REPEATS = 3
LARGEST = 512
LARGEST_PIXELS = 20_000_000


def cut_out(path: Path) -> Image.Image | None:
    """The cut-out without its empty margin, at most `LARGEST` pixels wide and high; None where there is no clear object."""
    with Image.open(path) as opened:
        if opened.width * opened.height > LARGEST_PIXELS:
            return None
        image = opened.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 64:
        return None
    image = image.crop(box)
    alpha = np.asarray(image.getchannel("A"))
    # No outline, no glass or glow, no picture without a hole.
    if (alpha > 250).mean() < 0.25 or ((alpha > 5) & (alpha < 250)).mean() > 0.3 or (alpha > 128).mean() > 0.97:
        return None
    image.thumbnail((LARGEST, LARGEST))
    return image


def files(folder: Path, kinds: list[str]) -> list[Path]:
    """The PNG files of those kinds, drawings among photographs left out."""
    found = sorted(path for kind in kinds for path in (folder / kind).rglob("*.png"))
    return [path for path in found if "cartoon" not in path.parts]


def main(drawings_folder: str, debian: str, output: str) -> None:
    training, validation = Path(output) / "training", Path(output) / "validation"
    for folder in (training, validation):
        folder.mkdir(parents=True, exist_ok=True)

    drawings = list_images(drawings_folder)
    order = np.random.default_rng(0).permutation(len(drawings))  # as scripts/train.py --validation-fraction 0.1
    held_out = max(1, round(0.1 * len(drawings)))
    for place, index in enumerate(order):
        shutil.copy(drawings[index], validation if place < held_out else training)

    rng = np.random.default_rng(1)
    photos = [photo for path in files(Path(debian) / STAMPS, STAMP_KINDS) if (photo := cut_out(path)) is not None]
    chosen = set(rng.permutation(len(photos))[: len(photos) // 10].tolist())
    for index, photo in enumerate(photos):
        repeats = 1 if index in chosen else PHOTO_REPEATS
        for repeat in range(repeats):
            photo.save((validation if index in chosen else training) / f"photo_{index:03d}_{repeat}.png")

    clipart = files(Path(debian) / CLIPART, CLIPART_KINDS)
    clipart = [clipart[index] for index in rng.permutation(len(clipart))]
    usable = (image for path in clipart if (image := cut_out(path)) is not None)
    for index, image in enumerate(itertools.islice(usable, NUM_CLIPART)):
        image.save(training / f"clipart_{index:03d}.png")
    print(f"{len(drawings)} drawings, {len(photos)} photographs.")


if __name__ == "__main__":
    main(*sys.argv[1:])
