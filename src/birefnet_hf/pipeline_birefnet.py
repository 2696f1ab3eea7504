"""Background removal as a pipeline: any image in; soft mask, cut-out or composite out, at the image's own size."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import ImageSegmentationPipeline, Pipeline
from transformers.utils import logging

from .checkpoints_birefnet import find_model, get_checkpoint, naming_model
from .foreground import composite, parse_background, refine_foreground, to_tensor, to_uint8
from .image_loading import IMAGE_TYPES, ImageLoadError, convert_colours, load_image, rgb_profile
from .image_processing_birefnet import BiRefNetImageProcessor
from .modeling_birefnet import BiRefNetForImageSegmentation, BiRefNetImageSegmentationOutput
from .onnx_birefnet import ONNX_FILE_NAMES, BiRefNetOnnxForImageSegmentation


logger = logging.get_logger(__name__)

OutputType = Literal["mask", "cutout", "composite"]
# What the base class takes as it is, and what it refuses.
_NOT_STREAMED = list | Dataset | IMAGE_TYPES | Mapping | torch.Tensor
Size = int | tuple[int, int] | dict[str, int]
Background = torch.Tensor | Literal["blur"]
# Of the stock pipeline, which ignores all others.
_STOCK_OPTIONS = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold", "timeout")

# Standard deviation of a blurred background, as a share of the image's longer side, but two pixels at least.
BLUR_SHARE = 0.02
MIN_BLUR = 2.0


class _Stream(IterableDataset):
    """An iterator in the form that the base class reads bit by bit; generators are lists first in transformers 5.12."""

    def __init__(self, items: Iterator[Any]):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items


class BackgroundRemovalPipeline(Pipeline):
    """Removes the background of images with any [`BiRefNetForImageSegmentation`].

    What the stock "image-segmentation" pipeline cannot give: alpha keeps its softness and is resized to the image's own
    size on the model's device, and foreground colours are cleaned of the background that shines through soft edges.

    Example:

    ```python
    >>> from birefnet_hf import load_pipeline

    >>> remove_background = load_pipeline("ZhengPeng7/BiRefNet")
    >>> remove_background("photo.jpg").save("cutout.png")
    >>> mask = remove_background("photo.jpg", output_type="mask")
    >>> portraits = remove_background(["a.jpg", "b.jpg"], background="white", batch_size=2)
    ```

    A saved directory also opens with `transformers.pipeline("background-removal", model=directory)`.
    """

    _load_processor = False
    # Not required: a model object alone is enough, see `_image_processor_of`.
    _load_image_processor = None
    _load_feature_extractor = False
    _load_video_processor = False
    _load_tokenizer = False

    def __init__(self, model: BiRefNetForImageSegmentation, *args, **kwargs):
        if kwargs.get("image_processor") is None:
            kwargs["image_processor"] = _image_processor_of(model)
        super().__init__(model, *args, **kwargs)
        self.model.eval()

    def __call__(self, inputs: Any, **kwargs) -> Image.Image | list[Image.Image] | Iterator[Image.Image]:
        """Removes the background of one or many images.

        Args:
            inputs: An image: path, URL (public addresses only, see `load_image`), the bytes of a file or an open binary
                file, PIL image of any mode, array (H×W or H×W×channels); or a list or tuple of them, an iterator, a
                column of a `datasets.Dataset` (`dataset["image"]`), or a torch `Dataset`. EXIF orientation is applied.
            **kwargs: For this call only; given to the constructor they are the defaults of all calls.

                - output_type: `"cutout"` (default), the RGBA image with alpha as its fourth channel; `"mask"`, alpha as
                  an 8-bit grey image; `"composite"`, the RGB image of the foreground on `background`.
                - background: Colour (any that PIL knows: `"white"`, `"#1a2b3c"`, or an RGB triple), image (path, URL,
                  PIL image, or a (3, height, width) tensor in [0, 1]; scaled to cover, centred), or `"blur"` for the
                  image's own background out of focus. It implies `output_type="composite"`.
                - threshold: In [0, 1]. 0 (default) keeps alpha soft; above, alpha of at least this value becomes 1 and
                  the rest 0.
                - refine_foreground: Whether the colours of soft edges are estimated without the background's share;
                  default True. Without it the original pixels are kept, which is faster and shows a rim of the old
                  background on a new one. Has no effect on masks.
                - size: Input size of the network instead of the image processor's, (height, width) or one side.
                - timeout: Seconds to wait for a URL.
                - batch_size: Images that go through the network together, default 1. Those whose input sizes differ
                  (checkpoints for any size) go one size after the other.
                - num_workers: Processes that load and resize images, default 0 (none beside the main one).

        Returns:
            One PIL image of the (upright) input's size; a list of them for a list or tuple; for iterators and datasets
            an iterator that reads on only as results are asked for.

        Raises:
            ImageLoadError: an input cannot be read; the message names it.
            ValueError: `background` and `output_type` contradict each other or are unknown.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        elif isinstance(inputs, Iterable) and not (isinstance(inputs, _NOT_STREAMED) or hasattr(inputs, "read")):
            return iter(super().__call__(_Stream(iter(inputs)), **kwargs))
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        output_type: OutputType | None = None,
        background: Any = None,
        refine_foreground: bool | None = None,
        size: Size | None = None,
        timeout: float | None = None,
        threshold: float | None = None,
    ) -> tuple[dict, dict, dict]:
        _check_threshold(threshold or 0.0)
        if not (
            size is None or isinstance(size, int | Mapping) or (isinstance(size, list | tuple) and len(size) == 2)
        ):
            raise ValueError(f"size={size!r} must be (height, width) or one side.")
        if output_type is not None and output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {list(get_args(OutputType))}.")
        if background is not None:
            if output_type not in (None, "composite"):
                raise ValueError(
                    f"output_type={output_type!r} has no background; leave out `background`, or "
                    "`output_type` (it is then 'composite')."
                )
            output_type = "composite"
            of_all_calls = getattr(self, "_preprocess_params", {})
            background = parse_background(background, timeout=timeout or of_all_calls.get("timeout"))
        output = {"output_type": output_type} if output_type is not None else {}
        preprocess = {**output, "size": size, "timeout": timeout}
        forward = {**output, "background": background, "refine": refine_foreground, "threshold": threshold}
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {name: value for name, value in forward.items() if value is not None},
            {},
        )

    def get_inference_context(self):
        return torch.inference_mode

    def preprocess(
        self,
        source: Any,
        output_type: OutputType = "cutout",
        size: Size | None = None,
        timeout: float | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        try:
            image = load_image(source, timeout=timeout)
        except ImageLoadError as error:  # raised when it is this image's turn: here it would take its batch along
            return {"samples": [{"error": error}]}
        resize = {} if size is None else {"size": size}
        sample = {
            "pixel_values": self.image_processor(image, return_tensors="pt", **resize)["pixel_values"],
            "target_size": (image.height, image.width),
            # Masks need no colours on the device.
            "image": None if output_type == "mask" else torch.from_numpy(np.array(image)),  # (H, W, 3) uint8
            "icc_profile": None if output_type == "mask" else rgb_profile(image),
        }
        # In a list, the base class's collation leaves the sample alone; tensors of different sizes it would concatenate.
        return {"samples": [sample]}

    def _forward(
        self,
        model_inputs: dict[str, list],
        output_type: OutputType = "cutout",
        background: Background | None = None,
        refine: bool = True,
        threshold: float = 0.0,
    ) -> dict[str, list]:
        _check_background(output_type, background)
        samples = model_inputs["samples"]
        is_batch = isinstance(samples[0], list)  # collated: one list per image
        if is_batch:
            samples = [sample for [sample] in samples]

        indices_by_size = defaultdict(list)
        results: list[dict[str, Any]] = [{}] * len(samples)
        for index, sample in enumerate(samples):
            if "error" in sample:
                results[index] = sample
            else:
                indices_by_size[sample["pixel_values"].shape].append(index)
        for indices in indices_by_size.values():
            logits = self.model(torch.cat([samples[index]["pixel_values"] for index in indices])).logits
            for index, image_logits in zip(indices, logits, strict=True):
                sample = samples[index]
                # One image at a time, so that only one is held as floating-point numbers at its full size.
                [alpha] = self.image_processor.post_process_alpha(
                    BiRefNetImageSegmentationOutput(logits=image_logits[None]), [sample["target_size"]]
                )
                behind = _in_colours_of(sample["icc_profile"], background)
                pixels = _render(sample["image"], alpha, output_type, behind, refine, threshold)
                results[index] = {"pixels": pixels, "icc_profile": sample["icc_profile"]}
        return {"results": [[result] for result in results] if is_batch else results}

    def postprocess(self, model_outputs: dict[str, list[dict[str, Any]]]) -> Image.Image:
        [result] = model_outputs["results"]
        if "error" in result:
            raise result["error"]
        return _to_picture(result["pixels"], result["icc_profile"])


def render_picture(
    image: Image.Image,
    alpha: Image.Image,
    *,
    output_type: OutputType | None = None,
    background: Background | None = None,
    refine_foreground: bool = True,
    threshold: float = 0.0,
    device: str | torch.device = "cpu",
) -> Image.Image:
    """What [`BackgroundRemovalPipeline`] makes of an image, from a mask that is there already.

    Args:
        image: RGB, upright.
        alpha: Mode "L", of the image's size.
        output_type, refine_foreground, threshold: As in the pipeline's call.
        background: As `parse_background` gives it, or "blur". It implies `output_type="composite"`.
        device: Where to compute.

    Returns:
        RGBA for a cut-out, RGB for a composite, "L" for a mask.

    Raises:
        ValueError: the sizes differ, or a composite has no background.
    """
    if image.size != alpha.size:
        raise ValueError(f"The image has {image.size} pixels, its alpha {alpha.size}; they must agree.")
    _check_threshold(threshold)
    if output_type is None:
        output_type = "cutout" if background is None else "composite"
    _check_background(output_type, background)
    profile = None if output_type == "mask" else rgb_profile(image)
    background = _in_colours_of(profile, background)
    pixels = torch.from_numpy(np.array(image)).to(device)  # (H, W, 3)
    matte = torch.from_numpy(np.array(alpha)).to(device, torch.float32) / 255  # (H, W)
    with torch.inference_mode():
        rendered = _render(pixels, matte, output_type, background, refine_foreground, threshold)
    return _to_picture(rendered.cpu(), profile)


def _render(
    image: torch.Tensor | None,
    alpha: torch.Tensor,
    output_type: OutputType,
    background: Background | None,
    refine: bool,
    threshold: float,
) -> torch.Tensor:
    """The picture asked for, uint8, H×W for a mask, else H×W×channels, still on the device.

    Args:
        image: H×W×3 uint8; None for masks.
        alpha: H×W float32 in [0, 1].
        background: As `parse_background` gives it, or "blur"; for composites.
        threshold: 0, or where alpha is split into 0 and 1.
    """
    if threshold > 0:
        alpha = (alpha >= threshold).to(alpha.dtype)
    if output_type == "mask":
        return to_uint8(alpha)
    if output_type == "cutout" and not refine:
        return torch.cat((image, to_uint8(alpha)[:, :, None]), dim=2)
    colours = original = image.permute(2, 0, 1).to(torch.float32) / 255  # (3, H, W)
    if refine:
        colours = refine_foreground(colours, alpha)
    if output_type == "composite":
        if isinstance(background, str):
            background = _blur_background(original, alpha)
        pixels = to_uint8(composite(colours, alpha, background))
    else:
        pixels = torch.cat((to_uint8(colours), to_uint8(alpha)[None]))
    return pixels.permute(1, 2, 0).contiguous()


def _blur_background(image: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The image's background out of focus. The foreground has no part in it: its colours would glow around it.

    Args:
        image: (3, H, W), float in [0, 1].
        alpha: (H, W), float in [0, 1].

    Returns:
        Shape of `image`.
    """
    height, width = image.shape[-2:]
    # A wide blur of a large image is a narrow one of a small copy, at a fraction of the work.
    scale = max(1.0, BLUR_SHARE * max(height, width) / MIN_BLUR)
    rest = 1 - alpha
    maps = torch.cat((image * rest, rest[None]))[None]  # (1, 4, H, W)
    size = (max(1, round(height / scale)), max(1, round(width / scale)))
    maps = F.interpolate(maps, size=size, mode="bilinear", antialias=True)
    radius = round(3 * MIN_BLUR)
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-((offsets / MIN_BLUR) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(4, 1, 1, -1)
    maps = F.pad(maps, (radius,) * 4, mode="replicate")
    maps = F.conv2d(F.conv2d(maps, kernel, groups=4), kernel.transpose(2, 3), groups=4)
    maps = F.interpolate(maps, size=(height, width), mode="bilinear")[0]
    return (maps[:3] / maps[3:].clamp(min=1e-4)).clamp_(0, 1)


def _check_background(output_type: OutputType, background: Background | None) -> None:
    if output_type == "composite" and background is None:
        raise ValueError("output_type='composite' needs a `background`: a colour, an image or \"blur\".")
    if isinstance(background, str) and background != "blur":
        raise ValueError(f'background={background!r} is no tensor and not "blur"; `parse_background` reads it.')
    if isinstance(background, torch.Tensor) and (
        background.dim() != 3 or background.shape[0] != 3 or not background.is_floating_point()
    ):
        raise ValueError(
            f"A background tensor of shape {tuple(background.shape)} and type {background.dtype} does not do: it has to "
            "be (3, height, width) or, for a colour, (3, 1, 1), in floating point and [0, 1]. Move channels to the front "
            "(`permute(2, 0, 1)`), and divide 8-bit values by 255."
        )


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in [0, 1].")


def _to_picture(pixels: torch.Tensor, icc_profile: bytes | None) -> Image.Image:
    picture = Image.fromarray(pixels.numpy())
    if icc_profile is not None:
        picture.info["icc_profile"] = icc_profile
    return picture


def _in_colours_of(profile: bytes | None, background: Background | None) -> Background | None:
    """A background in sRGB, as the image's own colour profile has it."""
    if profile is None or not isinstance(background, torch.Tensor):
        return background
    pixels = Image.fromarray(to_uint8(background).permute(1, 2, 0).contiguous().cpu().numpy())
    return to_tensor(convert_colours(pixels, None, profile))


def load_pipeline(
    model: str | os.PathLike[str] | BiRefNetForImageSegmentation = "ZhengPeng7/BiRefNet",
    task: Literal["background-removal", "image-segmentation"] = "background-removal",
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    image_processor: BiRefNetImageProcessor | None = None,
    size: Size | None = None,
    patch_order: Literal["c_hg_wg", "wg_hg_c"] | None = None,
    device_map: str | dict[str, int | str | torch.device] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **pipeline_options,
) -> Pipeline:
    """Builds a pipeline from any BiRefNet, also from released repositories, which the Auto classes refuse.

    Args:
        model: Hub id; directory, released, written by `save_pretrained` or by scripts/export_onnx.py (which runs in ONNX
            Runtime on the CPU, in the precision and at the size that it was exported with); alias such as "lite" (see
            `checkpoints_birefnet`), of which "nano" needs no download; or a model object, which is put into evaluation
            mode.
        task: "background-removal", or "image-segmentation" for Transformers' own pipeline with its binary masks, and
            its options.
        device: Where to compute; default the first CUDA or MPS device, else the CPU. A model object stays where it is,
            also in several places that `device_map` has chosen.
        dtype: Precision of the weights; default float32 on the CPU, also for a float16 file, and the file's own on
            other devices. A model object keeps its own.
        image_processor: Default the checkpoint's.
        size: Input size of the network, (height, width) or one side, instead of the image processor's.
        patch_order: Order of the image patches' channels, instead of the configuration's; see `BiRefNetConfig`.
        device_map: As in `from_pretrained`, instead of `device`.
        revision, token, cache_dir, local_files_only: As in `from_pretrained`.
        **pipeline_options: Options of the pipeline, e.g. `batch_size`, `output_type`, `background`; see
            [`BackgroundRemovalPipeline`].

    Returns:
        A [`BackgroundRemovalPipeline`] or `transformers.ImageSegmentationPipeline`.

    Raises:
        ValueError: unknown task, device or dtype, a device that is not there or given in two ways, a size that is no
            multiple of 32, what is neither a model's directory nor a name, or options that an exported directory does
            not have.
        OSError: there is no such model on the Hub, no connection, or its files cannot be read.
    """
    pipeline_classes = {
        "background-removal": BackgroundRemovalPipeline,
        "image-segmentation": _StockPipeline,
    }
    if task not in pipeline_classes:
        raise ValueError(f"task={task!r} is unknown; choose one of {list(pipeline_classes)}.")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f'dtype={dtype!r} is unknown; use "float32", "float16", "bfloat16" or "auto".')
        dtype = getattr(torch, dtype)
    resize = {} if size is None else {"size": size}
    if image_processor is not None and resize:
        raise ValueError(
            "`size` is the image processor's: give one of that size, or leave `image_processor` to be found."
        )

    if device_map is not None and (device is not None or not isinstance(model, str | os.PathLike)):
        raise ValueError(
            "`device_map` is for loading, and instead of `device`: pass one of the two, with a model's name."
        )
    hub_options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if not isinstance(model, str | os.PathLike):
        if patch_order not in (None, model.config.patch_order):
            raise ValueError("`patch_order` belongs to loading; this model is loaded. Pass it to `from_pretrained`.")
        device = _device_of(model) if device is None else _find_device(device)
        if dtype not in (None, "auto"):
            model.to(dtype)
        image_processor = image_processor or _image_processor_of(model, **hub_options, **resize)
    else:
        name = find_model(model)
        is_exported = _is_exported(name)
        if is_exported and not (dtype is patch_order is device_map is None):
            raise ValueError(
                f"{name} is exported: leave out `dtype` and `patch_order`, which are what they were then, and "
                "`device_map`."
            )
        device = _find_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else "auto"
        settings = {"device_map": device_map} | ({} if patch_order is None else {"patch_order": patch_order})
        if image_processor is None:
            with naming_model(name):
                image_processor = BiRefNetImageProcessor.from_pretrained(name, **hub_options, **resize)
        if is_exported:
            if device.type != "cpu":
                logger.warning(
                    "%s is exported and runs on the CPU. For a GPU pass a model object: "
                    'BiRefNetOnnxForImageSegmentation.from_pretrained(directory, providers=["CUDAExecutionProvider"]).',
                    name,
                )
            device = torch.device("cpu")
            model = BiRefNetOnnxForImageSegmentation.from_pretrained(name, **hub_options)
        else:
            with naming_model(name):
                model = BiRefNetForImageSegmentation.from_pretrained(name, dtype=dtype, **hub_options, **settings)
            if device_map is not None:
                device = _device_of(model)
    return pipeline_classes[task](
        model=model.eval(), image_processor=image_processor, device=device, task=task, **pipeline_options
    )


class _StockPipeline(ImageSegmentationPipeline):
    """The stock pipeline, reading images as ours does: arrays, bytes and every depth of colour, public addresses only."""

    def check_model_type(self, supported_models: Any) -> None:
        """It would log that it knows nothing of exported models."""

    def _sanitize_parameters(self, **options) -> tuple[dict, dict, dict]:
        if unknown := sorted(options.keys() - _STOCK_OPTIONS):
            raise ValueError(
                f"The image-segmentation pipeline has no {', '.join(unknown)}; it takes {', '.join(_STOCK_OPTIONS)}. "
                'What `BackgroundRemovalPipeline` can do needs task="background-removal".'
            )
        return super()._sanitize_parameters(**options)

    def preprocess(self, image: Any, subtask: str | None = None, timeout: float | None = None) -> dict[str, Any]:
        return super().preprocess(load_image(image, timeout=timeout), subtask)


def _is_exported(name: str) -> bool:
    """Whether it is a directory that holds a graph and no weights."""
    files = os.listdir(name) if os.path.isdir(name) else ()
    return any(file in ONNX_FILE_NAMES.values() for file in files) and not any(
        file.endswith((".safetensors", ".bin", ".safetensors.index.json")) for file in files
    )


def _find_device(device: str | int | torch.device | None) -> torch.device:
    """The device of that name or number (-1: CPU), or the best there is; ValueError where it is not there."""
    has_mps = torch.backends.mps.is_available()
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device={device!r} is unknown; use "cpu", "cuda", "cuda:1" or "mps".') from error
    is_there = {"cuda": (device.index or 0) < torch.cuda.device_count(), "mps": has_mps}
    if not is_there.get(device.type, True):
        raise ValueError(f'device="{device}" is not there: PyTorch sees no such device. Use device="cpu".')
    return device


def _device_of(model: BiRefNetForImageSegmentation) -> torch.device | None:
    """Where it is; None where that is several places, among which the pipeline finds where to begin."""
    return model.device if getattr(model, "hf_device_map", None) is None else None


def _image_processor_of(
    model: BiRefNetForImageSegmentation, *, size: Any = None, **hub_options
) -> BiRefNetImageProcessor:
    """The processor that belongs to a model object: that of the place it came from, else one of its trained size."""
    resize = {} if size is None else {"size": size}
    height, width = model.config.image_size
    trained_size = {"height": height, "width": width}
    if name := model.name_or_path:
        place = {"subfolder": getattr(model, "subfolder", "")} | hub_options
        try:
            return BiRefNetImageProcessor.from_pretrained(name, **place, **resize)
        except OSError:  # a folder that is gone, a checkpoint of a training run without a processor, no connection
            if checkpoint := get_checkpoint(name):
                trained_size = checkpoint.processor_size
            logger.warning(
                "The image processor of %s cannot be loaded. Unless `size` is given, its input has the size that it was "
                "trained for, %s.",
                name,
                trained_size,
            )
    return BiRefNetImageProcessor(size=size or trained_size)


__all__ = ["BackgroundRemovalPipeline", "load_pipeline", "render_picture"]
