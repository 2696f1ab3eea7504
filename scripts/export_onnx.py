r"""Exports a BiRefNet to an ONNX file, checks that the file computes the same, and only then lets it appear.

    python scripts/export_onnx.py ZhengPeng7/BiRefNet exported
    python scripts/export_onnx.py lite exported --size 512 512 --dtype float16
    python scripts/export_onnx.py nano exported --check onnxruntime openvino
    python scripts/export_onnx.py ZhengPeng7/BiRefNet_dynamic exported

MODEL is a Hub id, a directory or an alias. OUTPUT gets model.onnx (model_fp16.onnx for float16), config.json and
preprocessor_config.json, and is all that `BiRefNetOnnxForImageSegmentation.from_pretrained(OUTPUT)` needs.

The graph maps `pixel_values`, float32 (batch_size, 3, height, width) from the image processor, to `logits`, float32
(batch_size, 1, height, width). Its size is the checkpoint's, or that of --size; where the checkpoint takes images of any
size, or with --any-size, both sides may be any multiple of 32 from 64 on, with Swin backbones only. Deformable
convolutions are ONNX's own DeformConv, which takes opset 19 or later and ONNX Runtime 1.28 or later; OpenVINO, which
cannot read them by itself, runs the file by `BiRefNetOnnxForImageSegmentation.from_pretrained(OUTPUT,
runtime="openvino")`. The check runs pictures of another batch size (and, where it is free, of other sizes) than the traced
one through the runtime and through PyTorch in float32.

Needs `pip install "birefnet-hf[onnx]"`, and minutes of time.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.checkpoints_birefnet import find_model
from birefnet_hf.image_loading import staged_files
from birefnet_hf.modeling_birefnet import SIZE_DIVISOR
from birefnet_hf.onnx_birefnet import ONNX_FILE_NAMES, BiRefNetOnnxForImageSegmentation


logger = logging.getLogger("export_onnx")

# What the file may differ by from PyTorch in float32: on logits, and where its weights are float16, on alpha.
LOGITS_TOLERANCE = 1e-4
# Rounding of half-precision features moves soft edges by a grey level; the mean shows what is wrong everywhere.
ALPHA_TOLERANCE, MEAN_ALPHA_TOLERANCE = 8 / 255, 0.5 / 255
# Beyond ±12, alpha is 0 or 1 to the fifth decimal.
MEAN_LOGITS_TOLERANCE, CLEAR_LOGIT = 0.1, 12.0

# Where the size is free: smallest side, the size that is traced, and those that are checked, some of whose maps are whole
# windows and some are not.
MIN_FREE_SIDE = 2 * SIZE_DIVISOR
TRACED_SIZE = (224, 352)
CHECKED_SIZES = ((384, 256), (MIN_FREE_SIDE, 448), (352, 320))

# Files that must belong to the same network and size for a second precision to be put beside the first.
SETTINGS_FILES = ("config.json", "preprocessor_config.json")
UNIMPORTANT_SETTINGS = ("dtype", "transformers_version", "_name_or_path")


class ExportError(Exception):
    """What the user can do something about; the message says what."""


class DifferentResults(ExportError):
    """A file runs, and computes something else."""


class LogitsOnly(nn.Module):
    """The graph's signature: float32 pictures in, float32 logits out, whatever the precision of the weights."""

    def __init__(self, model: BiRefNetForImageSegmentation, any_size: bool):
        super().__init__()
        self.model = model
        self.any_size = any_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.any_size:
            # Sizes that are products by their form: of all maps down to the coarsest, the tracer then knows the size.
            counts = [
                torch.div(torch.scalar_tensor(side, dtype=torch.int64), SIZE_DIVISOR, rounding_mode="trunc").item()
                for side in pixel_values.shape[2:]
            ]
            for count in counts:
                torch._check(count >= MIN_FREE_SIDE // SIZE_DIVISOR)
            pixel_values = pixel_values.view(*pixel_values.shape[:2], *(SIZE_DIVISOR * count for count in counts))
        return self.model(pixel_values).logits.float()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="export_onnx.py"
    )
    parser.add_argument("model", help="Hub id, directory or alias such as nano")
    parser.add_argument("output", type=Path, help="directory; may hold the same network's other precision")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="input size; default the checkpoint's"
    )
    size.add_argument(
        "--any-size", action="store_true", help="a graph for all sizes, as checkpoints for any size get by default"
    )
    parser.add_argument("--batch-size", type=int, help="fix it; any batch size by default")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of weights and arithmetic")
    parser.add_argument("--opset", type=int, default=22, help="19 (the first with DeformConv) or later; default 22")
    parser.add_argument(
        "--check",
        nargs="+",
        choices=["onnxruntime", "openvino"],
        help="runtimes to check in; default ONNX Runtime, and OpenVINO where it is installed",
    )
    arguments = parser.parse_args(argv)
    if arguments.size and any(side <= 0 or side % SIZE_DIVISOR for side in arguments.size):
        parser.error(f"--size {arguments.size}: both sides must be multiples of {SIZE_DIVISOR}.")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size} must be at least 1.")
    if arguments.opset < 19:
        parser.error(f"--opset {arguments.opset}: DeformConv exists from opset 19 on.")
    if arguments.check is None:
        arguments.check = ["onnxruntime"] + ["openvino"] * (find_spec("openvino") is not None)
    return arguments


def require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        extras = "onnx,openvino" if "openvino" in missing else "onnx"
        raise ExportError(f'{", ".join(missing)} not installed: pip install "birefnet-hf[{extras}]".')


def load(
    name: str, size: Sequence[int] | None, any_size: bool
) -> tuple[BiRefNetForImageSegmentation, BiRefNetImageProcessor, tuple[int, int] | None]:
    """The network in float32, its processor at the wanted size, and that size (height, width), None for any."""
    name = find_model(name)
    settings = {"size": {"height": size[0], "width": size[1]}} if size else {}
    processor = BiRefNetImageProcessor.from_pretrained(name, **settings)
    model = BiRefNetForImageSegmentation.from_pretrained(name, dtype=torch.float32).eval()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExportError(
            f"{name} holds adapters (LoRA): run its training with --resume --merge-lora for a whole network."
        )
    if processor.size.height is not None and not any_size:
        return model, processor, (processor.size.height, processor.size.width)
    if not model.config.is_swin:
        raise ExportError(
            f"{name} would take images of any size, which only Swin backbones can be traced for, not "
            f"{model.config.backbone}: give --size HEIGHT WIDTH for a graph of that size."
        )
    return model, processor, None


def trace(
    model: BiRefNetForImageSegmentation, size: tuple[int, int] | None, batch_size: int | None
) -> torch.export.ExportedProgram:
    """Records what the network computes.

    Args:
        size: (height, width) of the graph's input, None for any.
        batch_size: None for any.
    """
    free = {}
    if batch_size is None:
        free[0] = Dim("batch_size")
        batch_size = 2  # 0 and 1 would be taken for constants
    if size is None:
        free |= {2: Dim("height", min=MIN_FREE_SIDE), 3: Dim("width", min=MIN_FREE_SIDE)}
        # What PyTorch's operator is made of when the graph is rewritten has its values elsewhere in memory.
        model.set_attn_implementation("eager")
    picture = torch.zeros(batch_size, model.config.num_channels, *(size or TRACED_SIZE))
    with torch.no_grad():
        return torch.export.export(
            LogitsOnly(model, any_size=size is None).eval(),
            (picture,),
            dynamic_shapes=(free,) if free else None,
            strict=False,  # symbolic execution of the Python code takes longer and knows less of it
        )


def write(program: torch.export.ExportedProgram, path: Path, opset: int) -> None:
    """Turns the recording into a graph and writes it with its weights into one file."""
    with torch.no_grad():
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            external_data=False,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=["logits"],
            verbose=False,
        )


def check_pictures(batch_size: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Smooth random pictures of normalised colours with some noise, (batch_size, 3, *size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)
    return smooth + 0.1 * torch.randn(batch_size, 3, *size, generator=generator)


@torch.inference_mode()
def check(
    expected: Sequence[torch.Tensor],
    pictures: Sequence[torch.Tensor],
    folder: Path,
    file_name: str,
    runtime: str,
) -> None:
    """Runs the file and compares.

    Args:
        expected: PyTorch's float32 logits for each of `pictures`.
        pictures: Inputs, one for each size.

    Raises:
        ExportError: the runtime cannot load or run the file, or its results are others.
    """
    try:
        exported = BiRefNetOnnxForImageSegmentation.from_pretrained(folder, file_name=file_name, runtime=runtime)
        result = torch.cat([exported(batch).logits.flatten() for batch in pictures])
    except Exception as error:
        raise ExportError(f"{runtime} does not run the exported file: {error}") from error
    expected = torch.cat([logits.flatten() for logits in expected])
    logits_difference = (result - expected).abs().max().item()
    alpha_differences = (result.sigmoid() - expected.sigmoid()).abs()
    largest, mean = alpha_differences.max().item(), alpha_differences.mean().item()
    report = (
        f"{runtime}: logits differ from PyTorch's float32 by at most {logits_difference:.1e}, "
        f"alpha by at most {largest * 255:.2g}/255, {mean * 255:.2g}/255 on average, "
        f"over inputs {', '.join('×'.join(map(str, batch.shape)) for batch in pictures)}."
    )
    # Written so that NaN fails, too.
    if file_name == ONNX_FILE_NAMES[torch.float16]:
        # Logits, too: the alpha of pictures without an object is 0 whatever the graph makes of them.
        clamped = (
            (result.clamp(-CLEAR_LOGIT, CLEAR_LOGIT) - expected.clamp(-CLEAR_LOGIT, CLEAR_LOGIT)).abs().mean().item()
        )
        passed = largest <= ALPHA_TOLERANCE and mean <= MEAN_ALPHA_TOLERANCE and clamped <= MEAN_LOGITS_TOLERANCE
        allowed = (
            f"alpha {ALPHA_TOLERANCE * 255:g}/255, on average {MEAN_ALPHA_TOLERANCE * 255:g}/255, logits on average "
            f"{MEAN_LOGITS_TOLERANCE:g}"
        )
    else:
        passed, allowed = logits_difference <= LOGITS_TOLERANCE, f"logits {LOGITS_TOLERANCE:g}"
    if not passed:
        raise DifferentResults(f"{report} That is more than allowed ({allowed}): the file is not kept.")
    logger.info(report)


def check_settings(folder: Path, output: Path) -> None:
    """Raises ExportError where `output` has settings of another network or size than `folder`."""
    for name in SETTINGS_FILES:
        if (output / name).exists():
            ours, theirs = (json.loads((place / name).read_text(encoding="utf-8")) for place in (folder, output))
            different = sorted(
                key
                for key in (ours | theirs).keys() - set(UNIMPORTANT_SETTINGS)
                if key not in ours or key not in theirs or ours[key] != theirs[key]
            )
            if different:
                raise ExportError(
                    f"{output / name} belongs to another network or size (it differs in {', '.join(different)}); "
                    "choose another OUTPUT."
                )


def check_other_precision(
    expected: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], output: Path, file_name: str, runtime: str
) -> None:
    """Raises ExportError where the file that `output` already has is of other weights, or not for these sizes."""
    try:
        check(expected, pictures, output, file_name, runtime)
    except ExportError as error:
        is_other = isinstance(error, DifferentResults)
        reason = "is of other weights than this model" if is_other else f"is not for these sizes ({error})"
        raise ExportError(f"{output / file_name} {reason}: choose another OUTPUT, or remove that file.") from error


def run(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; OUTPUT is a directory.")
    require("onnx", "onnxscript", *arguments.check)
    model, processor, size = load(arguments.model, arguments.size, arguments.any_size)
    dtype = getattr(torch, arguments.dtype)
    file_name = ONNX_FILE_NAMES[dtype]

    sizes = CHECKED_SIZES if size is None else (size,)
    pictures = [check_pictures(arguments.batch_size or 1, checked, seed=1) for checked in sizes]
    with torch.inference_mode():
        expected = [model(batch).logits for batch in pictures]

    # Nothing appears under OUTPUT until it is complete and checked.
    with staged_files(output) as folder:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        check_settings(folder, output)
        for other in set(ONNX_FILE_NAMES.values()) - {file_name}:
            if (output / other).exists():
                check_other_precision(expected, pictures, output, other, arguments.check[0])
        described = "any size" if size is None else "×".join(map(str, size))
        logger.info("Tracing %s, %s, %s.", arguments.model, arguments.dtype, described)
        program = trace(model.to(dtype), size, arguments.batch_size)
        write(program, folder / file_name, arguments.opset)
        for runtime in arguments.check:
            check(expected, pictures, folder, file_name, runtime)
        for name in SETTINGS_FILES:
            if (output / name).exists():  # and says the same, see `check_settings`
                (folder / name).unlink()
    megabytes = (output / file_name).stat().st_size / 1e6
    logger.info("Saved %s (%.0f MB).", output / file_name, megabytes)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)  # only this script: the exporter says much
    try:
        run(arguments)
    except (ExportError, OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
