"""Backbones that timm builds: PVTv2, DINOv3, ResNet-50, VGG-16, EfficientNet-Lite; timm is imported for them only."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import GradientCheckpointingLayer
from transformers.utils import is_timm_available

from .configuration_birefnet import BiRefNetConfig
from .ops_birefnet import has_hooks, is_plain_inference, onednn_takes, scale_and_shift


# Name in timm, and for the plain ViTs the blocks whose outputs are the four maps (models/backbones/dino_v3.py upstream).
TIMM_NAMES = {
    "pvt_v2_b5": "pvt_v2_b5",
    "pvt_v2_b2": "pvt_v2_b2",
    "pvt_v2_b1": "pvt_v2_b1",
    "pvt_v2_b0": "pvt_v2_b0",
    "dino_v3_7b": "vit_7b_patch16_dinov3.lvd1689m",
    "dino_v3_h_plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "dino_v3_l": "vit_large_patch16_dinov3.lvd1689m",
    "dino_v3_b": "vit_base_patch16_dinov3.lvd1689m",
    "dino_v3_s_plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dino_v3_s": "vit_small_patch16_dinov3.lvd1689m",
    "resnet50": "resnet50.tv2_in1k",
    "vgg16": "vgg16.tv_in1k",
    "vgg16bn": "vgg16_bn.tv_in1k",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k",
}
DINO_V3_BLOCKS = {
    "dino_v3_7b": (9, 19, 29, 39),
    "dino_v3_h_plus": (7, 15, 23, 31),
    "dino_v3_l": (5, 11, 17, 23),
    "dino_v3_b": (3, 5, 7, 11),
    "dino_v3_s_plus": (3, 5, 7, 11),
    "dino_v3_s": (3, 5, 7, 11),
}


def create_timm_model(name: str, **kwargs) -> nn.Module:
    """`timm.create_model` for a backbone by its name in `BiRefNetConfig`.

    Raises:
        ImportError: timm is not installed.
    """
    if is_timm_available():  # under this test, so that remote code with another backbone does not ask for timm
        import timm
    else:
        raise ImportError(f"backbone={name!r} is built by timm: pip install timm.")
    return timm.create_model(TIMM_NAMES[name], pretrained=False, **kwargs)


class BiRefNetCheckpointedCall(GradientCheckpointingLayer):
    """Calls another module's block, and recomputes it in the backward pass where gradient checkpointing is on."""

    def forward(self, hidden_states: torch.Tensor, block: nn.Module, *args) -> torch.Tensor:
        return block(hidden_states, *args)


class BiRefNetPvtBackbone(nn.Module):
    """Pyramid Vision Transformer v2 (Wang et al., arXiv 2106.13797), its parts under their numbers 1 to 4."""

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        model = create_timm_model(config.backbone, drop_path_rate=config.drop_path_rate)
        embeddings = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
        self.patch_embeds = nn.ModuleDict({str(i): embedding for i, embedding in enumerate(embeddings, start=1)})
        self.blocks = nn.ModuleDict({str(i): stage.blocks for i, stage in enumerate(model.stages, start=1)})
        self.norms = nn.ModuleDict({str(i): stage.norm for i, stage in enumerate(model.stages, start=1)})
        self.call_block = BiRefNetCheckpointedCall()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        """(B, 3, H, W) → four maps (B, C_i, H/4.., W/4..), fine to coarse.

        Raises:
            ValueError: a side is below 32 pixels, less than one reduced key of the first stage's attention.
        """
        if min(pixel_values.shape[-2:]) < 32:
            raise ValueError(
                f"PVTv2 got an image of {tuple(pixel_values.shape[-2:])} pixels and needs 32 at least: give the network "
                "images of at least 64, since it sees them at half size as well."
            )
        feature_map = pixel_values
        feature_maps = []
        for index, patch_embed in self.patch_embeds.items():
            tokens = patch_embed(feature_map)  # (B, h, w, C)
            batch_size, height, width, channels = tokens.shape
            tokens = tokens.reshape(batch_size, height * width, channels)
            for block in self.blocks[index]:
                tokens = self.call_block(tokens, block, (height, width))
            tokens = self.norms[index](tokens)
            feature_map = tokens.reshape(batch_size, height, width, channels).permute(0, 3, 1, 2).contiguous()
            feature_maps.append(feature_map)
        return feature_maps


class BiRefNetDinoV3Backbone(nn.Module):
    """DINOv3 (Siméoni et al., arXiv 2508.10104): four maps of one scale, stride 16, without the final norm."""

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        features = create_timm_model(
            config.backbone, features_only=True, dynamic_img_size=True, out_indices=DINO_V3_BLOCKS[config.backbone]
        )
        self.model = features.model
        self.block_indices = list(DINO_V3_BLOCKS[config.backbone])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether timm recomputes the blocks in the backward pass; the library's switch finds and sets it by name."""
        return self.model.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.set_grad_checkpointing(enable)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        """(B, 3, H, W) → four maps (B, C, H/16, W/16); H and W are multiples of 16."""
        return self.model.forward_intermediates(
            pixel_values, indices=self.block_indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )


def conv_norm_act(feature_map: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    """`norm(conv(feature_map))` in evaluation mode as one convolution of oneDNN's, for inference on a CPU.

    Args:
        feature_map: (B, C, H, W); fastest in channels-last order, which the output then has, too.
        conv: without bias and dilation; zeros around it as its own padding says, or as TensorFlow has them (`Conv2dSame`).
        norm: timm's `BatchNormAct2d`, which ends in ReLU6 or in nothing.
    """
    padding, outputs = list(conv.padding), [slice(None), slice(None)]
    if type(conv) is not nn.Conv2d:
        for axis, (kernel_size, stride) in enumerate(zip(conv.kernel_size, conv.stride, strict=True)):
            size = feature_map.shape[2 + axis]
            length = -(-size // stride)
            total = max((length - 1) * stride + kernel_size - size, 0)
            padding[axis] = total // 2
            if total % 2:  # one more at the end: pad by a whole step more on both sides and leave out what that adds
                padding[axis] += stride
                outputs[axis] = slice(1, 1 + length)
    scale, shift = scale_and_shift(norm)
    weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype, memory_format=torch.channels_last)
    activation = ("hardtanh", [0.0, 6.0]) if isinstance(norm.act, nn.ReLU6) else ("none", [])
    output = torch.ops.mkldnn._convolution_pointwise(
        feature_map, weight, shift.to(weight.dtype), padding, conv.stride, conv.dilation, conv.groups, *activation, ""
    )
    return output[:, :, *outputs]


class BiRefNetConvBackbone(nn.Module):
    """ResNet-50, VGG-16 or EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946, without squeeze and excitation), in four stages.

    No gradient checkpointing: to compute a batch normalisation twice is to count the batch twice in its statistics.
    """

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        model = create_timm_model(config.backbone)
        if config.backbone == "resnet50":
            stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool, model.layer1)
            self.stages = nn.ModuleList([stem, model.layer2, model.layer3, model.layer4])
        elif config.backbone == "tf_efficientnet_lite0":
            # Cut before the blocks that halve the map.
            stem = nn.Sequential(model.conv_stem, model.bn1, model.blocks[:2])
            self.stages = nn.ModuleList([stem, model.blocks[2:3], model.blocks[3:5], model.blocks[5:]])
        else:
            # Cut after the 2nd, 3rd, 4th and 5th pooling.
            pools = [index + 1 for index, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
            starts = [0, *pools[1:-1]]
            self.stages = nn.ModuleList(
                model.features[start:end] for start, end in zip(starts, pools[1:], strict=True)
            )
        self.min_side = 32 if config.backbone.startswith("vgg") else 1
        # What `run_fused` knows. Adapters and quantised layers, which may come later, are called.
        is_known = config.backbone == "tf_efficientnet_lite0"
        self.fusable_kinds = {type(module) for module in self.stages.modules()} if is_known else set()
        # bfloat16 is too coarse for an EfficientNet: with `nano`, alpha moves by more than 2/255 for a twentieth of the
        # pixels of photographs, and in the decoder alone for less than a thousandth.
        self.stays_float32 = is_known
        if self.stays_float32 and torch.get_default_dtype() == torch.bfloat16:
            self.float()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BiRefNetConvBackbone":
        """What `to` and its kin do to each tensor; one that may not become bfloat16 changes its device only."""

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if self.stays_float32 and result.dtype == torch.bfloat16:
                return tensor.to(result.device, torch.float32)
            return result

        return super()._apply(apply, recurse)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        """(B, 3, H, W) → four maps (B, C_i, H/4.., W/4..), fine to coarse.

        Raises:
            ValueError: a side is too small for VGG's five poolings.
        """
        if self.min_side > min(pixel_values.shape[-2:]):
            raise ValueError(
                f"VGG got an image of {tuple(pixel_values.shape[-2:])} pixels and needs {self.min_side} at least: give the "
                "network images of at least 64, since it sees them at half size as well."
            )
        is_fusable = self.is_fusable(pixel_values)
        feature_maps = [pixel_values]
        for stage in self.stages:
            feature_map = feature_maps[-1]
            feature_maps.append(self.run_fused(stage, feature_map) if is_fusable else stage(feature_map))
        return feature_maps[1:]

    def is_fusable(self, pixel_values: torch.Tensor) -> bool:
        """Whether `run_fused` does the same as the stages themselves, but faster."""
        if not self.fusable_kinds or not is_plain_inference(pixel_values) or not onednn_takes(pixel_values.dtype):
            return False
        return all(
            type(module) in self.fusable_kinds
            and not module.training
            and not has_hooks(module)
            and getattr(module, "running_mean", 0) is not None  # then batches are normalised by their own
            for module in self.stages.modules()
        ) and all(
            type(parameter) is nn.Parameter and not parameter.is_meta and parameter.dtype == pixel_values.dtype
            for parameter in self.stages.parameters()
        )

    @staticmethod
    def run_fused(part: nn.Module, feature_map: torch.Tensor) -> torch.Tensor:
        """What a stage of EfficientNet-Lite, or a part of one, makes of a map, each convolution with what follows it."""
        output = feature_map.contiguous(memory_format=torch.channels_last)
        for child in part.children():
            if isinstance(child, nn.Conv2d):
                conv = child
            elif isinstance(child, nn.BatchNorm2d):
                output = conv_norm_act(output, conv, child)
            else:  # a block, several, or nothing: then it has no children
                output = BiRefNetConvBackbone.run_fused(child, output)
        return feature_map + output if getattr(part, "has_skip", False) else output


def build_timm_backbone(config: BiRefNetConfig) -> nn.Module:
    """The timm backbone that `config.backbone` names, with random weights.

    Raises:
        ImportError: timm is not installed.
    """
    if config.backbone.startswith("dino_v3"):
        return BiRefNetDinoV3Backbone(config)
    is_pvt = config.backbone.startswith("pvt_v2")
    backbone = BiRefNetPvtBackbone(config) if is_pvt else BiRefNetConvBackbone(config)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.starts_by_fan_out = True  # see `_init_weights`
    return backbone


__all__ = ["build_timm_backbone"]
