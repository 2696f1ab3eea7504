"""Puts a trained network into the package: half precision, and the log and the curve of its training beside the settings.

    python scripts/nano/pack.py MODEL_DIR FIRST_RUN_DIR … LAST_RUN_DIR

The card in src/birefnet_hf/nano/README.md is written by hand.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from birefnet_hf import NANO, BiRefNetForImageSegmentation, BiRefNetImageProcessor


HERE = Path(__file__).parent
CURVES = {"validation/iou": "#2563eb", "validation/s_measure": "#16a34a", "validation/mae": "#dc2626"}


def joined_log(folders: Sequence[Path]) -> list[dict[str, float]]:
    """The lines of the runs' logs, with the steps counted through."""
    rows, before = [], 0
    for folder in folders:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [row | {"step": row["step"] + before} for row in map(json.loads, lines)]
        before = rows[-1]["step"]
    return rows


def curve(rows: Sequence[dict[str, float]]) -> str:
    """An SVG of what validation measured, from 0 to 1, over the steps."""
    width, height, last = 640, 320, rows[-1]["step"]
    lines = []
    for number, (name, colour) in enumerate(CURVES.items()):
        points = " ".join(
            f"{40 + width * row['step'] / last:.1f},{20 + height * (1 - row[name]):.1f}" for row in rows if name in row
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{60 + 150 * number}" y="{height + 44}" fill="{colour}">{name.split("/")[1]}</text>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = 20 + height * (1 - value)
        lines.append(f'<path d="M40 {y}h{width}" stroke="#ccc"/><text x="4" y="{y + 4}" fill="#666">{value}</text>')
    lines.append(f'<text x="{width - 60}" y="{height + 44}" fill="#666">{last} steps</text>')
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 60} {height + 60}" font-size="13">\n{body}\n</svg>\n'


def main(folders: Sequence[Path]) -> None:
    packed, *runs = folders
    BiRefNetForImageSegmentation.from_pretrained(packed, dtype=torch.float16).save_pretrained(NANO)
    BiRefNetImageProcessor.from_pretrained(packed).save_pretrained(NANO)
    rows = joined_log(runs)
    (HERE / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (HERE / "curve.svg").write_text(curve(rows), encoding="utf-8")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
