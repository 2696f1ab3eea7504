"""Evaluation metrics for dichotomous segmentation and matting, one image pair at a time and summarised over a set.

`compute_metrics` scores one pair at the mask's own size, `summarize` averages the results of a data set, and `METRICS`
says for each number what it measures, how the inputs are prepared and who proposed it. `compute_metrics` is a plain
function of arrays, so images can be spread over a `concurrent.futures.ProcessPoolExecutor`.

Two conventions decide how the prediction is prepared; a published number means nothing without one of them:

- `"raw"` (default): predictions are scored as they are. Constant grey stays constant grey.
- `"upstream"`: what BiRefNet's own evaluation does (reference file `evaluation/metrics.py`). Each prediction is
  stretched to its own minimum and maximum before F, weighted F, MAE, S, E, BIoU and MSE, and MSE is taken against the
  binarised mask. Hand over the 8-bit prediction to get upstream's numbers exactly; but where its S-measure is 0 for want
  of a variance (of a single pixel) and its HCE for a frame that is wrong throughout, theirs are those of the papers here.

In both, masks are binarised at 8-bit level > 128 wherever a metric wants a binary mask (IoU, which training watches:
above one half), and HCE, mBA, IoU, SAD, Gradient and Connectivity take the prediction without stretching.

Needs the `train` extra (PySODMetrics, OpenCV, SciPy), imported on first use.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import numpy as np


Convention = Literal["raw", "upstream"]


class Metric(NamedTuple):
    """What one number is: enough to print beside it in a table.

    `raw` and `upstream` state the inputs under each convention; `aggregation` how a data set's number is made.
    """

    label: str
    higher_is_better: bool
    scale: str
    raw: str
    upstream: str
    aggregation: str
    source: str


_UNIT = "0 to 1"
_E_UNIT = "0 to n / (n - 1) for n pixels, as published"
_SOFT_BINARY = "soft prediction as it is; mask > 128"
_SOFT_BINARY_STRETCHED = "soft prediction, min-max per image; mask > 128"
_SWEEP = "prediction at 256 thresholds, as it is; mask > 128"
_SWEEP_STRETCHED = "prediction at 256 thresholds, min-max per image; mask > 128"
_BINARY = "prediction > 128, mask > 128, no min-max"
_SOFT = "soft prediction, soft mask, whole image, no min-max"
_MEAN = "mean over images"
_CURVE_MAX = "maximum of the mean curve over images"
_CURVE_MEAN = "mean of the mean curve over images"
_F_SOURCE = "Achanta et al., CVPR 2009 (beta^2 = 0.3); PySODMetrics"
_E_SOURCE = "Fan et al., IJCAI 2018; PySODMetrics"
_BIOU_SOURCE = "Cheng et al., CVPR 2021 (band 2 % of the diagonal), soft maps as in BiRefNet's evaluation"

METRICS: dict[str, Metric] = {
    "max_f": Metric("max F", True, _UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MAX, _F_SOURCE),
    "mean_f": Metric("mean F", True, _UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MEAN, _F_SOURCE),
    "weighted_f": Metric(
        "weighted F",
        True,
        _UNIT,
        _SOFT_BINARY,
        _SOFT_BINARY_STRETCHED,
        _MEAN,
        "Margolin et al., CVPR 2014 (beta = 1); PySODMetrics",
    ),
    "mae": Metric(
        "MAE", False, _UNIT, _SOFT_BINARY, _SOFT_BINARY_STRETCHED, _MEAN, "Perazzi et al., CVPR 2012; PySODMetrics"
    ),
    "s_measure": Metric(
        "S",
        True,
        _UNIT,
        _SOFT_BINARY,
        _SOFT_BINARY_STRETCHED,
        _MEAN,
        "Fan et al., ICCV 2017 (alpha = 0.5); PySODMetrics",
    ),
    "max_e": Metric("max E", True, _E_UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MAX, _E_SOURCE),
    "mean_e": Metric("mean E", True, _E_UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MEAN, _E_SOURCE),
    "hce": Metric(
        "HCE",
        False,
        "control points and regions to correct, from 0",
        _BINARY,
        _BINARY,
        _MEAN,
        "Qin et al., ECCV 2022 (relax 5, epsilon 2); PySODMetrics",
    ),
    "mba": Metric(
        "mBA",
        True,
        _UNIT,
        _BINARY,
        _BINARY,
        "mean over images whose mask has a boundary",
        "Cheng et al. (CascadePSP), CVPR 2020 (5 radii from 1 to (width + height) / 300)",
    ),
    "max_biou": Metric("max BIoU", True, _UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MAX, _BIOU_SOURCE),
    "mean_biou": Metric("mean BIoU", True, _UNIT, _SWEEP, _SWEEP_STRETCHED, _CURVE_MEAN, _BIOU_SOURCE),
    "iou": Metric(
        "IoU", True, _UNIT, *["prediction > 0.5, mask > 0.5, no min-max"] * 2, _MEAN, "Jaccard, 1901; not in upstream"
    ),
    "sad": Metric("SAD", False, "thousands of pixels", _SOFT, _SOFT, _MEAN, "Rhemann et al., CVPR 2009"),
    "mse": Metric("MSE", False, _UNIT, _SOFT, _SOFT_BINARY_STRETCHED, _MEAN, "Rhemann et al., CVPR 2009"),
    "gradient": Metric(
        "Gradient", False, "thousands, from 0", _SOFT, _SOFT, _MEAN, "Rhemann et al., CVPR 2009 (sigma = 1.4)"
    ),
    "connectivity": Metric(
        "Connectivity",
        False,
        "thousands of pixels",
        _SOFT,
        _SOFT,
        _MEAN,
        "Rhemann et al., CVPR 2009 (step 0.1, dead zone 0.15, 4-neighbours)",
    ),
}

# Numbers that are read off a curve over thresholds: the mean curve of the data set for a summary.
_CURVE_METRICS: dict[str, tuple[str, Callable[[np.ndarray], np.floating]]] = {
    "max_f": ("f", np.max),
    "mean_f": ("f", np.mean),
    "max_e": ("e", np.max),
    "mean_e": ("e", np.mean),
    "max_biou": ("biou", np.max),
    "mean_biou": ("biou", np.mean),
}

# An 8-bit value is above level 128 exactly when it is above this; half a level of room absorbs the rounding of masks
# that were divided by 255 in another precision.
_BINARY_THRESHOLD = 128.5 / 255


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of one image pair.

    Attributes:
        scores: The requested metrics of this image alone, in the order of `METRICS`: a row of a table. `max_*` is the
            maximum of this image's own curve, so the mean of a column of rows is not `summarize`'s number.
        curves: What `summarize` needs besides: `"f"`, `"e"`, `"biou"`, each (256,) float64 over the thresholds
            255 / 255, 254 / 255, ..., 0 (prediction >= threshold counts as foreground).
        convention: `"raw"` or `"upstream"`.
    """

    scores: dict[str, float]
    curves: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    convention: Convention = "raw"


def compute_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    metrics: Iterable[str] | None = None,
    convention: Convention = "raw",
) -> ImageMetrics:
    """Scores one predicted mask against its target, at the target's size.

    mBA of an empty or full mask is NaN, because there is no boundary to be right about; nothing else is ever NaN. F,
    weighted F and BIoU of an empty mask are 0 whatever the prediction, and E of a perfect one is n / (n - 1) for n
    pixels, both as in PySODMetrics and upstream. IoU of two empty masks is 1.

    Args:
        prediction: (height, width), uint8 in [0, 255], bool, or float in [0, 1]. Floats are not quantised to 8 bits,
            though F, E and BIoU see them in 256 steps.
        target: (height, width), same types; may be soft.
        metrics: Names from `METRICS`; all if None. HCE and weighted F take about half of the time, so leave them out
            where nobody reads them.
        convention: See the module's description.

    Raises:
        ValueError: Sizes differ, an array is not (height, width) or is empty, a float is NaN or outside [0, 1], or a
            name is unknown.
        TypeError: An array is of another dtype.
        ImportError: The `train` extra is not installed.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {get_args(Convention)}, got {convention!r}")
    names = list(METRICS) if metrics is None else list(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"Unknown metrics {unknown}: choose from {list(METRICS)}")

    alpha = _to_unit_interval(prediction, "prediction")
    matte = _to_unit_interval(target, "target")
    if alpha.shape != matte.shape:
        raise ValueError(
            f"prediction is {alpha.shape} and target {matte.shape} (height, width): resize the prediction to the "
            "target's size before scoring it"
        )
    mask = matte > _BINARY_THRESHOLD
    scored = _stretch(alpha) if convention == "upstream" else alpha

    curve_functions = {"f": _f_curve, "e": _e_curve, "biou": _boundary_iou_curve}
    curve_names = sorted({_CURVE_METRICS[name][0] for name in names if name in _CURVE_METRICS})
    curves = {name: curve_functions[name](scored, mask) for name in curve_names}

    score_functions = {
        "weighted_f": lambda: _weighted_f(scored, mask),
        "mae": lambda: _mean_absolute_error(scored, mask),
        "s_measure": lambda: _structure_measure(scored, mask),
        "hce": lambda: _human_correction_effort(alpha > _BINARY_THRESHOLD, mask),
        "mba": lambda: _mean_boundary_accuracy(alpha > _BINARY_THRESHOLD, mask),
        "iou": lambda: _intersection_over_union(alpha > 0.5, matte > 0.5),
        "sad": lambda: np.abs(alpha - matte).sum() / 1000,
        "mse": lambda: np.mean((scored - (mask if convention == "upstream" else matte)) ** 2),
        "gradient": lambda: _gradient_error(alpha, matte),
        "connectivity": lambda: _connectivity_error(alpha, matte),
    }
    scores = {}
    for name in METRICS:
        if name not in names:
            continue
        if name in _CURVE_METRICS:
            curve_name, reduce = _CURVE_METRICS[name]
            scores[name] = float(reduce(curves[curve_name]))
        else:
            scores[name] = float(score_functions[name]())
    return ImageMetrics(scores=scores, curves=curves, convention=convention)


def summarize(results: Sequence[ImageMetrics]) -> dict[str, float]:
    """Metrics of a data set, from those of its images.

    Max F, max E and max BIoU are the maximum over thresholds of the images' mean curve, one threshold for the whole
    set, as in PySODMetrics and upstream: at most the mean of the per-image maxima. The others are means over images,
    mBA over those where it is defined (NaN if there is none).

    Raises:
        ValueError: No result, or results of different metrics or conventions.
    """
    if not results:
        raise ValueError("summarize needs the metrics of at least one image")
    names = list(results[0].scores)
    for result in results:
        if list(result.scores) != names or result.convention != results[0].convention:
            raise ValueError(
                f"summarize needs the same metrics and convention for each image, got {names} "
                f"({results[0].convention}) and {list(result.scores)} ({result.convention})"
            )
    summary = {}
    for name in names:
        if name in _CURVE_METRICS:
            curve_name, reduce = _CURVE_METRICS[name]
            summary[name] = float(reduce(np.mean([result.curves[curve_name] for result in results], axis=0)))
        else:
            scores = np.array([result.scores[name] for result in results])
            defined = scores[~np.isnan(scores)]
            summary[name] = float(defined.mean()) if defined.size else float("nan")
    return summary


def _to_unit_interval(array: np.ndarray, name: str) -> np.ndarray:
    """(height, width) uint8, bool or float -> float64 in [0, 1]."""
    array = np.asarray(array)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must be (height, width) with at least one pixel, got shape {array.shape}")
    if array.dtype == np.uint8:
        if name == "target" and array.max() == 1:
            raise ValueError(f"{name} is uint8, so 255 is foreground, but holds 0 and 1 only: pass {name} > 0")
        return array / 255
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} must be uint8 in [0, 255], bool, or float in [0, 1], got {array.dtype}")
    array = array.astype(np.float64)
    if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
        raise ValueError(
            f"{name} is float, so it must lie in [0, 1], but spans {array.min()} to {array.max()}: divide by 255, or "
            "pass uint8"
        )
    return array


def _stretch(prediction: np.ndarray) -> np.ndarray:
    """Per-image min-max; a constant prediction stays as it is (reference `_prepare_data`)."""
    low, high = prediction.min(), prediction.max()
    return prediction if low == high else (prediction - low) / (high - low)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This metric needs the module {module} ({error}): pip install birefnet-hf[train]"
        ) from error


def _f_curve(prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
    sod = _import("py_sod_metrics")
    measure = sod.FmeasureV2({"f": sod.FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)})
    measure.step(prediction, mask, normalize=False)
    return measure.get_results()["f"]["dynamic"]


def _e_curve(prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
    measure = _import("py_sod_metrics").Emeasure()
    measure.step(prediction, mask, normalize=False)
    curve = measure.get_results()["em"]["curve"]
    # The definition divides by (pixels - 1 + eps): for a single pixel undo the division by eps.
    return curve * np.spacing(1) if mask.size == 1 else curve


def _boundary_iou_curve(prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """IoU of the inner boundary bands at 256 thresholds, (256,).

    The band of a soft prediction is the prediction minus its erosion, which for a binary one is Cheng et al.'s band of
    foreground pixels near the boundary; thresholds act on it (reference `BIoUMeasure`).
    """
    sod = _import("py_sod_metrics")
    levels = (prediction * 255).astype(np.uint8)
    measure = sod.FmeasureV2({"iou": sod.IOUHandler(with_dynamic=True, with_adaptive=False)})
    measure.step(_inner_band(levels) / 255, _inner_band(mask.astype(np.uint8)) > 0, normalize=False)
    return measure.get_results()["iou"]["dynamic"]


def _inner_band(levels: np.ndarray) -> np.ndarray:
    """What an erosion by 2 % of the diagonal takes away; outside the image counts as background. (height, width)"""
    distance = max(1, round(0.02 * float(np.hypot(*levels.shape))))
    ndimage = _import("scipy.ndimage")
    return levels - ndimage.minimum_filter(levels, size=2 * distance + 1, mode="constant", cval=0)


def _weighted_f(prediction: np.ndarray, mask: np.ndarray) -> float:
    measure = _import("py_sod_metrics").WeightedFmeasure(beta=1)
    measure.step(prediction, mask, normalize=False)
    return measure.get_results()["wfm"]


def _mean_absolute_error(prediction: np.ndarray, mask: np.ndarray) -> float:
    measure = _import("py_sod_metrics").MAE()
    measure.step(prediction, mask, normalize=False)
    return measure.get_results()["mae"]


def _structure_measure(prediction: np.ndarray, mask: np.ndarray) -> float:
    class StructureMeasure(_import("py_sod_metrics").Smeasure):
        def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
            # A centroid on the last row or column leaves quadrants of no area and no weight, where the parent's
            # means over nothing are NaN and would spoil the sum.
            return 0.0 if pred.size == 0 else super().ssim(pred, gt)

    measure = StructureMeasure(alpha=0.5)
    measure.step(prediction, mask, normalize=False)
    return measure.get_results()["sm"]


def _human_correction_effort(prediction_mask: np.ndarray, mask: np.ndarray) -> float:
    """Points and regions to correct. Skeletonises the mask in each call, half of the time or more.

    Upstream keeps the skeletons in a folder beside the masks; here nothing is ever written.
    """
    measure = _import("py_sod_metrics").HumanCorrectionEffortMeasure(relax=5, epsilon=2.0)
    # PySODMetrics cuts the prediction at 0.5; handing over 0 and 1 keeps upstream's cut above level 128.
    measure.step(prediction_mask.astype(np.float64), mask, normalize=False)
    return measure.get_results()["hce"]


def _mean_boundary_accuracy(prediction_mask: np.ndarray, mask: np.ndarray) -> float:
    """Pixel accuracy in bands of five widths around the mask's boundary, averaged; NaN if there is no boundary.

    The band is the morphological gradient with OpenCV's ellipse, whose pixels decide the number (CascadePSP; reference
    `MBAMeasure`).
    """
    cv2 = _import("cv2")
    height, width = mask.shape
    steps = 5
    step = ((width + height) / 300 - 1) / steps  # negative below 300 pixels: all radii are 1
    correct = prediction_mask == mask
    accuracies = []
    for index in range(steps):
        radius = 1 + int(step * index)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        band = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, kernel) > 0
        if not band.any():
            return float("nan")
        accuracies.append(correct[band].mean())
    return float(np.mean(accuracies))


def _intersection_over_union(prediction_mask: np.ndarray, mask: np.ndarray) -> float:
    union = np.count_nonzero(prediction_mask | mask)
    return np.count_nonzero(prediction_mask & mask) / union if union else 1.0


def _gradient_error(prediction: np.ndarray, target: np.ndarray) -> float:
    """Sum of squared differences of the gradient magnitudes, in thousands."""
    difference = _gradient_magnitude(prediction) - _gradient_magnitude(target)
    return float((difference**2).sum() / 1000)


def _gradient_magnitude(alpha: np.ndarray) -> np.ndarray:
    """(height, width) -> (height, width), by first derivatives of a Gaussian of sigma 1.4.

    As in the code behind published figures (Rhemann et al. 2009; Xu et al. 2017): 9 taps, kernels scaled to unit
    Euclidean norm, not to unit response, and replicated borders.
    """
    ndimage = _import("scipy.ndimage")
    sigma = 1.4
    offsets = np.arange(-4, 5)
    smooth = np.exp(-(offsets**2) / (2 * sigma**2))
    derivative = offsets * smooth
    smooth, derivative = smooth / np.linalg.norm(smooth), derivative / np.linalg.norm(derivative)

    def filtered(along_rows: np.ndarray, along_columns: np.ndarray) -> np.ndarray:
        rows = ndimage.correlate1d(alpha, along_rows, axis=0, mode="nearest")
        return ndimage.correlate1d(rows, along_columns, axis=1, mode="nearest")

    return np.hypot(filtered(derivative, smooth), filtered(smooth, derivative))


def _connectivity_error(prediction: np.ndarray, target: np.ndarray) -> float:
    """Sum of differences in how far each pixel stands out of the shared largest region, in thousands of pixels.

    A pixel's level is the last threshold (steps of 0.1) up to which it stays in the largest 4-connected region where
    both mattes reach the threshold. Its degree of connection is 1 - d, with d the alpha above that level if at least
    0.15, else 0 (Rhemann et al. 2009, section 5, in the form of Xu et al. 2017).
    """
    ndimage = _import("scipy.ndimage")
    shared = np.minimum(prediction, target)
    level = np.ones_like(shared)
    connected = np.ones(shared.shape, dtype=bool)
    for step in range(1, 11):
        labels, count = ndimage.label(shared >= step / 10)
        if count == 0:
            level[connected] = (step - 1) / 10
            break
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0  # label 0 is what lies below the threshold
        largest = labels == sizes.argmax()
        level[connected & ~largest] = (step - 1) / 10
        connected &= largest

    def degree(alpha: np.ndarray) -> np.ndarray:
        distance = alpha - level
        return 1 - np.where(distance >= 0.15, distance, 0)

    return float(np.abs(degree(prediction) - degree(target)).sum() / 1000)
