"""Training data: pairs of image and mask from any usual source, checked, augmented and batched reproducibly.

    pairs = load_pairs("DIS5K", subsets=["DIS-TR"])
    dataset = TrainingDataset(pairs, image_processor, build_augmentation("default"), seed=0)
    batches = TrainingBatchSampler(len(dataset), batch_size=8, seed=0)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=4)

Exact resume rests on one rule: what happens to a sample depends on (seed, epoch, index of the sample) only, and the size
and members of a batch on (seed, epoch, number of the batch) only. Both travel to the workers inside the index
(`SampleKey`), so neither the number of workers, nor their state, nor the global random numbers matter.
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import datasets
import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

from .augmentation import Augmentation, SoftMask, build_augmentation
from .image_loading import UNREADABLE, ImageLoadError, explain_unreadable, load_image, load_mask, open_upright
from .synthesis import Compositor, list_images


logger = logging.getLogger(__name__)

_IMAGE_FOLDERS = ("im", "image", "images", "img", "imgs")
_MASK_FOLDERS = ("gt", "gts", "mask", "masks", "alpha", "alphas", "label", "labels")
_IMAGE_COLUMNS = ("image", "img", "im", "images", "picture", "photo", "input", "input_image", "pixel_values", "cutout")
_MASK_COLUMNS = (
    "mask",
    "gt",
    "alpha",
    "matte",
    "label",
    "labels",
    "masks",
    "segmentation",
    "segmentation_mask",
    "annotation",
    "ground_truth",
    "conditioning_image",
)
OnBad = Literal["stop", "skip"]
Check = Literal["fast", "full", "off"]

_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# What a complete file of the format has near its end. Where it is missing the file is decoded to find out.
_END_MARKERS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_NAMES_SHOWN = 20


class BadSample(NamedTuple):
    """A sample that cannot be trained on: its name, and what is the matter with it."""

    name: str
    reason: str


class BadDataError(ValueError):
    """Some samples cannot be used. `samples` lists all of them, the message names the first."""

    def __init__(self, samples: Sequence[BadSample]) -> None:
        self.samples = tuple(samples)
        super().__init__(
            _describe(samples)
            + '\nRepair or remove them, or pass on_bad="skip" (--on-bad-data skip) to leave them out.'
        )


def _describe(samples: Sequence[BadSample]) -> str:
    lines = [f"{len(samples)} sample(s) cannot be used:"]
    lines += [f"  {sample.name}: {sample.reason}" for sample in samples[:_NAMES_SHOWN]]
    if len(samples) > _NAMES_SHOWN:
        lines.append(f"  … and {len(samples) - _NAMES_SHOWN} more")
    return "\n".join(lines)


def _contents(value: Mapping[str, Any]) -> str | bytes:
    """What an undecoded `datasets.Image` holds: the path of a local file, or the bytes of any other."""
    if value["bytes"] is not None:
        return value["bytes"]
    if "://" not in value["path"]:
        return value["path"]
    with fsspec.open(value["path"], "rb") as stream:  # streamed from the Hub
        return stream.read()


def _name(value: Mapping[str, Any]) -> str:
    """Identifies a sample independently of where in the data it stands."""
    return value["path"] or f"{zlib.crc32(value['bytes']):08x}"


def count_cpus() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_folders(pairs: datasets.Dataset) -> set[Path]:
    """Absolute paths of the folders that hold the images and masks of a dataset of `load_pairs`."""
    files = (file for row in pairs.with_format(None) for file in row.values() if isinstance(file, dict))
    parents = {Path(file["path"]).parent for file in files if file["bytes"] is None}
    return {parent.resolve() for parent in parents}


@contextlib.contextmanager
def _naming(value: Mapping[str, Any]) -> Iterator[None]:
    """Puts the name of the sample into what is raised while it is read."""
    try:
        yield
    except UNREADABLE as error:
        name, reason = _name(value), explain_unreadable(error)
        reason = reason if name in reason else f"{name}: {reason}"
        raise ImageLoadError(f'{reason} (check="full", or --check full, finds all such files)') from error


def _read_pair(row: Mapping[str, Any]) -> tuple[Image.Image, Image.Image]:
    """An RGB image and its L mask, of one size."""
    image, mask = load_image(_contents(row["image"])), load_mask(_contents(row["mask"]))
    if image.size != mask.size:
        raise ImageLoadError(_different_sizes(image.size, mask.size))
    return image, mask


def _read_cutout(row: Mapping[str, Any]) -> Image.Image:
    """An RGBA image: the file itself, or an image with its mask as alpha."""
    if "mask" not in row:
        return open_upright(_contents(row["image"])).convert("RGBA")
    image, mask = _read_pair(row)
    image.putalpha(mask)
    return image


def _different_sizes(image: tuple[int, int], mask: tuple[int, int]) -> str:
    return f"the image is {image[0]}×{image[1]} (width×height) but the mask is {mask[0]}×{mask[1]}"


def _inspect(source: str | bytes, full: bool) -> tuple[int, int]:
    """(width, height) of an image as displayed, from its header; raises one of `UNREADABLE`.

    Without `full` the pixels are decoded only where the end of the file is not what it should be: that finds every
    truncated JPEG and PNG, but no flipped bits.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        image = Image.open(stream)
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:
            orientation = 1  # asking for it would decode the image
        else:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        marker = _END_MARKERS.get(image.format)
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 64))
        complete = marker is not None and marker in stream.read()
    if full or not complete:
        load_image(source)
    return (height, width) if orientation >= 5 else (width, height)


def _problem(row: Mapping[str, Any], full: bool) -> str | None:
    """Why a sample cannot be trained on; None where it can."""
    for column, value in row.items():
        if value is None:
            return f"there is no {column}"
    if "mask" not in row:
        try:
            darkest, brightest = _read_cutout(row).getchannel("A").getextrema()
        except UNREADABLE as error:
            return f"the image cannot be read ({explain_unreadable(error)})"
        if brightest == 0:
            return "the cut-out is fully transparent"
        return "the image has no transparency, so it is not a cut-out" if darkest == 255 else None
    try:
        size = _inspect(_contents(row["image"]), full)
    except UNREADABLE as error:
        return f"the image cannot be read ({explain_unreadable(error)})"
    try:
        mask = load_mask(_contents(row["mask"]))
    except UNREADABLE as error:
        return f"the mask cannot be read ({explain_unreadable(error)})"
    if mask.size != size:
        return _different_sizes(size, mask.size)
    brightest = mask.getextrema()[1]
    if 0 < brightest < 128:
        return (
            f"nothing in the mask is foreground: its largest value is {brightest} of 255 (class numbers, or colours?)"
        )
    return None if brightest else "the mask is empty"


def _check(rows: datasets.Dataset, full: bool) -> tuple[list[int], list[BadSample]]:
    """Indices of the good samples, and the bad ones."""

    def check(index: int) -> tuple[str, str | None]:
        row = rows[index]
        file = row["image"] or {"path": None, "bytes": b""}
        is_own_file = file["bytes"] is None
        name = file["path"] if is_own_file else f"row {index}" + (f" ({file['path']})" if file["path"] else "")
        return name, _problem(row, full)

    good, bad = [], []
    with ThreadPoolExecutor(min(8, count_cpus())) as pool:
        results = pool.map(check, range(len(rows)))
        for index, (name, reason) in enumerate(
            tqdm(results, total=len(rows), desc="checking samples", unit="sample", disable=None)
        ):
            if reason is None:
                good.append(index)
            else:
                bad.append(BadSample(name, reason))
    return good, bad


def _settle(bad: Sequence[BadSample], on_bad: OnBad, skipped: list[BadSample] | None = None) -> None:
    if bad and on_bad == "stop":
        raise BadDataError(bad)
    if bad:
        logger.warning("Skipped: %s", _describe(bad))
    if skipped is not None:
        skipped += bad


def _refuse_unknown(name: str, value: str, known: Any) -> None:
    """ValueError for what is none of the words of a `Literal`."""
    if value not in get_args(known):
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, get_args(known)))}.")


def load_pairs(
    source: str | Path | datasets.Dataset | datasets.IterableDataset | Mapping[str, Any],
    masks: str | Path | None = None,
    *,
    subsets: Sequence[str] | None = None,
    split: str = "train",
    image_column: str | None = None,
    mask_column: str | None = None,
    compositor: Compositor | None = None,
    streaming: bool = False,
    check: Check = "fast",
    on_bad: OnBad = "stop",
    skipped: list[BadSample] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Makes a dataset of images and masks from what the user has.

    Args:
        source: one of
            - a folder of images, with `masks` a folder of masks: files of the same stem are a pair, subfolders are
              left out;
            - a folder with `im` and `gt` (or images/masks and the like) in it, or one with several such folders in it,
              chosen and joined by `subsets`, as DIS5K is laid out;
            - a folder with `metadata.csv`, `.jsonl` or `.parquet` ("imagefolder": `file_name`, `mask_file_name`), which
              goes before what the names of its folders say, unless `subsets` are chosen;
            - a folder written by `datasets`' save_to_disk, or one with its data files;
            - an id on the Hugging Face Hub;
            - a dataset, or a mapping of splits, of the `datasets` library;
            - with `compositor`, also a folder of RGBA cut-outs, or a column of such.
        masks: folder of masks, where `source` is a folder of images.
        subsets: names of the folders to join. May be left out where there is only one.
        split: split of a Hub dataset or imagefolder.
        image_column, mask_column: names of the columns; guessed from their names when left out.
        compositor: makes a new picture at each access, from the cut-outs (RGBA images, or images with their masks as
            alpha) over its backgrounds. Its randomness is torch's global one, which `TrainingDataset` seeds.
        streaming: return a stream. One from the Hub is checked as it is read instead of at the start.
        check: "fast" reads the headers and ends of images and decodes masks; "full" decodes images, too, which also
            finds damage in the middle of a file; "off" believes that all is well.
        on_bad: "stop" raises `BadDataError` that lists all bad samples, "skip" leaves them out and logs a warning. Bad
            are: image or mask missing, unreadable or of another size than its partner; two files of one stem; a mask
            without foreground.
        skipped: what is left out is added to this list. Streams, which find out later, add nothing.

    Returns:
        A dataset whose rows are {"image": RGB PIL image, "mask": L PIL image, 255 foreground, "name": str}.

    Raises:
        BadDataError: bad samples, with `on_bad="stop"`.
        FileNotFoundError: a folder does not exist.
        ValueError: there is no usable sample, or it is not clear which folders or columns are meant; an unknown `check` or
            `on_bad`.
    """
    _refuse_unknown("check", check, Check)
    _refuse_unknown("on_bad", on_bad, OnBad)
    if compositor is not None and streaming:
        raise ValueError("Composites need cut-outs in random order: they cannot be streamed, pass streaming=False.")
    rows, bad = _find(source, masks, subsets, split, streaming, compositor is not None)
    rows = _choose_columns(rows, image_column, mask_column, needs_mask=compositor is None)
    if isinstance(rows, datasets.IterableDataset):
        return _decoded_stream(rows, on_bad, check)
    bad_photos = []
    if check != "off":
        good, unreadable = _check(rows, full=check == "full")
        bad = bad + unreadable
        if unreadable:
            rows = rows.select(good)
        if compositor is not None:
            bad_photos = _check_photos(compositor.photos)
            bad = bad + bad_photos
    _settle(bad, on_bad, skipped)
    if len(rows) == 0:
        raise ValueError(f"No usable sample in {source if isinstance(source, str | Path) else 'the dataset'}.")
    if bad_photos:
        names = {sample.name for sample in bad_photos}
        good_photos = [photo for photo in compositor.photos if str(photo) not in names]
        if not good_photos:
            raise ValueError(f"No usable background in {compositor.backgrounds}.")
        compositor = dataclasses.replace(compositor, backgrounds=good_photos)
    if compositor is not None:
        numbered = rows.add_column("index", list(range(len(rows))))
        return numbered.with_transform(_Compose(rows, compositor))
    if streaming:
        return _decoded_stream(rows.to_iterable_dataset(num_shards=min(len(rows), 64)), on_bad, "off")
    return rows.with_transform(_decode_batch)


def _find(
    source: Any, masks: str | Path | None, subsets: Sequence[str] | None, split: str, streaming: bool, cutouts: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[BadSample]]:
    """The source as a dataset with columns of any names, and the files that could not be paired."""
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return source, []
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"There is no split {split!r}; choose with split=… (--split) from {', '.join(source)}.")
        return source[split], []
    root = Path(source).expanduser()
    if masks is not None:
        if subsets:
            raise ValueError(
                "Subsets are folders within one source: with masks in a folder of their own, name that of images."
            )
        return _pair_folders([(root, Path(masks).expanduser())])
    if not root.is_dir():
        if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
            raise FileNotFoundError(f"There is no folder {source}.")
        if subsets:
            raise ValueError(f"Subsets are folders within a folder here; {source} is on the Hub: choose with split.")
        try:
            return _load_dataset(source, split, streaming=streaming), []
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{source} is neither a folder here nor a dataset on the Hub: {error}") from error
    is_listed = any((root / name).exists() for name in _METADATA_FILES)
    if not is_listed and _image_and_mask_folder(root) is None:  # else in the folders of the splits
        is_listed = any(any(root.glob(f"*/{name}")) for name in _METADATA_FILES)
    if is_listed and subsets is None:  # what it says goes before what the names of folders make one think
        return _load_dataset("imagefolder", split, data_dir=str(root)), []
    folders = _subset_folders(root, subsets)
    if folders:
        return _pair_folders(folders)
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        return _find(datasets.load_from_disk(str(root)), None, None, split, streaming, cutouts)
    files = _own_images(root)
    if files and cutouts:
        return _rows({"image": [str(path) for path in files]}), []
    if files:
        raise ValueError(
            f"{root} has images but it is not clear where their masks are: pass the folder of masks as `masks` "
            "(--masks), or a `compositor` (--cutouts) if the images are cut-outs with transparency."
        )
    if not any(root.iterdir()):
        raise ValueError(f"The folder {root} is empty.")
    return _load_dataset(str(root), split), []


def _load_dataset(name: str, split: str, **options) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(name, split=split, **options)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(f"{options.get('data_dir', name)}: {error} Choose with split=… (--split).") from error


def _subset_folders(root: Path, subsets: Sequence[str] | None) -> list[tuple[Path, Path]]:
    """(images, masks) folders of the chosen subsets of a root; none where it is not laid out so."""
    if isinstance(subsets, str):
        raise ValueError(f"subsets must be a list of names, got the string {subsets!r}: pass [{subsets!r}].")
    if subsets is None:
        if pair := _image_and_mask_folder(root):
            return [pair]
        found = {
            folder.name: pair
            for folder in sorted(root.iterdir())
            if (pair := _image_and_mask_folder(folder)) is not None
        }
        if len(found) > 1:  # joining them unasked would train on test sets
            raise ValueError(
                f"{root} has several subsets: choose with subsets=[...] (--subsets) from {', '.join(found)}."
            )
        return list(found.values())
    pairs = []
    for subset in subsets:
        pair = _image_and_mask_folder(root / subset)
        if pair is None:
            raise FileNotFoundError(f"The subset {root / subset} has no folders of images (im) and masks (gt) in it.")
        pairs.append(pair)
    return pairs


def _image_and_mask_folder(folder: Path) -> tuple[Path, Path] | None:
    """The subfolders of images and of masks; None where there are none of such names."""
    if not folder.is_dir():
        return None
    children = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    images = next((children[name] for name in _IMAGE_FOLDERS if name in children), None)
    masks = next((children[name] for name in _MASK_FOLDERS if name in children), None)
    return None if images is None or masks is None else (images, masks)


def _pair_folders(folders: Sequence[tuple[Path, Path]]) -> tuple[datasets.Dataset, list[BadSample]]:
    """Pairs files by stem."""
    pairs, bad = [], []
    for image_folder, mask_folder in folders:
        images, masks = _by_stem(image_folder), _by_stem(mask_folder)
        if not images.keys() & masks.keys():
            examples = (next(iter(images.values()))[0].name, next(iter(masks.values()))[0].name)
            raise ValueError(
                f"No image in {image_folder} has a mask of the same name (without suffix) in {mask_folder}: "
                f"for example {examples[0]} and {examples[1]}."
            )
        for stem in sorted(images.keys() | masks.keys()):
            if stem not in masks:
                bad.append(BadSample(str(images[stem][0]), f"there is no mask of this name in {mask_folder}"))
            elif stem not in images:
                bad.append(BadSample(str(masks[stem][0]), f"there is no image of this name in {image_folder}"))
            elif len(images[stem]) > 1 or len(masks[stem]) > 1:
                names = ", ".join(
                    path.name for files in (images[stem], masks[stem]) if len(files) > 1 for path in files
                )
                bad.append(BadSample(str(images[stem][0]), f"several files of one name: {names}"))
            else:
                pairs.append((str(images[stem][0]), str(masks[stem][0])))
    return _rows({"image": [image for image, _ in pairs], "mask": [mask for _, mask in pairs]}), bad


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files: dict[str, list[Path]] = {}
    for path in _own_images(folder):
        files.setdefault(_stem(path), []).append(path)
    if not files:
        raise ValueError(f"There are no images in {folder}.")
    return files


def _own_images(folder: Path) -> list[Path]:
    """The images directly in a folder, with a warning where it has subfolders of images as well."""
    files = list_images(folder)
    nested = [child.name for child in sorted(folder.iterdir()) if files and child.is_dir() and list_images(child)]
    if nested:
        logger.warning("%s: the images in its subfolders are left out (%s).", folder, ", ".join(nested))
    return files


def _stem(path: str | Path) -> str:
    """The file's name without suffix, one for all encodings of a letter with an accent: systems differ in them."""
    return unicodedata.normalize("NFC", Path(path).stem)


def _rows(paths: dict[str, list[str]]) -> datasets.Dataset:
    features = datasets.Features({column: datasets.Image(decode=False) for column in paths})
    return datasets.Dataset.from_dict(paths, features=features)


def find_predictions(
    pairs: datasets.Dataset,
    folder: str | Path,
    *,
    on_bad: OnBad = "stop",
    skipped: list[BadSample] | None = None,
) -> tuple[datasets.Dataset, list[Path]]:
    """Finds the predicted mask of each sample: the file that is called like the image, by stem.

    Args:
        pairs: from `load_pairs`, without compositor.
        folder: of predictions, directly in it.
        on_bad: "stop" raises `BadDataError` that lists all samples whose prediction is missing, unreadable or of another
            size than the mask, "skip" leaves them out and logs a warning.
        skipped: what is left out is added to this list.

    Returns:
        The samples that have a prediction, and the files, one for each.

    Raises:
        BadDataError: with `on_bad="stop"`.
        FileNotFoundError: the folder does not exist.
        ValueError: there is nothing in it, no sample is left, or several samples have one name; an unknown `on_bad`.
    """
    _refuse_unknown("on_bad", on_bad, OnBad)
    files = _by_stem(Path(folder).expanduser())
    good, bad, paths = [], [], []
    names = sample_names(pairs)
    for index, row in enumerate(tqdm(pairs.with_format(None), desc="checking predictions", disable=None)):
        found = files.get(_stem(names[index]), [])
        reason = _prediction_problem(found, row["mask"])
        if reason is None:
            good.append(index)
            paths.append(found[0])
        else:
            bad.append(
                BadSample(names[index], reason if found else f"there is no prediction of this name in {folder}")
            )
    _settle(bad, on_bad, skipped)
    if not good:
        raise ValueError(f"No sample has a usable prediction in {folder}.")
    return pairs.select(good), paths


def _prediction_problem(found: Sequence[Path], mask_file: Mapping[str, Any]) -> str | None:
    """Why the files of one name are no prediction for a mask; None where they are."""
    if len(found) != 1:
        return f"several predictions of one name: {', '.join(path.name for path in found)}"
    try:
        size = _inspect(str(found[0]), full=False)
    except UNREADABLE as error:
        return f"the prediction {found[0]} cannot be read ({explain_unreadable(error)})"
    try:
        expected = _inspect(_contents(mask_file), full=False)
    except UNREADABLE as error:  # with check="off" it is looked at here for the first time
        return f"the mask cannot be read ({explain_unreadable(error)})"
    if size != expected:
        return f"the prediction {found[0].name} is {size[0]}×{size[1]} (width×height) but the mask {expected[0]}×{expected[1]}"
    return None


def sample_names(pairs: datasets.Dataset, distinct: bool = True) -> list[str]:
    """What the samples of `load_pairs` are called, without decoding them.

    Args:
        pairs: of `load_pairs`.
        distinct: whether each stem of a file name may occur once only, as files are named by it.

    Raises:
        ValueError: several files, in different folders, have one stem, and names are to be distinct.
    """
    names: list[str] = []
    stems: dict[str, str] = {}
    embedded: set[str] = set()  # of images that lie in the dataset itself
    for index, row in enumerate(pairs.with_format(None).select_columns("image")):
        name = _name(row["image"])
        if not distinct:
            is_own_file = row["image"]["path"] and row["image"]["bytes"] is None
            names.append(name if is_own_file else f"row {index} ({name})")
            continue
        other = stems.setdefault(Path(name).stem, name)
        if other != name:
            raise ValueError(f"{other} and {name} have one name: take one folder (subset) at a time.")
        if row["image"]["path"] and row["image"]["bytes"] is not None:
            if name in embedded:
                raise ValueError(f"Several images in the dataset are called {name}: give them names of their own.")
            embedded.add(name)
        names.append(name)
    return names


def _choose_columns(
    rows: datasets.Dataset | datasets.IterableDataset,
    image_column: str | None,
    mask_column: str | None,
    needs_mask: bool,
) -> datasets.Dataset | datasets.IterableDataset:
    """Keeps the columns of images and masks, undecoded, as "image" and "mask"."""
    rows = rows.with_format(None)
    if rows.features is None:
        raise ValueError(
            "The stream does not say what its columns hold: pass features= to the map(…) or the like that made it."
        )
    columns = rows.column_names or list(next(iter(rows)))
    for name in (image_column, mask_column):
        if name is not None and name not in columns:
            raise ValueError(f"There is no column {name!r}; there are: {', '.join(columns)}.")
    # A column "label" that holds a class number is no mask.
    likely = [name for name in columns if isinstance(rows.features[name], datasets.Image)]
    image = image_column or _guess(_IMAGE_COLUMNS, likely, mask_column)
    mask = mask_column or _guess(_MASK_COLUMNS, likely, image)
    if len(likely) == 2:
        image = image or next((name for name in likely if mask is not None and name != mask), None)
        mask = mask or next((name for name in likely if image is not None and name != image), None)
    if image is None or (mask is None and needs_mask):
        raise ValueError(
            f"It is not clear which columns hold the image (guess: {image}) and the mask (guess: {mask}): pass "
            f"image_column and mask_column (--image-column, --mask-column). The columns are: {', '.join(columns)}. "
            "In a metadata file, paths of masks are in a column mask_file_name."
        )
    chosen = {image: "image"} if mask is None else {image: "image", mask: "mask"}
    rows = rows.select_columns(list(chosen)).rename_columns({old: new for old, new in chosen.items() if old != new})
    for name in chosen.values():
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _guess(known: Sequence[str], columns: Sequence[str], taken: str | None) -> str | None:
    by_name = {column.lower(): column for column in columns if column != taken}
    return next((by_name[name] for name in known if name in by_name), None)


def _check_photos(photos: Sequence[Path]) -> list[BadSample]:
    bad = []
    for photo in photos:
        try:
            _inspect(str(photo), full=False)
        except UNREADABLE as error:
            bad.append(BadSample(str(photo), f"the background cannot be read ({explain_unreadable(error)})"))
    return bad


def _decode_batch(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Transform of a dataset of pairs: undecoded columns to pictures."""
    decoded: dict[str, list[Any]] = {"image": [], "mask": [], "name": []}
    for image_file, mask_file in zip(batch["image"], batch["mask"], strict=True):
        with _naming(image_file):
            image, mask = _read_pair({"image": image_file, "mask": mask_file})
        decoded["image"].append(image)
        decoded["mask"].append(mask)
        decoded["name"].append(_name(image_file))
    return decoded


class _Cutouts(Sequence):
    """The rows of a dataset as RGBA cut-outs."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        row = self.rows[int(index)]
        with _naming(row["image"]):
            cutout = _read_cutout(row)
            if not cutout.getchannel("A").getbbox():
                raise ImageLoadError("the cut-out is fully transparent")
            return cutout


class _Compose:
    """Transform of a dataset of cut-outs: each row to a new picture in which its cut-out is the main object."""

    def __init__(self, rows: datasets.Dataset, compositor: Compositor) -> None:
        self.cutouts = _Cutouts(rows)
        self.compositor = compositor

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        composed: dict[str, list[Any]] = {"image": [], "mask": [], "name": []}
        for index, image_file in zip(batch["index"], batch["image"], strict=True):
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            image, mask = self.compositor(rng, self.cutouts, index)
            composed["image"].append(image)
            composed["mask"].append(mask)
            composed["name"].append(_name(image_file))
        return composed


def _decoded_stream(rows: datasets.IterableDataset, on_bad: OnBad, check: Check) -> datasets.IterableDataset:
    """Decodes as it reads; what is bad stops the stream or is left out of it."""

    def decode(row: Mapping[str, Any]) -> dict[str, Any]:
        name = "" if row["image"] is None else _name(row["image"])
        try:
            if row["image"] is None or row["mask"] is None:
                raise ImageLoadError("there is no image or no mask")
            image, mask = _read_pair(row)
            if check != "off" and not mask.getbbox():
                raise ImageLoadError("the mask is empty")
        except UNREADABLE as error:
            _settle([BadSample(name, explain_unreadable(error))], on_bad)
            image = mask = None
        return {"image": image, "mask": mask, "name": name}

    return rows.map(decode).filter(lambda row: row["image"] is not None)


class SampleKey(NamedTuple):
    """An index that says all there is to know about a sample: which, in which epoch, and at what (height, width)."""

    index: int
    epoch: int = 0
    size: tuple[int, int] | None = None


@contextlib.contextmanager
def seeded_random(*numbers: int) -> Iterator[None]:
    """Seeds torch's CPU random numbers from non-negative integers, and puts the former state back afterwards."""
    state = torch.random.get_rng_state()
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    torch.random.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def _prepare(
    row: Mapping[str, Any], image_processor: Any, augmentation: Augmentation, size: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """One row of pictures to the network's input: crop, resize, augment, normalise."""
    image = tv_tensors.Image(functional.pil_to_tensor(row["image"]))
    mask = SoftMask(functional.pil_to_tensor(row["mask"]))
    image, mask = augmentation.before_resize(image, mask)
    sized = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
    resized = image_processor(
        images=image.as_subclass(torch.Tensor),
        segmentation_maps=mask.as_subclass(torch.Tensor),
        do_normalize=False,
        return_tensors="pt",
        **sized,
    )
    image, mask = augmentation.after_resize(
        tv_tensors.Image(resized["pixel_values"][0]), SoftMask(resized["labels"][0])
    )
    normalised = image_processor(
        images=image.as_subclass(torch.Tensor), do_resize=False, do_rescale=False, return_tensors="pt"
    )
    return {"pixel_values": normalised["pixel_values"][0], "labels": mask.as_subclass(torch.Tensor)}


class TrainingDataset(torch.utils.data.Dataset):
    """Pairs as the network's inputs: `dataset[key]` is {"pixel_values": 3×H×W, "labels": 1×H×W}, both float32.

    The key is a `SampleKey`, or an integer for the processor's size and the epoch of `set_epoch`, which the loaders
    of Accelerate, and so Transformers' `Trainer`, call in runs of one process. A sample is a pure function of (seed,
    epoch, index), also where the pictures are composed or a user's own transform draws from torch's global random
    numbers.

    Args:
        pairs: map-style dataset of {"image", "mask"} PIL images, from `load_pairs` or elsewhere.
        image_processor: resizes and normalises; the torchvision backend is the faster one.
        augmentation: from `build_augmentation`; none when absent.
        seed: of all chance, not negative.
    """

    def __init__(
        self, pairs: datasets.Dataset, image_processor: Any, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.pairs = pairs
        self.image_processor = image_processor
        self.augmentation = augmentation or build_augmentation("none")
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of what is asked for by an integer; workers take it up when they start."""
        self.epoch = epoch

    def __getitem__(self, key: SampleKey | int) -> dict[str, torch.Tensor]:
        key = key if isinstance(key, SampleKey) else SampleKey(key, self.epoch)
        with seeded_random(self.seed, key.epoch, key.index):
            return _prepare(self.pairs[key.index], self.image_processor, self.augmentation, key.size)


class TrainingBatchSampler:
    """Yields batches of `SampleKey` for a `DataLoader(batch_sampler=...)`: shuffled, complete batches only.

    Order and sizes depend on (seed, epoch, number of the batch) alone. With several processes the batches are meant to
    be dealt out in turn, as Accelerate does; the processes then get batches of one size in each step, and no batch is
    left over. Accelerate's `skip_first_batches` resumes within an epoch without loading what is skipped.

    The epoch is set by `set_epoch`: call it on the prepared loader with Accelerate (which counts by itself and would
    override the sampler), on the sampler without.

    Args:
        length: number of samples.
        batch_size: samples in a batch, on one process.
        size: (height, width) of all batches; the processor's when absent.
        size_range: ((least height, most height), (least width, most width)) instead: each batch draws both sides, and
            rounds them down to multiples of 32. Upstream's dynamic checkpoint was trained with 256..2304 for both.
        num_processes: number of processes that share the batches, times that of the batches that make a step.
        shuffle: False keeps the order of the dataset.
        seed: of all chance, not negative.

    Raises:
        ValueError: not one batch for each process, or a range below 32 or upside down.
    """

    drop_last = True  # read by Accelerate

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        size_range: tuple[tuple[int, int], tuple[int, int]] | None = None,
        num_processes: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if size is not None and size_range is not None:
            raise ValueError("Pass either size or size_range.")
        if size_range is not None and any(not 32 <= low <= high for low, high in size_range):
            raise ValueError(
                f"size_range must be ((least, most), (least, most)) with sides of 32 or more: {size_range}."
            )
        if length < batch_size * num_processes:
            raise ValueError(
                f"{length} samples do not make one batch of {batch_size} for each process and each accumulated batch "
                f"({num_processes} in all): use smaller batches, accumulate fewer, or bring more data."
            )
        self.length = length
        self.batch_size = batch_size
        self.size = size
        self.size_range = size_range
        self.num_processes = num_processes
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> "TrainingBatchSampler":
        """Itself: where Accelerate's loaders look for `set_epoch`, behind the wrapper that deals out the batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.num_processes) * self.num_processes

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for batch in range(len(self)):
            size = self._size(batch // self.num_processes)
            members = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            yield [SampleKey(index, self.epoch, size) for index in members]

    def _size(self, step: int) -> tuple[int, int] | None:
        if self.size_range is None:
            return self.size
        rng = np.random.default_rng((self.seed, self.epoch, step))
        height, width = (int(rng.integers(low, high + 1)) // 32 * 32 for low, high in self.size_range)
        return height, width


class TrainingStream(torch.utils.data.IterableDataset):
    """A stream of pairs as the network's inputs, {"pixel_values": 3×H×W, "labels": 1×H×W}, for a `DataLoader`.

    Guaranteed: how a sample is augmented depends on (seed, epoch, its name) alone, whatever the workers. Its order and
    which worker reads it are the stream's: with the same `shuffle(seed, buffer_size)` of the stream, the same epoch and
    the same number of workers and processes the order is the same, so a run resumes exactly by reading again and
    dropping the batches that were done (Accelerate's `skip_first_batches`), which takes the time of reading them.
    Not offered: a size drawn for each batch, since workers do not know of batches. Use a map-style dataset for it.

    Args:
        stream: iterable dataset of {"image", "mask", "name"}, from `load_pairs(..., streaming=True)`.
        image_processor: resizes and normalises.
        augmentation: from `build_augmentation`; none when absent.
        size: (height, width); the processor's when absent.
        seed: of the augmentation, not negative.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_processor: Any,
        augmentation: Augmentation | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.stream = stream
        self.image_processor = image_processor
        self.augmentation = augmentation or build_augmentation("none")
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration is of; workers take it up when they start."""
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in self.stream:
            with seeded_random(self.seed, self.epoch, zlib.crc32(row["name"].encode())):
                sample = _prepare(row, self.image_processor, self.augmentation, self.size)
            yield sample  # outside, or the consumer would run on this sample's random numbers
