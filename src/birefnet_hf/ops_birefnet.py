"""Deformable convolution v2 behind one function: torchvision's operator, and a gather that is faster on CPUs."""

from typing import Literal

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d


DeformConvImplementation = Literal["auto", "torchvision", "gather"]

# Bytes of sampled columns that the gather path holds at a time: small enough to stay in a core's cache between the
# sampling that writes them and the matrix product that reads them.
GATHER_CHUNK_BYTES = 4 * 2**20


def deform_conv2d(
    feature_map: torch.Tensor,
    offset: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    implementation: DeformConvImplementation = "auto",
) -> torch.Tensor:
    """Modulated deformable convolution (v2), stride 1, zero padding of half the kernel, no bias.

    Every output pixel samples the map at its k² kernel taps, each moved by its own offset, with bilinear interpolation
    between pixels and zeros outside the image, scales each sample by its modulator, and applies the kernel.

    Args:
        feature_map: (B, C, H, W).
        offset: (B, 2k², H, W), in pixels; channels 2t and 2t+1 are tap t's vertical and horizontal displacement.
        modulator: (B, k², H, W).
        weight: (out_channels, C, k, k), k odd.
        implementation: `"torchvision"` is the reference. `"gather"` computes the same (rounding apart) as weighted sums
            of rows of the channels-last map, and needs no compiled extension. `"auto"`: gather in eager mode on
            anything but CUDA, torchvision's otherwise, since graph capture would unroll the gather's loop and the
            operator has a counterpart in ONNX.

    Returns:
        (B, out_channels, H, W) in the dtype of `feature_map`.
    """
    if implementation == "auto":
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
        implementation = "torchvision" if feature_map.is_cuda or captured else "gather"
    if implementation == "torchvision":
        if feature_map.dtype == torch.bfloat16 and not feature_map.is_cuda:  # which torchvision has for CUDA only
            inputs = (tensor.float() for tensor in (feature_map, offset, modulator, weight))
            return deform_conv2d(*inputs, implementation="torchvision").to(torch.bfloat16)
        return torchvision_deform_conv2d(feature_map, offset, weight, padding=weight.shape[-1] // 2, mask=modulator)
    if implementation == "gather":
        return _gather_deform_conv2d(feature_map, offset, modulator, weight)
    raise ValueError(f"implementation={implementation!r} must be 'auto', 'torchvision' or 'gather'.")


def _gather_deform_conv2d(
    feature_map: torch.Tensor, offset: torch.Tensor, modulator: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    batch_size, in_channels, height, width = feature_map.shape
    out_channels, _, kernel_size, _ = weight.shape
    num_taps = kernel_size * kernel_size
    num_pixels = height * width

    rows = feature_map.permute(0, 2, 3, 1).reshape(batch_size, num_pixels, in_channels)  # (B, HW, C)
    offset = offset.permute(0, 2, 3, 1).reshape(batch_size, num_pixels, num_taps, 2)  # (B, HW, taps, 2)
    modulator = modulator.permute(0, 2, 3, 1).reshape(batch_size, num_pixels, num_taps)  # (B, HW, taps)
    kernel = weight.permute(2, 3, 1, 0).reshape(num_taps * in_channels, out_channels)  # (taps * C, out)

    # Where each tap would sample without offsets, in float32 also for half-precision maps: at 1024 pixels float16
    # resolves half a pixel only.
    tap = torch.arange(kernel_size, device=feature_map.device, dtype=torch.float32) - kernel_size // 2
    tap_y = tap.repeat_interleave(kernel_size)
    tap_x = tap.repeat(kernel_size)
    pixel = torch.arange(num_pixels, device=feature_map.device)
    pixel_y = torch.div(pixel, width, rounding_mode="floor").to(torch.float32)
    pixel_x = (pixel % width).to(torch.float32)

    pixels_per_chunk = max(64, GATHER_CHUNK_BYTES // (num_taps * in_channels * feature_map.element_size()))
    batches = []
    for image in range(batch_size):
        chunks = []
        for start in range(0, num_pixels, pixels_per_chunk):
            chunk = slice(start, start + pixels_per_chunk)
            y = pixel_y[chunk, None] + tap_y + offset[image, chunk, :, 0]  # (pixels, taps)
            x = pixel_x[chunk, None] + tap_x + offset[image, chunk, :, 1]
            index, corner_weight = _bilinear_corners(y, x, height, width)  # (pixels, taps, 4)
            corner_weight = (corner_weight * modulator[image, chunk, :, None]).to(rows.dtype)
            columns = F.embedding_bag(
                index.flatten(0, 1), rows[image], mode="sum", per_sample_weights=corner_weight.flatten(0, 1)
            )  # (pixels * taps, C)
            chunks.append(columns.view(-1, num_taps * in_channels) @ kernel)  # (pixels, out)
        batches.append(torch.cat(chunks))
    output = torch.stack(batches).view(batch_size, height, width, out_channels)
    return output.permute(0, 3, 1, 2)  # (B, out, H, W), channels last in memory


def _bilinear_corners(y: torch.Tensor, x: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices and weights of the four pixels around each position; weight 0 for those outside the image.

    Args:
        y: Vertical positions in pixels, float32, any shape.
        x: Horizontal positions, same shape.

    Returns:
        Index (int64, in [0, height * width)) and weight (float32), both with a last dimension of 4.
    """
    # Everything further out than one pixel samples nothing but zeros; the clamp keeps far positions within integers.
    y = y.clamp(-1, height)
    x = x.clamp(-1, width)
    top, left = y.floor(), x.floor()
    y_fraction, x_fraction = y - top, x - left
    top, left = top.to(torch.int64), left.to(torch.int64)
    bottom, right = top + 1, left + 1
    top_weight = (1 - y_fraction) * ((top >= 0) & (top < height))
    bottom_weight = y_fraction * (bottom < height)
    left_weight = (1 - x_fraction) * ((left >= 0) & (left < width))
    right_weight = x_fraction * (right < width)
    top, bottom = top.clamp(0, height - 1) * width, bottom.clamp(0, height - 1) * width
    left, right = left.clamp(0, width - 1), right.clamp(0, width - 1)
    index = torch.stack((top + left, top + right, bottom + left, bottom + right), dim=-1)
    weight = torch.stack(
        (
            top_weight * left_weight,
            top_weight * right_weight,
            bottom_weight * left_weight,
            bottom_weight * right_weight,
        ),
        dim=-1,
    )
    return index, weight


__all__ = ["deform_conv2d"]
