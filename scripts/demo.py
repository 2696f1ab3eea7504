"""Cuts out a photograph, offline: `make demo`, or python scripts/demo.py [PHOTO] [OUTPUT_DIR].

There is no trained checkpoint in this version yet, so a small network with random weights goes the same way as a real
one does: saved, loaded, run by the pipeline. What it writes shows that everything is installed, not what BiRefNet can do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor, load_pipeline
from birefnet_hf.image_loading import load_image, save_image


PHOTO = Path(__file__).parents[1] / "space" / "examples" / "chelsea_cat.png"
PHOTO_CREDIT = "Chelsea the cat, photograph by Stéfan van der Walt, CC0 (space/examples/SOURCES.md)"


def save_random_model(folder: Path) -> None:
    """Writes a small network with random weights, and its processor, as `save_pretrained` writes a real one."""
    torch.manual_seed(0)
    config = BiRefNetConfig(
        backbone="swin",
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=7,
        inner_channels=16,
        branch_channels=16,
        image_channels=16,
        gradient_channels=4,
        image_size=(256, 256),
    )
    BiRefNetForImageSegmentation(config).save_pretrained(folder)
    BiRefNetImageProcessor(size={"height": 256, "width": 256}).save_pretrained(folder)


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
    parser = argparse.ArgumentParser(description="Cut out a photograph, offline, with a small random network.")
    parser.add_argument("photo", nargs="?", type=Path, default=PHOTO)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args(argv)

    model_dir = arguments.output_dir / "random-model"
    save_random_model(model_dir)
    pipe = load_pipeline(str(model_dir))
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
        "The network has RANDOM weights: the mask means nothing. With a network connection, a released checkpoint does "
        f"it right:\n    {Path(sys.executable).with_name('birefnet')} {arguments.photo} -o {arguments.output_dir} --model general"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
