"""scripts/demo.py: what `make demo` writes and says."""

from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from PIL import Image


demo = load_script(Path(__file__).parents[1] / "scripts" / "demo.py")


def test_cuts_out_the_shipped_photo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main([]) == 0
    with Image.open(demo.PHOTO) as photo:
        photo = photo.convert("RGB")
    pictures = {path.name: Image.open(path) for path in (tmp_path / "demo_output").iterdir()}
    assert {name: picture.mode for name, picture in pictures.items()} == {
        "cutout.png": "RGBA",
        "mask.png": "L",
        "before_after.png": "RGB",
    }
    cutout, both = pictures["cutout.png"], np.asarray(pictures["before_after.png"])
    assert cutout.size == photo.size
    assert np.array_equal(cutout.getchannel("A"), pictures["mask.png"])
    assert np.array_equal(both[:, : photo.width], photo)
    board = both[:, photo.width :][np.asarray(pictures["mask.png"]) == 0]
    assert set(board.ravel()) <= {204, 255}

    text = capsys.readouterr().out
    for part in ("CC0", "space/examples/SOURCES.md", "--model general", 'load_pipeline("general")', *pictures):
        assert part in text
    credits = (demo.PHOTO.parent / "SOURCES.md").read_text(encoding="utf-8")
    assert any(demo.PHOTO.name in line and "CC0" in line for line in credits.splitlines())


def test_picture_to_look_at_is_of_moderate_size():
    photo = Image.new("RGB", (6000, 30), "red")
    picture = demo.before_and_after(photo, photo.convert("RGBA"))
    assert picture.size == (2 * demo.LARGEST_SIDE, 6)


def test_bad_arguments_are_explained(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("missing.jpg", "there is no such file"), ("text.jpg", "is no image")):
        assert demo.main([str(tmp_path / name), str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("where a folder should be")
    assert demo.main([str(demo.PHOTO), str(tmp_path / "file")]) == 1
    assert "demo.py: " in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "mask.png")
    with pytest.raises(SystemExit, match="2"):
        demo.main([str(tmp_path / "mask.png"), str(tmp_path)])
    assert "would be replaced" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
