"""Each transform moves image and mask together and does to the image what it says."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from birefnet_hf.augmentation import (
    MEAN_COLOUR,
    BackgroundSynthesis,
    BicubicRotation,
    RandomCrop,
    RandomMove,
    SaltAndPepper,
    SoftMask,
    adjust_sharpness,
    build_augmentation,
)
from birefnet_hf.data import seeded_random


def draw_pair(size=64):
    """An image whose every channel is its mask, so that whatever moves both alike keeps them equal."""
    ramp = torch.zeros(1, size, size)
    ramp[:, size // 4 : size // 2, size // 4 : 3 * size // 4] = torch.linspace(0.2, 1, size // 2)
    return tv_tensors.Image(ramp.expand(3, -1, -1).clone()), SoftMask(ramp.clone())


@pytest.mark.parametrize("seed", range(6))
def test_image_and_mask_move_together(seed):
    with seeded_random(seed):
        image, moved = draw_pair()
        for transform in (
            RandomCrop(0.7, 1.0),
            BicubicRotation(1.0),
            build_augmentation("upstream").after_resize.transforms[0],
        ):
            image, moved = transform(image, moved)
    assert isinstance(moved, SoftMask)
    torch.testing.assert_close(image[1:2].as_subclass(torch.Tensor), moved.as_subclass(torch.Tensor))
    assert len(moved.unique()) > 10  # still soft


def test_default_moves_both_and_fills_the_image_with_the_mean():
    move = RandomMove(15, scale=(0.8, 1.25), probability=1.0)
    with seeded_random(1):
        image, moved = move(*draw_pair())
        plain = tv_tensors.Image(torch.tensor(MEAN_COLOUR)[:, None, None].expand(3, 50, 50).clone())
        torch.testing.assert_close(
            move(plain, draw_pair()[1])[0].as_subclass(torch.Tensor), plain.as_subclass(torch.Tensor)
        )
    inside = moved.as_subclass(torch.Tensor)[0] > 0.5
    assert inside.any()
    torch.testing.assert_close(image[0][inside], moved.as_subclass(torch.Tensor)[0][inside])
    assert len(moved.unique()) > 10


def test_unknown_preset():
    with pytest.raises(ValueError, match="upstream-background"):
        build_augmentation("strong")


def test_rotation_is_pillows():
    ramp = torch.linspace(0, 1, 60).view(1, 1, 60) * torch.linspace(0.3, 1, 48).view(1, 48, 1)
    picture = Image.fromarray((ramp[0] * 255).round().to(torch.uint8).numpy())
    with seeded_random(3):
        angle = int((torch.rand(()), torch.randint(-15, 15, ()))[1])
    with seeded_random(3):
        turned, _ = BicubicRotation(1.0)(tv_tensors.Image(ramp.expand(3, -1, -1)), SoftMask(ramp))
    expected = torch.from_numpy(np.asarray(picture.rotate(angle, Image.Resampling.BICUBIC)) / 255.0)
    assert angle != 0
    inside = (slice(14, -14), slice(14, -14))
    assert (turned[0].double() - expected)[inside].abs().max() < 0.01


@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0, 3.0])
def test_sharpness_is_torchvisions(factor):
    image = tv_tensors.Image(torch.rand(3, 9, 14))
    adjusted = adjust_sharpness(image, factor)
    assert isinstance(adjusted, tv_tensors.Image)
    torch.testing.assert_close(adjusted, functional.adjust_sharpness(image, factor), atol=1e-6, rtol=0)
    tiny = tv_tensors.Image(torch.rand(3, 2, 14))
    assert torch.equal(adjust_sharpness(tiny, factor), tiny)


def test_salt_and_pepper():
    image = tv_tensors.Image(torch.full((3, 100, 100), 0.5))
    with seeded_random(0):
        peppered, _ = SaltAndPepper()(image, SoftMask(torch.zeros(1, 100, 100)))
    changed = peppered[:, (peppered[0] != 0.5)]
    assert 12 <= changed.shape[1] <= 15
    assert set(changed.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(changed[0], changed[2])
    assert (image == 0.5).all()


def test_background_synthesis():
    image, soft = tv_tensors.Image(torch.rand(3, 16, 16)), SoftMask(torch.zeros(1, 16, 16))
    soft[:, 4:12, 4:12] = 1
    for seed in range(5):
        with seeded_random(seed):
            composed, kept = BackgroundSynthesis()(image, soft)
        assert torch.equal(composed[:, 4:12, 4:12], image[:, 4:12, 4:12])
        assert composed[:, :4].flatten(1).std(dim=1).max() < 1e-6
        assert kept is soft


@pytest.mark.parametrize("change", [RandomCrop(0.5, 1.0), RandomMove(15, (0.8, 1.25), 1.0)], ids=["crop", "move"])
def test_the_object_stays_in(change):
    corner = SoftMask(torch.zeros(1, 40, 40))
    corner[:, 0, 0] = 1
    for seed in range(20):
        with seeded_random(seed):
            image, cropped = change(tv_tensors.Image(torch.zeros(3, 40, 40)), corner)
        assert cropped.any()
        assert image.shape[-2:] == cropped.shape[-2:]
