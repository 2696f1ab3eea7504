"""Writes the mean of several networks, which keeps what a part of the training has forgotten.

python scripts/nano/mean.py TRAINED_DIR EARLIER_DIR … OUTPUT_DIR
"""

import sys

import torch

from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor


def main(*folders: str) -> None:
    *inputs, output = folders
    model, *others = (BiRefNetForImageSegmentation.from_pretrained(folder, dtype=torch.float32) for folder in inputs)
    weights = [other.state_dict() for other in others]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # the batch norms' statistics, too
            tensor.copy_(torch.stack([tensor, *(other[name] for other in weights)]).mean(dim=0))
    model.save_pretrained(output)
    BiRefNetImageProcessor.from_pretrained(inputs[0]).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
