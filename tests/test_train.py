"""scripts/train.py: what a run leaves behind, exact resuming, several processes, adapters, bad data and full disks."""

import argparse
import base64
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import load_script, tiny_settings
from huggingface_hub import ModelCard
from packaging import version
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.data import SampleKey, TrainingDataset, build_augmentation, load_pairs
from birefnet_hf.pipeline_birefnet import load_pipeline
from birefnet_hf.training import (
    add_adapters,
    average_weights,
    copy_timm_weights,
    list_checkpoints,
    parameter_groups,
    schedule_factor,
    set_training_mode,
)


SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
# Without chance, the same sums in another order remain.
WITHOUT_DROPOUT = {"attention_block_dropout": 0.0, "drop_path_rate": 0.0}


train = load_script(SCRIPT)


@pytest.fixture(autouse=True)
def one_thread_and_fresh_accelerate():
    """Accelerate keeps its state for the whole process, but each test is a run of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def draw_pair(number: int, size: int = 48) -> tuple[Image.Image, Image.Image]:
    """A noisy picture with a bright ellipse, and the ellipse."""
    rng = np.random.default_rng(number)
    mask = Image.new("L", (size, size))
    left, top = rng.integers(4, 16, 2).tolist()
    ImageDraw.Draw(mask).ellipse((left, top, left + 24, top + 18), fill=255)
    image = Image.fromarray(rng.integers(0, 120, (size, size, 3), dtype=np.uint8))
    image.paste((230, 200, 60), mask=mask)
    return image, mask


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Eight pairs, among them a greyscale and an RGBA image."""
    root = tmp_path_factory.mktemp("pairs")
    for name in ("im", "gt"):
        (root / name).mkdir()
    for number, mode in enumerate(["RGB", "L", "RGBA", *["RGB"] * 5]):
        image, mask = draw_pair(number)
        image.convert(mode).save(root / "im" / f"{number}.png")
        mask.save(root / "gt" / f"{number}.png")
    return root


def arguments(data: Path, output: Path, *more: object, **model_settings) -> list[str]:
    """A run of 2 epochs of 4 steps."""
    given = [str(item) for item in more]
    if "--model" not in given:
        given += ["--model-settings", json.dumps(tiny_settings(**model_settings))]
    fixed = ["--data", str(data), "--output-dir", str(output), "--epochs", "2", "--batch-size", "2"]
    fixed += ["--num-workers", "0", "--log-steps", "1", "--trackers", "--learning-rate", "1e-3"]
    return [*fixed, *given]


def logged(output: Path, name: str = "train/loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines if name in line]


def curve(output: Path) -> list[float]:
    """Losses and norms of gradients: Adam's steps, and so the losses, hardly depend on the gradients' scale."""
    return logged(output) + logged(output, "train/gradient_norm")


def run_python(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


def assert_equal(one: object, other: object) -> None:
    """Bit-equality of nested states."""
    if isinstance(one, torch.Tensor | np.ndarray):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="birefnet_hf")
    return caplog


class UploadHub(BaseHTTPRequestHandler):
    """Answers an upload as the Hub does, asking for all contents in the commit; `server.files` keeps them."""

    def do_POST(self):
        request = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {}
        if self.path.endswith("/repos/create"):
            self.server.repository = json.loads(request)
            answer = {"url": f"{self.server.url}/me/cutter"}
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(request)["files"]]
            answer = {"files": [file | {"shouldIgnore": False} for file in files]}
        elif "/commit/" in self.path:
            for entry in map(json.loads, request.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": f"{self.server.url}/me/cutter/commit/1", "commitOid": "1"}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine to which the script uploads, with the real client."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), UploadHub)
    server.url, server.files, server.repository = f"http://127.0.0.1:{server.server_port}", {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(train, "HfApi", functools.partial(train.HfApi, endpoint=server.url, token="hf_of_nobody"))
    yield server
    server.shutdown()
    server.server_close()


def test_result_loads_and_is_documented(pairs, tmp_path, hub):
    output = tmp_path / "run"
    more = ["--validation-fraction", 0.25, "--push-to-hub", "me/cutter", "--trackers", "tensorboard"]
    assert train.main(arguments(pairs, output, *more, "--task", "general")) == 0

    for folder in (output, output / "best"):
        model = BiRefNetForImageSegmentation.from_pretrained(folder)
        assert model.config.loss_task == "general"
        assert model.config.image_size == (64, 64)
        photo = draw_pair(0)[0]
        assert load_pipeline(folder)(photo).mode == "RGBA"
        assert load_pipeline(folder, task="image-segmentation")(photo)[0]["mask"].size == photo.size
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["before"]["step"] == 0
    assert results["last"]["step"] == 6
    assert results["best"]["iou"] == max(results[name]["iou"] for name in ("before", "best", "last"))
    with Image.open(output / "samples" / "step-00000006.png") as samples:
        assert samples.size == (3 * 256, 2 * 260)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "6 samples of",
        "2 for validation, held out",
        "| before training | 0 |",
        "| learning_rate | `0.001` |",
    ):
        assert part in card
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert not list(output.rglob(".partial-*"))
    assert hub.repository["name"] == "cutter" and hub.repository["organization"] == "me"
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= hub.files.keys()
    assert not any(name.startswith(("best", "checkpoints", "logs", "samples", ".")) for name in hub.files)
    for name, content in hub.files.items():
        assert content == (output / name).read_bytes()
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.pipeline_tag == "image-segmentation" and card.data.base_model is None
    assert 'load_pipeline("me/cutter")' in card.text
    assert train.main(arguments(pairs, output, *more)) == 1  # a finished run is not overwritten


KILL_WHILE_SAVING = """
import os, signal, sys
sys.path[:0] = [{scripts!r}]
import torch, train
torch.set_num_threads(1)
original, calls = train.Accelerator.save_state, []
def save_state(self, folder):
    original(self, folder)
    calls.append(folder)
    if len(calls) == 2:
        path = os.path.join(folder, "optimizer.bin")
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
train.Accelerator.save_state = save_state
train.main({argv!r})
"""


def test_resume_is_exact_after_sigkill_while_saving(pairs, tmp_path):
    """Dropout, augmentation, sizes, momentum, average and learning rate go on as if nothing had happened."""
    more = ["--checkpoint-steps", 2, "--dynamic-size", 64, 96, "--validation-fraction", 0.01]
    more += ["--batch-size", 1, "--gradient-accumulation", 2, "--keep-checkpoints", 9, "--metrics", "mae"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main(arguments(pairs, whole, *more)) == 0

    argv = arguments(pairs, broken, *more)
    killed = run_python("-c", KILL_WHILE_SAVING.format(scripts=str(SCRIPT.parent), argv=argv))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # 3 steps an epoch: the last complete checkpoint is from within the first, half of another from within the second.
    assert [path.name for path in list_checkpoints(broken / "checkpoints")] == ["step-00000002"]
    assert list((broken / "checkpoints").glob(".partial-*"))
    assert train.main([*argv, "--resume"]) == 0
    assert not list((broken / "checkpoints").glob(".partial-*"))

    names = [path.name for path in list_checkpoints(whole / "checkpoints")]
    assert names == [path.name for path in list_checkpoints(broken / "checkpoints")] and len(names) == 3
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"):
        load = load_file if file.endswith("safetensors") else lambda path: torch.load(path, weights_only=False)
        states = [load(folder / "checkpoints" / names[-1] / file) for folder in (whole, broken)]
        assert_equal(*states)
    assert_equal(load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors"))
    assert logged(whole) == logged(broken)


@pytest.fixture(scope="module")
def curve_of_batch_4(pairs, tmp_path_factory) -> list[float]:
    output = tmp_path_factory.mktemp("batch4") / "run"
    more = ["--batch-size", 4, "--batch-norm", "frozen"]
    assert train.main(arguments(pairs, output, *more, **WITHOUT_DROPOUT)) == 0
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return curve(output)


def run_two_processes(program: Path, *argv: str) -> subprocess.CompletedProcess:
    """Over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    finished = run_python(*launcher, str(program), *argv)
    assert finished.returncode == 0, finished.stderr
    assert "2 process(es)" in finished.stderr
    return finished


def test_two_processes_are_one_with_the_doubled_batch(pairs, tmp_path, curve_of_batch_4):
    """With BatchNorm frozen: else each process normalises by its own half, see the last but one test."""
    run_two_processes(SCRIPT, *arguments(pairs, tmp_path / "run", "--batch-norm", "frozen", **WITHOUT_DROPOUT))
    assert curve(tmp_path / "run") == pytest.approx(curve_of_batch_4, rel=1e-4)


# Accelerate shards on accelerators only, though FSDP and DeepSpeed can on CPUs, too: it is told of one.
SHARDED = """
import os, sys
sys.path[:0] = [{scripts!r}]
import train
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
if {kind!r} == "fsdp":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    os.environ["ACCELERATE_USE_FSDP"] = "true"
else:
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)  # not to compile any
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_sharded_training_is_the_same_and_resumes(kind, pairs, tmp_path, monkeypatch, curve_of_batch_4):
    """With the settings that `accelerate launch` makes of scripts/accelerate/, in float32."""
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = SCRIPT.parent / "accelerate" / f"{kind}.yaml"
    for name, value in yaml.safe_load(file.read_text(encoding="utf-8"))[f"{kind}_config"].items():
        name = name.upper().replace("LAYER_CLS", "CLS") if kind == "fsdp" else f"ACCELERATE_DEEPSPEED_{name.upper()}"
        monkeypatch.setenv(name, str(value).lower() if isinstance(value, bool) else str(value))
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED.format(scripts=str(SCRIPT.parent), kind=kind), encoding="utf-8")
    output = tmp_path / "run"
    argv = arguments(pairs, output, "--batch-norm", "frozen", "--ema-decay", 0, **WITHOUT_DROPOUT)

    run_two_processes(program, *argv)
    assert curve(output) == pytest.approx(curve_of_batch_4, rel=1e-4)
    assert BiRefNetForImageSegmentation.from_pretrained(output).num_parameters() > 0
    weights = load_file(output / "model.safetensors")
    shutil.rmtree(list_checkpoints(output / "checkpoints")[-1])
    (output / "model.safetensors").unlink()
    run_two_processes(program, *argv, "--resume")
    assert_equal(load_file(output / "model.safetensors"), weights)
    assert curve(output) == pytest.approx(curve_of_batch_4, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(pairs, tmp_path, curve_of_batch_4):
    more = ["--gradient-accumulation", 2, "--batch-norm", "frozen"]
    assert train.main(arguments(pairs, tmp_path / "run", *more, **WITHOUT_DROPOUT)) == 0
    assert curve(tmp_path / "run") == pytest.approx(curve_of_batch_4, rel=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_is_why_halves_of_a_batch_are_not_the_whole(frozen):
    """Mean gradient of two halves against that of the whole batch: equal without statistics of the batch, else not."""
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings(**WITHOUT_DROPOUT)))
    set_training_mode(model, freeze_batch_norm=frozen)
    pixel_values, labels = torch.randn(4, 3, 64, 64), torch.rand(4, 1, 64, 64)

    def gradient(parts: list[slice]) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            (model(pixel_values[part], labels=labels[part]).loss / len(parts)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole, halves = gradient([slice(0, 4)]), gradient([slice(0, 2), slice(2, 4)])
    difference = float((whole - halves).norm() / whole.norm())
    assert difference < 1e-4 if frozen else difference > 1e-2


def test_trainer_of_transformers_scales_the_loss_under_accumulation(pairs, tmp_path):
    """Two accumulated batches of 2 move the weights as one of 4 does."""
    processor = BiRefNetImageProcessor(size={"height": 64, "width": 64})
    dataset = TrainingDataset(load_pairs(pairs), processor)
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings(**WITHOUT_DROPOUT)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
                module.forward = nn.Identity().forward  # statistics of another batch would hide what is tested
        settings = TrainingArguments(
            output_dir=tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1e-4,
            max_grad_norm=1e9,
            use_cpu=True,
            report_to=[],
            seed=0,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=dataset)
        assert np.isfinite(trainer.train().training_loss)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    torch.manual_seed(0)
    start = BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings(**WITHOUT_DROPOUT)))
    moved = weights[0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    assert moved.norm() > 0
    assert (weights[1] - weights[0]).norm() < 1e-3 * moved.norm()


def test_trainer_of_transformers_augments_anew_in_each_epoch(pairs, tmp_path):
    class Recorder(BiRefNetForImageSegmentation):
        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> object:
            seen.append(pixel_values)
            return super().forward(pixel_values, labels=labels)

    seen: list[torch.Tensor] = []
    processor = BiRefNetImageProcessor(size={"height": 64, "width": 64})
    dataset = TrainingDataset(load_pairs(pairs).select([0, 3]), processor, build_augmentation("default"))
    settings = TrainingArguments(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    Trainer(Recorder(BiRefNetConfig(**tiny_settings())), settings, train_dataset=dataset).train()
    assert len(seen) == 2
    for epoch, batch in enumerate(seen):
        expected = {float(dataset[SampleKey(index, epoch)]["pixel_values"].sum()) for index in (0, 1)}
        assert {float(sample.sum()) for sample in batch} == expected
    assert not torch.equal(dataset[SampleKey(0, 0)]["pixel_values"], dataset[SampleKey(0, 1)]["pixel_values"])


def test_adapters_are_trained_saved_and_merged(pairs, tiny_model_dir, tmp_path):
    from peft import PeftModel

    output = tmp_path / "run"
    more = ["--model", tiny_model_dir, "--lora-rank", 2, "--merge-lora", "--epochs", 1]
    assert train.main(arguments(pairs, output, *more)) == 0
    pixel_values = torch.randn(1, 3, 64, 64)
    start, merged = (
        BiRefNetForImageSegmentation.from_pretrained(folder).eval() for folder in (tiny_model_dir, output)
    )
    adapted = PeftModel.from_pretrained(
        BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir), output / "adapter"
    ).eval()
    with torch.no_grad():
        logits = merged(pixel_values).logits
        torch.testing.assert_close(adapted(pixel_values=pixel_values).logits, logits, atol=1e-5, rtol=1e-5)
        assert (start(pixel_values).logits - logits).abs().max() > 1e-3
    changed = {
        name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])
    }
    assert changed and not any("norm" in name for name in changed)  # frozen statistics: they are in no adapter

    assert load_pipeline(output / "adapter", device="cpu").image_processor.size == {"height": 64, "width": 64}

    # Once more without merging: of the whole network nothing may be left, to which the adapters would be applied again.
    unmerged = [argument for argument in more if argument != "--merge-lora"]
    assert train.main(arguments(pairs, output, *unmerged, "--resume")) == 0
    assert not (output / "model.safetensors").exists() and (output / "adapter_model.safetensors").exists()
    assert not (output / "adapter").exists()
    assert Path(json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]).is_absolute()
    assert train.main(arguments(pairs, output, *more, "--resume")) == 0
    assert (output / "model.safetensors").exists() and not list(output.glob("adapter_*"))

    # transformers applies adapters by itself, to the model that their settings name.
    if version.parse(transformers.__version__) < version.parse("5.18"):
        with pytest.raises(ValueError, match="holds an adapter"):
            BiRefNetForImageSegmentation.from_pretrained(output / "adapter")
        return
    by_itself = BiRefNetForImageSegmentation.from_pretrained(output / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(by_itself(pixel_values).logits, logits, atol=1e-5, rtol=1e-5)


def test_adapters_are_no_network_to_start_from(pairs, tiny_model_dir, tmp_path, messages):
    """Their settings name the network that they adapt; what is frozen gets none."""
    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    model.backbone.requires_grad_(False)
    model = add_adapters(model, rank=2, alpha=4)
    assert {name.split(".")[2] for name, item in model.named_parameters() if item.requires_grad} == {
        "squeeze_module",
        "decoder",
    }
    model.save_pretrained(tmp_path / "adapter")
    BiRefNetImageProcessor().save_pretrained(tmp_path / "adapter")
    assert train.main(arguments(pairs, tmp_path / "run", "--model", tmp_path / "adapter")) == 1
    if version.parse(transformers.__version__) >= version.parse("5.18"):
        assert "train them with --merge-lora" in messages.text


def test_settings_that_no_network_has(pairs, tiny_model_dir, tmp_path, messages):
    cases = {
        "cannot be built.*depths": {"backbone": "swin", "embed_dim": 7},
        "cannot be built.*swin_v1_x": {"backbone": "swin_v1_x"},
        "BiRefNetConfig has no nonsense": {"backbone": "swin_v1_t", "nonsense": 1},
    }
    for message, settings in cases.items():
        messages.clear()
        argv = arguments(pairs, tmp_path / "run")
        argv[argv.index("--model-settings") + 1] = json.dumps(settings)
        assert train.main(argv) == 1
        assert re.search(message, messages.text, flags=re.DOTALL)
    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "run", "--model", "nano", "--gradient-checkpointing")) == 1
    assert "tf_efficientnet_lite0 has no blocks to recompute" in messages.text


def test_a_metric_that_is_undefined_at_first_may_be_the_best_later():
    run = train.Run.__new__(train.Run)
    run.arguments = argparse.Namespace(best_metric="mba")
    run.gone = set()
    run.history = [{"step": step, "mba": value} for step, value in enumerate([0.1, math.nan, 0.5, math.nan, 0.7, 0.6])]
    assert run.best["step"] == 4


def test_every_adapter_has_a_gradient(tiny_model_dir):
    model = add_adapters(BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir), rank=2, alpha=4)
    set_training_mode(model)
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.rand(2, 1, 64, 64)).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("backbone" in name for name in trained) and any("mask_head" in name for name in trained)
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    with pytest.raises(ValueError, match="not from scratch"):
        add_adapters(BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings())), rank=2, alpha=4)


@pytest.fixture
def damaged_pairs(pairs, copy_of) -> Path:
    """One image whose middle is damaged, which the fast check does not see."""
    root = copy_of(pairs)
    path = root / "im" / "5.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(bytes(content))
    return root


def test_damaged_image_in_the_middle_of_an_epoch(damaged_pairs, tmp_path, messages):
    argv = arguments(damaged_pairs, tmp_path / "run", "--checkpoint-steps", 1, "--epochs", 1)
    assert train.main(argv) == 1
    assert "5.png" in messages.text and "--on-bad-data skip" in messages.text
    done = list_checkpoints(tmp_path / "run" / "checkpoints")
    messages.clear()
    assert train.main([*argv, "--on-bad-data", "skip", "--resume"]) == 0
    assert "Replaced by the next sample" in messages.text and "5.png" in messages.text
    assert 0 < len(done) < 4 == len(logged(tmp_path / "run"))


def test_damaged_image_among_those_of_validation(pairs, damaged_pairs, tmp_path, messages):
    argv = arguments(pairs, tmp_path / "run", "--epochs", 1, "--validation-data", damaged_pairs)
    assert train.main(argv) == 1
    assert "5.png" in messages.text and "--on-bad-data skip" in messages.text
    messages.clear()
    assert train.main([*argv, "--on-bad-data", "skip"]) == 0
    assert "Replaced by the next sample" in messages.text and "5.png" in messages.text


def test_resumed_from_an_earlier_checkpoint(pairs, tmp_path, messages):
    """The line that was left gives way, changed settings hold, and what was not measured before is no obstacle."""
    run = tmp_path / "run"
    more = ["--checkpoint-steps", 1, "--keep-checkpoints", 3, "--validation-fraction", 0.2, "--ema-decay", 0]
    assert train.main(arguments(pairs, run, *more, "--metrics", "mae", "max_f")) == 0
    *_, before, last = list_checkpoints(run / "checkpoints")
    steps, weights = int(last.name[-8:]), load_file(run / "model.safetensors")
    again = ["--resume", before, "--metrics", "s_measure", "--best-metric", "s_measure"]
    assert train.main(arguments(pairs, run, *more, *again)) == 0
    assert [int(path.name[-8:]) for path in list_checkpoints(run / "checkpoints")] == [steps - 2, steps - 1, steps]
    assert_equal(load_file(run / "model.safetensors"), weights)
    assert not list((run / "checkpoints").glob(".partial-*"))

    first = list_checkpoints(run / "checkpoints")[0]
    frozen = {name: value for name, value in load_file(first / "model.safetensors").items() if name.endswith("weight")}
    argv = arguments(pairs, run, *more, "--resume", first)
    assert train.main([*argv, "--learning-rate", "1e-30", "--keep-checkpoints", "1"]) == 0
    [last] = list_checkpoints(run / "checkpoints")
    assert int(last.name[-8:]) == steps
    trained = load_file(last / "model.safetensors")
    for name, before in frozen.items():
        torch.testing.assert_close(trained[name], before, atol=1e-20, rtol=0)  # 1e-3 would move them by that

    assert train.main(arguments(pairs, run, *more, "--resume", "--epochs", 1)) == 1
    assert "more than the" in messages.text and "give --epochs as large as before" in messages.text


@pytest.mark.parametrize("kept", [True, False])
def test_best_is_what_the_results_say(kept, pairs, tmp_path):
    """Also after other steps were the best by another metric, or where best/ is of another run."""
    run = tmp_path / "run"
    more = ["--checkpoint-steps", 1, "--keep-checkpoints", 9, "--validation-steps", 1, "--validation-fraction", 0.2]
    more += ["--ema-decay", 0, "--epochs", 1, "--metrics", "mae", "s_measure"]
    assert train.main(arguments(pairs, run, *more, "--best-metric", "s_measure")) == 0  # the last step
    *_, before, last = list_checkpoints(run / "checkpoints")
    if kept:
        more += ["--resume", before]
    else:
        shutil.rmtree(run / "checkpoints")
        (run / "model.safetensors").unlink()
        (run / "best" / "model.safetensors").write_bytes(b"old")
    # By a metric that is the worse the longer the training, with a rate that only spoils the network.
    again = ["--best-metric", "mae", "--learning-rate", "1"]
    assert train.main(arguments(pairs, run, *more, *again)) == 0
    best = json.loads((run / "results.json").read_text())["best"]
    assert json.loads((run / "best" / "results.json").read_text()) == best
    assert best["step"] > 0
    [of_best] = [path for path in list_checkpoints(run / "checkpoints") if int(path.name[-8:]) == best["step"]]
    weights = BiRefNetForImageSegmentation.from_pretrained(run / "best").state_dict()
    saved = load_file(of_best / "model.safetensors")
    assert_equal({name: weights[name] for name in saved}, saved)


@pytest.mark.parametrize("other", [["--layer-decay", 0.5], ["--weight-decay", 0], ["--freeze-backbone"]])
def test_other_groups_of_parameters_cannot_be_resumed(other, pairs, tmp_path, messages):
    run = tmp_path / "run"
    assert train.main(arguments(pairs, run, "--epochs", 1)) == 0
    assert train.main(arguments(pairs, run, "--resume", *other)) == 1
    assert "other groups of parameters" in messages.text and "--layer-decay" in messages.text


def test_what_learned_from_infinite_numbers_is_not_saved(pairs, tmp_path, messages):
    argv = arguments(pairs, tmp_path / "run", "--checkpoint-steps", 1, "--max-grad-norm", 0)
    assert train.main([*argv, "--learning-rate", "1e30", "--log-steps", "1000"]) == 1
    assert "The loss is" in messages.text and "earlier checkpoint" in messages.text
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        tensors = load_file(checkpoint / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_processes_that_do_not_see_each_other_are_told(pairs, tmp_path, monkeypatch, messages):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert train.main(arguments(pairs, tmp_path / "run")) == 1
    assert "2 processes were started, but Accelerate sees 1" in messages.text and "ACCELERATE_USE_CPU" in messages.text


def test_inputs_are_never_overwritten(pairs, tiny_model_dir, copy_of, messages, monkeypatch):
    model, data = copy_of(tiny_model_dir), copy_of(pairs)
    for output, option in ((model, "--model"), (data, "--data")):
        messages.clear()
        assert train.main(arguments(data, output, "--model", model)) == 1
        assert f"is {option}, which the result would overwrite" in messages.text
    messages.clear()
    assert train.main(arguments(data, data / "gt")) == 1
    assert "gt holds data: choose another folder" in messages.text
    assert files_of(model) == files_of(tiny_model_dir) and files_of(data) == files_of(pairs)
    monkeypatch.chdir(data)  # the alias is no input, whatever the output is called
    Path("nano").mkdir()
    messages.clear()
    assert train.main(arguments("im", "nano", "--masks", "gt", "--model", "nano", "--validation-fraction", 0.99)) == 1
    assert "cannot be divided" in messages.text and "overwrite" not in messages.text
    messages.clear()
    assert train.main(arguments(pairs, model / "run", "--validation-fraction", 0.99)) == 1
    assert "cannot be divided" in messages.text


def test_validation_without_splits_is_not_what_is_trained_on(pairs, tmp_path, messages):
    load_pairs(pairs).with_format(None).save_to_disk(str(tmp_path / "saved"))
    for source in (pairs, tmp_path / "saved"):
        messages.clear()
        assert train.main(arguments(source, tmp_path / "run", "--validation-split", "later")) == 1
        assert "has no split 'later'. Use --validation-fraction" in messages.text
    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "run", "--validation-data", pairs / "im")) == 1
    assert "Validation data, whose options begin with --validation: " in messages.text


def test_fp16_is_refused_on_a_cpu(pairs, tmp_path, messages):
    assert train.main(arguments(pairs, tmp_path / "run", "--mixed-precision", "fp16")) == 1
    assert "use bf16 or no" in messages.text


def test_one_value_cannot_be_normalised(pairs, tmp_path, messages):
    more = ["--model", "nano", "--size", 64, 64, "--batch-size", 1]
    assert train.main(arguments(pairs, tmp_path / "run", *more)) == 1
    assert "give --batch-norm frozen, or a larger --batch-size or --size" in messages.text


def test_interrupted(pairs, tmp_path, messages, monkeypatch):
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_batch", press)
    assert train.main(arguments(pairs, tmp_path / "run")) == 130
    assert "Interrupted after step 0: the same command with --resume" in messages.text


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bad_pairs_are_named_at_the_start(pairs, copy_of, tmp_path, messages):
    root = copy_of(pairs)
    Image.new("L", (40, 48), 255).save(root / "gt" / "3.png")
    assert train.main(arguments(root, tmp_path / "run")) == 1
    assert "3.png" in messages.text and "the mask is 40×48" in messages.text
    for path in (root / "gt").iterdir():  # in both parts
        path.write_bytes(b"nothing")
    messages.clear()
    assert train.main(arguments(root, tmp_path / "run", "--validation-fraction", 0.25)) == 1
    assert "8 sample(s) cannot be used" in messages.text


def test_full_disk_leaves_the_last_checkpoint_usable(pairs, tmp_path, messages):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        argv = arguments(pairs, disk / "run", "--checkpoint-steps", 1, "--epochs", 1)
        assert train.main(argv) == 1
        assert "step 2 could not be saved" in messages.text and "step-00000001 is intact" in messages.text
        assert not list((disk / "run" / "checkpoints").glob(".partial-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert train.main([*argv, "--resume"]) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded weights may still be mapped


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_finished_run_without_its_checkpoints_is_not_replaced(more, pairs, tmp_path, messages):
    run = tmp_path / "run"
    assert train.main(arguments(pairs, run, "--epochs", 1, "--resume")) == 0  # where there is nothing, it starts
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in (run / "model.safetensors", run / "log.jsonl")}
    assert train.main(arguments(pairs, run, *more)) == 1
    assert "holds a network, which this run would replace" in messages.text
    assert all(path.read_bytes() == content for path, content in before.items())


def test_foreign_folders_are_refused(pairs, tmp_path, messages):
    run = tmp_path / "run"
    assert train.main(arguments(pairs, run, "--epochs", 1, "--checkpoint-steps", 4)) == 0
    checkpoint = list_checkpoints(run / "checkpoints")[-1]

    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "a", "--resume", checkpoint, inner_channels=12)) == 1
    assert "another architecture (inner_channels: 8 and 12" in messages.text
    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "b", "--resume", checkpoint, "--batch-size", 4)) == 1
    assert "batch_size: 2 and 4" in messages.text
    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "c", "--resume", pairs)) == 1
    assert "is not a checkpoint" in messages.text

    foreign = tmp_path / "resnet"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}')
    messages.clear()
    assert train.main(arguments(pairs, tmp_path / "d", "--model", foreign)) == 1
    assert "resnet" in messages.text


def test_settings_come_from_recipe_file_and_command_line(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "data: photos\noutput_dir: runs/x\nmodel_settings: {backbone: swin_v1_t}\nsize: [64, 96]\ncutouts: true\n"
        "recipe: upstream\nlearning_rate: 2e-4\nmax_grad_norm: 5\nseed: null\nmilestones: []\n"
        "check: off\nmixed_precision: no\nresume: false\nmerge_lora: false\n",  # all of them False to YAML
        encoding="utf-8",
    )
    settings = train.parse_arguments(["--config", str(file), "--max-grad-norm", "3"])
    assert settings.model_settings == {"backbone": "swin_v1_t"}
    assert (settings.size, settings.cutouts, settings.learning_rate, settings.seed) == ([64, 96], True, 2e-4, 7)
    assert (settings.schedule, settings.augmentation, settings.ema_decay) == ("constant", "upstream", 0.0)
    assert settings.max_grad_norm == 3
    assert (settings.check, settings.mixed_precision, settings.resume, settings.merge_lora) == (
        "off",
        "no",
        None,
        False,
    )
    settings = train.parse_arguments(["--config", str(file), "--recipe", "default"])
    assert (settings.schedule, settings.max_grad_norm, settings.milestones) == ("cosine", 5, [])
    assert train.parse_arguments(["--config", str(file), "--output-dir", "~/x"]).output_dir == Path.home() / "x"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--output-dir", "x", "--model", "y"], "--data"),
        (["--output-dir", "x", "--data", "z"], "nothing to train"),
        (["--output-dir", "x", "--data", "z", "--model", "y", "--best-metric", "mse"], "is not measured"),
        (["--output-dir", "x", "--data", "z", "--model", "y", "--metrics", "psnr"], "no metrics psnr"),
        (["--output-dir", "x", "--data", "z", "--model-settings", "nowhere.json"], "neither JSON nor a file"),
        (
            ["--output-dir", "x", "--data", "z", "--model", "y", "--lora-rank", "2"]
            + ["--model-settings", '{"patch_order": "wg_hg_c", "drop_path_rate": 0}'],
            "without --model-settings patch_order: add --merge-lora",
        ),
    ],
)
def test_wrong_settings_are_explained(wrong, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(wrong)
    assert message in capsys.readouterr().err


def test_settings_are_not_kept_where_the_result_goes(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": "photos", "backbone": "swin_v1_t", "output_dir": str(tmp_path)}))
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", str(file)])
    assert "where the model's own config is saved" in capsys.readouterr().err


def test_all_sources_of_data_are_reached_from_the_command_line(pairs, tmp_path):
    def lengths(*given: object) -> tuple[int, int]:
        fixed = ["--output-dir", "x", "--backbone", "y"]
        parts = train.load_data(train.parse_arguments([*map(str, given), *fixed]), (64, 64))
        for part in parts:
            for row in [] if part is None else part:
                assert row["image"].mode == "RGB" and row["image"].size == row["mask"].size and row["mask"].getbbox()
        return tuple(0 if part is None else len(part) for part in parts)

    for subset, numbers in (("DIS-TR", range(4)), ("DIS-TE1", range(4, 6)), ("DIS-VD", range(6, 7))):
        for name in ("im", "gt"):
            (tmp_path / "DIS5K" / subset / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(pairs / name / f"{number}.png", tmp_path / "DIS5K" / subset / name)
    table = datasets.Dataset.from_dict({"before": [draw_pair(0)[0]] * 3, "after": [draw_pair(0)[1]] * 3})
    table = table.cast_column("before", datasets.Image()).cast_column("after", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))

    dis = tmp_path / "DIS5K"
    joined = ["--data", dis, "--subsets", "DIS-TR", "DIS-TE1"]
    assert lengths(*joined, "--validation-data", dis, "--validation-subsets", "DIS-VD") == (6, 1)
    assert lengths(*joined, "--validation-subsets", "DIS-VD") == (6, 1)
    assert lengths(*joined, "--validation-fraction", 0.5) == (3, 3)
    folders = ["--data", pairs / "im", "--masks", pairs / "gt"]
    again = shutil.copytree(pairs, tmp_path / "again")
    assert lengths(*folders, "--validation-data", again / "im", "--validation-masks", again / "gt") == (8, 8)
    columns = ["--data", tmp_path / "saved", "--image-column", "before", "--mask-column", "after"]
    assert lengths(*columns, "--validation-data", tmp_path / "saved", "--validation-split", "test") == (3, 1)
    other_columns = ["--validation-image-column", "image", "--validation-mask-column", "mask"]
    assert lengths(*columns, "--validation-data", pairs, *other_columns) == (3, 8)
    assert lengths("--data", pairs, "--cutouts", "--validation-data", again, "--validation-samples", 2) == (8, 2)
    assert lengths(*folders, "--more-cutouts", pairs, "--validation-fraction", 0.25) == (6 + 8, 2)


@pytest.mark.parametrize(
    "given, named",
    [
        (["--validation-masks", "gt"], "--validation-masks"),
        (["--validation-fraction", "0.1", "--validation-subsets", "DIS-VD"], "--validation-subsets"),
        (["--subsets", "DIS-VD", "--validation-subsets", "DIS-VD"], "--validation-subsets"),
        (["--validation-samples", "3"], "--validation-samples"),
        (["--lora-alpha", "8"], "--lora-alpha needs --lora-rank"),
        (["--milestones", "3"], "--milestones and --schedule step"),
        (["--schedule", "step"], "--milestones and --schedule step"),
        (["--backgrounds", "walls"], "give --cutouts or --more-cutouts"),
    ],
    ids=str,
)
def test_settings_without_what_they_need(given, named, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--data", "DIS5K", "--output-dir", "x", "--backbone", "y", *given])
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, bounds",
    [
        ("max-grad-norm", "-5", "at least 0"),  # would climb
        ("learning-rate", "nan", "at least 0"),
        ("lora-rank", "-1", "at least 0"),
        ("batch-size", "0", "at least 1"),
        ("ema-decay", "1.5", "at least 0 and below 1"),
        ("validation-fraction", "1", "at least 0 and below 1"),
    ],
)
def test_numbers_out_of_range(option, value, bounds, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--data", "DIS5K", "--output-dir", "x", "--backbone", "y", f"--{option}={value}"])
    assert f"--{option} must be {bounds}\n" in capsys.readouterr().err


def test_home_in_a_file_of_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "data: ~/photos\ncutouts: true\nbackgrounds: ~/walls\noutput_dir: ~/run\nbackbone: swin_v1_t\n"
    )
    arguments = train.parse_arguments(["--config", str(settings)])
    found = (arguments.data, arguments.backgrounds, str(arguments.output_dir))
    assert found == tuple(str(tmp_path / name) for name in ("photos", "walls", "run"))


def test_missing_backgrounds_are_named(tmp_path):
    image, mask = draw_pair(0)
    image.putalpha(mask)
    image.save(tmp_path / "0.png")
    more = ["--backgrounds", str(tmp_path / "nowhere"), "--output-dir", "x", "--backbone", "y"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.load_data(train.parse_arguments(["--data", str(tmp_path), "--cutouts", *more]), (64, 64))


def test_held_out_cutouts_are_not_composed_into_training_pictures(tmp_path):
    for number in range(10):
        image, mask = draw_pair(number)
        image.putalpha(mask)
        image.save(tmp_path / f"{number}.png")
    settings = train.parse_arguments(
        ["--data", str(tmp_path), "--cutouts", "--validation-fraction", "0.3", "--output-dir", "x", "--backbone", "y"]
    )
    training, validation = train.load_data(settings, (64, 64))
    assert (len(training), len(validation)) == (7, 3)
    composing = [part.format["format_kwargs"]["transform"] for part in (training, validation)]
    sources = [{row["image"]["path"] for row in transform.cutouts.rows} for transform in composing]
    assert len(sources[0]) == 7 and len(sources[1]) == 3 and not sources[0] & sources[1]
    # What is measured are the cut-outs, none of them replaced by a drawn structure, in the light they came with.
    for name in ("thin_probability", "hard_light_probability"):
        assert getattr(composing[0].compositor, name) > getattr(composing[1].compositor, name) == 0


def test_schedule():
    def rates(schedule: str, **more) -> list[float]:
        return [schedule_factor(schedule, step, 8, **more) for step in range(8)]

    assert rates("constant", warmup_steps=2) == [0.5] + [1.0] * 7
    assert rates("step", milestones=[2, 6], milestone_factor=0.5) == [1.0] * 2 + [0.5] * 4 + [0.25] * 2
    cosine = rates("cosine", warmup_steps=4)
    assert cosine[:4] == [0.25, 0.5, 0.75, 1.0]
    assert cosine[4:] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    with pytest.raises(ValueError, match="no schedule"):
        rates("linear")


def test_parameter_groups_by_depth_and_kind(tiny_model):
    tiny_model.backbone.layers[0].requires_grad_(False)
    groups = parameter_groups(tiny_model, 1e-3, backbone_learning_rate=1e-4, layer_decay=0.5)
    by_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(by_parameter) == sum(parameter.requires_grad for parameter in tiny_model.parameters())

    def settings(name: str) -> tuple[float, float]:
        group = by_parameter[id(tiny_model.get_parameter(name))]
        return group["lr"], group["weight_decay"]

    assert settings("decoder.mask_head.weight") == (1e-3, 1e-2)
    assert settings("decoder.mask_head.bias") == (1e-3, 0.0)
    assert settings("backbone.layers.3.blocks.1.mlp.fc1.weight") == (1e-4, 1e-2)
    assert settings("backbone.layers.2.blocks.0.mlp.fc1.weight") == (5e-5, 1e-2)
    assert settings("backbone.norms.1.weight") == (2.5e-5, 0.0)
    assert settings("backbone.patch_embed.proj.weight") == (1.25e-5, 1e-2)
    decayed = parameter_groups(tiny_model, 1e-3, decay_all=True)
    assert [(group["lr"], group["weight_decay"]) for group in decayed] == [(1e-3, 1e-2)]


def test_average_follows_the_closed_form_and_leaves_integers_alone(tiny_model):
    average = average_weights(tiny_model, decay=0.3)
    weight = tiny_model.decoder.mask_head.weight
    expected = None
    for update in range(4):
        with torch.no_grad():
            weight.fill_(float(update))
        decay = min(0.3, (1 + update) / (10 + update))
        expected = float(update) if expected is None else decay * expected + (1 - decay) * update
        average.update_parameters(tiny_model)
    torch.testing.assert_close(average.module.decoder.mask_head.weight, torch.full_like(weight, expected))
    for name, buffer in tiny_model.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(average.module.get_buffer(name), buffer)
    assert average.module.decoder.mask_head.weight.dtype == torch.float32


def test_what_is_frozen_stays_in_evaluation_mode(tiny_model):
    tiny_model.backbone.requires_grad_(False)
    set_training_mode(tiny_model)
    assert not any(module.training for module in tiny_model.backbone.modules())
    assert all(module.training for module in tiny_model.decoder.modules())
    set_training_mode(tiny_model, freeze_batch_norm=True)
    for module in tiny_model.decoder.modules():
        assert module.training != isinstance(module, nn.BatchNorm2d)


def test_swin_weights_of_timm():
    swin_transformer = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(0)
    settings = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
    theirs = swin_transformer.SwinTransformer(img_size=128, **settings).eval()
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**tiny_settings(**settings))).eval()
    copy_timm_weights(model, theirs)
    model.backbone.norms[3].load_state_dict(theirs.norm.state_dict())
    pixel_values = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = theirs.forward_features(pixel_values).permute(0, 3, 1, 2)
        torch.testing.assert_close(model.backbone(pixel_values)[3], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "resnet50", "vgg16bn", "dino_v3_s", "tf_efficientnet_lite0"])
def test_other_weights_of_timm(backbone):
    pytest.importorskip("timm")
    from birefnet_hf.backbone_timm_birefnet import create_timm_model

    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone)).eval()
    theirs = create_timm_model(backbone).eval()
    copy_timm_weights(model, theirs)
    pixel_values = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        if backbone == "dino_v3_s":
            options = {"norm": False, "output_fmt": "NCHW", "intermediates_only": True}
            expected = theirs.forward_intermediates(pixel_values, indices=[11], **options)[0]
        elif backbone == "tf_efficientnet_lite0":
            # Layer by layer, like timm; tests/test_backbones_birefnet.py has the other way.
            model.backbone.fusable_kinds = set()
            expected = theirs.blocks(theirs.bn1(theirs.conv_stem(pixel_values)))  # without the classifier's head
        else:
            forward = theirs.features if backbone.startswith("vgg") else theirs.forward_features
            expected = forward(pixel_values)
        assert torch.equal(model.backbone(pixel_values)[3], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--mixed-precision", "bf16", "--gradient-checkpointing", "--layer-decay", "0.8"],
        ["--freeze-backbone", "--ema-decay", "0", "--num-workers", "2", "--augmentation", "upstream-background"],
        ["--recipe", "upstream", "--task", "matting", "--last-epochs", "1"],
        ["--compile"],
    ],
    ids=["bf16", "frozen", "upstream", "compile"],
)
def test_other_ways_to_train(pairs, tmp_path, more, monkeypatch):
    # Without code generation, which takes many minutes on a CPU: what is tested is that the network can be traced.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    assert train.main(arguments(pairs, tmp_path / "run", "--validation-fraction", 0.25, *more)) == 0
    assert np.isfinite(logged(tmp_path / "run")).all() and len(logged(tmp_path / "run")) == 6


@pytest.mark.slow
def test_cutouts_are_learned(tmp_path):
    """Ellipses on generated backgrounds, in a minute from nothing."""
    cutouts = tmp_path / "cutouts"
    cutouts.mkdir()
    for number in range(40):
        image, mask = draw_pair(number, size=64)
        image.putalpha(mask)
        image.save(cutouts / f"{number}.png")
    more = ["--cutouts", "--epochs", 15, "--batch-size", 4, "--validation-fraction", 0.2, "--validation-steps", 1000]
    assert train.main(arguments(cutouts, tmp_path / "run", *more, "--learning-rate", "3e-3")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["last"]["iou"] > results["before"]["iou"] + 0.2
