"""Image processors of BiRefNet: images and masks to tensors, logits to alpha mattes and masks."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file, logging, safe_load_json_file

from .checkpoints_birefnet import HUB_OPTIONS, get_checkpoint
from .image_loading import load_image, read_mask, to_rgb


try:
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
except ImportError:  # newer than 5.12; it adds nothing but a name to its base class
    SemanticSegmentationPostProcessorOutput = BatchFeature

logger = logging.get_logger(__name__)

_EXIF_ORIENTATION = 0x0112

# What `get_image_processor_dict` takes to find a file, as opposed to settings of the processor.
_HUB_OPTIONS = (*HUB_OPTIONS, "proxies")
_PRIVATE_OPTIONS = ("_from_pipeline", "_from_auto")


class BiRefNetImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`):
        What both sides of the network's input must be multiples of. A fixed `size` is checked against it; the size
        that follows from `{"shortest_edge": ..., "longest_edge": ...}` is rounded down to it.
    """

    size_divisor: int | None


def _dynamic_size(height: int, width: int, shortest: int, longest: int, divisor: int) -> tuple[int, int]:
    """Size that an image of its own size is resized to, for networks that take any size within a range.

    The image is scaled, its aspect kept, only as far as needed for both sides to lie in [shortest, longest]; then
    both are rounded down to multiples of `divisor`, as upstream's demo does. Where no scale fits both sides (aspect
    above longest / shortest) the long side gets `longest` and the short side is stretched to `shortest`.

    Args:
        height, width: Size of the image in pixels.
        shortest, longest: Bounds of both sides in pixels, multiples of `divisor`.
        divisor: What the sides of the result are multiples of.

    Returns:
        (height, width) in pixels.
    """
    scale = min(max(1.0, shortest / min(height, width)), longest / max(height, width))

    def fit(side: int) -> int:
        scaled = round(side * scale)  # rounded first, or 383.9999 would lose a whole step
        return min(max(scaled // divisor * divisor, shortest), longest)

    return fit(height), fit(width)


def _mask_to_tensor(mask: ImageInput) -> torch.Tensor:
    """Reads a foreground mask without losing its softness.

    Args:
        mask: PIL image, of any of the forms that `read_mask` knows, 16-bit ones in full depth; or an array or tensor H×W,
            1×H×W or H×W×1: bool, uint8 (0..255), uint16 (0..65535), float in [0, 1], or integers 0 and 1.

    Returns:
        1×H×W float32 in [0, 1].

    Raises:
        ValueError: more than one channel, or values outside the range of the type.
    """
    if isinstance(mask, Image.Image):
        values, foreground = read_mask(mask)
        mask = values.astype(np.float32) / foreground
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.require(mask, requirements=("C", "W")))
    if mask.ndim == 3 and mask.shape[-1] == 1 and mask.shape[0] != 1:
        mask = mask.movedim(-1, 0)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.shape[0] != 1:
        raise ValueError(
            f"A mask must have one channel, got an array of shape {tuple(mask.shape)}; pass one channel, H×W."
        )

    if mask.dtype == torch.uint8:
        if mask.max() == 1:
            logger.warning_once(
                "A uint8 mask has no value above 1 and is read as 1/255, nearly empty. If it holds the labels 0 and 1, "
                "pass `mask * 255` or `mask.astype(bool)`."
            )
        return mask.to(torch.float32) / 255
    if mask.dtype == torch.uint16:
        return mask.to(torch.float32) / 65535
    lowest, highest = mask.min().item(), mask.max().item()
    # Written so that NaN fails, too; resized masks may leave the range by rounding.
    if not (lowest >= -1e-3 and highest <= 1 + 1e-3):
        raise ValueError(
            f"A mask of type {mask.dtype} must lie in [0, 1], got [{lowest:g}, {highest:g}]; "
            "divide it by its maximal possible value (255 for 8 bits)."
        )
    return mask.to(torch.float32).clamp(0, 1)


def _flatten(images: Any) -> list[Any]:
    """Lists single images, however they are nested or batched; paths and URLs are opened, EXIF-rotated, as RGB."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, str | os.PathLike):
        return [load_image(images)]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim in (2, 3):
            return [images]
        if images.ndim == 4:
            return list(images)
        raise ValueError(f"An image array must have 2 (H×W), 3 or, for a batch, 4 dimensions, got {images.ndim}.")
    raise TypeError(
        f"Expected a PIL image, NumPy array, torch tensor, path, URL or a list of these, got {type(images).__name__}."
    )


def _flatten_masks(masks: Any) -> list[Any]:
    """As `_flatten`, but files keep their bit depth and a three-dimensional array may be a batch B×H×W."""
    if isinstance(masks, list | tuple):
        return [mask for item in masks for mask in _flatten_masks(item)]
    if isinstance(masks, str | os.PathLike) and os.path.isfile(masks):
        with Image.open(masks) as mask:
            return [ImageOps.exif_transpose(mask)]
    if isinstance(masks, np.ndarray | torch.Tensor) and masks.ndim == 3:
        has_channels = masks.shape[0] == 1 or masks.shape[-1] in (1, 3, 4)
        return [masks] if has_channels else list(masks)
    return _flatten(masks)


def _is_rescaled(image: np.ndarray | torch.Tensor) -> bool:
    is_float = image.is_floating_point() if isinstance(image, torch.Tensor) else image.dtype.kind == "f"
    return is_float and 0 < image.max() <= 1


class _BiRefNetImageProcessing:
    """What both backends share: reading of images and masks, sizes, defaults of released checkpoints, outputs."""

    valid_kwargs = BiRefNetImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 1024, "width": 1024}
    size_divisor = 32
    default_to_square = True
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[BiRefNetImageProcessorKwargs],
    ) -> BatchFeature:
        """Turns images, and masks where given, into the network's inputs.

        Images become RGB without their alpha channel (its transparency is ignored, as upstream), are resized
        bilinearly with antialiasing and normalised with ImageNet's statistics. A PIL image is taken as its pixels
        lie: an EXIF orientation is not applied, since the caller's own measurements (`target_sizes`, compositing)
        refer to the same pixels. Paths and URLs are rotated.

        Args:
            images: One or several PIL images, arrays or tensors (H×W, H×W×C or C×H×W, uint8, or float in [0, 1] with
                `do_rescale=False`), paths or URLs.
            segmentation_maps: One foreground mask for each image and of its size: PIL images, arrays or tensors of
                one channel (bool, uint8, uint16, float in [0, 1]) or paths. Soft masks stay soft.
            **kwargs: Settings that replace the processor's own in this call. `size` is {"height", "width"}, or
                {"shortest_edge", "longest_edge"} for networks that take any size in that range: each image then
                keeps its own size as far as possible. `device` is where the torchvision backend works.

        Returns:
            `pixel_values`, B×3×H×W float32, and with masks `labels`, B×1×H×W float32 in [0, 1]; lists of B items
            without `return_tensors`.

        Raises:
            ValueError: masks do not pair up with images, or images of different final sizes are to be one batch.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs
    ) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None)
        images = self._prepare_image_like_inputs(images, **kwargs)
        if not images:
            raise ValueError("There is no image to process: the list of images is empty.")
        if any(0 in image.shape for image in images):
            raise ValueError("An image without pixels cannot be processed.")
        if kwargs.get("do_rescale") and any(_is_rescaled(image) for image in images):
            logger.warning_once(
                "An image of floating-point numbers has none above 1 and is read as nearly black. If it lies in [0, 1], "
                "pass do_rescale=False."
            )
        pixel_values = self._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]
        data = {"pixel_values": list(pixel_values)}
        if segmentation_maps is not None:
            if kwargs.get("do_center_crop") or kwargs.get("do_pad"):
                raise ValueError("`do_center_crop` and `do_pad` do not go together with `segmentation_maps`.")
            data["labels"] = self._prepare_labels(segmentation_maps, images, pixel_values)
        if return_tensors is not None:
            sizes = {tuple(image.shape[-2:]) for image in pixel_values}
            if len(sizes) > 1:
                raise ValueError(
                    f"Images of different sizes (height, width) {sorted(sizes)} cannot be one batch: pass one image at "
                    'a time, group images of one size, or set a fixed size={"height": ..., "width": ...}.'
                )
            stack = torch.stack if isinstance(pixel_values[0], torch.Tensor) else np.stack
            data = {name: stack(values) for name, values in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        return _flatten(images)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> torch.Tensor | np.ndarray:
        """One image in the backend's form, C×H×W. To RGB by dropping alpha: the library (5.23) puts it on white."""
        if isinstance(image, Image.Image):
            input_data_format = None
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                logger.warning_once(
                    "A PIL image has an EXIF orientation, which is not applied: the result fits the image as it is "
                    "stored. Call `PIL.ImageOps.exif_transpose(image)` first to process it upright."
                )
            if do_convert_rgb:
                image = to_rgb(image)
        elif do_convert_rgb:
            if isinstance(image, np.ndarray):
                image = torch.from_numpy(np.require(image, requirements=("C", "W")))
            if image.dtype == torch.uint16:
                raise ValueError(
                    "An image array of 16 bits would be taken for one of 8: pass `(array / 257).round().astype('uint8')`, "
                    "or the image's path."
                )
            if image.dtype == torch.bool:
                image = image.to(torch.uint8) * 255
            elif image.dtype == torch.bfloat16:  # which NumPy has not
                image = image.float()
            image = image[None] if image.ndim == 2 else self._channels_first(image, input_data_format)
            image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
            input_data_format = ChannelDimension.FIRST
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    @staticmethod
    def _channels_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        if ChannelDimension(input_data_format) == ChannelDimension.LAST:
            image = image.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        if image.shape[0] not in (1, 3, 4):
            raise ValueError(f"An image has 1, 3 or 4 channels, got {image.shape[0]}.")
        return image

    def _prepare_labels(
        self, segmentation_maps: ImageInput, images: list[Any], pixel_values: list[Any]
    ) -> list[torch.Tensor] | list[np.ndarray]:
        """Masks at the size of the network's input, each 1×H×W float32 in [0, 1], in the type of `pixel_values`."""
        masks = [_mask_to_tensor(mask) for mask in _flatten_masks(segmentation_maps)]
        if len(masks) != len(images):
            raise ValueError(
                f"Each image needs one mask: got {len(images)} images and {len(masks)} segmentation_maps."
            )
        labels = []
        for index, (mask, image, pixels) in enumerate(zip(masks, images, pixel_values, strict=True)):
            if mask.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"Mask {index} is {mask.shape[-2]}×{mask.shape[-1]} (height×width) but its image is "
                    f"{image.shape[-2]}×{image.shape[-1]}; check their order, or the EXIF orientation of one of them."
                )
            on_tensors = isinstance(pixels, torch.Tensor)
            label = _resize_alpha(mask.to(pixels.device) if on_tensors else mask, tuple(pixels.shape[-2:]))
            labels.append(label if on_tensors else label.numpy())
        return labels

    def _preprocess(
        self, images: list[Any], do_resize: bool, size: SizeDict, resample: PILImageResampling | None, **kwargs
    ) -> BatchFeature:
        size_divisor = kwargs.pop("size_divisor", None) or 1
        if do_resize:
            resized = []
            for image in images:
                height, width = size.height, size.width
                if size.longest_edge:
                    bounds = (size.shortest_edge, size.longest_edge)
                    height, width = _dynamic_size(*image.shape[-2:], *bounds, size_divisor)
                resized.append(self.resize(image, SizeDict(height=height, width=width), resample=resample))
            images = resized
        return super()._preprocess(images, do_resize=False, size=size, resample=resample, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        if kwargs.get("do_resize") and kwargs["size"] is not None:
            self._check_size(kwargs["size"], kwargs.get("size_divisor") or 1)
        return kwargs

    @staticmethod
    def _check_size(size: SizeDict, divisor: int) -> None:
        given = dict(size)
        if set(given) not in ({"height", "width"}, {"shortest_edge", "longest_edge"}):
            raise ValueError(
                'size must be {"height": ..., "width": ...}, or {"shortest_edge": ..., "longest_edge": ...} for '
                f"checkpoints that take images of any size, got {given}."
            )
        if any(side <= 0 or side % divisor for side in given.values()):
            valid = {name: max(1, round(side / divisor)) * divisor for name, side in given.items()}
            raise ValueError(f"size {given} must consist of multiples of {divisor}; the nearest is {valid}.")
        if size.longest_edge and size.shortest_edge > size.longest_edge:
            raise ValueError(f"size {given}: shortest_edge must not exceed longest_edge.")

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the library's, but works without preprocessor_config.json, which the released checkpoints do not have.

        The defaults then apply, with the size from the model's config.json if it states one, else from the table of
        known checkpoints. A directory or repository must at least hold the config.json of a BiRefNet.

        Raises:
            OSError: nothing there, no connection, or no BiRefNet; the message is the library's.
        """
        name = str(pretrained_model_name_or_path)
        try:
            return super().get_image_processor_dict(name, **kwargs)
        except OSError:
            if os.path.isfile(name) or "image_processor_filename" in kwargs:
                raise
            hub_options = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
            offline = {**hub_options, "local_files_only": True, "force_download": False}
            if cached_file(name, IMAGE_PROCESSOR_NAME, **offline, _raise_exceptions_for_missing_entries=False):
                raise  # it exists but cannot be read
            checkpoint = get_checkpoint(name)
            if checkpoint is not None and checkpoint.weights_file is not None:
                size = checkpoint.processor_size  # it has no file but that one
            else:
                # Raises the library's error where the repository does not exist or cannot be reached.
                config_file = cached_file(name, CONFIG_NAME, **hub_options)
                size = None if config_file is None else cls._size_from_config(name, config_file)
            if size is None:
                raise
        unused = {key: value for key, value in kwargs.items() if key not in (*_HUB_OPTIONS, *_PRIVATE_OPTIONS)}
        return {"size": size}, unused

    @staticmethod
    def _size_from_config(name: str, config_file: str) -> dict[str, int] | None:
        """The `size` for the model whose config.json is given; None where that is not a BiRefNet's."""
        config = safe_load_json_file(config_file)
        architectures = config.get("architectures") or []
        if config.get("model_type") != "birefnet" and not any("BiRefNet" in item for item in architectures):
            return None
        if "image_size" in config:
            return {"height": config["image_size"][0], "width": config["image_size"][1]}
        checkpoint = get_checkpoint(name)
        if checkpoint is not None:
            return checkpoint.processor_size
        logger.warning(
            f"{name} has no {IMAGE_PROCESSOR_NAME} and is not a known checkpoint: the input size is assumed to be "
            "1024×1024. Pass `size=` if it was trained at another one."
        )
        return {"height": 1024, "width": 1024}

    def post_process_alpha(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Turns logits into soft alpha mattes, for example at the sizes of the original images.

        Args:
            outputs: Model output with `logits`, B×1×H×W of any float type.
            target_sizes: (height, width) for each image; without it mattes keep the size of the logits.

        Returns:
            B tensors, height×width float32 in [0, 1], on the device of the logits.

        Raises:
            ValueError: the number of sizes is not the number of images.
        """
        # The sigmoid comes before the resize, as upstream: soft edges are averaged as coverage, not as logits.
        alphas = outputs.logits.detach().to(torch.float32).sigmoid()
        if alphas.ndim != 4 or alphas.shape[1] != 1:
            raise ValueError(f"Expected logits of shape B×1×H×W, got {tuple(alphas.shape)}.")
        if target_sizes is None:
            return list(alphas[:, 0])
        sizes = (
            torch.stack([torch.as_tensor(size) for size in target_sizes]) if len(target_sizes) else torch.empty(0, 2)
        )
        if sizes.shape != (len(alphas), 2):
            raise ValueError(
                f"target_sizes must hold one (height, width) for each of the {len(alphas)} images, got {target_sizes}."
            )
        return [
            _resize_alpha(alpha, (int(height), int(width)))[0]
            for alpha, (height, width) in zip(alphas, sizes.tolist(), strict=True)
        ]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        threshold: float = 0.5,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turns logits into maps of class ids, 0 for background and 1 for foreground.

        Args:
            outputs: Model output with `logits`, B×1×H×W.
            target_sizes: (height, width) for each image; without it maps keep the size of the logits.
            return_segmentation_scores: Whether to return both classes' probabilities as well.
            threshold: Probability above which a pixel is foreground.

        Returns:
            B int64 tensors, height×width; with `return_segmentation_scores` B outputs with that tensor as
            `segmentation` and `segmentation_scores`, 2×height×width float32.
        """
        alphas = self.post_process_alpha(outputs, target_sizes)
        maps = [(alpha > threshold).to(torch.int64) for alpha in alphas]
        if not return_segmentation_scores:
            return maps
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": segmentation, "segmentation_scores": torch.stack([1 - alpha, alpha])}
            )
            for segmentation, alpha in zip(maps, alphas, strict=True)
        ]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Turns logits into the foreground as one segment, in the form that the "image-segmentation" pipeline reads.

        Args:
            outputs: Model output with `logits`, B×1×H×W.
            threshold: Without effect. It drops weak segments among many, and the pipeline passes 0.9; there is only
                one here, and a soft-edged one must not vanish.
            mask_threshold: Probability above which a pixel belongs to the foreground.
            overlap_mask_area_threshold: Without effect: one segment overlaps with nothing.
            target_sizes: (height, width) for each image; without it maps keep the size of the logits.

        Returns:
            For each image `segmentation`, height×width int64 (1 foreground, 0 background), and `segments_info`, a
            list of at most one {"id": 1, "label_id": 1, "was_fused": False, "score"}; the score is the mean
            probability within the mask. The list is empty where no pixel exceeds `mask_threshold`.
        """
        results = []
        for alpha in self.post_process_alpha(outputs, target_sizes):
            mask = alpha > mask_threshold
            segments = []
            if mask.any():
                score = alpha[mask].mean().item()
                segments = [{"id": 1, "label_id": 1, "was_fused": False, "score": score}]
            results.append({"segmentation": mask.to(torch.int64), "segments_info": segments})
        return results


def _resize_alpha(alpha: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes 1×H×W float32 in [0, 1] to (height, width), bilinearly between pixel centres; stays in [0, 1]."""
    height, width = alpha.shape[-2:]
    if (height, width) == size:
        return alpha
    shrinks = size[0] < height or size[1] < width
    return interpolate(alpha[None], size, mode="bilinear", align_corners=False, antialias=shrinks)[0].clamp_(0, 1)


class BiRefNetImageProcessor(_BiRefNetImageProcessing, TorchvisionBackend):
    """Image processor of BiRefNet on torchvision, the default: works on tensors, on any device.

    On the CPU its pixels are [`BiRefNetImageProcessorPil`]'s up to the rounding of float32; on another device, and
    for float images, they are within one of 256 levels.

    Example:

    ```python
    >>> processor = BiRefNetImageProcessor.from_pretrained("ZhengPeng7/BiRefNet")
    >>> inputs = processor(image, return_tensors="pt")  # pixel_values: 1×3×1024×1024
    >>> outputs = model(**inputs)
    >>> alpha = processor.post_process_alpha(outputs, target_sizes=[(image.height, image.width)])[0]
    ```"""

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: PILImageResampling | None = None, **kwargs
    ) -> torch.Tensor:
        """Resizes C×H×W to `size`; bytes on the CPU by means of PIL, which upstream uses.

        torchvision's kernel for bytes breaks ties otherwise than PIL, which can add up to two of 256 levels (seen
        where a size changes by 4/5). Planes go one by one, because a PIL image of one plane shares its memory.
        """
        if image.dtype != torch.uint8 or image.device.type != "cpu" or not isinstance(resample, int):
            return super().resize(image, size, resample=resample, **kwargs)
        planes = [Image.fromarray(plane).resize((size.width, size.height), resample) for plane in image.numpy()]
        return torch.from_numpy(np.stack(planes))


class BiRefNetImageProcessorPil(_BiRefNetImageProcessing, PilBackend):
    """Image processor of BiRefNet on PIL: bit-equal to upstream's Resize, ToTensor and Normalize."""


__all__ = ["BiRefNetImageProcessor", "BiRefNetImageProcessorKwargs", "BiRefNetImageProcessorPil"]
