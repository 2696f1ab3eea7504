"""Tests of birefnet_hf.metrics: upstream's recorded numbers, closed forms, and slow oracles written from definitions."""

import json
import pickle
import sys
from collections import deque

import numpy as np
import pytest

from birefnet_hf.metrics import METRICS, ImageMetrics, compute_metrics, summarize


pytest.importorskip("py_sod_metrics", reason="needs the train extra")

# What BiRefNet's own evaluation (evaluation/metrics.py, OpenCV 4.14) gives for the data set of `upstream_pairs`, saved
# as PNG files and scored together.
UPSTREAM_SUMMARY = {
    "max_f": 0.8682319884,
    "mean_f": 0.6682052591,
    "weighted_f": 0.6118009723,
    "mae": 0.1921926959,
    "s_measure": 0.7532866776,
    "max_e": 0.9109669184,
    "mean_e": 0.7031979143,
    "hce": 14.0,
    "mba": 0.5377579037,
    "max_biou": 0.1747198046,
    "mean_biou": 0.08064169342,
    "mse": 0.08512357722,
}
# Metrics that upstream computes without stretching the prediction, or does not have.
SAME_IN_BOTH_CONVENTIONS = ["hce", "mba", "iou", "sad", "gradient", "connectivity"]


def soft_pair(height: int, width: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Two soft blobs and a shifted, flatter, grainy prediction of them: uint8, integer arithmetic only."""
    y, x = np.mgrid[:height, :width]

    def blob(center_y: int, center_x: int, radius: int, softness: int) -> np.ndarray:
        return np.clip(128 + (radius**2 - (y - center_y) ** 2 - (x - center_x) ** 2) // softness, 0, 255)

    left, right = (height // 2, width // 3), (height // 3, 3 * width // 4)
    target = np.maximum(blob(*left, height // 4, 2), blob(*right, height // 6, 3))
    prediction = np.maximum(
        blob(left[0] + shift, left[1], height // 4, 5), blob(right[0], right[1] - shift, height // 5, 7)
    )
    prediction = 10 + prediction * 220 // 255 + (x * 7 + y * 13) % 11
    return prediction.astype(np.uint8), target.astype(np.uint8)


@pytest.fixture(scope="module")
def upstream_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    return [soft_pair(64, 96, 3), soft_pair(120, 80, 5), soft_pair(200, 300, 9)]


def square(size: int, low: int, high: int) -> np.ndarray:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[low:high, low:high] = 255
    return mask


# Conventions and aggregation


def test_upstream_convention_reproduces_upstreams_evaluation(upstream_pairs):
    summary = summarize([compute_metrics(*pair, convention="upstream") for pair in upstream_pairs])

    assert {name: summary[name] for name in UPSTREAM_SUMMARY} == pytest.approx(UPSTREAM_SUMMARY, rel=1e-8)


def test_raw_convention_does_not_stretch():
    mask = square(40, 10, 30)
    pale = np.where(mask > 0, 0.75, 0.25)  # a stretch to [0, 1] would make it perfect

    raw = compute_metrics(pale, mask, metrics=["mae", "mse"])
    upstream = compute_metrics(pale, mask, metrics=["mae", "mse"], convention="upstream")

    assert raw.scores == pytest.approx({"mae": 0.25, "mse": 0.0625})
    assert upstream.scores == {"mae": 0, "mse": 0}
    assert (raw.convention, upstream.convention) == ("raw", "upstream")


def test_conventions_differ_exactly_where_the_table_says(upstream_pairs):
    raw, upstream = (compute_metrics(*upstream_pairs[0], convention=convention) for convention in ("raw", "upstream"))

    for name, metric in METRICS.items():
        assert (metric.raw == metric.upstream) == (name in SAME_IN_BOTH_CONVENTIONS), name
        # The best threshold of F and E moves with the stretch, their maximum does not have to.
        if name not in ("max_f", "max_e"):
            assert (raw.scores[name] == upstream.scores[name]) == (name in SAME_IN_BOTH_CONVENTIONS), name


def test_a_prediction_over_the_full_range_scores_the_same_in_both_conventions():
    prediction, target = soft_pair(64, 96, 3)
    prediction[0, 0], prediction[0, 1] = 0, 255
    target = np.where(target > 128, 255, 0).astype(np.uint8)

    raw, upstream = (compute_metrics(prediction, target, convention=name) for name in ("raw", "upstream"))

    assert raw.scores == upstream.scores


def test_mse_takes_the_soft_mask_and_mae_the_binary_one():
    soft = np.full((8, 8), 0.75)

    assert compute_metrics(soft, soft, metrics=["mse", "mae"]).scores == pytest.approx({"mae": 0.25, "mse": 0})


def test_masks_are_binarised_above_level_128():
    prediction = np.ones((4, 4))

    for level, foreground in ((128, 0.0), (129, 1.0)):
        for target in (np.full((4, 4), level, np.uint8), np.full((4, 4), level, np.float32) / np.float32(255)):
            assert compute_metrics(prediction, target, metrics=["max_f"]).scores["max_f"] == foreground


def test_max_f_of_a_set_is_the_maximum_of_the_mean_curve():
    mask = square(20, 0, 10)  # a quarter of the image
    # Each image alone is separated by some threshold, but no threshold serves both.
    results = [
        compute_metrics(np.where(mask > 0, high, low), mask, metrics=["max_f", "mean_f"])
        for high, low in ((0.4, 0.2), (0.8, 0.6))
    ]

    summary = summarize(results)

    everything = 1.3 * 0.25 / (0.3 * 0.25 + 1)  # precision 1/4, recall 1
    assert [result.scores["max_f"] for result in results] == [1, 1]
    assert summary["max_f"] == pytest.approx((1 + everything) / 2)
    assert summary["mean_f"] == pytest.approx(np.mean([result.scores["mean_f"] for result in results]))


def test_summary_skips_images_without_a_boundary():
    mask, full = square(32, 8, 24), np.full((32, 32), 255, np.uint8)
    results = [compute_metrics(mask, target, metrics=["mba", "mae"]) for target in (mask, full)]

    assert np.isnan(results[1].scores["mba"])
    assert summarize(results)["mba"] == 1
    assert summarize(results)["mae"] == pytest.approx((1 - 0.25) / 2)
    assert np.isnan(summarize(results[1:])["mba"])


def test_summarize_rejects_nothing_and_mixtures():
    mask = square(16, 4, 12)
    mae = compute_metrics(mask, mask, metrics=["mae"])

    with pytest.raises(ValueError, match="at least one image"):
        summarize([])
    with pytest.raises(ValueError, match="same metrics"):
        summarize([mae, compute_metrics(mask, mask, metrics=["sad"])])
    with pytest.raises(ValueError, match="same metrics and convention.*upstream"):
        summarize([mae, compute_metrics(mask, mask, metrics=["mae"], convention="upstream")])


# Agreement with PySODMetrics called the ordinary way (its default is upstream's convention)


def test_upstream_curves_equal_pysodmetrics_defaults(upstream_pairs):
    import py_sod_metrics

    f = py_sod_metrics.FmeasureV2({"f": py_sod_metrics.FmeasureHandler(True, False)})
    e = py_sod_metrics.Emeasure()
    for pair in upstream_pairs:
        f.step(*pair)
        e.step(*pair)
    results = [compute_metrics(*pair, metrics=["max_f", "max_e"], convention="upstream") for pair in upstream_pairs]

    np.testing.assert_array_equal(
        np.mean([result.curves["f"] for result in results], axis=0), f.get_results()["f"]["dynamic"]
    )
    np.testing.assert_array_equal(
        np.mean([result.curves["e"] for result in results], axis=0), e.get_results()["em"]["curve"]
    )


# Perfect, inputs, selection


def test_perfect_prediction():
    mask = square(64, 16, 40)
    pixels = mask.size

    for convention in ("raw", "upstream"):
        scores = compute_metrics(mask, mask, convention=convention).scores

        for name in ("max_f", "weighted_f", "s_measure", "mba", "max_biou"):
            assert scores[name] == pytest.approx(1), name
        assert scores["max_e"] == pytest.approx(pixels / (pixels - 1))
        for name in ("mae", "hce", "sad", "mse", "gradient", "connectivity"):
            assert scores[name] == 0, name


def test_direction_of_every_metric():
    prediction, target = soft_pair(64, 96, 3)
    good, bad = compute_metrics(target, target), compute_metrics(prediction, target)

    for name, metric in METRICS.items():
        assert (good.scores[name] > bad.scores[name]) == metric.higher_is_better, name


@pytest.mark.parametrize("convention", ["raw", "upstream"])
def test_uint8_and_float_inputs_agree(convention):
    prediction, target = soft_pair(64, 96, 3)
    expected = compute_metrics(prediction, target, convention=convention).scores

    for dtype in (np.float32, np.float64):
        pair = (prediction.astype(dtype) / dtype(255), target.astype(dtype) / dtype(255))
        assert compute_metrics(*pair, convention=convention).scores == pytest.approx(expected, rel=1e-6)

    binary = target > 128
    assert compute_metrics(prediction, binary, convention=convention).scores == pytest.approx(
        compute_metrics(prediction, np.where(binary, 255, 0).astype(np.uint8), convention=convention).scores
    )


def test_inputs_stay_as_they_were():
    prediction, target = (array / 255 for array in soft_pair(40, 30, 2))
    copies = prediction.copy(), target.copy()

    compute_metrics(prediction, target, convention="upstream")

    np.testing.assert_array_equal(prediction, copies[0])
    np.testing.assert_array_equal(target, copies[1])


def test_only_requested_metrics_in_the_tables_order():
    mask = square(16, 4, 12)

    result = compute_metrics(mask, mask, metrics=["sad", "max_f"])

    assert list(result.scores) == ["max_f", "sad"]
    assert list(result.curves) == ["f"]
    assert compute_metrics(mask, mask, metrics=["mae"]).curves == {}


def test_all_metrics_are_plain_scalars_and_described():
    mask = square(32, 8, 24)

    result = compute_metrics(mask, mask)

    assert list(result.scores) == list(METRICS)
    assert all(type(score) is float for score in result.scores.values())
    assert {name: curve.shape for name, curve in result.curves.items()} == {"f": (256,), "e": (256,), "biou": (256,)}
    assert json.loads(json.dumps({name: metric._asdict() for name, metric in METRICS.items()}))
    assert json.dumps(result.scores)


def test_function_and_result_travel_between_processes():
    function = pickle.loads(pickle.dumps(compute_metrics))
    result = function(square(32, 8, 24), square(32, 9, 25), metrics=["max_f", "mba"])

    copy = pickle.loads(pickle.dumps(result))

    assert isinstance(copy, ImageMetrics)
    assert copy.scores == result.scores
    np.testing.assert_array_equal(copy.curves["f"], result.curves["f"])


def test_errors_name_the_problem():
    mask = square(16, 4, 12)

    with pytest.raises(ValueError, match=r"prediction is \(8, 8\) and target \(16, 16\)"):
        compute_metrics(mask[:8, :8], mask)
    with pytest.raises(ValueError, match=r"prediction must be \(height, width\).*\(16, 16, 1\)"):
        compute_metrics(mask[..., None], mask)
    with pytest.raises(ValueError, match="target must be .* at least one pixel"):
        compute_metrics(mask, mask[:0])
    with pytest.raises(ValueError, match="prediction is float.*255.0: divide by 255"):
        compute_metrics(mask.astype(np.float32), mask)
    with pytest.raises(ValueError, match="target is uint8, so 255 is foreground, but holds 0 and 1 only"):
        compute_metrics(mask, (mask > 0).astype(np.uint8))
    with pytest.raises(ValueError, match="target is float.*nan"):
        compute_metrics(mask, np.full(mask.shape, np.nan))
    with pytest.raises(TypeError, match="prediction must be uint8.*int64"):
        compute_metrics(mask.astype(np.int64), mask)
    with pytest.raises(ValueError, match=r"Unknown metrics \['dice'\]: choose from \['max_f'"):
        compute_metrics(mask, mask, metrics=["mae", "dice"])
    with pytest.raises(ValueError, match="convention must be one of .*'minmax'"):
        compute_metrics(mask, mask, convention="minmax")


@pytest.mark.parametrize(
    ("name", "module"), [("max_f", "py_sod_metrics"), ("mba", "cv2"), ("gradient", "scipy.ndimage")]
)
def test_missing_extra_names_the_install_command(monkeypatch, name, module):
    mask = square(16, 4, 12)
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ImportError, match=rf"{module}.*pip install birefnet-hf\[train\]"):
        compute_metrics(mask, mask, metrics=[name])
    assert compute_metrics(mask, mask, metrics=["sad"]).scores == {"sad": 0}


# Degenerate images


STRIP = np.zeros((12, 9), np.uint8)
STRIP[:, -1] = 255  # its centroid leaves the right-hand quadrants of the S-measure empty
CORNER = np.zeros((12, 9), np.uint8)
CORNER[-1, -1] = 255
DEGENERATE = {
    "empty": np.zeros((12, 9), np.uint8),
    "full": np.full((12, 9), 255, np.uint8),
    "grey": np.full((12, 9), 100, np.uint8),
    "last column": STRIP,
    "last pixel": CORNER,
    "one dark pixel": np.zeros((1, 1), np.uint8),
    "one bright pixel": np.full((1, 1), 255, np.uint8),
    "one row": np.array([[0, 0, 255, 255, 100]], np.uint8),
    "one column": np.array([[0, 0, 255, 255, 100]], np.uint8).T,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convention", ["raw", "upstream"])
@pytest.mark.parametrize("target", DEGENERATE)
def test_degenerate_images_are_finite_and_silent(target, convention):
    mask = DEGENERATE[target]
    has_boundary = 0 < np.count_nonzero(mask > 128) < mask.size

    for prediction in [mask, 255 - mask, np.zeros_like(mask), np.full_like(mask, 255), np.full_like(mask, 90)]:
        scores = compute_metrics(prediction, mask, convention=convention).scores

        assert np.isnan(scores.pop("mba")) != has_boundary
        assert all(np.isfinite(list(scores.values())))
        limit = mask.size / max(mask.size - 1, 1)  # only E exceeds 1, by this definition of it
        assert all(-1e-9 <= score <= limit + 1e-9 for name, score in scores.items() if METRICS[name].scale == "0 to 1")


def test_empty_and_full_masks_have_the_documented_scores():
    empty, full = DEGENERATE["empty"], DEGENERATE["full"]

    nothing = compute_metrics(empty, empty).scores
    everything = compute_metrics(full, full).scores

    for name in ("max_f", "weighted_f", "max_biou"):
        assert (nothing[name], everything[name]) == (0, pytest.approx(1)), name
    assert (nothing["s_measure"], everything["s_measure"]) == (1, 1)
    assert nothing["hce"] == everything["hce"] == 0


def test_constant_prediction_survives_the_stretch():
    mask = square(16, 4, 12)

    scores = compute_metrics(np.full((16, 16), 51, np.uint8), mask, metrics=["mae"], convention="upstream").scores

    assert scores["mae"] == pytest.approx(0.25 * 0.8 + 0.75 * 0.2)


def test_structure_measure_with_the_object_in_the_last_column():
    # Object part: foreground and background both perfect. Region part: the two left quadrants carry all the area.
    assert compute_metrics(STRIP, STRIP, metrics=["s_measure"]).scores["s_measure"] == pytest.approx(1)


# HCE


def test_hce_counts_a_stray_square_as_one_region():
    mask = square(100, 20, 50)
    prediction = mask.copy()
    prediction[70:90, 70:90] = 255  # a false region far away from the object: one region to delete

    assert compute_metrics(prediction, mask, metrics=["hce"]).scores["hce"] == 1


# mBA


def test_mba_of_a_shifted_edge():
    mask = np.zeros((600, 900), bool)  # (600 + 900) / 300 = 5: radii 1, 1, 2, 3, 4
    mask[:, 400:] = True
    prediction = np.zeros_like(mask)
    prediction[:, 401:] = True  # one column wrong, in bands of 2 * radius columns

    score = compute_metrics(prediction, mask, metrics=["mba"]).scores["mba"]

    assert score == pytest.approx(np.mean([1 - 1 / (2 * radius) for radius in (1, 1, 2, 3, 4)]))


# BIoU


def slow_inner_band(mask: np.ndarray, distance: int) -> np.ndarray:
    """Foreground pixels with background or the outside within a square of the given half-width."""
    height, width = mask.shape
    band = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            inside = distance <= y < height - distance and distance <= x < width - distance
            window = mask[max(0, y - distance) : y + distance + 1, max(0, x - distance) : x + distance + 1]
            band[y, x] = mask[y, x] and not (inside and window.all())
    return band


def test_iou_counts_pixels_above_one_half():
    nothing = np.zeros((4, 4), dtype=np.uint8)
    target, prediction = nothing.copy(), nothing.copy()
    target[0], prediction[0, 1:], prediction[1, 0] = 128, 128, 255  # three of five pixels are in both
    target[3], prediction[2] = 127, 0.5 * 255
    scores = [
        compute_metrics(*pair, metrics=["iou"]).scores["iou"] for pair in ((prediction, target), (nothing, nothing))
    ]
    assert scores == [pytest.approx(3 / 5), 1]


def test_biou_of_binary_masks():
    height, width = 80, 120
    distance = round(0.02 * np.hypot(height, width))  # 3 pixels
    prediction, target = (array > 128 for array in soft_pair(height, width, 4))
    target[:30, :] = True  # also touches the image's border
    prediction_band, target_band = slow_inner_band(prediction, distance), slow_inner_band(target, distance)

    scores = compute_metrics(prediction, target, metrics=["max_biou", "mean_biou"])

    iou = (prediction_band & target_band).sum() / (prediction_band | target_band).sum()
    everything = target_band.mean()  # at threshold 0 each pixel counts as predicted
    assert 0 < iou < 1
    np.testing.assert_allclose(scores.curves["biou"], [iou] * 255 + [everything])
    assert scores.scores["max_biou"] == pytest.approx(max(iou, everything))


def test_biou_of_a_square_and_a_smaller_one():
    # 50 x 50: the band is 1 pixel wide, so the bands of the two squares are disjoint rings.
    scores = compute_metrics(square(50, 11, 39), square(50, 10, 40), metrics=["max_biou"])

    assert scores.curves["biou"][0] == 0
    assert scores.scores["max_biou"] == pytest.approx((4 * 29) / 50**2)  # only by predicting everything


# Matting


def test_sad_and_mse_units():
    target = np.zeros((50, 40))
    prediction = np.full((50, 40), 0.5)

    scores = compute_metrics(prediction, target, metrics=["sad", "mse"]).scores

    assert scores == pytest.approx({"sad": 2000 * 0.5 / 1000, "mse": 0.25})


def slow_gradient_magnitude(alpha: np.ndarray, sigma: float = 1.4) -> np.ndarray:
    """Two-dimensional derivative-of-Gaussian kernels, cut where the Gaussian falls below 0.01, of unit norm."""
    half = int(np.ceil(sigma * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * sigma * 0.01))))
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    for y in range(-half, half + 1):
        for x in range(-half, half + 1):
            kernel[y + half, x + half] = -x * np.exp(-(x * x + y * y) / (2 * sigma**2))
    kernel /= np.sqrt((kernel**2).sum())
    padded = np.pad(alpha, half, mode="edge")
    result = np.zeros_like(alpha)
    for y in range(alpha.shape[0]):
        for x in range(alpha.shape[1]):
            window = padded[y : y + 2 * half + 1, x : x + 2 * half + 1]
            result[y, x] = np.sqrt((window * kernel).sum() ** 2 + (window * kernel.T).sum() ** 2)
    return result


def test_gradient_against_two_dimensional_kernels():
    prediction, target = (array / 255 for array in soft_pair(24, 31, 2))

    score = compute_metrics(prediction, target, metrics=["gradient"]).scores["gradient"]

    expected = ((slow_gradient_magnitude(prediction) - slow_gradient_magnitude(target)) ** 2).sum() / 1000
    assert expected > 0
    assert score == pytest.approx(expected, rel=1e-9)


def test_gradient_ignores_a_constant_offset():
    _, target = soft_pair(24, 31, 2)
    target = target / 510

    assert compute_metrics(target + 0.3, target, metrics=["gradient"]).scores["gradient"] == pytest.approx(
        0, abs=1e-12
    )


def connectivity(prediction: np.ndarray, target: np.ndarray) -> float:
    return compute_metrics(prediction, target, metrics=["connectivity"]).scores["connectivity"]


def test_connectivity_closed_forms():
    target = np.zeros((20, 30))
    target[5:15, :] = 1
    gap = target.copy()
    gap[:, 18:21] = 0  # cuts off the smaller right-hand part

    # Pixels in the gap stand out of the shared region by 1 in the target alone; the part cut off does in both.
    assert connectivity(gap, target) == pytest.approx(30 / 1000)
    # A faint left part stays in the largest region up to 0.5, so the target stands out of it by 0.5.
    faint = target.copy()
    faint[:, :20] *= 0.5
    assert connectivity(faint, target) == pytest.approx(200 * 0.5 / 1000)
    # The same where no threshold above 0.5 has a region at all.
    assert connectivity(np.full((4, 5), 0.5), np.ones((4, 5))) == pytest.approx(20 * 0.5 / 1000)
    # Within the dead zone of 0.15 above the shared level nothing counts.
    assert connectivity(target * 0.6, target * 0.5) == 0
    # Cut off by the gap: 0.8 against 0.3 above level 0 on 90 pixels; the gap itself is empty in both.
    weak = gap.copy()
    weak[:, 21:] *= 0.3
    strong = gap.copy()
    strong[:, 21:] *= 0.8
    assert connectivity(weak, strong) == pytest.approx(90 * 0.5 / 1000)


def slow_largest_region(mask: np.ndarray) -> np.ndarray:
    """Largest 4-connected region by breadth-first search."""
    seen, largest = set(), []
    for start in zip(*np.nonzero(mask), strict=True):
        if start in seen:
            continue
        region, queue = [], deque([start])
        seen.add(start)
        while queue:
            y, x = queue.popleft()
            region.append((y, x))
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= neighbour[0] < mask.shape[0] and 0 <= neighbour[1] < mask.shape[1]
                if inside and mask[neighbour] and neighbour not in seen:
                    seen.add(neighbour)
                    queue.append(neighbour)
        largest = max(largest, region, key=len)
    result = np.zeros_like(mask)
    for pixel in largest:
        result[pixel] = True
    return result


def test_connectivity_against_search():
    generator = np.random.default_rng(0)
    # Coarse random blocks, so that regions break apart and vanish at different thresholds.
    target = np.kron(generator.random((7, 8)), np.ones((3, 3)))
    prediction = np.clip(target + generator.normal(scale=0.2, size=target.shape), 0, 0.95)
    regions = [
        slow_largest_region((prediction >= step / 10) & (target >= step / 10)) if step else np.ones(target.shape, bool)
        for step in range(11)
    ]
    expected = 0.0
    for pixel in np.ndindex(*target.shape):
        level = 0
        while level < 10 and regions[level + 1][pixel]:
            level += 1
        above = [alpha[pixel] - level / 10 for alpha in (prediction, target)]
        degrees = [1 - distance if distance >= 0.15 else 1 for distance in above]
        expected += abs(degrees[0] - degrees[1])

    assert expected > 1
    assert connectivity(prediction, target) == pytest.approx(expected / 1000)
