"""Runs notebooks/quickstart.ipynb, and looks at the pictures that are committed with it."""

import copy
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
RESULTS = """
import json

pixels = np.asarray(cutout)
edge = np.asarray(truth.crop(fur))
rim = (edge > 30) & (edge < 200)
print(json.dumps({
    "cutout": [cutout.mode, list(cutout.size)],
    "is_soft": bool(((pixels[..., 3] > 20) & (pixels[..., 3] < 235)).any()),
    "alpha_within": float(alpha[np.asarray(truth) > 200].mean()),
    "alpha_outside": float(alpha[np.asarray(truth) < 50].mean()),
    "changed_by_background": float(np.abs(np.asarray(on_colour).astype(int) - np.asarray(on_gravel)).mean()),
    "brightness": [float(np.asarray(crop.convert("L"))[rim].mean()) for crop in close_ups],
    "batch": [list(picture.size) for picture in cutouts],
    "segment": [segment["label"], segment["score"], segment["mask"].mode],
    "scores": result.scores,
    "losses": losses,
    "iou": [iou_before, iou_after],
}))
"""


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def results(committed) -> dict:
    """What the notebook's variables hold at its end; an error in a cell is an error here."""
    notebook = copy.deepcopy(committed)
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("OMP_NUM_THREADS", "1")  # on a busy machine more threads wait for each other
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_cutouts(results):
    assert results["cutout"] == ["RGBA", [680, 440]]
    assert results["is_soft"]
    assert results["alpha_within"] > results["alpha_outside"] + 0.1
    assert results["changed_by_background"] > 5
    assert results["batch"] == [[1024, 800], [600, 400]]


def test_refinement_takes_the_dark_leaves_out_of_the_fur(results):
    plain, refined = results["brightness"]
    assert refined > plain + 2


def test_stock_pipeline(results):
    label, score, mode = results["segment"]
    assert (label, mode) == ("foreground", "L")
    assert 0.5 < score <= 1


def test_scores(results):
    assert set(results["scores"]) == {"iou", "s_measure", "mae"}
    assert results["scores"]["iou"] > 0.25
    assert results["scores"]["mae"] < 0.5


def test_fine_tuning_teaches_which_ball_is_meant(results):
    losses = results["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    before, after = results["iou"]
    assert before < 0.75  # both balls, at best
    assert after > before + 0.1


def test_committed_notebook_shows_its_results(committed):
    """`make notebook` runs and saves it; a change of a cell without that would show old pictures."""
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [output for output in outputs if output.output_type == "display_data"]
    assert len(pictures) >= 8 and all("image/jpeg" in picture.data for picture in pictures)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert NOTEBOOK.stat().st_size < 1.5e6
