"""The command `birefnet`: removes the background of image files, folders, globs and URLs.

Arguments are checked before a model is loaded, and the files of a run are read and written while the network computes.
"""

import glob
import itertools
import os
import re
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer
from tqdm import tqdm

from .checkpoints_birefnet import CHECKPOINTS
from .image_loading import IMAGE_SUFFIXES, is_url, load_image, save_image


if TYPE_CHECKING:
    from PIL import Image

# Standard input as a source, standard output as a target.
STREAM = "-"
# Files being decoded and encoded at once; both release the interpreter's lock.
READERS = 2
WRITERS = 2


EXAMPLES = """
Examples:

birefnet photo.jpg -o cutout.png

birefnet photos/ -o cutouts --model lite --skip-existing

birefnet "photos/**/*.jpg" -o masks --mask-only --format webp

birefnet photo.jpg -o on_white.png --background white

birefnet - -o - < photo.jpg > cutout.png
"""


app = typer.Typer(add_completion=False)


class OutputFormat(StrEnum):
    """File formats of the results, both lossless and with transparency."""

    PNG = "png"
    WEBP = "webp"


class Precision(StrEnum):
    """Types of the weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Input:
    """An image to process.

    Attributes:
        source: Path, URL or `STREAM`.
        name: File name below the output folder, with the sub-folders to mirror; its suffix is the source's.
    """

    source: str
    name: Path

    @property
    def stem(self) -> Path:
        """The name without the suffix of an image; other suffixes are part of the name."""
        return self.name.with_suffix("") if self.name.suffix.lower() in IMAGE_SUFFIXES else self.name


@dataclass(frozen=True)
class Job:
    """An image to process and the file to write."""

    source: str
    target: Path


def find_inputs(arguments: Iterable[str], output: Path) -> tuple[list[Input], list[str]]:
    """Lists the images that the arguments stand for, each once.

    Args:
        arguments: Files, folders (searched recursively; hidden files are left out), globs, URLs and `STREAM`.
        output: Where results go. Folders and globs that contain it are not searched there.

    Returns:
        The images, those of folders and globs sorted; and what is wrong with arguments that stand for none.

    Raises:
        typer.BadParameter: a folder is both input and output, so that the next run would take results for images.
    """
    arguments = list(arguments)
    several_folders = sum(os.path.isdir(argument) for argument in arguments) > 1
    inputs: dict[str, Input] = {}
    problems = []
    for argument in arguments:
        if is_url(argument):
            found = [Input(argument, _name_of_url(argument))]
        elif argument == STREAM:
            found = [Input(argument, Path("stdin"))]
        elif os.path.isdir(argument):
            root = Path(argument)
            if output.resolve() == root.resolve():
                raise typer.BadParameter(f"{output} is an input folder; choose another one for the results.")
            # With several folders their own names keep their images apart.
            prefix = Path(root.resolve().name if several_folders else "")
            files = [Path(parent, name) for parent, _, names in _walk(root) for name in names]
            found = [Input(str(file), prefix / file.relative_to(root)) for file in _images(files, root, output)]
            if not found:
                problems.append(f"{argument}: no images in this folder")
        elif os.path.lexists(argument):
            found = [Input(argument, Path(Path(argument).name))]
        elif glob.has_magic(argument):
            fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(argument).parts[:-1])
            root = Path(*fixed)  # what is below it is mirrored
            files = [Path(match) for match in glob.glob(argument, recursive=True)]
            found = [Input(str(file), file.relative_to(root)) for file in _images(files, root, output)]
            if not found:
                problems.append(f"{argument}: no image matches")
        else:
            found = []
            problems.append(f"{argument}: no such file or folder")
        for item in found:
            inputs.setdefault(item.source if is_url(item.source) else os.path.realpath(item.source), item)
    return list(inputs.values()), problems


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, without hidden folders and files."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, folders, [name for name in names if not name.startswith(".")]


def _images(files: list[Path], root: Path, output: Path) -> list[Path]:
    """The image files among those found below `root`, sorted; without results of an earlier run."""
    resolved_root, excluded = root.resolve(), output.resolve()
    if excluded == resolved_root or not excluded.is_relative_to(resolved_root):
        excluded = None
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if excluded is not None:
        images = [file for file in images if not (resolved_root / file.relative_to(root)).is_relative_to(excluded)]
    return sorted(images)


def _name_of_url(url: str) -> Path:
    """A safe file name: the last part of the URL's path."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    name = re.sub(r"[^\w.-]+", "_", name).strip(".").encode()[-100:]  # file systems count bytes
    return Path(name.decode(errors="ignore") or "image")


def assign_targets(
    inputs: list[Input], output: Path, output_format: OutputFormat | None, background: str | None = None
) -> list[Job]:
    """Decides which file each image's result is written to.

    `output` is a file if it ends in .png or .webp, else a folder in which sub-folders are mirrored. Images that differ
    by their suffix alone keep it: a.jpg and a.png become a.jpg.png and a.png.png.

    Raises:
        typer.BadParameter: a file for several images, a format that is not offered or contradicts `output_format`,
            two images with one name, or a result that would replace an image, also that of the background.
    """
    suffix = output.suffix.lower()
    if str(output) == STREAM:
        if len(inputs) > 1:
            raise typer.BadParameter(f"Standard output takes one image, there are {len(inputs)}; give a folder.")
        jobs = [Job(inputs[0].source, output)]
    elif suffix in IMAGE_SUFFIXES and not output.is_dir():
        if suffix.removeprefix(".") not in list(OutputFormat):
            raise typer.BadParameter(f"{output}: results are written as .png or .webp, or into a folder.")
        if output_format not in (None, suffix.removeprefix(".")):
            raise typer.BadParameter(f"{output} contradicts --format {output_format}; leave out one of them.")
        if len(inputs) > 1:
            raise typer.BadParameter(f"{output} is one file, but there are {len(inputs)} images; give a folder.")
        jobs = [Job(inputs[0].source, output)]
    else:
        suffix = f".{output_format or OutputFormat.PNG}"
        # Compared without case, since file systems may not tell it apart.
        stems, shorter = [item.stem for item in inputs], []
        while stems != shorter:  # a suffix that is kept may make the name of another image
            shorter = stems
            counts = Counter(str(stem).casefold() for stem in stems)
            stems = [
                stem if counts[str(stem).casefold()] == 1 else item.name
                for stem, item in zip(stems, inputs, strict=True)
            ]
        jobs = [Job(item.source, output / f"{stem}{suffix}") for item, stem in zip(inputs, stems, strict=True)]

    sources = {}
    for job in jobs:
        other = sources.setdefault(str(job.target).casefold(), job.source)
        if other != job.source:
            raise typer.BadParameter(
                f"{other} and {job.source} would both be written to {job.target}. Give the folders that hold them, "
                "which keeps sub-folders apart, or run birefnet for each."
            )
    identities = {_identity(job.source): job.source for job in jobs if not is_url(job.source)}
    for job in jobs:
        if job.target.exists() and _identity(job.target) in identities:
            raise typer.BadParameter(f"{job.target} is an input; results never replace inputs, choose another folder.")
        if background is not None and job.target.exists() and _identity(job.target) == _identity(background):
            raise typer.BadParameter(
                f"{job.target} is the background; results never replace it, choose another folder."
            )
    return jobs


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What is equal for all names of one file; None for a dangling link."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def prepare_folder(folder: Path) -> None:
    """Creates the folder and checks that files can be written there; typer.BadParameter where not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"Cannot write to {folder}: {error.strerror or error}.") from error


def read_image(source: str) -> "Image.Image":
    """The image of a path, a URL or standard input."""
    return load_image(sys.stdin.buffer.read() if source == STREAM else source)


def write_image(image: "Image.Image", target: Path, stream_format: OutputFormat = OutputFormat.PNG) -> None:
    """Writes an image to a file, which appears whole or not at all, or to standard output."""
    if str(target) != STREAM:
        return save_image(image, target)
    with tempfile.TemporaryDirectory() as folder:
        save_image(image, file := Path(folder) / f"image.{stream_format}")
        sys.stdout.buffer.write(file.read_bytes())
        sys.stdout.buffer.flush()


def read_ahead(
    jobs: Iterable[Job], read: Callable[[str], Any], executor: Executor, depth: int
) -> Iterator[tuple[Job, Future]]:
    """Yields each job with the future of its image, of which at most `depth` are read before they are asked for."""
    waiting: deque[tuple[Job, Future]] = deque()
    for job in jobs:
        waiting.append((job, executor.submit(read, job.source)))
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@dataclass
class Outcome:
    """Counts what became of the jobs, shows it on a progress bar and reports failures."""

    progress: tqdm
    written: int = 0
    failed: int = 0

    def succeed(self) -> None:
        self.written += 1
        self.progress.update()

    def fail(self, source: str, error: BaseException | str) -> None:
        self.failed += 1
        self.progress.update()
        message = str(error) or type(error).__name__
        tqdm.write(f"FAILED {message if message.startswith(source) else f'{source}: {message}'}", file=sys.stderr)


def process(
    jobs: Iterable[Job],
    read: Callable[[str], "Image.Image"],
    remove_background: Callable[[list["Image.Image"]], list["Image.Image"]],
    write: Callable[["Image.Image", Path], None],
    batch_size: int,
    outcome: Outcome,
) -> None:
    """Reads, computes and writes all jobs; files are read and written while the network computes.

    A few images are in memory at a time, however many jobs there are. What fails is reported and the rest goes on.
    """
    writing: deque[tuple[Job, Future]] = deque()

    def finish(most_waiting: int) -> None:
        while len(writing) > most_waiting:
            job, future = writing.popleft()
            try:
                future.result()
                outcome.succeed()
            except (OSError, ValueError) as error:  # WebP, for example, ends at 16383 pixels
                outcome.fail(job.source, error)

    def compute(batch: list[tuple[Job, "Image.Image"]]) -> None:
        results = None
        try:
            results = remove_background([image for _, image in batch])
        except (RuntimeError, ValueError, MemoryError) as error:  # out of memory, above all
            if len(batch) == 1:
                outcome.fail(batch[0][0].source, error)
        # Not tried again above: what is raised there keeps the memory of the failed attempt.
        if results is None:
            for item in batch if len(batch) > 1 else ():
                compute([item])
            return
        for (job, _), result in zip(batch, results, strict=True):
            writing.append((job, writers.submit(write, result, job.target)))
            finish(most_waiting=2 * WRITERS)

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
        batch: list[tuple[Job, Image.Image]] = []
        for job, future in read_ahead(jobs, read, readers, depth=batch_size + READERS):
            try:
                batch.append((job, future.result()))
            except (OSError, ValueError) as error:  # ImageLoadError is one
                outcome.fail(job.source, error)
            if len(batch) == batch_size:
                compute(batch)
                batch = []
        if batch:
            compute(batch)
        finish(most_waiting=0)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from "1024" or, as sizes are usually written, "WIDTHxHEIGHT"."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"--size {text}: give one side, e.g. 1024, or WIDTHxHEIGHT, e.g. 2560x1440.")
    width = int(match[1])
    return int(match[2] or width), width


def _list_aliases() -> str:
    names = ["nano (ships with the package, small)"]
    names += [
        f"{item.alias}{'' if item.licence == 'MIT' else f' ({item.licence})'}" for item in CHECKPOINTS if item.alias
    ]
    return ", ".join(names)


@app.command(epilog=EXAMPLES)
def remove_backgrounds(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Image files, folders (searched recursively), globs, URLs and - for standard input."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder for the results; for a single image a .png or .webp file, or - for standard output.",
        ),
    ],
    mask_only: Annotated[
        bool,
        typer.Option(
            "--mask-only", help="Write the soft mask, grey, instead of the cut-out.", rich_help_panel="Result"
        ),
    ] = False,
    background: Annotated[
        str | None,
        typer.Option(
            metavar="COLOUR|IMAGE|blur",
            help="Put the foreground on a colour (white, '#00ff00'), an image (file or URL), scaled to cover, or 'blur': the "
            "image's own background out of focus.",
            rich_help_panel="Result",
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Take the old background's colour out of soft edges. Off: original pixels, faster.",
            rich_help_panel="Result",
        ),
    ] = True,
    threshold: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Alpha of at least this becomes opaque, the rest transparent. 0: edges stay soft.",
            rich_help_panel="Result",
        ),
    ] = 0,
    output_format: Annotated[
        OutputFormat | None,
        typer.Option(
            "--format",
            "-f",
            help="File format, lossless both. Default: png, or what OUT ends in.",
            rich_help_panel="Result",
        ),
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave out images whose result is there.", rich_help_panel="Result"),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help=f"Hub id, directory, or one of: {_list_aliases()}.",
            rich_help_panel="Model",
        ),
    ] = "general",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE|WIDTHxHEIGHT",
            help="Size at which the network sees images, width first, multiples of 32. Default: what the model was "
            "trained for.",
            rich_help_panel="Model",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", "-d", help="cpu, cuda, cuda:1, mps. Default: a GPU if there is one.", rich_help_panel="Model"
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Default: float32 on the CPU, else the model file's own.", rich_help_panel="Model"),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help="Images that go through the network together. More needs more memory and is rarely faster.",
            rich_help_panel="Model",
        ),
    ] = 1,
) -> None:
    """Remove the background of images.

    Results are transparent images of the original size: for the input photos,
    photos/trip/cat.jpg becomes OUT/trip/cat.png. Images that differ by suffix
    alone keep it (cat.jpg.png, cat.webp.png); of several folders each gets one
    in OUT. Inputs are never replaced; results of an earlier run are, unless
    --skip-existing is given.

    A file that cannot be processed is reported and does not stop the others;
    the exit code is then 1. It is 2 if nothing was tried, for example because
    no input was found.
    """
    if mask_only and background is not None:
        raise typer.BadParameter("--mask-only and --background exclude each other.")
    input_size = parse_size(size)
    images, problems = find_inputs(inputs, output)
    if not images:
        raise typer.BadParameter("There is no image to process: " + "; ".join(problems))
    jobs = assign_targets(images, output, output_format, background)
    is_file = len(jobs) == 1 and jobs[0].target == output
    is_stream = str(output) == STREAM
    if not is_stream:
        prepare_folder(output.parent if is_file else output)
    total = len(jobs)
    if skip_existing:
        jobs = [job for job in jobs if not job.target.exists()]
    for problem in problems:
        typer.echo(f"FAILED {problem}", err=True)

    written, failed, seconds = 0, len(problems), 0.0
    if jobs:
        pipe = load(
            model,
            device,
            dtype,
            input_size,
            mask_only=mask_only,
            background=background,
            refine=refine,
            threshold=threshold,
        )
        with tqdm(total=len(jobs), unit="image", disable=None) as progress:
            outcome = Outcome(progress)
            start = time.monotonic()
            write = partial(write_image, stream_format=output_format or OutputFormat.PNG)
            process(jobs, read_image, partial(pipe, batch_size=batch_size), write, batch_size, outcome)
            seconds = time.monotonic() - start
        written, failed = outcome.written, outcome.failed + failed
    counts = {"written": written, "skipped": total - len(jobs), "failed": failed}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "written")
    typer.echo(
        f"{summary} in {seconds:.1f} s, {written / seconds:.2g} images/s" if written else summary, err=is_stream
    )
    if failed:
        raise typer.Exit(1)


def load(
    model: str,
    device: str | None,
    dtype: str | None,
    size: tuple[int, int] | None,
    *,
    mask_only: bool,
    background: str | None,
    refine: bool,
    threshold: float,
) -> Callable[..., list["Image.Image"]]:
    """Builds the pipeline; where that fails, says why and ends the command."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    from .foreground import parse_background
    from .pipeline_birefnet import load_pipeline

    transformers_logging.set_verbosity_error()  # it advises against calling pipelines in a loop
    transformers_logging.disable_progress_bar()  # of reading weights, which takes a second
    enable_progress_bars()  # of downloads, which the line above switches off, too
    output_type = "mask" if mask_only else "cutout" if background is None else "composite"
    try:
        backdrop = None if background is None else parse_background(background)
    except ValueError as error:
        raise typer.BadParameter(f"--background: {error}") from error
    try:
        pipe = load_pipeline(
            model,
            device=device,
            dtype=dtype,
            size=size,
            output_type=output_type,
            background=backdrop,
            refine_foreground=refine,
            threshold=threshold,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        typer.echo(f"Cannot load {model}: {error}", err=True)
        if isinstance(error, OSError) and not os.path.exists(model):
            typer.echo(
                "Without a network there is --model nano: small and coarse, it ships with the package.", err=True
            )
        raise typer.Exit(2) from error
    typer.echo(
        f"{model} on {pipe.device}, {str(pipe.model.config.dtype or pipe.dtype).removeprefix('torch.')}", err=True
    )
    return pipe


def main() -> None:
    """Entry point of the command `birefnet`."""
    app()
