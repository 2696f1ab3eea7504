"""BiRefNet (Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation", arXiv 2401.03407).

An image is localised by a backbone run at two scales and a squeeze module, and the mask is reconstructed from coarse to
fine by a decoder in which every level refers inward, to the image's own pixels, and outward, to its gradients.
"""

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_swin_birefnet import BiRefNetSwinAttention, BiRefNetSwinBackbone, is_free, relative_position_index
from .backbone_timm_birefnet import build_timm_backbone
from .checkpoints_birefnet import HUB_OPTIONS
from .configuration_birefnet import BiRefNetConfig
from .conversion_birefnet import (
    IGNORED_TENSORS,
    load_state_dict_file,
    pickled_weights,
    strip_training_prefixes,
    to_library_name,
)
from .loss_birefnet import BiRefNetLoss
from .ops_birefnet import (
    add_projected_deform_conv2d,
    deform_conv2d,
    has_hooks,
    have_hooks,
    is_plain_inference,
    is_transformed,
    is_triton_inference,
    scale_and_shift,
)
from .triton_birefnet import add_fused_deform_conv2d


logger = logging.get_logger(__name__)

# Every map's size must be an integer fraction of the image's, down to the coarsest stride.
SIZE_DIVISOR = 32
# Transformers builds networks under another default dtype of the whole process: two threads would mix theirs.
_LOADING = threading.RLock()


def _renew_lock() -> None:
    global _LOADING
    _LOADING = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that held it is not there to release it in the copy
    os.register_at_fork(after_in_child=_renew_lock)


@auto_docstring(custom_intro="Output of [`BiRefNetForImageSegmentation`].")
@dataclass
class BiRefNetImageSegmentationOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
        The task's weighted sum of losses over all outputs.
    logits (`torch.FloatTensor` of shape `(batch_size, 1, height, width)`):
        Foreground logits at the size of `pixel_values`; their sigmoid is the soft alpha.
    side_logits (`tuple(torch.FloatTensor)`, *optional*, in training mode with `multi_scale_supervision`):
        Logits of the levels 4, 3, 2, each `(batch_size, 1, height / 32.., width / 32..)` of the padded image, whose
        sides are multiples of 32.
    gradient_logits (`tuple(torch.FloatTensor)`, *optional*, in training mode with `outward_reference`):
        Predicted image gradients within the object at levels 4, 3, 2, before the sigmoid, at the levels' sizes.
    gradient_targets (`tuple(torch.FloatTensor)`, *optional*, in training mode with `outward_reference`):
        What they should be, before the sigmoid, each of the padded image's `(batch_size, 1, height, width)`: the
        image's Laplacian times the level's side output. Not detached, as in the reference.
    class_logits (`torch.FloatTensor` of shape `(batch_size, num_classes)`, *optional*, in training mode):
        Output of the auxiliary classification head, where the config has one.
    loss_terms (`dict[str, torch.FloatTensor]`, *optional*, returned when `labels` is given):
        The loss's terms times their weights, detached, for logging: those of the pixels averaged over the outputs,
        "gradient" summed over the levels.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
        Nine feature maps `(batch_size, channels, height / stride, width / stride)`: the four of the encoder, fine to
        coarse, the squeezed one, and the outputs of the decoder levels, coarse to fine.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    side_logits: tuple[torch.FloatTensor, ...] | None = None
    gradient_logits: tuple[torch.FloatTensor, ...] | None = None
    gradient_targets: tuple[torch.FloatTensor, ...] | None = None
    class_logits: torch.FloatTensor | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def resize(feature_map: torch.Tensor, size: torch.Size | tuple[int, int]) -> torch.Tensor:
    """Bilinear resize to (height, width), corners aligned: how BiRefNet resizes everywhere, up and down."""
    if not is_free(*size) and feature_map.shape[-2:] == tuple(size):
        return feature_map
    return F.interpolate(feature_map, size=tuple(size), mode="bilinear", align_corners=True)


def pad_to_divisor(image: torch.Tensor) -> torch.Tensor:
    """Repeats the last row and column until both sides are multiples of 32; no-op where they are."""
    height, width = image.shape[-2:]
    pad_height, pad_width = (-size % SIZE_DIVISOR for size in (height, width))
    if pad_height or pad_width:
        image = F.pad(image, (0, pad_width, 0, pad_height), mode="replicate")
    return image


def stack_patches(image: torch.Tensor, size: torch.Size | tuple[int, int], patch_order: str) -> torch.Tensor:
    """Cuts the image into a grid of patches of the given size and stacks them on channels.

    Args:
        image: (B, C, H, W); H and W are multiples of `size`.
        size: Height h and width w of a patch, the size of the level's map.
        patch_order: `"c_hg_wg"` (colour outermost) or `"wg_hg_c"` (colour innermost, grid columns outermost).

    Returns:
        (B, C * (H / h) * (W / w), h, w).
    """
    batch_size, channels, image_height, image_width = image.shape
    height, width = size
    rows, columns = image_height // height, image_width // width
    patches = image.view(batch_size, channels, rows, height, columns, width)
    order = (1, 2, 4) if patch_order == "c_hg_wg" else (4, 2, 1)
    # Channels last in memory, which convolutions work in.
    patches = patches.permute(0, 3, 5, *order).reshape(batch_size, height, width, channels * rows * columns)
    return patches.permute(0, 3, 1, 2)


def image_laplacian(image: torch.Tensor) -> torch.Tensor:
    """Laplacian of the image's channel mean, 5×5, kernel normalised, reflected border: (B, C, H, W) → (B, 1, H, W).

    The same numbers as kornia's `laplacian(mean, kernel_size=5)`, which the reference's training targets come from:
    ones everywhere but -24 in the centre, divided by 48, is the difference of the window's mean and the pixel.
    """
    mean = image.mean(dim=1, keepdim=True)
    window_mean = F.avg_pool2d(F.pad(mean, (2, 2, 2, 2), mode="reflect"), kernel_size=5, stride=1)
    return (window_mean - mean) * (25 / 48)


class BiRefNetBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that survives a single value per channel in training, which has no variance.

    That happens at batch size 1 in the pooled branch. Upstream removes all normalisation at batch size 1, and the files
    it saves then load nowhere; here that one case uses the running statistics.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and hidden_states.shape[0] * hidden_states.shape[2] * hidden_states.shape[3] == 1:
            return F.batch_norm(
                hidden_states, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(hidden_states)


class BiRefNetModulatedConv2d(nn.Module):
    """A convolution that samples its input at displaced and modulated positions, see `deform_conv2d`.

    No `nn.Conv2d`, whose call takes one map: tools that replace such layers leave this one alone.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d's

    def forward(self, hidden_states: torch.Tensor, offset: torch.Tensor, modulator: torch.Tensor) -> torch.Tensor:
        # Under autocast offsets arrive in half precision while the input may still be float32.
        dtype = offset.dtype
        return deform_conv2d(hidden_states.to(dtype), offset, modulator, self.weight.to(dtype))


def is_plain(*modules: nn.Module) -> bool:
    """Whether computing with the modules' weights is as good as calling the modules.

    Not so for adapters, quantised or offloaded weights, and hooks: they take effect when a module is called.
    """
    kinds = (nn.Conv2d, BiRefNetZeroConv2d, BiRefNetModulatedConv2d, BiRefNetBatchNorm2d)
    return all(
        type(module) in kinds
        and type(module.weight) is nn.Parameter
        and not module.weight.is_meta
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and not has_hooks(module)
        for module in modules
    )


def norm_relu(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """ReLU of what `norm` gives, in place where nothing else can hold that."""
    return F.relu(norm(hidden_states), inplace=is_plain(norm))


def conv_of_concatenation(conv: nn.Module, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """`conv(torch.cat(feature_maps, dim=1))` as the sum of a convolution of each, which needs no concatenation.

    Args:
        conv: A convolution of stride 1, without groups or dilation.
        feature_maps: Each (B, C_i, H, W).
    """
    # The split weights are copied. On small maps that takes longer than copying the maps, as it does on GPUs.
    is_small = is_plain_inference(feature_maps[0]) and feature_maps[0][:, 0].numel() < conv.weight[:, 0].numel()
    if is_small or is_triton_inference(feature_maps[0]) or not is_plain(conv):
        return conv(torch.cat(feature_maps, dim=1))
    weights = conv.weight.split([feature_map.shape[1] for feature_map in feature_maps], dim=1)
    output = F.conv2d(feature_maps[0], weights[0], conv.bias, padding=conv.padding)
    for feature_map, weight in zip(feature_maps[1:], weights[1:], strict=True):
        output += F.conv2d(feature_map, weight, padding=conv.padding)
    return output


def conv_pair(
    image: torch.Tensor,
    first_weight: torch.Tensor,
    first_bias: torch.Tensor,
    second_weight: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """Two 3×3 convolutions in a row, each with a border of zeros, as one of 5×5 without the map between them.

    Next to the border that map's zeros make a difference, so the outermost pixels are computed in two steps.

    Args:
        image: (B, C, H, W), both sides at least 3.
        first_weight, first_bias: (inner, C, 3, 3) and (inner,).
        second_weight, second_bias: (out, inner, 3, 3) and (out,).

    Returns:
        (B, out, H, W).
    """

    def two_steps(strip: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(strip, first_weight, first_bias, padding=1), second_weight, second_bias, padding=1)

    weight = F.conv2d(first_weight.transpose(0, 1), second_weight.flip(2, 3), padding=2).transpose(0, 1)
    bias = second_bias + second_weight.sum(dim=(2, 3)) @ first_bias
    if is_triton_inference(image) and weight.shape[0] == 1:
        # One output channel leaves tensor cores idle: a convolution of each input channel takes a tenth of the time.
        channels = F.conv2d(image.contiguous(), weight.transpose(0, 1), padding=1, groups=image.shape[1])
        inner = channels.sum(dim=1, keepdim=True) + bias[:, None, None]
    else:
        inner = F.conv2d(image, weight, bias, padding=1)  # (B, out, H - 2, W - 2)
    left, right = two_steps(image[..., :3])[..., 1:-1, :1], two_steps(image[..., -3:])[..., 1:-1, -1:]
    top, bottom = two_steps(image[..., :3, :])[..., :1, :], two_steps(image[..., -3:, :])[..., -1:, :]
    return torch.cat((top, torch.cat((left, inner, right), dim=-1), bottom), dim=-2)


class BiRefNetZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:  # adapters of peft are made without
            nn.init.zeros_(self.bias)


class BiRefNetDeformableConv(nn.Module):
    """Deformable convolution v2 whose offsets and modulators are convolutions of its own input.

    It starts as a plain convolution: no displacement, all taps weighted 2 * sigmoid(0) = 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        padding, self.num_taps = kernel_size // 2, kernel_size**2
        self.offset_conv = BiRefNetZeroConv2d(in_channels, 2 * kernel_size**2, kernel_size, padding=padding)
        self.modulator_conv = BiRefNetZeroConv2d(in_channels, kernel_size**2, kernel_size, padding=padding)
        self.regular_conv = BiRefNetModulatedConv2d(in_channels, out_channels, kernel_size)

    def displacement(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets (B, 2k², H, W) and modulators (B, k², H, W)."""
        both = self.raw_displacement(hidden_states)
        offset, modulator = both[:, : 3 * self.num_taps].split((2 * self.num_taps, self.num_taps), dim=1)
        return offset, 2 * modulator.sigmoid()

    def raw_displacement(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, at least 3k², H, W): offsets and logits of modulators, by one convolution where both can be merged."""
        convs = [self.offset_conv, self.modulator_conv]
        if not is_plain(*convs):
            return torch.cat([conv(hidden_states) for conv in convs], dim=1)
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
        if is_triton_inference(hidden_states):
            # Tensor cores want multiples of eight channels. k is odd, so k² is one more than such, and 3k² three more.
            weights += 5 * [weights[1][:1]]
            biases += 5 * [biases[1][:1]]
        weight, bias, padding = torch.cat(weights), torch.cat(biases), self.offset_conv.padding
        size, kernel_size = hidden_states.shape[-2:], self.offset_conv.kernel_size
        if is_triton_inference(hidden_states) and kernel_size[0] > 3 and size.numel() <= 64 * 64:
            # cuDNN's choice for such sizes knows no tensor cores: 1.8 ms at 64×64 pixels, eight times 256×256's.
            columns = F.unfold(hidden_states, kernel_size, padding=padding)  # (B, C * k², H * W)
            return (weight.flatten(1) @ columns + bias[:, None].to(columns.dtype)).unflatten(-1, size)
        return F.conv2d(hidden_states, weight, bias, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.regular_conv(hidden_states, *self.displacement(hidden_states))


class BiRefNetConvNormReLU(nn.Module):
    """A convolution of any kind, batch normalisation, ReLU."""

    def __init__(self, conv: nn.Module, out_channels: int):
        super().__init__()
        self.conv = conv
        self.norm = BiRefNetBatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activate(self.conv(hidden_states))

    def activate(self, convolved: torch.Tensor) -> torch.Tensor:
        """What follows the convolution."""
        return norm_relu(self.norm, convolved)


class BiRefNetASPP(nn.Module):
    """Attention block: parallel branches of growing reach, concatenated and projected (Chen et al., arXiv 1706.05587).

    The branches are a pointwise one, deformable convolutions of growing kernel size or dilated 3×3 convolutions, and the
    global average. The projection of the concatenation is the sum of each branch's own, which needs no concatenation.
    """

    dilations = (6, 12, 18)

    def __init__(self, config: BiRefNetConfig, in_channels: int, out_channels: int, deformable: bool):
        super().__init__()
        width = config.branch_channels
        if deformable:
            self.pointwise_branch = BiRefNetConvNormReLU(BiRefNetDeformableConv(in_channels, width, 1), width)
            self.deformable_branches = nn.ModuleList(
                BiRefNetConvNormReLU(BiRefNetDeformableConv(in_channels, width, kernel_size), width)
                for kernel_size in config.deformable_kernel_sizes
            )
        else:
            self.pointwise_branch = BiRefNetConvNormReLU(nn.Conv2d(in_channels, width, 1, bias=False), width)
            self.dilated_branches = nn.ModuleList(
                BiRefNetConvNormReLU(
                    nn.Conv2d(in_channels, width, 3, padding=dilation, dilation=dilation, bias=False), width
                )
                for dilation in self.dilations
            )
        self.deformable = deformable
        self.global_branch = BiRefNetConvNormReLU(nn.Conv2d(in_channels, width, 1, bias=False), width)
        num_branches = 2 + len(self.wide_branches)
        self.projection = BiRefNetConvNormReLU(
            nn.Conv2d(num_branches * width, out_channels, 1, bias=False), out_channels
        )
        self.dropout = nn.Dropout(config.attention_block_dropout)

    @property
    def wide_branches(self) -> nn.ModuleList:
        """The branches that see more than one pixel and less than the whole image."""
        return self.deformable_branches if self.deformable else self.dilated_branches

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        branches = [self.pointwise_branch, *self.wide_branches]
        pooled = self.global_branch(hidden_states.mean(dim=(2, 3), keepdim=True))  # (B, width, 1, 1)
        if not is_plain(self.projection.conv) or has_hooks(self.projection):
            outputs = [branch(hidden_states) for branch in branches]
            outputs.append(pooled.expand_as(outputs[0]))  # resizing one pixel is repeating it
            return self.dropout(self.projection(torch.cat(outputs, dim=1)))

        *kernels, pooled_kernel = self.projection.conv.weight.split(pooled.shape[1], dim=1)
        total = F.conv2d(pooled, pooled_kernel)
        if self.uses_chunks(hidden_states):
            total = self.add_chunks(total, hidden_states, kernels)
        else:
            for branch, kernel in zip(branches, kernels, strict=True):
                total = total + F.conv2d(branch(hidden_states), kernel)
        return self.dropout(self.projection.activate(total))

    def uses_chunks(self, hidden_states: torch.Tensor) -> bool:
        """Whether `add_chunks` does the same as the branches themselves, but faster."""
        if self.training or not self.deformable:
            return False
        # A kernel holds all channels of some pixels.
        is_fused = is_triton_inference(hidden_states) and self.global_branch.norm.num_features <= 256
        if not is_fused and not is_plain_inference(hidden_states):
            return False
        branches = (self.pointwise_branch, *self.deformable_branches)
        if have_hooks(*branches) or any(
            branch.norm.training or branch.norm.running_mean is None for branch in branches
        ):
            return False
        return is_plain(*(layer for branch in branches for layer in (branch.conv.regular_conv, branch.norm)))

    def add_chunks(
        self, total: torch.Tensor, hidden_states: torch.Tensor, kernels: list[torch.Tensor]
    ) -> torch.Tensor:
        """Projected sum of the deformable branches (B, out_channels, H, W), whose wide outputs exist in chunks only.

        Args:
            total: (B, out_channels, 1, 1), the global branch's part.
            hidden_states: (B, in_channels, H, W).
            kernels: Projection of each branch, (out_channels, width, 1, 1).
        """
        batch_size, _, height, width = hidden_states.shape
        dtype = torch.promote_types(total.dtype, torch.float32)
        rows = total.to(dtype).flatten(1)[:, None].repeat(1, height * width, 1)  # (B, H * W, out_channels)
        for branch, kernel in zip((self.pointwise_branch, *self.deformable_branches), kernels, strict=True):
            conv, weight = branch.conv, branch.conv.regular_conv.weight
            if is_triton_inference(hidden_states):
                displacement = conv.raw_displacement(hidden_states)
                add_fused_deform_conv2d(rows, hidden_states, displacement, weight, branch.norm, kernel[:, :, 0, 0])
                continue
            scale, shift = scale_and_shift(branch.norm)
            weight = (weight * scale[:, None, None, None]).to(kernel.dtype)
            add_projected_deform_conv2d(
                rows,
                hidden_states,
                *conv.displacement(hidden_states),
                weight,
                shift.to(kernel.dtype),
                kernel[:, :, 0, 0],
            )
        return rows.to(total.dtype).view(batch_size, height, width, -1).permute(0, 3, 1, 2)


class BiRefNetDecoderBlock(nn.Module):
    """Convolution to a narrow inner width, attention block there, convolution to the output width."""

    def __init__(self, config: BiRefNetConfig, in_channels: int, out_channels: int, residual: bool):
        super().__init__()
        inner_channels = in_channels // 4 if config.adaptive_inner_channels else config.inner_channels
        self.conv_in = nn.Conv2d(in_channels, inner_channels, 3, padding=1)
        self.norm_in = BiRefNetBatchNorm2d(inner_channels)
        self.attention = (
            nn.Identity()
            if config.decoder_attention == "none"
            else BiRefNetASPP(
                config, inner_channels, inner_channels, deformable=config.decoder_attention == "aspp_deformable"
            )
        )
        self.conv_out = nn.Conv2d(inner_channels, out_channels, 3, padding=1)
        self.norm_out = BiRefNetBatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if residual else None

    def forward(self, *feature_maps: torch.Tensor) -> torch.Tensor:
        """(B, C_i, H, W), whose channels sum to `in_channels` → (B, out_channels, H, W)."""
        output = norm_relu(self.norm_in, conv_of_concatenation(self.conv_in, feature_maps))
        output = self.norm_out(self.conv_out(self.attention(output)))
        return output if self.shortcut is None else output + conv_of_concatenation(self.shortcut, feature_maps)


class BiRefNetInwardReference(nn.Module):
    """Features of the image itself for one decoder level (paper section 3.3); two convolutions in a row, as released."""

    def __init__(self, config: BiRefNetConfig, stride: int, out_channels: int):
        super().__init__()
        self.config = config
        self.split = config.split_image_patches
        in_channels = config.num_channels * (stride**2 if self.split else 1)
        self.conv_in = nn.Conv2d(in_channels, config.image_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(config.image_channels, out_channels, 3, padding=1)

    def forward(self, image: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """(B, 3, H, W) → (B, out_channels, *size)."""
        patches = stack_patches(image, size, self.config.patch_order) if self.split else resize(image, size)
        return self.conv_out(self.conv_in(patches))


class BiRefNetOutwardReference(nn.Module):
    """Attention to where the image has fine gradients within the object (paper section 3.3)."""

    def __init__(self, config: BiRefNetConfig, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, config.gradient_channels, 3, padding=1)
        self.norm = BiRefNetBatchNorm2d(config.gradient_channels)
        self.gradient_head = nn.Conv2d(config.gradient_channels, 1, 1)
        self.attention_head = nn.Conv2d(config.gradient_channels, 1, 1)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, C, H, W) → the same, gated, and in training the gradient's logits (B, 1, H, W)."""
        gradient_features = norm_relu(self.norm, self.conv(hidden_states))
        gated = hidden_states * self.attention_head(gradient_features).sigmoid()
        return gated, self.gradient_head(gradient_features) if self.training else None


class BiRefNetDecoderLevel(nn.Module):
    """One level of the reconstruction module, from 4 (coarsest) to 1."""

    def __init__(self, config: BiRefNetConfig, level: int):
        super().__init__()
        channels = config.decoder_channels
        image_out_channels = config.feature_channels[min(level, 3)] // 8
        out_channels = channels[level - 2] if level > 1 else channels[0] // 2
        in_channels = channels[level - 1] + (image_out_channels if config.inward_reference else 0)
        is_inner = level > 1
        self.lateral = nn.Conv2d(channels[level - 1], channels[level - 1], 1) if level < 4 else None
        self.inward_reference = (
            BiRefNetInwardReference(config, stride=2 ** (level + 1), out_channels=image_out_channels)
            if config.inward_reference
            else None
        )
        self.block = BiRefNetDecoderBlock(
            config, in_channels, out_channels, residual=config.decoder_block == "residual"
        )
        self.side_head = nn.Conv2d(out_channels, 1, 1) if is_inner and config.multi_scale_supervision else None
        self.outward_reference = (
            BiRefNetOutwardReference(config, out_channels) if is_inner and config.outward_reference else None
        )

    def forward(
        self, feature_map: torch.Tensor, coarser: torch.Tensor | None, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Refines what the coarser level gave with this level's features and pixels.

        Args:
            feature_map: (B, C, h, w), the encoder's, which has gone through `lateral` where there is one. May be
            overwritten.
            coarser: Output of the level above at half this size, None at level 4.
            image: (B, 3, H, W).

        Returns:
            Output (B, out_channels, h, w); in training the side output and the gradient, both (B, 1, h, w).
        """
        if coarser is not None:
            coarser = resize(coarser, feature_map.shape[-2:])
            # In place where nobody else can hold the map.
            is_own = self.lateral is not None and is_plain(self.lateral) and not has_hooks(self)
            feature_map = feature_map.add_(coarser) if is_own else feature_map + coarser
        inputs = [feature_map]
        if self.inward_reference is not None:
            inputs.append(self.inward_reference(image, feature_map.shape[-2:]))
        hidden_states = self.block(*inputs)
        side_logits = self.side_head(hidden_states) if self.training and self.side_head is not None else None
        gradient_logits = None
        if self.outward_reference is not None:
            hidden_states, gradient_logits = self.outward_reference(hidden_states)
        return hidden_states, side_logits, gradient_logits


class BiRefNetDecoder(nn.Module):
    """Reconstruction module: four levels from coarse to fine, and the mask at full resolution."""

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        self.neck = (
            nn.ModuleList(
                nn.Conv2d(in_channels, out_channels, 1)
                for in_channels, out_channels in zip(config.feature_channels, config.decoder_channels, strict=True)
            )
            if config.uses_neck
            else None
        )
        self.levels = nn.ModuleDict({str(level): BiRefNetDecoderLevel(config, level) for level in (4, 3, 2, 1)})
        out_channels = config.decoder_channels[0] // 2
        image_out_channels = config.feature_channels[0] // 8
        self.inward_reference = (
            BiRefNetInwardReference(config, stride=1, out_channels=image_out_channels)
            if config.inward_reference
            else None
        )
        self.mask_head = nn.Conv2d(out_channels + (image_out_channels if config.inward_reference else 0), 1, 1)

    def forward(
        self, feature_maps: list[torch.Tensor], image: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Reconstructs the mask.

        Args:
            feature_maps: Four maps, fine to coarse, the last one squeezed. The list is emptied, so that the memory of each
                is free once it has been used.
            image: (B, 3, H, W).

        Returns:
            Logits (B, 1, H, W); in training side logits and gradient logits of the levels 4, 3, 2, else empty tuples;
            the outputs of all levels, coarse to fine.
        """
        if self.neck is not None:
            height, width = image.shape[-2:]
            feature_maps[:] = [
                project(resize(feature_map, (height // stride, width // stride)))
                for project, feature_map, stride in zip(self.neck, feature_maps, (4, 8, 16, 32), strict=True)
            ]
        hidden_states = None
        outputs, side_logits, gradient_logits = [], [], []
        for level in self.levels.values():
            # Out here, where nothing else holds the encoder's map, so that it is released before the level's work.
            feature_map = feature_maps.pop()
            if level.lateral is not None:
                feature_map = level.lateral(feature_map)
            hidden_states, side, gradient = level(feature_map, hidden_states, image)
            outputs.append(hidden_states)
            side_logits.append(side)
            gradient_logits.append(gradient)
        present = tuple(tuple(x for x in maps if x is not None) for maps in (side_logits, gradient_logits))
        return self.predict_mask(hidden_states, image), *present, tuple(outputs)

    def predict_mask(self, hidden_states: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H, W) from the last level's output (B, C, H/4, W/4) and the image.

        The reference resizes the map to full size, concatenates the image's features and applies a 1×1 convolution. That
        convolution commutes with the resizing and with the image branch's convolutions, so that here only one channel
        is resized and one is computed: the same numbers without the full-size maps of C channels.
        """
        size, image_branch = image.shape[-2:], self.inward_reference
        convs = (
            [self.mask_head] if image_branch is None else [self.mask_head, image_branch.conv_in, image_branch.conv_out]
        )
        if not is_plain(*convs) or (image_branch is not None and has_hooks(image_branch)):
            features = [resize(hidden_states, size)]
            if image_branch is not None:
                features.append(image_branch(image, size))
            return self.mask_head(torch.cat(features, dim=1))

        weight, bias = self.mask_head.weight, self.mask_head.bias
        channels = hidden_states.shape[1]
        logits = resize(F.conv2d(hidden_states, weight[:, :channels].to(hidden_states.dtype)), size)
        if image_branch is None:
            return logits + bias[:, None, None]
        conv_in, conv_out = image_branch.conv_in, image_branch.conv_out
        image_weight = weight[0, channels:, 0, 0]  # (image_out_channels,)
        folded_weight = torch.einsum("o,oikl->ikl", image_weight, conv_out.weight)[None]
        folded_bias = bias + (image_weight * conv_out.bias).sum()
        return logits + conv_pair(image, conv_in.weight, conv_in.bias, folded_weight, folded_bias)


def take_released_names(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Lets `load_state_dict` take a saved file's content, as Transformers' `Trainer` gives it, beside the network's own.

    Tensors that no file holds are computed again, since `to_empty` leaves them random.
    """
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if IGNORED_TENSORS.search(own):
            del state_dict[name]
        elif (renamed := to_library_name(own)) != own:
            state_dict[prefix + renamed] = state_dict.pop(name)
    for module in model.modules():
        if isinstance(module, BiRefNetSwinAttention) and not module.relative_position_index.is_meta:
            module.relative_position_index.copy_(relative_position_index(module.window_size))


@auto_docstring
class BiRefNetPreTrainedModel(PreTrainedModel):
    config: BiRefNetConfig
    base_model_prefix = "birefnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The batch is divided by the accumulation steps outside: the loss takes no num_items_in_batch.
    accepts_loss_kwargs = False
    # Within these, maps of several levels meet: each stays on one device.
    _no_split_modules = [
        "BiRefNetSwinBackbone",
        "BiRefNetPvtBackbone",
        "BiRefNetDinoV3Backbone",
        "BiRefNetConvBackbone",
        "BiRefNetDecoder",
    ]
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [IGNORED_TENSORS.pattern]
    _keys_to_ignore_on_load_missing = [r"num_batches_tracked$"]
    _can_record_outputs = {"attentions": OutputRecorder(BiRefNetSwinAttention, index=1)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values, as upstream: Swin's own for its linear layers and tables, PyTorch's for convolutions, and for
        those of timm's convolutional backbones and PVTv2 the ones of their papers (normal, by fan-out)."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif getattr(module, "starts_by_fan_out", False):
            init.normal_(module.weight, std=math.sqrt(2 * module.groups / module.weight[:, 0].numel()))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, BiRefNetModulatedConv2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, BiRefNetSwinAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=self.config.initializer_range)
            init.copy_(module.relative_position_index, relative_position_index(module.window_size))
        else:
            # timm's modules know their own initial values, and rebuild the rotary tables that no file holds.
            for name in ("cls_token", "reg_token"):
                if isinstance(getattr(module, name, None), nn.Parameter):
                    init.trunc_normal_(getattr(module, name), std=self.config.initializer_range)
            for name in ("reset_parameters", "init_non_persistent_buffers"):
                if hasattr(module, name):
                    getattr(module, name)()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As the library's, for saved directories and for released ones, whose architecture follows from their tensors.

        Settings of [`BiRefNetConfig`] can be given as keyword arguments, e.g. `patch_order="wg_hg_c"`.

        Raises:
            ValueError: tensors that the network needs are missing from the file. The library would fill them with random
                numbers and warn; give `ignore_mismatched_sizes=True` if that is meant, e.g. to train a new head.
        """
        name = pretrained_model_name_or_path
        hub_options = {option: kwargs[option] for option in HUB_OPTIONS if kwargs.get(option) is not None}
        pickled = (
            None if name is None or kwargs.get("state_dict") is not None else pickled_weights(name, **hub_options)
        )
        if pickled is not None:  # which the library would not find
            settings = {setting: kwargs.pop(setting) for setting in BiRefNetConfig.own_settings() & kwargs.keys()}
            config = kwargs.pop("config", None) or BiRefNetConfig.from_pretrained(name, **hub_options, **settings)
            kwargs |= {"config": config, "state_dict": load_state_dict_file(pickled)}
            name = None
        try:
            with _LOADING:
                model, info = super().from_pretrained(
                    name,
                    *model_args,
                    output_loading_info=True,
                    ignore_mismatched_sizes=ignore_mismatched_sizes,
                    **kwargs,
                )
        except OSError as error:
            adapter = Path(str(name)) / "adapter_config.json"
            if not adapter.is_file():
                raise
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise OSError(f"{name} holds adapters of the network {base}, which cannot be loaded: {error}") from error
        if model.config.freeze_backbone and not getattr(model, "_hf_peft_config_loaded", False):
            model.backbone.requires_grad_(False)  # the library's loader has put other parameters there
        model.subfolder = kwargs.get("subfolder") or ""  # where the image processor is, too
        if pickled is not None:
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                # Counters are not cast. As they come from the file, each would keep all of it mapped into memory.
                if buffer is not None and not buffer.is_floating_point() and not buffer.is_meta:
                    module._buffers[name] = buffer.clone()
        missing = sorted(info["missing_keys"])
        if missing and not ignore_mismatched_sizes and (kwargs.get("state_dict") is None or pickled is not None):
            if any("modules_to_save" in name for name in missing):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds an adapter, which transformers loads by itself from 5.18 on only. "
                    "Load the model it was trained on, and give both to PeftModel.from_pretrained of peft."
                )
            unexpected = sorted(info["unexpected_keys"])
            if any(name != stripped for name, stripped in strip_training_prefixes(unexpected).items()):
                raise ValueError(
                    f"{pretrained_model_name_or_path} was saved from a wrapped network: its names begin like "
                    f"{unexpected[0]!r}. Write it anew with scripts/convert_checkpoint.py."
                )
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of this network, e.g. {missing[:3]}"
                + (f", and has {len(unexpected)} that it does not know, e.g. {unexpected[:3]}" if unexpected else "")
                + ". The file is damaged or belongs to another architecture. Pass ignore_mismatched_sizes=True to start "
                "those parts from their initial values."
            )
        return (model, info) if output_loading_info else model


@auto_docstring(
    custom_intro="""
    BiRefNet: soft or binary foreground masks at high resolution. One model for background removal, dichotomous and
    salient object segmentation, and matting; which one depends on the checkpoint.
    """
)
class BiRefNetForImageSegmentation(BiRefNetPreTrainedModel):
    def __init__(self, config: BiRefNetConfig):
        super().__init__(config)
        channels = config.feature_channels
        self.backbone = BiRefNetSwinBackbone(config) if config.is_swin else build_timm_backbone(config)
        squeeze_in_channels = channels[3] + sum(channels[3 - config.context_levels : 3])
        self.squeeze_module = nn.Sequential(
            *(self._squeeze_block(squeeze_in_channels) for _ in range(config.num_squeeze_blocks))
            if config.squeeze_block != "none"
            else ()
        )
        self.decoder = BiRefNetDecoder(config)
        self.class_head = (
            nn.Linear(channels[3], config.num_auxiliary_classes) if config.num_auxiliary_classes else None
        )
        self.criterion = BiRefNetLoss(config.loss_task)
        self.__dict__["own_criterion"] = self.criterion  # beside the registered modules
        self.register_load_state_dict_pre_hook(take_released_names)
        self.post_init()
        if config.freeze_backbone:
            self.backbone.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's: a backbone may be kept in higher precision."""
        return self.decoder.mask_head.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's first convolution: where training of adapters lets gradients begin."""
        return next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))

    def _squeeze_block(self, in_channels: int) -> nn.Module:
        kind, out_channels = self.config.squeeze_block, self.config.feature_channels[3]
        if kind in ("basic", "residual"):
            return BiRefNetDecoderBlock(self.config, in_channels, out_channels, residual=kind == "residual")
        return BiRefNetASPP(self.config, in_channels, out_channels, deformable=kind == "aspp_deformable")

    def encode(self, image: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        """Four maps (B, C_i, H/4.., W/4..), fine to coarse: the backbone's at full and, fused, at half size."""
        # A list of its own: what follows replaces its maps one by one, so that each is released.
        feature_maps = list(self.backbone(image, **kwargs))
        if self.config.multi_scale_input == "none":
            return feature_maps
        half_image = resize(image, (image.shape[-2] // 2, image.shape[-1] // 2))
        half_maps = self.backbone(half_image, **kwargs)
        for level, half_map in enumerate(half_maps):
            full_map = feature_maps[level]
            half_map = resize(half_map, full_map.shape[-2:])
            adds = self.config.multi_scale_input == "add"
            feature_maps[level] = full_map + half_map if adds else torch.cat((full_map, half_map), dim=1)
        return feature_maps

    def squeeze(self, feature_maps: list[torch.Tensor]) -> torch.Tensor:
        """The coarsest map (B, C4, H/32, W/32), seen together with the finer ones' context."""
        coarsest = feature_maps[3]
        context = feature_maps[3 - self.config.context_levels : 3]
        context = [resize(feature_map, coarsest.shape[-2:]) for feature_map in context]
        return self.squeeze_module(torch.cat((*context, coarsest), dim=1))

    @capture_outputs
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        class_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BiRefNetImageSegmentationOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            Images as the processor gives them (ImageNet-normalised). Another dtype than the weights' is cast. Any size:
            where a side is no multiple of 32, the last row or column is repeated up to the next multiple, and the logits
            are cut back to `(height, width)`.
        labels (`torch.Tensor` of shape `(batch_size, 1, height, width)` or `(batch_size, height, width)`, *optional*):
            Masks in [0, 1], soft or binary, of any size; `loss` is returned.
        class_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Classes for the auxiliary classification head. Not called labels, since Trainer evaluates a loss only where
            a batch holds every argument that is.
        output_hidden_states (`bool`, *optional*):
            Whether to return the feature maps of encoder and decoder.

        Example:

        ```python
        >>> import torch
        >>> from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor
        >>> from birefnet_hf.image_loading import load_image

        >>> processor = BiRefNetImageProcessor.from_pretrained("ZhengPeng7/BiRefNet")
        >>> model = BiRefNetForImageSegmentation.from_pretrained("ZhengPeng7/BiRefNet", dtype=torch.float32)
        >>> image = load_image("photo.jpg")
        >>> inputs = processor(image, return_tensors="pt")
        >>> with torch.inference_mode():
        ...     outputs = model(**inputs)
        >>> alpha = processor.post_process_alpha(outputs, target_sizes=[image.size[::-1]])[0]  # (height, width)
        ```"""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; BiRefNet takes (batch_size, 3, height, width), none "
                "of them 0."
            )
        height, width = pixel_values.shape[-2:]
        image = pad_to_divisor(pixel_values.to(self.get_input_embeddings().weight.dtype))
        # What convolutions work in; without it, each of a convolutional backbone's copies its map there and back.
        if not is_transformed():
            image = image.contiguous(memory_format=torch.channels_last)

        feature_maps = self.encode(image, **kwargs)
        if image.dtype != self.dtype:  # the backbone was kept in float32
            feature_maps, image = [feature_map.to(self.dtype) for feature_map in feature_maps], image.to(self.dtype)
        class_logits, gradient_targets = None, ()
        if self.training and self.class_head is not None:
            class_logits = self.class_head(feature_maps[3].mean(dim=(2, 3)))
        feature_maps.append(self.squeeze(feature_maps))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoder_outputs = tuple(feature_maps) if output_hidden_states else ()
        del feature_maps[3]  # the decoder takes the squeezed map in its place
        logits, side_logits, gradient_logits, decoder_outputs = self.decoder(feature_maps, image)
        if self.training and gradient_logits:
            laplacian = image_laplacian(image)
            gradient_targets = tuple(laplacian * resize(side, image.shape[-2:]) for side in side_logits)

        loss, loss_terms = None, None
        if labels is not None:
            labels = labels[:, None] if labels.dim() == 3 else labels
            if labels.dtype == torch.bool:
                labels = labels.to(image.dtype)  # PyTorch pads no truth values
            is_float = labels.is_floating_point()  # else the loss refuses them
            if is_float and labels.shape[-2:] != (height, width) and image.shape[-2:] != (height, width):
                # What the logits beyond the image are compared with has to lie beyond the labels.
                labels = F.interpolate(labels.float(), (height, width), mode="bilinear", antialias=True)
            if labels.shape[-2:] == (height, width):
                labels = pad_to_divisor(labels)
            if self.criterion is self.own_criterion and self.criterion.task != self.config.loss_task:
                self.criterion = self.__dict__["own_criterion"] = BiRefNetLoss(self.config.loss_task)
            loss, loss_terms = self.criterion(
                [*side_logits, logits],
                labels,
                gradient_logits=gradient_logits,
                gradient_targets=gradient_targets,
                class_logits=class_logits,
                class_labels=class_ids if self.training else None,  # the head is an auxiliary of training
            )
        return BiRefNetImageSegmentationOutput(
            loss=loss,
            logits=logits[..., :height, :width],
            side_logits=side_logits or None,
            gradient_logits=gradient_logits or None,
            gradient_targets=gradient_targets or None,
            class_logits=class_logits,
            loss_terms=loss_terms,
            hidden_states=(*encoder_outputs, *decoder_outputs) if output_hidden_states else None,
        )


__all__ = ["BiRefNetForImageSegmentation", "BiRefNetImageSegmentationOutput", "BiRefNetPreTrainedModel"]
