"""The cache of a Decoder: keys and values of fixed size and address, each sequence at a position of its own.

Row p of a sequence is its p-th token, padding has no row, and layers with a sliding window keep all rows as well: what
a token may attend to is the mask's business alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .rotary import RotaryRows


class Cursor:
    """Where the layers write in the present call, set by the Decoder.

    prompt: (sequences, columns, rows) of the tokens of a prompt, int64 [tokens] each; None where no column is padding.
    slots: int64 [batch, columns], during a prompt the row of each token, counted through all sequences; -1: padding.
    positions: int64 [batch], the row of each sequence's new token, on the device; None during a prompt. rows: how many
    rows of the cache a new token looks at, under the mask of the call. rotary: stands in for the model's. is_masked:
    whether a layer has asked for the rows, and so for the mask, since it was set to False. tokens: of a prompt without
    padding in front, how many columns are tokens; is_updated: whether a layer has called `update` for a prompt since
    it was set to False.
    """

    def __init__(self, rotary: RotaryRows) -> None:
        self.rotary, self.is_masked, self.is_updated = rotary, False, False
        self.prompt: tuple[Tensor, Tensor, Tensor] | None = None
        self.slots: Tensor | None = None
        self.positions: Tensor | None = None
        self.rows, self.tokens = 0, 0


class Rows(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer: [batch, heads, capacity, head_dim], in the dtype of the model."""

    def __init__(self, keys: Tensor, values: Tensor, cursor: Cursor, is_sliding: bool) -> None:
        super().__init__()
        self.keys, self.values, self.cursor, self.is_sliding = keys, values, cursor, is_sliding
        self.sequences = torch.arange(len(keys), device=keys.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new rows; returns those to attend to: of a prompt its own, of a token all up to cursor.rows."""
        pairs, cursor = ((self.keys, key_states), (self.values, value_states)), self.cursor
        if cursor.positions is not None:
            cursor.is_masked = True
            for cache, new in pairs:
                cache[self.sequences, :, cursor.positions] = new[:, :, 0]
            return self.keys[:, :, : cursor.rows], self.values[:, :, : cursor.rows]
        cursor.is_updated = True
        for cache, new in pairs:
            if cursor.prompt is None:
                cache[: len(new), :, : cursor.tokens] = new[:, :, : cursor.tokens]
            else:
                sequences, columns, rows = cursor.prompt
                cache[sequences, :, rows] = new[sequences, :, columns]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) for transformers' own mask of a prompt; new tokens bring theirs."""
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the Decoder brings the tensors."""


class DecoderCache(Cache):  # type: ignore[misc]
    """The layers of a Decoder's model, and the cursor of all of them."""

    def __init__(self, layers: list[Rows], cursor: Cursor) -> None:
        super().__init__(layers=layers)
        self.cursor = cursor


def new_cache(
    batch: int, capacity: int, heads: int, head_dim: int, sliding: list[bool], like: Tensor, cursor: Cursor
) -> DecoderCache:
    """A layer per entry of `sliding`, zeros in the dtype and on the device of `like`."""

    def zeros() -> Tensor:
        return torch.zeros(batch, heads, capacity, head_dim, dtype=like.dtype, device=like.device)

    return DecoderCache([Rows(zeros(), zeros(), cursor, is_sliding) for is_sliding in sliding], cursor)
