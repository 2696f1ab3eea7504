import numpy as np
import pytest
from PIL import Image, ImageDraw

from birefnet_hf.synthesis import (
    GENERATED_BACKGROUNDS,
    THIN_STRUCTURES,
    Compositor,
    list_images,
    photo_background,
    thin_structure,
    vary_object,
)


SIZE = (96, 128)


def disc(colour=(200, 40, 40)) -> Image.Image:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=(*colour, 255))
    return image


class Recorded(list):
    """A list that remembers how often something was taken from it."""

    taken = 0

    def __getitem__(self, index):
        self.taken += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("background", GENERATED_BACKGROUNDS)
def test_backgrounds(background):
    images = [background(np.random.default_rng(seed), SIZE) for seed in range(12)]
    assert all(image.size == SIZE[::-1] and image.mode == "RGB" for image in images)
    assert len({image.tobytes() for image in images}) > 6
    again = background(np.random.default_rng(3), SIZE)
    assert again.tobytes() == images[3].tobytes()


def test_photo_background_is_a_part_of_the_photo():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (150, 1))
    photo = Image.fromarray(np.stack([ramp, ramp, ramp], axis=-1))
    for seed in range(10):
        part = np.asarray(photo_background(np.random.default_rng(seed), SIZE, photo))[:, :, 0].astype(int)
        assert part.shape == SIZE
        assert 90 <= np.ptp(part) <= 200
        assert (np.diff(part[10]) >= 0).all() or (np.diff(part[10]) <= 0).all()


@pytest.mark.parametrize("draw", THIN_STRUCTURES)
def test_thin_structures_are_drawn_and_thin(draw):
    for seed in range(8):
        large = Image.new("L", (384, 384))
        draw(ImageDraw.Draw(large), np.random.default_rng(seed), 384)
        covered = (np.asarray(large) > 127).mean()
        assert 0.003 < covered < 0.4
        # Reduced as `thin_structure` does, lines are seen: most of what they touch is covered by a half.
        alpha = np.asarray(large.reduce(3))
        assert (alpha > 127).sum() > 0.45 * (alpha > 0).sum()


def test_thin_structure_has_soft_edges():
    structure = thin_structure(np.random.default_rng(1), 128)
    assert structure.mode == "RGBA"
    assert structure.getchannel("A").getbbox() == (0, 0, *structure.size)
    assert len(structure.getchannel("A").getcolors()) > 8


def test_vary_object_keeps_to_the_size():
    for seed in range(20):
        item = vary_object(np.random.default_rng(seed), disc(), 50)
        box = item.getchannel("A").getbbox()
        assert 35 <= max(box[2] - box[0], box[3] - box[1]) <= 75
    with pytest.raises(ValueError, match="fully transparent"):
        vary_object(np.random.default_rng(0), Image.new("RGBA", (8, 8)), 8)


def test_only_what_stands_in_front_is_in_the_mask():
    compositor = Compositor(size=SIZE, max_objects=1, max_distractors=4, thin_probability=0)
    taken = []
    for seed in range(30):
        cutouts = Recorded([disc(), disc((20, 200, 20))])
        image, mask = compositor(np.random.default_rng(seed), cutouts, 0)
        assert image.size == mask.size == SIZE[::-1]
        taken.append(cutouts.taken)
        solid = mask.point(lambda value: 255 * (value > 127))
        left, top, right, bottom = solid.getbbox()
        # A single disc, stretched and turned, fills about pi/4 of the box around it; two that stand apart fill less.
        touches = left == 0 or top == 0 or right == SIZE[1] or bottom == SIZE[0]
        filled = (np.asarray(solid)[top:bottom, left:right] / 255).mean()
        assert touches or filled == pytest.approx(np.pi / 4, abs=0.06)
    assert max(taken) > 3  # distractors were there


def test_some_objects_are_larger_than_the_frame():
    compositor = Compositor(size=SIZE, max_objects=1, thin_probability=0)
    covered = [np.asarray(compositor(np.random.default_rng(seed), [disc()], 0)[1]).mean() / 255 for seed in range(60)]
    assert max(covered) > 0.9 and np.median(covered) < 0.5


def test_several_objects_are_all_in_the_mask():
    compositor = Compositor(size=SIZE, max_objects=3, max_distractors=0, thin_probability=0)
    areas = {}
    for seed in range(40):
        cutouts = Recorded([disc()])
        mask = compositor(np.random.default_rng(seed), cutouts, 0)[1]
        areas.setdefault(cutouts.taken, []).append(np.asarray(mask).mean())
    assert set(areas) == {1, 2, 3}
    assert np.mean(areas[3]) > np.mean(areas[1])


def test_glass_shows_what_is_behind_it_and_is_foreground(tmp_path):
    stripes = np.tile(np.where(np.arange(160) % 20 < 10, 230, 20).astype(np.uint8), (120, 1))
    Image.fromarray(np.stack([stripes] * 3, axis=-1)).save(tmp_path / "stripes.png")

    def contrast_inside(glass_probability):
        """How far apart neighbouring columns are inside the object, one picture each."""
        compositor = Compositor(
            size=SIZE,
            backgrounds=tmp_path,
            photo_probability=1,
            max_objects=1,
            max_distractors=0,
            thin_probability=0,
            shadow_probability=0,
            glass_probability=glass_probability,
        )
        contrasts = []
        for seed in range(20):
            image, mask = compositor(np.random.default_rng(seed), [disc()], 0)
            inside = np.asarray(mask) > 250
            assert inside.mean() > 0.02
            grey = np.asarray(image.convert("L")).astype(float)
            contrasts.append(np.abs(grey[:, 4:] - grey[:, :-4])[inside[:, 4:] & inside[:, :-4]].mean())
        return np.array(contrasts)

    # Half of the opaque ones get a surface, which may be of the same photograph.
    assert np.median(contrast_inside(1)) > 2 * np.median(contrast_inside(0))


def test_hard_light_changes_the_object_and_not_its_mask():
    def compose(hard_light_probability, seed):
        compositor = Compositor(
            SIZE, max_objects=1, max_distractors=0, thin_probability=0, glass_probability=0, shadow_probability=0,
            hard_light_probability=hard_light_probability,
        )  # fmt: skip
        image, mask = compositor(np.random.default_rng(seed), [disc()], 0)
        return np.asarray(image.convert("L")).astype(float), np.asarray(mask)

    spreads = {0: [], 1: []}
    for seed in range(20):
        (plain, mask), (lit, mask_lit) = compose(0, seed), compose(1, seed)
        assert np.array_equal(mask, mask_lit)
        spreads[0].append(plain[mask > 250].std())
        spreads[1].append(lit[mask > 250].std())
    assert np.median(spreads[1]) > 1.5 * np.median(spreads[0])


def test_composites_follow_the_generator_alone(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "B.PNG", ".hidden.png", "notes.txt"):
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(
            tmp_path / name, "PNG" if name != "a.jpg" else "JPEG"
        )
    assert [path.name for path in list_images(tmp_path)] == ["B.PNG", "a.jpg"]
    cutouts = [disc(), disc((0, 0, 255))]
    compositor = Compositor(size=SIZE, backgrounds=tmp_path)
    first = [compositor(np.random.default_rng(seed), cutouts, seed % 2) for seed in range(12)]
    np.random.seed(7)
    again = [
        Compositor(size=SIZE, backgrounds=tmp_path)(np.random.default_rng(seed), cutouts, seed % 2)
        for seed in range(12)
    ]
    for (image, mask), (same_image, same_mask) in zip(first, again, strict=True):
        assert image.tobytes() == same_image.tobytes()
        assert mask.tobytes() == same_mask.tobytes()
        assert mask.getbbox() is not None


def test_a_folder_without_photos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No background images"):
        Compositor(backgrounds=tmp_path)
