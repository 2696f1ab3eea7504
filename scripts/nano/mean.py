"""Writes the mean of several networks, which keeps what a part of the training has forgotten.

python scripts/nano/mean.py TRAINED_DIR EARLIER_DIR … OUTPUT_DIR

Of a checkpoint of `scripts/train.py` (RUN_DIR/checkpoints/step-…) it takes the averaged weights.
"""

import sys
from pathlib import Path

import torch

from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor


def load(folder: Path) -> BiRefNetForImageSegmentation:
    """The network of a run, or of a checkpoint within one, in float32."""
    if not (folder / "training_state.json").exists():
        return BiRefNetForImageSegmentation.from_pretrained(folder, dtype=torch.float32)
    model = load(folder.parents[1])
    average = torch.load(folder / "custom_checkpoint_0.pkl", map_location="cpu", weights_only=True)
    weights = {name.removeprefix("module."): tensor for name, tensor in average.items()}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def main(*folders: str) -> None:
    *inputs, output = folders
    model, *others = (load(Path(folder)) for folder in inputs)
    weights = [other.state_dict() for other in others]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # the batch norms' statistics, too
            tensor.copy_(torch.stack([tensor, *(other[name] for other in weights)]).mean(dim=0))
    model.save_pretrained(output)
    BiRefNetImageProcessor.from_pretrained(inputs[0]).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
