"""Both image processors: parity with upstream's preprocessing, masks, sizes, released checkpoints, outputs."""

import json
import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from transformers import AutoImageProcessor, pipeline

from birefnet_hf import BiRefNetImageProcessor, BiRefNetImageProcessorPil
from birefnet_hf import image_processing_birefnet as module
from birefnet_hf.image_loading import load_mask


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOTH_BACKENDS = [BiRefNetImageProcessor, BiRefNetImageProcessorPil]
DYNAMIC_SIZE = {"shortest_edge": 64, "longest_edge": 256}


@pytest.fixture(params=BOTH_BACKENDS, ids=["torchvision", "pil"])
def processor_class(request):
    return request.param


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What the module warns of, also what it says only once per process."""
    collected: list[str] = []
    monkeypatch.setattr(module.logger, "warning_once", collected.append)
    monkeypatch.setattr(module.logger, "warning", collected.append)
    return collected


def random_array(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def random_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(random_array(height, width, 4))
    return image.convert("RGB").convert(mode) if mode in ("P", "CMYK") else image.convert(mode)


def upstream(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """The preprocessing of the released checkpoints' model cards."""
    transform = transforms.Compose(
        [transforms.Resize((height, width)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    return transform(image.convert("RGB"))[None]


def levels(difference: torch.Tensor) -> float:
    """Largest difference of normalised pixels in units of one of 256 levels."""
    return (difference * torch.tensor(STD).view(3, 1, 1) * 255).abs().max().item()


def outputs_of(probabilities: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.logit(probabilities))


# Preprocessing


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("shape", [(37, 53), (90, 130), (80, 120), (1, 7), (5, 200), (31, 3), (3, 3), (64, 96)])
def test_parity_with_upstream(shape, mode):
    image = random_image(*shape, mode)
    for height, width in [(64, 64), (128, 32), (64, 96)]:  # 80×120 to 64×96: ties, which torchvision breaks otherwise
        expected = upstream(image, height, width)
        on_pil = BiRefNetImageProcessorPil(size=(height, width))(image, return_tensors="pt")["pixel_values"]
        assert on_pil.dtype == torch.float32
        assert torch.equal(on_pil, expected)
        on_torchvision = BiRefNetImageProcessor(size=(height, width))(image, return_tensors="pt")["pixel_values"]
        assert on_torchvision.dtype == torch.float32
        assert levels(on_torchvision - expected) < 1e-3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_every_form_of_an_image_gives_the_same(processor_class, mode, tmp_path):
    image = random_image(45, 70, mode)
    image.save(tmp_path / "image.png")
    array = np.array(image)
    forms = [array, torch.from_numpy(array), np.flip(array, 1).copy()[:, ::-1]]  # the last one has negative strides
    if array.ndim == 3:
        forms += [array.transpose(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1)]
    else:
        forms += [array[..., None], array[None]]
    forms += [str(tmp_path / "image.png"), tmp_path / "image.png"]
    processor = processor_class(size={"height": 64, "width": 96})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 64, 96)
    for form in forms:
        assert torch.equal(processor(form, return_tensors="pt")["pixel_values"], expected)
    if array.ndim == 3:  # the format given is the arrays', not the PIL image's
        forms_first = [image, array.transpose(2, 0, 1)]
        batch = processor(forms_first, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        assert torch.equal(batch, expected.expand(2, -1, -1, -1))
    batch = processor([image, *forms], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, expected.expand(1 + len(forms), -1, -1, -1))


def test_alpha_is_dropped_not_composited(processor_class):
    transparent = np.zeros((32, 32, 4), dtype=np.uint8)
    transparent[..., :3] = (40, 80, 120)
    with_alpha = [Image.fromarray(transparent), transparent, torch.from_numpy(transparent).permute(2, 0, 1)]
    processor = processor_class(size=32)
    expected = processor(Image.new("RGB", (32, 32), (40, 80, 120)), return_tensors="pt")["pixel_values"]
    for image in with_alpha:
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


def test_batches_and_nesting(processor_class):
    arrays = np.stack([random_array(40, 50, seed=seed) for seed in range(3)])
    processor = processor_class(size=32)
    expected = torch.cat([processor(array, return_tensors="pt")["pixel_values"] for array in arrays])
    images = [Image.fromarray(array) for array in arrays]
    batch_inputs = [arrays, list(arrays), tuple(images), [[images[0]], images[1:]]]
    batch_inputs += [torch.from_numpy(arrays), torch.from_numpy(arrays).movedim(-1, 1)]
    for batch in batch_inputs:
        assert torch.equal(processor(batch, return_tensors="pt")["pixel_values"], expected)
    as_numpy = processor(images, return_tensors="np")["pixel_values"]
    assert isinstance(as_numpy, np.ndarray)
    np.testing.assert_array_equal(as_numpy, expected.numpy())
    as_list = processor(images)["pixel_values"]
    assert isinstance(as_list, list) and len(as_list) == 3 and as_list[0].shape == (3, 32, 32)


def test_truth_values_and_bfloat16_are_images(processor_class):
    processor, bits = processor_class(size=32), random_array(32, 32, 3) > 127
    expected = processor((bits * 255).astype(np.uint8), return_tensors="pt")["pixel_values"]
    for form in (bits, torch.from_numpy(bits).permute(2, 0, 1)):
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values"], expected)
    half = torch.rand(3, 32, 32).to(torch.bfloat16)
    pixel_values = (processor(form, return_tensors="pt")["pixel_values"] for form in (half, half.float()))
    torch.testing.assert_close(*pixel_values)


def test_deep_images_are_scaled_not_clipped(processor_class, tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    processor = processor_class(size=32)
    expected = processor(Image.fromarray((ramp / 257).round().astype(np.uint8)), return_tensors="pt")["pixel_values"]
    unit = Image.fromarray((ramp / 65535).astype(np.float32))
    for source in (Image.fromarray(ramp), tmp_path / "deep.png", unit):
        torch.testing.assert_close(processor(source, return_tensors="pt")["pixel_values"], expected)


def test_float_images(processor_class, messages):
    array = random_array(64, 64)
    processor = processor_class(size=64)
    expected = processor(array, return_tensors="pt")["pixel_values"]
    scaled = processor(array.astype(np.float32) / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scaled, expected, atol=2e-6, rtol=0)
    processor(array.astype(np.float32), return_tensors="pt")
    processor(np.zeros_like(array, dtype=np.float32), return_tensors="pt")
    assert not messages
    processor(array.astype(np.float32) / 255, return_tensors="pt")
    assert "pass do_rescale=False" in messages[0]


def test_four_channels_without_conversion(processor_class):
    processor = processor_class(size=32)
    statistics = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    pixels = processor(
        random_array(32, 32, 4),
        do_convert_rgb=False,
        input_data_format="channels_last",
        return_tensors="pt",
        **statistics,
    )
    assert pixels["pixel_values"].shape == (1, 4, 32, 32)


def test_exif_orientation(processor_class, tmp_path, messages):
    upright = random_image(32, 64)
    exif = Image.Exif()
    exif[module._EXIF_ORIENTATION] = 6  # to be turned by 90°
    path = tmp_path / "rotated.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    processor = processor_class(size={"height": 32, "width": 64})
    expected = processor(upright, return_tensors="pt")["pixel_values"]
    from_files = processor(path, path, return_tensors="pt")
    assert torch.equal(from_files["pixel_values"], expected)
    assert torch.equal(from_files["labels"], processor(upright, upright, return_tensors="pt")["labels"])
    assert not messages
    # An object is taken as its pixels lie, which is what the caller measures and composites.
    stored = Image.open(path)
    result = processor(stored, size={"height": 64, "width": 32}, return_tensors="pt")["pixel_values"]
    assert torch.equal(result, torch.rot90(expected, 1, (2, 3)))
    assert len(messages) == 1 and "exif_transpose" in messages[0]


def test_overrides_hold_for_one_call(processor_class):
    first, second = processor_class(), processor_class()
    image = random_image(32, 32)
    changed = first(image, size=64, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert changed.shape == (1, 3, 64, 64) and changed.min() >= 0
    assert first(image, do_resize=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert first.size == {"height": 1024, "width": 1024} and first.do_normalize and first.do_resize
    first.size["height"] = 32
    assert second.size["height"] == 1024 and processor_class().size["height"] == 1024


def test_float_pixels_are_within_one_level():
    image = random_image(80, 120)
    processor = BiRefNetImageProcessor(size={"height": 64, "width": 96}, do_rescale=False)
    pixels = processor(np.asarray(image, dtype=np.float32) / 255, return_tensors="pt")["pixel_values"]
    assert levels(pixels - upstream(image, 64, 96)) < 1.01


def test_device_argument():
    result = BiRefNetImageProcessor(size=32)(
        random_image(40, 40), Image.new("L", (40, 40)), device="cpu", return_tensors="pt"
    )
    assert result["pixel_values"].device.type == result["labels"].device.type == "cpu"


@pytest.mark.gpu
def test_works_on_a_gpu():
    image, mask = random_image(90, 130), random_image(90, 130, "L")
    processor = BiRefNetImageProcessor(size=64)
    on_cpu = processor(image, mask, return_tensors="pt")
    on_gpu = processor(image, mask, device="cuda", return_tensors="pt")
    assert on_gpu["pixel_values"].device.type == on_gpu["labels"].device.type == "cuda"
    assert levels(on_gpu["pixel_values"].cpu() - on_cpu["pixel_values"]) < 1.01
    torch.testing.assert_close(on_gpu["labels"].cpu(), on_cpu["labels"], atol=1e-5, rtol=0)
    alpha = processor.post_process_alpha(SimpleNamespace(logits=torch.zeros(1, 1, 8, 8).half().cuda()), [(5, 7)])[0]
    assert alpha.device.type == "cuda" and alpha.dtype == torch.float32


def test_nothing_deprecated_is_used(processor_class, tmp_path, caplog):
    path = tmp_path / "image.png"
    random_image(40, 50, "RGBA").save(path)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        processor = processor_class(size=32)
        result = processor([Image.open(path), str(path)], [Image.new("L", (50, 40))] * 2, return_tensors="pt")
        processor.post_process_alpha(SimpleNamespace(logits=result["labels"]), [(40, 50)] * 2)
        processor.save_pretrained(tmp_path)
        processor_class.from_pretrained(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "empty"),
        (5, TypeError, "got int"),
        ([None], TypeError, "got NoneType"),
        (np.zeros((1, 1, 1, 1, 1), np.uint8), ValueError, "dimensions, got 5"),
        (np.zeros((32, 32, 5), np.uint8), ValueError, "channel"),
        ("no/such/file.png", ValueError, "no/such/file.png"),
        (np.full((32, 32), 1000, np.uint16), ValueError, "16 bits"),
    ],
)
def test_what_is_no_image(processor_class, images, error, message):
    with pytest.raises(error, match=message):
        processor_class(size=32)(images, return_tensors="pt")


def test_unknown_and_ill_typed_arguments(processor_class):
    with pytest.raises(TypeError, match="sizes"):
        processor_class()(random_image(32, 32), sizes=32)
    with pytest.raises(Exception, match="size_divisor"):  # huggingface_hub's own type
        processor_class()(random_image(32, 32), size_divisor="32")


# Sizes


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1000, r"multiples of 32; the nearest is \{'height': 992, 'width': 992\}"),
        ({"height": 1024, "width": 0}, "multiples of 32"),
        ({"shortest_edge": 1024}, "longest_edge"),
        ({"max_height": 64, "max_width": 64}, "shortest_edge"),
        ({"shortest_edge": 512, "longest_edge": 256}, "must not exceed"),
        ({"shortest_edge": 250, "longest_edge": 2304}, "multiples of 32"),
    ],
)
def test_sizes_that_the_network_cannot_take(processor_class, size, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=size)
    with pytest.raises(ValueError, match=message):
        processor_class()(random_image(32, 32), size=size)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((427, 640), (416, 640)),  # within the range: rounded down to multiples of 32 only
        ((256, 2304), (256, 2304)),
        ((1333, 2000), (1312, 1984)),
        ((200, 300), (256, 384)),  # enlarged by 1.28, aspect kept
        ((4000, 6000), (1536, 2304)),  # shrunk, aspect kept
        ((1, 1), (256, 256)),
        ((10, 20000), (256, 2304)),  # no scale fits both sides
        ((20000, 10), (2304, 256)),
        ((100, 1000), (256, 2304)),
        ((1, 519), (256, 2304)),  # 519 times the scale is 2303.9999999999995
    ],
)
def test_rule_of_the_dynamic_size(shape, expected):
    assert module._dynamic_size(*shape, shortest=256, longest=2304, divisor=32) == expected


def test_dynamic_size_is_always_valid():
    generator = np.random.default_rng(0)
    for height, width in np.exp(generator.uniform(0, 10, (500, 2))).astype(int):
        new = module._dynamic_size(height, width, 256, 2304, 32)
        assert all(256 <= side <= 2304 and side % 32 == 0 for side in new), (height, width, new)


def test_dynamic_processor(processor_class):
    processor = processor_class(size=DYNAMIC_SIZE)
    image, tall = random_image(100, 180), random_image(1000, 3)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 96, 160)
    fixed = processor_class(size=(96, 160))(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, fixed)
    assert processor(tall, return_tensors="pt")["pixel_values"].shape == (1, 3, 256, 64)
    assert processor([image, image.rotate(180)], return_tensors="pt")["pixel_values"].shape == (2, 3, 96, 160)
    assert [tuple(item.shape) for item in processor([image, tall])["pixel_values"]] == [(3, 96, 160), (3, 256, 64)]
    with pytest.raises(ValueError, match=r"\(96, 160\), \(256, 64\).*one image at a time.*fixed size"):
        processor([image, tall], return_tensors="pt")
    finer = processor(image, size_divisor=1, return_tensors="pt")["pixel_values"]
    assert finer.shape == (1, 3, 100, 180)
    with_mask = processor(image, image.convert("L"), return_tensors="pt")
    assert with_mask["labels"].shape == (1, 1, 96, 160)


# Masks


def test_every_form_of_a_mask_gives_the_same(processor_class, tmp_path):
    array = random_array(40, 60, 1)[..., 0]
    tensor = torch.from_numpy(array)
    image = Image.fromarray(array)
    image.save(tmp_path / "mask.png")
    forms = [image, array, array[None], array[..., None], tensor, tensor[None], tensor[None, None]]
    forms += [array / 255, (array / 255).astype(np.float32), tensor / 255, array.astype(np.uint16) * 257]
    forms += [image.convert("RGB"), image.convert("P"), image.convert("LA"), Image.fromarray(array / np.float32(255))]
    forms += [Image.fromarray(array.astype(np.uint16) * 257), tmp_path / "mask.png", str(tmp_path / "mask.png")]
    picture = random_image(40, 60)
    processor = processor_class(size={"height": 64, "width": 32})
    expected = processor(picture, image, return_tensors="pt")["labels"]
    assert expected.shape == (1, 1, 64, 32) and expected.dtype == torch.float32
    assert 0 <= expected.min() < 0.2 and 0.8 < expected.max() <= 1
    for form in forms:
        labels = processor(picture, segmentation_maps=form, return_tensors="pt")["labels"]
        torch.testing.assert_close(labels, expected, atol=1e-6, rtol=0)
    batch = processor([picture] * len(forms), forms, return_tensors="pt")["labels"]
    assert batch.shape == (len(forms), 1, 64, 32)
    stacked = processor([picture] * 2, np.stack([array, array]), return_tensors="pt")["labels"]
    torch.testing.assert_close(stacked, expected.expand(2, -1, -1, -1))


def test_binary_masks(processor_class):
    array = random_array(32, 32, 1)[..., 0] > 127
    processor = processor_class(size=32)
    image = random_image(32, 32)
    for mask in (
        array,
        torch.from_numpy(array),
        Image.fromarray(array),
        array.astype(np.int64),
        array * np.uint8(255),
    ):
        labels = processor(image, mask, return_tensors="pt")["labels"]
        np.testing.assert_array_equal(labels[0, 0].numpy(), array.astype(np.float32))


def test_masks_mean_what_they_mean_in_training_data(processor_class):
    """Dark objects in front of transparency, class maps, labels 0 and 1, 16 bits in Pillow's 32."""
    inside = np.zeros((32, 32), np.uint8)
    inside[8:24, 8:24] = 1
    classes = Image.fromarray(inside, mode="P")
    classes.putpalette([0, 0, 0, 128, 0, 0])
    cutout = Image.new("RGBA", (32, 32))
    cutout.putalpha(Image.fromarray(inside * np.uint8(255)))
    deep = Image.fromarray(inside.astype(np.int32) * 65535)
    assert (classes.mode, deep.mode) == ("P", "I")
    for mask in (classes, cutout, deep, Image.fromarray(inside)):
        labels = processor_class(size=32)(random_image(32, 32), mask, return_tensors="pt")["labels"]
        np.testing.assert_array_equal(labels[0, 0].numpy(), inside.astype(np.float32))
        np.testing.assert_array_equal(np.asarray(load_mask(mask)), inside * np.uint8(255))


def test_16_bit_masks_keep_their_depth(processor_class, tmp_path):
    Image.fromarray(np.full((32, 32), 1000, dtype=np.uint16)).save(tmp_path / "mask.png")
    for mask in (tmp_path / "mask.png", Image.open(tmp_path / "mask.png")):
        labels = processor_class(size=32)(random_image(32, 32), mask, return_tensors="pt")["labels"]
        assert labels.unique().tolist() == pytest.approx([1000 / 65535])


@pytest.mark.parametrize("size", [(32, 64), (96, 128)])
def test_soft_masks_are_resized_like_images(processor_class, size):
    mask = random_image(50, 70, "L")
    labels = processor_class(size=size)(random_image(50, 70), mask, return_tensors="pt")["labels"]
    expected = transforms.ToTensor()(transforms.Resize(size)(mask))[None]
    assert (labels - expected).abs().max() < 1.01 / 255
    assert len(labels.unique()) > 100


def test_masks_without_tensors(processor_class):
    result = processor_class(size=32)([random_image(40, 40)], [np.ones((40, 40), bool)])
    assert type(result["labels"][0]) is type(result["pixel_values"][0])
    as_numpy = processor_class(size=32)([random_image(40, 40)], [np.ones((40, 40), bool)], return_tensors="np")
    assert as_numpy["labels"].dtype == np.float32 and as_numpy["labels"].shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([Image.new("L", (60, 40))] * 2, "1 images and 2 segmentation_maps"),
        ([], "1 images and 0 segmentation_maps"),
        (Image.new("L", (40, 60)), "Mask 0 is 60×40 .* its image is 40×60"),
        (np.full((40, 60), 255.0), r"\[0, 1\], got \[255, 255\]; divide"),
        (np.full((40, 60), np.nan), "got .nan, nan"),
        (np.full((40, 60), 2), "must lie in"),
        (np.zeros((40, 60, 3), np.uint8), r"one channel, got an array of shape \(40, 60, 3\)"),
    ],
)
def test_masks_that_do_not_fit(processor_class, masks, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=32)(random_image(40, 60), masks, return_tensors="pt")


def test_a_byte_mask_of_zeros_and_ones_is_pointed_out(messages):
    mask = np.eye(32, dtype=np.uint8)
    labels = BiRefNetImageProcessor(size=32)(random_image(32, 32), mask, return_tensors="pt")["labels"]
    assert labels.max() == pytest.approx(1 / 255)
    assert len(messages) == 1 and "mask * 255" in messages[0]


def test_cropping_and_masks_are_refused(processor_class):
    processor = processor_class(size=64, do_center_crop=True, crop_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="do_center_crop"):
        processor(random_image(40, 40), Image.new("L", (40, 40)))


# Saving and loading


def test_round_trip(processor_class, tmp_path):
    processor = processor_class(size=DYNAMIC_SIZE, size_divisor=64, do_normalize=None)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["image_processor_type"] == "BiRefNetImageProcessor"
    assert saved["size"] == DYNAMIC_SIZE and saved["size_divisor"] == 64 and saved["do_normalize"] is None
    for cls in BOTH_BACKENDS:
        assert cls.from_pretrained(tmp_path).to_dict() == processor.to_dict()
        assert cls.from_pretrained(tmp_path, size=512).size == {"height": 512, "width": 512}
    assert processor_class.from_pretrained(tmp_path / "preprocessor_config.json").to_dict() == processor.to_dict()


def test_auto_class(tmp_path):
    BiRefNetImageProcessorPil(size=64).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is BiRefNetImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is BiRefNetImageProcessorPil


def test_export_as_remote_code_is_complete(processor_class, tmp_path, monkeypatch):
    monkeypatch.setattr(processor_class, "_auto_class", "AutoImageProcessor")
    processor_class().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "preprocessor_config.json",
        "image_processing_birefnet.py",
        "checkpoints_birefnet.py",
        "image_loading.py",
    }


def write_config(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


RELEASED = {"architectures": ["BiRefNet"], "bb_pretrained": False}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("BiRefNet", {"height": 1024, "width": 1024}),
        ("BiRefNet_lite-2K", {"height": 1440, "width": 2560}),
        ("BiRefNet_dynamic", {"shortest_edge": 256, "longest_edge": 2304}),
    ],
)
def test_released_directory(processor_class, name, size, tmp_path, messages):
    folder = write_config(tmp_path / name, **RELEASED)
    assert processor_class.from_pretrained(folder).to_dict() == processor_class(size=size).to_dict()
    overridden, unused = processor_class.from_pretrained(folder, size=256, other=1, return_unused_kwargs=True)
    assert overridden.size == {"height": 256, "width": 256} and unused["other"] == 1
    assert not messages


def test_released_directory_of_unknown_name(processor_class, tmp_path, messages):
    folder = write_config(tmp_path / "my-finetune", **RELEASED)
    assert processor_class.from_pretrained(folder).size == {"height": 1024, "width": 1024}
    assert len(messages) == 1 and "1024×1024" in messages[0] and "size=" in messages[0]


def test_size_of_the_config_comes_first(processor_class, tmp_path, tiny_config, messages):
    folder = tmp_path / "BiRefNet_HR"
    tiny_config.save_pretrained(folder)
    assert processor_class.from_pretrained(folder).size == {"height": 64, "width": 64}
    assert not messages


def test_hub_cache_offline(processor_class, tmp_path):
    repository = tmp_path / "models--ZhengPeng7--BiRefNet_HR"
    snapshot = write_config(repository / "snapshots" / ("0" * 40), **RELEASED)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    size = {"height": 2048, "width": 2048}
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert processor_class.from_pretrained("ZhengPeng7/BiRefNet_HR", **options).size == size
    assert processor_class.from_pretrained(snapshot).size == size
    with pytest.raises(OSError, match="connect"):
        processor_class.from_pretrained("ZhengPeng7/BiRefNet", **options)


def test_defaults_do_not_hide_what_is_missing_or_damaged(processor_class, tmp_path):
    with pytest.raises(OSError, match="no/such/directory"):
        processor_class.from_pretrained(tmp_path / "no/such/directory")
    empty = tmp_path / "BiRefNet"
    empty.mkdir()
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        processor_class.from_pretrained(empty)
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        processor_class.from_pretrained(write_config(tmp_path / "bert", model_type="bert", architectures=["Bert"]))
    released = write_config(tmp_path / "damaged" / "BiRefNet", **RELEASED)
    with pytest.raises(OSError, match=r"other\.json"):
        processor_class.from_pretrained(released, image_processor_filename="other.json")
    (released / "preprocessor_config.json").write_text('{"size":', encoding="utf-8")
    with pytest.raises(OSError, match="not a valid JSON"):
        processor_class.from_pretrained(released)


# Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alpha_without_sizes(processor_class, dtype):
    logits = torch.linspace(-12, 12, 2 * 8 * 6).view(2, 1, 8, 6).to(dtype).requires_grad_()
    alphas = processor_class().post_process_alpha(SimpleNamespace(logits=logits))
    assert len(alphas) == 2
    for alpha, expected in zip(alphas, logits.detach().float().sigmoid()[:, 0], strict=True):
        assert alpha.shape == (8, 6) and alpha.dtype == torch.float32 and not alpha.requires_grad
        assert torch.equal(alpha, expected)


def test_alpha_is_resized_between_pixel_centres(processor_class):
    alpha = torch.tensor([[0.0, 1.0]]).view(1, 1, 1, 2)
    enlarged = processor_class().post_process_alpha(outputs_of(alpha), [(2, 8)])[0]
    # Pixel centres of the result lie at -0.375, -0.125, 0.125, ... of the source's; the border is held.
    expected = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]).expand(2, 8)
    torch.testing.assert_close(enlarged, expected, atol=1e-6, rtol=0)


def test_shrinking_averages(processor_class):
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 1
    shrunk = processor_class().post_process_alpha(outputs_of(stripes), [(16, 16)])[0]
    assert (shrunk[:, 1:-1] - 0.5).abs().max() < 0.02  # without antialiasing every sample were 0.5 ± 0.5
    one_side = processor_class().post_process_alpha(outputs_of(stripes), [(100, 16)])[0]
    assert (one_side[:, 1:-1] - 0.5).abs().max() < 0.02


def test_alpha_of_each_size_stays_in_range(processor_class):
    probabilities = torch.rand(3, 1, 17, 23, generator=torch.manual_seed(0)).round()
    sizes = [(50, 7), (1, 1), (17, 23)]
    for target_sizes in (sizes, torch.tensor(sizes), np.array(sizes), [torch.tensor(size) for size in sizes]):
        alphas = processor_class().post_process_alpha(outputs_of(probabilities), target_sizes)
        assert [tuple(alpha.shape) for alpha in alphas] == sizes
        assert all(alpha.min() >= 0 and alpha.max() <= 1 for alpha in alphas)


def test_alpha_of_a_constant_is_exact(processor_class):
    whole = processor_class().post_process_alpha(outputs_of(torch.ones(1, 1, 1, 1)), [(10, 10)])[0]
    torch.testing.assert_close(whole, torch.ones(10, 10))
    assert whole.max() <= 1  # PyTorch's own result is 1.0000001
    alpha = processor_class().post_process_alpha(outputs_of(torch.full((1, 1, 32, 32), 0.25)), [(49, 81)])[0]
    torch.testing.assert_close(alpha, torch.full((49, 81), 0.25))


def test_wrong_sizes_and_logits(processor_class):
    outputs = outputs_of(torch.full((2, 1, 8, 8), 0.5))
    methods = ("post_process_alpha", "post_process_semantic_segmentation", "post_process_instance_segmentation")
    for method in methods:
        for target_sizes in ([(8, 8)], (8, 8), [(8, 8, 1)] * 2, torch.ones(3, 2)):
            with pytest.raises(ValueError, match=r"one \(height, width\) for each of the 2 images"):
                getattr(processor_class(), method)(outputs, target_sizes=target_sizes)
    with pytest.raises(ValueError, match="B×1×H×W"):
        processor_class().post_process_alpha(SimpleNamespace(logits=torch.zeros(2, 8, 8)))


def test_semantic_segmentation(processor_class):
    probabilities = torch.tensor([[0.1, 0.5], [0.51, 0.9]]).view(1, 1, 2, 2)
    processor = processor_class()
    maps = processor.post_process_semantic_segmentation(outputs_of(probabilities))
    assert maps[0].dtype == torch.int64 and maps[0].tolist() == [[0, 0], [1, 1]]
    assert processor.post_process_semantic_segmentation(outputs_of(probabilities), threshold=0.8)[0].sum() == 1
    result = processor.post_process_semantic_segmentation(
        outputs_of(probabilities), target_sizes=[(4, 6)], return_segmentation_scores=True
    )[0]
    assert result.segmentation.shape == (4, 6) and result.segmentation_scores.shape == (2, 4, 6)
    torch.testing.assert_close(result.segmentation_scores.sum(0), torch.ones(4, 6))
    assert torch.equal(result.segmentation, (result.segmentation_scores[1] > 0.5).long())


def test_instance_segmentation(processor_class):
    probabilities = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.2)])
    probabilities[0, 0, :2] = torch.tensor([0.6, 0.6, 0.8, 0.8])
    first, empty = processor_class().post_process_instance_segmentation(
        outputs_of(probabilities), threshold=0.9, mask_threshold=0.5, target_sizes=None
    )
    assert first["segmentation"].tolist() == [[1] * 4] * 2 + [[0] * 4] * 2
    (segment,) = first["segments_info"]
    assert segment == {"id": 1, "label_id": 1, "was_fused": False, "score": pytest.approx(0.7)}
    assert isinstance(segment["score"], float)
    assert empty["segments_info"] == [] and empty["segmentation"].sum() == 0


def test_stock_pipeline(processor_class, tiny_model):
    image = random_image(50, 70)
    processor = processor_class(size=64)
    with torch.no_grad():
        outputs = tiny_model(**processor(image, return_tensors="pt"))
    alpha = processor.post_process_alpha(outputs, [(50, 70)])[0]
    middle = alpha.median().item()
    segmenter = pipeline("image-segmentation", model=tiny_model, image_processor=processor, device="cpu")
    (segment,) = segmenter(image, mask_threshold=middle)
    assert segment["label"] == "foreground" and segment["mask"].size == (70, 50)
    np.testing.assert_array_equal(np.array(segment["mask"]), (alpha > middle).numpy() * 255)
    assert segment["score"] == pytest.approx(alpha[alpha > middle].mean().item(), abs=1e-6)
    assert segmenter(image, mask_threshold=1.0) == []
    labels = {item["label"] for item in segmenter(image, subtask="semantic")}
    assert labels <= {"background", "foreground"} and labels


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_image_without_pixels(processor_class, shape):
    with pytest.raises(ValueError, match="without pixels"):
        processor_class(size=32)(np.zeros(shape, np.uint8), return_tensors="pt")
