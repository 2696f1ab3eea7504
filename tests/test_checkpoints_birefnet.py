"""The table of known checkpoints and the ways in which one is named."""

import dataclasses
import subprocess
import sys

import pytest

from birefnet_hf.checkpoints_birefnet import CHECKPOINTS, find_model, get_checkpoint, resolve_checkpoint


def test_every_entry_is_complete_and_unambiguous():
    assert len({checkpoint.hub_id.casefold() for checkpoint in CHECKPOINTS}) == len(CHECKPOINTS)
    assert len({checkpoint.name.casefold() for checkpoint in CHECKPOINTS}) == len(CHECKPOINTS)
    aliases = [checkpoint.alias for checkpoint in CHECKPOINTS if checkpoint.alias]
    assert len(set(aliases)) == len(aliases)
    for checkpoint in CHECKPOINTS:
        assert (checkpoint.size is None) != (checkpoint.size_range is None), checkpoint
        assert all(side % 32 == 0 for side in checkpoint.size or checkpoint.size_range), checkpoint
        assert checkpoint.patch_order in ("c_hg_wg", "wg_hg_c", None)
        assert checkpoint.backbone in ("swin_v1_l", "swin_v1_t")
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHECKPOINTS[0].size = (1, 1)


@pytest.mark.parametrize(
    ("name", "backbone", "processor_size", "patch_order"),
    [
        ("ZhengPeng7/BiRefNet", "swin_v1_l", {"height": 1024, "width": 1024}, "wg_hg_c"),
        ("ZhengPeng7/BiRefNet_HR", "swin_v1_l", {"height": 2048, "width": 2048}, "c_hg_wg"),
        ("ZhengPeng7/BiRefNet_512x512", "swin_v1_l", {"height": 512, "width": 512}, "c_hg_wg"),
        ("ZhengPeng7/BiRefNet_dynamic", "swin_v1_l", {"shortest_edge": 256, "longest_edge": 2304}, "c_hg_wg"),
        ("ZhengPeng7/BiRefNet_lite", "swin_v1_t", {"height": 1024, "width": 1024}, "wg_hg_c"),
        ("ZhengPeng7/BiRefNet_lite-2K", "swin_v1_t", {"height": 1440, "width": 2560}, "wg_hg_c"),
        ("ZhengPeng7/BiRefNet_lite-matting", "swin_v1_t", {"height": 1024, "width": 1024}, None),
        ("briaai/RMBG-2.0", "swin_v1_l", {"height": 1024, "width": 1024}, "wg_hg_c"),
    ],
)
def test_table(name, backbone, processor_size, patch_order):
    checkpoint = get_checkpoint(name)
    assert checkpoint.hub_id == name
    assert checkpoint.backbone == backbone
    assert checkpoint.processor_size == processor_size
    assert checkpoint.patch_order == patch_order


def test_only_rmbg_is_not_free():
    assert {checkpoint.alias for checkpoint in CHECKPOINTS if checkpoint.licence != "MIT"} == {"rmbg"}


def test_names_are_found_in_any_case():
    assert get_checkpoint("zhengpeng7/birefnet_LITE").hub_id == "ZhengPeng7/BiRefNet_lite"
    assert get_checkpoint("Lite-2K").hub_id == "ZhengPeng7/BiRefNet_lite-2K"
    assert get_checkpoint("512").size == (512, 512)


@pytest.mark.parametrize("name", ["BiRefNet_lite", "someone/BiRefNet_lite", "facebook/detr", "", "weights/BiRefNet"])
def test_what_is_neither_known_nor_there_is_not_guessed(name):
    assert get_checkpoint(name) is None


def test_hub_cache_paths():
    snapshot = "/home/someone/.cache/huggingface/hub/models--ZhengPeng7--BiRefNet_HR-matting/snapshots/0123abcd"
    assert get_checkpoint(snapshot).hub_id == "ZhengPeng7/BiRefNet_HR-matting"
    assert get_checkpoint(snapshot + "/model.safetensors").hub_id == "ZhengPeng7/BiRefNet_HR-matting"
    assert get_checkpoint("/hub/models--someone--BiRefNet/snapshots/0123abcd") is None


def test_local_directories_and_files(tmp_path, monkeypatch):
    folder = tmp_path / "BiRefNet_lite"
    folder.mkdir()
    assert get_checkpoint(folder).alias == "lite"
    assert get_checkpoint(f"{folder}/").alias == "lite"
    for file in (folder / "model.safetensors", tmp_path / "RMBG-2.0.pth", tmp_path / "other.pth"):
        file.touch()
    assert get_checkpoint(folder / "model.safetensors").alias == "lite"
    assert get_checkpoint(tmp_path / "RMBG-2.0.pth").alias == "rmbg"
    assert get_checkpoint(tmp_path / "other.pth") is None
    monkeypatch.chdir(folder)
    assert get_checkpoint(".").alias == "lite"


def test_aliases_resolve_unless_something_local_has_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("general") == "ZhengPeng7/BiRefNet"
    assert resolve_checkpoint("LITE") == "ZhengPeng7/BiRefNet_lite"
    assert resolve_checkpoint("someone/else") == "someone/else"
    assert resolve_checkpoint("./weights/mine") == "./weights/mine"
    (tmp_path / "lite").mkdir()
    (tmp_path / "lite" / "cutout.png").touch()
    assert resolve_checkpoint("lite") == "ZhengPeng7/BiRefNet_lite"  # a folder for results
    assert get_checkpoint("lite").alias == "lite"
    (tmp_path / "lite" / "model.safetensors").touch()
    assert resolve_checkpoint("lite") == "lite"
    assert get_checkpoint("lite") is None


def test_training_recipes_follow_from_the_purpose():
    expected = {"general": "general", "lite-matting": "matting", "portrait": "matting", "dis": "dis", "cod": "cod"}
    expected |= {"hrsod": "hrsod", "rmbg": "general"}
    assert {alias: get_checkpoint(alias).loss_task for alias in expected} == expected


def test_needs_nothing_but_the_standard_library():
    import birefnet_hf.checkpoints_birefnet as module

    code = f"import runpy; runpy.run_path({module.__file__!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_what_is_no_model_is_refused_without_asking_the_hub(tmp_path):
    assert find_model(tmp_path) == str(tmp_path)
    assert find_model("lite") == find_model("ZhengPeng7/BiRefNet_lite") == "ZhengPeng7/BiRefNet_lite"
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match="is a file; pass a directory"):
        find_model(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="Did you mean 'lite'"):
        find_model("litee")
    with pytest.raises(ValueError, match="is no directory, no Hub id"):
        find_model("./weights/mine")
