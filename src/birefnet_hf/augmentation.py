"""Augmentation of an image and its soft mask together, on top of torchvision's transforms.v2.

`build_augmentation` gives the recipes by name. Each transform works by itself and in `v2.Compose`, too, on a
`tv_tensors.Image` 3×H×W with a `SoftMask` 1×H×W.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


MEAN_COLOUR = (0.485, 0.456, 0.406)  # of ImageNet


class SoftMask(tv_tensors.TVTensor):
    """A mask 1×H×W that moves with its image and is interpolated like it.

    torchvision's own `Mask` holds class numbers and is therefore moved by nearest neighbour, which would tear soft
    edges. Operations on colour pass it by.
    """


def _moves_like_an_image(operation: Callable[..., torch.Tensor], kernel: Callable[..., torch.Tensor]) -> None:
    def move(mask: SoftMask, *args: Any, **kwargs: Any) -> SoftMask:
        return tv_tensors.wrap(kernel(mask.as_subclass(torch.Tensor), *args, **kwargs), like=mask)

    functional.register_kernel(operation, SoftMask)(move)


_moves_like_an_image(functional.horizontal_flip, functional.horizontal_flip_image)
_moves_like_an_image(functional.affine, functional.affine_image)
_moves_like_an_image(functional.crop, functional.crop_image)


def _chance(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class _RandomChange(nn.Module):
    """Something that happens to an image 3×H×W and its mask 1×H×W with some probability."""

    def __init__(self, probability: float = 1.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.change(image, mask) if _chance(self.probability) else (image, mask)

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class RandomCrop(_RandomChange):
    """Keeps a random part of image and mask: each side `smallest` to 1 of its length. Never crops the object away."""

    def __init__(self, smallest: float, probability: float) -> None:
        super().__init__(probability)
        self.smallest = smallest

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = (max(1, round(length * _uniform(self.smallest, 1.0))) for length in image.shape[-2:])
        top = int(torch.randint(image.shape[-2] - height + 1, ()))
        left = int(torch.randint(image.shape[-1] - width + 1, ()))
        cropped = functional.crop(mask, top, left, height, width)
        if not cropped.any():
            return image, mask
        return functional.crop(image, top, left, height, width), cropped


class RandomMove(_RandomChange):
    """Turns and scales image and mask about the centre; outside, the mean colour. Never moves the object out.

    torchvision's own filling would leave a dark seam around the picture.
    """

    def __init__(self, degrees: float, scale: tuple[float, float], probability: float) -> None:
        super().__init__(probability)
        self.move = v2.RandomAffine(degrees, scale=scale, interpolation=v2.InterpolationMode.BILINEAR, fill=None)

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = image.new_tensor(MEAN_COLOUR)[:, None, None]
        moved, moved_mask = self.move(tv_tensors.wrap(image - mean, like=image), mask)
        if mask.any() and not moved_mask.any():
            return image, mask
        return tv_tensors.wrap((moved + mean).clamp_(0, 1), like=image), moved_mask


class BicubicRotation(_RandomChange):
    """Turns image and mask by whole degrees in [-15, 14] about the centre, black outside, as upstream does.

    torchvision turns tensors at most bilinearly. Pillow's kernel, which upstream uses, is a little sharper. Source:
    image_proc.py, `random_rotate`.
    """

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = np.deg2rad(int(torch.randint(-15, 15, ())))
        height, width = image.shape[-2:]
        # In the unit coordinates of `grid_sample` both axes have length 2, whatever the picture's shape.
        matrix = [
            [np.cos(angle), -np.sin(angle) * height / width, 0.0],
            [np.sin(angle) * width / height, np.cos(angle), 0.0],
        ]
        both = torch.cat([image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)])[
            None
        ]  # (1, 4, height, width)
        grid = nn.functional.affine_grid(both.new_tensor(matrix)[None], list(both.shape), align_corners=False)
        turned = nn.functional.grid_sample(both, grid, mode="bicubic", align_corners=False)[0].clamp_(0, 1)
        return tv_tensors.wrap(turned[:3], like=image), tv_tensors.wrap(turned[3:], like=mask)


def adjust_sharpness(image: tv_tensors.Image, factor: float) -> tv_tensors.Image:
    """torchvision's function of this name, for values in [0, 1], in a quarter of its time.

    The blurred image (mean of 3×3 pixels, the middle one five-fold) is a sum of shifted images, since a convolution of
    one channel is slow on CPUs.

    Args:
        image: 3×H×W, floating point.
        factor: 0 for the blurred image, 1 for the image as it is, above for a sharper one. The border stays.
    """
    if min(image.shape[-2:]) < 3:
        return image
    pixels = image.as_subclass(torch.Tensor)
    middle = pixels[..., 1:-1, 1:-1]
    rows = (pixels[..., :-2, :] + pixels[..., 1:-1, :]).add_(pixels[..., 2:, :])
    blurred = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(middle, alpha=4)
    adjusted = pixels.clone()
    adjusted[..., 1:-1, 1:-1] = blurred.mul_((1 - factor) / 13).add_(middle, alpha=factor).clamp_(0, 1)
    return tv_tensors.wrap(adjusted, like=image)


class RandomColour(_RandomChange):
    """Changes brightness, contrast, saturation and sharpness by factors from the given ranges, in steps of 0.1."""

    def __init__(
        self,
        brightness: tuple[float, float],
        contrast: tuple[float, float],
        saturation: tuple[float, float],
        sharpness: tuple[float, float],
        probability: float = 1.0,
    ) -> None:
        super().__init__(probability)
        self.steps = (
            (functional.adjust_brightness, brightness),
            (functional.adjust_contrast, contrast),
            (functional.adjust_saturation, saturation),
            (adjust_sharpness, sharpness),
        )

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for adjust, (low, high) in self.steps:
            image = adjust(image, int(torch.randint(round(10 * low), round(10 * high) + 1, ())) / 10)
        return image, mask


class SaltAndPepper(_RandomChange):
    """Sets 0.15 % of the pixels to black or white."""

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = image.flatten(1).clone()  # (3, height * width)
        count = int(0.0015 * pixels.shape[1])
        where = torch.randint(pixels.shape[1], (count,))
        pixels[:, where] = torch.randint(2, (count,)).to(pixels.dtype)
        return tv_tensors.wrap(pixels.view(image.shape), like=image), mask


class BackgroundSynthesis(_RandomChange):
    """Puts the foreground on one colour: grey (0.4), near its own mean colour (0.4), or any (0.2).

    The foreground's colours are taken as they are: what shone through soft edges stays. Source: dataset.py:104-127.
    """

    def change(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = mask.as_subclass(torch.Tensor)
        kind = float(torch.rand(()))
        if kind < 0.4:
            colour = torch.rand(1).expand(3)
        elif kind < 0.8:
            colour = (image * alpha).sum((1, 2)) / alpha.sum().clamp(min=1)
            towards = float(_chance(0.5))
            colour = colour + (towards - colour) * _uniform(0, 0.2)
        else:
            colour = torch.rand(3)
        composed = image * alpha + colour.view(3, 1, 1) * (1 - alpha)
        return tv_tensors.wrap(composed.as_subclass(torch.Tensor), like=image), mask


class Augmentation(NamedTuple):
    """What happens to (image 3×H×W, mask 1×H×W) before and after the resize to the training size.

    Cropping is done first, where the pixels still are; all else after, where there are fewer. Before, both are uint8;
    after, float in [0, 1]. Chance comes from torch's global random numbers only.
    """

    before_resize: nn.Module
    after_resize: nn.Module


def build_augmentation(
    preset: Literal["none", "default", "upstream", "upstream-background"] = "default",
) -> Augmentation:
    """Builds one of the augmentations by name.

    "upstream" is the recipe of the released checkpoints (image_proc.py:107-182): flip 0.5; rotation 0.2, whole degrees
    in -15..14, bicubic, black; always brightness and contrast 0.5..1.5, saturation 0..2, sharpness 0..3; always 0.15 %
    salt and pepper. "upstream-background" is its variant with a synthetic background (always) and else only the flip.

    "default" differs: it also crops (0.3, each side 0.7..1, anywhere) and scales (with the rotation: 0.3, 0.8..1.25),
    since upstream's network only ever sees whole objects in whole pictures; fills with the mean colour instead of
    black, which otherwise gives the turned pictures away; changes colours in four pictures of five and less (0.7..1.3,
    saturation 0.5..1.5, sharpness 0.5..2), since users' pictures are not half as bright and thrice sharpened; and adds
    salt and pepper to one picture in ten, since no camera does.

    Args:
        preset: name, or "none" for evaluation.

    Returns:
        The augmentation for `TrainingDataset`.
    """
    flip = v2.RandomHorizontalFlip(0.5)
    match preset:
        case "none":
            return Augmentation(v2.Identity(), v2.Identity())
        case "upstream":
            colour = RandomColour((0.5, 1.5), (0.5, 1.5), (0.0, 2.0), (0.0, 3.0))
            after = [flip, BicubicRotation(0.2), colour, SaltAndPepper()]
            return Augmentation(v2.Identity(), v2.Compose(after))
        case "upstream-background":
            return Augmentation(v2.Identity(), v2.Compose([BackgroundSynthesis(), flip]))
        case "default":
            after = [
                flip,
                RandomMove(15, scale=(0.8, 1.25), probability=0.3),
                RandomColour((0.7, 1.3), (0.7, 1.3), (0.5, 1.5), (0.5, 2.0), probability=0.8),
                SaltAndPepper(0.1),
            ]
            return Augmentation(RandomCrop(0.7, probability=0.3), v2.Compose(after))
    raise ValueError(f"There is no augmentation {preset!r}: choose none, default, upstream or upstream-background.")
