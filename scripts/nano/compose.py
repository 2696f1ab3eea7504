"""Composes pictures of cut-outs once, to train on them together with photographs that have masks.

    python scripts/nano/compose.py CUTOUTS_DIR BACKGROUNDS_DIR NUMBER OUTPUT_DIR

Writes OUTPUT_DIR/im and OUTPUT_DIR/gt. Each cut-out is the main object equally often.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from birefnet_hf.data import load_pairs, seeded_random
from birefnet_hf.synthesis import Compositor


SIZE = (512, 512)
SEED = 18


def write(numbers: range, indices: np.ndarray, cutouts: str, backgrounds: str, output: Path) -> None:
    """Composes and writes the pictures of these numbers, picture n of cut-out indices[n]."""
    rows = load_pairs(cutouts, compositor=Compositor(SIZE, backgrounds), check="off")
    for number in numbers:
        with seeded_random(SEED, 0, number):
            row = rows[int(indices[number])]
        row["image"].save(output / "im" / f"{number:05d}.jpg", quality=95)
        row["mask"].save(output / "gt" / f"{number:05d}.png")


def main(cutouts: str, backgrounds: str, number: str, output: str) -> None:
    folder, total = Path(output), int(number)
    for name in ("im", "gt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    length = len(load_pairs(cutouts, compositor=Compositor(SIZE, backgrounds)))
    rng = np.random.default_rng(SEED)
    indices = np.concatenate([rng.permutation(length) for _ in range(-(-total // length))])[:total]
    parts = [range(start, min(start + 50, total)) for start in range(0, total, 50)]
    with ProcessPoolExecutor() as pool:
        futures = [pool.submit(write, part, indices, cutouts, backgrounds, folder) for part in parts]
        for future in tqdm(futures, desc="Pictures, in fifties"):
            future.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
