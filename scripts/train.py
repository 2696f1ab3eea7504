r"""Trains or fine-tunes BiRefNet on images with masks, or on cut-outs composed over backgrounds.

    # Fine-tune a released checkpoint on DIS5K, on all GPUs that `accelerate config` was told of:
    accelerate launch scripts/train.py --model ZhengPeng7/BiRefNet --task dis --data DIS5K --subsets DIS-TR \
        --validation-data DIS5K --validation-subsets DIS-VD --mixed-precision bf16 --output-dir runs/dis

    # Adapters only (LoRA), on two folders with files of the same names, a tenth of them held out:
    accelerate launch scripts/train.py --model lite --data photos --masks masks --validation-fraction 0.1 \
        --lora-rank 8 --merge-lora --output-dir runs/lora

    # A minute on a CPU, from nothing, on a folder of some hundred RGBA cut-outs:
    python scripts/train.py --data cutouts --cutouts --size 64 64 --epochs 1 --batch-size 8 --learning-rate 2e-3 \
        --validation-fraction 0.1 --output-dir runs/minute --model-settings '{"backbone": "swin", "embed_dim": 16,
            "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "inner_channels": 16,
            "branch_channels": 16, "image_channels": 8, "deformable_kernel_sizes": [1, 3]}'

    # Interrupted? The same command, with --resume. The settings of a run in a file (JSON or YAML, names as below):
    accelerate launch scripts/train.py --config settings.yaml --resume

Output directory: the model with its image processor and card (`from_pretrained` and the pipelines load it), `best/` the
same for the best validation after a step, `checkpoints/` for --resume, `samples/`, `log.jsonl`, `logs/` (TensorBoard),
`results.json`.

Defaults are meant to be good. `--recipe upstream` reproduces the reference's training instead: its augmentation, its
losses with all their oddities, constant learning rate of 1e-4 (dis) or 1e-5 times sqrt(batch size of one process / 4),
no warm-up, no clipping, weight decay of everything, no average, last epochs compounding. The default learning rate is by
the same formula, but for the batch of all processes and accumulation steps together. Training from scratch wants more.

Exactly resumed runs: data, augmentation, sizes and dropout follow from (seed, epoch, index) or (seed, step, process), and
the rest is in the checkpoint, so that an interrupted run ends like an uninterrupted one, bit by bit where the machine's
arithmetic is deterministic (a CPU is; CUDA's atomic additions are not).

BatchNorm sees the batch of one process. So two processes of batch 4 are not quite one of batch 8, and accumulation does not
help; with batch 1 each picture is normalised by itself in training and by the running statistics in use, which trains
badly: use 2 or more, or `--batch-norm frozen` (running statistics, for fine-tuning), or on GPUs `--batch-norm sync`.

Several processes: DDP works everywhere (on CPUs:
`ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 scripts/train.py …`). FSDP and DeepSpeed are switched on by a configuration of Accelerate, such as those in scripts/accelerate/;
Accelerate runs them on accelerators only, and DeepSpeed has to be installed. They need --ema-decay 0, since an average
needs whole weights.
"""

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast, set_seed
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.checkpoints_birefnet import find_model, get_checkpoint, naming_model, resolve_checkpoint
from birefnet_hf.data import (
    BadDataError,
    TrainingBatchSampler,
    TrainingDataset,
    build_augmentation,
    count_cpus,
    load_pairs,
    source_folders,
)
from birefnet_hf.image_loading import ImageLoadError, staged_files
from birefnet_hf.loss_birefnet import BiRefNetLoss, loss_weights
from birefnet_hf.metrics import METRICS
from birefnet_hf.modeling_birefnet import BiRefNetImageSegmentationOutput
from birefnet_hf.synthesis import Compositor
from birefnet_hf.training import (
    NO_ARCHITECTURE,
    OWN_METRICS,
    SubstitutingDataset,
    TrainingError,
    add_adapters,
    architecture,
    average_weights,
    check_processes,
    list_checkpoints,
    load_timm_weights,
    measure,
    parameter_groups,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
    schedule_factor,
    seed_step,
    set_training_mode,
    validation_loader,
)


logger = logging.getLogger("birefnet_hf.train")

TASKS = ("dis", "cod", "hrsod", "general", "matting")
TRACKERS = ("tensorboard", "trackio", "wandb")
# Where the recipes differ in what can also be set one by one.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "augmentation": "default",
        "schedule": "cosine",
        "warmup": 0.05,
        "max_grad_norm": 100.0,
        "ema_decay": 0.999,
    },
    "upstream": {
        "augmentation": "upstream",
        "schedule": "constant",
        "warmup": 0.0,
        "max_grad_norm": 0.0,
        "ema_decay": 0.0,
    },
}
# The least value of an option, and what it stays below.
RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "gradient_accumulation", "log_steps", "keep_checkpoints"), (1, math.inf)),
    **dict.fromkeys(("validation_samples", "validation_steps", "checkpoint_steps"), (1, math.inf)),
    **dict.fromkeys(("seed", "lora_rank", "num_workers", "sample_pictures", "last_epochs"), (0, math.inf)),
    **dict.fromkeys(("learning_rate", "backbone_learning_rate", "weight_decay", "layer_decay"), (0, math.inf)),
    **dict.fromkeys(("milestone_factor", "max_grad_norm"), (0, math.inf)),
    **dict.fromkeys(("validation_fraction", "warmup", "ema_decay"), (0, 1)),
}
# May differ between an interrupted run and its continuation without changing what is computed.
FREE_SETTINGS = (
    "config",
    "output_dir",
    "resume",
    "checkpoint_steps",
    "keep_checkpoints",
    "log_steps",
    "trackers",
    "push_to_hub",
    "num_workers",
    "check",
    "sample_pictures",
    "merge_lora",
    "validation_steps",
    "metrics",
)
# Of files and folders to read; `data` and `model` may also be names on the Hub.
PATHS = ("data", "masks", "more_cutouts", "validation_data", "validation_masks", "backgrounds", "model")
# A folder holds either a whole model or adapters: with both, loading would apply the adapters to the model.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
IGNORED_ON_THE_HUB = ["checkpoints/*", "best/*", "logs/*", "samples/*", "log.jsonl", ".*"]


def read_model_settings(text: str) -> dict[str, Any]:
    """Fields of a BiRefNetConfig from JSON, or from a file of it."""
    try:
        settings = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"neither JSON nor a file of it: {error}") from error
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"not an object of settings: {text}")
    return settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="train.py",
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--config", type=Path, help="JSON or YAML file of these settings; the command line wins")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--resume", nargs="?", const="latest", help="continue: the latest checkpoint, or this folder")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the result, e.g. my-name/birefnet")
    parser.add_argument("--seed", type=int, default=7)

    group = parser.add_argument_group("model")
    group.add_argument("--model", help="Hub id, alias or directory to start from; without it: from scratch")
    group.add_argument("--backbone", help="from scratch: name of the backbone, see BiRefNetConfig")
    group.add_argument(
        "--pretrained-backbone",
        nargs="?",
        const="timm",
        metavar="FILE",
        help="from scratch: timm's weights for the backbone, downloaded, or this file of them",
    )
    group.add_argument(
        "--model-settings",
        type=read_model_settings,
        default={},
        help="JSON, or a file of it: fields of BiRefNetConfig",
    )
    group.add_argument(
        "--task", choices=TASKS, help="loss preset; the model's own when absent (dis where its name tells nothing)"
    )
    group.add_argument("--freeze-backbone", action=flag, help="default: as the model's config says")
    group.add_argument("--batch-norm", choices=("train", "frozen", "sync"), default="train", help="see above")
    group.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank instead of the network")
    group.add_argument("--lora-alpha", type=float, help="scale of the adapters; twice the rank when absent")
    group.add_argument("--merge-lora", action=flag, default=False, help="save merged; the adapters go to adapter/")
    group.add_argument(
        "--gradient-checkpointing", action=flag, default=False, help="recompute the blocks of a transformer"
    )
    group.add_argument("--compile", action=flag, default=False, help="torch.compile")

    group = parser.add_argument_group("data, see birefnet_hf.data.load_pairs")
    group.add_argument("--data", help="folder, Hub id or saved dataset")
    group.add_argument("--masks", help="folder of masks, where --data is one of images")
    group.add_argument("--subsets", nargs="+", help="subfolders to join, e.g. DIS-TR")
    group.add_argument("--split", default="train")
    group.add_argument("--image-column")
    group.add_argument("--mask-column")
    group.add_argument("--cutouts", action=flag, default=False, help="the data are RGBA cut-outs: compose pictures")
    group.add_argument("--more-cutouts", help="RGBA cut-outs to compose pictures of, to be trained on beside --data")
    group.add_argument("--backgrounds", help="folder of photographs for that, beside generated backgrounds")
    group.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the model's when absent")
    group.add_argument("--dynamic-size", type=int, nargs=2, metavar=("LEAST", "MOST"), help="sides, drawn per batch")
    group.add_argument("--augmentation", choices=("none", "default", "upstream", "upstream-background"))
    group.add_argument("--check", choices=("fast", "full", "off"), default="fast", help="of all files, at the start")
    group.add_argument(
        "--on-bad-data", choices=("stop", "skip"), default="stop", help="bad files, also those met later"
    )
    workers = min(4, count_cpus())
    group.add_argument("--num-workers", type=int, default=workers, help="processes that read data, for each process")

    group = parser.add_argument_group("validation")
    group.add_argument("--validation-data", help="--data when absent and other subsets or another split are named")
    group.add_argument("--validation-masks")
    group.add_argument("--validation-image-column", help="as --image-column when absent")
    group.add_argument("--validation-mask-column", help="as --mask-column when absent")
    group.add_argument("--validation-subsets", nargs="+")
    group.add_argument("--validation-split", help='"validation" when absent')
    group.add_argument("--validation-cutouts", action=flag, default=False, help="the validation data are cut-outs")
    group.add_argument("--validation-fraction", type=float, default=0.0, help="hold out this share of --data instead")
    group.add_argument("--validation-samples", type=int, help="at most so many, the first ones")
    group.add_argument("--validation-steps", type=int, help="validate every so many steps; each epoch when absent")
    group.add_argument("--metrics", nargs="+", default=["max_f", "s_measure", "mae"], help=f"of {', '.join(METRICS)}")
    group.add_argument("--best-metric", default="iou", help="one of these, iou or loss: decides what is kept in best/")
    group.add_argument("--sample-pictures", type=int, default=4, help="validation pictures to show")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--recipe", choices=tuple(RECIPES), default="default", help="see above")
    group.add_argument("--epochs", type=int, default=20)
    group.add_argument("--batch-size", type=int, default=4, help="of one process")
    group.add_argument("--gradient-accumulation", type=int, default=1, help="batches in one step")
    group.add_argument("--learning-rate", type=float, help="by the formula above when absent")
    group.add_argument("--backbone-learning-rate", type=float)
    group.add_argument("--layer-decay", type=float, default=1.0, help="factor from each backbone stage to the earlier")
    group.add_argument("--weight-decay", type=float, default=1e-2)
    group.add_argument("--schedule", choices=("constant", "cosine", "step"))
    group.add_argument("--warmup", type=float, help="share of all steps")
    group.add_argument("--milestones", type=int, nargs="*", default=[], help="for the step schedule, in epochs")
    group.add_argument("--milestone-factor", type=float, default=0.5)
    group.add_argument("--max-grad-norm", type=float, help="0: no clipping")
    group.add_argument(
        "--ema-decay", type=float, help="of the averaged weights, which are validated and saved; 0: none"
    )
    group.add_argument(
        "--last-epochs",
        type=int,
        help="with changed loss weights; when absent a tenth of --epochs, in the upstream recipe as many as the task's own",
    )
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="Accelerate's own when absent")

    group = parser.add_argument_group("output")
    group.add_argument("--log-steps", type=int, default=10)
    group.add_argument("--checkpoint-steps", type=int, help="save every so many steps; each epoch when absent")
    group.add_argument("--keep-checkpoints", type=int, default=2)
    group.add_argument("--trackers", nargs="*", choices=TRACKERS, help="TensorBoard, where installed, when absent")
    return parser


def read_settings(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The settings of a file as the parser's command-line arguments, so that they are checked alike.

    Raises:
        ValueError: the file is no mapping.
    """
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path} must be a mapping of settings such as `batch_size: 8`.")
    argv = []
    known = {option: action for action in parser._actions for option in action.option_strings}
    for name, value in settings.items():
        option = name.replace("_", "-")
        if value is False and f"--no-{option}" not in known:  # YAML takes `off` and `no` for this, too
            choices = getattr(known.get(f"--{option}"), "choices", None) or ()
            argv += [f"--{option}={choice}" for choice in ("off", "no") if choice in choices]
        elif isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            argv += [f"--{option}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{option}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return argv


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings from the recipe, the file and the command line, the later the stronger."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--recipe", default="default")
    config = first.parse_known_args(argv)[0].config
    try:
        argv = (read_settings(config, parser) if config else []) + argv
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config: {error}")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))
    arguments = parser.parse_args(argv)

    if arguments.data is None or arguments.output_dir is None:
        parser.error("--data and --output-dir are required")
    arguments.output_dir = arguments.output_dir.expanduser()
    for name in PATHS:  # which the shell leaves alone in a file of settings
        if given := getattr(arguments, name):
            setattr(arguments, name, os.path.expanduser(given))
    if config and config.resolve() == (arguments.output_dir / "config.json").resolve():
        parser.error(f"--config {config} is where the model's own config is saved: give it another name or place")
    if arguments.model is None and not (arguments.backbone or "backbone" in arguments.model_settings):
        parser.error("nothing to train: give --model, or from scratch --backbone or --model-settings with a backbone")
    if arguments.model is not None and (arguments.backbone or arguments.pretrained_backbone):
        parser.error("--backbone and --pretrained-backbone are for training from scratch, without --model")
    if arguments.size and arguments.dynamic_size:
        parser.error("give either --size or --dynamic-size")
    if arguments.validation_fraction and arguments.validation_data:
        parser.error("give either --validation-data or --validation-fraction")
    others = ("subsets", "split", "masks", "image_column", "mask_column", "cutouts")
    given = [f"--validation-{name.replace('_', '-')}" for name in others if getattr(arguments, f"validation_{name}")]
    if given and not arguments.validation_data:
        within = [
            getattr(arguments, f"validation_{name}") or getattr(arguments, name) for name in ("subsets", "split")
        ]
        if arguments.validation_fraction or within == [arguments.subsets, arguments.split]:
            parser.error(f"{', '.join(given)}: for validation data of their own, give --validation-data")
        arguments.validation_data = arguments.data  # other subsets or another split of it
    if not arguments.validation_data and not arguments.validation_fraction:
        for name in ("validation_samples", "validation_steps"):
            if getattr(arguments, name):
                parser.error(
                    f"--{name.replace('_', '-')}: nothing to measure on, give --validation-data or --validation-fraction"
                )
    arguments.validation_split = arguments.validation_split or "validation"
    if arguments.merge_lora and not arguments.lora_rank:
        parser.error("--merge-lora needs --lora-rank")
    if arguments.lora_rank and not arguments.merge_lora:
        if changed := sorted(set(arguments.model_settings) - set(NO_ARCHITECTURE)):
            parser.error(f"adapters are saved without --model-settings {', '.join(changed)}: add --merge-lora")
    if unknown := [name for name in arguments.metrics if name not in METRICS]:
        parser.error(f"there are no metrics {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    if arguments.best_metric not in (*arguments.metrics, "iou", *OWN_METRICS):
        parser.error(f"--best-metric {arguments.best_metric} is not measured: add it to --metrics")
    for name, (least, limit) in RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < limit:
            bounds = f"at least {least}" + ("" if limit == math.inf else f" and below {limit}")
            parser.error(f"--{name.replace('_', '-')} must be {bounds}")
    if arguments.lora_alpha is not None and not arguments.lora_rank:
        parser.error("--lora-alpha needs --lora-rank")
    if bool(arguments.milestones) != (arguments.schedule == "step"):
        parser.error("--milestones and --schedule step need each other")
    if arguments.backgrounds and not (arguments.cutouts or arguments.more_cutouts or arguments.validation_cutouts):
        parser.error("--backgrounds is for cut-outs: give --cutouts or --more-cutouts")
    return arguments


@dataclass
class Run:
    """What the steps of a training share."""

    arguments: argparse.Namespace
    accelerator: Accelerator
    processor: BiRefNetImageProcessor
    config: BiRefNetConfig
    task: str
    samples: tuple[int, int]  # for training, for validation
    model: nn.Module
    criterion: BiRefNetLoss  # the model's own
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    validation_loader: DataLoader | None
    steps_per_epoch: int
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # of validations
    gone: set[int] = field(default_factory=set)  # steps in it whose weights are nowhere

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.arguments.epochs

    @property
    def batch_size(self) -> int:
        """Images in a step, of all processes and accumulated batches."""
        arguments = self.arguments
        return arguments.batch_size * arguments.gradient_accumulation * self.accelerator.num_processes

    @property
    def network(self) -> nn.Module:
        """What is saved: the average if there is one, with its adapters if there are any."""
        return self.average.module if self.average is not None else self.accelerator.unwrap_model(self.model)

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        settings = {name: value for name, value in vars(self.arguments).items() if name not in FREE_SETTINGS}
        return settings | {
            "task": self.task,
            "processes": self.accelerator.num_processes,
            "samples": self.samples[0],
            "uses_average": self.average is not None,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    @property
    def best(self) -> dict[str, float]:
        """The best validation of the training so far, whose weights best/ holds; the earlier one of equals."""
        name = self.arguments.best_metric
        sign = 1 if (OWN_METRICS | METRICS)[name].higher_is_better else -1
        trained = [record for record in self.history if record["step"] > 0 and record["step"] not in self.gone]
        # What is measured may have changed since the run was interrupted.
        measured = [record for record in trained if not math.isnan(record.get(name, math.nan))]
        return max(measured, key=lambda record: sign * record[name]) if measured else self.history[-1]


def load_data(arguments: argparse.Namespace, size: tuple[int, int]) -> tuple[Dataset, datasets.Dataset | None]:
    """Pairs for training and for validation.

    Raises:
        ValueError, OSError: as `load_pairs`.
    """
    options = {"check": arguments.check, "on_bad": arguments.on_bad_data}
    columns = {"image_column": arguments.image_column, "mask_column": arguments.mask_column}
    compositor = measuring = None
    if arguments.cutouts:
        compositor = Compositor(size, arguments.backgrounds)
    if arguments.cutouts if arguments.validation_fraction else arguments.validation_cutouts:
        # Drawn structures would stand in for a part of the cut-outs that are to be measured. The light is their own.
        measuring = Compositor(size, arguments.backgrounds, thin_probability=0, hard_light_probability=0)
    source = {
        "source": arguments.data,
        "masks": arguments.masks,
        "subsets": arguments.subsets,
        "split": arguments.split,
    }
    if arguments.validation_fraction:
        # Divided before composing: else held-out cut-outs would stand beside and behind those that are trained on. The
        # division does not depend on the seed, so that runs can be compared.
        rows = load_pairs(**source, **columns, compositor=compositor, check="off", on_bad=arguments.on_bad_data)
        order = np.random.default_rng(0).permutation(len(rows))
        held_out = max(1, round(arguments.validation_fraction * len(rows)))
        if held_out >= len(rows):
            raise ValueError(
                f"{len(rows)} sample(s) cannot be divided: bring more data, or leave out --validation-fraction."
            )
        parts, bad = [], {}
        for part, composing in ((order[held_out:], compositor), (order[:held_out], measuring)):
            try:
                parts.append(load_pairs(rows.select(np.sort(part)), compositor=composing, **options))
            except BadDataError as error:
                bad |= dict.fromkeys(error.samples)  # a background is one of both
            except ValueError as error:
                name = "validation" if parts else "training"
                raise ValueError(
                    f"Of the data divided by --validation-fraction, the part for {name}: {error}"
                ) from error
        if bad:
            raise BadDataError(list(bad))
        training, validation = parts
    else:
        training, validation = load_pairs(**source, **columns, compositor=compositor, **options), None
        if arguments.validation_data:
            try:
                validation = load_pairs(
                    arguments.validation_data,
                    arguments.validation_masks,
                    subsets=arguments.validation_subsets,
                    split=arguments.validation_split,
                    image_column=arguments.validation_image_column or arguments.image_column,
                    mask_column=arguments.validation_mask_column or arguments.mask_column,
                    compositor=measuring,
                    **options,
                )
            except BadDataError:
                raise
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"Validation data, whose options begin with --validation: {error}") from error
            if arguments.validation_data == arguments.data and are_the_same(training, validation):
                raise ValueError(
                    f"Validation would be on what is trained on: {arguments.data} has no split "
                    f"{arguments.validation_split!r}. Use --validation-fraction or --validation-data."
                )
    if arguments.more_cutouts:
        composed = load_pairs(arguments.more_cutouts, compositor=Compositor(size, arguments.backgrounds), **options)
        training = ConcatDataset([training, composed])
    if validation is not None and arguments.validation_samples:
        validation = validation.select(range(min(arguments.validation_samples, len(validation))))
    return training, validation


def are_the_same(training: datasets.Dataset, validation: datasets.Dataset) -> bool:
    """Whether both are all of one source, by their lengths, and their first and last images."""
    ends = [[part.with_format(None)[index]["image"] for index in (0, -1)] for part in (training, validation)]
    return len(training) == len(validation) and ends[0] == ends[1]


def load_model(arguments: argparse.Namespace) -> tuple[BiRefNetForImageSegmentation, BiRefNetImageProcessor]:
    """The network, in float32, and its image processor, with the sizes to train at.

    Raises:
        ValueError, OSError: there is no such model, or the settings do not go together.
    """
    settings = dict(arguments.model_settings)
    if unknown := sorted(settings.keys() - {field.name for field in fields(BiRefNetConfig)}):
        raise ValueError(f"--model-settings: BiRefNetConfig has no {', '.join(unknown)}.")
    if arguments.model is not None:
        name = find_model(arguments.model)
        with naming_model(name):
            model = BiRefNetForImageSegmentation.from_pretrained(name, dtype=torch.float32, **settings)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{name} holds adapters (LoRA) of another network: to go on from them, train them with --merge-lora, "
                "which saves a whole network."
            )
        processor = BiRefNetImageProcessor.from_pretrained(name)
    else:
        if arguments.backbone:
            settings["backbone"] = arguments.backbone
        model = BiRefNetForImageSegmentation(BiRefNetConfig(**settings))
        normalisation = {}
        if arguments.pretrained_backbone:
            file = None if arguments.pretrained_backbone == "timm" else arguments.pretrained_backbone
            normalisation["image_mean"], normalisation["image_std"] = load_timm_weights(model, file)
        height, width = model.config.image_size
        processor = BiRefNetImageProcessor(size={"height": height, "width": width}, **normalisation)
    if arguments.size:
        processor = with_size(processor, {"height": arguments.size[0], "width": arguments.size[1]})
    elif arguments.dynamic_size:
        least, most = arguments.dynamic_size
        processor = with_size(processor, {"shortest_edge": least, "longest_edge": most})
    if processor.size.height:
        model.config.image_size = (processor.size.height, processor.size.width)
    model.config.loss_task = arguments.task or model.config.loss_task
    return model, processor


def with_size(processor: BiRefNetImageProcessor, size: dict[str, int]) -> BiRefNetImageProcessor:
    settings = {name: value for name, value in processor.to_dict().items() if name != "size"}
    return BiRefNetImageProcessor.from_dict({**settings, "size": size})


def adapt_model(
    model: BiRefNetForImageSegmentation, arguments: argparse.Namespace, accelerator: Accelerator
) -> nn.Module:
    """Sets what of the network is trained, and how."""
    if arguments.freeze_backbone is not None:
        model.backbone.requires_grad_(not arguments.freeze_backbone)
        model.config.freeze_backbone = arguments.freeze_backbone
    if model.class_head is not None:
        model.class_head.requires_grad_(False)  # the data have no classes
    model.criterion = BiRefNetLoss(model.config.loss_task, reference=arguments.recipe == "upstream")
    if arguments.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # before 5.24
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            backbone = model.config.backbone
            raise ValueError(
                f"--gradient-checkpointing: {backbone} has no blocks to recompute, leave it out."
            ) from error
    if arguments.batch_norm == "sync":
        if accelerator.device.type == "cpu" or accelerator.num_processes == 1:
            raise ValueError("--batch-norm sync is for several processes on accelerators: use train or frozen.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif arguments.batch_norm == "train" and arguments.batch_size == 1 and not arguments.lora_rank:
        logger.warning("BatchNorm with --batch-size 1 trains badly: use 2 or more, or --batch-norm frozen.")
    if arguments.lora_rank:
        model = add_adapters(model, arguments.lora_rank, arguments.lora_alpha or 2 * arguments.lora_rank)
    return model


def set_up(arguments: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Prepares everything, and tells what is wrong with settings or data before time is spent.

    Raises:
        ValueError, OSError, ImportError: about settings, data, model.
        TrainingError: about a checkpoint to resume from.
    """
    set_seed(arguments.seed)
    for name in PATHS:
        given = getattr(arguments, name)
        if name == "model" and given:
            given = resolve_checkpoint(given)  # "lite" is not the folder of that name, unless it holds a model
        if given and Path(given).exists() and Path(given).resolve() == arguments.output_dir.resolve():
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--output-dir {given} is {option}, which the result would overwrite: choose another folder."
            )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if arguments.ema_decay:
            raise ValueError(
                "FSDP and DeepSpeed shard the weights, which cannot be averaged then: pass --ema-decay 0."
            )
        if arguments.lora_rank:
            raise ValueError(
                "Adapters are too small for sharding to save memory: train them without FSDP or DeepSpeed."
            )
    if arguments.push_to_hub and accelerator.is_main_process:
        HfApi().create_repo(arguments.push_to_hub, exist_ok=True)  # a missing login is noticed now
    try:
        model, processor = load_model(arguments)
    except (StrictDataclassError, TypeError, RuntimeError) as error:
        # Of settings that no network has, or not this one.
        raise ValueError(f"The network cannot be built: {error}") from error
    task = model.config.loss_task
    model = adapt_model(model, arguments, accelerator)
    network = model.get_base_model() if arguments.lora_rank else model
    size = processor.size
    limits = (size.shortest_edge, size.longest_edge)
    training, validation = load_data(arguments, (size.height, size.width) if size.height else (limits[1], limits[1]))
    for part in (*getattr(training, "datasets", [training]), *([] if validation is None else [validation])):
        if arguments.output_dir.resolve() in source_folders(part):
            raise ValueError(f"--output-dir {arguments.output_dir} holds data: choose another folder.")

    dataset = TrainingDataset(training, processor, build_augmentation(arguments.augmentation), seed=arguments.seed)
    sampler = TrainingBatchSampler(
        len(training),
        arguments.batch_size,
        size_range=None if size.height else (limits, limits),
        # The batches of a step have one size, and there are no incomplete steps.
        num_processes=accelerator.num_processes * arguments.gradient_accumulation,
        seed=arguments.seed,
    )
    loader = DataLoader(
        SubstitutingDataset(dataset) if arguments.on_bad_data == "skip" else dataset,
        batch_sampler=sampler,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    batch = arguments.batch_size
    if arguments.recipe == "default":
        batch *= arguments.gradient_accumulation * accelerator.num_processes
    if arguments.learning_rate is None:
        arguments.learning_rate = (1e-4 if task == "dis" else 1e-5) * math.sqrt(batch / 4)
    optimizer = torch.optim.AdamW(
        parameter_groups(
            model,
            arguments.learning_rate,
            backbone_learning_rate=arguments.backbone_learning_rate,
            layer_decay=arguments.layer_decay,
            weight_decay=arguments.weight_decay,
            decay_all=arguments.recipe == "upstream",
        )
    )
    average = None
    if arguments.ema_decay:
        average = average_weights(model, arguments.ema_decay)
        average.module.to(accelerator.device)
        accelerator.register_for_checkpointing(average)
    if arguments.compile:
        model.compile()
    criterion = network.criterion
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        processor=processor,
        config=network.config,
        task=task,
        samples=(len(training), 0 if validation is None else len(validation)),
        model=model,
        criterion=criterion,
        average=average,
        optimizer=optimizer,
        loader=loader,
        validation_loader=None
        if validation is None
        else validation_loader(
            validation, processor, accelerator, arguments.num_workers, arguments.on_bad_data == "skip"
        ),
        steps_per_epoch=len(sampler) // sampler.num_processes,
    )


def resume(run: Run) -> None:
    """Continues from a checkpoint where that is wanted, and makes sure that runs do not mix where it is not.

    Raises:
        TrainingError: there is a run and no word of resuming, or nothing to resume it from, or what does not fit.
    """
    arguments, accelerator = run.arguments, run.accelerator
    folder = arguments.output_dir / "checkpoints"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, arguments.output_dir, arguments.output_dir / "best", arguments.output_dir / "samples"):
            remove_leftovers(place)
    accelerator.wait_for_everyone()
    checkpoints = list_checkpoints(folder)
    if checkpoints and arguments.resume is None:
        raise TrainingError(f"{folder} has checkpoints: pass --resume, or choose another --output-dir.")
    if not checkpoints and arguments.resume in (None, "latest") and any(arguments.output_dir.glob("*.safetensors")):
        raise TrainingError(
            f"{arguments.output_dir} holds a network, which this run would replace, and no checkpoint to go on from: choose "
            "another --output-dir. To train it further, pass it as --model."
        )
    checkpoint = None
    if arguments.resume == "latest":
        checkpoint = checkpoints[-1] if checkpoints else None
        if checkpoint is None:
            logger.info("There is no checkpoint in %s: starting with the first step.", folder)
    elif arguments.resume is not None:
        checkpoint = Path(arguments.resume)
    if checkpoint is not None:
        state = read_checkpoint(checkpoint, run.settings, architecture(run.config))
        rates = [
            {name: group[name] for name in ("initial_lr", "weight_decay")} for group in run.optimizer.param_groups
        ]
        try:
            accelerator.load_state(str(checkpoint))
        except ValueError as error:
            raise TrainingError(
                f"{checkpoint} has other groups of parameters to optimise ({error}): continue it with its own "
                "--backbone-learning-rate, --layer-decay and --freeze-backbone, and a --weight-decay of zero where it was."
            ) from error
        # The optimiser's state brings its own, which would win over what was changed on the command line.
        for group, own in zip(run.optimizer.param_groups, rates, strict=True):
            group.update(own)
        run.step, run.history, run.seconds = state["step"], state["history"], state["seconds"]
        if run.step > run.total_steps:
            raise TrainingError(
                f"{checkpoint} has done {run.step} steps, more than the {run.total_steps} of these settings: give --epochs "
                "as large as before, or an earlier checkpoint to --resume."
            )
        run.gone = {record["step"] for record in run.history} - {step_of_best(arguments.output_dir / "best")}
        logger.info("Continuing from %s, after step %d of %d.", checkpoint, run.step, run.total_steps)
    if accelerator.is_main_process:
        trim_log(run)


def step_of_best(folder: Path) -> int | None:
    """The step whose weights the folder holds; None where that is not known."""
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def trim_log(run: Run) -> None:
    """Removes from log.jsonl what was logged after the step where the run stands: it will be done again."""
    path = run.arguments.output_dir / "log.jsonl"
    if not path.exists():
        return
    # An interruption may have left half a line, without its end.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if run.step and json.loads(line)["step"] <= run.step]
    with staged_files(path.parent) as staging:
        (staging / path.name).write_text("".join(kept), encoding="utf-8")


def start_trackers(run: Run) -> None:
    """Opens the trackers, with the settings that they can show."""
    settings = {name: value for name, value in run.settings.items() if isinstance(value, int | float | str)}
    run.accelerator.init_trackers("birefnet", config=settings)


def log(run: Run, values: Mapping[str, float]) -> None:
    """Writes numbers of a step to log.jsonl and the trackers."""
    run.accelerator.log(dict(values), step=run.step)
    if run.accelerator.is_main_process:
        with open(run.arguments.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **values}) + "\n")


class Meter:
    """Sums up what the log shows of a stretch of steps."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.batches = 0
        self.since = time.monotonic()

    def add(self, outputs: BiRefNetImageSegmentationOutput) -> None:
        """Counts a batch, without waiting for the device."""
        for name, value in {"loss": outputs.loss.detach(), **outputs.loss_terms}.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.batches += 1

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Of all processes, of each number that was added."""
        means = {name: total / self.batches for name, total in self.totals.items()}
        return {name: float(value) for name, value in accelerator.reduce(means, "mean").items()}


def train(run: Run) -> None:
    """The training loop: from the step where the run stands to the last one.

    Raises:
        TrainingError: a file cannot be read, the loss is not finite, a checkpoint cannot be saved.
    """
    arguments, accelerator = run.arguments, run.accelerator
    started = time.monotonic() - run.seconds
    if run.step == 0 and run.validation_loader is not None:
        validate(run)
    hidden = None if accelerator.is_main_process else True  # None: shown on a terminal only
    with tqdm(total=run.total_steps, initial=run.step, unit="step", disable=hidden) as progress:
        for epoch in range(run.step // run.steps_per_epoch, arguments.epochs):
            loader = start_epoch(run, epoch)
            meter = Meter()
            for number, batch in enumerate(read(loader), start=run.step * arguments.gradient_accumulation):
                outputs, norm = train_batch(run, batch, number)
                meter.add(outputs)
                if not accelerator.sync_gradients:
                    continue
                run.step += 1
                if run.average is not None:
                    run.average.update_parameters(accelerator.unwrap_model(run.model))
                progress.update()
                run.seconds = time.monotonic() - started
                if run.step % arguments.log_steps == 0 or run.step % run.steps_per_epoch == 0:
                    log_step(run, meter, norm, progress)
                    meter = Meter()
                paused = time.monotonic()
                saves = is_due(run, arguments.checkpoint_steps)
                if meter.batches and saves:
                    check_finite(run, meter.means(accelerator)["loss"], norm)
                if run.validation_loader is not None and is_due(run, arguments.validation_steps):
                    validate(run)
                if saves:
                    checkpoint(run)
                meter.since += time.monotonic() - paused


def is_due(run: Run, every: int | None) -> bool:
    return run.step % (every or run.steps_per_epoch) == 0 or run.step == run.total_steps


def start_epoch(run: Run, epoch: int) -> DataLoader:
    """Sets the epoch's loss weights, and returns the batches that are left of it."""
    arguments = run.arguments
    last_epochs = arguments.last_epochs
    if last_epochs is None and arguments.recipe == "default":
        last_epochs = arguments.epochs // 10
    run.criterion.weights = loss_weights(
        run.task, epoch + 1, arguments.epochs, last_epochs=last_epochs, compounding=arguments.recipe == "upstream"
    )
    if epoch == 0 and run.criterion.weights != loss_weights(run.task):
        logger.warning(
            "All %d epochs have the losses of the last ones: give --last-epochs, 0 for none.", arguments.epochs
        )
    set_training_mode(run.model, arguments.batch_norm == "frozen")
    run.loader.set_epoch(epoch)
    steps_done = run.step - epoch * run.steps_per_epoch
    return skip_first_batches(run.loader, steps_done * arguments.gradient_accumulation) if steps_done else run.loader


def read(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """The batches; a picture that cannot be read ends the run by name."""
    try:
        yield from loader
    except ImageLoadError as error:
        raise TrainingError(
            f"{error}\nRepair or remove it and continue with --resume, or leave such files out with --on-bad-data skip."
        ) from error


def train_batch(
    run: Run, batch: dict[str, torch.Tensor], number: int
) -> tuple[BiRefNetImageSegmentationOutput, torch.Tensor | None]:
    """Forward, backward and, with the last batch of a step, the optimiser. Returns the outputs and the gradient's norm.

    Args:
        run: the run.
        batch: of one process.
        number: how many batches came before in the whole run.
    """
    arguments, accelerator = run.arguments, run.accelerator
    seed_step(arguments.seed, number, accelerator.process_index)
    factor = schedule_factor(
        arguments.schedule,
        run.step,
        run.total_steps,
        warmup_steps=round(arguments.warmup * run.total_steps),
        milestones=[epoch * run.steps_per_epoch for epoch in arguments.milestones],
        milestone_factor=arguments.milestone_factor,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    norm = None
    with accelerator.accumulate(run.model):
        with accelerator.autocast():  # which a model that FSDP has sharded does not bring along
            try:
                outputs = run.model(**batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise TrainingError(
                    "BatchNorm has one value of each channel to normalise: give --batch-norm frozen, or a larger "
                    "--batch-size or --size."
                ) from error
        accelerator.backward(outputs.loss)
        if accelerator.sync_gradients and arguments.max_grad_norm:
            norm = accelerator.clip_grad_norm_(run.model.parameters(), arguments.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return outputs, norm


def check_finite(run: Run, loss: float, norm: torch.Tensor | None) -> None:
    """Raises TrainingError before anything is saved that has learned from infinite numbers.

    Under fp16 the scaled gradient may overflow now and then: such a step is left out.
    """
    overflows = norm is not None and run.accelerator.mixed_precision != "fp16" and not math.isfinite(float(norm))
    if overflows or not math.isfinite(loss):
        raise TrainingError(
            f"The loss is {loss} at step {run.step}{', its gradient infinite' if overflows else ''}. Continue from an "
            "earlier checkpoint (--resume FOLDER) with a lower --learning-rate or --max-grad-norm or, with fp16, bf16."
        )


def log_step(run: Run, meter: Meter, norm: torch.Tensor | None, progress: tqdm) -> None:
    """Logs loss, its terms, learning rate, gradient and speed.

    Raises:
        TrainingError: the loss is not finite.
    """
    values = {f"train/{name}": value for name, value in meter.means(run.accelerator).items()}
    check_finite(run, values["train/loss"], norm)
    images = meter.batches * run.arguments.batch_size * run.accelerator.num_processes
    values["train/images_per_second"] = images / (time.monotonic() - meter.since)
    values["train/learning_rate"] = run.optimizer.param_groups[0]["lr"]
    values["train/epoch"] = run.step / run.steps_per_epoch
    if norm is not None:
        values["train/gradient_norm"] = float(norm)
    speed = f"{values['train/images_per_second']:.1f}"
    progress.set_postfix(loss=f"{values['train/loss']:.3f}", images_per_second=speed)
    if progress.disable:  # no terminal
        logger.info("Step %d of %d: loss %.3f, %s images/s", run.step, run.total_steps, values["train/loss"], speed)
    log(run, values)


def validate(run: Run) -> None:
    """Measures the network on the validation data, and keeps it where it is the best so far."""
    arguments, accelerator = run.arguments, run.accelerator
    model = run.model if run.average is None else run.average.module
    if run.average is not None and accelerator.num_processes > 1:
        for buffer in model.buffers():  # the BatchNorm statistics of each process are its own; DDP shares its model's
            broadcast(buffer)
    summary, pictures = measure(
        model,
        read(run.validation_loader),
        run.processor,
        accelerator,
        metrics=arguments.metrics,
        task=run.task,
        sample_pictures=arguments.sample_pictures,
    )
    set_training_mode(run.model, arguments.batch_norm == "frozen")
    run.history.append({"step": run.step, **summary})
    logger.info("Step %d, validation: %s", run.step, ", ".join(f"{k} {v:.4f}" for k, v in summary.items()))
    log(run, {f"validation/{name}": value for name, value in summary.items()})
    if accelerator.is_main_process and pictures is not None:
        with staged_files(arguments.output_dir / "samples") as staging:
            Image.fromarray(pictures).save(staging / f"step-{run.step:08d}.png")
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({"validation": pictures[None]}, step=run.step, **layout)
    if run.step > 0 and run.best["step"] == run.step:
        save_model(run, arguments.output_dir / "best", run.best)


def checkpoint(run: Run) -> None:
    """Saves the state of the run."""
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "history": run.history,
        "settings": run.settings,
        "config": architecture(run.config),
    }
    save_checkpoint(
        run.accelerator, run.arguments.output_dir / "checkpoints", run.step, state, run.arguments.keep_checkpoints
    )


def save_model(run: Run, folder: Path, results: Mapping[str, Any]) -> None:
    """Saves the network (or its adapters) with image processor, card and results, for `from_pretrained` and the pipelines.

    Raises:
        TrainingError: they cannot be written.
    """
    arguments, accelerator = run.arguments, run.accelerator
    network = run.network
    weights = None if run.average is not None else accelerator.get_state_dict(run.model)
    if not accelerator.is_main_process:
        return
    try:
        with staged_files(folder) as staging:
            if not arguments.lora_rank:
                network.save_pretrained(staging, state_dict=weights)
            elif not arguments.merge_lora:
                network.save_pretrained(staging)
            else:
                network.save_pretrained(staging / "adapter")
                run.processor.save_pretrained(staging / "adapter")
                copy.deepcopy(network).merge_and_unload().save_pretrained(staging)
            run.processor.save_pretrained(staging)
            (staging / "README.md").write_text(write_card(run), encoding="utf-8")
            (staging / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        is_adapter = arguments.lora_rank and not arguments.merge_lora
        for pattern in MODEL_FILES if is_adapter else ADAPTER_FILES:  # from before --merge-lora was given or left out
            for path in folder.glob(pattern):
                path.unlink()
        if not arguments.merge_lora:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
    # Of the same kinds as when a checkpoint cannot be saved.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"The model could not be saved in {folder} ({error}). Checkpoints are intact: make room, then --resume."
        ) from error


def write_card(run: Run) -> str:
    """The model card: what it is, how to use it, from what and how it was trained, how good it is."""
    arguments = run.arguments
    name = arguments.push_to_hub or arguments.output_dir.name
    header = {"library_name": "transformers", "pipeline_tag": "image-segmentation", "tags": ["birefnet"]}
    header["tags"] += ["background-removal", *(["lora"] if arguments.lora_rank else [])]
    if arguments.model:
        base = resolve_checkpoint(arguments.model)
        known = get_checkpoint(base)
        if known or not Path(base).exists():  # the Hub refuses cards that name a folder
            header |= {"base_model": known.hub_id if known else base}
        header |= {"license": known.licence.lower()} if known else {}
    started = (
        f"from `{arguments.model}`" if arguments.model else f"from scratch, with backbone `{run.config.backbone}`"
    )
    if arguments.pretrained_backbone:
        started += " (timm's pretrained weights)"
    data = f"`{arguments.data}`" + (f" ({', '.join(arguments.subsets)})" if arguments.subsets else "")
    if arguments.cutouts:
        data += ", cut-outs composed over " + ("photographs and " if arguments.backgrounds else "")
        data += "generated backgrounds, anew in each epoch"
    if arguments.more_cutouts:
        data += f", and pictures composed of the cut-outs in `{arguments.more_cutouts}`, anew in each epoch"
    lines = [
        f"# {name}",
        "",
        f"A BiRefNet (arXiv:2401.03407) for foreground masks, trained {started} with birefnet_hf's `scripts/train.py`.",
        "",
        "```python",
        "from birefnet_hf import load_pipeline",
        "",
        f'cutout = load_pipeline("{arguments.push_to_hub or f"path/to/{name}"}")("photo.jpg")',
        "```",
        "",
        "## Data",
        "",
        f"{run.samples[0]} samples of {data}; {run.samples[1]} for validation"
        + (", held out from them" if arguments.validation_fraction else "")
        + (f", from `{arguments.validation_data}`" if arguments.validation_data else "")
        + f". Input size {dict(run.processor.size)}.",
        "",
        "## Metrics",
        "",
    ]
    if run.history:
        rows = {"before training": run.history[0], "best": run.best, "last": run.history[-1]}
        names = list(dict.fromkeys(name for record in rows.values() for name in record if name != "step"))
        lines += ["| | step | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
        for title, record in rows.items():
            numbers = " | ".join(f"{record[name]:.4f}" if name in record else "–" for name in names)
            lines.append(f"| {title} | {record['step']} | {numbers} |")
        lines += ["", f"Best by {arguments.best_metric}. On the validation data, at the masks' own sizes:", ""]
        own = {"loss": f"the {run.task} preset on the last output"}
        for metric in names:
            lines.append(
                f"- {metric}: " + (own.get(metric) or f"{METRICS[metric].raw}; {METRICS[metric].aggregation}")
            )
    else:
        lines.append("Not measured: there were no validation data.")
    lines += ["", "## Settings", "", f"{run.step} steps of {run.batch_size} images, {run.seconds:.0f} s."]
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in run.settings.items() if value is not None]
    return "---\n" + yaml.safe_dump(header, sort_keys=False) + "---\n\n" + "\n".join(lines) + "\n"


def finish(run: Run) -> None:
    """Saves the result, its numbers, and uploads it where that is wanted."""
    arguments = run.arguments
    results = {"steps": run.step, "images_per_step": run.batch_size, "seconds": run.seconds}
    if run.history:
        results |= {"before": run.history[0], "best": run.best, "last": run.history[-1]}
    save_model(run, arguments.output_dir, results)
    if not run.accelerator.is_main_process:
        return
    logger.info("Saved to %s.", arguments.output_dir)
    if arguments.push_to_hub:
        api = HfApi()
        api.upload_folder(
            repo_id=api.create_repo(arguments.push_to_hub, exist_ok=True).repo_id,  # with the owner
            folder_path=arguments.output_dir,
            ignore_patterns=IGNORED_ON_THE_HUB,
            commit_message="Trained with birefnet_hf",
        )
        logger.info("Uploaded to %s.", arguments.push_to_hub)


def make_accelerator(arguments: argparse.Namespace) -> Accelerator:
    trackers = arguments.trackers
    if trackers is None:
        trackers = [name for name in TRACKERS[:1] if importlib.util.find_spec(name)]
    if missing := [name for name in trackers if importlib.util.find_spec(name) is None]:
        raise ValueError(f"Not installed: pip install {' '.join(missing)}, or choose other --trackers.")
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        log_with=trackers or None,
        project_config=ProjectConfiguration(str(arguments.output_dir), logging_dir=str(arguments.output_dir / "logs")),
    )
    check_processes(accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed-precision fp16 is for GPUs, and would do nothing on a CPU: use bf16 or no.")
    # A launcher's environment may say something else, of which the number of steps here would not know.
    accelerator.gradient_accumulation_steps = arguments.gradient_accumulation
    set_up_sharding(accelerator, arguments)
    return accelerator


def set_up_sharding(accelerator: Accelerator, arguments: argparse.Namespace) -> None:
    """Tells FSDP or DeepSpeed what they need to know, where `accelerate config` has switched one of them on.

    Both would cast all weights for mixed precision, and BatchNorm cannot have weights of half precision beside its
    float32 statistics. Autocast does what is wanted, as on one device.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = arguments.batch_size
        settings["gradient_accumulation_steps"] = arguments.gradient_accumulation
        settings["gradient_clipping"] = arguments.max_grad_norm
        settings["zero_allow_untested_optimizer"] = True
        half = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
        if half is not None:
            settings[accelerator.mixed_precision]["enabled"] = False
            settings["torch_autocast"] = {"enabled": True, "dtype": half}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    accelerator = None
    try:
        accelerator = make_accelerator(arguments)
        logging.getLogger("birefnet_hf").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        run = set_up(arguments, accelerator)
        resume(run)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("Interrupted before the first step.")
        return 130
    parameters = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    logger.info(
        "%d samples, %d steps of %d images in %d epochs; %.2f million trainable parameters; %s, %s, %d process(es).",
        run.samples[0],
        run.total_steps,
        run.batch_size,
        arguments.epochs,
        parameters / 1e6,
        accelerator.device,
        accelerator.mixed_precision,
        accelerator.num_processes,
    )
    try:
        start_trackers(run)
        train(run)
        finish(run)
    except KeyboardInterrupt:
        logger.error(
            "Interrupted after step %d: the same command with --resume goes on from the last checkpoint.", run.step
        )
        return 130
    except (TrainingError, OSError) as error:  # the latter from logs and sample pictures, on a full disk
        logger.error("%s", error)
        return 1
    finally:
        accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
