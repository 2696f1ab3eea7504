"""The background-removal pipeline, the stock image-segmentation pipeline, and `load_pipeline`, which builds both."""

import io
import json
import logging
import struct
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import ImageSegmentationPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging as transformers_logging

from birefnet_hf import (
    NANO,
    BackgroundRemovalPipeline,
    BiRefNetForImageSegmentation,
    BiRefNetImageProcessor,
    image_loading,
    load_pipeline,
    pipeline_birefnet,
)
from birefnet_hf.foreground import parse_background
from birefnet_hf.image_loading import ImageLoadError
from birefnet_hf.pipeline_birefnet import render_picture


def photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """A bright disc with a soft edge on a dark gradient, with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot(x - width / 2, y - height / 2) / min(width, height)
    disc = np.clip((0.35 - distance) * 10, 0, 1)[..., None]
    background = np.stack([40 + 60 * x / width, 40 + 60 * y / height, 60 + 0 * x], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 8, size=(height, width, 3))
    return Image.fromarray(np.clip(disc * (230, 120, 30) + (1 - disc) * background + noise, 0, 255).astype(np.uint8))


def difference(first: Image.Image, second: Image.Image) -> int:
    """Largest difference of two images of one size and mode, in levels of 256."""
    assert (first.mode, first.size) == (second.mode, second.size)
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second)).max())


@pytest.fixture(scope="module")
def seeing_model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny network with its last layer turned into a detector of red, so that masks follow the picture."""
    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    reference = model.decoder.inward_reference
    with torch.no_grad():
        model.decoder.mask_head.weight.zero_()
        model.decoder.mask_head.weight[:, -1] = 1
        model.decoder.mask_head.bias.fill_(-1.0)
        for conv in (reference.conv_in, reference.conv_out):
            conv.weight.zero_()
            conv.bias.zero_()
        reference.conv_in.weight[0, 0, 1, 1] = 1
        reference.conv_out.weight[-1, 0, 1, 1] = 3
    folder = tmp_path_factory.mktemp("models") / "seeing"
    model.save_pretrained(folder)
    BiRefNetImageProcessor.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(seeing_model_dir) -> BackgroundRemovalPipeline:
    return load_pipeline(seeing_model_dir, device="cpu")


@pytest.fixture(scope="module")
def dynamic_pipe(seeing_model_dir) -> BackgroundRemovalPipeline:
    """For a checkpoint that takes images of any size between 32 and 96."""
    return load_pipeline(seeing_model_dir, device="cpu", size={"shortest_edge": 32, "longest_edge": 96})


# Outputs


def test_mask_is_the_alpha_of_the_processor(pipe):
    image = photo()
    inputs = pipe.image_processor(image, return_tensors="pt")
    with torch.inference_mode():
        outputs = pipe.model(**inputs)
    [alpha] = pipe.image_processor.post_process_alpha(outputs, target_sizes=[(60, 90)])
    mask = pipe(image, output_type="mask")
    assert (mask.mode, mask.size) == ("L", (90, 60))
    assert np.abs(np.asarray(mask) - alpha.numpy() * 255).max() <= 0.5 + 1e-3
    values = np.unique(np.asarray(mask))
    assert len(values) > 50  # soft
    # The network never says exactly 0 or 1 here; a stretched mask would.
    assert values[0] > 0
    assert values[-1] < 255


def test_cutout(pipe):
    image = photo()
    mask, cutout = pipe(image, output_type="mask"), pipe(image)
    assert (cutout.mode, cutout.size) == ("RGBA", image.size)
    assert difference(cutout.getchannel("A"), mask) == 0
    plain = pipe(image, refine_foreground=False)
    assert difference(plain.getchannel("A"), mask) == 0
    assert difference(plain.convert("RGB"), image) == 0


def test_refined_colours_lose_the_background(pipe):
    """Half transparent pixels of a red object on green hold green; the estimate holds less, inside nothing changes."""
    alpha = np.clip((np.arange(256) - 124) / 8, 0, 1)[None, :, None] * np.ones((256, 1, 1))
    image = Image.fromarray((alpha * (255, 0, 0) + (1 - alpha) * (0, 255, 0)).round().astype(np.uint8))
    plain, refined = np.asarray(pipe(image, refine_foreground=False)), np.asarray(pipe(image))
    rim = (plain[..., 3] > 50) & (plain[..., 3] < 205)
    assert rim.sum() > 256
    assert refined[rim, 1].mean() < 0.4 * plain[rim, 1].mean()
    assert refined[rim, 0].mean() > 1.5 * plain[rim, 0].mean()
    assert np.array_equal(refined[:, 200:], plain[:, 200:])
    composite = np.asarray(pipe(image, background="white"))
    assert (
        composite[rim, 1].mean() < np.asarray(pipe(image, background="white", refine_foreground=False))[rim, 1].mean()
    )


def test_composite_on_a_colour(pipe):
    image = photo()
    cutout = pipe(image)
    composite = pipe(image, background="#0000ff")
    assert (composite.mode, composite.size) == ("RGB", image.size)
    expected = Image.new("RGBA", image.size, (0, 0, 255, 255))
    expected.alpha_composite(cutout)
    assert difference(composite, expected.convert("RGB")) <= 2
    assert difference(pipe(image, output_type="composite", background=(0, 0, 255)), composite) == 0


def test_composite_on_an_image(pipe, tmp_path):
    image = photo()
    backdrop = Image.linear_gradient("L").convert("RGB")
    backdrop.save(tmp_path / "backdrop.png")
    composite = pipe(image, background=tmp_path / "backdrop.png")
    assert (composite.mode, composite.size) == ("RGB", image.size)
    assert difference(composite, pipe(image, background=backdrop)) == 0
    corner = np.asarray(composite)[0, 0].astype(int)
    assert np.abs(corner - np.asarray(pipe(image, background="white"))[0, 0]).max() > 30


def test_blurred_background_holds_no_foreground(pipe):
    """A red disc on stripes: the stripes are gone around it, and no red has flowed into them."""
    pixels = np.zeros((120, 120, 3), np.uint8)
    pixels[:, ::2] = 200
    y, x = np.mgrid[0:120, 0:120]
    disc = np.hypot(x - 60, y - 60) < 30
    pixels[disc] = (250, 20, 20)
    image, alpha = Image.fromarray(pixels), Image.fromarray(disc.astype(np.uint8) * 255)
    result = np.asarray(render_picture(image, alpha, background="blur")).astype(int)
    assert (result[disc] == (250, 20, 20)).all()
    around = result[~disc]
    assert around[:, 0].std() < 15 and pixels[~disc][:, 0].std() > 95
    assert np.abs(around[:, 0] - around[:, 1]).max() <= 1
    blurred = pipe(photo(), background="blur")
    assert blurred.mode == "RGB" and blurred.size == photo().size


def test_threshold_splits_alpha(pipe):
    soft, hard = (np.asarray(pipe(photo(), output_type="mask", **o)) for o in ({}, {"threshold": 0.4}))
    assert len(np.unique(soft)) > 10 and set(np.unique(hard)) == {0, 255}
    assert ((soft >= 103) <= (hard == 255)).all() and ((soft <= 101) <= (hard == 0)).all()
    assert set(np.unique(np.asarray(pipe(photo(), threshold=0.4))[..., 3])) == {0, 255}


@pytest.mark.parametrize(
    "options", [{}, {"refine_foreground": False}, {"background": "white"}, {"background": "blur"}]
)
def test_a_picture_from_a_mask_is_the_pipelines(pipe, options):
    mask = pipe(photo(), output_type="mask")
    settings = dict(options)
    if settings.get("background") == "white":
        settings["background"] = torch.ones(3, 1, 1)
    # The mask has 8 bits, the pipeline's alpha 32.
    assert difference(render_picture(photo(), mask, **settings), pipe(photo(), **options)) <= 3


def test_pictures_from_masks_refuse_what_does_not_fit():
    alpha = Image.new("L", (90, 60), 128)
    for options, message in (
        ({"output_type": "composite"}, "needs a `background`"),
        ({"background": "white"}, "parse_background"),
        ({"threshold": -1.0}, "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            render_picture(photo(), alpha, **options)
    with pytest.raises(ValueError, match="must agree"):
        render_picture(photo(), alpha.resize((9, 6)))


def test_defaults_of_the_constructor_give_way_to_the_call(seeing_model_dir):
    image = photo()
    pipe = load_pipeline(seeing_model_dir, device="cpu", background="white", refine_foreground=False, batch_size=2)
    assert pipe(image).mode == "RGB"
    assert pipe(image, output_type="mask").mode == "L"
    assert difference(pipe(image, output_type="cutout").convert("RGB"), image) == 0


def test_contradictions_are_refused(pipe, tiny_model_dir):
    for options, message in (
        ({"output_type": "rgba"}, "output_type='rgba' is unknown"),
        ({"output_type": "mask", "background": "white"}, "has no background"),
        ({"output_type": "composite"}, "needs a `background`"),
        ({"background": "whitish"}, "whitish"),
        ({"background": torch.zeros(64, 48, 3)}, "permute"),
        ({"background": torch.zeros(3)}, "permute"),
        ({"background": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "divide 8-bit values by 255"),
        ({"threshold": 1.5}, "threshold=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(photo(), **options)
    with pytest.raises(TypeError, match="treshold"):
        load_pipeline(tiny_model_dir, device="cpu", treshold=0.5)


def test_size_of_one_call(pipe):
    image = photo(200, 200)
    small, large = pipe(image, output_type="mask"), pipe(image, output_type="mask", size=(192, 128))
    assert difference(small, large) > 5
    assert difference(pipe(image, output_type="mask"), small) == 0  # the setting did not stay


def test_wide_gamut_survives(pipe, tmp_path):
    """A camera's colour profile goes into the result, or its colours would look dull; that of a CMYK image must not."""
    for space, expected in ((b"RGB ", True), (b"CMYK", False)):
        profile = bytes(16) + space + bytes(108)
        image = photo().convert("RGB" if expected else "CMYK")
        image.info["icc_profile"] = profile
        for options in ({}, {"background": "white"}):
            pipe(image, **options).save(tmp_path / "out.png")
            with Image.open(tmp_path / "out.png") as saved:
                assert (saved.info.get("icc_profile") == profile) == expected
        assert "icc_profile" not in pipe(image, output_type="mask").info


def wide_gamut_profile() -> bytes:
    """A matrix profile with the primaries of Display P3 and gamma 2.2."""
    xyz = {
        b"wtpt": (0.9642, 1.0, 0.8249),
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    tags = {
        name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))
        for name, values in xyz.items()
    }
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    tags |= {b"desc": text, b"cprt": b"text" + bytes(4) + b"none"}
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12x4s40x3i48x",
        132 + 12 * len(tags) + len(data),
        b"lcms",
        0x02100000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        b"acsp",
        63190,
        65536,
        54061,
    )
    return header[:128] + table + data


def test_backgrounds_are_seen_as_asked_for(pipe):
    """On a photograph with a colour profile of its own, and from an image with one."""
    profile = wide_gamut_profile()
    tagged = photo()
    tagged.info["icc_profile"] = profile

    def seen(picture: Image.Image) -> np.ndarray:
        """The corner as sRGB."""
        corner = picture.crop((0, 0, 1, 1))
        return np.asarray(image_loading.convert_colours(corner, picture.info.get("icc_profile"), None))[0, 0].astype(
            int
        )

    orange = pipe(tagged, background="#ff6a00")
    assert orange.info["icc_profile"] == profile and np.abs(seen(orange) - (255, 106, 0)).max() <= 4
    assert np.abs(np.asarray(orange)[0, 0].astype(int) - (255, 106, 0)).max() > 8
    backdrop = Image.new("RGB", (20, 20), (200, 60, 60))
    backdrop.info["icc_profile"] = profile
    assert np.abs(seen(pipe(photo(), background=backdrop)) - seen(backdrop)).max() <= 2
    assert np.abs(seen(backdrop) - (200, 60, 60)).max() > 8
    assert np.abs(np.asarray(pipe(tagged, background=backdrop))[0, 0].astype(int) - (200, 60, 60)).max() <= 3
    alpha = pipe(tagged, output_type="mask")
    rendered = render_picture(tagged, alpha, background=parse_background("#ff6a00"))
    assert difference(rendered, orange) <= 1


# Inputs


def test_every_kind_of_image(pipe, tmp_path):
    image = photo()
    image.save(tmp_path / "photo.png")
    expected = pipe(image)
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image), image.convert("RGBA")):
        assert difference(pipe(source), expected) == 0
    for mode in ("L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "HSV", "YCbCr"):
        converted = Image.fromarray(np.full((60, 90), 999, np.uint16)) if mode == "I;16" else image.convert(mode)
        assert pipe(converted).size == image.size, mode


def test_exif_orientation(pipe, seeing_model_dir, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise for display
    image = photo(90, 60)
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = pipe(upright)
    assert difference(pipe(tmp_path / "turned.png"), expected) == 0
    with Image.open(tmp_path / "turned.png") as opened:
        assert difference(pipe(opened), expected) == 0
    stock = load_pipeline(seeing_model_dir, task="image-segmentation", device="cpu")
    with Image.open(tmp_path / "turned.png") as opened:
        for source in (str(tmp_path / "turned.png"), opened):
            assert stock(source)[0]["mask"].size == (60, 90)


def test_unreadable_input_is_named(pipe, tmp_path):
    photo().save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageLoadError, match="half.jpg"):
        pipe([tmp_path / "whole.jpg", tmp_path / "half.jpg"])
    with pytest.raises(ImageLoadError, match="missing.jpg"):
        pipe(tmp_path / "missing.jpg")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists(pipe, dynamic_pipe, batch_size):
    images = [photo(90, 60), photo(40, 80, seed=1), photo(90, 60, seed=2), photo(1, 1), photo(64, 64, seed=3)]
    for network in (pipe, dynamic_pipe):
        singles = [network(image) for image in images]
        for inputs in (images, tuple(images)):
            results = network(inputs, batch_size=batch_size)
            assert isinstance(results, list)
            for single, result in zip(singles, results, strict=True):
                assert difference(single, result) <= 1
    assert pipe([]) == []


@pytest.mark.parametrize(
    "make", [lambda images: (image for image in images), iter, lambda images: map(np.asarray, images)]
)
def test_streams_are_read_as_results_are_asked_for(pipe, make):
    read = []

    def stream():
        for index in range(20):
            read.append(index)
            yield photo(seed=index)

    results = pipe(make(stream()), batch_size=2, output_type="mask")
    first = next(iter(results))
    assert difference(first, pipe(photo(seed=0), output_type="mask")) <= 1
    assert len(read) <= 6
    assert len(list(pipe(make([photo()] * 3), batch_size=2))) == 3
    assert list(pipe(make([]))) == []


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_streams_lose_one_image_for_one_that_is_broken(pipe, batch_size):
    results = pipe((b"broken" if index == 3 else photo(90 + index) for index in range(8)), batch_size=batch_size)
    widths = []
    for _ in range(8):
        try:
            widths.append(next(results).width)
        except ImageLoadError:
            widths.append(None)
    assert widths == [90, 91, 92, None, 94, 95, 96, 97] and not list(results)
    with pytest.raises(ImageLoadError):
        pipe([photo(), b"broken", photo()], batch_size=batch_size)


def test_streams_need_bounded_memory(pipe):
    references, most_alive = [], 0

    def stream():
        nonlocal most_alive
        for index in range(12):
            image = photo(seed=index)
            references.append(weakref.ref(image))
            most_alive = max(most_alive, sum(reference() is not None for reference in references))
            yield image

    assert sum(1 for _ in pipe(stream(), batch_size=2)) == 12
    assert most_alive <= 4


class Photos(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": photo(seed=index)}


class PhotoStream(IterableDataset):
    def __iter__(self):
        return (photo(seed=index) for index in range(3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_datasets(pipe, num_workers):
    expected = [pipe(photo(seed=index)) for index in range(3)]
    for dataset in (KeyDataset(Photos(), "image"), PhotoStream()):
        results = list(pipe(dataset, batch_size=2, num_workers=num_workers))
        for result, single in zip(results, expected, strict=True):
            assert difference(result, single) <= 1


# Building


@pytest.fixture
def library_log(caplog):
    """Warnings and errors of Transformers, whose loggers do not propagate of themselves."""
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"patch_order": "wg_hg_c"}])
def test_what_an_exported_directory_does_not_have_is_refused(options, tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="is exported: leave out"):
        load_pipeline(str(tmp_path), **options)


def test_files_and_columns_of_datasets(pipe, tmp_path):
    photo().save(tmp_path / "a.png")
    expected = np.asarray(pipe(photo()))
    with open(tmp_path / "a.png", "rb") as opened:
        np.testing.assert_array_equal(np.asarray(pipe(opened)), expected)
    rows = datasets.Dataset.from_dict({"image": [photo()] * 2})
    names = {str(tmp_path / "a.png"): None}.keys()
    for column, length in ((rows["image"], 2), (rows.to_iterable_dataset()["image"], 2), (names, 1)):
        results = list(pipe(column))
        assert len(results) == length
        np.testing.assert_array_equal(np.asarray(results[0]), expected)


def test_what_a_worker_cannot_read_is_one_line(pipe, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageLoadError, match=r"^[^\n]*text.png is no image[^\n]*$"):
        pipe([photo(), str(tmp_path / "text.png")], num_workers=1)


@pytest.mark.parametrize("size", ["256", (256,), 25.6])
def test_sizes_of_other_forms_are_refused(pipe, size):
    with pytest.raises(ValueError, match="must be .height, width. or one side"):
        pipe(photo(), size=size)


def test_registered_task(tiny_model_dir, library_log):
    expected = load_pipeline(tiny_model_dir, device="cpu")(photo())
    by_task = pipeline("background-removal", model=str(tiny_model_dir), device="cpu")
    by_class = pipeline(
        "image-segmentation", model=str(tiny_model_dir), pipeline_class=BackgroundRemovalPipeline, device="cpu"
    )
    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    by_object = pipeline("background-removal", model=model, device="cpu")
    for pipe in (by_task, by_class, by_object):
        assert isinstance(pipe, BackgroundRemovalPipeline)
        assert difference(pipe(photo()), expected) == 0
    assert not library_log.records


def test_stock_pipeline(seeing_model_dir, library_log):
    model = BiRefNetForImageSegmentation.from_pretrained(seeing_model_dir)
    processor = BiRefNetImageProcessor.from_pretrained(seeing_model_dir)
    stocks = [
        pipeline("image-segmentation", model=str(seeing_model_dir), device="cpu"),
        pipeline("image-segmentation", model=model, image_processor=processor, device="cpu"),
        load_pipeline(seeing_model_dir, task="image-segmentation", device="cpu"),
        load_pipeline(model, task="image-segmentation"),
    ]
    assert not library_log.records
    for stock in stocks:
        assert isinstance(stock, ImageSegmentationPipeline)
        [segment] = stock(photo())
        assert segment["label"] == "foreground"
        assert 0.5 < segment["score"] <= 1
        assert (segment["mask"].mode, segment["mask"].size) == ("L", (90, 60))
        assert segment["mask"].getpixel((45, 30)) == 255
        assert segment["mask"].getpixel((0, 0)) == 0


def test_stock_pipeline_reads_what_ours_reads_and_refuses_what_it_would_ignore(seeing_model_dir, tmp_path):
    stock = load_pipeline(seeing_model_dir, task="image-segmentation", device="cpu")
    [expected] = stock(photo())
    deep = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    [of_deep] = stock(photo().convert("L"))
    content = io.BytesIO()
    photo().save(content, "PNG")
    for source, wanted in (
        (np.asarray(photo()), expected),
        (content.getvalue(), expected),
        (tmp_path / "deep.png", of_deep),
    ):
        [segment] = stock(source, threshold=0.5)
        assert segment["score"] == pytest.approx(wanted["score"], abs=1e-6)
        assert difference(segment["mask"], wanted["mask"]) == 0
    with pytest.raises(ValueError, match="no output_type; it takes subtask, threshold"):
        stock(photo(), output_type="mask")
    with pytest.raises(ValueError, match="no background, refine_foreground; .*background-removal"):
        load_pipeline("nano", task="image-segmentation", background="white", refine_foreground=False)


def test_device_map(seeing_model_dir, pipe):
    spread = load_pipeline(seeing_model_dir, device_map={"": "cpu"})
    assert spread.device.type == "cpu" and spread.dtype == torch.float32
    assert difference(spread(photo(), output_type="mask"), pipe(photo(), output_type="mask")) == 0
    for model, device in ((seeing_model_dir, "cpu"), (spread.model, None)):
        with pytest.raises(ValueError, match="`device_map` is for loading, and instead of `device`"):
            load_pipeline(model, device=device, device_map="auto")


def test_both_pipelines_find_the_object(scene, tmp_path):
    """Label, score and masks of a network that knows objects, also after saving and loading."""
    image, inside = scene
    pipe = load_pipeline("nano", device="cpu")
    alpha = np.asarray(pipe(image, output_type="mask"))
    assert alpha[inside].mean() > 180 and alpha[~inside].mean() < 40
    composite = np.asarray(pipe(image, background="white")).astype(int)
    assert composite[~inside].mean() > 230
    assert np.abs(composite - np.asarray(image))[inside].mean() < 25

    [segment] = pipeline("image-segmentation", model=NANO, device="cpu")(image)
    found = np.asarray(segment["mask"]) > 0
    assert segment["label"] == "foreground"
    assert segment["score"] == pytest.approx(alpha[found].mean() / 255, abs=0.01)
    assert segment["score"] > 0.8
    assert found[alpha > 129].all() and not found[alpha < 126].any()

    pipe.save_pretrained(tmp_path)
    again = pipeline("background-removal", model=str(tmp_path), device="cpu")
    assert difference(again(image, output_type="mask"), Image.fromarray(alpha)) <= 1


def test_released_directory(released_dir, tiny_model_dir):
    expected = load_pipeline(tiny_model_dir, device="cpu")(photo(), output_type="mask")
    pipe = load_pipeline(released_dir, device="cpu", size=64)
    assert pipe.dtype == torch.float32  # also for the float16 file
    assert difference(pipe(photo(), output_type="mask"), expected) <= 1
    stock = load_pipeline(released_dir, task="image-segmentation", device="cpu", size=64)
    assert all(segment["label"] == "foreground" for segment in stock(photo()))
    assert load_pipeline(released_dir, device="cpu").image_processor.size == {"height": 1024, "width": 1024}
    other = load_pipeline(released_dir, device="cpu", size=64, patch_order="wg_hg_c")
    assert other.model.config.patch_order == "wg_hg_c"


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_half_precision_on_the_cpu(seeing_model_dir, pipe, dtype):
    half = load_pipeline(seeing_model_dir, device="cpu", dtype=dtype)
    assert half.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
    for output_type, background in (("mask", None), ("cutout", None), ("composite", "white")):
        single = pipe(photo(), output_type=output_type, background=background)
        assert difference(half(photo(), output_type=output_type, background=background), single) <= 4
    stock = load_pipeline(seeing_model_dir, task="image-segmentation", device="cpu", dtype=dtype)
    assert stock(photo())[0]["score"] > 0.5


def test_model_object_from_a_subfolder(tiny_config, tmp_path):
    BiRefNetForImageSegmentation(tiny_config).save_pretrained(tmp_path / "a" / "b")
    BiRefNetImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "a" / "b")
    BiRefNetImageProcessor(size=32).save_pretrained(tmp_path)
    model = BiRefNetForImageSegmentation.from_pretrained(tmp_path, subfolder="a/b")
    assert load_pipeline(model).image_processor.size == {"height": 64, "width": 96}


def test_model_object_from_the_hub(tiny_config, tmp_path):
    """The processor is looked for where the model came from, in the same cache; without it, the size is known by name."""
    model = BiRefNetForImageSegmentation(tiny_config)
    model.name_or_path = "ZhengPeng7/BiRefNet_dynamic"
    pipe = load_pipeline(model, cache_dir=tmp_path, local_files_only=True)
    assert pipe.image_processor.size == {"shortest_edge": 256, "longest_edge": 2304}

    snapshot = tmp_path / "models--ZhengPeng7--BiRefNet_dynamic" / "snapshots" / "abc"
    BiRefNetImageProcessor(size=96).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "tested").write_text("abc")
    pipe = load_pipeline(model, cache_dir=tmp_path, revision="tested", local_files_only=True)
    assert pipe.image_processor.size == {"height": 96, "width": 96}


def test_model_object(tiny_config, tiny_model_dir, copy_of, tmp_path):
    model = BiRefNetForImageSegmentation(tiny_config).train()
    pipe = load_pipeline(model)
    assert not pipe.model.training
    assert not load_pipeline(model.train(), task="image-segmentation").model.training
    assert not pipeline("background-removal", model=model.train(), device="cpu").model.training
    assert pipe.image_processor.size == {"height": 64, "width": 64}  # config.image_size
    assert load_pipeline(model, size=96).image_processor.size == {"height": 96, "width": 96}
    with pytest.raises(ValueError, match="patch_order"):
        load_pipeline(model, patch_order="wg_hg_c")

    # One in several places stays in them.
    spread = BiRefNetForImageSegmentation.from_pretrained(
        tiny_model_dir,
        device_map={"backbone": "cpu", "squeeze_module": "cpu", "criterion": "cpu", "decoder": "disk"},
        offload_folder=tmp_path,
    )
    whole = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    results = [np.asarray(load_pipeline(each)(photo(), output_type="mask")) for each in (spread, whole)]
    np.testing.assert_array_equal(*results)

    # The processor of the directory that a model was loaded from belongs to it, as long as it is there.
    folder = copy_of(tiny_model_dir)
    BiRefNetImageProcessor(size={"height": 32, "width": 96}).save_pretrained(folder)
    model = BiRefNetForImageSegmentation.from_pretrained(folder)
    assert load_pipeline(model).image_processor.size == {"height": 32, "width": 96}
    (folder / "preprocessor_config.json").unlink()
    (folder / "config.json").unlink()
    assert load_pipeline(model).image_processor.size == {"height": 64, "width": 64}


def test_save_and_reload_without_remote_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    pipe_again = pipeline("background-removal", model=str(tmp_path), device="cpu")
    assert difference(pipe_again(photo()), pipe(photo())) == 0


def test_what_cannot_be_loaded_is_explained(tiny_model_dir, tmp_path):
    weights = tiny_model_dir / "model.safetensors"
    for model, options, message in (
        ("lit", {}, "Did you mean 'lite'"),
        (tmp_path / "missing", {}, "no directory, no Hub id"),
        (weights, {}, "convert_checkpoint.py"),
        (tiny_model_dir, {"task": "depth-estimation"}, "image-segmentation"),
        (tiny_model_dir, {"device": "gpu"}, "use .cpu., .cuda."),
        (tiny_model_dir, {"device": 77}, "is not there"),
        (tiny_model_dir, {"dtype": "half-precision"}, "float16"),
        (tiny_model_dir, {"size": 100}, "multiples of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(model, **options)


@pytest.mark.gpu
def test_default_device_and_dtype_of_a_gpu(released_dir):
    pipe = load_pipeline(released_dir, size=64)
    assert pipe.device.type == "cuda"
    assert pipe.dtype == (torch.float16 if "float16" in released_dir.name else torch.float32)
    on_cpu = load_pipeline(released_dir, device="cpu", size=64)
    for options in ({"output_type": "mask"}, {}, {"background": "white"}):
        results = pipe([photo(), photo(40, 80)], batch_size=2, **options)
        for image, result in zip((photo(), photo(40, 80)), results, strict=True):
            assert difference(result, on_cpu(image, **options)) <= 4


def test_own_image_processor(tiny_model_dir, scene):
    image, _ = scene
    processor = BiRefNetImageProcessor.from_pretrained(tiny_model_dir, size={"height": 64, "width": 96})
    pipe = load_pipeline(tiny_model_dir, image_processor=processor)
    assert pipe.image_processor is processor
    expected = load_pipeline(tiny_model_dir, size=(64, 96))(image)
    assert np.array_equal(np.asarray(pipe(image)), np.asarray(expected))
    assert load_pipeline(pipe.model, image_processor=processor).image_processor is processor
    with pytest.raises(ValueError, match="image processor"):
        load_pipeline(tiny_model_dir, image_processor=processor, size=64)


def test_timeout_of_all_calls_holds_for_backgrounds(tiny_model_dir, monkeypatch):
    asked = []

    def parse(background, timeout=None):
        asked.append(timeout)
        return parse_background("white")

    monkeypatch.setattr(pipeline_birefnet, "parse_background", parse)
    slow = load_pipeline(tiny_model_dir, timeout=3)
    slow(photo(), background="https://example.org/a.png")
    slow(photo(), background="https://example.org/a.png", timeout=5)
    assert asked == [3, 5]
