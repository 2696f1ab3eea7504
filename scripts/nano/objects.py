"""Gathers the cut-outs of the eleventh part of the training: renderings of 3D models among a part of the earlier ones.

    python scripts/nano/objects.py RENDERED_DIR EARLIER_DIR OUTPUT_DIR

RENDERED_DIR is what `models.py` wrote, EARLIER_DIR the cut-outs of the tenth part. OUTPUT_DIR/training gets each
rendering three times, photographs, and every second of the other cut-outs; OUTPUT_DIR/validation the renderings of one
model in nine.
"""

import shutil
import sys
from collections import Counter
from pathlib import Path

from birefnet_hf.synthesis import list_images


REPEATS = 3
PHOTOGRAPHS = {"photo", "photograph"}  # how the names of all of which stay begin


def main(rendered: str, earlier: str, output: str) -> None:
    training, validation = Path(output) / "training", Path(output) / "validation"
    for folder in (training, validation):
        folder.mkdir(parents=True, exist_ok=True)
    renderings = list_images(rendered)
    models = sorted({path.stem.rsplit("_", 1)[0] for path in renderings})
    held_out = set(models[4::9])
    for path in renderings:
        if path.stem.rsplit("_", 1)[0] in held_out:
            shutil.copy(path, validation)
        else:
            for repeat in range(REPEATS):
                shutil.copy(path, training / f"model_{path.stem}_{repeat}{path.suffix}")
    seen = Counter()
    for path in list_images(earlier):
        kind = path.stem.split("_")[0]
        if kind in PHOTOGRAPHS or seen[kind] % 2 == 0:
            shutil.copy(path, training)
        seen[kind] += 1
    print(f"{len(list_images(training))} cut-outs; {len(held_out)} of {len(models)} models held out.")


if __name__ == "__main__":
    main(*sys.argv[1:])
