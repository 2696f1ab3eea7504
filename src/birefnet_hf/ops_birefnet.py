"""Deformable convolution v2 by torchvision's operator or a gather that is faster on CPUs, and linear layers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

from .triton_birefnet import is_usable


DeformConvImplementation = Literal["auto", "torchvision", "gather"]

# Bytes of sampled columns that the gather path holds at a time: small enough to stay in a core's cache between the
# sampling that writes them and the matrix product that reads them.
GATHER_CHUNK_BYTES = 4 * 2**20
# The same for the backward pass, whose sums over chunks (a whole kernel's gradient) want fewer of them.
BACKWARD_CHUNK_BYTES = 16 * 2**20
# Zeros around the map that is gathered from.
_BORDER = 2


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
        implementation = "torchvision" if feature_map.is_cuda or _is_captured() else "gather"
    if implementation == "torchvision":
        if feature_map.dtype == torch.bfloat16:  # which torchvision has not, or with its last versions only
            inputs = (tensor.float() for tensor in (feature_map, offset, modulator, weight))
            return deform_conv2d(*inputs, implementation="torchvision").to(torch.bfloat16)
        padding = int(weight.shape[-1]) // 2  # a tensor to torch.jit
        return torchvision_deform_conv2d(feature_map, offset, weight, padding=padding, mask=modulator)
    if implementation == "gather":
        inputs = (feature_map, offset, modulator, weight)
        return _gather_deform_conv2d(
            *inputs, gather=_GatherDeformConv2d.apply if _is_plain_training(inputs) else _gather_rows
        )
    raise ValueError(f"implementation={implementation!r} must be 'auto', 'torchvision' or 'gather'.")


def _is_captured() -> bool:
    """Whether a graph is being recorded."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is at work."""
    return not _is_captured() and torch._C._are_functorch_transforms_active()


def _is_watched() -> bool:
    """Whether a graph is being recorded or one of torch.func's transforms is at work."""
    return _is_captured() or is_transformed()


def is_plain_inference(feature_map: torch.Tensor) -> bool:
    """Whether loops over chunks pay and nothing watches them: on a CPU, without autograd, capture or transforms."""
    return (
        type(feature_map) is torch.Tensor  # no stand-in without values
        and feature_map.device.type == "cpu"
        and not _is_watched()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def is_triton_inference(hidden_states: torch.Tensor) -> bool:
    """Whether Triton's kernels pay and nothing needs more than results: half precision on a CUDA device, no autograd.

    `torch.compile` takes them into its graph. What is exported is to run elsewhere.
    """
    if not hidden_states.is_cuda or torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden_states.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.compiler.is_compiling():
        # The flag, as is_exporting() is true for whatever is compiled until PyTorch 2.12.
        is_exported = getattr(torch.compiler, "_is_exporting_flag", True)
    else:
        is_exported = _is_watched()
    return not is_exported and is_usable(hidden_states.device.index)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to happen when the module is called, or when gradients come back to it."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    # Accelerate's replacement moves tensors to the module's device, no more.
    is_patched = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return bool(own or is_patched or _has_any_global_hook())


def have_hooks(*modules: nn.Module) -> bool:
    """`has_hooks` of these modules, or of one within them."""
    return any(has_hooks(part) for module in modules for part in module.modules())


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether computing with the layer's weight and bias is as good as calling it."""
    weight = getattr(layer, "weight", None)
    return type(layer) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta and not has_hooks(layer)


def linear(
    layer: nn.Module, hidden_states: torch.Tensor, activation: Literal["none", "gelu"] = "none"
) -> torch.Tensor:
    """`layer(hidden_states)`, followed by GELU where asked.

    In inference on a CPU through oneDNN, which computes both at once. PyTorch's own linear layer takes MKL in float32,
    which is slower by a tenth to a half on processors that are not Intel's.

    Args:
        layer: `nn.Linear`, or anything else that has taken its place, which is then called.
        hidden_states: (..., in_features).

    Returns:
        (..., out_features).
    """
    if is_plain_inference(hidden_states) and is_plain_linear(layer) and layer.weight.dtype == hidden_states.dtype:
        return _fused_linear(hidden_states, layer.weight, layer.bias, activation)
    output = layer(hidden_states)
    return F.gelu(output) if activation == "gelu" else output


def _fused_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Literal["none", "gelu", "relu"],
) -> torch.Tensor:
    """`linear` with tensors instead of a layer, for inference on a CPU."""
    if onednn_takes(weight.dtype):
        return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, activation, [], "none")
    output = F.linear(hidden_states, weight, bias)
    return output if activation == "none" else getattr(F, activation)(output)


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused layers, which PyTorch has for its compiler, are there for this precision."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What it multiplies by and adds in evaluation mode, each (channels,), float32 at least: they are differences."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def linear_after(
    layer: nn.Module, before: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    """`layer(before(hidden_states))`. Training keeps `hidden_states` alone and computes `before` again going backward.

    Args:
        layer: `nn.Linear`, or anything else that has taken its place, which is then called as usual.
        before: Something cheap that gives the same each time, such as a normalisation or an activation.
        hidden_states: (..., in_features).

    Returns:
        (..., out_features).
    """
    if not is_plain_linear(layer) or not _is_plain_training((hidden_states,)):
        return layer(before(hidden_states))
    # It stops where the layer's input is there again: the product itself is not repeated.
    return checkpoint(
        lambda tokens: layer(before(tokens)), hidden_states, use_reentrant=False, preserve_rng_state=False
    )


def _is_plain_training(inputs: Sequence[torch.Tensor]) -> bool:
    """Whether autograd is going to ask for gradients in its usual way, for which one is written by hand."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return False
    has_values = all(type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta for tensor in inputs)
    return has_values and not _is_watched()


def _gather_rows(
    feature_map: torch.Tensor, offset: torch.Tensor, modulator: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """(B * H * W, out_channels), in plain operations, which autograd can follow by keeping all columns."""
    kernel = _kernel_matrix(weight)
    columns = _sampled_columns(feature_map, offset, modulator, weight.shape[-1])
    return torch.cat([chunk @ kernel for _, chunk in columns])


def _gather_deform_conv2d(
    feature_map: torch.Tensor,
    offset: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    gather: Callable[..., torch.Tensor] = _gather_rows,
) -> torch.Tensor:
    """What `gather` computes as a map (B, out_channels, H, W), channels last in memory.

    Rows become a map out here, where autograd sees it: what a Function returns must not be a view, or nobody may change
    it in place.
    """
    batch_size, _, height, width = feature_map.shape
    rows = gather(feature_map, offset, modulator, weight)
    return rows.view(batch_size, height, width, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def add_projected_deform_conv2d(
    total: torch.Tensor,
    feature_map: torch.Tensor,
    offset: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
) -> None:
    """Adds `projection @ relu(deform_conv2d(...) + bias)` to `total`, in place, for inference on a CPU.

    What the convolution gives, often ten times the size of the map, is used up chunk by chunk while in the cache.

    Args:
        total: (B, H * W, projected), of the map's precision or a higher one.
        feature_map, offset, modulator, weight: As in `deform_conv2d`.
        bias: (out_channels,).
        projection: (projected, out_channels).
    """
    kernel = weight.permute(0, 2, 3, 1).flatten(1)  # (out, k² * C): `_kernel_matrix` transposed, in one copy
    for taps, columns in _sampled_columns(feature_map, offset, modulator, weight.shape[-1]):
        convolved = _fused_linear(columns, kernel, bias, "relu")
        _add_product(total[taps.image, taps.pixels], convolved, projection.t())


def _sampled_columns(
    feature_map: torch.Tensor, offset: torch.Tensor, modulator: torch.Tensor, kernel_size: int
) -> Iterator[tuple["_Taps", torch.Tensor]]:
    """Chunks of pixels and what their taps see, (pixels, k² * C), in the order of images and pixels."""
    rows = _padded_rows(feature_map)
    for taps in _sampling_chunks(feature_map, offset, modulator, kernel_size, GATHER_CHUNK_BYTES):
        yield taps, _sample(rows[taps.image], taps).view(-1, kernel_size**2 * rows.shape[-1])


class _GatherDeformConv2d(torch.autograd.Function):
    """The gather for training: keeps its inputs only and samples the columns again, chunk by chunk, going backward."""

    @staticmethod
    def forward(
        ctx,
        feature_map: torch.Tensor,
        offset: torch.Tensor,
        modulator: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(feature_map, offset, modulator, weight)
        with torch.autocast(feature_map.device.type, enabled=False):
            return _gather_rows(feature_map, offset, modulator, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(grad_output.device.type, enabled=False):
            return _gather_rows_backward(*ctx.saved_tensors, grad_output, ctx.needs_input_grad)


def _gather_rows_backward(
    feature_map: torch.Tensor,
    offset: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    grad_output: torch.Tensor,
    needs_grad: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `feature_map`, `offset`, `modulator` and `weight`, None where they are not needed."""
    batch_size, in_channels, height, width = feature_map.shape
    kernel_size = weight.shape[-1]
    num_taps = kernel_size**2
    needs_map, needs_offset, needs_modulator, needs_weight = needs_grad

    rows = _padded_rows(feature_map)
    kernel = _kernel_matrix(weight)
    grad_output = grad_output.reshape(batch_size, height * width, -1)
    # Sums over chunks are kept in float32 at least.
    accumulator = torch.promote_types(feature_map.dtype, torch.float32)
    grad_rows = torch.zeros_like(rows, dtype=accumulator) if needs_map else None
    grad_kernel = torch.zeros_like(kernel, dtype=accumulator) if needs_weight else None
    grad_offset = torch.empty_like(offset, memory_format=torch.contiguous_format) if needs_offset else None
    grad_modulator = torch.empty_like(modulator, memory_format=torch.contiguous_format) if needs_modulator else None

    for taps in _sampling_chunks(feature_map, offset, modulator, kernel_size, BACKWARD_CHUNK_BYTES):
        image, pixels = taps.image, taps.pixels
        grad_chunk = grad_output[image, pixels]  # (pixels, out)
        if grad_kernel is not None:
            columns = _sample(rows[image], taps).view(-1, num_taps * in_channels)
            _add_product(grad_kernel, columns.t(), grad_chunk)
        grad_columns = (grad_chunk @ kernel.t()).view(-1, in_channels)  # (pixels * taps, C)
        if grad_rows is not None:
            _scatter(grad_rows[image], taps, grad_columns)
        if grad_offset is None and grad_modulator is None:
            continue
        # How much each corner counts is what offsets and modulators decide.
        num_samples = grad_columns.shape[0]
        sample = torch.arange(num_samples, dtype=taps.index.dtype, device=rows.device)
        grad_corner = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_columns, rows[image], taps.index.flatten(), 4 * sample, sample.repeat_interleave(4), mode=0
        )
        grad_corner = grad_corner.view(-1, num_taps, 2, 2).to(taps.y_fraction.dtype)  # pixels, taps, top/bottom, l/r
        left, right = grad_corner.unbind(-1)
        top, bottom = torch.lerp(left, right, taps.x_fraction[..., None]).unbind(-1)  # (pixels, taps)
        if grad_modulator is not None:
            grad_modulator.flatten(2)[image, :, pixels] = torch.lerp(top, bottom, taps.y_fraction).t()
        if grad_offset is not None:
            grad_y = (bottom - top) * taps.modulator
            grad_x = torch.lerp(*(right - left).unbind(-1), taps.y_fraction) * taps.modulator
            grad_offset.flatten(2)[image, 0::2, pixels] = grad_y.t()
            grad_offset.flatten(2)[image, 1::2, pixels] = grad_x.t()

    grad_map, grad_weight = None, None
    if grad_rows is not None:
        grad_map = grad_rows.view(batch_size, height + 2 * _BORDER, width + 2 * _BORDER, in_channels)
        grad_map = grad_map[:, _BORDER:-_BORDER, _BORDER:-_BORDER].permute(0, 3, 1, 2).to(feature_map.dtype)
    if grad_kernel is not None:
        grad_weight = grad_kernel.view(kernel_size, kernel_size, in_channels, -1).permute(3, 2, 0, 1).to(weight.dtype)
    return grad_map, grad_offset, grad_modulator, grad_weight


class _Taps(NamedTuple):
    """Where the taps of some pixels of one image sample its padded map, and how much."""

    image: int
    pixels: slice
    index: torch.Tensor  # (pixels * taps, 4), int32: rows of the map at top left, top right, bottom left, bottom right
    y_fraction: torch.Tensor  # (pixels, taps), float32 at least, in [0, 1): 0 samples the top, 1 would the bottom
    x_fraction: torch.Tensor  # same, from left to right
    modulator: torch.Tensor  # (pixels, taps)


def _padded_rows(feature_map: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, (H + 4) * (W + 4), C): the map with its zero border, one row of channels for each pixel.

    With two pixels on each side every clamped position has four neighbours, and both its value and its derivatives are
    zero wherever they should be, without any further test.
    """
    rows = F.pad(feature_map.permute(0, 2, 3, 1), (0, 0, _BORDER, _BORDER, _BORDER, _BORDER))
    return rows.reshape(feature_map.shape[0], -1, feature_map.shape[1])


def _kernel_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(out, C, k, k) → (k² * C, out), in the order of the columns."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _sampling_chunks(
    feature_map: torch.Tensor, offset: torch.Tensor, modulator: torch.Tensor, kernel_size: int, chunk_bytes: int
) -> Iterator[_Taps]:
    """Walks over images and pixels in chunks whose columns take `chunk_bytes`."""
    batch_size, in_channels, height, width = feature_map.shape
    num_taps, num_pixels, device = kernel_size**2, height * width, feature_map.device
    # Positions are float32 also for half-precision maps: at 1024 pixels float16 resolves half a pixel only.
    tap = torch.arange(kernel_size, device=device, dtype=torch.float32) - kernel_size // 2 + _BORDER
    tap_y, tap_x = tap.repeat_interleave(kernel_size), tap.repeat(kernel_size)
    row_length = width + 2 * _BORDER
    corners = torch.tensor([0, 1, row_length, row_length + 1], device=device, dtype=torch.int32)
    offset, modulator = offset.flatten(2), modulator.flatten(2)  # (B, 2 * taps, HW), (B, taps, HW)

    pixels_per_chunk = max(64, chunk_bytes // (num_taps * in_channels * feature_map.element_size()))
    for image in range(batch_size):
        for start in range(0, num_pixels, pixels_per_chunk):
            pixels = slice(start, min(start + pixels_per_chunk, num_pixels))
            pixel = torch.arange(pixels.start, pixels.stop, device=device, dtype=torch.int32)[:, None]
            y = torch.div(pixel, width, rounding_mode="floor") + tap_y + offset[image, 0::2, pixels].t().contiguous()
            x = pixel % width + tap_x + offset[image, 1::2, pixels].t().contiguous()  # (pixels, taps)
            # Further out than the border there are zeros only; the clamp keeps far positions within integers.
            y, x = y.clamp(0, height + _BORDER), x.clamp(0, width + _BORDER)
            top, left = y.detach().floor(), x.detach().floor()
            index = torch.add(left.to(torch.int32), top.to(torch.int32), alpha=row_length)
            # Not a number becomes any integer. It must not read beyond the map; the fraction carries it on.
            index = index.clamp(0, (height + _BORDER) * row_length + width + _BORDER)
            yield _Taps(
                image=image,
                pixels=pixels,
                index=(index[..., None] + corners).flatten(0, 1),
                y_fraction=y - top,
                x_fraction=x - left,
                modulator=modulator[image, :, pixels].t().contiguous(),
            )


def _corner_weights(taps: _Taps) -> torch.Tensor:
    """(pixels * taps, 4), float32 at least: bilinear weights times the modulator."""
    bottom = taps.y_fraction * taps.modulator
    top = taps.modulator - bottom
    top_right, bottom_right = top * taps.x_fraction, bottom * taps.x_fraction
    corners = (top - top_right, top_right, bottom - bottom_right, bottom_right)
    return torch.stack(corners, dim=-1).flatten(0, 1)


def _sample(rows: torch.Tensor, taps: _Taps) -> torch.Tensor:
    """One image's padded map (pixels, C) → columns (pixels * taps, C)."""
    weight = _corner_weights(taps).to(rows.dtype)
    return F.embedding_bag(taps.index, rows, mode="sum", per_sample_weights=weight)


def _scatter(rows: torch.Tensor, taps: _Taps, columns: torch.Tensor) -> None:
    """Adds columns to the rows they were sampled from: the transpose of `_sample`, in place.

    Sorted by target, the scatter is a gather too: each row is a weighted sum of the columns that sampled it. That is
    several times as fast as `index_add_` or the backward pass of `embedding_bag`.
    """
    target, order = taps.index.flatten().sort()
    first, last = int(target[0]), int(target[-1])
    bags = torch.searchsorted(target, torch.arange(first, last + 1, dtype=target.dtype, device=target.device))
    weight = _corner_weights(taps).flatten()[order].to(columns.dtype)
    sample = torch.div(order, 4, rounding_mode="floor")
    sums = F.embedding_bag(sample, columns, bags, mode="sum", per_sample_weights=weight)
    rows[first : last + 1] += sums


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in place, where `total` may be of higher precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


__all__ = [
    "add_projected_deform_conv2d",
    "deform_conv2d",
    "has_hooks",
    "have_hooks",
    "is_plain_inference",
    "is_plain_linear",
    "is_transformed",
    "is_triton_inference",
    "linear",
    "linear_after",
    "onednn_takes",
    "scale_and_shift",
]
