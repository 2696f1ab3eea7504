"""The benchmark script on a tiny network: rows in processes of their own, table and JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script, tiny_settings


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def run(benchmark, tmp_path, *arguments: str, status: int = 0) -> dict:
    settings = json.dumps(tiny_settings())
    result = tmp_path / "result.json"
    common = ["--backbone", "swin", "--settings", settings, "--threads", "1", "--json", str(result)]
    assert benchmark.main([*arguments, *common]) == status
    return json.loads(result.read_text(encoding="utf-8"))


def test_memory_of_the_parent_is_not_the_rows():
    held = bytearray(b"1") * 2**31
    program = f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}]; import benchmark; print(benchmark.peak_resident_bytes())"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 2**25 < int(output) < len(held)


@pytest.mark.slow
def test_inference(benchmark, tmp_path, capsys):
    """Both implementations give the same logits up to rounding, and bfloat16 nearly the same."""
    content = run(benchmark, tmp_path, "--sizes", "64", "--dtypes", "float32", "bfloat16", "--repeats", "2")
    baseline, single, half = content["rows"]
    assert [row["backend"] for row in content["rows"]] == ["torchvision", "eager", "eager"]
    assert baseline["difference"] == 0
    assert 0 < single["difference"] < 1e-4 < half["difference"] < 0.5
    for row in content["rows"]:
        assert len(row["seconds"]) == 2 and 0 < row["min_s"] <= row["median_s"]
        assert row["cpu_s"] == min(row["cpu_seconds"]) > 0
        assert 0.05 < row["peak_gb"] < 4
    table = capsys.readouterr().out
    assert table.count("| eager | ") == 2 and "threads 1" in table


@pytest.mark.slow
def test_runtimes(benchmark, tmp_path):
    """The exported network, which has the weights of the others, in rows of its own."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    backends = ("--backends", "eager", "onnxruntime", "openvino", "--dtypes", "float32", "bfloat16", "--no-warm-up")
    content = run(benchmark, tmp_path, "--sizes", "64", *backends)
    kinds = [(row["backend"], row["dtype"]) for row in content["rows"]]
    assert kinds[1:] == [
        ("eager", "float32"),
        ("eager", "bfloat16"),
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
    ]
    for row in content["rows"][3:]:
        assert row["difference"] < 1e-4


@pytest.mark.slow
def test_rows_that_fail_leave_the_others(benchmark, tmp_path, capsys):
    """Here those without pixels."""
    content = run(benchmark, tmp_path, "--sizes", "0", "64", "--no-warm-up", status=1)
    assert [(row["size"], row["backend"]) for row in content["rows"]] == [(64, "torchvision"), (64, "eager")]
    assert "Row eager float32 0 failed" in capsys.readouterr().err


@pytest.mark.slow
def test_training_step(benchmark, tmp_path):
    arguments = ("--batch-size", "2", "--backends", "eager", "checkpointing", "--no-warm-up")
    content = run(benchmark, tmp_path, "train", "--sizes", "64", *arguments)
    assert [row["backend"] for row in content["rows"]] == ["torchvision", "eager", "checkpointing"]
    for row in content["rows"]:
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"])


def test_not_a_checkout(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="holds no models/birefnet.py"):
        benchmark.main(["--reference", str(tmp_path)])


def test_backends_of_the_other_task(benchmark):
    with pytest.raises(SystemExit, match="benchmark.py train"):
        benchmark.main(["--backends", "checkpointing"])
    with pytest.raises(SystemExit, match="for inference"):
        benchmark.main(["train", "--backends", "onnxruntime"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--autocast"], "is for training"),
        (["--backends", "onnxruntime", "--dtypes", "bfloat16"], "add it to --dtypes"),
        (["--repeats", "0"], "at least 1"),
        (["--json", "nowhere/numbers.json"], "there is no folder nowhere"),
    ],
    ids=str,
)
def test_options_without_effect(benchmark, arguments, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(arguments)
