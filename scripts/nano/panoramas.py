"""Adds views of panoramas to the training's backgrounds: rooms, halls and streets, of which there are few otherwise.

    python scripts/nano/panoramas.py PANORAMAS_DIR BACKGROUNDS_DIR

PANORAMAS_DIR is the folder `hdri` of the npm package @pmndrs/assets, see SOURCES.md. Needs OpenEXR.
"""

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import OpenEXR
from PIL import Image


VIEWS = 3
SIDE = 512
FIELD_OF_VIEW = np.radians(95)
BRIGHTNESS = 0.2  # of the middle pixel, before gamma


def read_panorama(path: Path) -> np.ndarray:
    """The equirectangular panorama that the JavaScript module holds: (height, width, 3) float32, linear light."""
    encoded = re.search(r"base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8")).group(1)
    with OpenEXR.File(io.BytesIO(base64.b64decode(encoded))) as opened:
        channels = opened.channels()
        return (channels["RGB"] if "RGB" in channels else channels["RGBA"]).pixels[..., :3].astype(np.float32)


def view(panorama: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """What a camera sees that looks to `yaw` and up by `pitch` (radians): (SIDE, SIDE, 3), sampled bilinearly."""
    height, width = panorama.shape[:2]
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j] * np.tan(FIELD_OF_VIEW / 2)
    forward, up = np.cos(pitch) + y * np.sin(pitch), np.sin(pitch) - y * np.cos(pitch)
    column = (np.arctan2(x, forward) + yaw) / (2 * np.pi) * width
    row = np.clip((0.5 - np.arctan2(up, np.hypot(x, forward)) / np.pi) * height - 0.5, 0, height - 1.001)
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    along, down = (column - left)[..., None], (row - top)[..., None]
    left, right = left % width, (left + 1) % width
    upper = (1 - along) * panorama[top, left] + along * panorama[top, right]
    lower = (1 - along) * panorama[top + 1, left] + along * panorama[top + 1, right]
    return (1 - down) * upper + down * lower


def main(panoramas: str, backgrounds: str) -> None:
    rng = np.random.default_rng(3)
    paths = sorted(Path(panoramas).glob("*.exr.js"))
    if not paths:
        sys.exit(f"{panoramas} holds no panoramas (*.exr.js): see SOURCES.md.")
    for path in paths:
        # Lamps have negative rings from the compression, and would outshine their neighbours when sampled between.
        panorama = np.minimum(np.abs(read_panorama(path)), 50)
        start = rng.uniform(0, 2 * np.pi)
        for number in range(VIEWS):
            seen = view(panorama, start + 2 * np.pi * number / VIEWS, rng.normal(-0.1, 0.15))
            seen = np.clip(seen * BRIGHTNESS / max(float(np.median(seen)), 1e-3), 0, 1) ** (1 / 2.2)
            name = f"panorama_{path.name.split('.')[0]}_{number}.jpg"
            Image.fromarray((seen * 255).astype(np.uint8)).save(Path(backgrounds) / name, quality=92)
    print(f"{len(paths) * VIEWS} views of {len(paths)} panoramas.")


if __name__ == "__main__":
    main(*sys.argv[1:])
