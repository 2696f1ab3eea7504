"""Exported BiRefNets (files of `scripts/export_onnx.py`) in ONNX Runtime or OpenVINO, for the same pipeline."""

import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import cached_file

from .configuration_birefnet import BiRefNetConfig
from .modeling_birefnet import SIZE_DIVISOR, BiRefNetImageSegmentationOutput, pad_to_divisor


# Both precisions of one network fit in one directory. The names are those that transformers.js looks for.
ONNX_FILE_NAMES = {torch.float32: "model.onnx", torch.float16: "model_fp16.onnx"}

Runtime = Literal["onnxruntime", "openvino"]
Provider = str | tuple[str, dict[str, Any]]


class _Session(NamedTuple):
    """A loaded graph.

    Attributes:
        run: (B, 3, H, W) float32 → (B, 1, H, W) float32.
        input_shape: Four numbers, None where the graph takes any.
    """

    run: Callable[[np.ndarray], np.ndarray]
    input_shape: tuple[int | None, ...]


def _open_with_onnxruntime(path: str, providers: Sequence[Provider] | None, num_threads: int | None) -> _Session:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            'Exported models need ONNX Runtime: pip install "birefnet-hf[onnx]", or onnxruntime-gpu for a GPU. '
            'With OpenVINO instead, pass runtime="openvino".'
        ) from error
    providers = list(providers or ["CPUExecutionProvider"])
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    unknown = [name for name in names if name not in onnxruntime.get_available_providers()]
    if unknown:
        raise ValueError(f"providers {unknown} are not there; there are {onnxruntime.get_available_providers()}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # without it, warnings about nodes that fall back to the CPU
    # One block planned for all maps takes gigabytes more than they do one by one, and no less time.
    options.enable_mem_pattern = False
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the runtime has a class for each of its status codes, none of them public
        raise ValueError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
    [graph_input] = session.get_inputs()
    shape = tuple(side if isinstance(side, int) else None for side in graph_input.shape)
    return _Session(lambda pixels: session.run(["logits"], {graph_input.name: pixels})[0], shape)


def _convert_deform_conv(node: Any) -> list[Any]:
    """OpenVINO's operation for an ONNX DeformConv node, which its ONNX reader (2026.4) does not know."""
    from openvino import opset8

    feature_map, weight, offset, modulator = (node.get_input(index) for index in (0, 1, 2, 4))  # 3 is no bias
    pads = list(node.get_attribute("pads"))  # top, left, bottom, right
    operation = opset8.deformable_convolution(
        feature_map,
        offset,
        weight,
        strides=[1, 1],
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=[1, 1],
        mask=modulator,
        bilinear_interpolation_pad=True,  # zeros outside, fading in, instead of dropping such samples
    )
    return operation.outputs()


@cache
def _openvino_core() -> Any:
    """OpenVINO, once for the process and to its end.

    On processors with AMX, each `Core` (2026.4) gives its thread a stack for signal handlers and restores the one before
    when it is deleted. Two that are not deleted in reverse order leave the thread with a freed stack, and the next signal
    kills the process.
    """
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    core.add_extension(ConversionExtension("DeformConv", _convert_deform_conv))
    return core


def _open_with_openvino(path: str, num_threads: int | None) -> _Session:
    try:
        import openvino

        core = _openvino_core()
    except ImportError as error:
        raise ImportError('runtime="openvino" needs OpenVINO: pip install "birefnet-hf[openvino]".') from error
    # It would choose half precision on processors that are fast at it.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO {openvino.__version__} cannot load {path}: {error}") from error
    shape = tuple(side.get_length() if side.is_static else None for side in compiled.input(0).partial_shape)
    requests = threading.local()  # calling `compiled` itself, threads would share one, and get each other's results

    def run(pixels: np.ndarray) -> np.ndarray:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        return requests.own.infer([pixels])[0]

    return _Session(run, shape)


class BiRefNetOnnxForImageSegmentation:
    """An exported BiRefNet that stands in for [`BiRefNetForImageSegmentation`] in inference, also in pipelines.

    Example:

    ```python
    >>> from birefnet_hf import load_pipeline
    >>> from birefnet_hf.onnx_birefnet import BiRefNetOnnxForImageSegmentation

    >>> model = BiRefNetOnnxForImageSegmentation.from_pretrained("exported")
    >>> load_pipeline(model)("photo.jpg").save("cutout.png")
    ```

    Attributes:
        config: The network's.
        name_or_path: Where it came from, which is also where pipelines find the image processor.
        input_shape: (batch_size, 3, height, width) that the graph takes, None where any.
        device: Where inputs and outputs lie best, the CPU. Where the runtime computes is its own business.
        dtype: Of inputs and outputs, float32 also where the weights are float16.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, open_session: Callable[[], _Session], config: BiRefNetConfig, name_or_path: str):
        self._open_session = open_session
        self._session = open_session()
        self.config = config
        self.name_or_path = name_or_path

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        file_name: str | None = None,
        runtime: Runtime = "onnxruntime",
        providers: Provider | Sequence[Provider] | None = None,
        num_threads: int | None = None,
        **hub_options,
    ) -> "BiRefNetOnnxForImageSegmentation":
        """Loads what `scripts/export_onnx.py` wrote.

        Args:
            name_or_path: Directory or Hub id.
            file_name: Default model.onnx, else model_fp16.onnx.
            runtime: What computes.
            providers: Of ONNX Runtime, one or several, e.g. `["CUDAExecutionProvider", "CPUExecutionProvider"]`, each
                a name or (name, options); default the CPU's.
            num_threads: Default the runtime's choice.
            **hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as in the library.

        Raises:
            ImportError: the runtime is not installed.
            OSError: no such directory or repository, or no such file in it.
            ValueError: unknown runtime or provider, or a file that the runtime cannot load.
        """
        if runtime not in ("onnxruntime", "openvino"):
            raise ValueError(f"runtime={runtime!r} is unknown; use 'onnxruntime' or 'openvino'.")
        if providers is not None and runtime != "onnxruntime":
            raise ValueError("`providers` are ONNX Runtime's; OpenVINO runs on the CPU here.")
        if isinstance(providers, str) or (isinstance(providers, tuple) and isinstance(providers[-1], dict)):
            providers = [providers]
        name = os.fspath(name_or_path)
        config = BiRefNetConfig.from_pretrained(name, **hub_options)
        if file_name is None:
            found = (
                cached_file(name, candidate, **hub_options, _raise_exceptions_for_missing_entries=False)
                for candidate in ONNX_FILE_NAMES.values()
            )
            path = next((path for path in found if path is not None), None)  # only this one is downloaded
            if path is None:
                raise OSError(
                    f"{name} holds none of {list(ONNX_FILE_NAMES.values())}; scripts/export_onnx.py writes them."
                )
        else:
            path = cached_file(name, file_name, **hub_options)
        if runtime == "openvino":
            open_session = partial(_open_with_openvino, path, num_threads)
        else:
            open_session = partial(_open_with_onnxruntime, path, providers, num_threads)
        return cls(open_session, config, name)

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which belongs to its process: copies and other processes open the file again."""
        return {name: value for name, value in vars(self).items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _session=state["_open_session"]())

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return self._session.input_shape

    def __call__(self, pixel_values: torch.Tensor, **kwargs) -> BiRefNetImageSegmentationOutput:
        """Computes logits (B, 1, H, W) from (B, 3, H, W), on the device of `pixel_values`.

        Where the file was exported for one batch size, others go through it in parts, the last one filled up. Where it was
        exported for any size, sides that are no multiples of 32 are filled up, as the network itself does it.

        Raises:
            ValueError: the shape is not one that the file was exported for.
        """
        pixels = pixel_values.detach().to("cpu", torch.float32)
        if pixels.dim() != 4 or any(
            expected not in (None, side) for side, expected in zip(pixels.shape[1:], self.input_shape[1:], strict=True)
        ):
            expected = ", ".join("any" if side is None else str(side) for side in self.input_shape)
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this file was exported for ({expected}). Give the "
                f"image processor that size, or export with another --size, multiples of {SIZE_DIVISOR}."
            )
        height, width = pixels.shape[2:]
        if None in self.input_shape[2:]:
            if min(height, width) <= SIZE_DIVISOR:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}; exported graphs for any size take sides of more "
                    f"than {SIZE_DIVISOR}."
                )
            pixels = pad_to_divisor(pixels)
        size = self.input_shape[0] or len(pixels)
        parts = []
        for part in pixels.split(size):
            filled = torch.cat((part, part[-1:].expand(size - len(part), -1, -1, -1)))
            parts.append(torch.from_numpy(self._session.run(filled.contiguous().numpy()))[: len(part)])
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return BiRefNetImageSegmentationOutput(logits=logits[..., :height, :width].to(pixel_values.device))

    def eval(self) -> "BiRefNetOnnxForImageSegmentation":
        """Nothing to do: a file is always in evaluation mode."""
        return self

    def to(self, *args, **kwargs) -> "BiRefNetOnnxForImageSegmentation":
        """Nothing to do: the runtime's provider says where the graph computes, and the file in which precision."""
        return self

    def can_generate(self) -> bool:
        return False


__all__ = ["ONNX_FILE_NAMES", "BiRefNetOnnxForImageSegmentation"]
