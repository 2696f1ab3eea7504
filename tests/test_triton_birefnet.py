"""Triton's kernels against what they replace: on a GPU with `-m gpu`, and always in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import displace, tiny_settings
from torch import nn

from birefnet_hf import (
    BiRefNetConfig,
    BiRefNetForImageSegmentation,
    backbone_swin_birefnet,
    modeling_birefnet,
    ops_birefnet,
    triton_birefnet,
)
from birefnet_hf.backbone_swin_birefnet import BiRefNetSwinAttention, round_up, shifted_window_mask


triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The interpreter multiplies matrices of bfloat16 as if they were integers; on a GPU float32 is nobody's business.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)


def config(**settings) -> BiRefNetConfig:
    """Of a network whose heads are as wide as the kernel for attention needs."""
    shape = {"embed_dim": 32, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 5}
    widths = {"inner_channels": 16, "branch_channels": 24, "deformable_kernel_sizes": (1, 5)}
    return BiRefNetConfig(**tiny_settings(**shape | widths | settings))


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "window_size", "shift"),
    [((13, 9), 4, 0), ((13, 9), 4, 2), ((20, 16), 7, 3), ((14, 14), 7, 3), ((17, 24), 12, 6)],
)
@torch.no_grad()
def test_window_attention(dtype, size, window_size, shift):
    """As attention written out, with padding, shift and position bias."""
    torch.manual_seed(0)
    num_heads, channels = 2, 64
    settings = config(window_size=window_size, attn_implementation="eager")
    attention = BiRefNetSwinAttention(settings, channels, num_heads).to(DEVICE).eval()
    for parameter in attention.parameters():
        parameter.normal_()
    attention.qkv.weight.mul_(channels**-0.5)
    attention.proj = nn.Identity()
    tokens = torch.randn(2, *size, channels, device=DEVICE)

    padded = (round_up(side, window_size) for side in size)
    mask = shifted_window_mask(*padded, window_size, shift, torch.float32, DEVICE) if shift else None
    expected, _ = attention(tokens, shift, mask)
    result = triton_birefnet.fused_window_attention(
        attention.qkv(tokens).to(dtype),
        attention.qkv.bias[None],
        attention.relative_position_bias_table,
        num_heads,
        window_size,
        shift,
        attention.scaling,
    )
    assert result.dtype == dtype
    assert relative_error(result, expected) < TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "widths", "reach"),
    [((2, 16, 7, 9), 3, (32, 16), 2), ((1, 24, 6, 5), 7, (40, 20), 2), ((1, 72, 8, 8), 1, (24, 80), 1000)],
)
@torch.no_grad()
def test_add_fused_deform_conv2d(dtype, shape, kernel_size, widths, reach):
    """As torchvision's operator, normalisation, ReLU and a pointwise convolution, on maps of both memory formats."""
    torch.manual_seed(0)
    (batch_size, channels, height, width), (out_channels, projected) = shape, widths
    num_taps = kernel_size**2
    feature_map = torch.randn(shape, device=DEVICE).to(dtype)
    displacement = torch.randn(batch_size, 3 * num_taps + 5, height, width, device=DEVICE)
    displacement[:, : 2 * num_taps] *= reach
    displacement[0, 0, 0, 0] = float("inf")
    displacement = displacement.to(dtype)
    weight = torch.randn(out_channels, channels, kernel_size, kernel_size, device=DEVICE).to(dtype)
    projection = torch.randn(projected, 2 * out_channels, device=DEVICE).to(dtype)[:, out_channels:]
    norm = nn.BatchNorm2d(out_channels).to(DEVICE).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    norm.to(dtype)
    before = torch.randn(batch_size, height * width, projected, device=DEVICE)

    offset, modulator = displacement[:, : 2 * num_taps], displacement[:, 2 * num_taps : 3 * num_taps]
    inputs = (feature_map, offset, 2 * modulator.double().sigmoid(), weight)
    convolved = ops_birefnet.deform_conv2d(*(tensor.double() for tensor in inputs), implementation="torchvision")
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    normalised = F.batch_norm(convolved, *(tensor.double() for tensor in statistics), eps=norm.eps)
    added = torch.einsum("bohw,po->bhwp", normalised.relu(), projection.double()).flatten(1, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        total = before.clone()
        arranged = [tensor.contiguous(memory_format=memory_format) for tensor in (feature_map, displacement)]
        triton_birefnet.add_fused_deform_conv2d(total, *arranged, weight, norm, projection)
        assert relative_error(total - before, added) < TOLERANCES[dtype]


@pytest.mark.gpu
@torch.no_grad()
def test_maps_of_more_elements_than_32_bits_count():
    """Of an image of 60 megapixels: what is at the end of the map is as in a small map of it."""
    if DEVICE == "cpu":
        pytest.skip("This one needs the memory of a GPU.")
    torch.manual_seed(0)
    window_size, num_heads, channels, side = 12, 4, 128, 2400
    qkv = torch.randn(1, side, side, 3 * channels, dtype=torch.float16, device=DEVICE)
    padding, table = torch.zeros(1, 3 * channels, device=DEVICE), torch.randn(23**2, num_heads, device=DEVICE)
    shared = (padding, table, num_heads, window_size, 0, 0.2)
    attended = triton_birefnet.fused_window_attention(qkv, *shared)
    expected = triton_birefnet.fused_window_attention(qkv[:, -window_size:], *shared)
    assert qkv.numel() > 2**31 and torch.equal(attended[:, -window_size:], expected)
    del qkv, attended

    channels, side, kept = 64, 6000, 8
    feature_map = torch.randn(1, side, side, channels, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    weight = torch.randn(16, channels, 1, 1, dtype=torch.float16, device=DEVICE)
    norm = nn.BatchNorm2d(16).to(DEVICE).half().eval()
    projection = torch.randn(16, 16, dtype=torch.float16, device=DEVICE)
    sums = []
    for part in (feature_map, feature_map[:, :, -kept:]):
        height = part.shape[2]
        total = torch.zeros(1, height * side, 16, device=DEVICE)
        displacement = torch.zeros(1, 3, height, side, dtype=torch.float16, device=DEVICE)
        triton_birefnet.add_fused_deform_conv2d(total, part, displacement, weight, norm, projection)
        sums.append(total[:, -kept * side :])
    assert feature_map.numel() > 2**31 and sums[0].abs().max() > 1 and torch.allclose(*sums, atol=1e-3)


@pytest.mark.gpu
@torch.inference_mode()
def test_network(monkeypatch):
    """The whole network with kernels as without, for a batch of images that need padding."""
    torch.manual_seed(0)
    model = displace(BiRefNetForImageSegmentation(config())).to(DEVICE).eval()
    image = torch.randn(2, 3, 60, 40, device=DEVICE)
    expected = model(image).logits
    if DEVICE == "cpu":
        for module in (ops_birefnet, modeling_birefnet, backbone_swin_birefnet):
            monkeypatch.setattr(module, "is_triton_inference", lambda hidden_states: True)
    for dtype in DTYPES:
        logits = model.to(dtype)(image).logits
        assert 0 < (logits - expected).abs().max() < 3 * TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.gpu
@torch.inference_mode()
def test_ways_to_run_on_gpu():
    """Half precision, autocast, a CUDA graph and compilation agree, and kernels are what runs."""
    if DEVICE == "cpu":
        pytest.skip("This one needs a GPU indeed.")
    torch.manual_seed(0)
    model = displace(BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t"))).cuda().eval()
    image = torch.randn(1, 3, 256, 256, device="cuda")
    expected = model(image).logits
    assert not ops_birefnet.is_triton_inference(image) and ops_birefnet.is_triton_inference(image.half())
    with torch.autocast("cuda", torch.float16):
        assert (model(image).logits - expected).abs().max() < 2e-3
    model.half()(image)  # kernels are compiled before they are recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(image).logits
    graph.replay()
    assert (logits - expected).abs().max() < 2e-3
    compiled = torch.compile(model, fullgraph=True)
    assert (compiled(image).logits - expected).abs().max() < 2e-3


def test_in_interpreter():
    """The tests above that need a GPU, without one; the interpreter has to be chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", __file__]
    finished = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


def test_where_kernels_are_taken():
    """Neither on a CPU nor with gradients."""
    assert not ops_birefnet.is_triton_inference(torch.zeros(1, dtype=torch.float16))
    with torch.no_grad():
        assert not ops_birefnet.is_triton_inference(torch.zeros(1, dtype=torch.float16))


def test_falls_back(monkeypatch, caplog):
    """A GPU of an older generation, and a machine where Triton cannot start kernels."""
    triton_birefnet._try_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not triton_birefnet.is_usable(0) and not caplog.messages
    triton_birefnet._try_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_birefnet, "_probe_kernel", None)  # which does not start
    assert not triton_birefnet.is_usable(0)
    assert "Triton does not work here" in caplog.text
    triton_birefnet._try_device.cache_clear()


POINTER = "*fp16"


@pytest.mark.parametrize(("capability", "shared_memory"), [(80, 166912), (86, 101376), (90, 232448), (120, 101376)])
@pytest.mark.parametrize(
    ("name", "types", "constants", "warps"),
    [
        (
            "_window_attention_kernel",
            dict.fromkeys(("output", "qkv", "padding", "position_table"), POINTER)
            | dict.fromkeys(("height", "width", "windows_down", "windows_across", "shift"), "i32"),
            {
                "SCALING": 0.2,
                "NUM_HEADS": 6,
                "HEAD_CHANNELS": 32,
                "WINDOW_SIZE": 12,
                "BLOCK_QUERIES": 32,
                "BLOCK_KEYS": 32,
            },
            2,
        ),
        (
            "_deform_conv_kernel",
            {"total": "*fp32"}
            | dict.fromkeys(("feature_map", "displacement", "weight", "projection"), POINTER)
            | dict.fromkeys(("norm_weight", "norm_bias", "norm_mean", "norm_variance"), POINTER)
            | dict.fromkeys(("height", "width", "channels", "out_channels", "projected_channels"), "i32")
            | dict.fromkeys(("displacement_image", "displacement_channel", "displacement_pixel"), "i32")
            | dict.fromkeys(("projection_row", "kernel_size"), "i32"),
            {
                "EPSILON": 1e-5,
                "BLOCK_PIXELS": 128,
                "BLOCK_CHANNELS": 64,
                "BLOCK_OUT": 256,
                "BLOCK_PROJECTED": 32,
            },
            8,
        ),
    ],
)
def test_kernels_compile(name, types, constants, warps, capability, shared_memory):
    """For GPUs that need not be here: the compiler is stricter than the interpreter. They fit into shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_birefnet, name)
    signature = types | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    values = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=values),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    assert compiled.asm["cubin"] and compiled.metadata.shared <= shared_memory
