"""Swin Transformer v1 in its detection form, the backbone of all released BiRefNets (Liu et al., arXiv 2103.14030)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_birefnet import BiRefNetConfig
from .ops_birefnet import is_plain_inference


# Bytes of queries, keys and values that inference on a CPU holds at a time: small enough to stay in a cache.
BAND_BYTES = 8 * 2**20
# Tokens whose wide inner features an MLP holds at a time there. Matrix products of fewer rows are slower.
MLP_CHUNK_TOKENS = 4096


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


def round_up(size: int, divisor: int) -> int:
    """The next multiple of `divisor`. Written as a product, which symbolic shapes can see the divisibility of."""
    return (size + divisor - 1) // divisor * divisor


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


def insert(tensor: torch.Tensor, value: torch.Tensor, dim: int, index: int, count: int) -> torch.Tensor:
    """Inserts `count` copies of `value`, which is of size 1 in all but the last dimension, along `dim` at `index`."""
    if not count:
        return tensor
    shape = (*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])
    before, after = tensor.narrow(dim, 0, index), tensor.narrow(dim, index, tensor.shape[dim] - index)
    return torch.cat((before, value.expand(shape), after), dim=dim)


def remove(tensor: torch.Tensor, dim: int, index: int, count: int) -> torch.Tensor:
    """The inverse of `insert`."""
    if not count:
        return tensor
    after = index + count
    parts = (tensor.narrow(dim, 0, index), tensor.narrow(dim, after, tensor.shape[dim] - after))
    return torch.cat(parts, dim=dim)


def works_in_bands(config: BiRefNetConfig, hidden_states: torch.Tensor) -> bool:
    """Whether attention goes through the map in bands of windows: the same numbers with less memory."""
    return config._attn_implementation == "sdpa" and is_plain_inference(hidden_states)


def stage_shift_mask(config: BiRefNetConfig, hidden_states: torch.Tensor) -> torch.Tensor:
    """The mask of all shifted blocks for a map (B, H, W, C).

    (windows, tokens, tokens); or, where attention goes through bands, (2, 2, tokens, tokens) for windows that are not in
    the last row or are, and not in the last column or are.
    """
    size, like = config.window_size, (hidden_states.dtype, hidden_states.device)
    if works_in_bands(config, hidden_states):
        return shifted_window_mask(2 * size, 2 * size, size, size // 2, *like).unflatten(0, (2, 2))
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
        self, hidden_states: torch.Tensor, shift: int, shift_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within windows of a token grid, which are moved cyclically by `shift` tokens.

        The grid is padded to a multiple of the window before the shift. Padded tokens take part unmasked with a value
        of zero before the qkv projection, as in the reference, so that their query, key and value are its bias: both
        projections run on real tokens only.

        Args:
            hidden_states: (B, H, W, C).
            shift: 0, or half a window.
            shift_mask: What `stage_shift_mask` returns, where `shift` is not 0.

        Returns:
            (B, H, W, C) and, in eager attention, the weights (B * windows, heads, window_size², window_size²).
        """
        batch_size, real_height, real_width, channels = hidden_states.shape
        padded_height, padded_width = (round_up(size, self.window_size) for size in (real_height, real_width))
        if real_height < shift or real_width < shift:  # less than half a window: as well padded from the start
            missing = (0, 0, 0, padded_width - real_width, 0, padded_height - real_height)
            hidden_states = F.pad(hidden_states, missing)
        _, height, width, _ = hidden_states.shape
        missing_rows, missing_columns = padded_height - height, padded_width - width
        if shift:
            hidden_states = torch.roll(hidden_states, shifts=(-shift, -shift), dims=(1, 2))
        # Where the padding is after the shift: before the tokens that came round from the other side.
        cut_row, cut_column = height - shift, width - shift
        padding = None
        if missing_rows or missing_columns:
            # The bias, asked of the module because adapters and offloaded weights take effect when it is called.
            padding = self.qkv(hidden_states.new_zeros(1, 1, 1, channels))

        bias = self.position_bias().to(hidden_states.dtype)
        # By the mask where there is one: reentrant checkpointing turns autograd off after the mask was made.
        in_bands = shift_mask.ndim == 4 if shift else works_in_bands(self.config, hidden_states)
        band_height = padded_height
        if in_bands:
            window_row_bytes = (
                batch_size * self.window_size * padded_width * 3 * channels * hidden_states.element_size()
            )
            band_height = min(padded_height, self.window_size * max(1, BAND_BYTES // window_row_bytes))
            if shift:
                shift_mask = bias + shift_mask[:, :, None]  # (2, 2, heads, tokens, tokens)

        outputs, weights = [], None
        for start in range(0, padded_height, band_height):
            stop = min(start + band_height, padded_height)
            first, last = (row - min(max(row - cut_row, 0), missing_rows) for row in (start, stop))
            missing = ((1, max(cut_row - start, 0), stop - start - (last - first)), (2, cut_column, missing_columns))
            qkv = self.qkv(hidden_states[:, first:last])  # (B, rows, W, 3C)
            for place in missing:
                qkv = insert(qkv, padding, *place)
            if not in_bands:
                mask = bias
                if shift:
                    mask = (bias + shift_mask[:, None]).repeat(batch_size, 1, 1, 1)
                output, weights = self.attend(qkv, mask, **kwargs)
            elif not shift:
                output, _ = self.attend(qkv, bias, **kwargs)
            else:
                output = self.attend_shifted(qkv, shift_mask, is_last=stop == padded_height, **kwargs)
            for place in reversed(missing):
                output = remove(output, *place)
            outputs.append(self.proj(output))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if shift:
            output = torch.roll(output, shifts=(shift, shift), dims=(1, 2))
        return output[:, :real_height, :real_width], weights

    def attend(self, qkv: torch.Tensor, mask: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each window of a grid.

        Args:
            qkv: (B, H, W, 3C), both sides multiples of the window.
            mask: Added to the scores; broadcastable to (B * windows, heads, tokens, tokens).

        Returns:
            (B, H, W, C), and weights as `forward`.
        """
        batch_size, height, width, channels = qkv.shape
        channels = channels // 3
        qkv = partition_windows(qkv, self.window_size)  # (B * windows, tokens, 3C)
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each (B * windows, heads, tokens, C / heads)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        output = output.reshape(*output.shape[:2], channels)  # (B * windows, tokens, C)
        return merge_windows(output, self.window_size, batch_size, height, width), weights

    def attend_shifted(self, qkv: torch.Tensor, masks: torch.Tensor, is_last: bool, **kwargs) -> torch.Tensor:
        """`attend` with a mask for those windows only that hold tokens from two sides: the last ones.

        Args:
            qkv: (B, H, W, 3C).
            masks: (2, 2, heads, tokens, tokens) for windows of another row or the last one, and column likewise.
            is_last: Whether these rows of windows are the last ones.
        """
        batch_size, height, width, channels = qkv.shape
        last_row = height - self.window_size if is_last else height
        last_column = width - self.window_size
        output = qkv.new_empty(batch_size, height, width, channels // 3)
        for row_kind, rows in enumerate((slice(0, last_row), slice(last_row, height))):
            for column_kind, columns in enumerate((slice(0, last_column), slice(last_column, width))):
                region = qkv[:, rows, columns]
                if region.numel():
                    output[:, rows, columns], _ = self.attend(region, masks[row_kind, column_kind][None], **kwargs)
        return output


class BiRefNetSwinMLP(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        # In this order, since `numel` would fix symbolic sizes while the network is exported.
        if is_plain_inference(hidden_states) and hidden_states.shape[:-1].numel() > MLP_CHUNK_TOKENS:
            chunks = hidden_states.flatten(0, 2).split(MLP_CHUNK_TOKENS)
            return torch.cat([self.fc2(F.gelu(self.fc1(chunk))) for chunk in chunks]).view(hidden_states.shape)
        return self.fc2(F.gelu(self.fc1(hidden_states)))


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
        attention, _ = self.attn(self.norm1(hidden_states), self.shift, shift_mask if self.shift else None, **kwargs)
        hidden_states = hidden_states + self.drop_path(attention)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


class BiRefNetSwinPatchMerging(nn.Module):
    """Joins each 2×2 tokens into one of twice the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C); odd sides are padded with zeros."""
        _, height, width, _ = hidden_states.shape
        if height % 2 or width % 2:
            hidden_states = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        # Order of the neighbours (row, column): (0, 0), (1, 0), (0, 1), (1, 1).
        neighbours = [hidden_states[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


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
        shift_mask = stage_shift_mask(self.config, hidden_states)
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
