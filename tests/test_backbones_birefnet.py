"""Swin against loops written out, and the backbones that timm builds."""

import copy
from functools import partial

import pytest
import torch
from conftest import tiny_settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from birefnet_hf import BiRefNetConfig, backbone_swin_birefnet, backbone_timm_birefnet
from birefnet_hf.backbone_swin_birefnet import (
    BiRefNetDropPath,
    BiRefNetSwinAttention,
    BiRefNetSwinBackbone,
    BiRefNetSwinPatchMerging,
    merge_windows,
    partition_windows,
    shifted_window_mask,
    stage_shift_mask,
)
from birefnet_hf.backbone_timm_birefnet import TIMM_NAMES, build_timm_backbone


WINDOW = 4


def swin_config(attention: str = "sdpa", **changes) -> BiRefNetConfig:
    config = BiRefNetConfig(**tiny_settings(window_size=WINDOW, **changes))
    config._attn_implementation = attention
    return config


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(params=["eager", "sdpa"])
def attention(request) -> BiRefNetSwinAttention:
    return randomise(BiRefNetSwinAttention(swin_config(request.param), channels=8, num_heads=2))


def attend_in_loops(module: BiRefNetSwinAttention, grid: torch.Tensor, shift: int, pad_first: bool) -> torch.Tensor:
    """Window attention of one (H, W, C) token grid from its definition: window by window, head by head, pair by pair.

    Two tokens of a window may attend to each other if the cyclic shift left their distance as it was.
    """
    height, width, channels = grid.shape
    padded_height, padded_width = height + -height % WINDOW, width + -width % WINDOW
    padded = grid.new_zeros(padded_height, padded_width, channels)
    if pad_first:
        padded[:height, :width] = grid
        shifted = torch.roll(padded, (-shift, -shift), (0, 1))
    else:
        padded[:height, :width] = torch.roll(grid, (-shift, -shift), (0, 1))
        shifted = padded
    output = torch.zeros_like(shifted)
    head_channels = channels // module.num_heads
    side = 2 * WINDOW - 1
    for top in range(0, padded_height, WINDOW):
        for left in range(0, padded_width, WINDOW):
            places = [(top + row, left + column) for row in range(WINDOW) for column in range(WINDOW)]
            before = [((row + shift) % padded_height, (column + shift) % padded_width) for row, column in places]
            tokens = torch.stack([shifted[place] for place in places])
            query, key, value = module.qkv(tokens).chunk(3, dim=-1)
            results = []
            for head in range(module.num_heads):
                part = slice(head * head_channels, (head + 1) * head_channels)
                scores = query[:, part] @ key[:, part].T / head_channels**0.5
                for i, (row_i, column_i) in enumerate(places):
                    for j, (row_j, column_j) in enumerate(places):
                        distance = (row_i - row_j, column_i - column_j)
                        entry = (distance[0] + WINDOW - 1) * side + distance[1] + WINDOW - 1
                        scores[i, j] += module.relative_position_bias_table[entry, head]
                        if distance != (before[i][0] - before[j][0], before[i][1] - before[j][1]):
                            scores[i, j] = float("-inf")
                results.append(scores.softmax(dim=-1) @ value[:, part])
            for place, result in zip(places, torch.cat(results, dim=-1), strict=True):
                output[place] = result
    if pad_first:
        return module.proj(torch.roll(output, (shift, shift), (0, 1))[:height, :width])
    return module.proj(torch.roll(output[:height, :width], (shift, shift), (0, 1)))


def attend(module: BiRefNetSwinAttention, tokens: torch.Tensor, shift: int) -> torch.Tensor:
    return module(tokens, shift, stage_shift_mask(module.config, tokens) if shift else None)[0]


@pytest.mark.parametrize("shift", [0, WINDOW // 2])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 7), (3, 2), (1, 6), (13, 6), (15, 9)])
@pytest.mark.parametrize("band_bytes", [1, 2**23], ids=["row by row", "at once"])
@torch.no_grad()
def test_window_attention(attention, size, shift, band_bytes, monkeypatch):
    """Every image of the batch on its own, sizes with and without padding, one window and several."""
    monkeypatch.setattr(backbone_swin_birefnet, "BAND_BYTES", band_bytes)
    tokens = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    actual = attend(attention, tokens, shift)
    for image in range(2):
        expected = attend_in_loops(attention, tokens[image], shift, pad_first=True)
        torch.testing.assert_close(actual[image], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_comes_before_the_shift(attention):
    """The detection form of Swin; timm's shifts first, which is another network wherever a grid is padded."""
    generator = torch.Generator().manual_seed(2)
    for size, differs in (((8, 8), False), ((5, 7), True)):
        tokens = torch.randn(1, *size, 8, generator=generator)
        shifted_first = attend_in_loops(attention, tokens[0], WINDOW // 2, pad_first=False)
        difference = (attend(attention, tokens, WINDOW // 2)[0] - shifted_first).abs().max()
        assert (difference > 1e-2) == differs


def test_windows_are_put_together_again():
    tokens = torch.randn(3, 8, 12, 5)
    windows = partition_windows(tokens, WINDOW)
    assert windows.shape == (3 * 2 * 3, 16, 5)
    assert torch.equal(windows[4].view(WINDOW, WINDOW, 5), tokens[0, 4:8, 4:8])
    assert torch.equal(merge_windows(windows, WINDOW, 3, 8, 12), tokens)


@torch.no_grad()
def test_patch_merging_pads_odd_sides():
    merging = randomise(BiRefNetSwinPatchMerging(4))
    tokens = torch.randn(2, 5, 3, 4)
    output = merging(tokens)
    assert output.shape == (2, 3, 2, 8)
    padded = torch.zeros(2, 6, 4, 4)
    padded[:, :5, :3] = tokens
    for row in range(3):
        for column in range(2):
            square = padded[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            joined = torch.cat([square[:, 0, 0], square[:, 1, 0], square[:, 0, 1], square[:, 1, 1]], dim=-1)
            torch.testing.assert_close(output[:, row, column], merging.reduction(merging.norm(joined)))


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_inference_in_pieces(size, monkeypatch):
    """Blocks that go through the map in bands of windows give what the whole maps under autograd give."""
    monkeypatch.setattr(backbone_swin_birefnet, "BAND_BYTES", 1)
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    backbone = randomise(BiRefNetSwinBackbone(swin_config()))
    expected = backbone(pixel_values)
    attended = []
    for module in backbone.modules():
        if isinstance(module, BiRefNetSwinAttention):
            original = module.attend
            module.attend = lambda *args, original=original, **kwargs: attended.append(1) or original(*args, **kwargs)
    with torch.no_grad():
        maps = backbone(pixel_values)
    assert len(attended) > 2 * 8
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_mask_of_the_last_windows():
    """Where attention goes through bands, four masks stand for those of a grid of any size."""
    tokens, config = torch.zeros(1, 11, 17, 8), swin_config()
    whole = stage_shift_mask(config, tokens).view(3, 5, 16, 16)
    assert torch.equal(whole, shifted_window_mask(12, 20, 4, 2, tokens.dtype, tokens.device).view(3, 5, 16, 16))
    with torch.no_grad():
        kinds = stage_shift_mask(config, tokens)
    for row in range(3):
        for column in range(5):
            assert torch.equal(whole[row, column], kinds[2 * int(row == 2) + int(column == 4), 0])


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (70, 41), (33, 132)])
@torch.no_grad()
def test_swin_maps(size):
    """Strides 4 to 32, sides rounded up; eager and fused attention agree."""
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    maps = {}
    for attention in ("eager", "sdpa"):
        backbone = randomise(BiRefNetSwinBackbone(swin_config(attention)))
        maps[attention] = backbone(pixel_values)
    height, width = size
    for stage, (eager, fused) in enumerate(zip(maps["eager"], maps["sdpa"], strict=True)):
        stride = 4 * 2**stage
        assert fused.shape == (2, 8 * 2**stage, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)


def test_drop_path_grows_with_depth():
    backbone = BiRefNetSwinBackbone(swin_config(drop_path_rate=0.7))
    rates = [module.probability for module in backbone.modules() if isinstance(module, BiRefNetDropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.7, 8))


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    drop_path = BiRefNetDropPath(0.25)
    hidden_states = torch.ones(2000, 3, 2)
    kept = drop_path(hidden_states)
    values = kept.flatten(1)
    assert (values == values[:, :1]).all()
    torch.testing.assert_close(values[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert values.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop_path.eval()(hidden_states), hidden_states)


@pytest.mark.parametrize("backbone", TIMM_NAMES)
def test_timm_backbones_give_the_declared_maps(backbone):
    """On the meta device, so that the 7B one costs nothing: channels, strides and the whole batch."""
    config = BiRefNetConfig(backbone=backbone)
    with torch.device("meta"):
        network = build_timm_backbone(config)
        maps = network(torch.empty(2, 3, 64, 96))
    strides = (16,) * 4 if config.uses_neck else (4, 8, 16, 32)
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(config.backbone_channels, strides, strict=True)
    ]


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    backbone = build_timm_backbone(BiRefNetConfig(backbone="tf_efficientnet_lite0"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor, start in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
                tensor.copy_(start + 0.3 * torch.rand(tensor.shape, generator=generator))
    return backbone.eval()


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (70, 41), (33, 132)])
def test_fused_convolutions(efficientnet, size):
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(efficientnet).double()(image.double())  # layer by layer
    with torch.no_grad():
        assert efficientnet.is_fusable(image)
        fused = efficientnet(image)
    for one, other in zip(fused, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_what_is_watched_or_changed_is_not_fused(efficientnet):
    image, seen = torch.randn(1, 3, 64, 64), []
    block = efficientnet.stages[1][0][0]
    assert not efficientnet.is_fusable(image)  # with gradients
    with torch.no_grad():
        hook = block.conv_dw.register_forward_hook(lambda *_: seen.append(True))
        efficientnet(image)
        hook.remove()
        assert seen and efficientnet.is_fusable(image)
        block.bn1.train()
        assert not efficientnet.is_fusable(image)
        block.bn1.eval()
        conv, block.conv_pw = block.conv_pw, nn.Sequential(block.conv_pw)  # as adapters wrap it
        block.conv_pw.__class__ = type("Adapter", (nn.Sequential,), {})
        assert not efficientnet.is_fusable(image)
        block.conv_pw = conv
        assert efficientnet.is_fusable(image) and not efficientnet.is_fusable(image.double())
        efficientnet.stages[0][1].running_mean = efficientnet.stages[0][1].running_var = None
        assert not efficientnet.is_fusable(image) and torch.isfinite(efficientnet(image)[3]).all()


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "vgg16"])
def test_images_that_are_too_small_are_named(backbone):
    network = build_timm_backbone(BiRefNetConfig(backbone=backbone))
    with pytest.raises(ValueError, match=r"\(16, 48\) pixels .* at least 64"):
        network(torch.zeros(1, 3, 16, 48))


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "dino_v3_s", "resnet50"])
def test_missing_timm_is_named_with_the_cure(backbone, monkeypatch):
    monkeypatch.setattr(backbone_timm_birefnet, "is_timm_available", lambda: False)
    with pytest.raises(ImportError, match=rf"backbone='{backbone}'.*pip install timm"):
        build_timm_backbone(BiRefNetConfig(backbone=backbone))


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "dino_v3_s"])
def test_timm_gradient_checkpointing(backbone):
    """Gradients are the same, and blocks do run twice."""
    torch.manual_seed(0)
    network = build_timm_backbone(BiRefNetConfig(backbone=backbone, drop_path_rate=0.0)).train()
    block = network.blocks["2"][0] if backbone == "pvt_v2_b0" else network.model.blocks[1]
    runs = []
    block.register_forward_pre_hook(lambda *_: runs.append(None))
    switch = network.call_block if backbone == "pvt_v2_b0" else network
    switch._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    pixel_values = torch.randn(2, 3, 64, 64)
    gradients = {}
    for switch.gradient_checkpointing in (False, True):
        network.zero_grad()
        runs.clear()
        sum(feature_map.square().mean() for feature_map in network(pixel_values)).backward()
        assert len(runs) == (2 if switch.gradient_checkpointing else 1)
        gradients[switch.gradient_checkpointing] = {
            name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None
        }
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)
