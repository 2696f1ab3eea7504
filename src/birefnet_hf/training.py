"""Parts of a training run: parameter groups, schedule, averaged weights, adapters, backbones, validation, checkpoints.

What a run does at a step follows from the step's number wherever that is possible (learning rate, random numbers), so
that little has to be saved and an interrupted run can be continued exactly.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig

from .backbone_timm_birefnet import TIMM_NAMES
from .configuration_birefnet import BiRefNetConfig
from .data import SampleKey, TrainingDataset, seeded_random
from .image_loading import PARTIAL_PREFIX, ImageLoadError
from .image_processing_birefnet import BiRefNetImageProcessor
from .loss_birefnet import BiRefNetLoss
from .metrics import Metric, compute_metrics, summarize
from .modeling_birefnet import BiRefNetForImageSegmentation


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

Schedule = Literal["constant", "cosine", "step"]

STATE_NAME = "training_state.json"

# Settings that decide what lies in a checkpoint or where in the data it stands: they cannot change in between.
_FIXED_SETTINGS = (
    "processes",
    "samples",
    "batch_size",
    "gradient_accumulation",
    "lora_rank",
    "uses_average",
    "mixed_precision",
)

# Settings that do not change what a trained network computes.
NO_ARCHITECTURE = (
    "freeze_backbone",
    "image_size",
    "loss_task",
    "drop_path_rate",
    "attention_block_dropout",
    "initializer_range",
)

# Swin v1 in timm, by the checkpoints that upstream starts from (config.py of the reference).
_TIMM_SWIN_NAMES = {
    "swin_v1_t": "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_v1_s": "swin_small_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_v1_b": "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
    "swin_v1_l": "swin_large_patch4_window12_384.ms_in22k_ft_in1k",
}

# The output layers, each a convolution to one channel.
_HEADS = ("mask_head", "side_head", "gradient_head", "attention_head")

# In a row of that many unreadable files something else is wrong.
_MOST_SUBSTITUTES = 20

# What validation measures beside `METRICS`, described alike. It always measures IoU, too.
OWN_METRICS = {
    "loss": Metric(
        "loss", False, "from 0", *["the task's preset, last output only"] * 2, "mean over images", "loss_birefnet.py"
    ),
}


class TrainingError(RuntimeError):
    """A run cannot go on. The message says why, and what to do."""


def check_processes(number: int) -> None:
    """Makes sure that Accelerate sees all processes which a launcher has started: else each would write what all write.

    Args:
        number: how many it sees.

    Raises:
        ValueError: there are others.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != number:
        raise ValueError(
            f"{launched} processes were started, but Accelerate sees {number}: on CPUs set ACCELERATE_USE_CPU=true."
        )


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    backbone_learning_rate: float | None = None,
    layer_decay: float = 1.0,
    weight_decay: float = 1e-2,
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters into groups for an optimiser, by learning rate and weight decay.

    Args:
        model: network, possibly with adapters.
        learning_rate: of all parameters but the backbone's.
        backbone_learning_rate: of the backbone's last stage; the same when absent.
        layer_decay: each earlier stage of the backbone (each block of DINOv3) learns this much slower than the next.
        weight_decay: of matrices and kernels.
        decay_all: also decay biases and the parameters of norms, as upstream does.

    Returns:
        Groups with "params", "lr", "weight_decay" and "initial_lr", in an order that depends on the model only.
    """
    backbone_learning_rate = learning_rate if backbone_learning_rate is None else backbone_learning_rate
    named = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad]
    # The first number in a name is the stage's, in Swin, PVT, ResNet and VGG, or the block's, in DINOv3.
    numbers = {
        name: int(found[1])
        for name, _ in named
        if name.startswith("backbone.") and (found := re.search(r"\.(\d+)\.", name))
    }
    first, last = min(numbers.values(), default=0), max(numbers.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        rate = learning_rate
        if name.startswith("backbone."):
            rate = backbone_learning_rate * layer_decay ** (last - numbers.get(name, first))
        decay = weight_decay if decay_all or parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def schedule_factor(
    schedule: Schedule,
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    milestones: Sequence[int] = (),
    milestone_factor: float = 0.1,
) -> float:
    """What the learning rate is multiplied with in a step: linear warm-up, then the schedule.

    Args:
        schedule: "constant", "cosine" (down to 0 after the last step) or "step".
        step: number of the optimiser step, from 0.
        total_steps: how many there are.
        warmup_steps: how many the warm-up takes.
        milestones: for "step", the steps from which on the rate is multiplied once more with `milestone_factor`.
        milestone_factor: see there.

    Raises:
        ValueError: the schedule is unknown.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
        case "step":
            return milestone_factor ** sum(step >= milestone for milestone in milestones)
    raise ValueError(f"There is no schedule {schedule!r}: choose constant, cosine or step.")


def seed_step(*numbers: int) -> None:
    """Seeds all global random numbers (those of dropout and stochastic depth on all devices) from non-negative integers."""
    seed, short_seed = np.random.SeedSequence(numbers).generate_state(2, np.uint64)
    torch.manual_seed(int(seed))
    np.random.seed(int(short_seed) % 2**32)
    random.seed(int(short_seed))


def set_training_mode(model: nn.Module, freeze_batch_norm: bool = False) -> None:
    """`model.train()`, but what is frozen stays in evaluation mode.

    A module without a trainable parameter has no dropout, and its batch normalisation neither uses nor counts the
    batch: features of a frozen backbone do not drift, and adapters fit the statistics they were trained with.

    Args:
        model: the network.
        freeze_batch_norm: let all batch normalisations use their running statistics, also those with trainable weights.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        is_frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if is_frozen or (freeze_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it as an exponential moving average, of the BatchNorm statistics as well.

    The decay grows with the number n of updates, (1 + n) / (10 + n) up to `decay`, so that the first weights are soon
    forgotten. Call `update_parameters(model)` after each step; the network is in `.module`, in evaluation mode.
    """

    def average(averages: list[torch.Tensor], currents: list[torch.Tensor], count: torch.Tensor | int) -> None:
        if averages[0].is_floating_point():
            warm_decay = min(decay, (1 + int(count)) / (10 + int(count)))
            get_ema_multi_avg_fn(warm_decay)(averages, currents, count)
        else:  # counters and index tables: the average of equal integers may round to another integer
            for mean, current in zip(averages, currents, strict=True):
                mean.copy_(current)

    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return averaged.requires_grad_(False).eval()


def add_adapters(model: BiRefNetForImageSegmentation, rank: int, alpha: float) -> "PeftModel":
    """Freezes the network and gives each linear layer and convolution a low-rank adapter (Hu et al., arXiv 2106.09685).

    The output heads are trained in full, since a head of one channel has no rank to save. Deformable and grouped
    convolutions, a layer whose weights the network reads instead of calling it, and what is frozen stay as they are.

    Args:
        model: network that was loaded from somewhere, which the adapters refer to.
        rank: of the adapters.
        alpha: their scale is alpha / rank.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model was not loaded, so that adapters would have nothing to be applied to later.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install birefnet-hf[train]") from error
    if not model.config.name_or_path:
        raise ValueError("LoRA adapts a trained network: start from a checkpoint, not from scratch.")

    called = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
        for name, module in model.named_modules()
        # By exact type: what a subclass computes, a plain adapter beside it does not.
        if (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1))
        and module.weight.requires_grad
    ]
    was_training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    targets = sorted(name for name in called if name.rpartition(".")[2] not in _HEADS)
    heads = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()}.intersection(_HEADS))
    base = model.config.name_or_path
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # to be found from any working directory
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "modules_to_save": heads}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about what peft calls
        adapted = get_peft_model(model, LoraConfig(**settings))
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def timm_name_of(name: str, backbone: str) -> str | None:
    """What timm calls a tensor of the backbone; None for one that timm's network does not have (Swin's output norms)."""
    if backbone.startswith("swin"):
        # timm counts the merging of patches to the stage that follows it.
        moved = re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)
        return None if name.startswith("norms.") else moved
    if backbone.startswith("pvt"):
        for ours, theirs in (("patch_embeds", "downsample"), ("blocks", "blocks"), ("norms", "norm")):
            name = re.sub(
                rf"^{ours}\.(\d)\.", lambda match, theirs=theirs: f"stages.{int(match[1]) - 1}.{theirs}.", name
            )
        return name.replace("stages.0.downsample.", "patch_embed.")
    if backbone.startswith("dino"):
        return name.removeprefix("model.")
    if backbone.startswith("tf_efficientnet"):
        for ours, theirs in (("stages.0.0.", "conv_stem."), ("stages.0.1.", "bn1."), ("stages.0.2.", "blocks.")):
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        return re.sub(r"^stages\.\d\.", "blocks.", name)
    if backbone.startswith("vgg"):
        return re.sub(r"^stages\.\d\.", "features.", name)
    for ours, theirs in (("stages.0.0.", "conv1."), ("stages.0.1.", "bn1."), ("stages.0.4.", "layer1.")):
        name = name.replace(ours, theirs) if name.startswith(ours) else name
    return re.sub(r"^stages\.(\d)\.", lambda match: f"layer{int(match[1]) + 1}.", name)


def copy_timm_weights(model: BiRefNetForImageSegmentation, timm_model: nn.Module) -> None:
    """Copies the weights of timm's network of the same architecture into the backbone.

    Raises:
        ValueError: the networks do not fit.
    """
    theirs = timm_model.state_dict()
    names = {name: timm_name_of(name, model.config.backbone) for name in model.backbone.state_dict()}
    missing = [name for name in names.values() if name is not None and name not in theirs]
    if missing:
        raise ValueError(f"timm's network has no {missing[:3]}: this version of timm names its tensors otherwise.")
    model.backbone.load_state_dict(
        {name: theirs[timm_name] for name, timm_name in names.items() if timm_name is not None}, strict=False
    )


def load_timm_weights(
    model: BiRefNetForImageSegmentation, file: str | Path | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gives the backbone the weights that timm has for it, pretrained on image classification or by DINOv3.

    Args:
        model: its backbone is changed in place.
        file: timm's checkpoint of the whole classifier, where it shall not be downloaded.

    Returns:
        The mean and the standard deviation of each colour that the backbone was trained with, for pixels in [0, 1].

    Raises:
        ValueError: timm has no weights for this backbone, or the file has other tensors.
        OSError: they cannot be downloaded or read.
    """
    import timm  # takes a second, which few runs need

    backbone = model.config.backbone
    name = (_TIMM_SWIN_NAMES | TIMM_NAMES).get(backbone)
    if name is None:
        raise ValueError(
            f"There are no pretrained weights for backbone={backbone!r}: choose one of "
            f"{', '.join(_TIMM_SWIN_NAMES | TIMM_NAMES)}, or train it from scratch."
        )
    logger.info("Loading the backbone's weights: timm's %s.", name)
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {file} with weights for the backbone.")
    try:
        timm_model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(file)} if file else None
        )
    except RuntimeError as error:
        raise ValueError(f"{file or name} does not hold the weights of timm's {name}: {error}") from error
    copy_timm_weights(model, timm_model)
    return tuple(timm_model.pretrained_cfg["mean"]), tuple(timm_model.pretrained_cfg["std"])


class SubstitutingDataset(Dataset):
    """Replaces a sample that cannot be read by the next one, so that one bad file does not end a long run."""

    def __init__(self, dataset: "TrainingDataset | ValidationDataset") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        number = key.index if isinstance(key, SampleKey) else key
        for offset in range(_MOST_SUBSTITUTES):
            index = (number + offset) % len(self)
            try:
                return self.dataset[key._replace(index=index) if isinstance(key, SampleKey) else index]
            except ImageLoadError as error:
                logger.warning("Replaced by the next sample: %s", error)
        raise ImageLoadError(f"{_MOST_SUBSTITUTES} samples in a row cannot be read, from number {number} on.")


class ValidationDataset(Dataset):
    """The network's input, 1×3×H×W and 1×1×H×W, beside picture and mask. Composites are always the same."""

    def __init__(self, pairs: datasets.Dataset, image_processor: BiRefNetImageProcessor) -> None:
        self.pairs = pairs
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with seeded_random(0, 0, index):
            row = self.pairs[index]
        inputs = self.image_processor(images=row["image"], segmentation_maps=row["mask"], return_tensors="pt")
        return {**inputs, "index": index, "image": np.asarray(row["image"]), "mask": np.asarray(row["mask"])}


def validation_loader(
    pairs: datasets.Dataset,
    image_processor: BiRefNetImageProcessor,
    accelerator: Accelerator,
    num_workers: int,
    substitutes: bool = False,
) -> DataLoader:
    """This process's share of the validation data, one picture at a time.

    The shares are of one length, since the processes of a sharded model must work together: the first pictures may come
    twice, which `measure` takes into account, and with `substitutes` the one after a picture that cannot be read.
    """
    processes = accelerator.num_processes
    share = [
        (accelerator.process_index + processes * number) % len(pairs)
        for number in range(math.ceil(len(pairs) / processes))
    ]
    dataset = ValidationDataset(pairs, image_processor)
    return DataLoader(
        SubstitutingDataset(dataset) if substitutes else dataset,
        sampler=share,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
    )


def _as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    image_processor: BiRefNetImageProcessor,
    accelerator: Accelerator,
    *,
    metrics: Sequence[str],
    task: str,
    sample_pictures: int,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Scores a network, which stays in evaluation mode. To be called by all processes.

    Args:
        model: the network, or what Accelerate made of it.
        loader: from `validation_loader`.
        image_processor: turns logits into alpha.
        accelerator: of the run.
        metrics: names from `METRICS`; IoU and those of `OWN_METRICS` are always measured.
        task: preset of the loss, with its weights from before the last epochs, so that epochs can be compared.
        sample_pictures: how many pictures to show.

    Returns:
        The numbers, and a picture with a row of image, mask and prediction for each of the first samples.
    """
    model.eval()
    criterion = BiRefNetLoss(task)
    records = []
    for sample in loader:
        with accelerator.autocast():
            outputs = model(pixel_values=sample["pixel_values"].to(accelerator.device))
        loss, _ = criterion([outputs.logits], sample["labels"].to(accelerator.device))
        alpha = image_processor.post_process_alpha(outputs, target_sizes=[sample["mask"].shape])[0].cpu().numpy()
        index = sample["index"]
        record = {
            "index": index,
            "metrics": compute_metrics(alpha, sample["mask"], {"iou", *metrics}),
            "loss": float(loss),
        }
        if index < sample_pictures:
            record["picture"] = draw_row(sample["image"], sample["mask"], np.rint(alpha * 255).astype(np.uint8))
        records.append(record)
    by_index = {record["index"]: record for record in gather_object(records)}
    records = [by_index[index] for index in sorted(by_index)]
    summary = {name: float(np.mean([record[name] for record in records])) for name in OWN_METRICS}
    summary |= summarize([record["metrics"] for record in records])
    rows = [record["picture"] for record in records if "picture" in record]
    return summary, stack_rows(rows) if rows else None


def draw_row(*pictures: np.ndarray, side: int = 256) -> np.ndarray:
    """Pictures of one size side by side, each shrunk or enlarged into a column: (at most side, number * side, 3) uint8.

    Args:
        *pictures: (height, width) or (height, width, 3) uint8.
        side: width of a column, which is grey beside a narrow picture, and largest height.
    """
    scale = side / max(pictures[0].shape[:2])
    height, width = (max(1, round(length * scale)) for length in pictures[0].shape[:2])
    row = Image.new("RGB", (len(pictures) * side, height), (128, 128, 128))
    for column, picture in enumerate(pictures):
        resized = Image.fromarray(picture).convert("RGB").resize((width, height))
        row.paste(resized, (column * side + (side - width) // 2, 0))
    return np.asarray(row)


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one width, (height, width, 3) uint8, below each other with black between them."""
    return np.vstack([np.pad(row, ((0, 4), (0, 0), (0, 0))) for row in rows])


def remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted `staged_files` or `save_checkpoint` left behind."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, from old to new."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_NAME).is_file())


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Saves all that a run needs to be continued, and removes the oldest checkpoints beyond `keep`.

    A checkpoint `step-<number>` appears when it is complete, and only then older ones go: an interruption at any time
    leaves the last complete one. To be called by all processes.

    Args:
        accelerator: has prepared model and optimiser, and knows what else has a state.
        folder: where the checkpoints are.
        step: number of optimiser steps done.
        state: what else to save, for JSON.
        keep: number of checkpoints to keep.

    Raises:
        TrainingError: it cannot be written, for example since the disk is full.
    """
    name = f"step-{step:08d}"
    partial, complete = folder / f"{PARTIAL_PREFIX}{name}", folder / name
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / STATE_NAME).write_text(json.dumps(dict(state), indent=2), encoding="utf-8")
            _flush(partial)
            if complete.exists():  # of an earlier run that was resumed from before this step
                _remove(complete)
            os.rename(partial, complete)
            kept = list_checkpoints(folder)
            # Of the line that goes on beyond the checkpoint from which this run was resumed.
            later = [path for path in kept if path.name > name]
            up_to_here = [path for path in kept if path.name <= name]
            for old in [*up_to_here[:-keep], *later]:
                _remove(old)
    # torch reports a full disk as a RuntimeError, safetensors as its own kind of error.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(folder)
        raise TrainingError(
            f"The checkpoint of step {step} could not be saved in {folder} ({error}). "
            + (f"{kept[-1].name} is intact: " if kept else "There is no earlier one: ")
            + "make room, then run the same command with --resume."
        ) from error
    accelerator.wait_for_everyone()


def _flush(folder: Path) -> None:
    """Waits until a folder's files are on the disk, so that not even a power failure leaves a name without content."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    # Renamed first: half of a checkpoint must not look like one.
    doomed = checkpoint.with_name(f"{PARTIAL_PREFIX}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def architecture(config: BiRefNetConfig) -> dict[str, Any]:
    """The settings that decide what a network computes."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in inherited and field.name not in NO_ARCHITECTURE
    }


def read_checkpoint(checkpoint: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the JSON part of a checkpoint and checks that this run can continue it.

    Args:
        checkpoint: folder that `save_checkpoint` wrote.
        settings: those of this run; in the checkpoint under "settings".
        config: the network's; in the checkpoint under "config".

    Raises:
        TrainingError: it is no checkpoint, of another architecture, or of a run with settings that cannot change.
    """
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{checkpoint} is not a checkpoint of this script ({error}).") from error
    other = _differences(state["config"], config)
    if other:
        raise TrainingError(
            f"{checkpoint} belongs to another architecture ({'; '.join(other)}; there and here). Continue it with its "
            "own model settings, or start anew in another --output-dir."
        )
    fixed = _differences(state["settings"], settings, _FIXED_SETTINGS)
    if fixed:
        raise TrainingError(
            f"{checkpoint} cannot be continued with other settings ({'; '.join(fixed)}; there and here)."
        )
    changed = _differences(state["settings"], settings)
    if changed:
        logger.warning(
            "Settings changed since the checkpoint (%s; then and now): the run will not end as it would have.",
            "; ".join(changed),
        )
    return state


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str] | None = None) -> list[str]:
    names = sorted(before.keys() | now.keys()) if names is None else names
    now = json.loads(json.dumps(dict(now)))  # tuples become lists, as in the file
    return [f"{name}: {before.get(name)} and {now.get(name)}" for name in names if before.get(name) != now.get(name)]
