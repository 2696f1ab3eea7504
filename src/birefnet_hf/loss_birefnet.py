# SPDX-License-Identifier: MIT
"""Training losses of BiRefNet: pure functions on single maps and `BiRefNetLoss`, their weighted sum per task.

Unless a function says otherwise, every map is (batch_size, 1, height, width); "logits" come before the sigmoid,
"probabilities" after it, labels are soft masks in [0, 1], and `valid` marks with True or 1 the pixels that count
(all of them if None). Every function returns a scalar, works in float32 (float64 stays float64) whatever the dtype
of its inputs, and switches autocast off for itself.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops_birefnet import is_transformed


P = ParamSpec("P")

# config.py of the reference, `lambdas_pix_last` and `lambdas_cls`. The gradient loss has weight 1 in its train.py.
# Terms that no published recipe uses stand there with the weights patch_iou 0.5, mse 30, contour 5, structure 5 and
# threshold 100, each times 0.
_SEGMENTATION_WEIGHTS = {
    "bce": 30.0,
    "iou": 0.5,
    "patch_iou": 0.0,
    "ssim": 10.0,
    "mae": 0.0,
    "mse": 0.0,
    "structure": 0.0,
    "contour": 0.0,
    "threshold": 0.0,
    "gradient": 1.0,
    "classification": 5.0,
}
_TASK_WEIGHTS = {
    "dis": _SEGMENTATION_WEIGHTS,
    "cod": _SEGMENTATION_WEIGHTS,
    "hrsod": _SEGMENTATION_WEIGHTS,
    "general": _SEGMENTATION_WEIGHTS | {"mae": 100.0},
    "matting": _SEGMENTATION_WEIGHTS | {"mae": 100.0, "iou": 0.0},
}
_PIXEL_TERMS = tuple(name for name in _SEGMENTATION_WEIGHTS if name not in ("gradient", "classification"))

# The reference's last-epochs switch: how many epochs it lasts (config.py) and what it multiplies (train.py).
_LAST_EPOCHS = {"dis": 40, "cod": 20, "hrsod": 20, "general": 20, "matting": 10}
_LAST_EPOCHS_FACTORS = {"bce": 0.0, "iou": 0.5, "mae": 0.9}
_LAST_EPOCHS_FACTORS_MATTING = {"mse": 0.9, "ssim": 0.9}


def loss_weights(
    task: str = "dis",
    epoch: int | None = None,
    num_epochs: int | None = None,
    *,
    last_epochs: int | None = None,
    compounding: bool = False,
) -> dict[str, float]:
    """Weights of the loss terms in one epoch of a task's recipe.

    The recipes change the weights in their last epochs: bce ×0, iou ×0.5, mae ×0.9; matting mse ×0.9, ssim ×0.9.
    The result depends on the arguments alone, so a resumed run gets the weights of an uninterrupted one.

    Args:
        task: "dis", "cod", "hrsod", "general" or "matting".
        epoch: Number of the epoch, counted from 1. None gives the weights from before the switch.
        num_epochs: Length of the whole training in epochs; required with `epoch`.
        last_epochs: How many epochs the switched phase lasts: 0 for none, None for the task's own number (dis 40;
            cod, hrsod and general 20; matting 10). A training that is not longer than this is in that phase from its
            first epoch, as in the reference: short fine-tunings will want 0 or a few.
        compounding: False multiplies once. True multiplies again in every epoch of the phase, which is what the
            reference does: after 20 epochs iou is at 0.5^20 and mae at 0.12 of its value.

    Returns:
        A new dict of every term's name and weight, zeros included.

    Raises:
        ValueError: If the task is unknown, `epoch` is below 1, or `epoch` is given without `num_epochs`.
    """
    if task not in _TASK_WEIGHTS:
        raise ValueError(f"Unknown task {task!r}: use one of {', '.join(_TASK_WEIGHTS)}.")
    weights = dict(_TASK_WEIGHTS[task])
    if epoch is None:
        return weights
    if num_epochs is None:
        raise ValueError("loss_weights needs num_epochs along with epoch, to know which epochs are the last ones.")
    if epoch < 1:
        raise ValueError(f"Epochs are counted from 1, got epoch={epoch}.")
    if last_epochs is None:
        last_epochs = _LAST_EPOCHS[task]
    epochs_switched = epoch - max(0, num_epochs - last_epochs)
    if last_epochs > 0 and epochs_switched > 0:
        times = epochs_switched if compounding else 1
        for name, factor in (_LAST_EPOCHS_FACTORS_MATTING if task == "matting" else _LAST_EPOCHS_FACTORS).items():
            weights[name] *= factor**times
    return weights


def _pixel_loss(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Checks that all maps have one shape (broadcasting would hide mistakes) and makes them at least float32."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        maps = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(item.ndim != 4 or item.shape[1] != 1 or item.shape != maps[0].shape for item in maps):
            raise ValueError(
                f"{function.__name__} needs maps of one shape (batch_size, 1, height, width), got "
                f"{', '.join(str(tuple(item.shape)) for item in maps)}. Resize predictions to the labels and give "
                "labels a channel axis first."
            )
        args = tuple(_at_least_float32(value) for value in args)
        kwargs = {name: _at_least_float32(value) for name, value in kwargs.items()}
        # Not just for precision: on CUDA, autocast refuses cross entropy of probabilities.
        with torch.autocast(maps[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return checked


def _at_least_float32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64) else value


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid pixels of the whole batch, 0 if there is none."""
    return values.mean() if valid is None else (values * valid).sum() / valid.sum().clamp(min=1)


def _masked(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else values * valid


def _reduce(values: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction {reduction!r}: use 'mean' or 'sum'.")
    return values.mean() if reduction == "mean" else values.sum()


@_pixel_loss
def bce_loss(logits: Tensor, labels: Tensor, valid: Tensor | None = None, *, saturating: bool = False) -> Tensor:
    """Binary cross entropy, mean over pixels, in [0, inf).

    Args:
        logits: Predicted logits.
        labels: Masks in [0, 1].
        valid: Pixels that count.
        saturating: Go through probabilities as the reference (loss.py, `nn.BCELoss`) does: values stop at 100 and
            the gradient vanishes where the sigmoid rounds to 0 or 1 (logits beyond about 17).
    """
    if saturating:
        return _mean(F.binary_cross_entropy(logits.sigmoid(), labels, reduction="none"), valid)
    return _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), valid)


@_pixel_loss
def iou_loss(
    probabilities: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    epsilon: float = 1e-6,
) -> Tensor:
    """Soft intersection over union, 1 - IoU per image, in [0, 1] per image (loss.py, `IoULoss`).

    On soft masks it is above 0 even for the perfect prediction.

    Args:
        probabilities: Predictions in [0, 1].
        labels: Masks in [0, 1].
        valid: Pixels that count.
        reduction: "mean" over the batch, or "sum" as the reference, whose weight thus grows with the batch size.
        epsilon: Area in pixels that is added to intersection and union, so that an empty prediction of an empty
            mask has loss 0 where the reference divides 0 by 0.
    """
    probabilities, labels = _masked(probabilities, valid), _masked(labels, valid)
    intersection = (probabilities * labels).sum(dim=(1, 2, 3))  # (batch_size,)
    union = probabilities.sum(dim=(1, 2, 3)) + labels.sum(dim=(1, 2, 3)) - intersection
    return _reduce(1 - (intersection + epsilon) / (union + epsilon), reduction)


@_pixel_loss
def patch_iou_loss(
    probabilities: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    patch_size: int = 64,
    reduction: Literal["mean", "sum"] = "mean",
    epsilon: float = 1.0,
) -> Tensor:
    """Soft IoU loss per square patch, in [0, 1] per patch.

    Meant by the reference's `PatchIoULoss` (loss.py), which walks over the batch and channel axes instead of the
    pixels and so sees nothing but the top left patch: this function walks over the whole image in both reductions.

    Args:
        probabilities: Predictions in [0, 1].
        labels: Masks in [0, 1].
        valid: Pixels that count; patches without any are left out.
        patch_size: Side of a patch in pixels. The patches start at the top left; those at the right and bottom
            border are smaller where the size does not divide evenly.
        reduction: "mean" over all patches of the batch, or "sum" over them as the reference.
        epsilon: As in `iou_loss`, but one pixel: most patches of a mask are empty, and with a tiny epsilon each of
            them would cost 1 until the prediction there is zero to the last digit.
    """
    probabilities, labels = _masked(probabilities, valid), _masked(labels, valid)

    def patch_sums(values: Tensor) -> Tensor:  # (batch_size, 1, patches down, patches across)
        return F.avg_pool2d(values, patch_size, ceil_mode=True, divisor_override=1)

    intersection = patch_sums(probabilities * labels)
    union = patch_sums(probabilities) + patch_sums(labels) - intersection
    losses = 1 - (intersection + epsilon) / (union + epsilon)
    if valid is None:
        return _reduce(losses, reduction)
    used = (patch_sums(valid) > 0).to(losses)
    # An unused patch is empty on both sides, so its loss is 0: only the mean has to leave it out.
    return _mean(losses, used) if reduction == "mean" else _reduce(losses, reduction)


def _sum_shifted(values: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """`_gaussian_blur`, in operations that autograd can follow."""
    radius = kernel_size // 2
    taps = [math.exp(-((i - radius) ** 2) / (2 * sigma**2)) for i in range(kernel_size)]
    taps = [tap / sum(taps) for tap in taps]
    for dim, padding in ((3, (radius, radius)), (2, (0, 0, radius, radius))):
        size = values.shape[dim]
        padded = F.pad(values, padding)
        values = values * taps[radius]
        for shift in range(1, radius + 1):
            pair = padded.narrow(dim, radius - shift, size) + padded.narrow(dim, radius + shift, size)
            values = torch.add(values, pair, alpha=taps[radius - shift])
    return values


class _GaussianBlur(torch.autograd.Function):
    """A symmetric window over zeros is its own transpose: the gradient is blurred in the same way."""

    @staticmethod
    def forward(ctx, values: Tensor, kernel_size: int, sigma: float) -> Tensor:
        ctx.window = (kernel_size, sigma)
        return _sum_shifted(values, kernel_size, sigma)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _GaussianBlur.apply(gradient, *ctx.window), None, None


def _gaussian_blur(values: Tensor, kernel_size: int = 11, sigma: float = 1.5) -> Tensor:
    """Blurs with a normalised Gaussian and zero padding; the same as a 2-D window of that size.

    Sums of shifted maps, one axis after the other, rather than a convolution: about 20 times as fast on a CPU
    (forward and backward), it stores nothing for the backward pass, and TF32 cannot touch it. That matters because
    SSIM subtracts blurred maps of nearly equal value.
    """
    if is_transformed():  # torch.func's transforms want operations that they know
        return _sum_shifted(values, kernel_size, sigma)
    return _GaussianBlur.apply(values, kernel_size, sigma)


@_pixel_loss
def ssim_loss(probabilities: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Structural dissimilarity (1 - SSIM) / 2, mean over pixels, in [0, 1] (loss.py, `SSIMLoss`).

    The window is an 11×11 Gaussian with sigma 1.5, the image zero beyond its border and, with `valid`, outside the
    valid pixels.

    Args:
        probabilities: Predictions in [0, 1].
        labels: Masks in [0, 1].
        valid: Pixels that count.
    """
    stability_mean, stability_variance = 0.01**2, 0.03**2
    probabilities, labels = _masked(probabilities, valid), _masked(labels, valid)
    mean_p, mean_l = _gaussian_blur(probabilities), _gaussian_blur(labels)
    mean_pp, mean_ll, mean_pl = mean_p * mean_p, mean_l * mean_l, mean_p * mean_l
    squares = _gaussian_blur(probabilities * probabilities + labels * labels)
    variances = squares - mean_pp - mean_ll
    covariance = _gaussian_blur(probabilities * labels) - mean_pl
    similarity = ((2 * mean_pl + stability_mean) * (2 * covariance + stability_variance)) / (
        (mean_pp + mean_ll + stability_mean) * (variances + stability_variance)
    )
    return _mean((1 - similarity) / 2, valid)


@_pixel_loss
def mae_loss(probabilities: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean absolute error of probabilities against masks in [0, 1], in [0, 1]."""
    return _mean((probabilities - labels).abs(), valid)


@_pixel_loss
def mse_loss(probabilities: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of probabilities against masks in [0, 1], in [0, 1]."""
    return _mean((probabilities - labels).square(), valid)


@_pixel_loss
def structure_loss(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross entropy plus IoU, both weighted up to 6-fold near contours, mean over images, in [0, inf).

    The weight of a pixel is 1 + 5·|mean of the labels in the 31×31 window around it - its label|, with zeros beyond
    the border. From F3Net (Wei et al., AAAI 2020) by way of MVANet; the reference (loss.py, `StructureLoss`) expects
    logits too but is handed probabilities, which go through a second sigmoid: feed probabilities to get its numbers.

    Args:
        logits: Predicted logits.
        labels: Masks in [0, 1].
        valid: Pixels that count.
    """
    labels = _masked(labels, valid)
    # The mean in two passes: 62 instead of 961 additions per pixel.
    neighbourhood = F.avg_pool2d(labels, (31, 1), stride=1, padding=(15, 0))
    neighbourhood = F.avg_pool2d(neighbourhood, (1, 31), stride=1, padding=(0, 15))
    weights = _masked(1 + 5 * (neighbourhood - labels).abs(), valid)

    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    # A valid pixel weighs at least 1, so the clamp is for images without any.
    cross_entropy = (weights * cross_entropy).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1)
    probabilities = logits.sigmoid()
    intersection = (probabilities * labels * weights).sum(dim=(1, 2, 3))
    union = ((probabilities + labels) * weights).sum(dim=(1, 2, 3)) - intersection
    return (cross_entropy + 1 - (intersection + 1) / (union + 1)).mean()


@_pixel_loss
def contour_loss(probabilities: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Active contour loss: 10 × mean length of the contour plus mean error of the two regions, in [0, about 15.1].

    After Chen et al., "Learning Active Contour Models for Medical Image Segmentation" (CVPR 2019), whose code and
    the reference (loss.py, `ContourLoss`) take the vertical difference one pixel below and the horizontal one one
    pixel to the right of the pixel they belong to; so does this.

    Args:
        probabilities: Predictions in [0, 1], at least 3×3 pixels.
        labels: Masks in [0, 1].
        valid: Pixels that count.
    """

    def below(values: Tensor) -> tuple[Tensor, Tensor]:  # one and two pixels below
        return values[..., 1:-1, :-2], values[..., 2:, :-2]

    def right(values: Tensor) -> tuple[Tensor, Tensor]:  # one and two pixels to the right
        return values[..., :-2, 1:-1], values[..., :-2, 2:]

    (below_1, below_2), (right_1, right_2) = below(probabilities), right(probabilities)
    # The small constant keeps the square root differentiable on flat areas.
    length = ((below_2 - below_1).square() + (right_2 - right_1).square() + 1e-8).sqrt()  # (B, 1, H - 2, W - 2)
    length_valid = None
    if valid is not None:
        (below_1, below_2), (right_1, right_2) = below(valid), right(valid)
        length_valid = below_1 * below_2 * right_1 * right_2
    region = probabilities * (labels - 1).square() + (1 - probabilities) * labels.square()
    return 10 * _mean(length, length_valid) + _mean(region, valid)


@_pixel_loss
def threshold_loss(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Regularisation that pushes probabilities to 0 or 1: mean of 2·p·(1 - p), in [0, 0.5] (loss.py, `ThrReg_loss`)."""
    return _mean(1 - (probabilities.square() + (probabilities - 1).square()), valid)


@_pixel_loss
def gradient_loss(
    logits: Tensor,
    target_logits: Tensor,
    valid: Tensor | None = None,
    *,
    detach_target: bool = True,
) -> Tensor:
    """Cross entropy of one level's gradient map, the supervision of the outward reference (train.py).

    In [0, inf); at least the entropy of the target, so not near 0 even for a perfect prediction.

    Args:
        logits: Predicted gradient logits of the level, resized to the target.
        target_logits: Laplacian of the input image times the level's own mask logits.
        valid: Pixels that count.
        detach_target: Take the target as given. The reference (train.py) does not: there this loss also moves the
            mask logits inside the target so that the gradient becomes easier to predict. (Its cross entropy of
            probabilities then gives NaN gradients where the prediction's sigmoid rounds to 0 or 1; this one, of
            logits, does not, and is the same elsewhere.)
    """
    targets = target_logits.sigmoid()
    if detach_target:
        targets = targets.detach()
    return _mean(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), valid)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the auxiliary classification head, mean over the batch, in [0, inf).

    Args:
        logits: (batch_size, classes), before the softmax.
        labels: (batch_size,) int64 class indices.
    """
    return F.cross_entropy(_at_least_float32(logits), labels)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (batch_size, 1, h, w) logits to `size` = (height, width) in float32.

    Bilinear with align_corners=True, as the network itself and the reference's loss.py do.
    """
    logits = _at_least_float32(logits)
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


class BiRefNetLoss(nn.Module):
    """Weighted sum of the losses over all of the model's training outputs. Has no parameters and no state.

    The default differs from the reference where that is odd: IoU is averaged over the batch, the target of the
    gradient loss is detached, the structure loss acts on logits, and cross entropy is computed from logits. Empty
    masks give finite losses in both modes.

    Attributes:
        task: The recipe that it was built for.
        weights: Dict of term name to weight. May be changed at any time, usually once per epoch:
            `criterion.weights = loss_weights("dis", epoch, num_epochs)`. Terms that are missing or 0 are not computed.
    """

    def __init__(self, task: str = "dis", weights: Mapping[str, float] | None = None, reference: bool = False):
        """Builds the loss of a task.

        Args:
            task: Recipe that gives the weights: "dis", "cod", "hrsod", "general" or "matting".
            weights: Weights that replace the recipe's, by term name; terms not named here keep theirs.
            reference: Compute what the reference computes: IoU (and patch IoU) summed over the batch, gradient
                target not detached, structure loss on probabilities, bce on probabilities.

        Raises:
            ValueError: If the task or a term's name is unknown.
        """
        super().__init__()
        self.task = task
        self.weights = loss_weights(task) | dict(weights or {})
        self.reference = reference
        self._check_weights()

    def forward(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        gradient_logits: Sequence[Tensor] = (),
        gradient_targets: Sequence[Tensor] = (),
        class_logits: Tensor | None = None,
        class_labels: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss.

        Every term acts in float32 at the labels' size, to which the logits are resized. All outputs weigh the same
        and are summed, as are the levels of the gradient loss.

        Args:
            logits: Mask logits of every output, each (batch_size, 1, h, w) of any size.
            labels: (batch_size, 1, height, width) or (batch_size, height, width), floating point or bool, masks in
                [0, 1]; values beyond are clamped.
            gradient_logits: Gradient predictions of every level, each (batch_size, 1, h, w).
            gradient_targets: Their targets before the sigmoid, each (batch_size, 1, H, W).
            class_logits: (batch_size, classes) of the auxiliary head, if the model has one.
            class_labels: (batch_size,) int64; without them there is no classification term.
            valid: Shape of the labels, bool or 0 and 1: pixels that count. Labels elsewhere may hold anything. Is
                resized to the gradient targets (nearest) where their size differs.

        Returns:
            The loss, and a dict of detached scalars for logging: each term times its weight, averaged over the
            outputs (the reference's log) for the pixel terms, summed over the levels for "gradient".

        Raises:
            ValueError: If shapes or dtypes do not fit, or `weights` has an unknown name.
        """
        self._check_weights()
        labels, valid = _prepare_labels(labels, valid)
        _check_logits(logits, labels)
        if len(gradient_logits) != len(gradient_targets):
            raise ValueError(
                f"Got {len(gradient_logits)} gradient_logits but {len(gradient_targets)} gradient_targets: "
                "every level needs both."
            )
        if class_labels is not None and class_logits is None:
            raise ValueError("Got class_labels, but the model gives no class_logits: it has no classification head.")

        loss = labels.new_zeros(())
        terms: dict[str, Tensor] = {}

        def add(name: str, value: Tensor, outputs: int = 1) -> None:
            nonlocal loss
            value = self.weights[name] * value
            loss = loss + value
            terms[name] = terms.get(name, 0) + value.detach() / outputs

        for output in logits:
            output = resize_logits(output, labels.shape[-2:])
            probabilities = output.sigmoid()
            for name in _PIXEL_TERMS:
                if self.weights.get(name, 0) != 0:
                    add(name, self._pixel_term(name, output, probabilities, labels, valid), outputs=len(logits))

        if self.weights.get("gradient", 0) != 0:
            for output, target in zip(gradient_logits, gradient_targets, strict=True):
                size = target.shape[-2:]
                level_valid = valid if valid is None or valid.shape[-2:] == size else F.interpolate(valid, size)
                output = resize_logits(output, size)
                add("gradient", gradient_loss(output, target, level_valid, detach_target=not self.reference))

        if self.weights.get("classification", 0) != 0 and class_logits is not None and class_labels is not None:
            add("classification", classification_loss(class_logits, class_labels))
        return loss, terms

    def _pixel_term(
        self, name: str, logits: Tensor, probabilities: Tensor, labels: Tensor, valid: Tensor | None
    ) -> Tensor:
        reduction = "sum" if self.reference else "mean"
        match name:
            case "bce":
                return bce_loss(logits, labels, valid, saturating=self.reference)
            case "iou":
                return iou_loss(probabilities, labels, valid, reduction=reduction)
            case "patch_iou":
                return patch_iou_loss(probabilities, labels, valid, reduction=reduction)
            case "ssim":
                return ssim_loss(probabilities, labels, valid)
            case "mae":
                return mae_loss(probabilities, labels, valid)
            case "mse":
                return mse_loss(probabilities, labels, valid)
            case "structure":
                return structure_loss(probabilities if self.reference else logits, labels, valid)
            case "contour":
                return contour_loss(probabilities, labels, valid)
            case "threshold":
                return threshold_loss(probabilities, valid)
        raise ValueError(f"{name!r} is no loss on pixels.")

    def _check_weights(self) -> None:
        unknown = [name for name in self.weights if name not in _SEGMENTATION_WEIGHTS]
        if unknown:
            raise ValueError(f"Unknown loss terms {unknown} in weights: use {', '.join(_SEGMENTATION_WEIGHTS)}.")


def _prepare_labels(labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks labels and valid mask and brings both to (batch_size, 1, height, width), floating point."""
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        raise ValueError(
            f"labels must be masks in [0, 1], floating point or bool, got {labels.dtype}. Divide 8-bit masks by 255: "
            "labels.float() / 255; masks that hold just 0 and 1 need no more than labels.float()."
        )
    if labels.ndim == 3:
        labels = labels.unsqueeze(1)  # (B, H, W) -> (B, 1, H, W)
    if labels.ndim != 4 or labels.shape[1] != 1:
        raise ValueError(
            "labels must have the shape (batch_size, 1, height, width) or (batch_size, height, width), got "
            f"{tuple(labels.shape)}."
        )
    labels = _at_least_float32(labels).clamp(0, 1)
    if valid is None:
        return labels, None
    valid = valid.unsqueeze(1) if valid.ndim == 3 else valid
    if valid.shape != labels.shape:
        raise ValueError(f"valid must have the shape of labels {tuple(labels.shape)}, got {tuple(valid.shape)}.")
    # Whatever stands outside (255, NaN) must not reach the sums, not even times 0.
    return labels.masked_fill(valid == 0, 0), _at_least_float32(valid)


def _check_logits(logits: Sequence[Tensor], labels: Tensor) -> None:
    if isinstance(logits, Tensor):
        raise ValueError("logits must be a list of maps, one per output: pass [logits] for a single one.")
    if len(logits) == 0:
        raise ValueError("BiRefNetLoss needs at least one map of logits.")
    for output in logits:
        if output.ndim != 4 or output.shape[:2] != labels.shape[:2]:
            raise ValueError(
                f"Every map of logits must have the shape (batch_size, 1, height, width) with the labels' batch size "
                f"{labels.shape[0]}, got {tuple(output.shape)}."
            )
