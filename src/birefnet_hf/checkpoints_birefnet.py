"""The known BiRefNet checkpoints: what their files do not say about themselves.

The released repositories state neither an input size nor the patch order that they were trained with, so both
come from this table. The patch orders are inferred from publication dates and vendored code, not measured.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal


PatchOrder = Literal["c_hg_wg", "wg_hg_c"]

# Directory of the small trained network that ships with the package: it needs no download.
NANO = str(Path(__file__).parent / "nano")

# Of `from_pretrained`: where files come from.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

_HUB_CACHE_PREFIX = "models--"
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """One released set of weights.

    Attributes:
        hub_id: Repository on the Hugging Face Hub, "owner/name".
        alias: Short name for the command line, or None.
        purpose: What the weights were trained for.
        patch_order: Channel order of the stacked image patches during training, None where unknown.
        backbone: Readable backbone name, as in the model configuration.
        size: Input size (height, width) in pixels, or None for a checkpoint that keeps the size of the image.
        size_range: Smallest and largest side in pixels of a checkpoint that keeps the size of the image, else None.
        licence: SPDX identifier of the weights' licence.
        weights_file: Name of the pickled state dict where the repository holds nothing else, no config.json either.
    """

    hub_id: str
    alias: str | None
    purpose: str
    patch_order: PatchOrder | None
    backbone: str = "swin_v1_l"
    size: tuple[int, int] | None = (1024, 1024)
    size_range: tuple[int, int] | None = None
    licence: str = "MIT"
    weights_file: str | None = None

    @property
    def name(self) -> str:
        """Repository name without its owner."""
        return self.hub_id.split("/")[-1]

    @property
    def loss_task(self) -> str:
        """The training recipe that fits the weights' purpose, as in the model configuration."""
        return _TASKS.get(self.purpose, "general")

    @property
    def processor_size(self) -> dict[str, int]:
        """The `size` of an image processor for this checkpoint."""
        if self.size is not None:
            return {"height": self.size[0], "width": self.size[1]}
        return {"shortest_edge": self.size_range[0], "longest_edge": self.size_range[1]}


# Other purposes are trained for like "general".
_TASKS = {
    "matting": "matting",
    "portrait matting": "matting",
    "background removal, soft": "matting",
    "dichotomous segmentation": "dis",
    "camouflaged objects": "cod",
    "salient objects": "hrsod",
}
_LITE = {"backbone": "swin_v1_t"}
_HIGH_RESOLUTION = {"size": (2048, 2048)}
_DYNAMIC = {"size": None, "size_range": (256, 2304)}

# fmt: off
CHECKPOINTS: tuple[Checkpoint, ...] = (
    Checkpoint("ZhengPeng7/BiRefNet", "general", "general", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet_HR", "hr", "general", "c_hg_wg", **_HIGH_RESOLUTION),
    Checkpoint("ZhengPeng7/BiRefNet_HR-matting", "hr-matting", "matting", "c_hg_wg", **_HIGH_RESOLUTION),
    Checkpoint("ZhengPeng7/BiRefNet_dynamic", "dynamic", "general", "c_hg_wg", **_DYNAMIC),
    Checkpoint("ZhengPeng7/BiRefNet_dynamic-matting", "dynamic-matting", "matting", "c_hg_wg", **_DYNAMIC),
    Checkpoint("ZhengPeng7/BiRefNet_512x512", "512", "general", "c_hg_wg", size=(512, 512)),
    Checkpoint("ZhengPeng7/BiRefNet_lite", "lite", "general", "wg_hg_c", **_LITE),
    # Landscape: 2560 is the width. Upstream's handler passes (2560, 1440) to a function that reads (height, width).
    Checkpoint("ZhengPeng7/BiRefNet_lite-2K", "lite-2k", "general", "wg_hg_c", **_LITE, size=(1440, 2560)),
    Checkpoint("ZhengPeng7/BiRefNet_lite-matting", "lite-matting", "matting", None, **_LITE),
    Checkpoint("ZhengPeng7/BiRefNet-matting", "matting", "matting", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-portrait", "portrait", "portrait matting", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-DIS5K", "dis", "dichotomous segmentation", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-DIS5K-TR_TEs", "dis-tr-tes", "dichotomous segmentation", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-COD", "cod", "camouflaged objects", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-HRSOD", "hrsod", "salient objects", "wg_hg_c"),
    Checkpoint("ZhengPeng7/BiRefNet-legacy", "legacy", "general", "wg_hg_c"),
    Checkpoint("briaai/RMBG-2.0", "rmbg", "background removal", "wg_hg_c", licence="CC-BY-NC-4.0"),
    Checkpoint("joelseytre/toonout", "toonout", "anime", "c_hg_wg", weights_file="birefnet_finetuned_toonout.pth"),
    Checkpoint("cyberagent/layerd-birefnet", "layerd", "layers of graphic designs", "c_hg_wg"),
    Checkpoint("egeorcun/lucida", "lucida", "background removal, soft", "c_hg_wg"),  # from BiRefNet_HR, at 1024 × 1024
)
# fmt: on

_BY_HUB_ID = {checkpoint.hub_id.casefold(): checkpoint for checkpoint in CHECKPOINTS}
_BY_ALIAS = {checkpoint.alias.casefold(): checkpoint for checkpoint in CHECKPOINTS if checkpoint.alias}
_BY_NAME = {checkpoint.name.casefold(): checkpoint for checkpoint in CHECKPOINTS}


def list_aliases() -> list[str]:
    """All aliases, that of the package's own network first."""
    return ["nano", *(checkpoint.alias for checkpoint in CHECKPOINTS if checkpoint.alias)]


def get_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint | None:
    """Finds what is known about a checkpoint, by its name alone (no file is read).

    Args:
        name_or_path: A Hub id or an alias, in any letter case; a path inside the Hugging Face cache
            (`.../models--owner--name/snapshots/...`); or an existing local directory or weight file that carries
            the name of a repository, e.g. `weights/BiRefNet_lite`, `weights/BiRefNet_lite.safetensors` or
            `weights/BiRefNet_lite/model.safetensors`. A local model is never taken for an alias.

    Returns:
        The table's entry, or None if the name is not in it.
    """
    text = os.fspath(name_or_path)
    if not _holds_model(text):
        found = _BY_HUB_ID.get(text.casefold()) or _BY_ALIAS.get(text.casefold())
        if found is not None or not os.path.exists(text):
            return found or _from_hub_cache(PurePath(text))

    path = PurePath(os.path.abspath(text))
    found = _from_hub_cache(path)
    if found is not None:
        return found
    names = [path.name]
    if path.suffix.casefold() in _WEIGHT_SUFFIXES:
        names = [path.stem, path.parent.name]
    return next((_BY_NAME[name.casefold()] for name in names if name.casefold() in _BY_NAME), None)


def resolve_checkpoint(name: str) -> str:
    """Turns an alias into what `from_pretrained` takes: "lite" into its Hub id, "nano" into the package's own directory.

    Every other name, and that of a local model, is returned as it is.
    """
    if _holds_model(name):
        return name
    if name.casefold() == "nano":
        return NANO
    checkpoint = _BY_ALIAS.get(name.casefold())
    return name if checkpoint is None else checkpoint.hub_id


def find_model(name: str | os.PathLike[str]) -> str:
    """As `resolve_checkpoint`, of what is a directory or may be a Hub id; all else is refused before the Hub is asked.

    Raises:
        ValueError: a file, or neither a directory nor a Hub id nor an alias.
    """
    name = resolve_checkpoint(os.fspath(name))
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
    return name


@contextlib.contextmanager
def naming_model(name: str) -> Iterator[None]:
    """Puts a name that is no directory here into what the Hub's client says of it, or of the connection."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(name) or name in str(error):
            raise
        raise OSError(f"{name} is no directory here, and from the Hub: {error}") from error


def _holds_model(path: str) -> bool:
    """Whether it is a file, or a folder with a model in it: a folder "lite" for cut-outs does not hide the alias."""
    if not os.path.isdir(path):
        return os.path.exists(path)
    return any(name == "config.json" or name.endswith((*_WEIGHT_SUFFIXES, ".onnx")) for name in os.listdir(path))


def _from_hub_cache(path: PurePath) -> Checkpoint | None:
    for part in path.parts:
        if part.startswith(_HUB_CACHE_PREFIX):
            # The cache writes "owner/name" as "models--owner--name".
            return _BY_HUB_ID.get(part.removeprefix(_HUB_CACHE_PREFIX).replace("--", "/", 1).casefold())
    return None
