r"""Measures latency, memory and accuracy, each row in a fresh process, and prints a table; `--json FILE` writes it too.

    # Inference: backends × dtypes × sizes, and a checkout of the reference with the same weights:
    python scripts/benchmark.py --backbone swin_v1_t --sizes 512 1024 --dtypes float32 bfloat16 \
        --backends eager compile --reference BiRefNet

    # Against the runtimes people convert it to, which first exports the network at each size (minutes), the checkout's, too:
    python scripts/benchmark.py --backends eager onnxruntime openvino --reference BiRefNet

    # A training step (forward, dis losses, backward, AdamW) against the reference's:
    python scripts/benchmark.py train --backbone swin_v1_t --sizes 512 --batch-size 2 --reference BiRefNet \
        --backends eager checkpointing

    # The network that ships with the package:
    python scripts/benchmark.py --model nano --sizes 512 --reference BiRefNet

    # On a GPU, where the checkout is measured in every way that this package is:
    python scripts/benchmark.py --device cuda --backbone swin_v1_l --sizes 1024 --dtypes float16 --repeats 20 \
        --backends eager compile reduce-overhead --reference BiRefNet

Without --model weights are random, with deformable convolutions that do displace. Rounds alternate between the rows,
each in a process of its own, so that the load of a busy machine falls on all; the median and the minimum over all runs
are given, after a first one that does not count (compilation is part of that; `--no-warm-up` counts it). CPU seconds are
the minimum over all runs, too: on a busy machine, compare these, with `--threads 1`. Peak memory is the process's, on a
GPU what its allocator held. There all processes start at once, since compiling takes minutes, and are timed one by one.
The checkout in bfloat16 is float32 under autocast, since torchvision's deformable convolution lacks bfloat16. The
difference is that of the logits from the first row's of the same size: the reference's where a checkout is given, else
those of this package without its fast paths, in float32.
"""

import argparse
import contextlib
import copy
import itertools
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import load_file

from birefnet_hf import (
    BiRefNetConfig,
    BiRefNetForImageSegmentation,
    backbone_swin_birefnet,
    backbone_timm_birefnet,
    modeling_birefnet,
    ops_birefnet,
)
from birefnet_hf.checkpoints_birefnet import find_model
from birefnet_hf.loss_birefnet import BiRefNetLoss
from birefnet_hf.onnx_birefnet import ONNX_FILE_NAMES, BiRefNetOnnxForImageSegmentation


Row = dict[str, Any]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

RUNTIMES = ("onnxruntime", "openvino")
COMPILE_MODES = {"compile": "default", "reduce-overhead": "reduce-overhead"}


def write_model(model: str | None, settings: dict[str, Any], folder: Path) -> None:
    """Writes the network that all rows measure: a checkpoint's, or a random one with these settings."""
    if model is not None:
        network = BiRefNetForImageSegmentation.from_pretrained(find_model(model), dtype=torch.float32)
    else:
        torch.manual_seed(0)
        network = BiRefNetForImageSegmentation(BiRefNetConfig(**settings))
        displace(network)
    network.save_pretrained(folder)


def build_model(row: Row) -> BiRefNetForImageSegmentation:
    model = BiRefNetForImageSegmentation.from_pretrained(row["model"], dtype=getattr(torch, row["dtype"]))
    model.criterion = BiRefNetLoss("dis", reference=True)
    return model


def build_reference(row: Row) -> torch.nn.Module:
    """The reference's network, from the checkout, with the settings and weights of the row's.

    What the reference has no settings for comes with the weights: channel counts, and the backbone of `nano`.
    """
    sys.path.insert(0, row["reference"])
    import config as reference_config

    ours = BiRefNetConfig.from_pretrained(row["model"])
    channels = list(reversed(ours.feature_channels))
    is_foreign = ours.backbone == "tf_efficientnet_lite0"
    original = reference_config.Config.__init__

    def configure(self) -> None:
        original(self)
        # ResNet-50 is of four parts that are called in turn, too.
        self.bb = "resnet50" if is_foreign else ours.backbone
        self.lateral_channels_in_collection = channels
        self.cxt = channels[1:][::-1][-self.cxt_num :]

    reference_config.Config.__init__ = configure
    from models import birefnet
    from models.modules import aspp

    aspp.ASPPDeformable.__init__.__defaults__ = (None, list(ours.deformable_kernel_sizes))
    if is_foreign:
        parts = {
            f"conv{number}": part
            for number, part in enumerate(backbone_timm_birefnet.build_timm_backbone(ours).stages, start=1)
        }
        birefnet.build_backbone = lambda *args, **kwargs: torch.nn.Sequential(OrderedDict(parts))
    model = birefnet.BiRefNet(bb_pretrained=False)
    own = model.state_dict()
    weights = own | load_file(Path(row["model"]) / "model.safetensors")  # the reference saves constants, too
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            owner, _, part = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, part, type(getattr(module, part))(weights[name]))
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def displace(model: torch.nn.Module) -> None:
    """Gives the convolutions for offsets, which start at zero, random weights that move taps by some pixels."""
    for name, parameter in model.named_parameters():
        if "offset_conv" in name:
            parameter.normal_(std=0.05)


def own_loss(model: BiRefNetForImageSegmentation, precision: contextlib.AbstractContextManager) -> Loss:
    """The training step's loss as this package computes it."""

    def compute(image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision:
            return model(image, labels=labels).loss

    return compute


def reference_loss(model: torch.nn.Module, precision: contextlib.AbstractContextManager) -> Loss:
    """The training step's loss as the checkout computes it: in float32, whatever the network ran in."""
    from loss import PixLoss

    pixel_loss, gradient_loss = PixLoss(), torch.nn.BCELoss()

    def compute(image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision:
            ((predictions, targets), outputs), _ = model(image)
        predictions, targets, outputs = (
            [output.float() for output in maps] for maps in (predictions, targets, outputs)
        )
        loss, _ = pixel_loss(outputs, labels)
        for prediction, target in zip(predictions, targets, strict=True):
            prediction = F.interpolate(prediction, size=target.shape[2:], mode="bilinear", align_corners=True)
            loss = loss + gradient_loss(prediction.sigmoid(), target.sigmoid())
        return loss

    return compute


class LastOutput(torch.nn.Module):
    """The reference's logits, without the maps before them."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values)[-1]


def export(row: Row) -> Row:
    """Writes the ONNX file that rows of the runtimes load."""
    from export_onnx import trace, write

    folder = Path(row["exported"])
    BiRefNetConfig.from_pretrained(row["model"]).save_pretrained(folder)
    if row["is_reference"]:
        image = torch.zeros(row["batch_size"], 3, row["size"], row["size"])
        with torch.no_grad():
            program = torch.export.export(LastOutput(build_reference(row)).eval(), (image,), strict=False)
    else:
        program = trace(build_model(row).eval(), (row["size"], row["size"]), row["batch_size"])
    write(program, folder / ONNX_FILE_NAMES[torch.float32], opset=22)
    return {}


def measure(row: Row) -> Row:
    """What a fresh process does for one row: times `repeats` runs, after a first one unless that is to count."""
    backend, device = row["backend"], torch.device(row["device"])
    is_reference = row["is_reference"]
    if backend == "torchvision":
        choose = ops_birefnet.deform_conv2d.__defaults__
        ops_birefnet.deform_conv2d.__defaults__ = (*choose[:-1], "torchvision")
        for module in (ops_birefnet, modeling_birefnet, backbone_swin_birefnet, backbone_timm_birefnet):
            module.is_plain_inference = lambda feature_map: False
    torch.set_num_threads(row["threads"])
    dtype = getattr(torch, row["dtype"])
    precision = contextlib.nullcontext()
    if backend in RUNTIMES:
        model = BiRefNetOnnxForImageSegmentation.from_pretrained(
            row["exported"], runtime=backend, num_threads=row["threads"]
        )
        is_reference = False  # its file is called as ours is
    elif is_reference:
        model = build_reference(row).to(device)
        if dtype == torch.bfloat16:
            precision, dtype = torch.autocast(device.type, dtype), torch.float32
        model.to(dtype)
    else:
        model = build_model(row).to(device)
    generator = torch.Generator().manual_seed(1)
    shape = (row["batch_size"], 3, row["size"], row["size"])
    image = torch.randn(shape, generator=generator).to(device, dtype)
    if backend in COMPILE_MODES:
        model.compile(mode=COMPILE_MODES[backend])
    elif backend == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    if row["task"] == "train":
        if row["autocast"]:
            precision = torch.autocast(device.type, torch.bfloat16)
        labels = (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5).to(device, dtype)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
        loss_of = (reference_loss if is_reference else own_loss)(model, precision)

        def step() -> torch.Tensor | None:
            optimizer.zero_grad()
            loss_of(image, labels).backward()
            optimizer.step()
    else:
        model.eval()

        @torch.inference_mode()
        def step() -> torch.Tensor | None:
            with precision:
                return model(image)[-1] if is_reference else model(image).logits

    if backend == "graph":
        step = record_graph(step)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(row["warm_up"]):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        print("ready", flush=True)
        sys.stdin.readline()
    seconds, cpu_seconds = [], []
    for _ in range(row["repeats"]):
        start, cpu_start = time.perf_counter(), time.process_time()
        output = step()
        wait()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    if output is not None:
        torch.save(output.float().cpu(), row["output"])
    peak_bytes = torch.cuda.max_memory_reserved() if device.type == "cuda" else peak_resident_bytes()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_bytes / 1e9}


def peak_resident_bytes() -> int:
    """Of this process alone: what getrusage says starts, on Linux, with what the parent had when it forked."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def record_graph(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that replays the kernels of `step`, without the time that launching each takes."""
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


class Worker:
    """A fresh process for one row."""

    def __init__(self, row: Row):
        self.row = row
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        command = [sys.executable, __file__, "--worker", json.dumps(row)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)

    def wait_until_ready(self) -> None:
        while line := self.process.stdout.readline():
            if line.strip() == "ready":
                return

    def finish(self) -> Row:
        output, _ = self.process.communicate("go\n")
        if self.process.returncode:
            self.errors.seek(0)
            name = " ".join(str(self.row[key]) for key in ("backend", "dtype", "size"))
            raise RuntimeError(f"Row {name} failed:\n{self.errors.read()[-2000:]}")
        return json.loads(output.splitlines()[-1])


def run_rows(rows: Sequence[Row], rounds: int) -> list[Row]:
    """Measures all rows `rounds` times in turn. Returns those that ran, with their results."""
    for row in rows:
        if row["backend"] in RUNTIMES and not (Path(row["exported"]) / ONNX_FILE_NAMES[torch.float32]).is_file():
            try:
                Worker(row | {"task": "export"}).finish()
            except RuntimeError as error:  # its rows will fail, and the others are worth having
                print(error, file=sys.stderr)
    for _ in range(rounds):
        workers = map(Worker, rows)  # each starts when it is its turn
        if rows[0]["device"] == "cuda":
            workers = list(workers)
            for worker in workers:
                worker.wait_until_ready()
        for row, worker in zip(rows, workers, strict=True):
            try:
                result = worker.finish()
            except RuntimeError as error:  # the others are worth having
                print(error, file=sys.stderr)
                continue
            for name in ("seconds", "cpu_seconds"):
                row[name] = row.get(name, []) + result[name]
            row["peak_gb"] = max(row.get("peak_gb", 0), result["peak_gb"])
    summarize(rows)
    return [row for row in rows if "seconds" in row]


def summarize(rows: Sequence[Row]) -> None:
    """Adds the figures of the table to rows that were measured."""
    baselines = {}
    for row in rows:
        output = torch.load(row["output"]) if Path(row["output"]).is_file() else None
        baseline = baselines.setdefault(row["size"], output)
        if "seconds" not in row:
            continue
        row["median_s"], row["min_s"] = statistics.median(row["seconds"]), min(row["seconds"])
        row["cpu_s"] = min(row["cpu_seconds"])
        row["images_per_s"] = row["batch_size"] / row["median_s"]
        is_comparable = output is not None and baseline is not None
        row["difference"] = (output - baseline).abs().max().item() if is_comparable else None


def print_table(rows: Sequence[Row]) -> None:
    print("| backend | dtype | size | median s | min s | CPU s | images/s | peak GB | max difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        digits = 4 if row["device"] == "cuda" else 2
        seconds = " | ".join(f"{row[name]:.{digits}f}" for name in ("median_s", "min_s", "cpu_s"))
        print(
            f"| {row['name']} | {'bfloat16 autocast' if row['autocast'] else row['dtype']} | {row['batch_size']}×{row['size']}² | {seconds} "
            f"| {row['images_per_s']:.3f} | {row['peak_gb']:.2f} | {difference} |"
        )


def list_cases(args: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """Backend, precision, and whether it is the reference, for each row of a size; first what differences are from."""
    cases = [("eager", "float32", True) if args.reference else ("torchvision", "float32", False)]
    for backend, dtype in itertools.product(args.backends, args.dtypes):
        if backend in RUNTIMES and dtype != "float32":
            continue
        if args.reference and (backend in RUNTIMES or (args.device == "cuda" and backend != "checkpointing")):
            cases.append((backend, dtype, True))
        cases.append((backend, dtype, False))
    return list(dict.fromkeys(cases))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("inference", "train"), default="inference")
    parser.add_argument("--model", help="Hub id, alias or directory; without it: random weights, and these two")
    parser.add_argument("--backbone", default="swin_v1_t", help="name as in BiRefNetConfig")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of further BiRefNetConfig settings")
    parser.add_argument("--reference", type=Path, help="checkout of ZhengPeng7/BiRefNet, to be measured too")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["eager"],
        choices=("eager", "graph", *COMPILE_MODES, "checkpointing", *RUNTIMES),
        help="how this package runs: graph replays eager's kernels as a CUDA graph, reduce-overhead does so with compiled "
        "ones; checkpointing is for training; the last two run its ONNX file, in float32 on the CPU",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--autocast", action="store_true", help="train with bfloat16 activations")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024], help="pixels, of square images")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs in each process")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="count each process's first run")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.worker is not None:
        work = export if args.worker["task"] == "export" else measure
        print(json.dumps(work(args.worker)))
        return 0
    if args.task == "inference" and "checkpointing" in args.backends:
        raise SystemExit("--backends checkpointing is for training: give the task, benchmark.py train.")
    if args.task == "train" and set(args.backends) & set(RUNTIMES):
        raise SystemExit(f"--backends {' '.join(RUNTIMES)} are for inference.")
    if "graph" in args.backends and (args.device, args.task) != ("cuda", "inference"):
        raise SystemExit("--backends graph is for inference on --device cuda.")
    if args.device == "cuda" and set(args.backends) & set(RUNTIMES):
        raise SystemExit(f"--backends {' '.join(RUNTIMES)} are for --device cpu.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch sees no GPU here.")
    if args.task == "train" and args.dtypes != ["float32"]:
        raise SystemExit("Training is measured in float32, or with --autocast.")
    if args.task == "inference" and args.autocast:
        raise SystemExit("--autocast is for training; inference is measured in --dtypes bfloat16.")
    if "float32" not in args.dtypes and set(args.backends) & set(RUNTIMES):
        raise SystemExit(f"--backends {' '.join(RUNTIMES)} are measured in float32: add it to --dtypes.")
    if min(args.repeats, args.rounds, args.batch_size) < 1:
        raise SystemExit("--repeats, --rounds and --batch-size are at least 1.")
    if args.json is not None and not args.json.parent.is_dir():
        raise SystemExit(f"--json {args.json}: there is no folder {args.json.parent}.")
    if args.autocast and args.reference is not None and args.device == "cpu":
        raise SystemExit(
            "--autocast with --reference is for --device cuda: its deformable convolution has it there alone."
        )
    if args.reference is not None and not (args.reference / "models" / "birefnet.py").is_file():
        raise SystemExit(f"--reference {args.reference} holds no models/birefnet.py: give a checkout of BiRefNet.")
    with tempfile.TemporaryDirectory() as folder:
        write_model(args.model, {"backbone": args.backbone} | args.settings, Path(folder) / "model")
        common = {
            "task": args.task,
            "model": str(Path(folder) / "model"),
            "reference": str(args.reference.resolve()) if args.reference else None,
            "batch_size": args.batch_size,
            "repeats": args.repeats,
            # What is compiled is recorded as a CUDA graph in its second run.
            "warm_up": args.warm_up * (3 if args.device == "cuda" else 1),
            "device": args.device,
            "autocast": args.autocast,
            "threads": args.threads,
        }
        rows = []
        for size in args.sizes:
            for backend, dtype, is_reference in list_cases(args):
                files = {
                    "output": str(Path(folder) / f"{len(rows)}.pt"),
                    "exported": str(Path(folder) / f"onnx_{size}{'_reference' * is_reference}"),
                }
                name = "reference" if is_reference else backend
                if is_reference and backend != "eager":
                    name += f", {backend}"
                row = {"name": name, "backend": backend, "dtype": dtype, "is_reference": is_reference, "size": size}
                rows.append(copy.deepcopy(common) | row | files)
        wanted = len(rows)
        rows = run_rows(rows, args.rounds)
    machine = {
        "machine": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
    }
    print_table(rows)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if args.json is not None:
        hidden = ("model", "output", "exported", "reference")
        content = {**machine, "rows": [{k: v for k, v in row.items() if k not in hidden} for row in rows]}
        args.json.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return 0 if len(rows) == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
