# SPDX-License-Identifier: MIT
"""Losses: numbers of the reference, closed forms, and the cases that break the reference's code."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from birefnet_hf.loss_birefnet import (
    BiRefNetLoss,
    _gaussian_blur,
    _sum_shifted,
    bce_loss,
    classification_loss,
    contour_loss,
    gradient_loss,
    iou_loss,
    loss_weights,
    mae_loss,
    mse_loss,
    patch_iou_loss,
    resize_logits,
    ssim_loss,
    structure_loss,
    threshold_loss,
)


PARITY = Path(__file__).parent / "parity"
BACKBONES = ("pvt_v2_b0", "swin_v1_t")
TASKS = ("dis", "cod", "hrsod", "general", "matting")
# Our name -> name in the reference numbers.
PIXEL_TERMS = {
    "bce": "bce",
    "iou": "iou",
    "ssim": "ssim",
    "mae": "mae",
    "mse": "mse",
    "structure": "structure",
    "contour": "cnt",
    "threshold": "reg",
}
ALL_TERMS = tuple(loss_weights("dis"))
# Every loss on one map and labels, by name; the logit losses turn probabilities back.
ON_PROBABILITIES = {
    "bce": lambda p, y, valid=None: bce_loss(p.logit(1e-6), y, valid),
    "iou": iou_loss,
    "patch_iou": patch_iou_loss,
    "ssim": ssim_loss,
    "mae": mae_loss,
    "mse": mse_loss,
    "structure": lambda p, y, valid=None: structure_loss(p.logit(1e-6), y, valid),
    "contour": contour_loss,
    "threshold": lambda p, y, valid=None: threshold_loss(p, valid),
    "gradient": lambda p, y, valid=None: gradient_loss(p.logit(1e-6), y.logit(1e-6), valid),
}


def only(*names: str) -> dict[str, float]:
    """Weights 1 for the named terms, 0 for all others."""
    return {name: float(name in names) for name in ALL_TERMS}


def random_maps(
    height: int = 24, width: int = 20, batch_size: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, 1, height, width, generator=generator) * 2
    labels = (torch.rand(batch_size, 1, height, width, generator=generator) > 0.6).float()
    return logits, labels


def test_gradient_of_the_blur_is_autograds():
    values, weights = torch.randn(2, 2, 1, 17, 14, dtype=torch.float64).unbind()
    values.requires_grad_()
    expected = torch.autograd.grad((_sum_shifted(values, 11, 1.5) * weights).sum(), values)[0]
    gradient = torch.autograd.grad((_gaussian_blur(values) * weights).sum(), values)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=1e-12)
    assert torch.autograd.gradgradcheck(_gaussian_blur, values[:1, :, :6, :6].detach().requires_grad_())


@pytest.fixture(scope="module", params=BACKBONES)
def reference(request) -> dict:
    """Predictions, targets and loss values of the reference implementation."""
    spec = importlib.util.spec_from_file_location("parity_recipe", PARITY / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    record = json.loads((PARITY / f"{request.param}.train.json").read_text(encoding="utf-8"))
    tensors = load_file(PARITY / f"{request.param}.train.safetensors")
    batch_size, _, height, width = record["input"]["shape"]
    return {
        "labels": torch.from_numpy(recipe.mask((batch_size, 1, height, width), record["input"]["mask_seed"])),
        "logits": [tensors[f"preds.{i}"] for i in range(4)],
        "gradient_logits": [tensors[f"gdt_pred.{i}"] for i in range(3)],
        "gradient_targets": [tensors[f"gdt_label.{i}"] for i in range(3)],
        "losses": record["losses"],
    }


class TestReferenceNumbers:
    @pytest.mark.parametrize(("name", "reference_name"), PIXEL_TERMS.items())
    def test_every_pixel_term_of_every_output(self, reference, name, reference_name):
        criterion = BiRefNetLoss(weights=only(name), reference=True)
        for i, logits in enumerate(reference["logits"]):
            loss, terms = criterion([logits], reference["labels"])
            assert loss.item() == pytest.approx(reference["losses"][f"{reference_name}.{i}"], rel=1e-4)
            assert list(terms) == [name]

    def test_gradient_term(self, reference):
        criterion = BiRefNetLoss(weights=only("gradient"), reference=True)
        arguments = {name: reference[name] for name in reference if name != "losses"}
        loss, terms = criterion(**arguments)
        assert loss.item() == pytest.approx(reference["losses"]["gdt"], rel=1e-4)
        assert terms["gradient"].item() == pytest.approx(reference["losses"]["gdt"], rel=1e-4)

    @pytest.mark.parametrize("task", ["dis", "general", "matting"])
    def test_totals_and_logged_terms(self, reference, task):
        arguments = {name: reference[name] for name in reference if name != "losses"}
        loss, terms = BiRefNetLoss(task, reference=True)(**arguments)
        assert loss.item() == pytest.approx(reference["losses"][f"total.{task}"], rel=1e-4)

        weights = loss_weights(task)
        # The gradient term sums levels; the pixel terms are means over the four outputs, as the reference logs them.
        assert loss.item() == pytest.approx(
            sum(value.item() * (1 if name == "gradient" else 4) for name, value in terms.items()), rel=1e-5
        )
        expected = [name for name in ALL_TERMS if weights[name] and name != "classification"]
        assert list(terms) == expected
        mean_ssim = sum(reference["losses"][f"ssim.{i}"] for i in range(4)) / 4
        assert terms["ssim"].item() == pytest.approx(weights["ssim"] * mean_ssim, rel=1e-4)

    def test_default_averages_iou_over_the_batch_and_agrees_elsewhere(self, reference):
        ours, _ = BiRefNetLoss(weights=only("iou"))([reference["logits"][3]], reference["labels"])
        assert ours.item() == pytest.approx(reference["losses"]["iou.3"] / 2, rel=1e-4)
        for name in ("bce", "ssim", "mae"):
            ours, _ = BiRefNetLoss(weights=only(name))([reference["logits"][3]], reference["labels"])
            assert ours.item() == pytest.approx(reference["losses"][f"{PIXEL_TERMS[name]}.3"], rel=1e-4)


class TestPixelLosses:
    def test_ssim_equals_two_dimensional_window_forward_and_backward(self):
        taps = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
        window = torch.outer(taps, taps)[None, None] / taps.sum() ** 2

        def two_dimensional(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            mean_p, mean_y = F.conv2d(p, window, padding=5), F.conv2d(y, window, padding=5)
            var_p = F.conv2d(p * p, window, padding=5) - mean_p**2
            var_y = F.conv2d(y * y, window, padding=5) - mean_y**2
            cov = F.conv2d(p * y, window, padding=5) - mean_p * mean_y
            ssim = (2 * mean_p * mean_y + 1e-4) * (2 * cov + 9e-4)
            return (1 - (ssim / ((mean_p**2 + mean_y**2 + 1e-4) * (var_p + var_y + 9e-4))).mean()) / 2

        logits, labels = (item.double() for item in random_maps())
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, expected = ssim_loss(ours.sigmoid(), labels), two_dimensional(theirs.sigmoid(), labels)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)

    def test_ssim_of_map_smaller_than_window(self):
        assert ssim_loss(torch.full((1, 1, 3, 4), 0.3), torch.full((1, 1, 3, 4), 0.3)).item() == pytest.approx(0.0)

    def test_perfect_prediction_costs_nothing(self):
        _, labels = random_maps()
        for name in ("iou", "patch_iou", "ssim", "mae", "mse", "threshold"):
            assert ON_PROBABILITIES[name](labels, labels).item() == pytest.approx(0.0, abs=1e-6), name

    def test_stated_ranges_at_the_worst_prediction(self):
        _, labels = random_maps(64, 64)
        upper = {"iou": 1, "patch_iou": 1, "ssim": 1, "mae": 1, "mse": 1, "contour": 10 * math.sqrt(2) + 1.01}
        for name, bound in upper.items():
            worst = ON_PROBABILITIES[name](1 - labels, labels).item()
            assert 0.5 * bound < worst <= bound, name
        assert threshold_loss(torch.full((1, 1, 4, 4), 0.5)).item() == 0.5

    def test_iou_by_hand(self):
        labels = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]).view(2, 1, 2, 2)
        probabilities = torch.tensor([[1.0, 0, 0.5, 0], [0, 0, 0, 1]]).view(2, 1, 2, 2)
        # Image 0: intersection 1, union 2 + 1.5 - 1; image 1: 0 over 1.
        assert iou_loss(probabilities, labels).item() == pytest.approx((1 - 1 / 2.5 + 1) / 2, rel=1e-5)
        assert iou_loss(probabilities, labels, reduction="sum").item() == pytest.approx(1.6, rel=1e-5)
        with pytest.raises(ValueError, match="'mean' or 'sum'"):
            iou_loss(probabilities, labels, reduction="none")

    def test_patch_iou_by_hand(self):
        # 3×4 pixels in patches of 2: four patches, the lower two one pixel high.
        labels = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])[None, None]
        probabilities = torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]])[None, None]
        patches = [1 - (2 + 1) / (4 + 1), 1 - (0 + 1) / (1 + 1), 0, 0]
        loss = patch_iou_loss(probabilities, labels, patch_size=2)
        assert loss.item() == pytest.approx(sum(patches) / 4)
        assert patch_iou_loss(probabilities, labels, patch_size=2, reduction="sum").item() == pytest.approx(
            sum(patches)
        )
        # Only the upper left patch holds a valid pixel.
        valid = torch.zeros(1, 1, 3, 4)
        valid[..., 0, :2] = 1
        assert patch_iou_loss(probabilities, labels, valid, patch_size=2).item() == pytest.approx(0.0)
        valid[..., 1, :2] = 1
        assert patch_iou_loss(probabilities, labels, valid, patch_size=2).item() == pytest.approx(patches[0])

    def test_patch_iou_sees_more_than_the_top_left_patch(self):
        labels = torch.zeros(1, 1, 128, 192)
        probabilities = labels.clone()
        probabilities[..., 100, 150] = 1  # an error in the last patch of 2×3
        assert patch_iou_loss(probabilities, labels).item() == pytest.approx(0.5 / 6)

    def test_threshold_pushes_away_from_one_half(self):
        p = torch.tensor([0.0, 0.25, 0.75, 1.0]).view(1, 1, 2, 2)
        assert threshold_loss(p).item() == pytest.approx((2 * 0.25 * 0.75) * 2 / 4)

    def test_contour_by_hand(self):
        # A vertical step of height 1 between columns 1 and 2, as wide as the map less its two last columns.
        p = torch.tensor([[0.0, 0, 1, 1]] * 4)[None, None]
        flat, step = 1e-4, math.sqrt(1 + 1e-8)
        # Horizontal differences p[j + 2] - p[j + 1] for j = 0, 1: 1 and 0, in 2 rows.
        assert contour_loss(p, p).item() == pytest.approx(10 * (step + flat) / 2, rel=1e-4)
        # The regions alone: everything wrong costs 1 more.
        assert contour_loss(p, 1 - p).item() == pytest.approx(10 * (step + flat) / 2 + 1, rel=1e-4)

    def test_structure_weighs_pixels_near_contours_more(self):
        labels = torch.zeros(1, 1, 96, 96)
        labels[..., :, 48:] = 1
        logits = (labels * 2 - 1) * 4
        near, far = logits.clone(), logits.clone()
        near[..., 50, 47] *= -1
        far[..., 50, 8] *= -1
        assert structure_loss(near, labels) > structure_loss(far, labels) > structure_loss(logits, labels)

    def test_bce_forms_agree_until_the_sigmoid_saturates(self):
        logits, labels = random_maps()
        torch.testing.assert_close(bce_loss(logits, labels, saturating=True), bce_loss(logits, labels))
        wrong = torch.full((1, 1, 2, 2), 120.0, requires_grad=True)
        zeros = torch.zeros(1, 1, 2, 2)
        assert bce_loss(wrong, zeros, saturating=True).item() == pytest.approx(100)
        loss = bce_loss(wrong, zeros)
        loss.backward()
        assert loss.item() == pytest.approx(120)
        assert wrong.grad.sum().item() == pytest.approx(1)

    def test_classification(self):
        logits = torch.tensor([[2.0, 0, 0], [0, 0, 0]])
        expected = (math.log(math.exp(2) + 2) - 2 + math.log(3)) / 2
        assert classification_loss(logits, torch.tensor([0, 2])).item() == pytest.approx(expected)

    def test_resize_keeps_corners(self):
        resized = resize_logits(torch.tensor([[0.0, 1], [2, 3]]).view(1, 1, 2, 2).half(), (5, 9))
        assert resized.dtype == torch.float32
        assert [resized[0, 0, y, x].item() for y in (0, -1) for x in (0, -1)] == [0, 1, 2, 3]
        assert resized[0, 0, 2, 4].item() == pytest.approx(1.5)

    @pytest.mark.parametrize("name", ON_PROBABILITIES)
    def test_gradcheck(self, name):
        logits, labels = (item.double() for item in random_maps(6, 5))
        labels = labels * 0.8 + 0.1
        valid = torch.ones_like(labels)
        valid[..., 4:] = 0
        torch.autograd.gradcheck(
            lambda z: ON_PROBABILITIES[name](z.sigmoid(), labels, valid), logits.requires_grad_(), fast_mode=True
        )


class TestBrokenInputs:
    @pytest.mark.parametrize("reference", [False, True])
    @pytest.mark.parametrize("label", [0.0, 1.0])
    @pytest.mark.parametrize("logit", [-200.0, 0.0, 200.0])
    def test_empty_and_full_masks_are_finite(self, reference, label, logit):
        labels = torch.full((2, 1, 40, 36), label)
        logits = torch.full((2, 1, 40, 36), logit, requires_grad=True)
        criterion = BiRefNetLoss(weights=dict.fromkeys(ALL_TERMS, 1.0), reference=reference)
        loss, terms = criterion([logits], labels, [logits], [logits])
        loss.backward()
        assert all(value.isfinite() for value in terms.values()), terms
        assert logits.grad.isfinite().all()
        if (logit > 0) == (label > 0) and logit != 0:
            for name in ("bce", "iou", "patch_iou", "ssim", "mae", "mse", "threshold"):
                assert terms[name].item() == pytest.approx(0.0, abs=1e-6), name

    @pytest.mark.parametrize("name", ON_PROBABILITIES)
    def test_valid_mask_equals_cropping(self, name):
        logits, labels = random_maps(80, 75)
        probabilities, labels = logits.sigmoid(), labels * 0.9 + 0.05
        valid = torch.zeros(2, 1, 80, 75, dtype=torch.bool)
        valid[..., :66, :37] = True
        expected = ON_PROBABILITIES[name](probabilities[..., :66, :37], labels[..., :66, :37])
        torch.testing.assert_close(ON_PROBABILITIES[name](probabilities, labels, valid), expected)
        full = ON_PROBABILITIES[name](probabilities, labels)
        torch.testing.assert_close(ON_PROBABILITIES[name](probabilities, labels, torch.ones_like(labels)), full)
        assert not torch.isclose(full, expected), "the mask must matter for this test to mean anything"

    def test_nothing_valid_costs_nothing(self):
        logits, labels = random_maps()
        logits.requires_grad_()
        criterion = BiRefNetLoss(weights=dict.fromkeys(ALL_TERMS, 1.0))
        loss, _ = criterion([logits], labels, [logits], [logits], valid=torch.zeros_like(labels))
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        assert logits.grad.abs().max().item() == 0

    def test_invalid_labels_may_hold_anything(self):
        logits, labels = random_maps()
        logits.requires_grad_()
        valid = torch.ones_like(labels, dtype=torch.bool)
        valid[..., 15:] = False
        criterion = BiRefNetLoss(weights=dict.fromkeys(ALL_TERMS, 1.0))
        expected, _ = criterion([logits], labels, valid=valid)
        labels[..., 15] = math.nan
        labels[..., 16] = 255
        loss, _ = criterion([logits], labels, valid=valid)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert logits.grad.isfinite().all()
        assert logits.grad[..., 15:].abs().max().item() == 0

    def test_labels_beyond_the_range_are_clamped(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss("general")
        torch.testing.assert_close(criterion([logits], labels * 1.2 - 0.1)[0], criterion([logits], labels)[0])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(2, 1, 24, 20, dtype=torch.uint8), r"got torch\.uint8.*/ 255"),
            (torch.zeros(2, 24, 20, dtype=torch.int64), r"got torch\.int64"),
            (torch.zeros(2, 3, 24, 20), r"labels must have the shape .* got \(2, 3, 24, 20\)"),
            (torch.zeros(24, 20), r"labels must have the shape .* got \(24, 20\)"),
            (torch.zeros(3, 1, 24, 20), r"labels' batch size 3, got \(2, 1, 24, 20\)"),
        ],
    )
    def test_wrong_labels_say_so(self, labels, message):
        with pytest.raises(ValueError, match=message):
            BiRefNetLoss()([random_maps()[0]], labels)

    def test_other_wrong_arguments_say_so(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss()
        with pytest.raises(ValueError, match=r"pass \[logits\]"):
            criterion(logits, labels)
        with pytest.raises(ValueError, match="at least one map"):
            criterion([], labels)
        with pytest.raises(ValueError, match=r"shape of labels \(2, 1, 24, 20\), got \(2, 1, 4, 4\)"):
            criterion([logits], labels, valid=torch.ones(2, 1, 4, 4))
        with pytest.raises(ValueError, match="3 gradient_logits but 0 gradient_targets"):
            criterion([logits], labels, [logits] * 3)
        with pytest.raises(ValueError, match="no classification head"):
            criterion([logits], labels, class_labels=torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"iou_loss needs maps of one shape .* \(2, 1, 24, 20\), \(2, 24, 20\)"):
            iou_loss(logits.sigmoid(), labels[:, 0])

    def test_unknown_names_say_so(self):
        with pytest.raises(ValueError, match="Unknown task 'DIS5K': use one of dis, cod"):
            BiRefNetLoss("DIS5K")
        with pytest.raises(ValueError, match=r"Unknown loss terms \['cnt'\]"):
            BiRefNetLoss(weights={"cnt": 1.0})
        criterion = BiRefNetLoss()
        criterion.weights = {"bec": 1.0}
        with pytest.raises(ValueError, match=r"\['bec'\]"):
            criterion(*([item] if i == 0 else item for i, item in enumerate(random_maps())))


class TestBiRefNetLoss:
    def test_labels_may_lack_the_channel_axis_or_be_bool(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss()
        expected, _ = criterion([logits], labels)
        torch.testing.assert_close(criterion([logits], labels[:, 0])[0], expected)
        torch.testing.assert_close(criterion([logits], labels.bool())[0], expected)
        valid = torch.ones(2, 24, 20, dtype=torch.bool)
        torch.testing.assert_close(criterion([logits], labels, valid=valid)[0], expected)

    def test_outputs_of_all_sizes_are_summed(self):
        logits, labels = random_maps(32, 64)
        small = F.avg_pool2d(logits, 8)
        criterion = BiRefNetLoss("general")
        separate = [criterion([item], labels) for item in (small, logits)]
        loss, terms = criterion([small, logits], labels)
        torch.testing.assert_close(loss, separate[0][0] + separate[1][0])
        for name, value in terms.items():
            torch.testing.assert_close(value, (separate[0][1][name] + separate[1][1][name]) / 2)
            assert not value.requires_grad
            assert value.shape == ()

    def test_auxiliary_classification(self):
        logits, labels = random_maps()
        class_logits, class_labels = torch.randn(2, 5), torch.tensor([1, 4])
        criterion = BiRefNetLoss()
        without, terms = criterion([logits], labels, class_logits=class_logits)
        assert "classification" not in terms
        loss, terms = criterion([logits], labels, class_logits=class_logits, class_labels=class_labels)
        expected = 5 * F.cross_entropy(class_logits, class_labels)
        torch.testing.assert_close(terms["classification"], expected)
        torch.testing.assert_close(loss, without + expected)

    @pytest.mark.parametrize("reference", [False, True])
    def test_gradient_target_is_detached_unless_reference(self, reference):
        logits, labels = random_maps()
        prediction = torch.randn(2, 1, 6, 5, requires_grad=True)
        target = torch.randn(2, 1, 24, 20, requires_grad=True)
        loss, _ = BiRefNetLoss(weights=only("gradient"), reference=reference)([logits], labels, [prediction], [target])
        loss.backward()
        assert prediction.grad.abs().sum() > 0
        if not reference:
            assert target.grad is None
        else:
            # d/dt of -t·log(p) - (1 - t)·log(1 - p) is -logit(p), times the slope of t's sigmoid, over the mean.
            slope = target.sigmoid() * (1 - target.sigmoid())
            expected = -resize_logits(prediction, (24, 20)) * slope / target.numel()
            torch.testing.assert_close(target.grad, expected.detach())

    def test_valid_is_resized_to_gradient_targets(self):
        logits, labels = random_maps(24, 20)
        target = torch.randn(2, 1, 48, 40)
        valid = torch.zeros(2, 1, 24, 20)
        valid[..., :10] = 1
        criterion = BiRefNetLoss(weights=only("gradient"))
        loss, _ = criterion([logits], labels, [torch.zeros_like(target)], [target], valid=valid)
        other = torch.cat([target[..., :20], torch.randn(2, 1, 48, 20)], dim=-1)
        changed, _ = criterion([logits], labels, [torch.zeros_like(target)], [other], valid=valid)
        torch.testing.assert_close(loss, changed)

    def test_reference_mode_differs_where_documented(self):
        logits, labels = random_maps()
        for name, same in (("iou", False), ("patch_iou", False), ("structure", False), ("ssim", True), ("bce", True)):
            ours, _ = BiRefNetLoss(weights=only(name))([logits], labels)
            theirs, _ = BiRefNetLoss(weights=only(name), reference=True)([logits], labels)
            assert torch.isclose(ours, theirs).item() is same, name

    @pytest.mark.parametrize("reference", [False, True])
    def test_gradient_reaches_every_output(self, reference):
        _, labels = random_maps(32, 32)
        outputs = [torch.randn(2, 1, size, size, requires_grad=True) for size in (2, 4, 8, 32)]
        gradients = [torch.randn(2, 1, size, size, requires_grad=True) for size in (2, 4, 8)]
        targets = [torch.randn(2, 1, 32, 32) for _ in gradients]
        loss, _ = BiRefNetLoss("general", reference=reference)(outputs, labels, gradients, targets)
        loss.backward()
        for tensor in outputs + gradients:
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().sum() > 0

    def test_a_step_down_the_gradient_lowers_every_task(self):
        logits, labels = random_maps(32, 32)
        for task in TASKS:
            z = logits.clone().requires_grad_()
            before, _ = BiRefNetLoss(task)([z], labels)
            before.backward()
            after, _ = BiRefNetLoss(task)([z.detach() - 0.1 * z.grad / z.grad.norm()], labels)
            assert after < before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reference", [False, True])
    def test_float32_inside_autocast(self, dtype, reference):
        logits, labels = random_maps(32, 32)
        small = logits[..., ::4, ::4]
        half = [item.to(dtype).requires_grad_() for item in (small, logits)]
        criterion = BiRefNetLoss(weights=dict.fromkeys(ALL_TERMS, 1.0), reference=reference)
        expected, _ = criterion([item.float() for item in half], labels, [half[0].float()], [half[1].float()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, terms = criterion(half, labels, [half[0]], [half[1]])
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in terms.values())
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert all(item.grad.isfinite().all() for item in half)

    def test_pure_functions_are_float32_inside_autocast(self):
        logits, labels = random_maps()
        expected = ssim_loss(logits.sigmoid(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(ssim_loss(logits.sigmoid(), labels), expected)
            assert bce_loss(logits.bfloat16(), labels.bfloat16(), saturating=True).dtype == torch.float32

    def test_autocast_is_off_inside(self, monkeypatch):
        cross_entropy, seen = F.binary_cross_entropy, []

        def record(*args, **kwargs):
            seen.append(torch.is_autocast_enabled("cpu"))
            return cross_entropy(*args, **kwargs)

        monkeypatch.setattr(F, "binary_cross_entropy", record)
        logits, labels = random_maps()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            BiRefNetLoss(reference=True)([logits], labels)
        assert seen == [False]

    def test_has_no_state_and_copies(self):
        criterion = BiRefNetLoss("matting", weights={"mse": 30})
        assert not criterion.state_dict()
        assert not list(criterion.parameters())
        assert criterion.weights == loss_weights("matting") | {"mse": 30}
        clone = copy.deepcopy(criterion)
        clone.weights["bce"] = 0.0
        assert criterion.weights["bce"] == 30

    def test_zero_and_missing_weights_drop_terms(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss("general")
        criterion.weights = {"mae": 2.0, "bce": 0.0}
        loss, terms = criterion([logits], labels)
        assert list(terms) == ["mae"]
        torch.testing.assert_close(loss, 2 * mae_loss(logits.sigmoid(), labels))

    def test_traces_without_graph_breaks(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss("matting", weights={"iou": 0.5})
        compiled = torch.compile(criterion, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled([logits], labels)[0], criterion([logits], labels)[0])


class TestLossWeights:
    def test_presets(self):
        used = {"bce": 30, "iou": 0.5, "ssim": 10, "mae": 0, "gradient": 1, "classification": 5}
        unused = dict.fromkeys(("patch_iou", "mse", "structure", "contour", "threshold"), 0)
        for task in ("dis", "cod", "hrsod"):
            assert loss_weights(task) == used | unused
        assert loss_weights("general") == used | unused | {"mae": 100}
        assert loss_weights("matting") == used | unused | {"mae": 100, "iou": 0}

    @pytest.mark.parametrize(
        ("task", "num_epochs", "first"),
        [("dis", 500, 461), ("cod", 150, 131), ("hrsod", 150, 131), ("general", 200, 181), ("matting", 150, 141)],
    )
    @pytest.mark.parametrize("compounding", [False, True])
    def test_switch_starts_with_the_last_epochs(self, task, num_epochs, first, compounding):
        before = loss_weights(task, first - 1, num_epochs, compounding=compounding)
        assert before == loss_weights(task)
        assert loss_weights(task, first, num_epochs, compounding=compounding) != before

    def test_switch_once(self):
        for epoch in (181, 190, 200):
            assert loss_weights("general", epoch, 200) == loss_weights("general") | {"bce": 0, "iou": 0.25, "mae": 90}
        for epoch in (141, 150):
            assert loss_weights("matting", epoch, 150) == loss_weights("matting") | {"ssim": 9}

    @pytest.mark.parametrize("num_epochs", [200, 5])
    def test_compounding_switch_equals_the_stateful_loop(self, num_epochs):
        weights = loss_weights("general")
        for epoch in range(1, num_epochs + 1):
            if epoch > num_epochs - 20:
                weights |= {"bce": 0, "iou": weights["iou"] * 0.5, "mae": weights["mae"] * 0.9}
            assert loss_weights("general", epoch, num_epochs, compounding=True) == pytest.approx(weights)
        if num_epochs == 200:
            assert weights["mae"] == pytest.approx(100 * 0.9**20)

    def test_resuming_cannot_change_it(self):
        run = [loss_weights("matting", epoch, 30, compounding=True) for epoch in range(1, 31)]
        assert [loss_weights("matting", epoch, 30, compounding=True) for epoch in range(25, 31)] == run[24:]
        run[-1]["bce"] = -1.0  # a returned dict is the caller's own
        assert loss_weights("matting")["bce"] == 30

    def test_length_of_the_phase(self):
        assert loss_weights("dis", 3, 3, last_epochs=0) == loss_weights("dis")
        assert loss_weights("dis", 2, 3, last_epochs=1) == loss_weights("dis")
        assert loss_weights("dis", 3, 3, last_epochs=1)["bce"] == 0

    def test_wrong_arguments_say_so(self):
        with pytest.raises(ValueError, match="counted from 1, got epoch=0"):
            loss_weights("dis", 0, 10)
        with pytest.raises(ValueError, match="needs num_epochs"):
            loss_weights("dis", 3)
        with pytest.raises(ValueError, match="Unknown task 'portrait'"):
            loss_weights("portrait")

    def test_criterion_takes_the_weights_of_an_epoch(self):
        logits, labels = random_maps()
        criterion = BiRefNetLoss("general")
        _, terms = criterion([logits], labels)
        criterion.weights = loss_weights("general", 200, 200)
        _, switched = criterion([logits], labels)
        assert "bce" not in switched
        torch.testing.assert_close(switched["mae"], 0.9 * terms["mae"])
        torch.testing.assert_close(switched["iou"], 0.5 * terms["iou"])
