"""Foreground colours without the background that shines through soft edges, and compositing, in torch on any device.

Images are float tensors in [0, 1], channels first.
"""

import os
from numbers import Integral
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps

from .image_loading import convert_colours, load_image, rgb_profile, to_rgb


# Weight of the fallback where a window holds nothing of a layer.
EPSILON = 1e-5
# Alpha that is stored as 0 or 255 counts as none or full: a sigmoid reaches neither.
HALF_STEP = 0.5 / 255
# Side of the blur's window in pixels of a level, and how often it runs at full, at half and at every coarser resolution.
WINDOW = 3
PASSES = (1, 1, 4)
# Side of a tile in pixels. On a CPU the work on a tile stays in the cache; accelerators want few, large operations.
TILE = 256
TILE_ON_ACCELERATORS = 2048


@torch.no_grad()
def refine_foreground(
    image: torch.Tensor, alpha: torch.Tensor, kernels: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Estimates the foreground's own colours, so that a cut-out carries none of its old background.

    Blur fusion (Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021): the colours of foreground and
    background around a pixel, averaged over a box, are corrected by what the two together fail to explain of the pixel.
    Upstream does it twice, with a wide and a narrow box of fixed size. Here it goes from a single pixel to full
    resolution, doubling the size at each level, and corrects the background, too: no box has to suit the photo's size.

    Args:
        image: (B, 3, H, W) or (3, H, W), float in [0, 1].
        alpha: (B, 1, H, W), (1, H, W) or (H, W), float in [0, 1].
        kernels: Sides of upstream's boxes in pixels, to run its estimator instead; (90, 6) are its own. The result is
            that of its CPU version except near borders, where boxes end here and the image is mirrored there.

    Returns:
        Shape and dtype of `image`. Where alpha is 1 it is the image itself, where it is 0 colours of the foreground
        nearby go on.

    Raises:
        ValueError: the shapes do not fit, or the values are no floats.
    """
    _check_shapes(image, alpha)
    if not (image.is_floating_point() and alpha.is_floating_point()):
        raise ValueError(
            f"Image and alpha must be floats in [0, 1], not {image.dtype} and {alpha.dtype}: divide by 255."
        )
    images = image if image.dim() == 4 else image[None]
    alphas = alpha.reshape(len(images), 1, *alpha.shape[-2:])
    pairs = [(picture.float(), matte.float()) for picture, matte in zip(images, alphas, strict=True)]
    if kernels is None:
        refined = [_refine_coarse_to_fine(picture, matte) for picture, matte in pairs]
    else:
        refined = [_refine_as_upstream(picture, matte, kernels) for picture, matte in pairs]
    return torch.stack(refined).reshape(image.shape).to(image.dtype)


def _refine_coarse_to_fine(image: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The default of `refine_foreground`, for one image (3, H, W) with alpha (1, H, W)."""
    tile = TILE if image.device.type == "cpu" else TILE_ON_ACCELERATORS
    num_levels = (max(image.shape[-2:]) - 1).bit_length() + 1
    coarsest = (slice(None), *(slice(None, None, 2 ** (num_levels - 1)),) * 2)
    layers = image[coarsest].repeat(2, 1, 1)  # (6, 1, 1): both layers start from the image
    for level in reversed(range(num_levels)):
        # Pixels are left out, not averaged: each that stays obeys the compositing equation.
        step = (slice(None), *(slice(None, None, 2**level),) * 2)
        level_image, level_alpha = image[step], alpha[step]
        num_passes = PASSES[min(level, len(PASSES) - 1)]
        height, width = level_alpha.shape[-2:]
        coarser, layers = layers, image.new_empty((6 if level else 3, height, width))
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                inside = (slice(None), slice(top, top + tile), slice(left, left + tile))
                # Each pass spoils one more pixel along those edges of a tile that are not the image's.
                y, x = max(0, top - num_passes), max(0, left - num_passes)
                around = (slice(None), slice(y, top + tile + num_passes), slice(x, left + tile + num_passes))
                core = (slice(None), slice(top - y, top - y + tile), slice(left - x, left - x + tile))
                picture, matte = level_image[around], level_alpha[around]
                is_soft = bool(((matte > HALF_STEP) & (matte < 1 - HALF_STEP)).any())
                # Without a soft pixel, too, both layers are in a coarse tile; at full resolution nothing mixes them.
                is_mixed = is_soft or (level > 0 and bool(matte.amin() < 0.5 <= matte.amax()))
                if level == 0 and not is_soft and bool((matte[core] > HALF_STEP).all()):
                    layers[inside] = picture[core]
                    continue
                estimate = coarser if level == num_levels - 1 else _double(coarser, y, x, *matte.shape[-2:])
                if is_mixed:
                    picture, matte = picture.contiguous(), matte.contiguous()
                    for _ in range(num_passes):
                        estimate = _blur(*_correct(picture, matte, estimate), matte, WINDOW, fallback=estimate)
                if level > 0:
                    layers[inside] = estimate[core]
                else:
                    colours = _correct(picture, matte, estimate)[0] if is_mixed else estimate[:3]
                    layers[inside] = torch.where(matte[core] >= 1 - HALF_STEP, picture[core], colours[core])
    return layers


def _refine_as_upstream(image: torch.Tensor, alpha: torch.Tensor, kernels: tuple[int, ...]) -> torch.Tensor:
    """Upstream's estimator (image_proc.py, FB_blur_fusion_foreground_estimator_cpu_2) for one image."""
    foreground = background = image
    for kernel in kernels:
        layers = _blur(foreground, background, alpha, kernel)
        foreground, background = _correct(image, alpha, layers)[0], layers[3:]
    return torch.where(alpha >= 1 - HALF_STEP, image, foreground)


def _correct(image: torch.Tensor, alpha: torch.Tensor, layers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves both layers by their shares of what their composite misses of the image.

    Args:
        image: (3, H, W).
        alpha: (1, H, W).
        layers: (6, H, W), foreground and background.

    Returns:
        Foreground and background, each (3, H, W).
    """
    foreground, background = layers.split(3)
    missing = image - torch.lerp(background, foreground, alpha)
    return (
        torch.addcmul(foreground, alpha, missing).clamp_(0, 1),
        torch.addcmul(background, 1 - alpha, missing).clamp_(0, 1),
    )


def _blur(
    foreground: torch.Tensor,
    background: torch.Tensor,
    alpha: torch.Tensor,
    kernel: int,
    fallback: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Means of both layers over a box, weighted by alpha and its complement.

    Args:
        foreground, background: (3, H, W).
        alpha: (1, H, W).
        kernel: Side of the box in pixels.
        fallback: (6, H, W), what the means tend to where the weights vanish; black by default, as upstream.

    Returns:
        (6, H, W).
    """
    rest = 1 - alpha
    sums = _box_sum(torch.cat((foreground * alpha, background * rest, alpha, rest)), kernel)
    floor = EPSILON * kernel**2
    means = sums[:6] + floor * fallback
    means[:3] /= sums[6:7] + floor
    means[3:] /= sums[7:8] + floor
    return means


def _box_sum(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over size × size pixels, of them those within the map: (C, H, W) → the same. An even size reaches one pixel
    further up and left, as OpenCV's box does.

    Boxes are put together from boxes of 1, 2, 4, … pixels, which takes few additions and loses no precision, as the
    difference of two running sums would.
    """
    before, after = size // 2, (size - 1) // 2
    maps = F.pad(maps, (before, after, before, after))
    for dim in (1, 2):
        length = maps.shape[dim] - size + 1
        total, reached, part = None, 0, 1
        while part <= size:
            if size & part:
                piece = maps.narrow(dim, reached, length)
                total = piece if total is None else total + piece
                reached += part
            if 2 * part <= size:
                rest = maps.shape[dim] - part
                maps = maps.narrow(dim, 0, rest) + maps.narrow(dim, part, rest)
            part *= 2
        maps = total
    return maps


def _double(layers: torch.Tensor, y: int, x: int, height: int, width: int) -> torch.Tensor:
    """The rectangle at (y, x) of `layers` at twice its resolution, each pixel repeated: (C, height, width)."""
    part = layers[None, :, y // 2 : (y + height + 1) // 2, x // 2 : (x + width + 1) // 2]
    pixels = F.interpolate(part, scale_factor=2, mode="nearest")[0]
    return pixels[:, y % 2 : y % 2 + height, x % 2 : x % 2 + width]


def parse_background(
    background: str | os.PathLike[str] | bytes | tuple[int, int, int] | Image.Image | np.ndarray | torch.Tensor,
    timeout: float | None = None,
) -> torch.Tensor | Literal["blur"]:
    """Reads a background that a user names.

    Args:
        background: A colour, as a name or code that PIL knows ("white", "#1a2b3c", "rgb(10, 20, 30)") or as three
            integers in [0, 255]; or an image, as `load_image` takes it, with its colour profile. "blur" and tensors are
            returned as they are.
        timeout: Seconds that fetching a URL may take.

    Returns:
        (3, 1, 1) for a colour and (3, height, width) for an image, float32 in [0, 1], in sRGB.

    Raises:
        ValueError: neither a colour nor an image.
    """
    if isinstance(background, torch.Tensor) or (isinstance(background, str) and background == "blur"):
        return background
    if isinstance(background, tuple | list):
        if len(background) != 3 or not all(isinstance(value, Integral) and 0 <= value <= 255 for value in background):
            raise ValueError(f"background={tuple(background)} must be three integers from 0 to 255.")
        return torch.tensor([int(value) for value in background], dtype=torch.float32).view(3, 1, 1) / 255
    if isinstance(background, str) and not os.path.isfile(background):  # a folder "white" is no background
        try:
            return parse_background(ImageColor.getrgb(background)[:3])
        except ValueError as error:
            if "://" not in background and not background.startswith("data:") and not os.path.exists(background):
                raise ValueError(
                    f'background={background!r} is neither a colour (such as "white" or "#1a2b3c") nor a file.'
                ) from error
    image = load_image(background, timeout=timeout)
    return to_tensor(convert_colours(image, rgb_profile(image), None))


def composite(foreground: torch.Tensor, alpha: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Puts a foreground on a background.

    Args:
        foreground: (B, 3, H, W) or (3, H, W), float in [0, 1].
        alpha: (B, 1, H, W), (1, H, W) or (H, W), float in [0, 1].
        background: A colour (3, 1, 1), or an image (3, h, w) that is scaled to cover H × W and cut at its centre.

    Returns:
        Shape of `foreground`.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_shapes(foreground, alpha)
    height, width = foreground.shape[-2:]
    background = background.to(foreground.device, torch.float32)  # scaling knows no half precision on a CPU
    if background.shape[-2:] not in ((1, 1), (height, width)):
        # Cut first: scaled whole, a wide background of a tall image would have any number of pixels.
        scale = max(height / background.shape[-2], width / background.shape[-1])
        size = [
            min(side, max(1, round(target / scale)))
            for target, side in zip((height, width), background.shape[-2:], strict=True)
        ]
        top, left = ((side - kept) // 2 for side, kept in zip(background.shape[-2:], size, strict=True))
        background = background[None, :, top : top + size[0], left : left + size[1]]
        background = F.interpolate(background, (height, width), mode="bilinear", antialias=True)[0].clamp_(0, 1)
    alpha = alpha.reshape(*foreground.shape[:-3], 1, height, width).to(foreground.dtype)
    return torch.lerp(background.to(foreground.dtype).expand_as(foreground), foreground, alpha)


def cut_out(image: Image.Image, alpha: Image.Image, refine: bool = True) -> Image.Image:
    """The image with alpha as its fourth channel.

    Args:
        image: PIL image; EXIF orientation is applied, and transparency it may have is dropped.
        alpha: PIL image of the upright image's size, as the pipelines give it; converted to "L".
        refine: Whether to estimate the foreground's colours, see `refine_foreground`.

    Returns:
        PIL image in mode RGBA, with the image's colour profile.

    Raises:
        ValueError: the sizes differ.
    """
    image, alpha = to_rgb(ImageOps.exif_transpose(image)), alpha.convert("L")
    if image.size != alpha.size:
        raise ValueError(
            f"The image has, upright, {image.size} pixels, its alpha {alpha.size}; they must agree. What a camera stored "
            "lying on its side becomes upright by `load_image`: compute alpha from that."
        )
    profile = rgb_profile(image)
    if refine:
        colours = refine_foreground(to_tensor(image), to_tensor(alpha))
        image = Image.fromarray(to_uint8(colours).permute(1, 2, 0).numpy())
    image.putalpha(alpha)
    image.info.pop("icc_profile", None)
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    """Floats in [0, 1] to the nearest of 0..255 (the reference cuts off instead, half a step darker on average)."""
    return (values * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image to (channels, H, W) float32 in [0, 1]."""
    array = torch.from_numpy(np.array(image))
    return (array[None] if array.dim() == 2 else array.permute(2, 0, 1)).to(torch.float32) / 255


def _check_shapes(image: torch.Tensor, alpha: torch.Tensor) -> None:
    if image.dim() not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"An image has shape (B, 3, H, W) or (3, H, W), not {tuple(image.shape)}.")
    if alpha.shape[-2:] != image.shape[-2:] or 3 * alpha.numel() != image.numel():
        raise ValueError(
            f"Alpha of shape {tuple(alpha.shape)} does not fit an image of shape {tuple(image.shape)}: it needs one "
            "channel and the image's height and width."
        )


__all__ = ["composite", "cut_out", "parse_background", "refine_foreground", "to_uint8"]
