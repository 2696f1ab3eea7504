"""The network as a Transformers model: what every model of the library can do, and what is BiRefNet's own."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_settings
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation
from birefnet_hf.backbone_swin_birefnet import BiRefNetSwinBlock
from birefnet_hf.loss_birefnet import BiRefNetLoss
from birefnet_hf.modeling_birefnet import (
    BiRefNetASPP,
    BiRefNetBatchNorm2d,
    BiRefNetDecoder,
    BiRefNetDeformableConv,
    conv_of_concatenation,
    conv_pair,
    image_laplacian,
    pad_to_divisor,
    resize,
    stack_patches,
)
from birefnet_hf.ops_birefnet import scale_and_shift


# One step away from the tiny network in every direction.
SETTINGS = [
    {},
    {"multi_scale_input": "none"},
    {"multi_scale_input": "add"},
    *({"context_levels": levels} for levels in (0, 1, 2)),
    {"squeeze_block": "none", "context_levels": 0},
    *({"squeeze_block": block} for block in ("residual", "aspp", "aspp_deformable")),
    {"squeeze_block": "residual", "num_squeeze_blocks": 2, "context_levels": 0},
    {"decoder_block": "residual"},
    {"decoder_attention": "none"},
    {"decoder_attention": "aspp"},
    {"adaptive_inner_channels": True},
    {"deformable_kernel_sizes": (5,)},
    {"inward_reference": False},
    {"split_image_patches": False},
    {"patch_order": "wg_hg_c"},
    {"outward_reference": False},
    {"outward_reference": False, "multi_scale_supervision": False},
    {"num_auxiliary_classes": 3},
    {"drop_path_rate": 0.0, "attention_block_dropout": 0.0, "loss_task": "matting"},
    {"freeze_backbone": True},
]
TIMM = {"inner_channels": 8, "branch_channels": 8, "image_channels": 4, "gradient_channels": 4}


def build(attention: str = "sdpa", seed: int = 0, **changes) -> BiRefNetForImageSegmentation:
    """A random network in evaluation mode whose deformable convolutions do displace."""
    torch.manual_seed(seed)
    settings = changes if "backbone" in changes else tiny_settings(**changes)
    config = BiRefNetConfig(**settings)
    model = BiRefNetForImageSegmentation._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BiRefNetDeformableConv):
                module.offset_conv.weight.normal_(std=0.1)
                module.modulator_conv.weight.normal_(std=0.1)
    return model


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (2, 1, 64, 64), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def logits_of(model: BiRefNetForImageSegmentation, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values).logits


# What every model of the library can do.


@torch.no_grad()
def test_determinism(tiny_model):
    pixel_values = image()
    first = tiny_model(pixel_values).logits
    assert first.shape == (2, 1, 64, 64)
    assert first.std() > 0
    assert torch.equal(tiny_model(pixel_values).logits, first)


@torch.no_grad()
def test_model_outputs_equivalence(tiny_model):
    outputs = tiny_model(image(), labels=mask(), output_hidden_states=True)
    as_tuple = tiny_model(image(), labels=mask(), output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs) == 4
    assert list(outputs) == ["loss", "logits", "loss_terms", "hidden_states"]
    for actual, expected in zip(as_tuple, outputs.to_tuple(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("settings", [{}, {"backbone": "pvt_v2_b0", **TIMM}], ids=["swin", "pvt_v2_b0"])
@torch.no_grad()
def test_batching_equivalence(settings):
    model, pixel_values = build(**settings), image(3, 3, 64, 96)
    together = logits_of(model, pixel_values)
    for index in range(3):
        alone = logits_of(model, pixel_values[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_load(dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = BiRefNetForImageSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype and not loaded.training
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "bb.layers.0.blocks.0.attn.qkv.weight" in names and "decoder.conv_out1.0.weight" in names
    assert not any("relative_position_index" in name for name in names)
    torch.testing.assert_close(logits_of(loaded, image()), logits_of(model, image()))


def test_missing_tensors_are_an_error(tiny_model_dir, copy_of):
    """Where the library would fill them with random numbers and warn."""
    folder = copy_of(tiny_model_dir)
    tensors = load_file(folder / "model.safetensors")
    removed = tensors.pop("decoder.conv_out1.0.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*decoder\.mask_head\.weight.*ignore_mismatched_sizes"):
        BiRefNetForImageSegmentation.from_pretrained(folder)
    tensors["decoder.conv_out2.0.weight"] = removed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*has 1 that it does not know.*decoder\.conv_out2"):
        BiRefNetForImageSegmentation.from_pretrained(folder)
    model = BiRefNetForImageSegmentation.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.decoder.mask_head.weight.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [{}, {"backbone": "pvt_v2_b0", **TIMM}, {"backbone": "dino_v3_s", "neck_channels": (8, 8, 16, 16), **TIMM}],
    ids=["swin", "pvt_v2_b0", "dino_v3_s"],
)
def test_can_be_initialized_on_meta(settings):
    """Weights and buffers that no file brings are those of a network built the ordinary way."""
    with torch.device("meta"):
        model = build(**settings)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights()
    torch.manual_seed(0)
    expected = BiRefNetForImageSegmentation(model.config)
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for name, parameter in expected.named_parameters():
        actual = model.get_parameter(name)
        if parameter.numel() > 200:
            spread = 8 * parameter.std().item() / parameter.numel() ** 0.5
            torch.testing.assert_close(actual.mean(), parameter.mean(), rtol=0, atol=spread + 1e-6, msg=name)
            torch.testing.assert_close(actual.std(), parameter.std(), rtol=0.3, atol=1e-6, msg=name)
        assert actual.isfinite().all(), name


def test_initial_weights():
    """Convolutions as PyTorch makes them, Swin's linear layers narrow, deformable convolutions plain."""
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings(inner_channels=32, initializer_range=0.01)))
    conv = model.decoder.levels["4"].block.conv_in.weight
    bound = (conv.shape[1] * 9) ** -0.5
    assert conv.abs().max() <= bound and conv.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    attention = model.backbone.layers[3].blocks[1].attn
    assert attention.qkv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert attention.relative_position_bias_table.std().item() == pytest.approx(0.01, rel=0.2)
    assert not attention.qkv.bias.any()
    deformable = [module for module in model.modules() if isinstance(module, BiRefNetDeformableConv)]
    assert len(deformable) == 5 * 4
    for module in deformable:
        assert not module.offset_conv.weight.any() and not module.modulator_conv.bias.any()
        weight = module.regular_conv.weight
        hidden_states = image(1, weight.shape[1], 6, 5)
        plain = nn.functional.conv2d(hidden_states, weight, padding=weight.shape[2] // 2)
        torch.testing.assert_close(module(hidden_states), plain, rtol=1e-4, atol=1e-5)


def test_all_tensors_are_parameters_or_buffers(tiny_model):
    tiny_model(image())
    for name, module in tiny_model.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not plain, f"{name}: {plain}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_eager_matches_sdpa_inference(dtype, tolerance):
    pixel_values = image(2, 3, 70, 41)  # windows that need padding in every stage
    model = build().to(dtype)
    fused = logits_of(model, pixel_values)
    model.set_attn_implementation("eager")
    assert (fused - logits_of(model, pixel_values)).abs().max() < tolerance


@torch.no_grad()
def test_attention_outputs():
    model = build(attention="eager")
    outputs = model(image(), output_attentions=True)
    assert len(outputs.attentions) == 2 * 8  # two passes, two blocks in each of four stages
    for weights, (windows, heads) in zip(
        outputs.attentions[::2],
        [(16, 1), (4, 2), (1, 2), (1, 4), (4, 1), (1, 2), (1, 2), (1, 4)],
        strict=True,
    ):
        assert weights.shape == (2 * windows, heads, 16, 16)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert model(image()).attentions is None


@torch.no_grad()
def test_hidden_states_output(tiny_model):
    shapes = [(16, 16), (32, 8), (64, 4), (128, 2), (128, 2), (64, 2), (32, 4), (16, 8), (8, 16)]
    hidden_states = tiny_model(image(), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in hidden_states] == [(2, c, side, side) for c, side in shapes]
    tiny_model.config.output_hidden_states = True
    for actual, expected in zip(tiny_model(image()).hidden_states, hidden_states, strict=True):
        assert torch.equal(actual, expected)
    assert tiny_model(image(), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_close(tiny_model, dtype):
    expected = logits_of(tiny_model, image())
    half = copy.deepcopy(tiny_model).to(dtype)
    actual = logits_of(half, image())  # the pixel values are cast to the weights' dtype
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.1 * expected.std()
    assert torch.equal(logits_of(half, image().to(dtype)), actual)


@torch.no_grad()
@pytest.mark.parametrize("side, convolutions", [(3, 1), (16, 2)])
def test_conv_of_concatenation(side, convolutions, monkeypatch):
    """By two convolutions, or on small maps by one of the concatenation; the same numbers."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1)
    maps = [torch.randn(2, channels, side, side, generator=generator) for channels in (5, 3)]
    expected = conv(torch.cat(maps, dim=1))
    calls, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: calls.append(args) or conv2d(*args, **kwargs))
    torch.testing.assert_close(conv_of_concatenation(conv, maps), expected)
    assert len(calls) == convolutions


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_folded_batch_norm_is_not_rounded(dtype):
    """What it adds is a difference of large numbers, which half precision would lose."""
    generator = torch.Generator().manual_seed(0)
    norm = BiRefNetBatchNorm2d(16).eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 4, generator=generator)
    norm.to(dtype)
    scale, shift = scale_and_shift(norm)
    values = 4 * torch.rand(64, 16, 1, 1, generator=generator)
    expected = norm.float()(values)  # of the same, rounded, weights
    torch.testing.assert_close(values * scale[:, None, None] + shift[:, None, None], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_autocast_is_close(tiny_model):
    expected = logits_of(tiny_model, image())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logits_of(tiny_model, image())
    assert (actual.float() - expected).abs().max() < 0.1 * expected.std()


def test_pixel_values_of_another_dtype(tiny_model):
    expected = logits_of(tiny_model, image().half().float())
    for pixel_values in (image().half(), image().half().double()):
        actual = logits_of(tiny_model, pixel_values)
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3), (1, 4, 64, 64)], ids=str)
def test_wrong_shape_is_named(tiny_model, shape):
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))}\).*\(batch_size, 3, height, width\)"):
        tiny_model(torch.zeros(shape))


def test_offloaded_weights(tiny_model, tmp_path):
    """Weights that are brought in module by module, as `device_map` does where memory is short."""
    pytest.importorskip("accelerate")
    pixel_values = image(1, 3, 48, 80)
    expected = logits_of(tiny_model, pixel_values)
    tiny_model.save_pretrained(tmp_path / "model")
    parts = ("backbone", "squeeze_module", "decoder", "criterion")
    for offloaded in parts[:3]:
        device_map = {part: "disk" if part == offloaded else "cpu" for part in parts}
        model = BiRefNetForImageSegmentation.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / offloaded
        )
        assert next(model.get_submodule(offloaded).parameters()).is_meta
        torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=1e-4, atol=1e-5)


def test_parts_that_stay_on_one_device(tiny_model):
    names = {type(module).__name__ for module in tiny_model.modules()}
    assert {"BiRefNetSwinBackbone", "BiRefNetDecoder"} <= names & set(tiny_model._no_split_modules)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "any batch"])
def test_torch_exportable(tiny_model, dynamic):
    """For one image size; batches of any size on request."""
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=8)}} if dynamic else None
    pixel_values = image(2, 3, 64, 96)
    program = torch.export.export(tiny_model, (), {"pixel_values": pixel_values}, dynamic_shapes=shapes, strict=False)
    exported = program.module()
    for batch_size in (1, 2, 5) if dynamic else (2,):
        pixel_values = image(batch_size, 3, 64, 96, seed=batch_size)
        actual = exported(pixel_values=pixel_values)["logits"]
        torch.testing.assert_close(actual, logits_of(tiny_model, pixel_values), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sdpa_can_compile_dynamic(tiny_model):
    """One graph without breaks, and sizes that change. PyTorch takes minutes over the symbols of each."""
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model, backend="aot_eager", dynamic=True, fullgraph=True)
    for shape in [(2, 3, 64, 96), (1, 3, 64, 64), (3, 3, 128, 96), (2, 3, 70, 41)]:
        pixel_values = image(*shape)
        torch.testing.assert_close(
            logits_of(compiled, pixel_values), logits_of(tiny_model, pixel_values), rtol=1e-4, atol=1e-5
        )


# Sizes.


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (64, 95), (1, 200), (32, 32)], ids=str)
def test_any_size(tiny_model, size):
    height, width = size
    pixel_values = image(2, 3, height, width)
    logits = logits_of(tiny_model, pixel_values)
    assert logits.shape == (2, 1, height, width) and logits.isfinite().all()
    # The same as of an image that was continued to multiples of 32 by hand.
    rows = torch.arange(height + -height % 32).clamp(max=height - 1)
    columns = torch.arange(width + -width % 32).clamp(max=width - 1)
    continued = pixel_values[:, :, rows][:, :, :, columns]
    torch.testing.assert_close(logits_of(tiny_model, continued)[..., :height, :width], logits)


def test_padding_leaves_multiples_alone():
    pixel_values = image(1, 3, 64, 96)
    assert pad_to_divisor(pixel_values) is pixel_values
    assert pad_to_divisor(image(1, 3, 65, 32)).shape == (1, 3, 96, 32)


def test_training_on_sizes_that_are_no_multiples(tiny_model):
    outputs = tiny_model.train()(image(2, 3, 40, 70), labels=mask(2, 1, 40, 70))
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.logits.shape == (2, 1, 40, 70)
    assert all(target.shape == (2, 1, 64, 96) for target in outputs.gradient_targets)


def test_masks_of_truth_values(tiny_model):
    labels = mask(2, 1, 40, 70) > 0.5
    expected = tiny_model(image(2, 3, 40, 70), labels=labels.float()).loss
    assert torch.equal(tiny_model(image(2, 3, 40, 70), labels=labels).loss, expected)


def test_labels_of_another_size(tiny_model):
    """Predictions are resized to the labels, whose thin structures resizing would lose."""
    outputs = tiny_model(image(2, 3, 64, 64), labels=mask(2, 1, 100, 90))
    assert outputs.loss.isfinite() and outputs.logits.shape == (2, 1, 64, 64)


# Settings and training.


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "default")
def test_every_setting_trains(settings):
    model = build(**settings).train()
    config = model.config
    class_ids = torch.tensor([0, 2]) if config.num_auxiliary_classes else None
    outputs = model(image(), labels=mask(), class_ids=class_ids)
    assert outputs.logits.shape == (2, 1, 64, 64)
    sizes = [(2, 1, 2, 2), (2, 1, 4, 4), (2, 1, 8, 8)]
    for maps, present in (
        (outputs.side_logits, config.multi_scale_supervision),
        (outputs.gradient_logits, config.outward_reference),
    ):
        assert [tuple(x.shape) for x in maps] == sizes if present else maps is None
    if config.outward_reference:
        assert [tuple(target.shape) for target in outputs.gradient_targets] == [(2, 1, 64, 64)] * 3
    assert (outputs.class_logits is not None) == (config.num_auxiliary_classes > 0)
    expected_terms = {"bce", "ssim"}
    expected_terms |= {"mae"} if config.loss_task == "matting" else {"iou"}
    expected_terms |= {"gradient"} if config.outward_reference else set()
    expected_terms |= {"classification"} if config.num_auxiliary_classes else set()
    assert outputs.loss_terms.keys() == expected_terms
    assert outputs.loss.isfinite() and outputs.loss > 0

    outputs.loss.backward()
    reached = gradients(model)
    for name, parameter in model.named_parameters():
        if config.freeze_backbone and name.startswith("backbone."):
            assert not parameter.requires_grad and name not in reached, name
        else:
            assert name in reached and reached[name].isfinite().all(), name


def test_every_parameter_moves(tiny_model):
    """Not just reached: nothing is multiplied by zero on the way, once offsets are no longer zero."""
    tiny_model.train()(image(), labels=mask()).loss.backward()
    still = [name for name, gradient in gradients(tiny_model).items() if not gradient.any()]
    assert not still


def test_side_outputs_exist_in_training_only(tiny_model):
    outputs = tiny_model(image(), labels=mask())
    assert outputs.loss.isfinite() and outputs.loss_terms.keys() == {"bce", "iou", "ssim"}
    assert outputs.side_logits is None and outputs.gradient_logits is None and outputs.gradient_targets is None
    outputs = tiny_model.train()(image())
    assert outputs.loss is None and outputs.loss_terms is None
    assert len(outputs.side_logits) == len(outputs.gradient_logits) == len(outputs.gradient_targets) == 3


def test_classes_are_an_auxiliary_of_training():
    model = build(num_auxiliary_classes=3)
    inputs = {"pixel_values": image(), "labels": mask(), "class_ids": torch.tensor([0, 2])}
    outputs = model(**inputs)
    assert outputs.class_logits is None and "classification" not in outputs.loss_terms
    outputs = model.train()(**inputs)
    assert outputs.class_logits.shape == (2, 3)
    expected = 5 * F.cross_entropy(outputs.class_logits, inputs["class_ids"])
    torch.testing.assert_close(outputs.loss_terms["classification"], expected.detach())
    with pytest.raises(ValueError, match="no classification head"):
        build().train()(**inputs)


def test_gradient_targets(tiny_model):
    """The image's Laplacian where the level's own prediction sees the object, with a gradient into the prediction."""
    outputs = tiny_model.train()(image())
    for target, side in zip(outputs.gradient_targets, outputs.side_logits, strict=True):
        expected = image_laplacian(image()) * F.interpolate(side, (64, 64), mode="bilinear", align_corners=True)
        torch.testing.assert_close(target, expected)
        assert target.requires_grad


@pytest.mark.parametrize("size", [(64, 64), (50, 64)])
def test_labels_of_8_bits_are_refused(tiny_model, size):
    labels = (mask(2, 1, 100, 128) > 0.5).to(torch.uint8) * 255
    with pytest.raises(ValueError, match="Divide 8-bit masks by 255"):
        tiny_model.train()(image(2, 3, *size), labels=labels)


@pytest.mark.parametrize("size", [(0, 3, 64, 64), (1, 3, 0, 64)])
def test_nothing_is_refused(tiny_model, size):
    with pytest.raises(ValueError, match="none of them 0"):
        tiny_model(torch.zeros(size))


def test_loading_in_threads(tiny_model_dir):
    """Each has the precision that it was asked for, and so have networks that are built afterwards."""
    dtypes = [torch.float16, torch.float32, torch.bfloat16] * 6
    with ThreadPoolExecutor(4) as pool:
        models = pool.map(
            lambda dtype: BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir, dtype=dtype), dtypes
        )
        for model, dtype in zip(models, dtypes, strict=True):
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


def test_labels_without_channels(tiny_model):
    assert tiny_model(image(), labels=mask()[:, 0]).loss == tiny_model(image(), labels=mask()).loss


def test_loss_is_the_tasks(tiny_model):
    from birefnet_hf.loss_birefnet import BiRefNetLoss

    for task in ("dis", "matting"):
        model = build(loss_task=task)
        outputs = model(image(), labels=mask())
        expected, terms = BiRefNetLoss(task)([outputs.logits], mask())
        torch.testing.assert_close(outputs.loss, expected)
        assert outputs.loss_terms == terms


def test_training_lowers_the_loss():
    model = build(attention_block_dropout=0.0, drop_path_rate=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = F.interpolate(mask(2, 1, 4, 4).round(), (64, 64))
    losses = []
    for _ in range(5):
        loss = model(image(), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("size", [(64, 64), (32, 32)], ids=str)
def test_batch_size_one_trains(tiny_model, size):
    """The pooled branch then normalises a single value per channel, which has no variance."""
    before = {name: buffer.clone() for name, buffer in tiny_model.named_buffers()}
    tiny_model.train()(image(1, 3, *size), labels=mask(1, 1, *size)).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(tiny_model).values())
    for name, buffer in tiny_model.named_buffers():
        changed = not torch.equal(buffer, before[name])
        # At 32 × 32 the coarsest maps are single values, too.
        is_single = ".global_branch." in name or (
            size == (32, 32) and name.startswith(("squeeze_module", "decoder.levels.4"))
        )
        if not name.endswith("num_batches_tracked"):
            assert changed == (name.endswith(("running_mean", "running_var")) and not is_single), name


def test_batch_norm_of_a_single_value():
    norm = BiRefNetBatchNorm2d(4).train()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    expected = copy.deepcopy(norm).eval()(image(1, 4, 1, 1))
    torch.testing.assert_close(norm(image(1, 4, 1, 1)), expected)
    several = norm(image(2, 4, 1, 1))
    plain = F.batch_norm(image(2, 4, 1, 1), None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(several, plain)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("settings", [{}, {"backbone": "pvt_v2_b0", **TIMM}], ids=["swin", "pvt_v2_b0"])
def test_training_gradient_checkpointing(settings, reentrant):
    """The same loss, gradients and running statistics, random numbers included.

    In float64: without gradients another attention kernel is chosen, and batch normalisation amplifies its rounding.
    """
    results = []
    for checkpointing in (False, True):
        model = build(**settings).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(5)
        loss = model(image(), labels=mask()).loss
        loss.backward()
        results.append((loss.detach(), gradients(model), dict(model.named_buffers())))
    (loss, expected, buffers), (checkpointed_loss, actual, checkpointed_buffers) = results
    torch.testing.assert_close(checkpointed_loss, loss)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(checkpointed_buffers[name], buffer, msg=name)


def test_gradient_checkpointing_recomputes(tiny_model):
    blocks = [module for module in tiny_model.modules() if isinstance(module, BiRefNetSwinBlock)]
    runs = []
    blocks[3].attn.register_forward_pre_hook(lambda *_: runs.append(None))
    tiny_model.train().gradient_checkpointing_enable()
    tiny_model(image(), labels=mask()).loss.backward()
    assert len(blocks) == 8 and len(runs) == 2 * 2  # two scales, forward and backward


def test_gradients_can_begin_at_the_input(tiny_model):
    """What adapters on a frozen network with reentrant checkpointing need."""
    assert tiny_model.get_input_embeddings() is tiny_model.backbone.patch_embed.proj
    tiny_model.requires_grad_(False)
    qkv = tiny_model.backbone.layers[1].blocks[0].attn.qkv.requires_grad_(True)
    tiny_model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    tiny_model.enable_input_require_grads()
    tiny_model(image(), labels=mask()).loss.backward()
    assert qkv.weight.grad.any() and len(gradients(tiny_model)) == 2


def test_adapters_take_effect():
    """LoRA on layers whose weights the network reads without calling them, and a copy of the last layer."""
    peft = pytest.importorskip("peft")
    for targets, saved in ((["qkv"], ["mask_head"]), (["conv_out", "mask_head"], None)):
        model, pixel_values = build(), image(1, 3, 48, 64)
        before = logits_of(model, pixel_values)
        config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).train()
        adapted(pixel_values=image(), labels=mask()).loss.backward()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad.any() for parameter in trained)
        with_adapter = logits_of(adapted.eval(), pixel_values)
        assert (with_adapter - before).abs().max() > 1e-4
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, pixel_values), with_adapter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backbone, frozen", [("swin_v1_t", False), ("pvt_v2_b0", False), ("dino_v3_s", True)])
def test_frozen_backbone(backbone, frozen):
    """DINOv3 starts frozen, as upstream; what the setting says goes."""
    for freeze_backbone, expected in ((None, frozen), (True, True), (False, False)):
        with torch.device("meta"):
            model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone, freeze_backbone=freeze_backbone))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != (expected and name.startswith("backbone.")), name


@pytest.mark.parametrize(
    "settings", [{}, {"backbone": "dino_v3_s", "neck_channels": (8, 8, 16, 16), **TIMM}], ids=["swin", "dino"]
)
def test_frozen_backbone_of_a_file(settings, tmp_path):
    """Loading puts other parameters in place of those that were frozen."""
    build(**settings, freeze_backbone=True).save_pretrained(tmp_path)
    for overrides, expected in (({}, True), ({"freeze_backbone": False}, False)):
        model = BiRefNetForImageSegmentation.from_pretrained(tmp_path, **overrides)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != (expected and name.startswith("backbone.")), name


def test_frozen_backbone_trains_the_rest():
    model = build(backbone="dino_v3_s", neck_channels=(8, 8, 16, 16), **TIMM).train()
    model(image(), labels=mask()).loss.backward()
    names = {name.split(".")[0] for name in gradients(model)}
    assert names == {"squeeze_module", "decoder"}


@pytest.mark.filterwarnings("ignore")
def test_trainer_logs_the_mean_loss(tmp_path):
    """Two accumulated batches of one image count as one batch of two; loss terms and tuples do not disturb."""
    pytest.importorskip("accelerate")
    model = build(attention_block_dropout=0.0, drop_path_rate=0.0)
    samples = [{"pixel_values": image(3, 64, 64, seed=seed), "labels": mask(1, 64, 64)} for seed in range(2)]
    expected = []
    reference = copy.deepcopy(model).train()
    for sample in samples:
        with torch.no_grad():
            expected.append(reference(sample["pixel_values"][None], sample["labels"][None]).loss.item())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert logged["loss"] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert math.isfinite(logged["eval_loss"])
    predictions = trainer.predict(samples).predictions
    assert predictions.shape == (2, 1, 64, 64)


# Parts.


@pytest.mark.parametrize("patch_order", ["c_hg_wg", "wg_hg_c"])
def test_stack_patches(patch_order):
    pixel_values = image(2, 3, 12, 8)
    patches = stack_patches(pixel_values, (4, 4), patch_order)
    assert patches.shape == (2, 18, 4, 4)
    for color in range(3):
        for row in range(3):
            for column in range(2):
                channel = (
                    (color * 3 + row) * 2 + column if patch_order == "c_hg_wg" else (column * 3 + row) * 3 + color
                )
                expected = pixel_values[:, color, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                assert torch.equal(patches[:, channel], expected)


def test_image_laplacian():
    """kornia.filters.laplacian(mean over channels, kernel_size=5), its kernel written out."""
    kernel = torch.ones(5, 5, dtype=torch.float64)
    kernel[2, 2] = -24
    kernel /= kernel.abs().sum()
    pixel_values = image(2, 3, 9, 7).double()
    padded = F.pad(pixel_values.mean(dim=1, keepdim=True), (2, 2, 2, 2), mode="reflect")
    expected = F.conv2d(padded, kernel[None, None])
    torch.testing.assert_close(image_laplacian(pixel_values), expected, rtol=0, atol=1e-12)


def test_resize_aligns_corners():
    feature_map = image(1, 2, 3, 4)
    assert resize(feature_map, (3, 4)) is feature_map
    resized = resize(feature_map, (5, 7))
    torch.testing.assert_close(resized[..., ::4, ::6], feature_map[..., ::2, ::3])
    torch.testing.assert_close(resized[..., 1, 0], (feature_map[..., 0, 0] + feature_map[..., 1, 0]) / 2)


@pytest.mark.parametrize("inward_reference", [True, False])
def test_predict_mask(inward_reference):
    """The folded last layers against the reference's order: resize, concatenate, 1×1 convolution; with gradients."""
    torch.manual_seed(0)
    decoder = BiRefNetDecoder(BiRefNetConfig(**tiny_settings(inward_reference=inward_reference))).double()
    hidden_states = image(2, 8, 8, 16).double().requires_grad_()
    pixel_values = image(2, 3, 32, 64).double().requires_grad_()

    def naive() -> torch.Tensor:
        features = [F.interpolate(hidden_states, (32, 64), mode="bilinear", align_corners=True)]
        if inward_reference:
            branch = decoder.inward_reference
            features.append(branch.conv_out(branch.conv_in(pixel_values)))
        return decoder.mask_head(torch.cat(features, dim=1))

    modules = nn.ModuleList([decoder.mask_head, decoder.inward_reference] if inward_reference else [decoder.mask_head])
    inputs = [hidden_states, *([pixel_values] if inward_reference else []), *modules.parameters()]
    results = []
    for logits in (decoder.predict_mask(hidden_states, pixel_values), naive()):
        assert logits.shape == (2, 1, 32, 64)
        results.append([logits, *torch.autograd.grad((logits * mask(2, 1, 32, 64)).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(3, 3), (3, 8), (4, 5), (9, 7)], ids=str)
def test_conv_pair(size):
    """Two convolutions with a border of zeros each, with gradients."""
    first, second = (nn.Conv2d(*channels, 3, padding=1).double() for channels in ((3, 6), (6, 2)))
    pixel_values = image(2, 3, *size).double().requires_grad_()
    inputs = [pixel_values, first.weight, first.bias, second.weight, second.bias]
    results = []
    for output in (conv_pair(*inputs), second(first(pixel_values))):
        probe = image(*output.shape, seed=1).double()
        results.append([output, *torch.autograd.grad((output * probe).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def random_aspp(deformable: bool) -> BiRefNetASPP:
    """In evaluation mode, with displacements and statistics."""
    torch.manual_seed(0)
    module = BiRefNetASPP(BiRefNetConfig(**tiny_settings()), 8, 6, deformable=deformable).double().eval()
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return module


def naive_aspp(module: BiRefNetASPP, hidden_states: torch.Tensor) -> torch.Tensor:
    """All branches, concatenation, projection, layer by layer."""

    def deform(conv: BiRefNetDeformableConv) -> torch.Tensor:
        modulator = 2 * conv.modulator_conv(hidden_states).sigmoid()
        return conv.regular_conv(hidden_states, conv.offset_conv(hidden_states), modulator)

    branches = []
    for branch in (module.pointwise_branch, *module.wide_branches):
        convolved = deform(branch.conv) if module.deformable else branch.conv(hidden_states)
        branches.append(F.relu(branch.norm(convolved)))
    pooled = module.global_branch(F.adaptive_avg_pool2d(hidden_states, 1))
    branches.append(F.interpolate(pooled, hidden_states.shape[-2:], mode="bilinear", align_corners=True))
    return F.relu(module.projection.norm(module.projection.conv(torch.cat(branches, dim=1))))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("deformable", [True, False], ids=["deformable", "dilated"])
def test_attention_block(deformable, training):
    """In chunks, branch by branch with gradients, and under autograd, against the concatenation of all branches."""
    module, hidden_states = random_aspp(deformable), image(2, 8, 7, 6).double()
    module.dropout.p = 0.0
    module.train(training)
    inputs = [hidden_states.requires_grad_(), *module.parameters()]
    results = []
    for output in (module(hidden_states), naive_aspp(module, hidden_states)):
        probe = image(*output.shape, seed=1).double()
        results.append([output, *torch.autograd.grad((output * probe).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert module.uses_chunks(hidden_states) == (deformable and not training)
        torch.testing.assert_close(module(hidden_states), results[1][0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_modules_that_are_watched_are_called():
    """A hook on any layer whose weights the network would otherwise read without calling it takes effect."""
    module, hidden_states = random_aspp(deformable=True), image(1, 8, 5, 6).double()
    expected = module(hidden_states)
    for layer in (
        module.projection.conv,
        module.pointwise_branch.norm,
        module.deformable_branches[1].conv.regular_conv,
        module.deformable_branches[1].conv.offset_conv,
    ):
        calls = []
        hook = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.testing.assert_close(module(hidden_states), expected, rtol=1e-9, atol=1e-9)
        assert calls == [1]
        hook.remove()


def test_chunks_follow_the_weights(tiny_model):
    """Nothing of the weights is kept between calls: changed in place, cast or loaded, they count at once."""
    pixel_values = image(1, 3, 64, 64)
    before = logits_of(tiny_model, pixel_values)
    other = build(seed=1)
    with torch.no_grad():
        for parameter, changed in zip(tiny_model.parameters(), other.parameters(), strict=True):
            parameter.copy_(changed)
    expected = logits_of(other, pixel_values)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(tiny_model, pixel_values), expected)
    torch.testing.assert_close(logits_of(tiny_model.double(), pixel_values).float(), expected, rtol=1e-3, atol=1e-4)


def test_hooks_see_and_change_the_same_with_and_without_gradients():
    """Any module, also one whose work the fast ways do elsewhere: called as often, of maps of one shape, with effect."""
    model, pixel_values = build(inner_channels=16), image(1, 3, 64, 96)
    parts = (
        "backbone.layers.0",
        "backbone.layers.3.blocks.1",
        "squeeze",
        "decoder.levels.3",
        "decoder.inward",
        "decoder.mask",
    )
    for name, module in model.named_modules():
        if not name.startswith(parts):
            continue
        seen, results = ([], []), []
        for shapes, with_gradients in zip(seen, (True, False), strict=True):

            def change(_: nn.Module, __: tuple, output: object, shapes: list = shapes) -> torch.Tensor | None:
                shapes.append(output.shape if isinstance(output, torch.Tensor) else type(output))
                return output * 0.5 if isinstance(output, torch.Tensor) else None

            hook = module.register_forward_hook(change)
            with torch.set_grad_enabled(with_gradients):
                results.append(model(pixel_values).logits.detach())
            hook.remove()
        assert seen[0] == seen[1], name
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_what_hooks_keep_stays_as_it_was(with_gradients):
    model, kept = build(inner_channels=16), {}
    for name, module in model.named_modules():

        def keep(_: nn.Module, __: tuple, output: object, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                kept[name] = (output, output.detach().clone())

        module.register_forward_hook(keep)
    with torch.set_grad_enabled(with_gradients):
        model(image(1, 3, 64, 96))
    for name, (output, before) in kept.items():
        assert torch.equal(output, before), name


def test_backward_hooks_are_called():
    model, called = build(inner_channels=16), set()
    names = ("squeeze_module.0.norm_in", "decoder.levels.3.lateral", "decoder.levels.2", "decoder.mask_head")
    names += ("decoder.levels.4.block.conv_in", "decoder.levels.4.block.attention.projection.norm")
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: called.add(name))
    model(image(1, 3, 64, 64)).logits.sum().backward()
    assert called == set(names)


@torch.no_grad()
def test_statistics_are_taken_where_normalisations_train():
    """As in a recalibration: the network evaluates, its batch normalisations look at the batch."""
    plain, watched = (build(inner_channels=16) for _ in range(2))
    for model in (plain, watched):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                if model is watched:
                    module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(plain(image()).logits, watched(image()).logits)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, watched.get_buffer(name), msg=name)
        assert not name.endswith("num_batches_tracked") or buffer == 1, name


@pytest.mark.parametrize("scale", [2, 0.5])
def test_labels_of_another_size_lie_where_the_image_lies(scale):
    """Also where the image is padded: a perfect answer costs as little as with labels of the image's size."""
    model = build()
    labels = torch.zeros(1, 1, 100, 100)
    labels[:, :, 20:60, 30:90] = 1
    other = F.interpolate(labels, scale_factor=scale, mode="nearest")
    model.decoder.register_forward_hook(lambda *_: (20 * pad_to_divisor(2 * labels - 1), (), (), ()))
    with torch.no_grad():
        right, same, wrong = (model(image(1, 3, 100, 100), labels=given).loss for given in (other, labels, 1 - other))
    assert same < 1e-6 and right < 0.01 * wrong


def test_saved_content_is_loaded_by_module_names_too(tiny_model_dir, tmp_path):
    """As Transformers' Trainer does when it resumes, or takes the best weights in the end."""
    saved, model = load_file(tiny_model_dir / "model.safetensors"), build(seed=3)
    expected = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir).state_dict()
    assert not saved.keys() & {"backbone.patch_embed.proj.weight"}
    for strict in (True, False):
        other = copy.deepcopy(model)
        assert not any(other.load_state_dict(saved, strict=strict))
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    model.load_state_dict(expected)
    wrapped = nn.Sequential(model)
    assert not any(wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in saved.items()}))

    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    arguments |= {"save_strategy": "epoch", "num_train_epochs": 1, "disable_tqdm": True}
    rows = [
        {"pixel_values": picture, "labels": label}
        for picture, label in zip(image(4, 3, 64, 64), mask(4, 1, 64, 64), strict=True)
    ]
    first = Trainer(model=build(), args=TrainingArguments(**arguments), train_dataset=rows)
    first.train()
    second = Trainer(model=build(seed=5), args=TrainingArguments(**arguments), train_dataset=rows)
    second.train(resume_from_checkpoint=True)  # nothing is left to do
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, first.model.state_dict()[name]), name


def test_network_made_without_memory_is_whole_after_loading():
    model = build()
    with torch.device("meta"):
        other = BiRefNetForImageSegmentation(model.config)
    other.to_empty(device="cpu")
    for buffer in other.buffers():
        buffer.fill_(77)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other.eval(), image()), logits_of(model, image()))


def test_wrapped_names_are_explained(tiny_model_dir, copy_of):
    folder = copy_of(tiny_model_dir)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="wrapped network: its names begin like 'module.*convert_checkpoint"):
        BiRefNetForImageSegmentation.from_pretrained(folder)


def test_settings_are_read_when_they_count(tmp_path):
    model = build()
    before = logits_of(model, image())
    model.config.patch_order = "wg_hg_c"
    changed = logits_of(model, image())
    assert (changed - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(BiRefNetForImageSegmentation.from_pretrained(tmp_path), image()), changed)


def test_padding_of_another_mode_counts():
    model = build()
    for module in model.decoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            module.padding_mode = "replicate"
    called = copy.deepcopy(model)
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits_of(model, image()), logits_of(called, image()), rtol=1e-4, atol=1e-5)


def test_transforms_of_torch_func():
    """Gradients of the loss, and a map over images, of the functional network."""
    model = build("eager").train(False)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image(),), {"labels": mask()}).loss

    gradients = torch.func.grad(loss)(parameters)
    model(image(), labels=mask()).loss.backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    mapped = torch.func.vmap(lambda pixel_values: model(pixel_values[None]).logits[0])(image())
    torch.testing.assert_close(mapped, model(image()).logits, rtol=1e-4, atol=1e-5)


def test_adapters_for_whatever_is_linear_or_a_convolution(tiny_model):
    peft = pytest.importorskip("peft")
    names = [name for name, module in tiny_model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert any("offset_conv" in name for name in names) and not any("regular_conv" in name for name in names)
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(r=2, target_modules=names)).train()
    adapted(pixel_values=image(), labels=mask()).loss.backward()
    assert all(
        parameter.grad is not None
        for name, parameter in adapted.named_parameters()
        if "lora_B" in name and "class" not in name
    )
    with pytest.raises(ValueError, match="BiRefNetModulatedConv2d.*not supported"):
        peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["regular_conv"]))


def test_traced(tiny_model):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits().eval(), image())
        expected = tiny_model(image(seed=4)).logits
        torch.testing.assert_close(traced(image(seed=4)), expected, rtol=1e-4, atol=1e-5)


def test_loss_task_may_change():
    """The criterion follows the setting, unless it is one that was set."""
    model = build().train()
    assert "iou" in model(image(), labels=mask()).loss_terms
    model.config.loss_task = "matting"
    assert {"mae"} < model(image(), labels=mask()).loss_terms.keys()
    copied = copy.deepcopy(model)
    copied.config.loss_task = "dis"
    assert "iou" in copied(image(), labels=mask()).loss_terms
    model.criterion = BiRefNetLoss("general")
    model.config.loss_task = "dis"
    expected = BiRefNetLoss("general")
    model.eval()
    outputs = model(image(), labels=mask())
    torch.testing.assert_close(outputs.loss, expected([outputs.logits], mask())[0])


def test_gradients_need_no_values():
    """On the meta device, e.g. to count operations."""
    model = build().to("meta").train()
    model(torch.empty(2, 3, 64, 64, device="meta")).logits.sum().backward()
    assert all(gradient.is_meta for gradient in gradients(model).values())


@pytest.mark.parametrize("backbone", ["vgg16", "resnet50", "pvt_v2_b0"])
def test_initial_values_of_timm_backbones(backbone):
    """Those of the papers: PyTorch's own leave hardly anything of an image behind VGG's thirteen convolutions."""
    model = build(backbone=backbone, **TIMM)
    for name, conv in model.backbone.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 5000:
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1] / conv.groups
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert conv.bias is None or not conv.bias.any(), name
    a, b = (model.backbone(image(1, 3, 64, 64, seed=seed))[3] for seed in (0, 1))
    assert (a - b).norm() > 0.05 * a.norm()
