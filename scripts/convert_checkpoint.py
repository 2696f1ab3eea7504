"""Turns a released or self-trained BiRefNet file into a directory that every Transformers call loads.

    python scripts/convert_checkpoint.py epoch_244.pth birefnet-general
    python scripts/convert_checkpoint.py path/to/BiRefNet_lite birefnet-lite --verify
    python scripts/convert_checkpoint.py old.pth old --patch-order wg_hg_c --size 1024 1024

INPUT is a .pth or .safetensors file of upstream's layout (training prefixes `module.` and `_orig_mod.` are removed) or
a directory with one. The architecture is inferred from the tensors. OUTPUT_DIR gets weights under the released names,
so that other BiRefNet tools keep loading them, config.json and preprocessor_config.json.
"""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageSegmentation
from transformers.utils import IMAGE_PROCESSOR_NAME

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.checkpoints_birefnet import get_checkpoint
from birefnet_hf.conversion_birefnet import (
    IGNORED_TENSORS,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    infer_architecture,
    load_state_dict_file,
)
from birefnet_hf.image_loading import staged_files


logger = logging.getLogger("convert_checkpoint")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="convert_checkpoint.py"
    )
    parser.add_argument("input", type=Path, help=".pth, .pt, .bin or .safetensors file, or a directory with one")
    parser.add_argument("output_dir", type=Path, help="directory to create; new or empty")
    parser.add_argument(
        "--patch-order", choices=["c_hg_wg", "wg_hg_c"], help="see the README; else a saved model's own, or c_hg_wg"
    )
    parser.add_argument(
        "--multi-scale-input",
        choices=["none", "add", "cat"],
        help="tell 'add' from 'none', whose tensors are the same",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="input size; saved models and known names have theirs, else 1024²",
    )
    parser.add_argument(
        "--verify", action="store_true", help="also compare the logits of a test picture before and after"
    )
    return parser.parse_args(argv)


def find_weights(path: Path) -> Path:
    """The weights file that `path` is or holds; of one in several files their index.

    Raises:
        FileNotFoundError: there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    named = [path / SAFETENSORS_NAME, path / SAFETENSORS_INDEX_NAME]
    candidates = [file for file in named if file.is_file()][:1]
    if not candidates:
        candidates = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(candidates) != 1:
        raise FileNotFoundError(
            f"{path} holds {len(candidates)} weights files; name the one to convert: "
            f"{[file.name for file in candidates]}."
        )
    return candidates[0]


def load_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of a weights file, or of those that an index names.

    Raises:
        OSError: a file is missing, damaged or holds something else.
        ValueError: a number is not finite.
    """
    files = [weights]
    if weights.suffix == ".json":
        files = sorted(
            {weights.parent / name for name in json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    state_dict = {name: tensor for file in files for name, tensor in load_state_dict_file(file).items()}
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{weights}: {name} has numbers that are not finite; the training it comes from went wrong."
            )
    return state_dict


def own_settings(path: Path) -> dict[str, object]:
    """Settings in the config.json beside the tensors that do not follow from these; none of released files."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if settings.get("model_type") != BiRefNetConfig.model_type:
        return {}
    names = ("patch_order", "image_size", "loss_task", "multi_scale_input", "id2label", "label2id")
    names += ("attention_block_dropout", "drop_path_rate", "initializer_range", "freeze_backbone")
    return {name: settings[name] for name in names if name in settings}


def build(
    state_dict: dict[str, torch.Tensor], source: str, overrides: dict[str, object]
) -> BiRefNetForImageSegmentation:
    """The network for these tensors, every one of them used.

    Raises:
        ValueError: the tensors belong to another architecture, or some are missing, left over or of the wrong shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    config = BiRefNetConfig(**infer_architecture(shapes, source) | overrides)
    # Of several precisions the one that holds all.
    dtypes = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
    model, info = BiRefNetForImageSegmentation.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=functools.reduce(torch.promote_types, dtypes),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(name) for name in info[problem])
            raise ValueError(f"{source}: {len(names)} {problem.replace('_', ' ')}, e.g. {names[:5]}.")
    return model.eval()


def check_saved(folder: Path, state_dict: dict[str, torch.Tensor], model: torch.nn.Module, verify: bool) -> None:
    """Loads the directory by the Auto classes and compares it with what it was made from.

    Raises:
        RuntimeError: a tensor, or with `verify` a logit, differs.
    """
    saved = load_file(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in state_dict.items() if not IGNORED_TENSORS.search(name)}
    for name, tensor in expected.items():
        if name not in saved or not torch.equal(saved[name], tensor.to(saved[name].dtype)):
            raise RuntimeError(f"{name} was not saved as it was read.")
    loaded = AutoModelForImageSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    logger.info("Load check: %d tensors bit-equal, loaded by the Auto classes.", len(expected))
    if verify:
        generator = torch.Generator().manual_seed(0)
        picture = torch.randint(0, 256, (3, 96, 128), generator=generator, dtype=torch.uint8)
        picture = torch.nn.functional.interpolate(picture[None].float(), size=(480, 640), mode="bicubic")
        inputs = processor(picture[0].clamp(0, 255).to(torch.uint8), return_tensors="pt")
        with torch.inference_mode():
            before = model.float()(**inputs).logits
            after = loaded.float()(**inputs).logits
        difference = (before - after).abs().max().item()
        if not difference <= 1e-5:  # the same sums may be taken in another order; NaN fails as well
            raise RuntimeError(f"Logits before and after differ by up to {difference:.3g}.")
        logger.info("Verified: logits %s within %.1g, %.3f to %.3f.", tuple(after.shape), difference, *after.aminmax())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    output_dir: Path = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        logger.error("%s exists and is not empty; choose another OUTPUT_DIR.", output_dir)
        return 2
    try:
        weights = find_weights(arguments.input)
        state_dict = load_tensors(weights)
        checkpoint = get_checkpoint(str(arguments.input))
        folder = arguments.input if arguments.input.is_dir() else arguments.input.parent
        overrides = own = own_settings(folder)
        if checkpoint is not None:
            overrides = {"image_size": checkpoint.size, "loss_task": checkpoint.loss_task} | overrides
        given = {
            "image_size": arguments.size and tuple(arguments.size),
            "patch_order": arguments.patch_order,
            "multi_scale_input": arguments.multi_scale_input,
        }
        overrides = overrides | {name: value for name, value in given.items() if value is not None}
        size = overrides.get("image_size")
        model = build(
            state_dict, str(weights), {name: value for name, value in overrides.items() if value is not None}
        )
        if own and (folder / IMAGE_PROCESSOR_NAME).is_file():
            resize = {"size": {"height": size[0], "width": size[1]}} if arguments.size else {}
            processor = BiRefNetImageProcessor.from_pretrained(folder, **resize)
        elif size is not None:
            processor = BiRefNetImageProcessor(size={"height": size[0], "width": size[1]})
        elif checkpoint is not None:
            processor = BiRefNetImageProcessor(size=checkpoint.processor_size)
        else:
            processor = BiRefNetImageProcessor()
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    logger.info(
        "%s: %s, %.1f million parameters, %s, input %s.",
        weights.name,
        model.config.backbone,
        model.num_parameters() / 1e6,
        str(model.dtype).removeprefix("torch."),
        dict(processor.size),
    )
    # Nothing appears under OUTPUT_DIR until it is complete and checked.
    try:
        with staged_files(output_dir) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            check_saved(folder, state_dict, model, arguments.verify)
    except (OSError, RuntimeError, SafetensorError) as error:
        logger.error("%s could not be written: %s", output_dir, error)
        return 1
    logger.info("Saved to %s.", output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
