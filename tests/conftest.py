"""Tiny networks and pictures that the tests share. Nothing here needs a network connection."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor


torch.set_num_threads(1)  # for networks as small as these, more threads cost time, above all on a busy machine


def load_script(path: Path) -> ModuleType:
    """A script as a module of its file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def tiny_settings(**changes) -> dict:
    """Keyword arguments of a BiRefNetConfig whose network has some 100 000 parameters."""
    settings = {
        "backbone": "swin",
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 2, 4),
        "window_size": 4,
        "inner_channels": 8,
        "branch_channels": 8,
        "image_channels": 4,
        "gradient_channels": 4,
        "image_size": (64, 64),
    }
    return settings | changes


@torch.no_grad()
def displace(model: BiRefNetForImageSegmentation) -> BiRefNetForImageSegmentation:
    """The model, whose deformable convolutions displace and modulate now, at random."""
    for name, parameter in model.named_parameters():
        if "offset_conv" in name or "modulator_conv" in name:
            parameter.normal_(std=0.1)
    return model


@pytest.fixture
def tiny_config() -> BiRefNetConfig:
    return BiRefNetConfig(**tiny_settings())


@pytest.fixture
def tiny_model(tiny_config) -> BiRefNetForImageSegmentation:
    """A random network in evaluation mode whose deformable convolutions do displace."""
    torch.manual_seed(0)
    return displace(BiRefNetForImageSegmentation(tiny_config).eval())


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A directory with a tiny network and its processor, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings())).eval().save_pretrained(folder)
    BiRefNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene() -> tuple[Image.Image, np.ndarray]:
    """A red ball on a bluish, uneven ground, and where it is: for the trained network of the package, "nano"."""
    y, x = np.mgrid[0:240, 0:320]
    ground = np.stack([60 + x // 8, 90 + y // 6, 140 + (x + y) // 10], axis=-1).astype(np.uint8)
    image = Image.fromarray(ground)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((90, 50, 230, 190), fill=255)
    shade = Image.radial_gradient("L").resize(image.size).point(lambda value: 230 - value // 2)
    ball = Image.merge("RGB", (shade, shade.point(lambda value: value // 4), shade.point(lambda value: value // 5)))
    image.paste(ball, mask=mask.filter(ImageFilter.GaussianBlur(0.7)))
    return image, np.asarray(mask) > 127


@pytest.fixture(scope="session", params=["float32", "float16"])
def released_dir(request, tiny_model_dir, tmp_path_factory) -> Path:
    """The same network laid out like a released repository: no architecture, no processor, references to remote code."""
    folder = tmp_path_factory.mktemp("released") / f"tiny-{request.param}"
    folder.mkdir()
    write_released_config(folder)
    tensors = load_file(tiny_model_dir / "model.safetensors")
    dtype = getattr(torch, request.param)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_released_config(folder: Path) -> None:
    """Writes the config.json that the released repositories have."""
    content = {
        "_name_or_path": "ZhengPeng7/BiRefNet",
        "architectures": ["BiRefNet"],
        "auto_map": {
            "AutoConfig": "BiRefNet_config.BiRefNetConfig",
            "AutoModelForImageSegmentation": "birefnet.BiRefNet",
        },
        "custom_pipelines": {
            "image-segmentation": {"pt": ["AutoModelForImageSegmentation"], "tf": [], "type": "image"}
        },
        "bb_pretrained": False,
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def copy_of(tmp_path):
    """Copies a directory into the test's own folder, so that the test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy
