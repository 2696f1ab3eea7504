"""The two implementations of the deformable convolution against each other and loops written out; linear layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from birefnet_hf import ops_birefnet
from birefnet_hf.ops_birefnet import (
    add_projected_deform_conv2d,
    deform_conv2d,
    is_plain_inference,
    linear,
    linear_after,
)


IMPLEMENTATIONS = ("torchvision", "gather")


def random_inputs(
    shape: tuple[int, int, int, int], kernel_size: int, out_channels: int = 5, reach: float = 3.0, **kwargs
) -> list[torch.Tensor]:
    """Map, offsets, modulators and kernel; `reach` is the offsets' standard deviation in pixels.

    Offsets keep away from whole pixels, where bilinear sampling has kinks and rounding decides on the derivative.
    """
    generator = torch.Generator().manual_seed(math.prod(shape) + kernel_size)
    batch_size, channels, height, width = shape
    taps = kernel_size**2

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    offset = reach * normal(batch_size, 2 * taps, height, width)
    tensors = [
        normal(*shape),
        offset.floor() + 0.2 + 0.6 * (offset - offset.floor()),
        2 * normal(batch_size, taps, height, width).sigmoid(),
        normal(out_channels, channels, kernel_size, kernel_size) / taps,
    ]
    return [tensor.to(**kwargs) for tensor in tensors]


def loops(feature_map, offset, modulator, weight) -> torch.Tensor:
    """The definition: for every output pixel and tap, four neighbours by hand."""
    batch_size, _, height, width = feature_map.shape
    kernel_size = weight.shape[-1]
    output = torch.zeros(batch_size, weight.shape[0], height, width, dtype=feature_map.dtype)
    for image in range(batch_size):
        for row in range(height):
            for column in range(width):
                for tap in range(kernel_size**2):
                    y = row + tap // kernel_size - kernel_size // 2 + offset[image, 2 * tap, row, column].item()
                    x = column + tap % kernel_size - kernel_size // 2 + offset[image, 2 * tap + 1, row, column].item()
                    sample = torch.zeros(feature_map.shape[1], dtype=feature_map.dtype)
                    for near_y in (math.floor(y), math.floor(y) + 1):
                        for near_x in (math.floor(x), math.floor(x) + 1):
                            if 0 <= near_y < height and 0 <= near_x < width:
                                share = (1 - abs(y - near_y)) * (1 - abs(x - near_x))
                                sample += share * feature_map[image, :, near_y, near_x]
                    kernel = weight[:, :, tap // kernel_size, tap % kernel_size]
                    output[image, :, row, column] += modulator[image, tap, row, column] * (kernel @ sample)
    return output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_definition(implementation):
    inputs = random_inputs((2, 3, 5, 4), kernel_size=3, dtype=torch.float64)
    torch.testing.assert_close(deform_conv2d(*inputs, implementation), loops(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_offsets_it_is_a_convolution(implementation, kernel_size):
    feature_map, offset, modulator, weight = random_inputs((2, 3, 9, 6), kernel_size)
    output = deform_conv2d(feature_map, 0 * offset, torch.ones_like(modulator), weight, implementation)
    torch.testing.assert_close(output, F.conv2d(feature_map, weight, padding="same"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 6, 13, 7), (2, 3, 1, 1), (1, 1, 1, 9), (2, 2, 5, 1)])
def test_implementations_agree(shape, kernel_size):
    """Outputs and all four gradients in float32."""
    results = {}
    for implementation in IMPLEMENTATIONS:
        inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, kernel_size)]
        output = deform_conv2d(*inputs, implementation)
        assert output.shape == (shape[0], 5, *shape[2:])
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        results[implementation] = [output, *torch.autograd.grad((output * probe).sum(), inputs)]
    for actual, expected in zip(results["gather"], results["torchvision"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation, dtype, tolerance):
    """Against float64 on the same, already rounded, inputs: only the computation's own rounding is left."""
    if implementation == "torchvision":
        tolerance = 5e-2  # it computes positions in half precision
    inputs = random_inputs((2, 6, 12, 11), kernel_size=3, dtype=dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output, expected = deform_conv2d(*inputs, implementation), deform_conv2d(*exact, "torchvision")
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    output.float().sum().backward()
    expected.sum().backward()
    for actual, wanted in zip(inputs, exact, strict=True):
        assert actual.grad.dtype == dtype
        scale = wanted.grad.abs().max().item()
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=0, atol=2 * tolerance * scale)


@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, math.inf, -math.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_far_outside_there_are_zeros(implementation, value):
    """A tap that is moved out of the image contributes nothing, however far; its neighbours are as they were."""
    feature_map, offset, modulator, weight = random_inputs((1, 3, 6, 6), kernel_size=3)
    muted = modulator.clone()
    muted[:, 4, 2, 2] = 0
    for axis in (0, 1):
        moved = offset.clone()
        moved[:, 8 + axis, 2, 2] = value
        output = deform_conv2d(feature_map, moved, modulator, weight, implementation)
        expected = deform_conv2d(feature_map, offset, muted, weight, implementation)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_where_it_is():
    """Overflow in half precision ends in NaN, which must neither crash nor reach other pixels."""
    feature_map, offset, modulator, weight = random_inputs((2, 3, 6, 6), kernel_size=3)
    offset[1, 8, 2, 3] = math.nan
    undefined = deform_conv2d(feature_map, offset, modulator, weight, "gather").isnan().any(dim=1)
    assert undefined.nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_layout_does_not_matter(implementation):
    inputs = random_inputs((2, 4, 7, 9), kernel_size=3)
    expected = deform_conv2d(*inputs, implementation)
    channels_last = [tensor.to(memory_format=torch.channels_last) for tensor in inputs]
    torch.testing.assert_close(deform_conv2d(*channels_last, implementation), expected, rtol=1e-5, atol=1e-5)
    strided = [tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in inputs]
    torch.testing.assert_close(deform_conv2d(*strided, implementation), expected, rtol=1e-5, atol=1e-5)


def output_and_gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), inputs)]


def test_chunks_do_not_matter(monkeypatch):
    inputs = random_inputs((2, 4, 20, 17), kernel_size=3)
    whole = output_and_gradients(lambda *args: deform_conv2d(*args, "gather"), inputs)
    for name in ("GATHER_CHUNK_BYTES", "BACKWARD_CHUNK_BYTES"):
        monkeypatch.setattr(ops_birefnet, name, 1)  # the smallest chunks: 64 of the 340 pixels
    chunked = output_and_gradients(lambda *args: deform_conv2d(*args, "gather"), inputs)
    for actual, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_gradients_by_hand_are_those_of_autograd(kernel_size):
    """The backward pass that samples again, against autograd through the plain gather: in float64 to the last digits."""
    inputs = random_inputs((2, 6, 11, 9), kernel_size, dtype=torch.float64)
    by_hand = output_and_gradients(lambda *args: deform_conv2d(*args, "gather"), inputs)
    plain = output_and_gradients(ops_birefnet._gather_deform_conv2d, inputs)
    for actual, expected in zip(by_hand, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_backward_keeps_no_columns():
    """What stays between the passes are the four inputs, whatever the kernel's size."""
    inputs = [tensor.requires_grad_() for tensor in random_inputs((1, 4, 16, 16), kernel_size=7)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        deform_conv2d(*inputs, "gather")
    assert sorted(tensor.numel() for tensor in kept) == sorted(tensor.numel() for tensor in inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input_alone(wanted):
    inputs = random_inputs((1, 3, 6, 5), kernel_size=3)
    inputs[wanted].requires_grad_()
    deform_conv2d(*inputs, "gather").sum().backward()
    (expected,) = torch.autograd.grad(deform_conv2d(*inputs, "torchvision").sum(), inputs[wanted])
    torch.testing.assert_close(inputs[wanted].grad, expected, rtol=1e-4, atol=1e-4)
    assert all(tensor.grad is None for index, tensor in enumerate(inputs) if index != wanted)


def test_function_transforms():
    """`torch.func` goes around the backward pass written by hand."""
    inputs = random_inputs((1, 2, 4, 3), 3, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def total(*args: torch.Tensor) -> torch.Tensor:
        return deform_conv2d(*args, "gather").square().sum()

    expected = torch.autograd.grad(total(*inputs), inputs)
    for actual, wanted in zip(torch.func.grad(total, argnums=(0, 1, 2, 3))(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_autocast_leaves_the_dtype_alone():
    inputs = random_inputs((1, 4, 6, 6), kernel_size=3)
    expected = output_and_gradients(lambda *args: deform_conv2d(*args, "gather"), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(lambda *args: deform_conv2d(*args, "gather"), inputs)
    for tensor, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_the_derivatives(implementation):
    """Numerically, in float64."""
    inputs = random_inputs((1, 2, 3, 4), 3, out_channels=2, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: deform_conv2d(*args, implementation), inputs)


def test_choice_of_implementation(monkeypatch):
    inputs = random_inputs((1, 2, 4, 4), kernel_size=3)
    chosen = []
    original = ops_birefnet.torchvision_deform_conv2d
    monkeypatch.setattr(
        ops_birefnet, "torchvision_deform_conv2d", lambda *a, **k: chosen.append("torchvision") or original(*a, **k)
    )
    eager = deform_conv2d(*inputs)
    assert not chosen  # on a CPU: gather
    exported = torch.export.export(Operator(), tuple(inputs), strict=False)
    assert chosen and "torchvision.deform_conv2d" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), eager, rtol=1e-5, atol=1e-5)


class Operator(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return deform_conv2d(*inputs)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'cuda' must be 'auto', 'torchvision' or 'gather'"):
        deform_conv2d(*random_inputs((1, 2, 4, 4), kernel_size=3), implementation="cuda")


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 6, 13, 7), (3, 2, 1, 1)])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_projected_in_chunks(shape, dtype, tolerance, monkeypatch):
    """Against the convolution, the rest and the sum one after the other in float64; chunks end within images."""
    monkeypatch.setattr(ops_birefnet, "GATHER_CHUNK_BYTES", 1)  # the least: 64 pixels
    inputs = random_inputs(shape, kernel_size=3, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    bias, projection = torch.randn(5, generator=generator).to(dtype), torch.randn(4, 5, generator=generator).to(dtype)
    before = torch.randn(shape[0], shape[2] * shape[3], 4, generator=generator)
    total = before.to(torch.promote_types(dtype, torch.float32), copy=True)
    add_projected_deform_conv2d(total, *inputs, bias, projection)
    convolved = deform_conv2d(*(tensor.double() for tensor in inputs), "torchvision")
    activated = F.relu(convolved + bias.double()[:, None, None])
    expected = before.double() + (activated.flatten(2).transpose(1, 2) @ projection.double().t())
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)


def test_plain_inference():
    tensor = torch.zeros(1)
    assert not is_plain_inference(tensor)  # autograd may want gradients
    with torch.no_grad():
        assert is_plain_inference(tensor)
        assert not is_plain_inference(tensor.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_plain_inference(tensor)
        seen = []
        torch.func.vmap(lambda x: seen.append(is_plain_inference(x)) or x)(tensor)
        torch.jit.trace(lambda x: seen.append(is_plain_inference(x)) or x, tensor, check_trace=False)
        assert not any(seen)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fused_linear_layer(dtype, bias, activation):
    """In inference as with autograd, whose path calls the layer; whatever oneDNN does not take goes that way, too."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype)
    tokens = torch.randn(2, 5, 7, 24).to(dtype)[:, :, 1:6]
    expected = linear(layer, tokens, activation)
    assert expected.requires_grad
    with torch.inference_mode():
        actual = linear(layer, tokens, activation)
    # Numbers are about 1; the two round differently.
    tolerances = {"rtol": 1.6e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected.detach(), check_stride=False, **tolerances)


@torch.no_grad()
def test_fused_linear_layer_leaves_others_to_themselves():
    """Subclasses, hooks and other precisions take effect as when the layer is called."""

    class Doubled(nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    layer, tokens = Doubled(3, 4), torch.randn(5, 3)
    torch.testing.assert_close(linear(layer, tokens), 2 * F.linear(tokens, layer.weight, layer.bias))
    layer = nn.Linear(3, 4)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(linear(layer, tokens), F.linear(tokens, layer.weight, layer.bias) + 1)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(nn.Linear(3, 4).double(), tokens)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", [nn.LayerNorm(24), F.gelu], ids=["norm", "gelu"])
def test_linear_after_keeps_its_input_only(before, autocast):
    """The same as written out, bit by bit, forward and backward; what lies between is not kept."""
    torch.manual_seed(0)
    layer, tokens = nn.Linear(24, 40), torch.randn(4, 5, 8, 24, requires_grad=True)
    learnt = [tokens, *layer.parameters(), *(before.parameters() if isinstance(before, nn.Module) else ())]
    outcomes, kept = [], []
    for call in (lambda: linear_after(layer, before, tokens), lambda: layer(before(tokens))):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: (saved.setdefault(tensor.data_ptr(), tensor), tensor)[1], lambda tensor: tensor
        )
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = call()
        kept.append(sum(tensor.numel() >= tokens.numel() for tensor in saved.values()))  # weights have less
        outcomes.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), learnt)])
    for actual, expected in zip(*outcomes, strict=True):
        assert torch.equal(actual, expected)
    assert kept == [1, 2]


def test_linear_after_calls_once_whatever_is_watched():
    """Hooks see one call, as do layers that have taken the linear one's place; inference and torch.func go the plain way."""
    calls = []
    layer, tokens = nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda *_: calls.append("hook"))

    class Counted(nn.Linear):
        def forward(self, hidden_states):
            calls.append("subclass")
            return super().forward(hidden_states)

    for module in (hooked, Counted(3, 4)):
        linear_after(module, F.gelu, tokens).sum().backward()
    assert calls == ["hook", "subclass"]
    jacobian = torch.func.jacrev(lambda tokens: linear_after(layer, F.gelu, tokens))(tokens.detach())
    expected = torch.func.jacrev(lambda tokens: layer(F.gelu(tokens)))(tokens.detach())
    torch.testing.assert_close(jacobian, expected)
    with torch.no_grad():
        assert torch.equal(linear_after(layer, F.gelu, tokens), layer(F.gelu(tokens)))
