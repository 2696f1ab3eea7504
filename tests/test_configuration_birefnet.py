"""BiRefNetConfig: what it stores, what it refuses and how it says so."""

import functools
import json
from typing import get_args

import pytest
from conftest import tiny_settings
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from birefnet_hf import BiRefNetConfig
from birefnet_hf.configuration_birefnet import BackboneName


SETTINGS = {
    "default": {},
    "custom swin": tiny_settings(),
    "plain vit": {"backbone": "dino_v3_s", "neck_channels": [8, 16, 32, 64], "freeze_backbone": False},
    "older release": {"backbone": "swin_v1_t", "patch_order": "wg_hg_c", "image_size": [2048, 1024]},
    "everything else": {
        "backbone": "pvt_v2_b2",
        "drop_path_rate": 0.0,
        "multi_scale_input": "add",
        "context_levels": 0,
        "squeeze_block": "aspp",
        "num_squeeze_blocks": 2,
        "decoder_block": "residual",
        "decoder_attention": "none",
        "inner_channels": 32,
        "adaptive_inner_channels": True,
        "branch_channels": 64,
        "deformable_kernel_sizes": [3],
        "attention_block_dropout": 0.0,
        "inward_reference": False,
        "split_image_patches": False,
        "image_channels": 8,
        "outward_reference": False,
        "gradient_channels": 8,
        "multi_scale_supervision": False,
        "num_auxiliary_classes": 5,
        "loss_task": "matting",
        "initializer_range": 0.1,
        "id2label": {0: "other", 1: "hair"},
        "label2id": {"other": 0, "hair": 1},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_saved_and_loaded(settings, tmp_path):
    config = BiRefNetConfig(**settings)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["model_type"] == "birefnet"
    for loaded in (BiRefNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is BiRefNetConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        for name, value in settings.items():
            assert getattr(loaded, name) == (tuple(value) if isinstance(value, list) else value), name
    for name in ("depths", "deformable_kernel_sizes", "neck_channels", "image_size"):
        assert isinstance(getattr(config, name), tuple) or getattr(config, name) is None


@pytest.mark.parametrize("backbone", get_args(BackboneName))
def test_every_backbone_has_channels(backbone):
    config = BiRefNetConfig(**(tiny_settings() if backbone == "swin" else {"backbone": backbone}))
    assert config.is_swin == ("swin" in backbone)
    assert config.uses_neck == config.freeze_backbone == ("dino" in backbone)
    assert len(config.backbone_channels) == 4 and list(config.backbone_channels) == sorted(config.backbone_channels)
    assert config.feature_channels == tuple(2 * channels for channels in config.backbone_channels)
    neck_channels = (384, 768, 1536, 3072)
    assert config.decoder_channels == (neck_channels if config.uses_neck else config.feature_channels)


def test_one_scale_does_not_widen():
    for multi_scale_input in ("none", "add"):
        config = BiRefNetConfig(backbone="dino_v3_b", multi_scale_input=multi_scale_input)
        assert config.feature_channels == (768,) * 4
        assert config.decoder_channels == (192, 384, 768, 1536)


def test_swin_shapes():
    named = BiRefNetConfig(backbone="swin_v1_b")
    assert (named.embed_dim, named.depths, named.num_heads, named.window_size) == (
        128, (2, 2, 18, 2), (4, 8, 16, 32), 12
    )  # fmt: skip
    free = BiRefNetConfig(backbone="swin", embed_dim=24, depths=[1, 2, 3, 1], num_heads=[2, 3, 4, 6], window_size=5)
    assert free.backbone_channels == (24, 48, 96, 192)
    # Stating what a name means is no contradiction.
    assert BiRefNetConfig(backbone="swin_v1_b", window_size=12).to_dict() == named.to_dict()


def test_two_labels_for_one_logit():
    config = BiRefNetConfig()
    assert config.id2label == {0: "background", 1: "foreground"}
    assert config.label2id == {"background": 0, "foreground": 1}
    assert config.num_labels == BiRefNetConfig(num_labels=2).num_labels == 2
    for build in (BiRefNetConfig, functools.partial(BiRefNetConfig.from_dict, {})):
        with pytest.raises(ValueError, match="num_labels must be 2"):
            build(num_labels=1)


@pytest.mark.parametrize(
    "changes, words",
    [
        # Choices: the message names the field, what was given and what there is.
        ({"multi_scale_input": "concat"}, ["multi_scale_input", "concat", "'none'", "'add'", "'cat'"]),
        ({"backbone": "swin_l"}, ["backbone", "swin_l", "'swin_v1_l'", "'pvt_v2_b0'", "'dino_v3_7b'"]),
        ({"context_levels": 4}, ["context_levels", "4", "0, 1, 2, 3"]),
        ({"squeeze_block": "BasicDecBlk_x1"}, ["squeeze_block", "'basic'", "'residual'", "'aspp_deformable'"]),
        ({"decoder_block": "resblk"}, ["decoder_block", "'basic'", "'residual'"]),
        ({"decoder_attention": "ASPP"}, ["decoder_attention", "'none'", "'aspp'"]),
        ({"patch_order": "old"}, ["patch_order", "'c_hg_wg'", "'wg_hg_c'"]),
        ({"loss_task": "DIS5K"}, ["loss_task", "'dis'", "'matting'"]),
        # Types.
        ({"inner_channels": 8.5}, ["inner_channels", "int", "8.5"]),
        ({"drop_path_rate": "0.1"}, ["drop_path_rate", "float"]),
        ({"inward_reference": "yes"}, ["inward_reference", "bool"]),
        # Ranges.
        *(
            ({name: 0}, [f"{name}=0", "at least 1"])
            for name in ("inner_channels", "branch_channels", "image_channels")
        ),
        ({"gradient_channels": -1}, ["gradient_channels=-1", "at least 1"]),
        ({"num_squeeze_blocks": 0}, ["num_squeeze_blocks=0", "at least 1"]),
        ({"num_channels": 4}, ["num_channels=4", "3"]),
        ({"id2label": {0: "object"}}, ["id2label={0: 'object'}", "0 (background) and 1 (foreground)"]),
        ({"num_auxiliary_classes": -1}, ["num_auxiliary_classes=-1", "0"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0", "[0, 1)"]),
        ({"attention_block_dropout": -0.1}, ["attention_block_dropout=-0.1", "[0, 1)"]),
        ({"deformable_kernel_sizes": (1, 4)}, ["deformable_kernel_sizes=(1, 4)", "odd"]),
        ({"image_size": (0, 64)}, ["image_size=(0, 64)", "(height, width)"]),
        ({"image_size": [1024]}, ["image_size", "(1024,)", "length 2"]),
        ({"neck_channels": (1, 2, 3)}, ["neck_channels=(1, 2, 3)", "four"]),
        # Between fields.
        ({"backbone": "swin"}, ["embed_dim, depths, num_heads, window_size", "swin_v1_t"]),
        ({"backbone": "swin_v1_t", "window_size": 12}, ["window_size=12", "'swin_v1_t'", "7", "backbone='swin'"]),
        ({"backbone": "pvt_v2_b0", "embed_dim": 8}, ["embed_dim", "Swin", "'pvt_v2_b0'"]),
        (tiny_settings(depths=(2, 2)), ["depths=(2, 2)", "four stages"]),
        (tiny_settings(num_heads=(1, 2, 3, 4)), ["num_heads[2]=3", "32 channels"]),
        (tiny_settings(window_size=1), ["window_size=1", "at least 2"]),
        (tiny_settings(embed_dim=0), ["embed_dim=0", "at least 1"]),
        (tiny_settings(depths=(2, 0, 2, 2)), ["depths=(2, 0, 2, 2)", "at least 1"]),
        ({"multi_scale_supervision": False}, ["outward_reference", "multi_scale_supervision=True"]),
        ({"squeeze_block": "none"}, ["context_levels=3", "context_levels=0", "squeeze_block"]),
        ({"num_squeeze_blocks": 2}, ["num_squeeze_blocks=2", "context_levels=0"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) < 4 else "",
)
def test_refusals_name_the_field_and_what_it_may_be(changes, words):
    with pytest.raises(StrictDataclassError) as error:
        BiRefNetConfig(**changes)
    for word in words:
        assert word in str(error.value)


def test_assignments_are_checked():
    config = BiRefNetConfig()
    with pytest.raises(StrictDataclassError, match="multi_scale_input"):
        config.multi_scale_input = "concat"
    assert config.multi_scale_input == "cat"


def test_unknown_settings_warn_with_a_close_name(caplog):
    config = BiRefNetConfig(backbone="swin_v1_t", inner_chanels=32)
    assert "'inner_chanels'" in caplog.text and "did you mean 'inner_channels'" in caplog.text
    assert config.inner_channels == 64
    caplog.clear()
    BiRefNetConfig(backbone="swin_v1_t", note_to_self="trained on cats")  # what a user adds is no misspelling
    assert not caplog.text


def test_overrides_are_validated_together():
    both = {"outward_reference": False, "multi_scale_supervision": False}
    stored = BiRefNetConfig(backbone="swin_v1_t").to_dict()
    config = BiRefNetConfig.from_dict(stored, **both)
    assert not config.outward_reference and not config.multi_scale_supervision
    with pytest.raises(StrictDataclassError, match="outward_reference"):
        BiRefNetConfig.from_dict(stored, multi_scale_supervision=False)
    # Arguments of the library's own are still its own.
    config, unused = BiRefNetConfig.from_dict(stored, return_unused_kwargs=True, context_levels=1, revision="main")
    assert config.context_levels == 1 and unused == {"revision": "main"}


def test_stochastic_depth_is_the_references():
    """PVTv2's is half of Swin's; whole numbers do for floats."""
    assert [BiRefNetConfig(backbone=name).drop_path_rate for name in ("swin_v1_t", "pvt_v2_b2")] == [0.2, 0.1]
    assert BiRefNetConfig(backbone="pvt_v2_b2", drop_path_rate=0, attention_block_dropout=0).drop_path_rate == 0
