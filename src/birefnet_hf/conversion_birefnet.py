"""Released BiRefNet files: the table of their tensor names, and their architecture read from names and shapes."""

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_safetensors_file_metadata
from safetensors import safe_open
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.utils import CONFIG_NAME, cached_file, logging

from .checkpoints_birefnet import get_checkpoint


logger = logging.get_logger(__name__)

SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")

# Constant buffers that the network rebuilds: in the files, never needed.
IGNORED_TENSORS = re.compile(r"relative_position_index$")

Shapes = dict[str, tuple[int, ...]]

# Channels of the four feature maps, fine to coarse, of the backbones that timm builds. All but the last are upstream's.
TIMM_BACKBONE_CHANNELS = {
    "pvt_v2_b5": (64, 128, 320, 512),
    "pvt_v2_b2": (64, 128, 320, 512),
    "pvt_v2_b1": (64, 128, 320, 512),
    "pvt_v2_b0": (32, 64, 160, 256),
    "dino_v3_7b": (4096,) * 4,
    "dino_v3_h_plus": (1280,) * 4,
    "dino_v3_l": (1024,) * 4,
    "dino_v3_b": (768,) * 4,
    "dino_v3_s_plus": (384,) * 4,
    "dino_v3_s": (384,) * 4,
    "resnet50": (256, 512, 1024, 2048),
    "vgg16": (128, 256, 512, 512),
    "vgg16bn": (128, 256, 512, 512),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
}

# Shape of the named Swin v1 backbones; `backbone="swin"` takes the same four fields from the user.
SWIN_VARIANTS = {
    "swin_v1_l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12},
    "swin_v1_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window_size": 12},
    "swin_v1_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
    "swin_v1_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
}


def _build_name_table() -> list[tuple[str, str]]:
    """Pairs of regular expressions (released name, name in this package), applied one after the other.

    Every rule is reversible: saving applies them backwards, from last to first. Hence the general rules stand before
    those that refine their result, and no two backbones share a target with different sources, since the rules do not
    know which backbone a file has.
    """
    table = [(r"^bb\.", r"^backbone\.")]
    # ResNet and VGG: conv1..4 are the stages.
    table += [(rf"^backbone\.conv{i}\.", rf"^backbone\.stages\.{i - 1}\.") for i in range(1, 5)]
    # PVTv2: patch_embed1..4, block1..4, norm1..4; Swin: norm0..3.
    table += [(rf"^backbone\.patch_embed{i}\.", rf"^backbone\.patch_embeds\.{i}\.") for i in range(1, 5)]
    table += [(rf"^backbone\.block{i}\.", rf"^backbone\.blocks\.{i}\.") for i in range(1, 5)]
    table += [(rf"^backbone\.norm{i}\.", rf"^backbone\.norms\.{i}\.") for i in range(5)]
    table += [(r"\.mlp\.dwconv\.dwconv\.", r"\.mlp\.dwconv\.")]
    # Attention blocks inside decoder and squeeze blocks, or alone as squeeze blocks.
    table += [
        (r"\.aspp1\.", r"\.pointwise_branch\."),
        (r"\.aspp_deforms\.", r"\.deformable_branches\."),
        *((rf"\.aspp{i}\.", rf"\.dilated_branches\.{i - 2}\.") for i in range(2, 5)),
        (r"(_branch|_branches\.\d+)\.atrous_conv\.", r"\1\.conv\."),
        (r"(_branch|_branches\.\d+)\.bn\.", r"\1\.norm\."),
        (r"\.global_avg_pool\.1\.", r"\.global_branch\.conv\."),
        (r"\.global_avg_pool\.2\.", r"\.global_branch\.norm\."),
        (r"\.dec_att\.", r"\.attention\."),
        (r"\.attention\.conv1\.", r"\.attention\.projection\.conv\."),
        (r"\.attention\.bn1\.", r"\.attention\.projection\.norm\."),
        (r"^(squeeze_module\.\d+)\.conv1\.", r"^\1\.projection\.conv\."),
        (r"^(squeeze_module\.\d+)\.bn1\.", r"^\1\.projection\.norm\."),
    ]
    # Decoder and squeeze blocks.
    table += [(r"\.bn_in\.", r"\.norm_in\."), (r"\.bn_out\.", r"\.norm_out\."), (r"\.conv_resi\.", r"\.shortcut\.")]
    # Decoder levels. The image branch of level i is called ipt_blk{i+1}, the lateral block that leads into level i
    # lateral_block{i+1}; ipt_blk1 belongs to the full-resolution output.
    for level in (4, 3, 2, 1):
        here = rf"^decoder\.levels\.{level}\."
        table += [
            (rf"^decoder\.ipt_blk{level + 1}\.", rf"{here}inward_reference\."),
            (rf"{here}inward_reference\.conv1\.", rf"{here}inward_reference\.conv_in\."),
            (rf"^decoder\.decoder_block{level}\.", rf"{here}block\."),
            (rf"^decoder\.lateral_block{level + 1}\.conv\.", rf"{here}lateral\."),
            (rf"^decoder\.conv_ms_spvn_{level}\.", rf"{here}side_head\."),
            (rf"^decoder\.gdt_convs_{level}\.0\.", rf"{here}outward_reference\.conv\."),
            (rf"^decoder\.gdt_convs_{level}\.1\.", rf"{here}outward_reference\.norm\."),
            (rf"^decoder\.gdt_convs_pred_{level}\.0\.", rf"{here}outward_reference\.gradient_head\."),
            (rf"^decoder\.gdt_convs_attn_{level}\.0\.", rf"{here}outward_reference\.attention_head\."),
        ]
    table += [
        (r"^decoder\.ipt_blk1\.", r"^decoder\.inward_reference\."),
        (r"^decoder\.inward_reference\.conv1\.", r"^decoder\.inward_reference\.conv_in\."),
        (r"^decoder\.conv_out1\.0\.", r"^decoder\.mask_head\."),
    ]
    table += [(rf"^decoder\.pyramid_neck_x{i}\.conv\.", rf"^decoder\.neck\.{i - 1}\.") for i in range(1, 5)]
    table += [(r"^cls_head\.0\.", r"^class_head\.")]
    return table


# The one table between released names and ours; the library applies it when it loads and, backwards, when it saves.
RELEASED_TO_LIBRARY_NAMES = _build_name_table()

register_checkpoint_conversion_mapping(
    "birefnet",
    [WeightRenaming(source_patterns=released, target_patterns=ours) for released, ours in RELEASED_TO_LIBRARY_NAMES],
    overwrite=True,  # the remote-code copy of this file may run beside the installed package
)


def to_library_name(name: str) -> str:
    """A tensor's name in this package, from the released one; a name of this package stays as it is."""
    for released, ours in RELEASED_TO_LIBRARY_NAMES:
        # Both are patterns, as names are replaced in both directions: of escapes and anchors a replacement has none.
        name = re.sub(released, re.sub(r"\\(?!\d)|\^", "", ours), name)
    return name


def strip_training_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Maps each tensor name to itself without the `module.` (DDP) and `_orig_mod.` (torch.compile) prefixes."""
    return {name: re.sub(r"^(?:module\.|_orig_mod\.)+", "", name) for name in names}


def is_released_config(config_dict: Mapping[str, Any]) -> bool:
    """Whether a config.json is a released checkpoint's, which says `architectures: ["BiRefNet"]` and no model_type.

    The remote code of those repositories declared the model type of another network, so that one may appear as well.
    """
    if "backbone" in config_dict:
        return False
    foreign_type = config_dict.get("model_type") in (None, "SegformerForSemanticSegmentation")
    return foreign_type and ("BiRefNet" in (config_dict.get("architectures") or []) or "bb_pretrained" in config_dict)


def released_config_dict(config_dict: Mapping[str, Any], name_or_path: str, **hub_kwargs) -> dict[str, Any]:
    """Settings of a released checkpoint: architecture from its tensors, image size and task from the table of known ids.

    Args:
        config_dict: The checkpoint's own config.json; of it only dtype and label names are kept. Its `auto_map` and
            `custom_pipelines` point to remote code that this package replaces.
        name_or_path: Hub id or directory.
        **hub_kwargs: `cache_dir`, `token`, `revision`, ... as `from_pretrained` takes them.

    Raises:
        ValueError: the tensors are not those of a known BiRefNet.
        OSError: there is no weights file.
    """
    settings: dict[str, Any] = {
        name: config_dict[name] for name in ("dtype", "torch_dtype", "id2label", "label2id") if name in config_dict
    }
    shapes = read_tensor_shapes(name_or_path, **hub_kwargs)
    settings.update(infer_architecture(shapes, source=name_or_path))
    settings.update(model_type="birefnet", architectures=["BiRefNetForImageSegmentation"])
    checkpoint = get_checkpoint(name_or_path)
    if checkpoint is not None:
        settings["loss_task"] = checkpoint.loss_task
        if checkpoint.size is not None:
            settings["image_size"] = checkpoint.size
    return settings


def pickled_weights(name_or_path: str | os.PathLike[str], **hub_kwargs) -> Path | None:
    """The file of a checkpoint that is published as a pickled state dict and nothing else; None for all others.

    Raises:
        OSError: such a checkpoint has no file of the known name, or cannot be reached.
    """
    name = os.fspath(name_or_path)
    checkpoint = get_checkpoint(name)
    if checkpoint is None or checkpoint.weights_file is None or os.path.isfile(name):
        return None
    if cached_file(name, CONFIG_NAME, **hub_kwargs, _raise_exceptions_for_missing_entries=False) is not None:
        return None
    return Path(cached_file(name, checkpoint.weights_file, **hub_kwargs))


def read_tensor_shapes(name_or_path: str, **hub_kwargs) -> Shapes:
    """Names and shapes of a checkpoint's tensors, without reading their data.

    Args:
        name_or_path: Hub id, directory, or a single .safetensors / .pth file.
        **hub_kwargs: `cache_dir`, `token`, `revision`, `subfolder`, `local_files_only`, `force_download`.

    Raises:
        OSError: there is no weights file, or it is not readable.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _read_file_shapes(path)
    if path.is_dir():
        folder = path / (hub_kwargs.get("subfolder") or "")
        if (folder / SAFETENSORS_NAME).is_file():
            return _read_file_shapes(folder / SAFETENSORS_NAME)
        if (folder / SAFETENSORS_INDEX_NAME).is_file():
            index = json.loads((folder / SAFETENSORS_INDEX_NAME).read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
            return {name: shape for shard in shards for name, shape in _read_file_shapes(folder / shard).items()}
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if len(pickles) == 1:
            return _read_file_shapes(pickles[0])
        raise OSError(f"{folder} has no {SAFETENSORS_NAME}; it holds {sorted(os.listdir(folder))[:10]}.")
    if (pickled := pickled_weights(name_or_path, **hub_kwargs)) is not None:
        return _read_file_shapes(pickled)
    cached = cached_file(
        name_or_path,
        SAFETENSORS_NAME,
        **{**hub_kwargs, "local_files_only": True, "force_download": False},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if cached is not None and not hub_kwargs.get("force_download"):
        return _read_file_shapes(Path(cached))
    if hub_kwargs.get("local_files_only") or hub_kwargs.get("subfolder"):
        return _read_file_shapes(Path(cached_file(name_or_path, SAFETENSORS_NAME, **hub_kwargs)))
    # Only the header is fetched, so that a config can be looked at without downloading the weights.
    metadata = parse_safetensors_file_metadata(
        name_or_path, SAFETENSORS_NAME, revision=hub_kwargs.get("revision"), token=hub_kwargs.get("token")
    )
    return {name: tuple(info.shape) for name, info in metadata.tensors.items()}


def _read_file_shapes(path: Path) -> Shapes:
    if path.suffix in PICKLE_SUFFIXES:
        return {name: tuple(tensor.shape) for name, tensor in load_state_dict_file(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own error type, and OSError for some damage
        raise OSError(f"{path} is not a readable safetensors file: {error}") from error


def load_state_dict_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pth file under their own names, training prefixes removed.

    Pickled files are read with `weights_only=True`: nothing in them is executed.

    Raises:
        OSError: the file is damaged or holds something else than named tensors.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        try:
            # Files of before PyTorch 1.6 are no archives.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, pickle and runtime errors, depending on the damage
            raise OSError(f"{path} is not a readable PyTorch weights file: {error}") from error
        for key in ("state_dict", "model", "model_state_dict", "module", "net"):
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    else:
        try:
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        kind = type(content).__name__
        if isinstance(content, Mapping):
            other = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
            kind = f"a dictionary with other things ({', '.join(other[:5])})"
        raise OSError(f"{path} holds {kind}, not a dictionary of tensors alone.")
    renamed = strip_training_prefixes(content)
    return {renamed[name]: tensor for name, tensor in content.items()}


def infer_architecture(shapes: Mapping[str, tuple[int, ...]], source: str = "the checkpoint") -> dict[str, Any]:
    """The `BiRefNetConfig` fields that follow from the names and shapes of a released checkpoint's tensors.

    Args:
        shapes: Released tensor name → shape; training prefixes are allowed.
        source: What to call the checkpoint in messages.

    Raises:
        ValueError: the tensors belong to the old academic architecture, were trained without BatchNorm, lack parts,
            or are no BiRefNet at all.
    """
    stripped = strip_training_prefixes(shapes)
    shapes = {stripped[name]: tuple(shape) for name, shape in shapes.items()}
    _refuse_foreign_files(shapes, source)
    try:
        return _infer_settings(shapes, source)
    except KeyError as error:
        raise ValueError(f"{source} has no tensor {error}: the file is incomplete or another network.") from error


def _infer_settings(shapes: Shapes, source: str) -> dict[str, Any]:
    """What `infer_architecture` returns; KeyError where a tensor is missing."""
    settings = _infer_backbone(shapes, source)
    backbone_channels = settings.pop("channels")

    # Width of the coarsest map the decoder gets, against the backbone's own: doubled where two scales are concatenated.
    uses_neck = "decoder.pyramid_neck_x4.conv.weight" in shapes
    if uses_neck:
        third_channels = shapes["decoder.pyramid_neck_x3.conv.weight"][1]
    else:
        third_channels = shapes["decoder.lateral_block4.conv.weight"][1]
    factor, remainder = divmod(third_channels, backbone_channels[2])
    if remainder or factor not in (1, 2):
        raise ValueError(
            f"{source}: the decoder takes {third_channels} channels at stride 16, the backbone "
            f"{settings['backbone']} gives {backbone_channels[2]}: the two do not belong together."
        )
    settings["multi_scale_input"] = "cat" if factor == 2 else "none"
    if factor == 1:
        logger.warning(
            f"{source}: multi_scale_input 'none' and 'add' have the same tensors; 'none' is assumed. "
            "If it was trained with 'add', pass multi_scale_input='add' to from_pretrained."
        )
    if uses_neck:
        settings["neck_channels"] = tuple(
            shapes[f"decoder.pyramid_neck_x{i}.conv.weight"][0] // factor for i in range(1, 5)
        )
    settings.update(_infer_squeeze(shapes, tuple(factor * channels for channels in backbone_channels), source))
    settings.update(_infer_decoder(shapes))
    if "cls_head.0.weight" in shapes:
        settings["num_auxiliary_classes"] = shapes["cls_head.0.weight"][0]
    return settings


def _refuse_foreign_files(shapes: Shapes, source: str) -> None:
    """Raises a ValueError that names the cause for files that no setting of this network can load."""
    if any(name.startswith("backbone.") for name in shapes) and any(name.startswith("decoder.") for name in shapes):
        raise ValueError(
            f"{source} seems to hold the state dict of this package's own model, whose names files do not have: build the "
            "model, load it with `load_state_dict`, and write a directory with `save_pretrained`."
        )
    if not any(name.startswith("bb.") for name in shapes) or not any(name.startswith("decoder.") for name in shapes):
        raise ValueError(
            f"{source} is not a BiRefNet checkpoint: no tensor is named bb.* and decoder.* "
            f"(its first names: {sorted(shapes)[:5]})."
        )
    if "decoder.decoder_block4.conv_in.weight" not in shapes or "decoder.conv_out1.0.weight" not in shapes:
        raise ValueError(
            f"{source} has no decoder.decoder_block4 or decoder.conv_out1: the file is incomplete or another network."
        )
    has_image_branch = any(name.startswith("decoder.ipt_blk") for name in shapes)
    has_gradients = any(name.startswith("decoder.gdt_convs_") for name in shapes)
    if (has_image_branch and "decoder.ipt_blk5.conv1.weight" not in shapes) or (
        has_gradients and "decoder.gdt_convs_4.0.weight" not in shapes
    ):
        raise ValueError(
            f"{source} is of the older academic BiRefNet architecture (no decoder.ipt_blk5 or decoder.gdt_convs_4; "
            "files such as ep480 and DIS_ep580), which is another network. Use a current release, e.g. "
            "ZhengPeng7/BiRefNet or ZhengPeng7/BiRefNet-DIS5K."
        )
    if "decoder.decoder_block4.bn_in.weight" not in shapes:
        raise ValueError(
            f"{source} was trained without BatchNorm (upstream drops it when its training batch size is 1), so its "
            "decoder has no normalisation tensors. Train it again with a batch size above 1."
        )


def _infer_backbone(shapes: Shapes, source: str) -> dict[str, Any]:
    """Backbone name and, for Swin, its shape; `channels` holds the widths of its four maps, fine to coarse."""

    def count_blocks(pattern: str) -> tuple[int, ...]:
        indices = [tuple(map(int, match.groups())) for name in shapes if (match := re.match(pattern, name))]
        stages = sorted({stage for stage, _ in indices})
        return tuple(1 + max(block for stage_, block in indices if stage_ == stage) for stage in stages)

    if "bb.patch_embed.proj.weight" in shapes and "bb.layers.0.blocks.0.attn.qkv.weight" in shapes:
        tables = [shapes[f"bb.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(4)]
        swin = {
            "embed_dim": shapes["bb.patch_embed.proj.weight"][0],
            "depths": count_blocks(r"bb\.layers\.(\d+)\.blocks\.(\d+)\."),
            "num_heads": tuple(table[1] for table in tables),
            "window_size": (int(tables[0][0] ** 0.5) + 1) // 2,
        }
        name = next((name for name, variant in SWIN_VARIANTS.items() if variant == swin), "swin")
        return {"backbone": name, **swin, "channels": tuple(swin["embed_dim"] * 2**i for i in range(4))}

    name = None
    if "bb.patch_embed1.proj.weight" in shapes:
        depths = count_blocks(r"bb\.block(\d+)\.(\d+)\.")
        known = {
            (32, (2, 2, 2, 2)): "pvt_v2_b0",
            (64, (2, 2, 2, 2)): "pvt_v2_b1",
            (64, (3, 4, 6, 3)): "pvt_v2_b2",
            (64, (3, 6, 40, 3)): "pvt_v2_b5",
        }
        name = known.get((shapes["bb.patch_embed1.proj.weight"][0], depths))
    elif "bb.model.cls_token" in shapes:
        gated = "bb.model.blocks.0.mlp.fc1_g.weight" in shapes
        width = shapes["bb.model.cls_token"][-1]
        known = {
            384: "dino_v3_s_plus" if gated else "dino_v3_s",
            768: "dino_v3_b",
            1024: "dino_v3_l",
            1280: "dino_v3_h_plus",
            4096: "dino_v3_7b",
        }
        name = known.get(width)
    elif "bb.conv2.0.conv1.weight" in shapes:
        name = "resnet50" if count_blocks(r"bb\.conv([234])\.(\d+)\.") == (4, 6, 3) else None
    elif shapes.get("bb.conv1.0.weight") == (64, 3, 3, 3):
        name = "vgg16bn" if "bb.conv1.1.running_mean" in shapes else "vgg16"
    elif sum(name.endswith(".conv_dw.weight") for name in shapes) == 16:
        name = "tf_efficientnet_lite0"  # of the lite ones, only this has so few blocks
    if name is None:
        names = sorted(name for name in shapes if name.startswith("bb."))
        raise ValueError(
            f"{source} has a backbone that this package does not know (bb.* tensors such as {names[:4]}). Known are "
            f"{[*SWIN_VARIANTS, *TIMM_BACKBONE_CHANNELS]} and Swin v1 of any shape."
        )
    return {"backbone": name, "channels": TIMM_BACKBONE_CHANNELS[name]}


def _infer_squeeze(shapes: Shapes, channels: tuple[int, ...], source: str) -> dict[str, Any]:
    """Squeeze block, how many, and how much context they take; `channels` are the fused maps', fine to coarse."""
    indices = {int(match.group(1)) for name in shapes if (match := re.match(r"squeeze_module\.(\d+)\.", name))}
    if not indices:
        return {"squeeze_block": "none", "num_squeeze_blocks": 1, "context_levels": 0}
    if "squeeze_module.0.conv_in.weight" in shapes:
        block = "residual" if "squeeze_module.0.conv_resi.weight" in shapes else "basic"
        in_channels = shapes["squeeze_module.0.conv_in.weight"][1]
    elif "squeeze_module.0.aspp1.atrous_conv.regular_conv.weight" in shapes:
        block, in_channels = "aspp_deformable", shapes["squeeze_module.0.aspp1.atrous_conv.regular_conv.weight"][1]
    elif "squeeze_module.0.aspp1.atrous_conv.weight" in shapes:
        block, in_channels = "aspp", shapes["squeeze_module.0.aspp1.atrous_conv.weight"][1]
    else:
        raise ValueError(f"{source}: squeeze_module.0 is no block that BiRefNet has.")
    for levels in range(4):
        if sum(channels[3 - levels : 3]) + channels[3] == in_channels:
            return {"squeeze_block": block, "num_squeeze_blocks": len(indices), "context_levels": levels}
    raise ValueError(
        f"{source}: the squeeze module takes {in_channels} channels, which maps of {channels} channels cannot give."
    )


def _infer_decoder(shapes: Shapes) -> dict[str, Any]:
    """Settings of the decoder, read from level 4 where the levels agree."""
    block = "decoder.decoder_block4"
    settings: dict[str, Any] = {
        "decoder_block": "residual" if f"{block}.conv_resi.weight" in shapes else "basic",
        "inward_reference": "decoder.ipt_blk5.conv1.weight" in shapes,
        "outward_reference": "decoder.gdt_convs_4.0.weight" in shapes,
        "multi_scale_supervision": "decoder.conv_ms_spvn_4.weight" in shapes,
    }
    inner = [shapes[f"decoder.decoder_block{level}.conv_in.weight"][:2] for level in (4, 3, 2, 1)]
    settings["adaptive_inner_channels"] = len({width for width, _ in inner}) > 1
    if not settings["adaptive_inner_channels"]:
        settings["inner_channels"] = inner[0][0]
    prefixes = (f"{block}.dec_att.", "squeeze_module.0.")
    settings["decoder_attention"] = "none"
    for prefix in prefixes:
        deformable = f"{prefix}aspp_deforms.0.bn.weight" in shapes
        if prefix == prefixes[0] and f"{prefix}aspp1.bn.weight" in shapes:
            settings["decoder_attention"] = "aspp_deformable" if deformable else "aspp"
        if f"{prefix}aspp1.bn.weight" in shapes:
            settings["branch_channels"] = shapes[f"{prefix}aspp1.bn.weight"][0]
        if deformable:
            kernels = []
            while (name := f"{prefix}aspp_deforms.{len(kernels)}.atrous_conv.regular_conv.weight") in shapes:
                kernels.append(shapes[name][2])
            settings["deformable_kernel_sizes"] = tuple(kernels)
    if settings["inward_reference"]:
        settings["image_channels"] = shapes["decoder.ipt_blk1.conv1.weight"][0]
        settings["split_image_patches"] = shapes["decoder.ipt_blk5.conv1.weight"][1] != 3
    if settings["outward_reference"]:
        settings["gradient_channels"] = shapes["decoder.gdt_convs_4.0.weight"][0]
    return settings


__all__ = ["RELEASED_TO_LIBRARY_NAMES", "infer_architecture", "load_state_dict_file", "read_tensor_shapes"]
