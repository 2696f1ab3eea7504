"""Gathers the pictures of the last parts of the training: cut-outs (drawings, photographs, renderings) and backgrounds.

    python scripts/nano/gather.py DRAWINGS_DIR DEBIAN_DIR OUTPUT_DIR [RENDERINGS_DIR]

SOURCES.md says what the folders hold. OUTPUT_DIR/training/{cutouts,backgrounds} gets what is trained on,
OUTPUT_DIR/validation/{cutouts,backgrounds} what is held out: the drawings that the first parts hold out too, one cut-out
photograph and one rendering in ten (each kind by itself in drawings/, photos/ and renderings/), and the backgrounds named
below.
"""

import itertools
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from birefnet_hf.image_loading import load_image
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
# Photographs of nothing in particular: what is to be seen as background, the greenery above all.
TUXPAINT, MATE, PLASMA = "tuxpaint/templates", "backgrounds/mate/nature", "wallpapers"
BACKGROUNDS = [
    f"{TUXPAINT}/burnt_bark.jpg",
    f"{TUXPAINT}/cliff.jpg",
    f"{TUXPAINT}/mossy_bark.jpg",
    f"{TUXPAINT}/mudstone.jpg",
    f"{TUXPAINT}/ocean_splash.jpg",
    f"{TUXPAINT}/redwoods_above.jpg",
    f"{TUXPAINT}/sun_behind_clouds.jpg",
    f"{TUXPAINT}/sun_behind_leaves.jpg",
    f"{TUXPAINT}/trees_above.jpg",
    f"{TUXPAINT}/trees_at_dusk.jpg",
    f"{TUXPAINT}/wool_mill_machine.jpg",
    f"{MATE}/Blinds.jpg",
    f"{MATE}/Dune.jpg",
    f"{MATE}/RainDrops.jpg",
    f"{MATE}/Storm.jpg",
    f"{MATE}/Wood.jpg",
    f"{PLASMA}/BytheWater/contents/images/2560x1600.jpg",
    f"{PLASMA}/ColdRipple/contents/images/2560x1600.jpg",
    f"{PLASMA}/ColorfulCups/contents/images/2560x1600.jpg",
    f"{PLASMA}/EveningGlow/contents/images/2560x1600.jpg",
    f"{PLASMA}/FallenLeaf/contents/images/2560x1600.jpg",
    f"{PLASMA}/Grey/contents/images/2560x1600.jpg",
    f"{PLASMA}/Path/contents/images/2560x1600.jpg",
    "backgrounds/Dragonfly_by_Bolly.jpg",
]
HELD_OUT_BACKGROUNDS = [
    f"{TUXPAINT}/corn_maze.jpg",
    f"{TUXPAINT}/mossy_log.jpg",
    f"{TUXPAINT}/ocean_waves.jpg",
    f"{TUXPAINT}/rocks.jpg",
    f"{MATE}/GreenMeadow.jpg",
    f"{PLASMA}/DarkestHour/contents/images/2560x1600.jpg",
    f"{PLASMA}/OneStandsOut/contents/images/2560x1600.jpg",
    f"{PLASMA}/summer_1am/contents/images/2560x1600.jpg",
    f"{PLASMA}/Volna/contents/images/5120x2880.jpg",
]
LARGEST_BACKGROUND = 1600
# Photographs are what the network is for, and there are few of them.
PHOTO_REPEATS = 3
LARGEST = 512
LARGEST_PIXELS = 20_000_000
# Of the emoji that are renderings: most flags, faces and clocks, too many of a kind, are left out; of each person one
# skin stays.
TOO_MANY = re.compile(r"1f1e[6-9a-f]|1f1f|1f3f4|1f55|1f56[0-7]|1f6[0-2]|1f92|1f97[0-6]")
SKINS = re.compile(r"-1f3f[b-f]")
NUM_RENDERINGS = 900


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


def usable(paths: Iterable[Path], number: int | None = None) -> Iterator[Image.Image]:
    """The first cut-outs of those that have a clear object, all of them where no number is given."""
    return itertools.islice((image for path in paths if (image := cut_out(path)) is not None), number)


def files(folder: Path, kinds: list[str]) -> list[Path]:
    """The PNG files of those kinds, drawings among photographs left out."""
    found = sorted(path for kind in kinds for path in (folder / kind).rglob("*.png"))
    return [path for path in found if "cartoon" not in path.parts]


def renderings(folder: Path, rng: np.random.Generator) -> list[Path]:
    """The emoji of a folder that show an object, named by their code points; of those with several skins one by chance."""
    kinds: dict[str, list[Path]] = {}
    for path in list_images(folder):
        if not TOO_MANY.match(path.stem):
            kinds.setdefault(SKINS.sub("", path.stem), []).append(path)
    chosen = [paths[rng.integers(0, len(paths))] for _, paths in sorted(kinds.items())]
    return [chosen[index] for index in rng.permutation(len(chosen))]


def background(path: Path, output: Path) -> None:
    """Writes the photograph, no larger than it is needed."""
    image = load_image(str(path))
    image.thumbnail((LARGEST_BACKGROUND, LARGEST_BACKGROUND))
    image.save(output / f"{'_'.join(path.with_suffix('').parts[-4:])}.jpg", quality=92)


def main(drawings_folder: str, debian: str, output: str, renderings_folder: str | None = None) -> None:
    training, validation = Path(output) / "training", Path(output) / "validation"
    cutouts = training / "cutouts"
    for folder in (cutouts, training / "backgrounds"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("cutouts", "drawings", "photos", "renderings", "backgrounds"):
        (validation / name).mkdir(parents=True, exist_ok=True)

    drawings = list_images(drawings_folder)
    if not drawings:
        sys.exit(f"{drawings_folder} holds no pictures: give the folder with the drawings, see SOURCES.md.")
    order = np.random.default_rng(0).permutation(len(drawings))  # as scripts/train.py --validation-fraction 0.1
    held_out = max(1, round(0.1 * len(drawings)))
    for place, index in enumerate(order):
        shutil.copy(drawings[index], validation / "drawings" if place < held_out else cutouts)

    rng = np.random.default_rng(1)
    photos = list(usable(files(Path(debian) / STAMPS, STAMP_KINDS)))
    chosen = set(rng.permutation(len(photos))[: len(photos) // 10].tolist())
    for index, photo in enumerate(photos):
        folder, repeats = (validation / "photos", 1) if index in chosen else (cutouts, PHOTO_REPEATS)
        for repeat in range(repeats):
            photo.save(folder / f"photo_{index:03d}_{repeat}.png")

    clipart = files(Path(debian) / CLIPART, CLIPART_KINDS)
    clipart = [clipart[index] for index in rng.permutation(len(clipart))]
    for index, image in enumerate(usable(clipart, NUM_CLIPART)):
        image.save(cutouts / f"clipart_{index:03d}.png")

    if renderings_folder:
        paths = renderings(Path(renderings_folder), np.random.default_rng(2))
        for index, image in enumerate(usable(paths, NUM_RENDERINGS)):
            folder = cutouts if index % 10 else validation / "renderings"
            image.save(folder / f"rendering_{index:03d}.png")

    for kind in ("drawings", "photos", "renderings"):
        for path in list_images(validation / kind):
            shutil.copy(path, validation / "cutouts")

    for path in list_images(Path(__file__).parent / "backgrounds"):
        shutil.copy(path, training / "backgrounds")
    for names, folder in ((BACKGROUNDS, training), (HELD_OUT_BACKGROUNDS, validation)):
        for name in names:
            background(Path(debian) / "usr/share" / name, folder / "backgrounds")
    print(f"{len(drawings)} drawings, {len(photos)} photographs, {len(BACKGROUNDS)} backgrounds.")


if __name__ == "__main__":
    main(*sys.argv[1:])
