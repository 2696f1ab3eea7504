"""Swin Transformer v1 in its detection form, the backbone of all released BiRefNets (Liu et al., arXiv 2103.14030)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_birefnet import BiRefNetConfig
from .ops_birefnet import have_hooks, is_plain_inference, is_plain_linear, is_triton_inference, linear, linear_after
from .triton_birefnet import fused_window_attention


# Bytes of queries, keys and values that inference on a CPU holds at a time: small enough to stay in a cache.
BAND_BYTES = 16 * 2**20


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the readable twin of the fused kernels, and the one that returns attention weights.

    Args:
        query, key, value: (windows, heads, tokens, head_channels).
        attention_mask: Added to the scores; broadcastable to (windows, heads, tokens, tokens).

    Returns:
        Output (windows, tokens, heads, head_channels) and weights (windows, heads, tokens, tokens).
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def is_free(*sizes: int) -> bool:
    """Whether a graph is being exported in which one of these sizes may be any."""
    # The flag, as is_exporting() is true for whatever is compiled until PyTorch 2.12.
    is_exported = getattr(torch.compiler, "_is_exporting_flag", False)
    return is_exported and any(isinstance(size, torch.SymInt) for size in sizes)


def is_multiple(size: int, divisor: int) -> bool:
    """Whether `size` is a multiple of `divisor`; where it is free, whether every such size is."""
    if is_free(size):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes long to import

        return statically_known_true(size % divisor == 0)
    return size % divisor == 0


def round_up(size: int, divisor: int) -> int:
    """The next multiple of `divisor`. Written as a product, which symbolic shapes can see the divisibility of."""
    if is_free(size):
        if is_multiple(size, divisor):
            return size
        # A number of its own: what is computed from an expression is a longer one, and tracing would take hours.
        total = torch.scalar_tensor(size + divisor - 1, dtype=torch.int64)
        count = torch.div(total, divisor, rounding_mode="trunc").item()
        torch._check(count >= 1)
        return count * divisor
    return (size + divisor - 1) // divisor * divisor


def crop(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The first rows and columns of (B, at least height, at least width, C)."""
    if is_free(height, width):  # a slice might be shorter, which nobody knows
        tokens = tokens.index_select(1, torch.arange(height, device=tokens.device))
        return tokens.index_select(2, torch.arange(width, device=tokens.device))
    return tokens[:, :height, :width]


def partition_windows(tokens: torch.Tensor, window_size: int) -> torch.Tensor:
    """(B, H, W, C) → (B * windows, window_size², C); H and W are multiples of `window_size`."""
    batch_size, height, width, channels = tokens.shape
    rows, columns = height // window_size, width // window_size
    tokens = tokens.view(batch_size, rows, window_size, columns, window_size, channels)
    return tokens.transpose(2, 3).reshape(batch_size * rows * columns, window_size * window_size, channels)


def merge_windows(windows: torch.Tensor, window_size: int, batch_size: int, height: int, width: int) -> torch.Tensor:
    """(B * windows, window_size², C) → (B, height, width, C): the inverse of `partition_windows`."""
    rows, columns, channels = height // window_size, width // window_size, windows.shape[-1]
    windows = windows.reshape(batch_size, rows, columns, window_size, window_size, channels)
    return windows.transpose(2, 3).reshape(batch_size, height, width, channels)


def relative_position_index(window_size: int) -> torch.Tensor:
    """Row of the position table for each pair of a window's tokens: (window_size², window_size²), int64."""
    position = torch.arange(window_size, device="cpu")
    row, column = position.repeat_interleave(window_size), position.repeat(window_size)
    row_distance = row[:, None] - row[None, :] + window_size - 1
    column_distance = column[:, None] - column[None, :] + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance


def shifted_window_mask(
    height: int, width: int, window_size: int, shift: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Mask that keeps apart tokens which only the cyclic shift has brought into one window.

    Args:
        height, width: Size of the padded token grid.

    Returns:
        (windows, window_size², window_size²): 0 where two tokens may attend to each other, -inf elsewhere.
    """

    def region(size: int) -> torch.Tensor:
        # After the shift: whole windows, the uncut part of the last window, and what came round from the other side.
        position = torch.arange(size, device=device)
        return (position >= size - window_size).long() + (position >= size - shift).long()

    regions = region(height)[:, None] * 3 + region(width)[None, :]  # (height, width)
    regions = partition_windows(regions[None, :, :, None], window_size).squeeze(-1)  # (windows, window_size²)
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, float("-inf"))


class WindowGroup(NamedTuple):
    """Windows of a band that attend under the same mask and all have padding, or all have none."""

    mask: int  # row of `stage_shift_mask`
    rows: slice  # their tokens among the band's
    places: torch.Tensor | None  # of these tokens among the windows' (windows * window_size²,), None without padding
    sources: torch.Tensor | None  # the inverse: the token in each place, or their number where padding is


class WindowBand(NamedTuple):
    """Windows that attention takes at a time."""

    tokens: torch.Tensor  # rows of the grid (B * H * W, C), window by window, without padding
    groups: tuple[WindowGroup, ...]


@functools.lru_cache(maxsize=32)
def window_bands(
    batch_size: int, height: int, width: int, window_size: int, shift: int, windows_per_band: int
) -> tuple[WindowBand, ...]:
    """Where the tokens of windows are in a grid that is padded to whole windows and then moved cyclically by `shift`.

    All windows of all images, `windows_per_band` at a time.
    """
    num_tokens = batch_size * height * width
    missing_rows, missing_columns = (round_up(size, window_size) - size for size in (height, width))
    grid = torch.arange(num_tokens, device="cpu").view(batch_size, height, width)
    grid = F.pad(grid, (0, missing_columns, 0, missing_rows), value=num_tokens)  # stands for padding
    grid = torch.roll(grid, shifts=(-shift, -shift), dims=(1, 2))
    all_windows = partition_windows(grid[..., None], window_size).squeeze(-1)  # (B * windows, window_size²)
    has_padding = (all_windows == num_tokens).any(dim=1)
    mask = torch.zeros_like(grid[:, ::window_size, ::window_size])  # of each window
    if shift:
        mask[:, -1] += 2
        mask[:, :, -1] += 1
    all_kinds = 2 * mask.flatten() + has_padding  # windows of one kind make a group

    bands = []
    for windows, kinds in zip(all_windows.split(windows_per_band), all_kinds.split(windows_per_band), strict=True):
        groups, tokens, start = [], [], 0
        for value in kinds.unique().tolist():
            group = windows[kinds == value].flatten()
            places = sources = None
            if value % 2:
                places = (group < num_tokens).nonzero()[:, 0]
                sources = torch.full_like(group, len(places))
                sources[places] = torch.arange(len(places), device="cpu")
                group = group[places]
            groups.append(WindowGroup(value // 2, slice(start, start + len(group)), places, sources))
            tokens.append(group)
            start += len(group)
        bands.append(WindowBand(torch.cat(tokens), tuple(groups)))
    return tuple(bands)


def works_in_bands(config: BiRefNetConfig, hidden_states: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether attention goes through the map in bands of windows: the same numbers with less memory.

    Hooks of the modules that take part would see the bands.
    """
    if config._attn_implementation != "sdpa" or not is_plain_inference(hidden_states):
        return False
    return not have_hooks(*modules)


def works_in_kernel(config: BiRefNetConfig, hidden_states: torch.Tensor) -> bool:
    """Whether attention is one kernel that reads the windows' tokens from where they are in the map."""
    if config._attn_implementation != "sdpa" or not is_triton_inference(hidden_states):
        return False
    head_channels = (config.embed_dim * 2**stage // heads for stage, heads in enumerate(config.num_heads))
    return all(channels in (16, 32, 64, 128) for channels in head_channels)  # what blocks of the kernel can be


def stage_shift_mask(config: BiRefNetConfig, hidden_states: torch.Tensor, *modules: nn.Module) -> torch.Tensor | None:
    """The mask of all shifted blocks for a map (B, H, W, C); None where attention is a kernel, which needs none.

    (windows, tokens, tokens); or, where attention goes through bands, (2 * 2, 1, tokens, tokens) for windows that are not
    in the last row or are, and not in the last column or are.
    """
    if works_in_kernel(config, hidden_states):
        return None
    size, like = config.window_size, (hidden_states.dtype, hidden_states.device)
    if works_in_bands(config, hidden_states, *modules):
        return shifted_window_mask(2 * size, 2 * size, size, size // 2, *like)[:, None]
    height, width = (round_up(side, size) for side in hidden_states.shape[1:3])
    return shifted_window_mask(height, width, size, size // 2, *like)


class BiRefNetSwinAttention(nn.Module):
    """Window attention with a learned bias for each relative position."""

    def __init__(self, config: BiRefNetConfig, channels: int, num_heads: int):
        super().__init__()
        self.config = config
        self.window_size = config.window_size
        self.num_heads = num_heads
        self.scaling = (channels // num_heads) ** -0.5
        self.is_causal = False
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window_size - 1) ** 2, num_heads))
        # Not persistent: it follows from the window size. Released files carry it, see IGNORED_TENSORS.
        self.register_buffer("relative_position_index", relative_position_index(self.window_size), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def position_bias(self) -> torch.Tensor:
        """(1, heads, window_size², window_size²)."""
        num_tokens = self.window_size**2
        bias = self.relative_position_bias_table.t()[:, self.relative_position_index.view(-1)]
        return bias.view(1, self.num_heads, num_tokens, num_tokens)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shift: int,
        shift_mask: torch.Tensor | None,
        before: Callable[[torch.Tensor], torch.Tensor] | None = None,
        after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within windows of a token grid, which are moved cyclically by `shift` tokens.

        The grid is padded to a multiple of the window before the shift. Padded tokens take part unmasked with a value
        of zero before the qkv projection, as in the reference, so that their query, key and value are its bias: both
        projections run on real tokens only.

        Args:
            hidden_states: (B, H, W, C).
            shift: 0, or half a window.
            shift_mask: What `stage_shift_mask` returns, where `shift` is not 0.
            before: Computes the tokens that attend from those (..., C) of the grid, else they are its own.
            after: Computes the output from tokens of the grid and what attention gives for them, else it is the latter.

        Returns:
            (B, H, W, C) and, in eager attention, the weights (B * windows, heads, window_size², window_size²).
        """
        if works_in_kernel(self.config, hidden_states):
            qkv = self.qkv(hidden_states if before is None else before(hidden_states))
            padding, table = self.qkv_of_padding(hidden_states), self.relative_position_bias_table
            output = fused_window_attention(qkv, padding, table, self.num_heads, self.window_size, shift, self.scaling)
            output = self.proj(output)
            return output if after is None else after(hidden_states, output), None
        # By the mask where there is one: reentrant checkpointing turns autograd off after the mask was made.
        in_bands = shift_mask.ndim == 4 if shift else works_in_bands(self.config, hidden_states, self)
        if in_bands:
            return self.forward_in_bands(hidden_states, shift, shift_mask, before, after, **kwargs), None

        batch_size, height, width, channels = hidden_states.shape
        is_padded = not all(is_multiple(size, self.window_size) for size in (height, width))
        # (B, H, W, 3C)
        qkv = self.qkv(hidden_states) if before is None else linear_after(self.qkv, before, hidden_states)
        if is_padded:
            padded_height, padded_width = (round_up(size, self.window_size) for size in (height, width))
            padding = self.qkv_of_padding(hidden_states).to(qkv.dtype)
            qkv = torch.cat((qkv, padding.expand(batch_size, height, padded_width - width, -1)), dim=2)
            qkv = torch.cat((qkv, padding.expand(batch_size, padded_height - height, padded_width, -1)), dim=1)
        mask = self.position_bias().to(hidden_states.dtype)
        if shift:
            qkv = torch.roll(qkv, shifts=(-shift, -shift), dims=(1, 2))
            mask = (mask + shift_mask[:, None]).repeat(batch_size, 1, 1, 1)
            if is_free(height, width):
                # The mask's padded size has been rounded up by itself, which nobody knows to be the same number.
                rows, columns = (size // self.window_size for size in qkv.shape[1:3])
                torch._check(shift_mask.shape[0] == rows * columns)
        padded_size = qkv.shape[:3]
        output, weights = self.attend(partition_windows(qkv, self.window_size), mask, **kwargs)
        output = merge_windows(output, self.window_size, *padded_size)
        if shift:
            output = torch.roll(output, shifts=(shift, shift), dims=(1, 2))
        if is_padded:
            output = crop(output, height, width)
        output = self.proj(output)
        return output if after is None else after(hidden_states, output), weights

    def qkv_of_padding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(1, 3C), what `qkv` makes of zeros: its bias. Adapters and offloaded weights take effect when it is called."""
        if is_plain_linear(self.qkv):
            return self.qkv.bias[None]
        return self.qkv(hidden_states.new_zeros(1, hidden_states.shape[-1]))

    def forward_in_bands(
        self,
        hidden_states: torch.Tensor,
        shift: int,
        shift_mask: torch.Tensor | None,
        before: Callable[[torch.Tensor], torch.Tensor] | None,
        after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        **kwargs,
    ) -> torch.Tensor:
        """The output of `forward`, for some windows at a time, so that what lies between stays in the cache."""
        batch_size, height, width, channels = hidden_states.shape
        window_bytes = self.window_size**2 * 3 * channels * hidden_states.element_size()
        windows_per_band = max(1, BAND_BYTES // window_bytes)
        bands = window_bands(batch_size, height, width, self.window_size, shift, windows_per_band)
        masks = self.position_bias().to(hidden_states.dtype)
        if shift:
            masks = masks + shift_mask  # (4, heads, tokens, tokens)
        padding = None
        if height % self.window_size or width % self.window_size:
            padding = self.qkv_of_padding(hidden_states)
        grid = hidden_states.reshape(-1, channels)
        result = torch.empty_like(grid)
        for band in bands:
            tokens = grid.index_select(0, band.tokens)  # (tokens, C)
            qkv = linear(self.qkv, tokens if before is None else before(tokens))  # (tokens, 3C)
            outputs = []
            for mask, rows, places, sources in band.groups:
                windows = qkv[rows]
                if sources is not None:
                    windows = torch.cat((windows, padding)).index_select(0, sources)
                output, _ = self.attend(windows.unflatten(0, (-1, self.window_size**2)), masks[mask, None], **kwargs)
                output = output.flatten(0, 1)
                outputs.append(output if places is None else output.index_select(0, places))
            output = linear(self.proj, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
            output = output if after is None else after(tokens, output)
            result.index_copy_(0, band.tokens, output)
        return result.view(hidden_states.shape)

    def attend(self, qkv: torch.Tensor, mask: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each window.

        Args:
            qkv: (windows, window_size², 3C), those of all images.
            mask: Added to the scores; broadcastable to (windows, heads, window_size², window_size²).

        Returns:
            (windows, window_size², C), and weights as `forward`.
        """
        channels = qkv.shape[-1] // 3
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each (windows, heads, tokens, C / heads)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        return output.reshape(*output.shape[:2], channels), weights


class BiRefNetSwinMLP(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, hidden_states: torch.Tensor, before: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(B, H, W, C) → (B, H, W, C), of what `before` makes of them."""
        if self.training:
            return linear_after(self.fc2, F.gelu, linear_after(self.fc1, before, hidden_states))
        return linear(self.fc2, linear(self.fc1, before(hidden_states), activation="gelu"))


class BiRefNetDropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for whole samples."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return hidden_states
        keep = 1 - self.probability
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.dim() - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)


class BiRefNetSwinBlock(GradientCheckpointingLayer):
    """Window attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: BiRefNetConfig, channels: int, num_heads: int, shift: int, drop_path: float):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = BiRefNetSwinAttention(config, channels, num_heads)
        self.drop_path = BiRefNetDropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = BiRefNetSwinMLP(channels)

    def forward(self, hidden_states: torch.Tensor, shift_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        shift_mask = shift_mask if self.shift else None
        is_inference = not self.training and not self.drop_path.training
        in_bands = is_inference and works_in_bands(self.attn.config, hidden_states, *self.children())
        is_watched = have_hooks(self.norm1)
        attention, _ = self.attn(
            self.norm1(hidden_states) if is_watched else hidden_states,
            self.shift,
            shift_mask,
            # No module, which hooks of offloaded weights would move.
            before=None if is_watched else lambda tokens: self.norm1(tokens),
            after=self.add if in_bands else None,
            **kwargs,
        )
        return attention if in_bands else self.add(hidden_states, attention)

    def add(self, hidden_states: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The block's output from its input and what attention gave, token by token."""
        hidden_states = hidden_states + self.drop_path(attention)
        return hidden_states + self.drop_path(self.mlp(hidden_states, before=lambda tokens: self.norm2(tokens)))


class BiRefNetSwinPatchMerging(nn.Module):
    """Joins each 2×2 tokens into one of twice the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C); odd sides are padded with zeros."""
        batch_size, height, width, channels = hidden_states.shape
        if not (is_multiple(height, 2) and is_multiple(width, 2)):
            padded_height, padded_width = round_up(height, 2), round_up(width, 2)
            hidden_states = F.pad(hidden_states, (0, 0, 0, padded_width - width, 0, padded_height - height))
            height, width = padded_height, padded_width
        # Order of the neighbours (row, column): (0, 0), (1, 0), (0, 1), (1, 1).
        neighbours = hidden_states.reshape(batch_size, height // 2, 2, width // 2, 2, channels).permute(
            0, 1, 3, 4, 2, 5
        )
        return linear(self.reduction, self.norm(neighbours.flatten(3)))


class BiRefNetSwinStage(nn.Module):
    """Blocks of one resolution, every second one with shifted windows, and the merging into the next."""

    def __init__(self, config: BiRefNetConfig, stage: int, drop_path: list[float]):
        super().__init__()
        self.config = config
        shift = config.window_size // 2
        channels = config.embed_dim * 2**stage
        self.blocks = nn.ModuleList(
            BiRefNetSwinBlock(
                config, channels, config.num_heads[stage], shift=shift * (index % 2), drop_path=drop_path[index]
            )
            for index in range(config.depths[stage])
        )
        self.downsample = BiRefNetSwinPatchMerging(channels) if stage < 3 else None

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, H, W, C) → this stage's output (B, H, W, C) and the next one's input (B, ⌈H/2⌉, ⌈W/2⌉, 2C)."""
        parts = [part for block in self.blocks for part in block.children()]
        shift_mask = stage_shift_mask(self.config, hidden_states, *parts)
        for block in self.blocks:
            hidden_states = block(hidden_states, shift_mask, **kwargs)
        return hidden_states, None if self.downsample is None else self.downsample(hidden_states)


class BiRefNetSwinPatchEmbedding(nn.Module):
    """Cuts the image into 4×4 patches and projects each to a token."""

    patch_size = 4

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        self.proj = nn.Conv2d(
            config.num_channels, config.embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, ⌈H/4⌉, ⌈W/4⌉, C)."""
        _, _, height, width = pixel_values.shape
        if height % self.patch_size or width % self.patch_size:
            pixel_values = F.pad(pixel_values, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(pixel_values).permute(0, 2, 3, 1))


class BiRefNetSwinBackbone(nn.Module):
    """Image → four maps at strides 4, 8, 16, 32, each with a normalisation of its own."""

    def __init__(self, config: BiRefNetConfig):
        super().__init__()
        self.patch_embed = BiRefNetSwinPatchEmbedding(config)
        num_blocks = sum(config.depths)
        drop_path = [config.drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.layers.append(BiRefNetSwinStage(config, stage, [drop_path.pop(0) for _ in range(depth)]))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in config.backbone_channels)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        """(B, 3, H, W) → four maps (B, C_i, H/4.., W/4..), fine to coarse, channels last in memory."""
        hidden_states = self.patch_embed(pixel_values)
        feature_maps = []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            output, hidden_states = stage(hidden_states, **kwargs)
            feature_maps.append(norm(output).permute(0, 3, 1, 2))
        return feature_maps


__all__ = ["BiRefNetSwinBackbone"]
