"""Writes the network halfway between two, which keeps what a part of the training has forgotten.

python scripts/nano/mean.py TRAINED_DIR BEFORE_DIR OUTPUT_DIR
"""

import sys

import torch

from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor


def main(trained: str, before: str, output: str) -> None:
    model, other = (
        BiRefNetForImageSegmentation.from_pretrained(folder, dtype=torch.float32) for folder in (trained, before)
    )
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # the batch norms' statistics, too
            tensor.lerp_(weights[name], 0.5)
    model.save_pretrained(output)
    BiRefNetImageProcessor.from_pretrained(trained).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
