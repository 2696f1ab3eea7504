"""Released files: names, architecture from tensors, what is refused, and the two scripts around them."""

import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings, write_released_config
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageSegmentation

from birefnet_hf import NANO, BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.conversion_birefnet import infer_architecture, load_state_dict_file, read_tensor_shapes


SCRIPTS = Path(__file__).parents[1] / "scripts"
KEY_LISTS = sorted((Path(__file__).parent / "parity").glob("*.keys.json"))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text(encoding="utf-8")).items()}


def run_script(name: str, *arguments: str) -> int:
    return runpy.run_path(str(SCRIPTS / name))["main"]([str(argument) for argument in arguments])


@pytest.mark.parametrize("path", KEY_LISTS, ids=lambda path: path.name.removesuffix(".keys.json"))
def test_tensor_names_are_the_released_ones(path):
    """A network built for a released file has, in the released naming, exactly its tensors with their shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    expected = {name: shape for name, shape in shapes_of(path).items() if not name.endswith("relative_position_index")}
    config = BiRefNetConfig(**infer_architecture(shapes_of(path)))
    assert config.backbone == path.name.removesuffix(".keys.json")
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(config)
    saved = revert_weight_conversion(model, model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multi_scale_input": "none", "context_levels": 1},
        {"squeeze_block": "residual", "decoder_block": "residual", "context_levels": 2},
        {"squeeze_block": "aspp", "num_squeeze_blocks": 2, "context_levels": 0},
        {"squeeze_block": "aspp_deformable", "num_squeeze_blocks": 3, "context_levels": 0},
        {"squeeze_block": "none", "context_levels": 0, "decoder_attention": "none"},
        {"decoder_attention": "aspp", "num_auxiliary_classes": 5},
        {"adaptive_inner_channels": True, "deformable_kernel_sizes": (1, 5)},
        {"inward_reference": False},
        {"split_image_patches": False, "outward_reference": False},
        {"multi_scale_supervision": False, "outward_reference": False},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_architecture_is_inferred_and_saving_round_trips(settings, tmp_path):
    """Every setting comes back from the saved tensors alone, and loading them gives bit-equal weights."""
    torch.manual_seed(1)
    config = BiRefNetConfig(**tiny_settings(**settings))
    model = BiRefNetForImageSegmentation(config)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} <= {"bb", "squeeze_module", "decoder", "cls_head"}

    inferred = BiRefNetConfig(**infer_architecture({name: tuple(t.shape) for name, t in tensors.items()}))
    for name in inferred.to_diff_dict().keys() | tiny_settings().keys() | settings.keys():
        # What no tensor tells: the default size, and the inner width where the blocks choose theirs.
        if name in ("image_size", "inner_channels" if config.adaptive_inner_channels else "image_size"):
            continue
        if name == "branch_channels" and config.decoder_attention == "none" and config.squeeze_block == "none":
            continue
        if name == "deformable_kernel_sizes" and config.decoder_attention != "aspp_deformable":
            continue
        if name == "image_channels" and not config.inward_reference:
            continue
        if name == "gradient_channels" and not config.outward_reference:
            continue
        assert getattr(inferred, name) == getattr(config, name), name

    loaded = AutoModelForImageSegmentation.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_released_directory_loads(released_dir, tiny_model_dir):
    """Model and processor load from the released layout, in the stored dtype, and give what the saved directory gives."""
    model, info = BiRefNetForImageSegmentation.from_pretrained(released_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == load_file(released_dir / "model.safetensors")["bb.patch_embed.proj.weight"].dtype
    assert (model.config.backbone, model.config.model_type) == ("swin", "birefnet")
    assert not hasattr(model.config, "auto_map") and not hasattr(model.config, "custom_pipelines")
    assert BiRefNetImageProcessor.from_pretrained(released_dir).size == {"height": 1024, "width": 1024}
    assert BiRefNetImageProcessor.from_pretrained(released_dir, size={"height": 64, "width": 96}).size["width"] == 96

    expected = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir).eval()
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model = BiRefNetForImageSegmentation.from_pretrained(released_dir, dtype=torch.float32).eval()
        difference = (model(pixel_values).logits - expected(pixel_values).logits).abs().max().item()
    assert difference == 0 if "float32" in released_dir.name else difference < 0.01


def test_patch_order_is_a_setting_of_loading(released_dir):
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    logits = {}
    for order in ("c_hg_wg", "wg_hg_c"):
        model = BiRefNetForImageSegmentation.from_pretrained(
            released_dir, patch_order=order, dtype=torch.float32
        ).eval()
        assert model.config.patch_order == order
        with torch.inference_mode():
            logits[order] = model(pixel_values).logits
    assert not torch.allclose(*logits.values())
    default = BiRefNetForImageSegmentation.from_pretrained(released_dir)
    assert default.config.patch_order == "c_hg_wg"


def test_known_names_bring_their_size(tiny_model_dir, tmp_path):
    folder = tmp_path / "BiRefNet_lite-2K"
    folder.mkdir()
    write_released_config(folder)
    (folder / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes())
    assert BiRefNetConfig.from_pretrained(folder).image_size == (1440, 2560)
    assert dict(BiRefNetImageProcessor.from_pretrained(folder).size) == {"height": 1440, "width": 2560}


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("ipt_blk5", "gdt_convs_4", "gdt_convs_attn_4", "gdt_convs_pred_4"), "older academic BiRefNet"),
        (without(".bn_in.", ".bn_out.", ".bn.", ".bn1.", "global_avg_pool.2"), "without BatchNorm"),
        (lambda tensors: {f"encoder.{name}": t for name, t in tensors.items()}, "not a BiRefNet checkpoint"),
        (lambda tensors: {n: t for n, t in tensors.items() if n.startswith("bb.")}, "not a BiRefNet checkpoint"),
        (without("decoder.decoder_block4."), "incomplete or another network"),
        (lambda tensors: {n.replace("bb.layers", "bb.stages"): t for n, t in tensors.items()}, "does not know"),
        (without("decoder.decoder_block2.conv_out.weight"), "lacks 1 tensors"),
        *[
            (without(part), "has no tensor '.*': the file is incomplete")
            for part in (
                "bb.layers.3.",
                "bb.layers.2.blocks.0.",
                "relative_position_bias_table",
                "decoder.lateral_block4.",
                "decoder.decoder_block3.",
                "decoder.ipt_blk1.",
            )
        ],
    ],
    ids=[
        "academic",
        "no-batchnorm",
        "foreign",
        "backbone-only",
        "no-decoder-block",
        "unknown-backbone",
        "one-missing",
        "no-last-stage",
        "no-block",
        "no-position-tables",
        "no-lateral-block",
        "no-finer-decoder-block",
        "no-image-branch",
    ],
)
def test_refusals_name_the_cause(damage, message, released_dir, tmp_path, caplog):
    """In `from_pretrained` and in the conversion script, for directories and for .pth files."""
    tensors = damage(load_file(released_dir / "model.safetensors"))
    folder = tmp_path / "damaged"
    folder.mkdir()
    write_released_config(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        BiRefNetForImageSegmentation.from_pretrained(folder)

    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "damaged.pth")
    with caplog.at_level("ERROR"):
        assert run_script("convert_checkpoint.py", tmp_path / "damaged.pth", tmp_path / "out") == 1
    assert re.search(message, caplog.text) or "1 missing keys" in caplog.text
    assert not (tmp_path / "out").exists()


def test_wrong_backbone_is_refused(released_dir):
    with pytest.raises(StrictDataclassClassValidationError, match="contradicts backbone='swin_v1_t'"):
        BiRefNetForImageSegmentation.from_pretrained(released_dir, backbone="swin_v1_t")


def test_extra_and_mis_shaped_tensors(released_dir, copy_of):
    folder = copy_of(released_dir)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.surprise"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, info = BiRefNetForImageSegmentation.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"decoder.surprise"}

    tensors["decoder.conv_out1.0.bias"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BiRefNetForImageSegmentation.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x00" * 64])
@pytest.mark.parametrize("name", ["model.safetensors", "epoch_1.pth"])
def test_damaged_weight_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name} is not a readable"):
        read_tensor_shapes(str(tmp_path / name))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"bb.weight": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(OSError, match="not a readable PyTorch weights file"):
        load_state_dict_file(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_conversion_script_on_pth(prefix, tiny_model_dir, tmp_path):
    tensors = load_file(tiny_model_dir / "model.safetensors")
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "epoch_9.pth")
    output = tmp_path / "converted"
    arguments = [tmp_path / "epoch_9.pth", output, "--size", "64", "96", "--patch-order", "wg_hg_c", "--verify"]
    assert run_script("convert_checkpoint.py", *arguments) == 0
    model = AutoModelForImageSegmentation.from_pretrained(output)
    assert (model.config.image_size, model.config.patch_order) == ((64, 96), "wg_hg_c")
    assert dict(AutoImageProcessor.from_pretrained(output).size) == {"height": 64, "width": 96}
    saved = load_file(output / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in tensors)


def test_conversion_script_on_released_directory(released_dir, tmp_path):
    assert run_script("convert_checkpoint.py", released_dir, tmp_path / "converted", "--size", "64", "64") == 0
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "converted", released_dir))
    assert all(torch.equal(saved[name], original[name]) for name in original)
    # What exists is not written over, and a path that does not exist is named.
    assert run_script("convert_checkpoint.py", released_dir, tmp_path / "converted") == 2
    assert run_script("convert_checkpoint.py", tmp_path / "nowhere.pth", tmp_path / "other") == 1


def test_conversion_script_on_the_network_of_the_package(tmp_path):
    assert run_script("convert_checkpoint.py", NANO, tmp_path / "converted", "--verify") == 0
    settings = [BiRefNetConfig.from_pretrained(folder).to_dict() for folder in (NANO, tmp_path / "converted")]
    for names in settings:
        del names["_name_or_path"]
    assert settings[0] == settings[1]


def test_conversion_to_another_size_keeps_the_normalisation(tmp_path):
    assert run_script("convert_checkpoint.py", NANO, tmp_path / "small", "--size", "64", "96", "--verify") == 0
    before, after = (BiRefNetImageProcessor.from_pretrained(folder) for folder in (NANO, tmp_path / "small"))
    assert (after.size.height, after.size.width) == (64, 96)
    assert after.image_mean == before.image_mean == (0.5,) * 3 and after.image_std == before.image_std


def test_conversion_script_on_several_files_and_precisions(tiny_model_dir, tmp_path, caplog):
    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert run_script("convert_checkpoint.py", tmp_path / "shards", tmp_path / "joined") == 0
    tensors = load_file(tiny_model_dir / "model.safetensors")
    joined = load_file(tmp_path / "joined" / "model.safetensors")
    assert joined.keys() == tensors.keys() and all(torch.equal(joined[name], tensors[name]) for name in tensors)

    mixed = {
        name: tensor if "norm" in name else tensor.half()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    mixed |= {name: tensor for name, tensor in tensors.items() if name not in mixed}
    torch.save({"net": mixed, "epoch": 3}, tmp_path / "mixed.pth")
    assert run_script("convert_checkpoint.py", tmp_path / "mixed.pth", tmp_path / "mixed") == 0
    assert BiRefNetForImageSegmentation.from_pretrained(tmp_path / "mixed").dtype == torch.float32

    name = next(iter(tensors))
    torch.save(tensors | {name: tensors[name] * torch.nan}, tmp_path / "broken.pth")
    torch.save({"weights": tensors, "epoch": 3}, tmp_path / "nested.pth")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for file, message in (("broken", "not finite"), ("nested", r"\(weights, epoch\)"), ("own", "package's own model")):
        caplog.clear()
        assert run_script("convert_checkpoint.py", tmp_path / f"{file}.pth", tmp_path / "out") == 1
        assert re.search(message, caplog.text) and not (tmp_path / "out").exists()


def test_conversion_script_on_a_saved_directory_keeps_its_settings(tiny_model_dir, tmp_path):
    source = tmp_path / "source"
    settings = {"patch_order": "wg_hg_c", "loss_task": "matting"}
    BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir, **settings).save_pretrained(source)
    BiRefNetImageProcessor(size={"height": 32, "width": 96}).save_pretrained(source)
    BiRefNetConfig.from_pretrained(source, id2label={0: "rest", 1: "person"}, drop_path_rate=0.1).save_pretrained(
        source
    )
    assert run_script("convert_checkpoint.py", source, tmp_path / "converted") == 0
    assert run_script("convert_checkpoint.py", source / "model.safetensors", tmp_path / "by-file") == 0
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "by-file" / name).read_text() == (tmp_path / "converted" / name).read_text()
    before, after = (
        AutoModelForImageSegmentation.from_pretrained(tmp_path / name).config for name in ("source", "converted")
    )
    assert after.patch_order == "wg_hg_c" and after.loss_task == "matting"
    assert after.id2label[1] == "person" and after.drop_path_rate == 0.1
    assert after.image_size == before.image_size == (64, 64)
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "converted").size) == {"height": 32, "width": 96}


@pytest.mark.parametrize("script", ["convert_checkpoint.py", "export_remote_code.py"])
def test_output_may_be_a_link_and_is_left_alone_after_an_error(script, tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    command = [sys.executable, str(SCRIPTS / script), str(tiny_model_dir)]
    result = subprocess.run([*command, str(tmp_path / "link")], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "disk" / "model.safetensors").is_file() and not list(tmp_path.glob("disk/.*"))
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "-", *command, str(tmp_path / "new")]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=300)  # files of at most 100 kB
    assert result.returncode == 1 and "could not be written" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_pickles_of_old(tiny_model_dir, tmp_path):
    tensors = load_file(tiny_model_dir / "model.safetensors")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_state_dict_file(tmp_path / "old.pth")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_remote_code_loads_without_the_package(tiny_model_dir, tmp_path):
    """Model, processor and stock pipeline in a process that cannot import birefnet_hf, bit-equal."""
    exported = tmp_path / "exported"
    command = [sys.executable, str(SCRIPTS / "export_remote_code.py"), str(tiny_model_dir), str(exported)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (exported / "modeling_birefnet.py").is_file()

    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_dir).eval()
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        save_file({"input": pixel_values, "logits": model(pixel_values).logits}, tmp_path / "expected.safetensors")
    program = """
        import sys
        sys.modules["birefnet_hf"] = None  # any import of it fails
        import torch
        from PIL import Image
        from safetensors.torch import load_file
        from transformers import AutoImageProcessor, AutoModelForImageSegmentation, pipeline

        folder, expected = sys.argv[1], load_file(sys.argv[2])
        model = AutoModelForImageSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        with torch.inference_mode():
            assert torch.equal(model(expected["input"]).logits, expected["logits"])
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert processor(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
        cut = pipeline("image-segmentation", model=folder, trust_remote_code=True)
        assert isinstance(cut(Image.new("RGB", (40, 30))), list)
        model.save_pretrained(folder + "-again")
        assert load_file(folder + "-again/model.safetensors").keys() == load_file(folder + "/model.safetensors").keys()
        print("loaded")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(exported), str(tmp_path / "expected.safetensors")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert result.stdout.strip() == "loaded", result.stderr[-3000:]
