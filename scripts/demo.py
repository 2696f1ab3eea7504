"""Cuts out a photograph, offline: `make demo`, or python scripts/demo.py [PHOTO] [OUTPUT_DIR].

The network is the small one that ships with the package (alias `nano`, see src/birefnet_hf/nano/README.md): it shows how
things work and what to expect in form, not in quality, of a released BiRefNet.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from birefnet_hf import load_pipeline
from birefnet_hf.image_loading import load_image, save_image


PHOTO = Path(__file__).parents[1] / "space" / "examples" / "chelsea_cat.png"
PHOTO_CREDIT = "Chelsea the cat, photograph by Stéfan van der Walt, CC0 (space/examples/SOURCES.md)"


def before_and_after(photo: Image.Image, cutout: Image.Image) -> Image.Image:
    """The photo beside its cut-out on a checkerboard."""
    width, height = photo.size
    square = 16
    board = Image.new("RGB", (width, height), (255, 255, 255))
    for top in range(0, height, square):
        for left in range(square * (top // square % 2), width, 2 * square):
            board.paste((204, 204, 204), (left, top, left + square, top + square))
    board.paste(cutout, mask=cutout.getchannel("A"))
    picture = Image.new("RGB", (2 * width, height))
    picture.paste(photo, (0, 0))
    picture.paste(board, (width, 0))
    return picture


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cut out a photograph, offline, with the network of the package.")
    parser.add_argument("photo", nargs="?", type=Path, default=PHOTO)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args(argv)

    pipe = load_pipeline("nano")
    photo = load_image(arguments.photo)
    cutout = pipe(photo)
    outputs = {
        "cutout.png": cutout,
        "mask.png": cutout.getchannel("A"),
        "before_after.png": before_and_after(photo, cutout),
    }
    for name, picture in outputs.items():
        save_image(picture, arguments.output_dir / name)
        print(f"wrote {arguments.output_dir / name}")
    if arguments.photo == PHOTO:
        print(f"Photo: {PHOTO_CREDIT}.")
    print(
        "This is the small network of the package. Real work wants a released checkpoint, with a network connection:\n"
        f"    {Path(sys.executable).with_name('birefnet')} {arguments.photo} -o {arguments.output_dir} --model general"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
