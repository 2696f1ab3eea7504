"""Runs what the README shows, with the network that ships with the package in place of the released one."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from birefnet_hf import NANO
from birefnet_hf.cli import app


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip() if "#" in line and '"' not in line else line.strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if re.match(r"birefnet |python scripts/", line)
]


def as_parameters(texts: list[str]) -> list:
    """The texts as parameters of a test; tracing a network for its export, or measuring it, takes most of a minute."""
    marks = {"cuda": pytest.mark.gpu} | dict.fromkeys(('"exported"', "export_onnx", "benchmark"), pytest.mark.slow)
    return [pytest.param(text, marks=[mark for word, mark in marks.items() if word in text][:1]) for text in texts]


@pytest.fixture
def workplace(tmp_path, tiny_model_dir, monkeypatch):
    """A folder with the files that the README names; returns a function that puts nano into a text."""
    import av
    import torch
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with Image.open(ROOT / "space" / "examples" / "coffee.png") as photo:
        for name in ("photo.jpg", "other.jpg", "photos/a.jpg", "photos/b.jpg"):
            photo.convert("RGB").resize((113, 75)).save(tmp_path / name)
        (tmp_path / "masks").mkdir()
        for name in ("a", "b"):
            grey = photo.convert("L").resize((113, 75))
            grey.point(lambda level: 255 * (level > 100)).save(tmp_path / "masks" / f"{name}.png")
        (tmp_path / "cutouts").mkdir()
        for number in range(4):
            cutout = photo.convert("RGB").resize((113, 75))
            cutout.putalpha(Image.radial_gradient("L").resize((113, 75)).point(lambda level: 255 - level))
            cutout.save(tmp_path / "cutouts" / f"{number}.png")
    with av.open(tmp_path / "clip.mp4", "w") as clip, Image.open(tmp_path / "photo.jpg") as photo:
        stream = clip.add_stream("libx264", rate=5, width=112, height=74, pix_fmt="yuv420p")
        frame = av.VideoFrame.from_image(photo.crop((0, 0, 112, 74)))
        clip.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "my-birefnet").symlink_to(tiny_model_dir)
    torch.save(load_file(tiny_model_dir / "model.safetensors"), tmp_path / "epoch_244.pth")
    return lambda text: re.sub('ZhengPeng7/BiRefNet|(?<=")lite(?=")', NANO, text)


def test_the_readme_has_what_is_tested():
    assert len(PYTHON) >= 6 and len(COMMANDS) >= 7


@pytest.mark.parametrize("block", as_parameters(PYTHON))
def test_python_blocks(block, workplace):
    code = workplace(block)
    if '"exported"' in code:
        runpy.run_path(str(ROOT / "scripts" / "export_onnx.py"))["main"](["my-birefnet", "exported"])
    if "save_pretrained" in code:
        Path("my-birefnet").unlink()
    exec(compile(code, "a block of the README", "exec"), {})


@pytest.mark.parametrize("command", as_parameters(COMMANDS))
def test_commands(command, workplace, tiny_model_dir):
    program, *arguments = shlex.split(workplace(command))
    if program == "birefnet":
        if "--model" in arguments:
            arguments[arguments.index("--model") + 1] = str(tiny_model_dir)
        elif "--help" not in arguments:
            arguments += ["--model", str(tiny_model_dir)]
        arguments = [argument.replace("2560x1440", "64x32") for argument in arguments]
        data = None
        if "<" in arguments:  # FILE > FILE
            data = Path(arguments[arguments.index("<") + 1]).read_bytes()
            arguments = arguments[: arguments.index("<")]
        result = CliRunner().invoke(app, arguments, input=data)
        assert result.exit_code == 0, result.output
    elif "export_remote_code.py" in arguments[0]:  # it changes how its process saves models
        result = subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    else:
        if "benchmark.py" in arguments[0]:  # on a smaller network, without the reference
            changes = {"swin_v1_l": "swin_v1_t", "1024": "64", "--reference": "--threads", "BiRefNet": "1"}
            arguments = [changes.get(argument, argument) for argument in arguments]
        if arguments[-2:] == ["my-birefnet", "--verify"]:  # which this command is to create
            Path("my-birefnet").unlink()
        assert runpy.run_path(str(ROOT / arguments[0]))["main"](arguments[1:]) in (None, 0)


def test_launched_commands_are_understood():
    """The data and the processes are another matter: tests/test_train.py."""
    lines = [line for _, code in BLOCKS for line in code.splitlines() if line.startswith("accelerate launch")]
    assert len(lines) >= 2
    for line in lines:
        option, config, script, *arguments = shlex.split(line)[2:]
        assert option == "--config_file" and (ROOT / config).is_file()
        settings = runpy.run_path(str(ROOT / script))["parse_arguments"](arguments)
        assert settings.ema_decay == 0


def test_checkpoint_table_is_complete():
    from birefnet_hf.checkpoints_birefnet import CHECKPOINTS

    for checkpoint in CHECKPOINTS:
        size = (
            f"{checkpoint.size[0]} × {checkpoint.size[1]}"
            if checkpoint.size
            else "any, {} to {}".format(*checkpoint.size_range)
        )
        link = f"[{checkpoint.hub_id}](https://huggingface.co/{checkpoint.hub_id})"
        row = (checkpoint.alias, link, checkpoint.backbone, size, checkpoint.purpose, checkpoint.licence)
        assert "| " + " | ".join(row) + " |" in README
