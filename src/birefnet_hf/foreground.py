"""Foreground colours without the background that shines through soft edges, and compositing, in torch on any device.

Images are float tensors in [0, 1], channels first.
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps

from .image_loading import load_image


# Kernel sizes of the reference's two blurs (image_proc.py upstream, after Photoroom's blur fusion) in pixels. Upstream uses
# them for every size; here they grow with photos whose longer side exceeds REFERENCE_SIDE, as their soft edges do.
REFERENCE_KERNELS = (90, 6)
REFERENCE_SIDE = 1024
EPSILON = 1e-5
# Alpha that is stored as 0 or 255 counts as none or full: a sigmoid reaches neither.
HALF_STEP = 0.5 / 255
# Averages over a box are smooth: they are taken on a grid on which the box spans at least this many cells.
CELLS_PER_BOX = 6
TILE = 256
# What a tile sees of its neighbours starts at a multiple of this, so that all grids agree.
ALIGNMENT = 64


def refine_foreground(
    image: torch.Tensor, alpha: torch.Tensor, kernels: tuple[int, int] | None = None
) -> torch.Tensor:
    """Estimates the foreground's own colours, so that a cut-out carries none of its old background.

    Two passes of blur fusion (Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021): the colours of
    foreground and background around a pixel, averaged over a wide and then a narrow box, are corrected by what the two
    together fail to explain of the pixel. Only pixels with an alpha between 0 and 1 need it: the image is worked on in
    tiles, and those without such pixels are passed over.

    Args:
        image: (B, 3, H, W) or (3, H, W), float in [0, 1].
        alpha: (B, 1, H, W), (1, H, W) or (H, W), float in [0, 1].
        kernels: Sizes of the wide and the narrow box in pixels. By default the reference's 90 and 6, larger in proportion
            for images whose longer side exceeds 1024.

    Returns:
        Shape and dtype of `image`. Where alpha is 1 it is the image itself; where alpha is 0, colours continue smoothly
        from the edge near it and fade to black far from it.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_shapes(image, alpha)
    images = image if image.dim() == 4 else image[None]
    alphas = alpha.reshape(len(images), 1, *alpha.shape[-2:]).to(images.dtype)
    if kernels is None:
        scale = max(1.0, max(images.shape[-2:]) / REFERENCE_SIDE)
        kernels = tuple(round(kernel * scale) for kernel in REFERENCE_KERNELS)
    refined = [_refine(picture, matte, *kernels) for picture, matte in zip(images, alphas, strict=True)]
    return torch.stack(refined).reshape(image.shape)


def _refine(image: torch.Tensor, alpha: torch.Tensor, wide: int, narrow: int) -> torch.Tensor:
    """`refine_foreground` of one image (3, H, W) with alpha (1, H, W)."""
    height, width = image.shape[-2:]
    # First pass: foreground and background both start from the image.
    wide_colours, wide_step = _average_colours(image, image, alpha, wide)
    refined = torch.empty_like(image)
    margin = -(-narrow // ALIGNMENT) * ALIGNMENT
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            inside = (slice(None), slice(top, bottom), slice(left, right))
            lowest, highest = alpha[inside].aminmax()
            if lowest >= 1 - HALF_STEP:
                refined[inside] = image[inside]
            elif highest <= HALF_STEP:
                refined[inside] = _enlarge(wide_colours[:3], wide_step, (top, bottom), (left, right))
            else:
                # Second pass, on the tile and as much around it as the narrow box reaches.
                rows = max(0, top - margin), min(height, bottom + margin)
                columns = max(0, left - margin), min(width, right + margin)
                around = (slice(None), slice(*rows), slice(*columns))
                foreground, background = _enlarge(wide_colours, wide_step, rows, columns).split(3)
                foreground = _explain(image[around], alpha[around], foreground, background)
                colours, step = _average_colours(foreground, background, alpha[around], narrow)
                rows, columns = (top - rows[0], bottom - rows[0]), (left - columns[0], right - columns[0])
                foreground, background = _enlarge(colours, step, rows, columns).split(3)
                foreground = _explain(image[inside], alpha[inside], foreground, background)
                refined[inside] = torch.where(alpha[inside] >= 1 - HALF_STEP, image[inside], foreground)
    return refined


def _explain(
    image: torch.Tensor, alpha: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor
) -> torch.Tensor:
    """Moves the foreground by its share of what the composite of both colours misses of the image."""
    missing = image - torch.lerp(background, foreground, alpha)
    return (foreground + alpha * missing).clamp_(0, 1)


def _average_colours(
    foreground: torch.Tensor, background: torch.Tensor, alpha: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, int]:
    """Averages of both colours over a box, weighted by alpha and its complement, on a grid as coarse as the box allows.

    Args:
        foreground, background: (3, H, W).
        alpha: (1, H, W).
        kernel: Side of the box in pixels.

    Returns:
        Foreground and background, (6, ⌈H / step⌉, ⌈W / step⌉), and the grid's step in pixels, a power of two.
    """
    step = min(ALIGNMENT, 2 ** max(0, int(math.log2(kernel / CELLS_PER_BOX))))
    weighted = torch.cat((foreground * alpha, alpha, background - background * alpha))[None]
    if step > 1:
        weighted = F.avg_pool2d(weighted, step, ceil_mode=True, count_include_pad=False)
    cells = round(kernel / step)
    weighted = _box_blur(weighted[0], cells + 1 - cells % 2)
    alpha = weighted[3:4]
    return torch.cat((weighted[:3] / (alpha + EPSILON), weighted[4:] / (1 - alpha + EPSILON))), step


def _box_blur(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over size × size pixels (size odd), of them those within the map: (C, H, W) → the same."""
    for dim in (1, 2):
        length = maps.shape[dim]
        sums = F.pad(maps.cumsum(dim), (1, 0) if dim == 2 else (0, 0, 1, 0))
        position = torch.arange(length, device=maps.device)
        end, start = (position + size // 2 + 1).clamp(max=length), (position - size // 2).clamp(min=0)
        count = (end - start).to(maps.dtype).view((1, 1, -1) if dim == 2 else (1, -1, 1))
        maps = (sums.index_select(dim, end) - sums.index_select(dim, start)).div_(count).clamp_(min=0)
    return maps


def _enlarge(grid: torch.Tensor, step: int, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """A rectangle of pixels out of a grid of cells of step × step pixels, interpolated between the cells' centres.

    Args:
        grid: (C, ⌈H / step⌉, ⌈W / step⌉).
        step: Pixels per cell and side.
        rows, columns: First pixel and the one behind the last.

    Returns:
        (C, rows, columns).
    """
    if step == 1:
        return grid[:, slice(*rows), slice(*columns)]
    first_row, first_column = rows[0] // step, columns[0] // step
    # One cell more on each side, repeated at the border, so that interpolation is the same for every rectangle.
    padded = F.pad(grid[None], (1, 1, 1, 1), mode="replicate")
    cells = padded[:, :, first_row : (rows[1] - 1) // step + 3, first_column : (columns[1] - 1) // step + 3]
    pixels = F.interpolate(cells, scale_factor=step, mode="bilinear")[0]
    top, left = rows[0] - (first_row - 1) * step, columns[0] - (first_column - 1) * step
    return pixels[:, top : top + rows[1] - rows[0], left : left + columns[1] - columns[0]]


def parse_background(
    background: str | os.PathLike[str] | tuple[int, int, int] | Image.Image | np.ndarray, timeout: float | None = None
) -> torch.Tensor:
    """Reads a background that a user names.

    Args:
        background: A colour, as a name or code that PIL knows ("white", "#1a2b3c", "rgb(10, 20, 30)") or as three
            integers in [0, 255]; or an image, as `load_image` takes it.
        timeout: Seconds that fetching a URL may take.

    Returns:
        (3, 1, 1) for a colour and (3, height, width) for an image, float32 in [0, 1].

    Raises:
        ValueError: neither a colour nor an image.
    """
    if isinstance(background, tuple | list):
        if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise ValueError(f"background={tuple(background)} must be three integers from 0 to 255.")
        return torch.tensor(background, dtype=torch.float32).view(3, 1, 1) / 255
    if isinstance(background, str) and not os.path.exists(background):
        try:
            return parse_background(ImageColor.getrgb(background)[:3])
        except ValueError as error:
            if "://" not in background and not background.startswith("data:"):
                raise ValueError(
                    f'background={background!r} is neither a colour (such as "white" or "#1a2b3c") nor a file.'
                ) from error
    return _to_tensor(load_image(background, timeout=timeout))


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
    background = background.to(foreground)
    if background.shape[-2:] not in ((1, 1), (height, width)):
        scale = max(height / background.shape[-2], width / background.shape[-1])
        size = [
            max(target, round(side * scale))
            for target, side in zip((height, width), background.shape[-2:], strict=True)
        ]
        background = F.interpolate(background[None], size=size, mode="bilinear", antialias=True)[0].clamp_(0, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        background = background[:, top : top + height, left : left + width]
    alpha = alpha.reshape(*foreground.shape[:-3], 1, height, width).to(foreground.dtype)
    return torch.lerp(background.expand_as(foreground), foreground, alpha)


def cut_out(image: Image.Image, alpha: Image.Image, refine: bool = True) -> Image.Image:
    """The image with alpha as its fourth channel.

    Args:
        image: PIL image; transparency it may have is dropped.
        alpha: PIL image of the same size, converted to "L".
        refine: Whether to estimate the foreground's colours, see `refine_foreground`.

    Returns:
        PIL image in mode RGBA.

    Raises:
        ValueError: the sizes differ.
    """
    image, alpha = ImageOps.exif_transpose(image).convert("RGB"), alpha.convert("L")
    if image.size != alpha.size:
        raise ValueError(f"The image has {image.size} pixels, its alpha {alpha.size}; they must agree.")
    if refine:
        colours = refine_foreground(_to_tensor(image), _to_tensor(alpha))
        image = Image.fromarray(to_uint8(colours).permute(1, 2, 0).numpy())
    image.putalpha(alpha)
    return image


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    """Floats in [0, 1] to the nearest of 0..255 (the reference cuts off instead, half a step darker on average)."""
    return (values * 255).round_().clamp_(0, 255).to(torch.uint8)


def _to_tensor(image: Image.Image) -> torch.Tensor:
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
