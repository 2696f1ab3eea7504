"""Configuration of BiRefNet: every setting of the paper and of the released checkpoints, typed and validated."""

import difflib
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring, logging

from .checkpoints_birefnet import HUB_OPTIONS
from .conversion_birefnet import (
    SWIN_VARIANTS,
    TIMM_BACKBONE_CHANNELS,
    is_released_config,
    pickled_weights,
    released_config_dict,
)


logger = logging.get_logger(__name__)

BackboneName = Literal[
    "swin_v1_l",
    "swin_v1_b",
    "swin_v1_s",
    "swin_v1_t",
    "swin",
    "pvt_v2_b5",
    "pvt_v2_b2",
    "pvt_v2_b1",
    "pvt_v2_b0",
    "dino_v3_7b",
    "dino_v3_h_plus",
    "dino_v3_l",
    "dino_v3_b",
    "dino_v3_s_plus",
    "dino_v3_s",
    "resnet50",
    "vgg16",
    "vgg16bn",
    "tf_efficientnet_lite0",
]


@auto_docstring(
    custom_intro="Settings of a [`BiRefNetForImageSegmentation`]. The defaults are the released networks'."
)
@strict
class BiRefNetConfig(PreTrainedConfig):
    r"""
    backbone (`str`, *optional*, defaults to `"swin_v1_l"`):
        Network of the localisation module. `"swin"` is a Swin v1 of free shape, given by `embed_dim`, `depths`,
        `num_heads` and `window_size`; the other `swin_v1_*` are the named shapes; the rest is built by timm.
    embed_dim (`int`, *optional*):
        Channels of Swin's first stage, doubled at each of the following three. Needed for `backbone="swin"` only.
    depths (`tuple[int, ...]`, *optional*):
        Blocks in each of Swin's four stages. Needed for `backbone="swin"` only.
    num_heads (`tuple[int, ...]`, *optional*):
        Attention heads in each of Swin's four stages. Needed for `backbone="swin"` only.
    window_size (`int`, *optional*):
        Side of Swin's attention windows, in tokens. Needed for `backbone="swin"` only.
    drop_path_rate (`float`, *optional*):
        Stochastic depth of the last block of Swin and PVTv2 in training; it grows linearly from 0. Left out: 0.1 for
        PVTv2 and 0.2 for the rest, as upstream.
    freeze_backbone (`bool`, *optional*):
        Whether the backbone's parameters start with `requires_grad=False`. Left out: only for DINOv3, as upstream.
    multi_scale_input (`str`, *optional*, defaults to `"cat"`):
        What is done with the maps of a second backbone pass at half size (`mul_scl_ipt` upstream): `"none"`, `"add"`
        or `"cat"` (concatenated, which doubles all widths after the backbone).
    context_levels (`int`, *optional*, defaults to 3):
        How many of the finer maps are resized and concatenated to the coarsest one, 0 to 3 (`cxt_num` upstream).
    squeeze_block (`str`, *optional*, defaults to `"basic"`):
        Block that maps the coarsest features and their context back to the coarsest width: `"none"`, `"basic"`,
        `"residual"`, `"aspp"` or `"aspp_deformable"`.
    num_squeeze_blocks (`int`, *optional*, defaults to 1):
        How many such blocks follow each other. More than one needs `context_levels=0`, so that the widths compose.
    decoder_block (`str`, *optional*, defaults to `"basic"`):
        Block of the decoder levels: `"basic"` or `"residual"` (`dec_blk` upstream).
    decoder_attention (`str`, *optional*, defaults to `"aspp_deformable"`):
        Attention block inside decoder and squeeze blocks: `"none"`, `"aspp"` or `"aspp_deformable"` (`dec_att`).
    inner_channels (`int`, *optional*, defaults to 64):
        Width inside decoder and squeeze blocks.
    adaptive_inner_channels (`bool`, *optional*, defaults to `False`):
        Use a quarter of a block's input channels instead of `inner_channels` (`dec_channels_inter="adap"`).
    branch_channels (`int`, *optional*, defaults to 256):
        Width of each of the parallel branches of an attention block.
    deformable_kernel_sizes (`tuple[int, ...]`, *optional*, defaults to `(1, 3, 7)`):
        Odd kernel sizes of the deformable branches that follow the first, pointwise one.
    attention_block_dropout (`float`, *optional*, defaults to 0.5):
        Dropout at the end of an attention block.
    inward_reference (`bool`, *optional*, defaults to `True`):
        Whether every decoder level sees the input image (`dec_ipt` upstream; paper section 3.3).
    split_image_patches (`bool`, *optional*, defaults to `True`):
        Whether the image comes as a stack of full-resolution patches; off: resized to the level's size.
    patch_order (`str`, *optional*, defaults to `"c_hg_wg"`):
        Order of the stacked patches' channels: `"c_hg_wg"` (colour outermost, what upstream computes since
        2024-11-05) or `"wg_hg_c"` (what it computed when its older checkpoints were trained).
    image_channels (`int`, *optional*, defaults to 64):
        Width between the two convolutions that the image patches pass through.
    outward_reference (`bool`, *optional*, defaults to `True`):
        Whether levels 4, 3, 2 predict image gradients and are gated by them (`out_ref`; needs
        `multi_scale_supervision`, whose side outputs mask the gradient targets).
    gradient_channels (`int`, *optional*, defaults to 16):
        Width of the gradient features of the outward reference.
    multi_scale_supervision (`bool`, *optional*, defaults to `True`):
        Whether levels 4, 3, 2 have side outputs in training (`ms_supervision`).
    neck_channels (`tuple[int, ...]`, *optional*, defaults to `(192, 384, 768, 1536)`):
        Widths, fine to coarse, of the pyramid that DINOv3's equal maps are turned into (doubled for `"cat"`).
    num_auxiliary_classes (`int`, *optional*, defaults to 0):
        Classes of the auxiliary classification head in training; 0 for none.
    image_size (`tuple[int, int]`, *optional*, defaults to `(1024, 1024)`):
        Height and width the checkpoint was trained at. The network takes any size; processors use it as default.
    loss_task (`str`, *optional*, defaults to `"dis"`):
        Loss preset that `forward(labels=...)` uses: `"dis"`, `"cod"`, `"hrsod"`, `"general"` or `"matting"`.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of the initial weights of Swin's linear layers and position tables.

    Example:

    ```python
    >>> from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation

    >>> config = BiRefNetConfig(backbone="swin_v1_t")
    >>> model = BiRefNetForImageSegmentation(config)
    >>> model.config.feature_channels
    (192, 384, 768, 1536)
    ```"""

    model_type = "birefnet"
    keys_to_ignore_at_inference = [
        "side_logits",
        "gradient_logits",
        "gradient_targets",
        "class_logits",
        "loss_terms",
        "hidden_states",
        "attentions",
    ]

    backbone: BackboneName = "swin_v1_l"
    embed_dim: int | None = None
    depths: list[int] | tuple[int, ...] | None = None
    num_heads: list[int] | tuple[int, ...] | None = None
    window_size: int | None = None
    drop_path_rate: float | int | None = None
    freeze_backbone: bool | None = None
    multi_scale_input: Literal["none", "add", "cat"] = "cat"
    context_levels: Literal[0, 1, 2, 3] = 3
    squeeze_block: Literal["none", "basic", "residual", "aspp", "aspp_deformable"] = "basic"
    num_squeeze_blocks: int = 1
    decoder_block: Literal["basic", "residual"] = "basic"
    decoder_attention: Literal["none", "aspp", "aspp_deformable"] = "aspp_deformable"
    inner_channels: int = 64
    adaptive_inner_channels: bool = False
    branch_channels: int = 256
    deformable_kernel_sizes: list[int] | tuple[int, ...] = (1, 3, 7)
    attention_block_dropout: float | int = 0.5
    inward_reference: bool = True
    split_image_patches: bool = True
    patch_order: Literal["c_hg_wg", "wg_hg_c"] = "c_hg_wg"
    image_channels: int = 64
    outward_reference: bool = True
    gradient_channels: int = 16
    multi_scale_supervision: bool = True
    neck_channels: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    num_auxiliary_classes: int = 0
    num_channels: int = 3
    image_size: list[int] | tuple[int, int] = (1024, 1024)
    loss_task: Literal["dis", "cod", "hrsod", "general", "matting"] = "dis"
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        for name, value in SWIN_VARIANTS.get(self.backbone, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("depths", "num_heads", "deformable_kernel_sizes", "neck_channels", "image_size"):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(getattr(self, name)))  # JSON knows lists only
        if self.drop_path_rate is None:
            self.drop_path_rate = 0.1 if self.backbone.startswith("pvt_v2") else 0.2
        if self.freeze_backbone is None:
            self.freeze_backbone = self.backbone.startswith("dino_v3")
        if self.id2label is None:
            # One logit channel, two answers: the pipelines ask for the names of both.
            self.id2label = {0: "background", 1: "foreground"}
            self.label2id = {"background": 0, "foreground": 1}
        if kwargs.pop("num_labels", None) not in (None, 2):
            raise ValueError("num_labels must be 2: one channel of logits decides between background and foreground.")
        own_fields = {field.name for field in fields(type(self))}
        for name in kwargs:
            close = difflib.get_close_matches(name, own_fields, n=1, cutoff=0.7)
            if close:
                logger.warning(f"BiRefNetConfig has no setting {name!r}; did you mean {close[0]!r}? It has no effect.")
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that hold between fields; runs after the fields' own types have been checked.

        Raises:
            ValueError: naming the field and what it may be.
        """
        shape_fields = ("embed_dim", "depths", "num_heads", "window_size")
        if self.backbone == "swin":
            missing = [name for name in shape_fields if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"backbone='swin' needs {', '.join(missing)}; or name a variant: {list(SWIN_VARIANTS)}."
                )
        elif self.backbone in SWIN_VARIANTS:
            for name, value in SWIN_VARIANTS[self.backbone].items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name}={getattr(self, name)} contradicts backbone={self.backbone!r}, which has {value}; "
                        "use backbone='swin' for a shape of your own."
                    )
        elif given := [name for name in shape_fields if getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(given)} describe a Swin backbone and do not apply to {self.backbone!r}.")
        if self.is_swin:
            if self.embed_dim < 1:
                raise ValueError(f"embed_dim={self.embed_dim} must be at least 1.")
            if len(self.depths) != 4 or len(self.num_heads) != 4:
                raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} must each name four stages.")
            for stage, heads in enumerate(self.num_heads):
                if heads < 1 or (self.embed_dim * 2**stage) % heads:
                    raise ValueError(
                        f"num_heads[{stage}]={heads} must divide the stage's {self.embed_dim * 2**stage} channels."
                    )
            if self.window_size < 2 or min(self.depths) < 1:
                raise ValueError(
                    f"window_size={self.window_size} must be at least 2 and each of depths={self.depths} at least 1."
                )
        for name in ("inner_channels", "branch_channels", "image_channels", "gradient_channels", "num_squeeze_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_channels != 3:
            raise ValueError(f"num_channels={self.num_channels}: BiRefNet takes RGB images, num_channels must be 3.")
        if set(self.id2label) != {0, 1}:
            raise ValueError(f"id2label={self.id2label} must name two labels, 0 (background) and 1 (foreground).")
        if self.num_auxiliary_classes < 0:
            raise ValueError(f"num_auxiliary_classes={self.num_auxiliary_classes} must be 0 (none) or more.")
        for name in ("drop_path_rate", "attention_block_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if any(size < 1 or size % 2 == 0 for size in self.deformable_kernel_sizes):
            raise ValueError(f"deformable_kernel_sizes={self.deformable_kernel_sizes} must be odd and positive.")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be (height, width) in pixels.")
        if len(self.neck_channels) != 4 or min(self.neck_channels) < 1:
            raise ValueError(f"neck_channels={self.neck_channels} must name four widths, fine to coarse.")
        if self.outward_reference and not self.multi_scale_supervision:
            raise ValueError(
                "outward_reference=True needs multi_scale_supervision=True, whose side outputs mask its gradient "
                "targets; set outward_reference=False as well."
            )
        if self.squeeze_block == "none" and self.context_levels:
            raise ValueError(
                f"context_levels={self.context_levels} widens the coarsest map, which only a squeeze block maps back; "
                "set context_levels=0 or choose a squeeze_block."
            )
        if self.num_squeeze_blocks > 1 and self.context_levels:
            raise ValueError(
                f"num_squeeze_blocks={self.num_squeeze_blocks} blocks follow each other only where their input and "
                f"output widths agree; set context_levels=0 (it is {self.context_levels}) or num_squeeze_blocks=1."
            )

    @property
    def is_swin(self) -> bool:
        """Whether the backbone is this package's own Swin."""
        return self.backbone.startswith("swin")

    @property
    def uses_neck(self) -> bool:
        """Whether the backbone's maps have one scale only (a plain ViT) and pass through the pyramid neck."""
        return self.backbone.startswith("dino_v3")

    @property
    def backbone_channels(self) -> tuple[int, ...]:
        """Channels of the backbone's four maps, fine to coarse, before the multi-scale input is fused."""
        if self.is_swin:
            return tuple(self.embed_dim * 2**stage for stage in range(4))
        return TIMM_BACKBONE_CHANNELS[self.backbone]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the four maps, fine to coarse, after the multi-scale input is fused (C1..C4 of the paper)."""
        factor = 2 if self.multi_scale_input == "cat" else 1
        return tuple(factor * channels for channels in self.backbone_channels)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Channels of the four maps that the decoder works on, fine to coarse: the neck's, or `feature_channels`."""
        if not self.uses_neck:
            return self.feature_channels
        factor = 2 if self.multi_scale_input == "cat" else 1
        return tuple(factor * channels for channels in self.neck_channels)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the library's, and completes the config.json of a released checkpoint, which names no architecture.

        The architecture is read from the names and shapes of the tensors beside it, size from the table of known ids.

        Raises:
            ValueError: the tensors are not those of a BiRefNet that this package knows; the message says why.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if pickled_weights(pretrained_model_name_or_path, **hub_kwargs) is not None:
            settings = released_config_dict({}, str(pretrained_model_name_or_path), **hub_kwargs)
            return settings, {name: value for name, value in kwargs.items() if name not in hub_kwargs}
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_released_config(config_dict):
            config_dict = released_config_dict(config_dict, str(pretrained_model_name_or_path), **hub_kwargs)
        return config_dict, kwargs

    @classmethod
    def own_settings(cls) -> set[str]:
        """Names of the settings that the library's configurations do not have."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(cls)} - inherited | {"num_labels"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "BiRefNetConfig":
        """As the library's, but settings given as keyword arguments are validated together with the dictionary's."""
        config_dict = {name: value for name, value in config_dict.items() if name != "bb_pretrained"}
        config_dict |= {name: kwargs.pop(name) for name in cls.own_settings() & kwargs.keys()}
        return super().from_dict(config_dict, **kwargs)


__all__ = ["BiRefNetConfig"]
