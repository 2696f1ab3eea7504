"""Foreground colours against cases with a known answer, and compositing to the last bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

from birefnet_hf import foreground
from birefnet_hf.foreground import composite, cut_out, parse_background, refine_foreground, to_uint8


def disc(height: int, width: int, softness: float) -> torch.Tensor:
    """Alpha of a disc whose edge is `softness` pixels wide: (1, H, W)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((y - height / 2) ** 2 + (x - width / 2) ** 2).sqrt()
    return ((min(height, width) / 3 - distance) / softness + 0.5).clamp(0, 1)[None]


def stripes(height: int, width: int, colours) -> torch.Tensor:
    """Slow horizontal change between two colours: (3, H, W)."""
    position = torch.linspace(0, 1, width).expand(1, height, width)
    return torch.lerp(*(torch.tensor(colour).view(3, 1, 1) for colour in colours), position)


@pytest.mark.parametrize("size", [(120, 160), (700, 900), (33, 47), (2, 3), (1, 1), (5, 2000)])
def test_opaque_pixels_keep_their_colours(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, *size, generator=generator)
    assert torch.equal(refine_foreground(image, torch.ones(1, *size)), image)
    alpha = disc(*size, softness=6)
    refined = refine_foreground(image, alpha)
    assert refined.shape == image.shape and refined.isfinite().all() and refined.min() >= 0 and refined.max() <= 1
    opaque = (alpha == 1).expand_as(image)
    assert torch.equal(refined[opaque], image[opaque])


def test_nothing_in_the_foreground_stays_finite():
    refined = refine_foreground(torch.rand(3, 40, 50), torch.zeros(1, 40, 50))
    assert refined.isfinite().all() and refined.min() >= 0 and refined.max() <= 1


def test_colours_go_on_beside_a_hard_mask():
    """Where alpha is 0 nothing is seen of them until the cut-out is scaled with its edge's neighbours."""
    size = (300, 400)
    inside = disc(*size, 2) > 0.5
    colours = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1), torch.tensor([0.1, 0.6, 0.9]).view(3, 1, 1)
    image = composite(colours[0].expand(3, *size), inside.float(), colours[1])
    refined = refine_foreground(image, inside.float())
    beside = (F.max_pool2d(inside.float(), 7, stride=1, padding=3) > 0) & ~inside
    assert (refined - colours[0]).abs().amax(0)[beside[0]].mean() < 0.03


@pytest.mark.parametrize(("softness", "remaining"), [(4, 0.03), (30, 0.3)])
@pytest.mark.parametrize("size", [(240, 320), (600, 800), (1500, 2000)])
def test_plain_colours_are_recovered(size, softness, remaining):
    """A foreground of one colour on a background of another: its edge gets its colour back, a narrow one all of it."""
    colours = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1), torch.tensor([0.1, 0.6, 0.9]).view(3, 1, 1)
    alpha = disc(*size, softness)
    image = composite(colours[0].expand(3, *size), alpha, colours[1])
    edge = ((alpha > 0.1) & (alpha < 1)).expand_as(image)
    error, without = ((x - colours[0]).abs()[edge].mean() for x in (refine_foreground(image, alpha), image))
    assert error < remaining * without


def test_changing_colours_are_recovered_better_than_by_the_image():
    size, alpha = (480, 640), disc(480, 640, 20)
    foreground = stripes(*size, ([0.9, 0.7, 0.1], [0.5, 0.1, 0.6]))
    image = composite(foreground, alpha, stripes(*size, ([0.0, 0.2, 0.4], [0.2, 0.9, 0.3])))
    weight = alpha * (alpha < 1)

    def error(colours: torch.Tensor) -> float:
        return ((colours - foreground).abs() * weight).sum().item()

    assert error(refine_foreground(image, alpha)) < 0.2 * error(image)


def naive(image: torch.Tensor, alpha: torch.Tensor, kernels: tuple[int, ...]) -> torch.Tensor:
    """Blur fusion as upstream's CPU version writes it, its border rule left out; float64."""

    def mean(x: torch.Tensor, kernel: int) -> torch.Tensor:
        # OpenCV's boxes of even size reach one pixel further up and left.
        for dim in (1, 2):
            indices = torch.arange(x.shape[dim])
            distance = indices[None] - indices[:, None]
            box = ((distance >= -(kernel // 2)) & (distance < kernel - kernel // 2)).double() / kernel
            x = box @ x if dim == 1 else x @ box.T
        return x

    image, alpha = image.double(), alpha.double()
    foreground = background = image
    for kernel in kernels:
        weight, rest = mean(alpha, kernel), mean(1 - alpha, kernel)
        near, far = (
            mean(foreground * alpha, kernel) / (weight + 1e-5),
            mean(background * (1 - alpha), kernel) / (rest + 1e-5),
        )
        foreground = (near + alpha * (image - alpha * near - (1 - alpha) * far)).clamp(0, 1)
        background = far
    return foreground


@pytest.mark.parametrize("kernels", [(5, 3), (9, 4), (90, 6), (1,)])
def test_kernels_run_the_reference_form(kernels):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 150, 200, generator=generator)
    alpha = (disc(150, 200, 40) * 255).round() / 255  # of 8 bits: what lies nearer to 1 counts as 1
    difference = refine_foreground(image, alpha, kernels) - naive(image, alpha, kernels)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("size", [(97, 130), (64, 64), (5, 200)])
def test_tiles_change_nothing(size, monkeypatch):
    image, alpha = torch.rand(3, *size, generator=torch.Generator().manual_seed(2)), disc(*size, 25)
    whole = refine_foreground(image, alpha)
    monkeypatch.setattr(foreground, "TILE", 32)
    visible = (alpha > 1 / 255).expand_as(whole)
    # Tiles without soft pixels are not blurred at coarser levels, which moves colours by less than a step of 255.
    torch.testing.assert_close(refine_foreground(image, alpha)[visible], whole[visible], rtol=0, atol=4e-3)


@pytest.mark.parametrize("scale", [1, 4])
def test_both_layers_are_recovered_better_than_upstream_does(scale):
    """Textured layers and soft edges, at two resolutions: half of the error upstream's windows leave, at least."""
    size = (160 * scale, 200 * scale)
    waves = torch.linspace(0, 20, size[1]).sin().mul(0.3).add(0.5).expand(3, *size)
    alpha = disc(*size, 12 * scale)
    colours = waves * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    image = composite(colours, alpha, waves.flip(2) * torch.tensor([0.1, 0.6, 1.0]).view(3, 1, 1))
    weight = alpha * (alpha < 1)
    ours, upstream = (((refine_foreground(image, alpha, k) - colours).abs() * weight).sum() for k in (None, (90, 6)))
    assert ours < 0.5 * upstream


def test_alpha_of_a_sigmoid_counts_as_full_and_none():
    """It reaches neither 0 nor 1: opaque pixels must still be the image's to the bit."""
    image, alpha = torch.rand(3, 60, 80), torch.sigmoid(disc(60, 80, 30) * 20 - 10)
    refined = refine_foreground(image, alpha)
    opaque = (to_uint8(alpha) == 255).expand_as(image)
    assert opaque.any() and torch.equal(refined[opaque], image[opaque])


def test_batches_and_shapes():
    image, alpha = torch.rand(2, 3, 50, 60), torch.rand(2, 1, 50, 60)
    refined = refine_foreground(image, alpha)
    for index in range(2):
        assert torch.equal(refined[index], refine_foreground(image[index], alpha[index]))
        assert torch.equal(refined[index], refine_foreground(image[index], alpha[index, 0]))
    for wrong in (torch.rand(2, 1, 50, 61), torch.rand(1, 50, 60), torch.rand(2, 2, 50, 60)):
        with pytest.raises(ValueError, match="does not fit"):
            refine_foreground(image, wrong)
    with pytest.raises(ValueError, match="divide by 255"):
        refine_foreground(to_uint8(image), alpha)
    with pytest.raises(ValueError, match="An image has shape"):
        refine_foreground(torch.rand(50, 60), alpha)


def test_composite_is_exact():
    foreground, background = torch.full((3, 4, 4), 0.75), torch.full((3, 1, 1), 0.25)
    assert torch.equal(composite(foreground, torch.ones(4, 4), background), foreground)
    assert torch.equal(composite(foreground, torch.zeros(4, 4), background), background.expand(3, 4, 4))
    assert torch.equal(composite(foreground, torch.full((4, 4), 0.5), background), torch.full((3, 4, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_composite_in_half_precision(dtype):
    foreground, alpha, background = torch.rand(3, 4, 4), torch.rand(4, 4), torch.rand(3, 9, 7)
    result = composite(foreground.to(dtype), alpha.to(dtype), background)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), composite(foreground, alpha, background), rtol=0, atol=2e-2)


def test_background_images_cover():
    """Scaled to cover and cut at the centre: a wide picture loses its left and right."""
    wide = torch.zeros(3, 10, 40)
    wide[0, :, 15:25] = 1  # red in the middle, where a square picture looks
    result = composite(torch.zeros(3, 20, 20), torch.zeros(20, 20), wide)
    assert result[0, :, 4:16].min() > 0.99 and result[1].max() == 0


def test_background_of_a_very_tall_image():
    """Scaled whole to cover it, this background would have three thousand million pixels."""
    background = torch.rand(3, 9, 16, generator=torch.Generator().manual_seed(0))
    result = composite(torch.zeros(3, 40000, 2), torch.zeros(40000, 2), background)
    assert result.shape == (3, 40000, 2)
    torch.testing.assert_close(result[:, [0, 20000, 39999], 0], background[:, [0, 4, 8], 7], rtol=0, atol=1e-3)


def test_parse_background(tmp_path):
    assert parse_background("white").flatten().tolist() == [1, 1, 1]
    assert to_uint8(parse_background("#1a2b3c")).flatten().tolist() == [0x1A, 0x2B, 0x3C]
    assert to_uint8(parse_background((1, 2, 3))).flatten().tolist() == [1, 2, 3]
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    picture.save(tmp_path / "red.png")
    for source in (picture, tmp_path / "red.png", str(tmp_path / "red.png")):
        assert torch.equal(to_uint8(parse_background(source)).permute(1, 2, 0), torch.from_numpy(np.array(picture)))
    assert to_uint8(parse_background(tuple(np.uint8([1, 2, 3])))).flatten().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="neither a colour"):
        parse_background("reddish")
    with pytest.raises(ValueError, match="is a folder"):
        parse_background(str(tmp_path))
    with pytest.raises(ValueError, match="three integers"):
        parse_background((1, 2, 300))


def test_a_folder_is_no_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "white").mkdir()
    assert parse_background("white").flatten().tolist() == [1, 1, 1]


def test_cut_out():
    image = Image.fromarray(np.full((30, 40, 3), 200, np.uint8))
    alpha = Image.fromarray(to_uint8(disc(30, 40, 5)[0]).numpy())
    for refine in (True, False):
        result = cut_out(image, alpha, refine)
        assert result.mode == "RGBA" and np.array_equal(np.asarray(result)[..., 3], np.asarray(alpha))
        assert (np.asarray(result)[np.asarray(alpha) == 255][:, :3] == 200).all()
    deep = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16))
    assert (np.asarray(cut_out(deep, alpha, refine=False))[..., :3] == 200).all()
    with pytest.raises(ValueError, match="must agree"):
        cut_out(image, alpha.resize((10, 10)))


def test_cut_out_keeps_the_colour_profile_that_applies():
    image, alpha = Image.new("RGB", (8, 8), (200, 90, 30)), Image.new("L", (8, 8), 255)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = profile
    cmyk = image.convert("CMYK")
    cmyk.info["icc_profile"] = profile[:16] + b"CMYK" + profile[20:]
    for refine in (True, False):
        assert cut_out(image, alpha, refine).info["icc_profile"] == profile
        assert "icc_profile" not in cut_out(cmyk, alpha, refine).info
