"""Background removal as a pipeline: any image in; soft mask, cut-out or composite out, at the image's own size."""

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import ImageSegmentationPipeline, Pipeline
from transformers.utils import logging

from .checkpoints_birefnet import list_aliases, resolve_checkpoint
from .foreground import composite, parse_background, refine_foreground, to_uint8
from .image_loading import load_image
from .image_processing_birefnet import BiRefNetImageProcessor
from .modeling_birefnet import BiRefNetForImageSegmentation, BiRefNetImageSegmentationOutput


logger = logging.get_logger(__name__)

OutputType = Literal["mask", "cutout", "composite"]
Size = int | tuple[int, int] | dict[str, int]


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
            inputs: An image: path, URL (public addresses only, see `load_image`), PIL image of any mode, array (H×W or H×W×channels); or a list or tuple of them,
                an iterator, or a torch `Dataset` (for a `datasets.Dataset`,
                `transformers.pipelines.pt_utils.KeyDataset(dataset, "image")`). EXIF orientation is applied.
            **kwargs: For this call only; given to the constructor they are the defaults of all calls.

                - output_type: `"cutout"` (default), the RGBA image with alpha as its fourth channel; `"mask"`, alpha as
                  an 8-bit grey image; `"composite"`, the RGB image of the foreground on `background`.
                - background: Colour (any that PIL knows: `"white"`, `"#1a2b3c"`, or an RGB triple) or image (path, URL,
                  PIL image, or a (3, height, width) tensor in [0, 1]; scaled to cover, centred). It implies `output_type="composite"`.
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
        elif isinstance(inputs, Iterator):
            inputs = _Stream(inputs)
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
    ) -> tuple[dict, dict, dict]:
        if output_type is not None and output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {list(get_args(OutputType))}.")
        if background is not None:
            if output_type not in (None, "composite"):
                raise ValueError(
                    f"output_type={output_type!r} has no background; leave out `background`, or "
                    "`output_type` (it is then 'composite')."
                )
            output_type = "composite"
            if not isinstance(background, torch.Tensor):
                background = parse_background(background, timeout=timeout)
        output = {"output_type": output_type} if output_type is not None else {}
        preprocess = {**output, "size": size, "timeout": timeout}
        forward = {**output, "background": background, "refine": refine_foreground}
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
        image = load_image(source, timeout=timeout)
        resize = {} if size is None else {"size": size}
        sample = {
            "pixel_values": self.image_processor(image, return_tensors="pt", **resize)["pixel_values"],
            "target_size": (image.height, image.width),
            # Masks need no colours on the device.
            "image": None if output_type == "mask" else torch.from_numpy(np.array(image)),  # (H, W, 3) uint8
            "icc_profile": None if output_type == "mask" else _rgb_profile(image),
        }
        # In a list, the base class's collation leaves the sample alone; tensors of different sizes it would concatenate.
        return {"samples": [sample]}

    def _forward(
        self,
        model_inputs: dict[str, list],
        output_type: OutputType = "cutout",
        background: torch.Tensor | None = None,
        refine: bool = True,
    ) -> dict[str, list]:
        if output_type == "composite" and background is None:
            raise ValueError("output_type='composite' needs a `background`: a colour or an image.")
        samples = model_inputs["samples"]
        is_batch = isinstance(samples[0], list)  # collated: one list per image
        if is_batch:
            samples = [sample for [sample] in samples]

        indices_by_size = defaultdict(list)
        for index, sample in enumerate(samples):
            indices_by_size[sample["pixel_values"].shape].append(index)
        results: list[dict[str, Any] | None] = [None] * len(samples)
        for indices in indices_by_size.values():
            logits = self.model(torch.cat([samples[index]["pixel_values"] for index in indices])).logits
            for index, image_logits in zip(indices, logits, strict=True):
                sample = samples[index]
                # One image at a time, so that only one is held as floating-point numbers at its full size.
                [alpha] = self.image_processor.post_process_alpha(
                    BiRefNetImageSegmentationOutput(logits=image_logits[None]), [sample["target_size"]]
                )
                pixels = self._render(sample["image"], alpha, output_type, background, refine)
                results[index] = {"pixels": pixels, "icc_profile": sample["icc_profile"]}
        return {"results": [[result] for result in results] if is_batch else results}

    def _render(
        self,
        image: torch.Tensor | None,
        alpha: torch.Tensor,
        output_type: OutputType,
        background: torch.Tensor | None,
        refine: bool,
    ) -> torch.Tensor:
        """The picture asked for, uint8, H×W for a mask, else H×W×channels, still on the device.

        Args:
            image: H×W×3 uint8; None for masks.
            alpha: H×W float32 in [0, 1].
            background: As `parse_background` gives it; for composites.
        """
        if output_type == "mask":
            return to_uint8(alpha)
        if output_type == "cutout" and not refine:
            return torch.cat((image, to_uint8(alpha)[:, :, None]), dim=2)
        colours = image.permute(2, 0, 1).to(torch.float32) / 255  # (3, H, W)
        if refine:
            colours = refine_foreground(colours, alpha)
        if output_type == "composite":
            pixels = to_uint8(composite(colours, alpha, background))
        else:
            pixels = torch.cat((to_uint8(colours), to_uint8(alpha)[None]))
        return pixels.permute(1, 2, 0).contiguous()

    def postprocess(self, model_outputs: dict[str, list[dict[str, Any]]]) -> Image.Image:
        [result] = model_outputs["results"]
        picture = Image.fromarray(result["pixels"].numpy())
        if result["icc_profile"] is not None:
            picture.info["icc_profile"] = result["icc_profile"]
        return picture


def _rgb_profile(image: Image.Image) -> bytes | None:
    """The ICC profile that gives an image's RGB values their meaning, e.g. of a camera with a wide gamut."""
    profile = image.info.get("icc_profile")
    # Its 16th to 19th byte name the colour space: a CMYK image's profile does not apply to what was made of it.
    return profile if profile and profile[16:20] == b"RGB " else None


def load_pipeline(
    model: str | os.PathLike[str] | BiRefNetForImageSegmentation = "ZhengPeng7/BiRefNet",
    task: Literal["background-removal", "image-segmentation"] = "background-removal",
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    size: Size | None = None,
    patch_order: Literal["c_hg_wg", "wg_hg_c"] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **pipeline_options,
) -> Pipeline:
    """Builds a pipeline from any BiRefNet, also from released repositories, which the Auto classes refuse.

    Args:
        model: Hub id; directory, released or written by `save_pretrained`; alias such as "lite" (see
            `checkpoints_birefnet`), of which "nano" needs no download; or a model object, which is put into evaluation mode.
        task: "background-removal", or "image-segmentation" for Transformers' own pipeline with its binary masks.
        device: Where to compute; default the first CUDA or MPS device, else the CPU. A model object stays where it is.
        dtype: Precision of the weights; default float32 on the CPU, also for a float16 file, and the file's own on
            other devices. A model object keeps its own.
        size: Input size of the network, (height, width) or one side, instead of the checkpoint's.
        patch_order: Order of the image patches' channels, instead of the configuration's; see `BiRefNetConfig`.
        revision, token, cache_dir, local_files_only: As in `from_pretrained`.
        **pipeline_options: Options of the pipeline, e.g. `batch_size`, `output_type`, `background`; see
            [`BackgroundRemovalPipeline`].

    Returns:
        A [`BackgroundRemovalPipeline`] or `transformers.ImageSegmentationPipeline`.

    Raises:
        ValueError: unknown task, device or dtype, a device that is not there, a size that is no multiple of 32, or what
            is neither a model's directory nor a name.
        OSError: there is no such model on the Hub, no connection, or its files cannot be read.
    """
    pipeline_classes = {
        "background-removal": BackgroundRemovalPipeline,
        "image-segmentation": ImageSegmentationPipeline,
    }
    if task not in pipeline_classes:
        raise ValueError(f"task={task!r} is unknown; choose one of {list(pipeline_classes)}.")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f'dtype={dtype!r} is unknown; use "float32", "float16", "bfloat16" or "auto".')
        dtype = getattr(torch, dtype)
    resize = {} if size is None else {"size": size}

    if not isinstance(model, str | os.PathLike):
        if patch_order not in (None, model.config.patch_order):
            raise ValueError("`patch_order` belongs to loading; this model is loaded. Pass it to `from_pretrained`.")
        device = model.device if device is None else _find_device(device)
        if dtype not in (None, "auto"):
            model.to(dtype)
        image_processor = _image_processor_of(model, **resize)
    else:
        name = resolve_checkpoint(os.fspath(model))
        _check_name(name)
        device = _find_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else "auto"
        hub_options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        settings = {} if patch_order is None else {"patch_order": patch_order}
        image_processor = BiRefNetImageProcessor.from_pretrained(name, **hub_options, **resize)
        model = BiRefNetForImageSegmentation.from_pretrained(name, dtype=dtype, **hub_options, **settings)
    return pipeline_classes[task](
        model=model.eval(), image_processor=image_processor, device=device, task=task, **pipeline_options
    )


def _check_name(name: str) -> None:
    """Raises where the name can be neither a directory nor a Hub id, before the Hub is asked."""
    if os.path.isfile(name):
        raise ValueError(
            f"{name} is a file; pass a directory with config.json and model.safetensors. "
            "scripts/convert_checkpoint.py turns a weights file into one."
        )
    if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        aliases = list_aliases()
        close = difflib.get_close_matches(name, aliases, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{name} is no directory, no Hub id (owner/name) and no alias.{hint} The aliases are {', '.join(aliases)}."
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


def _image_processor_of(model: BiRefNetForImageSegmentation, **settings) -> BiRefNetImageProcessor:
    """The processor that belongs to a model object: that of the place it came from, else one of its trained size."""
    if model.name_or_path:
        try:
            return BiRefNetImageProcessor.from_pretrained(model.name_or_path, **settings)
        except OSError:  # a folder that is gone, a checkpoint of a training run without a processor, no connection
            logger.info(f"{model.name_or_path} has no image processor; using config.image_size.")
    height, width = model.config.image_size
    return BiRefNetImageProcessor(**{"size": {"height": height, "width": width}, **settings})


__all__ = ["BackgroundRemovalPipeline", "load_pipeline"]
