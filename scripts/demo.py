"""Cuts out a photograph, offline: `make demo`, or python scripts/demo.py [PHOTO] [OUTPUT_DIR].

The network is the small one that ships with the package (alias `nano`, see src/birefnet_hf/nano/README.md): it shows how
things work and what to expect in form, not in quality, of a released BiRefNet.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging

from birefnet_hf import load_pipeline
from birefnet_hf.image_loading import load_image, save_image


PHOTO = Path(__file__).parents[1] / "space" / "examples" / "lemur.jpg"
PHOTO_CREDIT = "a ruffed lemur, by Mathias Appel, CC0 (space/examples/SOURCES.md)"
LARGEST_SIDE = 1200  # of either half of the picture to look at
SQUARE = 16


def before_and_after(photo: Image.Image, cutout: Image.Image) -> Image.Image:
    """The photo beside its cut-out on a checkerboard, at most `LARGEST_SIDE` pixels each."""
    scale = min(1.0, LARGEST_SIDE / max(photo.size))
    width, height = (max(1, round(side * scale)) for side in photo.size)
    squares = (np.indices((height, width)) // SQUARE).sum(axis=0) % 2
    board = Image.fromarray(np.where(squares, 204, 255).astype(np.uint8)).convert("RGBA")
    board.alpha_composite(cutout.resize((width, height)))
    picture = Image.new("RGB", (2 * width, height))
    picture.paste(photo.resize((width, height)), (0, 0))
    picture.paste(board.convert("RGB"), (width, 0))
    return picture


def released_command(photo: Path, output_dir: Path) -> str:
    """The command line that does the same with a released checkpoint."""
    program = Path(sys.executable).with_name("birefnet")
    paths = [path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in (program, photo)]
    return shlex.join([*map(str, paths), "-o", str(output_dir / "general.png"), "--model", "general"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cut out a photograph, offline, with the network of the package.")
    parser.add_argument("photo", nargs="?", type=Path, default=PHOTO)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args(argv)
    names = {
        "cutout.png": "the cut-out, transparent",
        "mask.png": "its mask, 255 for foreground",
        "before_after.png": "both to look at, on a checkerboard",
    }
    if arguments.photo.resolve() in [(arguments.output_dir / name).resolve() for name in names]:
        parser.error(f"{arguments.photo} would be replaced by a result; name another output_dir.")

    logging.disable_progress_bar()
    try:
        photo = load_image(arguments.photo)
        pipe = load_pipeline("nano")
        start = time.monotonic()
        cutout = pipe(photo)
        seconds = time.monotonic() - start
        pictures = (cutout, cutout.getchannel("A"), before_and_after(photo, cutout))
        for name, picture in zip(names, pictures, strict=True):
            save_image(picture, arguments.output_dir / name)
    except (OSError, ValueError) as error:  # no such photo, no image, no place to write to
        print(f"demo.py: {error}", file=sys.stderr)
        return 1

    credit = f" ({PHOTO_CREDIT})" if arguments.photo == PHOTO else ""
    print(f"{arguments.photo.name}{credit}: {photo.width} × {photo.height} pixels, {seconds:.1f} s on {pipe.device}")
    for name, meaning in names.items():
        print(f"  {arguments.output_dir / name}  {meaning}")
    print(
        "\nThis is nano, the small network of the package, with coarse edges. Real work wants a released checkpoint;\n"
        "the general one, ZhengPeng7/BiRefNet, is downloaded (444 MB, once) and used by\n"
        f"  {released_command(arguments.photo, arguments.output_dir)}\n"
        'or in Python by load_pipeline("general"). README.md lists the others.'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
