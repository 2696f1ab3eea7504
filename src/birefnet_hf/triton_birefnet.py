"""Kernels for half precision on CUDA devices, in Triton, which comes with PyTorch there. Inference only.

Each computes what a few lines of PyTorch elsewhere in the package do, without the large tensors between those: what is
added up is float32, and what is multiplied has the inputs' precision.
"""

from __future__ import annotations

import contextlib
import functools
import logging

import torch
from torch import nn


try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    triton = None

logger = logging.getLogger(__name__)

jit = (lambda function: function) if triton is None else triton.jit


@jit
def _probe_kernel(output):
    tl.store(output, 1)


@torch.compiler.assume_constant_result
def is_usable(device_index: int) -> bool:
    """Whether the kernels run on a device, which has to be NVIDIA's, of the Ampere generation at least; tried once."""
    return _try_device(device_index)  # on its own, as the compiler looks through a cache


@functools.cache
def _try_device(device_index: int) -> bool:
    if triton is None or torch.version.hip or torch.cuda.get_device_capability(device_index) < (8, 0):
        return False
    try:
        with torch.cuda.device(device_index):
            _probe_kernel[(1,)](torch.empty(1, dtype=torch.int32, device="cuda"))
    except Exception as error:  # of many kinds: Triton builds what starts kernels with the system's C compiler
        logger.warning("Triton does not work here, which makes BiRefNet slower on this GPU: %s", error)
        return False
    return True


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device, which need not be the tensors'. A compiler sees to that itself."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@jit
def _places_in_grid(token, first_row, first_column, shift, padded_height, padded_width, WINDOW_SIZE: tl.constexpr):
    """Row and column of a window's tokens before the cyclic shift, where they are in memory, and the part they are of.

    The shift brings parts of the other side into the last windows: tokens of each part attend among themselves.
    """
    row, column = first_row + token // WINDOW_SIZE, first_column + token % WINDOW_SIZE
    part = (row >= padded_height - shift) * 2 + (column >= padded_width - shift)
    return (row + shift) % padded_height, (column + shift) % padded_width, part


@jit
def _window_attention_kernel(
    output,
    qkv,
    padding,
    position_table,
    height,
    width,
    windows_down,
    windows_across,
    shift,
    SCALING: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Some queries of one head of one window."""
    TOKENS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_CHANNELS
    SPAN: tl.constexpr = 2 * WINDOW_SIZE - 1
    LOG2_E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % NUM_HEADS
    window = tl.program_id(0) // NUM_HEADS
    window_row, window_column = window // windows_across % windows_down, window % windows_across
    is_cut = (shift > 0) & ((window_row == windows_down - 1) | (window_column == windows_across - 1))
    first_row, first_column = window_row * WINDOW_SIZE, window_column * WINDOW_SIZE
    padded_height, padded_width = windows_down * WINDOW_SIZE, windows_across * WINDOW_SIZE
    image = window // (windows_down * windows_across)
    channel = head * HEAD_CHANNELS + tl.arange(0, HEAD_CHANNELS)
    qkv += image.to(tl.int64) * height * width * (3 * CHANNELS) + channel
    output += image.to(tl.int64) * height * width * CHANNELS + channel
    position_table += head * SPAN * SPAN

    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    query_row, query_column, query_part = _places_in_grid(
        query, first_row, first_column, shift, padded_height, padded_width, WINDOW_SIZE
    )
    is_query = (query < TOKENS) & (query_row < height) & (query_column < width)
    query_place = (query_row * width + query_column).to(tl.int64)
    queries = tl.load(qkv + query_place[:, None] * (3 * CHANNELS), mask=is_query[:, None], other=0.0)
    padding_key = tl.load(padding + CHANNELS + channel)
    padding_value = tl.load(padding + 2 * CHANNELS + channel)
    # Row of the table for a query and a key: the difference of these, see `relative_position_index`.
    query_position = (query // WINDOW_SIZE + WINDOW_SIZE - 1) * SPAN + query % WINDOW_SIZE + WINDOW_SIZE - 1

    largest = tl.full((BLOCK_QUERIES,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    attended = tl.zeros((BLOCK_QUERIES, HEAD_CHANNELS), tl.float32)
    for start in range(0, TOKENS, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        key_row, key_column, key_part = _places_in_grid(
            key, first_row, first_column, shift, padded_height, padded_width, WINDOW_SIZE
        )
        is_token = key < TOKENS
        is_real = is_token & (key_row < height) & (key_column < width)
        place = qkv + (key_row * width + key_column).to(tl.int64)[:, None] * (3 * CHANNELS)
        keys = tl.load(place + CHANNELS, mask=is_real[:, None], other=0.0)
        values = tl.load(place + 2 * CHANNELS, mask=is_real[:, None], other=0.0)
        keys = tl.where(is_real[:, None], keys, padding_key[None, :])
        values = tl.where(is_real[:, None], values, padding_value[None, :])
        key_position = key // WINDOW_SIZE * SPAN + key % WINDOW_SIZE
        # Where there is no token, so low a bias that it gets no weight. Not infinity, whose difference with itself is not
        # a number: a block may hold no key for a query.
        bias = tl.load(
            position_table + (query_position[:, None] - key_position[None, :]),
            mask=(query < TOKENS)[:, None] & is_token[None, :],
            other=-60000.0,
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (SCALING * LOG2_E)
        scores += bias.to(tl.float32) * LOG2_E
        if is_cut:
            scores = tl.where(query_part[:, None] == key_part[None, :], scores, -60000.0)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(weights, axis=1)
        attended = attended * correction[:, None]
        attended = tl.dot(weights.to(values.dtype), values, attended, input_precision="ieee")
        largest = new_largest
    attended = (attended / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + query_place[:, None] * CHANNELS, attended, mask=is_query[:, None])


def fused_window_attention(
    qkv: torch.Tensor,
    padding: torch.Tensor,
    position_table: torch.Tensor,
    num_heads: int,
    window_size: int,
    shift: int,
    scaling: float,
) -> torch.Tensor:
    """Attention within windows of a token grid that is padded to whole windows and moved cyclically by `shift` tokens.

    Neither is done to the tensor: the kernel reads each window's tokens from where they are.

    Args:
        qkv: (B, H, W, 3C), half precision.
        padding: (1, 3C), the query, key and value of padded tokens.
        position_table: ((2 * window_size - 1)², heads), what is added to the scores, for each pair of positions.
        shift: 0, or half a window.
        scaling: What products of queries and keys are multiplied by.

    Returns:
        (B, H, W, C).
    """
    qkv = qkv.contiguous()
    batch_size, height, width, channels = qkv.shape
    channels = channels // 3
    windows_down, windows_across = triton.cdiv(height, window_size), triton.cdiv(width, window_size)
    output = qkv.new_empty(batch_size, height, width, channels)
    block = 32
    grid = (batch_size * windows_down * windows_across * num_heads, triton.cdiv(window_size**2, block))
    with _on_device_of(qkv):
        _window_attention_kernel[grid](
            output,
            qkv,
            padding.to(qkv.dtype),
            position_table.to(qkv.dtype).t().contiguous(),
            height,
            width,
            windows_down,
            windows_across,
            shift,
            SCALING=scaling,
            NUM_HEADS=num_heads,
            HEAD_CHANNELS=channels // num_heads,
            WINDOW_SIZE=window_size,
            BLOCK_QUERIES=block,
            BLOCK_KEYS=block,
            num_warps=2,
            num_stages=1,
        )
    return output


@jit
def _deform_conv_kernel(
    total,
    feature_map,
    displacement,
    weight,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_variance,
    projection,
    height,
    width,
    channels,
    out_channels,
    projected_channels,
    displacement_image,
    displacement_channel,
    displacement_pixel,
    projection_row,
    kernel_size,
    EPSILON: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_PROJECTED: tl.constexpr,
):
    """Some pixels of one image."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    is_pixel = pixel < height * width
    row, column = pixel // width, pixel % width
    out = tl.arange(0, BLOCK_OUT)
    is_out = out < out_channels
    feature_map += image.to(tl.int64) * height * width * channels
    displacement += image.to(tl.int64) * displacement_image + pixel.to(tl.int64) * displacement_pixel
    channel_step = tl.full((), 1, tl.int64) * displacement_channel
    first_modulator = 2 * kernel_size * kernel_size

    convolved = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32)
    for tap in range(kernel_size * kernel_size):
        offset = displacement + 2 * tap * channel_step
        move_y = tl.load(offset, mask=is_pixel, other=0.0).to(tl.float32)
        move_x = tl.load(offset + channel_step, mask=is_pixel, other=0.0).to(tl.float32)
        modulator = displacement + (first_modulator + tap) * channel_step
        amount = 2 * tl.sigmoid(tl.load(modulator, mask=is_pixel, other=0.0).to(tl.float32))
        y = (row + tap // kernel_size - kernel_size // 2).to(tl.float32) + move_y
        x = (column + tap % kernel_size - kernel_size // 2).to(tl.float32) + move_x
        # Further out there are zeros only. The clamp keeps far positions within integers.
        y = tl.minimum(tl.maximum(y, -1.0), height)
        x = tl.minimum(tl.maximum(x, -1.0), width)
        top_edge, left_edge = tl.floor(y), tl.floor(x)
        bottom_part, right_part = (y - top_edge) * amount, x - left_edge
        top_part = amount - bottom_part
        top, left = top_edge.to(tl.int32), left_edge.to(tl.int32)
        # Not a number becomes any integer, which these keep from being read.
        has_top, has_bottom = (top >= 0) & (top < height), (top >= -1) & (top < height - 1)
        has_left, has_right = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
        corner = feature_map + (top * width + left).to(tl.int64) * channels
        for start in range(0, channels, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            is_channel = (channel < channels)[None, :]
            place = corner[:, None] + channel[None, :]
            below = place + width * channels
            top_left = tl.load(place, mask=(has_top & has_left)[:, None] & is_channel, other=0.0)
            top_right = tl.load(place + channels, mask=(has_top & has_right)[:, None] & is_channel, other=0.0)
            bottom_left = tl.load(below, mask=(has_bottom & has_left)[:, None] & is_channel, other=0.0)
            bottom_right = tl.load(below + channels, mask=(has_bottom & has_right)[:, None] & is_channel, other=0.0)
            sampled = top_left.to(tl.float32) * (top_part * (1 - right_part))[:, None]
            sampled += top_right.to(tl.float32) * (top_part * right_part)[:, None]
            sampled += bottom_left.to(tl.float32) * (bottom_part * (1 - right_part))[:, None]
            sampled += bottom_right.to(tl.float32) * (bottom_part * right_part)[:, None]
            kernel = tl.load(
                weight + (tap * channels + channel)[:, None] * out_channels + out[None, :],
                mask=(channel < channels)[:, None] & is_out[None, :],
                other=0.0,
            )
            convolved = tl.dot(sampled.to(kernel.dtype), kernel, convolved, input_precision="ieee")

    scale = tl.load(norm_weight + out, mask=is_out, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(norm_variance + out, mask=is_out, other=1.0).to(tl.float32) + EPSILON)
    shift = tl.load(norm_bias + out, mask=is_out, other=0.0).to(tl.float32)
    shift -= tl.load(norm_mean + out, mask=is_out, other=0.0).to(tl.float32) * scale
    activated = tl.maximum(convolved * scale + shift, 0.0)
    activated = activated.to(projection.dtype.element_ty)
    total += (image.to(tl.int64) * height * width + pixel)[:, None] * projected_channels
    for start in range(0, projected_channels, BLOCK_PROJECTED):
        projected = start + tl.arange(0, BLOCK_PROJECTED)
        is_projected = projected < projected_channels
        kernel = tl.load(
            projection + projected[None, :] * projection_row + out[:, None],
            mask=is_out[:, None] & is_projected[None, :],
            other=0.0,
        )
        place = total + projected[None, :]
        is_stored = is_pixel[:, None] & is_projected[None, :]
        before = tl.load(place, mask=is_stored, other=0.0)
        tl.store(place, tl.dot(activated, kernel, before, input_precision="ieee"), mask=is_stored)


def add_fused_deform_conv2d(
    total: torch.Tensor,
    feature_map: torch.Tensor,
    displacement: torch.Tensor,
    weight: torch.Tensor,
    norm: nn.BatchNorm2d,
    projection: torch.Tensor,
) -> None:
    """Adds `projection @ relu(norm(deform_conv2d(...)))` to `total`, in place.

    Args:
        total: (B, H * W, projected), float32, contiguous.
        feature_map: (B, C, H, W).
        displacement: (B, at least 3k², H, W): 2k² channels of offsets as in `ops_birefnet.deform_conv2d`, and k² of
            logits whose sigmoid is half the modulator.
        weight: (out_channels, C, k, k).
        norm: Normalisation of out_channels, by its running statistics.
        projection: (projected, out_channels), of rows without gaps.
    """
    batch_size, channels, height, width = feature_map.shape
    out_channels, kernel_size = weight.shape[0], weight.shape[-1]
    dtype = displacement.dtype
    feature_map = feature_map.to(dtype, memory_format=torch.channels_last)
    weight = weight.to(dtype).permute(2, 3, 1, 0).contiguous()  # (k, k, C, out_channels)
    projection = projection.to(dtype)
    # Small maps have few pixels for each multiprocessor.
    num_pixels = batch_size * height * width
    block_pixels, num_warps = (128, 8) if num_pixels >= 16384 else (32, 4) if num_pixels >= 4096 else (16, 4)
    with _on_device_of(total):
        _deform_conv_kernel[(triton.cdiv(height * width, block_pixels), batch_size)](
            total,
            feature_map,
            displacement,
            weight,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            projection,
            height,
            width,
            channels,
            out_channels,
            projection.shape[0],
            displacement.stride(0),
            displacement.stride(1),
            displacement.stride(3),
            projection.stride(0),
            kernel_size,
            EPSILON=norm.eps,
            BLOCK_PIXELS=block_pixels,
            BLOCK_CHANNELS=max(16, min(64, triton.next_power_of_2(channels))),
            BLOCK_OUT=max(16, triton.next_power_of_2(out_channels)),
            BLOCK_PROJECTED=max(16, min(32, triton.next_power_of_2(projection.shape[0]))),
            num_warps=num_warps,
            num_stages=1 if num_pixels >= 4096 else 2,
        )


__all__ = ["add_fused_deform_conv2d", "fused_window_attention", "is_usable"]
