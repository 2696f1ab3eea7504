r"""Measures a model, or a folder of predictions, on images with masks: the metrics of DIS and of matting.

    # A released checkpoint on DIS5K's validation set, on all GPUs that `accelerate config` was told of:
    accelerate launch scripts/evaluate.py --model ZhengPeng7/BiRefNet --data DIS5K --subsets DIS-VD \
        --output-dir scores/dis

    # Predictions of any tool, named like the images, by upstream's convention:
    python scripts/evaluate.py --predictions predictions --data photos --masks masks --convention upstream

    # A minute on a CPU: the first ten images, few metrics, predictions kept:
    python scripts/evaluate.py --model my-birefnet --data photos --masks masks --limit 10 --metrics iou mae \
        --save-predictions predictions

Prints a table that says of each number how its inputs are prepared. Output directory: `metrics.json` (numbers with their
conventions, settings, what was left out), `images.csv` (a row per image; max F and the like are those of the image's own
curve), `worst.png` (image, mask, prediction, error: red where the prediction is too high, cyan where it is too low).

Predictions are scored at the mask's own size and as the 8-bit masks that are saved, so that a model and its saved
predictions have the same numbers. `--convention raw` scores them as they are; `upstream` stretches each to its own minimum
and maximum before most metrics, as BiRefNet's evaluation does. Compare numbers of one convention only.

Several processes (`accelerate launch`, or on CPUs `torchrun --nproc-per-node 2 scripts/evaluate.py --device cpu …`)
share the images; the result is the same. Beside each, --num-workers processes compute metrics while the network runs.

Exit code: 0 if all is measured (with `--on-bad-data skip`, all that can be), 1 if not, 2 for wrong options.
"""

import argparse
import contextlib
import csv
import heapq
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from birefnet_hf import load_pipeline
from birefnet_hf.data import (
    BadSample,
    count_cpus,
    find_predictions,
    load_pairs,
    sample_names,
    seeded_random,
    source_folders,
)
from birefnet_hf.image_loading import ImageLoadError, load_mask, save_image, staged_files
from birefnet_hf.metrics import METRICS, Convention, ImageMetrics, compute_metrics, summarize
from birefnet_hf.pipeline_birefnet import BackgroundRemovalPipeline
from birefnet_hf.synthesis import Compositor
from birefnet_hf.training import check_processes, draw_row, stack_rows


logger = logging.getLogger("birefnet_hf.evaluate")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="evaluate.py",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what is measured")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hub id, alias or directory")
    source.add_argument("--predictions", type=Path, help="folder of masks, named like the images")
    group.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the model's when absent")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps; Accelerate's choice when absent")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float32 on CPUs, else the file's")
    group.add_argument("--batch-size", type=int, default=1)

    group = parser.add_argument_group("data, see birefnet_hf.data.load_pairs")
    group.add_argument("--data", required=True, help="folder, Hub id or saved dataset")
    group.add_argument("--masks", help="folder of masks, where --data is one of images")
    group.add_argument("--subsets", nargs="+", help="subfolders to join, e.g. DIS-VD")
    group.add_argument("--split", default="test", help="of a Hub or saved dataset or imagefolder")
    group.add_argument("--image-column")
    group.add_argument("--mask-column")
    group.add_argument(
        "--cutouts", action="store_true", help="the data are RGBA cut-outs: compose pictures, the same ones each time"
    )
    group.add_argument("--backgrounds", help="folder of photographs for that, beside generated backgrounds")
    group.add_argument(
        "--thin-probability",
        type=float,
        default=0,
        help="chance of each cut-out to be replaced by a drawn thin structure",
    )
    group.add_argument("--seed", type=int, default=0, help="another one composes other pictures of the same cut-outs")
    group.add_argument("--limit", type=int, help="at most so many, the first ones")
    group.add_argument("--check", choices=("fast", "full", "off"), default="fast", help="of all files, at the start")
    group.add_argument(
        "--on-bad-data", choices=("stop", "skip"), default="stop", help="bad files, also those met later"
    )

    group = parser.add_argument_group("measurement")
    group.add_argument("--metrics", nargs="+", default=list(METRICS), help=f"of {', '.join(METRICS)}; all when absent")
    group.add_argument("--convention", choices=get_args(Convention), default="raw", help="see above")
    workers = min(8, count_cpus())
    group.add_argument("--num-workers", type=int, default=workers, help="processes for metrics; 0: a thread")

    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, help="nothing but the table when absent")
    group.add_argument("--save-predictions", type=Path, metavar="FOLDER", help="8-bit PNG, named like the images")
    group.add_argument("--worst", type=int, default=12, help="images on the contact sheet")
    group.add_argument("--worst-by", help="metric that decides; IoU, or the first one, when absent")
    arguments = parser.parse_args(argv)

    if unknown := [name for name in arguments.metrics if name not in METRICS]:
        parser.error(f"there are no metrics {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    if arguments.worst_by is None:
        arguments.worst_by = "iou" if "iou" in arguments.metrics else arguments.metrics[0]
    if arguments.worst_by not in arguments.metrics:
        parser.error(f"--worst-by {arguments.worst_by} is not measured: add it to --metrics")
    if arguments.predictions and arguments.cutouts:
        parser.error("--cutouts composes new pictures, of which there are no --predictions yet")
    if arguments.predictions and (arguments.size or arguments.dtype or arguments.save_predictions):
        parser.error("--size, --dtype and --save-predictions are for a --model")
    for name in ("backgrounds", "thin_probability", "seed"):
        if getattr(arguments, name) and not arguments.cutouts:
            parser.error(f"--{name.replace('_', '-')} needs --cutouts")
    if not 0 <= arguments.thin_probability <= 1:
        parser.error("--thin-probability is a chance, from 0 to 1")
    least = {"batch_size": 1, "limit": 1, "num_workers": 0, "worst": 0, "seed": 0}
    for name, limit in least.items():
        if getattr(arguments, name) is not None and getattr(arguments, name) < limit:
            parser.error(f"--{name.replace('_', '-')} must be at least {limit}")
    return arguments


class NotReallyWritten(Exception):
    """Undoes a trial."""


@dataclass
class Sample:
    """One image with its mask and, as soon as there is one, its prediction."""

    index: int
    name: str
    image: Image.Image
    mask: np.ndarray  # (height, width) uint8
    prediction: np.ndarray | None = None  # the same


@dataclass
class Results:
    """What was measured: by one process, or after `gather` by all."""

    records: list[tuple[int, str, ImageMetrics]] = field(default_factory=list)  # index, name
    worst: list[tuple[float, int, np.ndarray]] = field(default_factory=list)  # badness, minus index, row: a heap
    skipped: list[BadSample] = field(default_factory=list)

    def gather(self, most_rows: int) -> "Results":
        """Joins those of all processes, in the order of the data. To be called by all."""
        records, worst, skipped = (gather_object(part) for part in (self.records, self.worst, self.skipped))
        return Results(
            sorted(records, key=lambda record: record[0]),
            sorted(worst, key=lambda row: row[:2], reverse=True)[:most_rows],
            skipped,
        )


def load_data(
    arguments: argparse.Namespace, pipe: BackgroundRemovalPipeline | None
) -> tuple[datasets.Dataset, list[Path] | None, list[BadSample]]:
    """The pairs, their predictions if these are measured, and what was left out.

    Raises:
        ValueError, OSError: as `load_pairs` and `find_predictions`; or results would be written among the data.
    """
    compositor = None
    if arguments.cutouts:
        size = pipe.image_processor.size
        size = (size.height, size.width) if size.height else (size.longest_edge, size.longest_edge)
        # Drawn structures would stand in for a part of the cut-outs that are to be measured. The light is their own.
        thin = arguments.thin_probability
        compositor = Compositor(size, arguments.backgrounds, thin_probability=thin, hard_light_probability=0)
    skipped: list[BadSample] = []
    pairs = load_pairs(
        arguments.data,
        arguments.masks,
        subsets=arguments.subsets,
        split=arguments.split,
        image_column=arguments.image_column,
        mask_column=arguments.mask_column,
        compositor=compositor,
        check=arguments.check,
        on_bad=arguments.on_bad_data,
        skipped=skipped,
    )
    if arguments.limit:
        pairs = pairs.select(range(min(arguments.limit, len(pairs))))
    folders = source_folders(pairs)
    folders |= {Path(folder).resolve() for folder in (arguments.predictions, arguments.backgrounds) if folder}
    for folder in (arguments.output_dir, arguments.save_predictions):
        if folder is not None and folder.resolve() in folders:
            raise ValueError(f"{folder} holds data, which results could overwrite: choose another folder.")
        if folder is not None:  # whether it can be written to, which should not be found out at the end
            with contextlib.suppress(NotReallyWritten), staged_files(folder):
                raise NotReallyWritten
    predictions = None
    if arguments.predictions:
        pairs, predictions = find_predictions(
            pairs, arguments.predictions, on_bad=arguments.on_bad_data, skipped=skipped
        )
    return pairs, predictions, skipped


def read_sample(
    index: int, names: Sequence[str], pairs: datasets.Dataset, predictions: Sequence[Path] | None, seed: int = 0
) -> Sample:
    """Raises ImageLoadError, with a name, where a file cannot be read."""
    with seeded_random(seed, 0, index):  # for composites; with 0 those of validation in training
        row = pairs[index]
    sample = Sample(index, names[index], row["image"], np.asarray(row["mask"]))
    if predictions is not None:
        try:
            sample.prediction = np.asarray(load_mask(predictions[index], is_prediction=True))
        except ImageLoadError as error:
            raise ImageLoadError(f"{predictions[index]}: {error}") from error
    return sample


def read_batches(
    indices: Sequence[int], batch_size: int, read: Callable[[int], Sample], *, ahead: bool
) -> Iterator[list[tuple[int, Future]]]:
    """Yields indices with futures of their samples, which are done; a thread reads one batch ahead if it may."""
    waiting: deque[list[tuple[int, Future]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for start in range(0, len(indices), batch_size):
            waiting.append([(index, reader.submit(read, index)) for index in indices[start : start + batch_size]])
            if len(waiting) > ahead:
                batch = waiting.popleft()
                wait([future for _, future in batch])
                yield batch
        yield from waiting


def predict(pipe: BackgroundRemovalPipeline, samples: Sequence[Sample]) -> None:
    """Adds the model's predictions.

    Raises:
        RuntimeError: the model fails, above all for want of memory.
    """
    try:
        predictions = pipe([sample.image for sample in samples], batch_size=len(samples), output_type="mask")
    except (RuntimeError, MemoryError) as error:
        names = ", ".join(sample.name for sample in samples)
        raise RuntimeError(f"The model fails on {names} ({error}): try a smaller --batch-size or --size.") from error
    for sample, prediction in zip(samples, predictions, strict=True):
        sample.prediction = np.asarray(prediction)


def make_pool(workers: int) -> Executor:
    """Processes that compute metrics. They are not forked from this one, whose threads they would inherit halfway."""
    if workers == 0:
        return ThreadPoolExecutor(1)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # imports once for all
        context.set_forkserver_preload(["birefnet_hf.pipeline_birefnet", "birefnet_hf.training", "py_sod_metrics"])
    # Interrupted are all processes at once: this one says so, and ends the others.
    return ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def evaluate(
    arguments: argparse.Namespace,
    indices: Sequence[int],
    names: Sequence[str],
    read: Callable[[int], Sample],
    pipe: BackgroundRemovalPipeline | None,
    pool: Executor,
    progress: tqdm,
) -> Results:
    """Measures the images of this process: `indices` of those called `names`.

    Raises:
        ImageLoadError: a file cannot be read, unless such files are to be skipped.
        RuntimeError, OSError: the model fails; a prediction cannot be saved.
    """
    results = Results()
    pending: deque[tuple[Sample, Future]] = deque()

    def finish(most_waiting: int) -> None:
        while len(pending) > most_waiting:
            sample, future = pending.popleft()
            scores = future.result()
            results.records.append((sample.index, sample.name, scores))
            keep_if_worst(results.worst, sample, scores.scores, arguments.worst_by, arguments.worst)
            progress.update()

    # Composites draw from torch's random numbers, as the pipeline does: not at the same time, to be the same each time.
    for batch in read_batches(indices, arguments.batch_size, read, ahead=not arguments.cutouts):
        samples = []
        for index, future in batch:
            try:
                samples.append(future.result())
            except ImageLoadError as error:
                if arguments.on_bad_data == "stop":
                    raise
                results.skipped.append(BadSample(names[index], str(error)))
                logger.warning("Skipped: %s", error)
                progress.update()
        if pipe is not None and samples:
            predict(pipe, samples)
        for sample in samples:
            if arguments.save_predictions:
                target = arguments.save_predictions / f"{Path(sample.name).stem}.png"
                save_image(Image.fromarray(sample.prediction), target)
            future = pool.submit(
                compute_metrics, sample.prediction, sample.mask, arguments.metrics, arguments.convention
            )
            pending.append((sample, future))
            finish(most_waiting=2 * arguments.num_workers)  # each holds its pictures in memory
    finish(most_waiting=0)
    return results


def keep_if_worst(
    worst: list[tuple[float, int, np.ndarray]], sample: Sample, scores: dict[str, float], metric: str, most: int
) -> None:
    """Draws the sample if it is one of the worst so far; of equals the earlier one counts as worse."""
    badness = -scores[metric] if METRICS[metric].higher_is_better else scores[metric]
    if most == 0 or math.isnan(badness) or (len(worst) == most and (badness, -sample.index) < worst[0][:2]):
        return
    title = f"{METRICS[metric].label} {scores[metric]:.4f}: {Path(sample.name).name}"
    error = sample.prediction.astype(np.int16) - sample.mask
    too_high, too_low = (np.clip(part, 0, 255).astype(np.uint8) for part in (error, -error))
    picture = draw_row(
        np.asarray(sample.image), sample.mask, sample.prediction, np.dstack([too_high, too_low, too_low])
    )
    row = np.vstack([draw_text([title], picture.shape[1]), picture])
    (heapq.heappushpop if len(worst) == most else heapq.heappush)(worst, (badness, -sample.index, row))


def draw_text(texts: Sequence[str], width: int) -> np.ndarray:
    """A line, (20, width, 3) uint8, with the texts in columns."""
    line = Image.new("RGB", (width, 20))
    for column, text in enumerate(texts):
        position = (4 + column * width // len(texts), 2)
        ImageDraw.Draw(line).text(position, text, fill="white", font=ImageFont.load_default(12))
    return np.asarray(line)


def describe(arguments: argparse.Namespace, summary: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Each number with what it is, for JSON: NaN becomes None."""
    described = {}
    for name, value in summary.items():
        about = METRICS[name]._asdict()
        about["inputs"] = about[arguments.convention]
        for convention in get_args(Convention):
            del about[convention]
        described[name] = {"value": None if math.isnan(value) else value, **about}
    return described


def print_table(described: dict[str, dict[str, Any]]) -> None:
    for about in described.values():
        value = "none" if about["value"] is None else f"{about['value']:.4f}"
        arrow = "↑" if about["higher_is_better"] else "↓"
        print(
            f"{about['label']:>12} {arrow} {value:>10}   {about['inputs']}; {about['aggregation']} ({about['scale']})"
        )


def write_results(
    arguments: argparse.Namespace, results: Results, described: dict[str, dict[str, Any]], run: dict[str, Any]
) -> None:
    """metrics.json, images.csv and worst.png, all of them or none."""
    with staged_files(arguments.output_dir) as staging:
        content = {
            "metrics": described,
            "images": len(results.records),
            "skipped": [sample._asdict() for sample in results.skipped],
            "settings": {name: value for name, value in vars(arguments).items() if value is not None} | run,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        (staging / "metrics.json").write_text(text, encoding="utf-8")
        with open(staging / "images.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", *described])
            writer.writerows([name, *scores.scores.values()] for _, name, scores in results.records)
        if results.worst:
            rows = [row for _, _, row in results.worst]
            heading = draw_text(["image", "mask", "prediction", "error: red too high, cyan too low"], rows[0].shape[1])
            Image.fromarray(stack_rows([heading, *rows])).save(staging / "worst.png")


def run(arguments: argparse.Namespace, pool: Executor, state: PartialState) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: about settings, data, model, folders.
    """
    pipe = None
    if arguments.model:
        size = {"size": tuple(arguments.size)} if arguments.size else {}
        pipe = load_pipeline(arguments.model, device=arguments.device or state.device, dtype=arguments.dtype, **size)
    pairs, predictions, skipped = load_data(arguments, pipe)
    names = sample_names(pairs, distinct=bool(arguments.predictions or arguments.save_predictions))
    indices = range(state.process_index, len(pairs), state.num_processes)
    started = time.monotonic()
    hidden = None if state.is_main_process else True  # None: shown on a terminal only
    with tqdm(total=len(indices), unit="image", desc="evaluating", disable=hidden) as progress:
        read = partial(read_sample, names=names, pairs=pairs, predictions=predictions, seed=arguments.seed)
        results = evaluate(arguments, indices, names, read, pipe, pool, progress)
    results = results.gather(arguments.worst)
    results.skipped = skipped + results.skipped
    if not state.is_main_process:
        return
    if not results.records:
        raise ValueError("No image could be measured.")
    seconds = time.monotonic() - started
    described = describe(arguments, summarize([scores for _, _, scores in results.records]))
    print_table(described)
    left_out = f", {len(results.skipped)} left out" if results.skipped else ""
    print(f"{len(results.records)} images{left_out}, convention {arguments.convention}, {seconds:.1f} s")
    if arguments.output_dir:
        facts = {"processes": state.num_processes, "seconds": seconds}
        facts |= {"device": str(pipe.device), "dtype": str(pipe.model.config.dtype or pipe.dtype)} if pipe else {}
        write_results(arguments, results, described, facts)
        print(f"Written to {arguments.output_dir}.")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()  # it advises against calling pipelines in a loop
    transformers_logging.disable_progress_bar()
    try:
        state = PartialState(cpu=arguments.device == "cpu")
        check_processes(state.num_processes)
        logging.getLogger("birefnet_hf").setLevel(logging.INFO if state.is_main_process else logging.ERROR)
        with make_pool(arguments.num_workers) as pool:
            pool.submit(os.getpid)  # the processes start while the model loads
            try:
                run(arguments, pool, state)
            finally:
                pool.shutdown(cancel_futures=True)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("Interrupted.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
