"""Exported networks compute what PyTorch computes: ONNX Runtime, OpenVINO, torch.export, AOTInductor, int8 weights."""

import copy
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import displace, load_script, tiny_settings
from packaging import version
from PIL import Image
from transformers.utils import logging as transformers_logging

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor, load_pipeline
from birefnet_hf.onnx_birefnet import BiRefNetOnnxForImageSegmentation
from birefnet_hf.training import add_adapters


export_onnx = load_script(Path(__file__).parent.parent / "scripts" / "export_onnx.py")

SIZE = (64, 96)


def random_network(seed: int) -> BiRefNetForImageSegmentation:
    """Two blocks of windows, one shifted, at the finest level; deformable convolutions that do displace."""
    torch.manual_seed(seed)
    settings = tiny_settings(depths=(2, 1, 1, 1), deformable_kernel_sizes=(3,))  # little, for tracing takes long
    return displace(BiRefNetForImageSegmentation(BiRefNetConfig(**settings)).eval())


def save(model: BiRefNetForImageSegmentation, folder: Path) -> Path:
    model.save_pretrained(folder)
    BiRefNetImageProcessor(size={"height": SIZE[0], "width": SIZE[1]}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network_dir(tmp_path_factory) -> Path:
    return save(random_network(seed=0), tmp_path_factory.mktemp("network") / "tiny")


@pytest.fixture(scope="module")
def program(network_dir) -> torch.export.ExportedProgram:
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    return export_onnx.trace(model, SIZE, batch_size=None)


@pytest.fixture(scope="module")
def any_size_program(network_dir) -> torch.export.ExportedProgram:
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    return export_onnx.trace(model, size=None, batch_size=None)


@pytest.fixture(scope="module")
def exported_dir(program, network_dir, tmp_path_factory) -> Path:
    """What the script writes; only the tracing, which takes longest, is shared with other tests."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_onnx, "trace", lambda *arguments: program)
        return run_script(network_dir, tmp_path_factory.mktemp("exported") / "tiny")


def run_script(network_dir: Path, output: Path) -> Path:
    assert export_onnx.main([str(network_dir), str(output), "--check", "onnxruntime"]) == 0
    return output


def pictures(batch_size: int, size: tuple[int, int] = SIZE, seed: int = 5) -> torch.Tensor:
    return export_onnx.check_pictures(batch_size, size, seed)


def logits_of(model, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(pixel_values=batch).logits


def check_same_logits(exported, model, batch: torch.Tensor) -> None:
    expected = logits_of(model, batch)
    assert expected.std() > 1e-3  # a flat output would agree with much
    torch.testing.assert_close(logits_of(exported, batch), expected, rtol=0, atol=1e-4)


def test_output_is_complete_and_nothing_else(exported_dir):
    assert {path.name for path in exported_dir.iterdir()} == {
        "model.onnx",
        "config.json",
        "preprocessor_config.json",
    }
    assert [path.name for path in exported_dir.parent.iterdir()] == ["tiny"]


def test_graph_has_native_deformable_convolutions_and_any_batch_size(exported_dir):
    import onnx

    graph = onnx.load(exported_dir / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    # Four levels and the squeeze module, each with a pointwise and a 3×3 branch.
    assert kinds.count("DeformConv") == 10
    assert not {"GridSample", "GatherND", "Loop"} & set(kinds)
    [graph_input], [graph_output] = graph.input, graph.output
    assert (graph_input.name, graph_output.name) == ("pixel_values", "logits")
    assert graph_input.type.tensor_type.shape.dim[0].dim_param


def test_onnxruntime_agrees_with_pytorch(exported_dir, network_dir):
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, num_threads=1)
    assert exported.input_shape == (None, 3, *SIZE)
    for batch_size in (1, 3):
        check_same_logits(exported, model, pictures(batch_size))


@pytest.mark.parametrize(
    "providers", ["CPUExecutionProvider", ("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})]
)
def test_one_provider_and_inputs_from_a_training_loop(exported_dir, providers):
    model = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, providers=providers)
    pixel_values = torch.randn(1, 3, *SIZE, requires_grad=True)
    assert not model(pixel_values).logits.requires_grad


def test_pipeline_runs_the_exported_file(exported_dir, network_dir, scene):
    image, _ = scene
    expected = np.asarray(load_pipeline(str(network_dir), device="cpu")(image), dtype=int)
    pipe = load_pipeline(BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir))
    assert pipe.image_processor.size.height == SIZE[0]
    [cutout, _] = pipe([image, image], batch_size=2)
    assert cutout.size == image.size and cutout.mode == "RGBA"
    assert np.abs(np.asarray(cutout, dtype=int) - expected).max() <= 1


def test_exported_directory_by_name(exported_dir):
    """What takes a model by name takes an exported one."""
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pipe = load_pipeline(str(exported_dir))
    assert isinstance(pipe.model, BiRefNetOnnxForImageSegmentation)
    expected = load_pipeline(BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir))(image)
    assert np.array_equal(np.asarray(pipe(image)), np.asarray(expected))


def test_openvino_serves_several_threads(exported_dir):
    pytest.importorskip("openvino")
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, runtime="openvino", num_threads=1)
    batches = [pictures(1, seed=seed) for seed in range(12)]
    expected = [exported(batch).logits for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for logits, alone in zip(pool.map(lambda batch: exported(batch).logits, batches), expected, strict=True):
            assert torch.equal(logits, alone)


def test_exported_pipeline_can_be_shown(exported_dir):
    assert "BackgroundRemovalPipeline" in repr(load_pipeline(str(exported_dir)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_exported_pipelines_are_copied_and_sent_to_other_processes(exported_dir, runtime):
    pytest.importorskip(runtime)
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, runtime=runtime, num_threads=1)
    pipe = load_pipeline(exported)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(np.asarray(copied(image)), np.asarray(pipe(image)))


def test_openvino_leaves_signals_alone(exported_dir):
    """It did not on processors with AMX, where the first of two networks went before the second."""
    pytest.importorskip("openvino")
    program = f"""
import os, signal
from birefnet_hf.onnx_birefnet import BiRefNetOnnxForImageSegmentation
first, second = (
    BiRefNetOnnxForImageSegmentation.from_pretrained({str(exported_dir)!r}, runtime="openvino") for _ in range(2)
)
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("arrived"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "arrived\n", result


def test_stock_pipeline_of_an_exported_model_is_no_matter_of_concern(exported_dir, caplog):
    transformers_logging.enable_propagation()
    try:
        pipe = load_pipeline(str(exported_dir), task="image-segmentation")
    finally:
        transformers_logging.disable_propagation()
    assert "not supported" not in caplog.text
    assert pipe(Image.new("RGB", (60, 40), "red")) is not None


def test_two_networks_do_not_share_a_folder(exported_dir, program, tmp_path, monkeypatch, caplog):
    shutil.copytree(exported_dir, tmp_path / "exported")
    other = save(random_network(seed=1), tmp_path / "other")
    monkeypatch.setattr(export_onnx, "trace", lambda *arguments: pytest.fail("too late"))
    argv = [str(other), str(tmp_path / "exported"), "--dtype", "float16", "--check", "onnxruntime"]
    assert export_onnx.main(argv) == 1
    assert "model.onnx is of other weights than this model" in caplog.text
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {path.name for path in exported_dir.iterdir()}


def test_openvino_agrees_with_pytorch(exported_dir, network_dir):
    pytest.importorskip("openvino")
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, runtime="openvino", num_threads=1)
    check_same_logits(exported, model, pictures(3))


def test_other_sizes_are_refused_with_the_size_it_takes(exported_dir):
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir)
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*exported for \(any, 3, 64, 96\).*--size"):
        exported(pictures(1, (64, 64)))


def test_a_file_that_computes_something_else_is_not_kept(exported_dir, tmp_path, monkeypatch, caplog):
    other = save(random_network(seed=1), tmp_path / "other")
    monkeypatch.setattr(export_onnx, "trace", lambda *arguments: None)
    monkeypatch.setattr(export_onnx, "write", lambda _, path, opset: shutil.copy(exported_dir / "model.onnx", path))
    output = tmp_path / "new" / "output"
    assert export_onnx.main([str(other), str(output), "--check", "onnxruntime"]) == 1
    assert "more than allowed (logits 0.0001): the file is not kept" in caplog.text
    assert list(output.parent.iterdir()) == []


def test_float16_is_checked_where_nothing_is_seen(tmp_path, monkeypatch):
    """On pictures without an object alpha is 0, whatever a graph makes of them."""

    class Exported:
        def __init__(self, logits):
            self.logits = logits

        def __call__(self, pictures):
            return self

    expected = torch.linspace(-11, -7, 64).view(1, 1, 8, 8)
    for logits, passes in ((expected + 0.01, True), (torch.full_like(expected, -20), False), (2 * expected, False)):
        monkeypatch.setattr(
            export_onnx.BiRefNetOnnxForImageSegmentation,
            "from_pretrained",
            lambda *_, result=logits, **__: Exported(result),
        )
        arguments = (expected, torch.zeros(1, 1, 3, 8, 8), tmp_path, "model_fp16.onnx", "onnxruntime")
        if passes:
            export_onnx.check(*arguments)
        else:
            with pytest.raises(export_onnx.ExportError, match="logits on average"):
                export_onnx.check(*arguments)


def test_output_of_another_network_is_left_alone(exported_dir, network_dir, copy_of, caplog):
    output = copy_of(exported_dir)
    before = (output / "model.onnx").read_bytes()
    assert export_onnx.main([str(network_dir), str(output), "--size", "64", "64", "--check", "onnxruntime"]) == 1
    assert "belongs to another network or size (it differs in size)" in caplog.text
    assert (output / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64", "100"], "multiples of 32"),
        (["--opset", "18"], "opset 19"),
        (["--batch-size", "0"], "at least 1"),
    ],
)
def test_bad_arguments(arguments, message, network_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_onnx.main([str(network_dir), str(tmp_path / "output"), *arguments])
    assert message in capsys.readouterr().err


def test_only_swin_is_exported_for_any_size(tmp_path, caplog):
    assert export_onnx.main(["nano", str(tmp_path / "output"), "--any-size", "--check", "onnxruntime"]) == 1
    assert "not tf_efficientnet_lite0: give --size HEIGHT WIDTH" in caplog.text
    assert not (tmp_path / "output").exists()


def test_what_is_no_network_is_refused(network_dir, tmp_path, caplog):
    assert export_onnx.main(["nanoo", str(tmp_path / "out")]) == 1
    assert "Did you mean 'nano'" in caplog.text
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir)
    add_adapters(model, rank=2, alpha=4).save_pretrained(tmp_path / "adapter")
    BiRefNetImageProcessor.from_pretrained(network_dir).save_pretrained(tmp_path / "adapter")
    assert export_onnx.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    if version.parse(transformers.__version__) >= version.parse("5.18"):
        assert "run its training with --resume --merge-lora" in caplog.text
    assert not (tmp_path / "out").exists()


def test_missing_runtimes_are_named(network_dir, exported_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"birefnet-hf\[onnx\]"):
        BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir)
    with pytest.raises(ImportError, match=r"birefnet-hf\[openvino\]"):
        BiRefNetOnnxForImageSegmentation.from_pretrained(exported_dir, runtime="openvino")


def test_wrong_choices_are_explained(network_dir, exported_dir, copy_of):
    load = BiRefNetOnnxForImageSegmentation.from_pretrained
    with pytest.raises(OSError, match=r"none of .*model\.onnx.*export_onnx"):
        load(network_dir)
    with pytest.raises(ValueError, match="runtime='tensorrt' is unknown"):
        load(exported_dir, runtime="tensorrt")
    with pytest.raises(ValueError, match="NoSuchProvider.*CPUExecutionProvider"):
        load(exported_dir, providers=["NoSuchProvider"])
    damaged = copy_of(exported_dir)
    (damaged / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"cannot load .*model\.onnx"):
        load(damaged)


def test_torch_export_agrees_with_eager(program, network_dir):
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    for batch_size in (1, 3):
        batch = pictures(batch_size)
        torch.testing.assert_close(program.module()(batch), logits_of(model, batch), rtol=0, atol=1e-4)


def test_torch_export_for_any_size(any_size_program, network_dir):
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    for batch_size, size in ((1, (64, 352)), (3, (288, 96)), (2, (256, 256))):
        batch = pictures(batch_size, size)
        expected = logits_of(model, batch)
        torch.testing.assert_close(any_size_program.module()(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_pipeline_runs_a_file_for_any_size(any_size_program, network_dir, copy_of, tmp_path, monkeypatch):
    folder = copy_of(network_dir)
    BiRefNetImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(folder)
    monkeypatch.setattr(export_onnx, "trace", lambda *arguments: any_size_program)
    exported = BiRefNetOnnxForImageSegmentation.from_pretrained(run_script(folder, tmp_path / "exported"))
    assert exported.input_shape == (None, 3, None, None)
    model = BiRefNetForImageSegmentation.from_pretrained(network_dir).eval()
    check_same_logits(exported, model, pictures(2, (77, 130)))  # no multiples of 32
    with pytest.raises(ValueError, match="sides of more than 32"):
        exported(pictures(1, (32, 64)))
    pipes = [load_pipeline(network, device="cpu") for network in (folder, exported)]
    for size in ((300, 200), (70, 500)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
        expected, alpha = (np.asarray(pipe(picture, output_type="mask"), dtype=int) for pipe in pipes)
        assert expected.std() > 1
        assert np.abs(alpha - expected).max() <= 1


@pytest.mark.slow
def test_float16_beside_float32(exported_dir, network_dir, copy_of):
    output = copy_of(exported_dir)
    assert export_onnx.main([str(network_dir), str(output), "--dtype", "float16", "--check", "onnxruntime"]) == 0
    saved = (output / "model.onnx").stat().st_size - (output / "model_fp16.onnx").stat().st_size
    num_parameters = BiRefNetForImageSegmentation.from_pretrained(network_dir).num_parameters()
    assert saved > 1.5 * num_parameters  # two bytes each, less what the file says about casts
    batch = pictures(1)
    both = [
        logits_of(BiRefNetOnnxForImageSegmentation.from_pretrained(output, file_name=name), batch).sigmoid()
        for name in ("model.onnx", "model_fp16.onnx")
    ]
    assert (both[0] - both[1]).abs().max() < 8 / 255


@pytest.mark.slow
def test_trained_network_through_onnxruntime(tmp_path, scene):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output = tmp_path / "nano"
    assert export_onnx.main(["nano", str(output), "--check", "onnxruntime"]) == 0
    image, mask = scene
    expected = np.asarray(load_pipeline("nano", device="cpu")(image, output_type="mask"), dtype=int)
    pipe = load_pipeline(BiRefNetOnnxForImageSegmentation.from_pretrained(output))
    alpha = np.asarray(pipe(image, output_type="mask"), dtype=int)
    assert ((alpha > 127) == mask).mean() > 0.95
    assert np.abs(alpha - expected).max() <= 1


@pytest.mark.slow
def test_int8_weights_through_torchao():
    """The conversion of the README: linear layers become smaller, and the mask nearly stays."""
    torchao = pytest.importorskip("torchao.quantization")
    model = random_network(seed=0)
    batch = pictures(2)
    expected = logits_of(model, batch)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    difference = (logits_of(model, batch) - expected).abs()
    assert 0 < difference.max() < 0.02 * expected.abs().max()
