import io
import logging
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from birefnet_hf import data
from birefnet_hf.augmentation import build_augmentation
from birefnet_hf.data import (
    BadDataError,
    SampleKey,
    TrainingBatchSampler,
    TrainingDataset,
    TrainingStream,
    load_pairs,
)
from birefnet_hf.image_loading import ImageLoadError, load_mask
from birefnet_hf.image_processing_birefnet import BiRefNetImageProcessor
from birefnet_hf.synthesis import Compositor


WIDTH, HEIGHT = 40, 30


def photo(seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask(left: int = 10, level: int = 255) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[8:22, left : left + 15] = level
    return Image.fromarray(pixels)


def cutout(seed: int) -> Image.Image:
    image = photo(seed)
    image.putalpha(mask(left=seed % 20))
    return image


def write_pairs(root, names, images="im", masks="gt"):
    for folder in (root / images, root / masks):
        folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        photo(number).save(root / images / f"{name}.jpg")
        mask(number % 20).save(root / masks / f"{name}.png")
    return root / images, root / masks


@pytest.fixture
def processor():
    return BiRefNetImageProcessor(size={"height": 32, "width": 64})


@pytest.fixture
def pairs(tmp_path):
    write_pairs(tmp_path, [f"sample{number:02}" for number in range(12)])
    return load_pairs(tmp_path)


class TestMask:
    @pytest.mark.parametrize(
        ("stored", "expected"),
        [
            (mask(), 255),
            (mask(level=90), 90),
            (mask().convert("1"), 255),
            (mask(level=1), 255),  # classes 0 and 1
            (mask().convert("RGB"), 255),
            (mask().convert("RGBA"), 255),  # opaque alpha says nothing
            (cutout(10), 255),
            (Image.fromarray(np.asarray(mask(level=90)).astype(np.uint16) * 257), 90),
            (Image.fromarray(np.asarray(mask(level=90)).astype(np.uint16)), 90),
            (mask(level=3).convert("P"), 3),  # a grey palette: its colours
        ],
    )
    def test_forms(self, stored, expected):
        contents = io.BytesIO()
        stored.save(contents, "PNG")
        read = load_mask(contents.getvalue())
        assert read.mode == "L"
        assert read.size == (WIDTH, HEIGHT)
        assert read.getpixel((15, 15)) == expected
        assert read.getpixel((0, 0)) == 0

    def test_colour_palette_is_a_class_map(self):
        classes = Image.fromarray(np.asarray(mask(level=2)), mode="P")
        classes.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        assert load_mask(classes).getextrema() == (0, 255)

    def test_index_beyond_the_palette(self):
        """As in class maps of 21 colours whose index 255 is the edge."""
        indices = np.zeros((4, 4), np.uint8)
        indices[1:3] = [0, 1, 1, 255]
        image = Image.frombytes("P", (4, 4), indices.tobytes())
        image.putpalette([0, 0, 0, 128, 0, 0])
        assert (np.asarray(load_mask(image)) == np.where(indices, 255, 0)).all()

    def test_float_values(self):
        read = load_mask(Image.fromarray(np.asarray(mask(level=1)).astype(np.float32) / 2))
        assert read.getextrema() == (0, 128)

    def test_faint_predictions_stay_faint(self):
        for faint in (np.full((4, 4), 1, np.uint8), np.full((4, 4), 200, np.uint16)):
            assert load_mask(Image.fromarray(faint), is_prediction=True).getextrema() == (1, 1)
            assert load_mask(Image.fromarray(faint)).getextrema()[1] >= 200

    def test_other_values_are_refused(self):
        with pytest.raises(ImageLoadError, match="expected 0 to 1"):
            load_mask(Image.fromarray(np.full((4, 4), 1e6, dtype=np.float32)))


def test_unknown_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="check='none' is unknown; use one of 'fast', 'full', 'off'"):
        load_pairs(tmp_path, check="none")
    with pytest.raises(ValueError, match="on_bad='raise' is unknown; use one of 'stop', 'skip'"):
        load_pairs(tmp_path, on_bad="raise")


class TestFolders:
    def test_pairs_by_stem(self, tmp_path):
        images, masks = write_pairs(tmp_path, ["a", "b"])
        photo().save(images / "C.PNG")
        mask().save(masks / "C.PNG")
        (images / ".DS_Store").write_bytes(b"x")
        (images / "._a.jpg").write_bytes(b"x")
        (masks / "notes.txt").write_text("hello", encoding="utf-8")
        rows = load_pairs(images, masks)
        assert [row["name"].rsplit("/", 1)[-1] for row in rows] == ["C.PNG", "a.jpg", "b.jpg"]
        assert all(row["image"].mode == "RGB" and row["mask"].mode == "L" for row in rows)
        assert rows[1]["mask"].tobytes() == mask(0).tobytes()

    def test_names_of_other_systems(self, tmp_path):
        """Accents as one character or as two, and the formats that cameras and scientists write."""
        images, masks = tmp_path / "im", tmp_path / "gt"
        images.mkdir(), masks.mkdir()
        for image_name, mask_name in (("e\u0301.jpg", "\u00e9.png"), ("b.jfif", "b.pgm"), ("c.avif", "c.png")):
            photo().save(images / image_name, "JPEG" if image_name.endswith("jfif") else None)
            mask().save(masks / mask_name)
        assert len(load_pairs(tmp_path)) == 3

    def test_image_modes(self, tmp_path):
        images, masks = write_pairs(tmp_path, [])
        for mode in ("L", "RGBA", "P", "LA"):
            photo(mode=mode).save(images / f"{mode}.png")
            mask().save(masks / f"{mode}.png")
        assert {row["image"].mode for row in load_pairs(images, masks)} == {"RGB"}

    def test_subsets_are_joined(self, tmp_path):
        write_pairs(tmp_path / "DIS-TR", ["a", "b"])
        write_pairs(tmp_path / "DIS-VD", ["a"])
        assert len(load_pairs(tmp_path, subsets=["DIS-TR", "DIS-VD"])) == 3
        assert len(load_pairs(tmp_path, subsets=["DIS-VD"])) == 1
        assert len(load_pairs(tmp_path / "DIS-TR")) == 2
        with pytest.raises(ValueError, match="choose with subsets.*DIS-TR, DIS-VD"):
            load_pairs(tmp_path)
        with pytest.raises(FileNotFoundError, match="DIS-TE1"):
            load_pairs(tmp_path, subsets=["DIS-TE1"])

    def test_all_problems_are_listed(self, tmp_path, caplog):
        images, masks = write_pairs(
            tmp_path, ["good", "nomask", "noimage", "twice", "size", "empty", "classes", "text", "cut", "cutmask"]
        )
        (masks / "nomask.png").unlink()
        (images / "noimage.jpg").unlink()
        photo().save(images / "twice.png")
        mask().crop((0, 0, 30, 30)).save(masks / "size.png")
        mask(level=0).save(masks / "empty.png")
        mask(level=2).save(masks / "classes.png")
        (images / "text.jpg").write_bytes(b"this is no image")
        for path in (images / "cut.jpg", masks / "cutmask.png"):
            path.write_bytes(path.read_bytes()[:-40])
        for folder in (images, masks):
            (folder / "link.png").symlink_to(tmp_path / "nowhere.png")
        expected = {
            "nomask.jpg": "no mask",
            "noimage.png": "no image",
            "twice.jpg": "several files",
            "size.jpg": "40×30.*30×30",
            "empty.jpg": "empty",
            "classes.jpg": "nothing in the mask is foreground: its largest value is 2",
            "text.jpg": "image cannot be read",
            "cut.jpg": "image cannot be read",
            "cutmask.jpg": "mask cannot be read",
            "link.png": "image cannot be read",
        }
        with pytest.raises(BadDataError) as raised:
            load_pairs(tmp_path)
        reasons = {sample.name.rsplit("/", 1)[-1]: sample.reason for sample in raised.value.samples}
        assert reasons.keys() == expected.keys()
        for name, reason in expected.items():
            assert name in str(raised.value)
            assert re.search(reason, reasons[name])

        with caplog.at_level(logging.WARNING):
            rows = load_pairs(tmp_path, on_bad="skip")
        assert [row["name"].rsplit("/", 1)[-1] for row in rows] == ["good.jpg"]
        assert all(name in caplog.text for name in expected)

    def test_long_lists_are_cut(self, tmp_path):
        _, masks = write_pairs(tmp_path, [f"{number:02}" for number in range(31)])
        for number in range(1, 31):
            (masks / f"{number:02}.png").unlink()
        with pytest.raises(BadDataError, match="30 sample.*\n(.*\n)+.*10 more") as raised:
            load_pairs(tmp_path)
        assert len(raised.value.samples) == 30

    def test_images_are_decoded_only_where_in_doubt(self, tmp_path, monkeypatch):
        images, masks = write_pairs(tmp_path, ["jpeg"])
        photo().save(images / "bitmap.bmp")
        mask().save(masks / "bitmap.png")
        decoded = []
        monkeypatch.setattr(data, "load_image", lambda source: decoded.append(source) or photo())
        load_pairs(tmp_path)
        assert [path.rsplit("/", 1)[-1] for path in decoded] == ["bitmap.bmp"]
        load_pairs(tmp_path, check="full")
        assert len(decoded) == 3

    def test_damage_inside_needs_the_full_check(self, tmp_path):
        images, masks = write_pairs(tmp_path, ["a"])
        photo().save(images / "b.png")
        mask().save(masks / "b.png")
        contents = bytearray((images / "b.png").read_bytes())
        contents[len(contents) // 2] ^= 0xFF
        (images / "b.png").write_bytes(contents)
        assert len(load_pairs(tmp_path)) == 2
        with pytest.raises(BadDataError, match="b.png"):
            load_pairs(tmp_path, check="full")

    def test_orientation(self, tmp_path):
        images, masks = write_pairs(tmp_path, ["a"])
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying, shown standing
        photo().save(images / "a.jpg", exif=exif)
        with pytest.raises(BadDataError, match="30×40"):
            load_pairs(tmp_path)
        mask().transpose(Image.Transpose.ROTATE_90).save(masks / "a.png")
        assert load_pairs(tmp_path)[0]["image"].size == (HEIGHT, WIDTH)

    def test_the_hub_has_no_subsets(self):
        with pytest.raises(ValueError, match="someone/dis is on the Hub: choose with split"):
            load_pairs("someone/dis", subsets=["DIS-TR"])

    def test_nothing_there(self, tmp_path):
        images, masks = write_pairs(tmp_path, [])
        with pytest.raises(ValueError, match="no images in"):
            load_pairs(tmp_path)
        with pytest.raises(FileNotFoundError, match="no folder"):
            load_pairs(tmp_path / "missing", masks)
        photo().save(images / "a.jpg")
        with pytest.raises(ValueError, match="where their masks are"):
            load_pairs(images)
        mask().save(masks / "a_mask.png")
        with pytest.raises(ValueError, match=r"a\.jpg and a_mask\.png"):
            load_pairs(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty"):
            load_pairs(tmp_path / "empty")

    def test_imagefolder_with_metadata(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        root = tmp_path / "root"
        write_pairs(root, ["a", "b"], images="x", masks="y")
        lines = ["file_name,mask_file_name", "x/a.jpg,y/a.png", "x/b.jpg,y/b.png"]
        (root / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
        rows = load_pairs(root)
        assert len(rows) == 2
        assert rows[1]["mask"].tobytes() == mask(1).tobytes()
        (root / "y" / "b.png").unlink()
        with pytest.raises(BadDataError, match=r"b\.jpg"):
            load_pairs(root)

    def test_goes_before_the_names_of_folders(self, tmp_path):
        """Of the files in images and masks it chooses some, and says which belong together."""
        root, splits = tmp_path / "root", tmp_path / "splits"
        for folder in (root, splits / "train", splits / "test"):
            write_pairs(folder, ["a", "b"], images="images", masks="masks")
        lines = "file_name,mask_file_name\nimages/a.jpg,masks/b.png\n"
        (root / "metadata.csv").write_text(lines, encoding="utf-8")
        [row] = load_pairs(root)
        assert Path(row["name"]).name == "a.jpg" and row["mask"].tobytes() == mask(1).tobytes()
        for split in ("train", "test"):
            (splits / split / "metadata.csv").write_text(lines, encoding="utf-8")
        assert [len(load_pairs(splits, split=split)) for split in ("train", "test")] == [1, 1]
        assert len(load_pairs(splits, subsets=["train"])) == 2

    def test_images_in_subfolders_are_named(self, tmp_path, caplog):
        write_pairs(tmp_path, ["a", "b"])
        write_pairs(tmp_path / "im", ["c"], images="more", masks="masks")
        assert len(load_pairs(tmp_path)) == 2
        assert "left out (masks, more)" in caplog.text


class TestTables:
    def table(self, image="image", mask_name="mask"):
        columns = {image: [photo(0), photo(1)], mask_name: [mask(0), mask(1)], "label": [0, 1]}
        features = {image: datasets.Image(), mask_name: datasets.Image(), "label": datasets.Value("int64")}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    @pytest.mark.parametrize("names", [("image", "mask"), ("Image", "gt"), ("im", "alpha"), ("before", "matte")])
    def test_columns_are_guessed(self, names):
        row = load_pairs(self.table(*names))[1]
        assert row["image"].tobytes() == photo(1).tobytes()
        assert row["mask"].tobytes() == mask(1).tobytes()

    def test_columns_are_named(self):
        table = self.table("before", "after")
        with pytest.raises(ValueError, match="not clear which columns.*before, after, label"):
            load_pairs(table)
        row = load_pairs(table, image_column="before", mask_column="after")[0]
        assert row["mask"].tobytes() == mask(0).tobytes()
        swapped = load_pairs(self.table("mask", "image"), image_column="mask", mask_column="image")[0]
        assert swapped["image"].tobytes() == photo(0).tobytes()
        with pytest.raises(ValueError, match="no column 'x'"):
            load_pairs(table, image_column="x")

    def test_splits_and_disk(self, tmp_path):
        table = self.table()
        splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
        assert len(load_pairs(splits)) == 2
        splits.save_to_disk(str(tmp_path / "saved"))
        assert len(load_pairs(tmp_path / "saved", split="test")) == 1
        with pytest.raises(ValueError, match="no split 'validation'.*train, test"):
            load_pairs(splits, split="validation")
        (tmp_path / "alone").mkdir()
        table.to_parquet(tmp_path / "alone" / "train.parquet")
        with pytest.raises(ValueError, match=r'alone: Unknown split "test".*Choose with split=… \(--split\)'):
            load_pairs(tmp_path / "alone", split="test")

    def test_bad_rows_have_numbers(self):
        table = datasets.Dataset.from_dict({"image": [photo(0), photo(1)], "mask": [mask(0), mask(0, level=0)]})
        with pytest.raises(BadDataError, match="row 1: the mask is empty"):
            load_pairs(table)
        assert len(load_pairs(table, on_bad="skip")) == 1
        assert len(load_pairs(table, check="off")) == 2

    def test_nulls(self):
        features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
        columns = {"image": [photo(0), None, photo(2)], "mask": [mask(0), mask(0), None]}
        table = datasets.Dataset.from_dict(columns, features=features)
        with pytest.raises(BadDataError, match="row 1: there is no image\n.*row 2: there is no mask"):
            load_pairs(table)
        assert len(list(load_pairs(table.to_iterable_dataset(), on_bad="skip"))) == 1

    def test_reading_errors_name_the_file(self, pairs, tmp_path):
        (tmp_path / "gt" / "sample03.png").write_bytes(b"damaged since the check")
        with pytest.raises(ImageLoadError, match=r"sample03\.jpg.*no image"):
            pairs[3]

    def test_streams_say_what_their_columns_hold(self):
        rows = datasets.IterableDataset.from_generator(lambda: iter([{"image": mask(), "mask": mask()}]))
        with pytest.raises(ValueError, match="pass features="):
            load_pairs(rows)

    def test_streams(self, pairs, tmp_path):
        streamed = list(load_pairs(tmp_path, streaming=True))
        assert [row["name"] for row in streamed] == [row["name"] for row in pairs]
        assert streamed[3]["mask"].tobytes() == pairs[3]["mask"].tobytes()

    def test_streams_are_checked_on_the_way(self, caplog):
        table = datasets.Dataset.from_dict({"image": [photo(0), photo(1)], "mask": [mask(0), mask(0, level=0)]})
        stream = load_pairs(table.to_iterable_dataset(), on_bad="skip")
        assert len(list(stream)) == 1
        assert "the mask is empty" in caplog.text
        with pytest.raises(BadDataError, match="the mask is empty"):
            list(load_pairs(table.to_iterable_dataset()))


class TestCutouts:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "cutouts"
        folder.mkdir()
        for number in range(4):
            cutout(number).save(folder / f"{number}.png")
        return folder

    def test_composites(self, folder, processor):
        composites = load_pairs(folder, compositor=Compositor(size=(48, 64)))
        assert len(composites) == 4
        row = composites[0]
        assert row["image"].size == row["mask"].size == (64, 48)
        assert row["mask"].getbbox() is not None
        assert composites[0]["image"].tobytes() != row["image"].tobytes()  # a new one each time

        dataset = TrainingDataset(composites, processor, seed=1)
        again = TrainingDataset(composites.select([2, 0]), processor, seed=1)
        assert torch.equal(dataset[0]["pixel_values"], dataset[0]["pixel_values"])
        assert not torch.equal(dataset[0]["pixel_values"], dataset[SampleKey(0, epoch=1)]["pixel_values"])
        assert len(again) == 2

    def test_pairs_serve_as_cutouts(self, pairs, tmp_path):
        composites = load_pairs(tmp_path, compositor=Compositor(size=(32, 32)))
        assert len(composites) == len(pairs)
        assert composites[0]["image"].size == (32, 32)

    def test_bad_ones(self, folder, tmp_path):
        photo().save(folder / "opaque.png")
        backgrounds = tmp_path / "backgrounds"
        backgrounds.mkdir()
        photo().save(backgrounds / "good.png")
        (backgrounds / "bad.png").write_bytes(b"nothing")
        compositor = Compositor(size=(32, 32), backgrounds=backgrounds)
        with pytest.raises(BadDataError, match=r"opaque\.png.*no transparency.*\n.*bad\.png.*background"):
            load_pairs(folder, compositor=compositor)
        composites = load_pairs(folder, compositor=compositor, on_bad="skip")
        assert len(composites) == 4
        for row in composites:
            assert row["image"].size == (32, 32)

        (backgrounds / "good.png").unlink()
        with pytest.raises(BadDataError, match=r"bad\.png.*background"):
            load_pairs(folder, compositor=compositor)
        compositor = Compositor(size=(32, 32), backgrounds=backgrounds)
        with pytest.raises(ValueError, match=f"No usable background in {backgrounds}"):
            load_pairs(folder, compositor=compositor, on_bad="skip")

    def test_transparent_one_is_named_without_the_check(self, folder):
        Image.new("RGBA", (40, 30)).save(folder / "0.png")
        composites = load_pairs(folder, compositor=Compositor(size=(32, 32), thin_probability=0), check="off")
        with pytest.raises(ImageLoadError, match=r"0\.png: the cut-out is fully transparent"):
            composites[0]

    def test_cannot_be_streamed(self, folder):
        with pytest.raises(ValueError, match="cannot be streamed"):
            load_pairs(folder, compositor=Compositor(), streaming=True)


class TestTrainingDataset:
    @pytest.mark.parametrize("preset", ["default", "upstream", "upstream-background", "none"])
    def test_presets(self, preset, pairs, processor):
        dataset = TrainingDataset(pairs, processor, build_augmentation(preset))
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample["pixel_values"].shape == (3, 32, 64)
            assert sample["labels"].shape == (1, 32, 64)
            assert type(sample["labels"]) is type(sample["pixel_values"]) is torch.Tensor
            assert 0 <= sample["labels"].min() <= sample["labels"].max() <= 1
            assert sample["labels"].any()
            assert sample["pixel_values"].abs().max() < 3

    def test_preprocessing_is_the_processors(self, pairs, processor):
        sample = TrainingDataset(pairs, processor)[3]
        expected = processor(images=pairs[3]["image"], segmentation_maps=pairs[3]["mask"], return_tensors="pt")
        torch.testing.assert_close(sample["pixel_values"], expected["pixel_values"][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(sample["labels"], expected["labels"][0])
        sized = TrainingDataset(pairs, processor)[SampleKey(3, size=(96, 32))]
        assert sized["pixel_values"].shape == (3, 96, 32)

    def test_pure_function_of_seed_epoch_index(self, pairs, processor):
        def values(seed, epoch, index):
            dataset = TrainingDataset(pairs, processor, build_augmentation("upstream"), seed=seed)
            return dataset[SampleKey(index, epoch)]["pixel_values"]

        torch.manual_seed(0)
        first = values(1, 2, 3)
        before = torch.random.get_rng_state()
        values(1, 2, 4)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(values(1, 2, 3), first)
        for other in ((0, 2, 3), (1, 3, 3)):
            assert not torch.equal(values(*other), first)

    def test_workers_do_not_matter(self, pairs, processor):
        dataset = TrainingDataset(pairs, processor, build_augmentation("default"))
        batches = TrainingBatchSampler(len(dataset), 4, size_range=((32, 96), (32, 96)))
        one, two = (list(DataLoader(dataset, batch_sampler=batches, num_workers=number)) for number in (0, 2))
        assert len(one) == len(two) == 3
        for left, right in zip(one, two, strict=True):
            assert torch.equal(left["pixel_values"], right["pixel_values"])
            assert torch.equal(left["labels"], right["labels"])

    def test_stream(self, pairs, tmp_path, processor):
        stream = TrainingStream(
            load_pairs(tmp_path, streaming=True), processor, build_augmentation("default"), size=(32, 32)
        )
        first = [sample["pixel_values"] for sample in stream]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # datasets on how shards are shared
            in_workers = [batch["pixel_values"] for batch in DataLoader(stream, batch_size=None, num_workers=2)]
        assert sorted(image.sum().item() for image in first) == sorted(image.sum().item() for image in in_workers)
        iterator = iter(stream)
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        next(iterator)
        assert torch.equal(torch.random.get_rng_state(), state)
        stream.set_epoch(1)
        assert not torch.equal(first[0], next(iter(stream))["pixel_values"])


class TestTrainingBatchSampler:
    def test_each_sample_once(self):
        sampler = TrainingBatchSampler(10, 3, seed=5)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3
        indices = [key.index for batch in batches for key in batch]
        assert len(set(indices)) == 9
        assert indices != sorted(indices)
        assert list(sampler) == batches
        sampler.set_epoch(1)
        assert [key.index for batch in sampler for key in batch] != indices
        assert {key.epoch for batch in sampler for key in batch} == {1}
        in_order = TrainingBatchSampler(10, 3, shuffle=False)
        assert [key.index for batch in in_order for key in batch] == list(range(9))

    def test_sizes(self):
        sampler = TrainingBatchSampler(400, 2, size_range=((256, 2304), (64, 96)))
        sizes = [{key.size for key in batch} for batch in sampler]
        assert all(len(size) == 1 for size in sizes)
        heights, widths = zip(*(size.pop() for size in sizes), strict=True)
        assert all(height % 32 == 0 for height in heights)
        assert min(heights) < 400 and max(heights) > 2200 and max(heights) <= 2304
        assert set(widths) == {64, 96}

    def test_processes_share_sizes(self):
        sampler = TrainingBatchSampler(60, 4, size_range=((32, 640), (32, 640)), num_processes=2)
        assert len(sampler) == 14
        loader = DataLoader(list(range(60)), batch_sampler=sampler, collate_fn=list)
        shares = [
            list(prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False).batch_sampler)
            for rank in (0, 1)
        ]
        assert len(shares[0]) == len(shares[1]) == 7
        assert [batch[0].size for batch in shares[0]] == [batch[0].size for batch in shares[1]]
        indices = [key.index for share in shares for batch in share for key in batch]
        assert len(set(indices)) == 56

    @pytest.mark.parametrize("processes", [1, 2])
    def test_accelerate_sets_the_epoch_and_resumes(self, pairs, processor, processes):
        def loader():
            dataset = TrainingDataset(pairs, processor, build_augmentation("upstream"), seed=3)
            sampler = TrainingBatchSampler(12, 2, size_range=((32, 96), (32, 96)), num_processes=processes, seed=3)
            plain = DataLoader(dataset, batch_sampler=sampler)
            return prepare_data_loader(plain, num_processes=processes, process_index=0, put_on_device=False)

        whole = loader()
        epochs = []
        for epoch in range(3):
            whole.set_epoch(epoch)
            epochs.append(list(whole))
        assert not torch.equal(epochs[0][0]["labels"], epochs[1][0]["labels"])

        resumed = loader()
        resumed.set_epoch(2)
        rest = list(skip_first_batches(resumed, 2))
        assert len(rest) == len(epochs[2]) - 2
        for left, right in zip(rest, epochs[2][2:], strict=True):
            assert torch.equal(left["pixel_values"], right["pixel_values"])

    def test_refusals(self):
        with pytest.raises(ValueError, match="do not make one batch"):
            TrainingBatchSampler(7, 4, num_processes=2)
        with pytest.raises(ValueError, match="32 or more"):
            TrainingBatchSampler(8, 4, size_range=((16, 64), (64, 64)))
        with pytest.raises(ValueError, match="either"):
            TrainingBatchSampler(8, 4, size=(64, 64), size_range=((64, 64), (64, 64)))
