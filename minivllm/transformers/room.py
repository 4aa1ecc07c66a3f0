"""Room for one more token in the caches of transformers, where decode_attention puts its key and value.

A StaticLayer is taken as it is: its counter on the device is the row of the new token, and advances where the step
ends. The keys and values of a DynamicLayer become the first rows of larger tensors, so that a step appends a row where
transformers copies all of them. Whoever looks at `keys` and `values` sees the rows that transformers would have there.
Tensors that somebody else put there, as crop and reorder_cache do, are copied into larger ones first: their rows are
never written, and neither are those of an older view.

The mask of transformers is what decides who attends to what. decode_attention knows one run of rows that ends with the
new token; of any other mask, and of any other layer of a cache, the attention is left to transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache import DecoderCache, Rows

GROWTH = 256  # rows by which the tensors of a DynamicLayer grow
CACHES = (Cache, DynamicCache, StaticCache, DecoderCache)
UPDATES = tuple((kind, kind.update) for kind in (Cache, DynamicLayer, StaticLayer))
NO_TEXT = ""  # the cache is empty: a prompt, even if it is one token long


class Room(NamedTuple):
    """keys, values: [batch, heads, rows, head_dim]. positions: the row of each sequence's new token, or of all, on the
    device. starts: the first row that each sequence attends to; None: row 0. window: how many rows it does, or None.
    is_decoders: in the cache of a Decoder."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    starts: Tensor | None = None
    window: int | None = None
    is_decoders: bool = False


class Rooms:
    """What the layers of one forward have in common. is_causal: the caller gave no mask, so each layer has the causal
    one, or that of its window."""

    def __init__(self, is_causal: bool) -> None:
        self.is_causal = is_causal
        self.cache: Any = None
        self.why: str | None = None
        self.is_captured = False
        self.positions: dict[int, Tensor] = {}
        self.masks: list[tuple[Tensor, Tensor | None]] = []
        self.counters: list[Tensor] = []

    def room_for(self, cache: Any, index: int, k: Tensor, mask: Tensor | None, window: int | None) -> Room | str:
        """Of one layer, for a key [batch, 1, heads, head_dim]; or why there is none. Where there is, the cache has the
        new row from now on, but for the counters of static layers, which advance in `finish`."""
        if cache is not self.cache:
            self.cache, self.why = cache, why_not_cache(cache)
            self.is_captured = k.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.why:
            return self.why
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or layer.keys is None or not layer.keys.numel():
            return NO_TEXT
        kind, keys, values = type(layer), layer.keys, layer.values
        if kind is Rows:
            positions = layer.cursor.positions
            return NO_TEXT if positions is None else Room(keys, values, positions, None, window, True)
        if kind is not DynamicLayer and kind is not StaticLayer:
            return f"its cache is a {kind.__qualname__}"
        batch, _, heads, head_dim = k.shape
        rows = keys.shape[2]
        shape = (batch, heads, rows, head_dim)
        if "update" in layer.__dict__ or not all(is_plain(x, shape, k) for x in (keys, values)):
            return "its cache is not what a layer of transformers makes"
        starts = None
        if kind is DynamicLayer:
            if self.is_captured:
                return "its cache grows, and a graph is captured"
            if rows not in self.positions:
                self.positions[rows] = torch.full((), rows, device=k.device)
            position, rows = self.positions[rows], rows + 1
            is_known = mask is None
        else:
            position = layer.__dict__.get("cumulative_length")
            if not isinstance(position, Tensor) or not keys.is_contiguous() or not values.is_contiguous():
                return "its cache is not what a layer of transformers makes"
            if not position.is_cuda and int(position) >= rows:
                return "its cache is full"
            is_known = self.is_causal and window is None and mask is not None
        if not is_known:
            if self.is_captured:
                return "a mask was given, and a graph is captured"
            starts = self.starts_of(mask, position, (batch, 1, 1, rows))
            if starts is None:
                return "its mask is not one run of tokens that ends with the newest"
        if kind is DynamicLayer:
            keys, values = append(layer)
        else:
            self.counters.append(position)
        return Room(keys, values, position, starts)

    def starts_of(self, mask: Tensor | None, position: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """first_rows of a mask, looked at once for all layers that have it."""
        if mask is None or mask.shape != shape:
            return None
        for known, starts in self.masks:
            if known is mask:
                return starts
        self.masks.append((mask, first_rows(mask, position)))
        return self.masks[-1][1]

    def finish(self) -> None:
        """The end of the step."""
        if self.counters:
            torch._foreach_add_(self.counters, 1)
            self.counters = []


class Spare:
    """The tensors whose first rows are the keys and values of a DynamicLayer. Lives on the layer as `_minivllm`.

    keys, values: what the layer had after the last step, by which it is known whether it has them still."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        rows = keys.shape[2]
        self.capacity = (rows // GROWTH + 1) * GROWTH
        self.all_keys, self.all_values = (self._larger(x, rows) for x in (keys, values))
        self.keys, self.values = keys, values

    def _larger(self, x: Tensor, rows: int) -> Tensor:
        larger = x.new_empty(*x.shape[:2], self.capacity, x.shape[3])
        larger[:, :, :rows] = x
        return larger

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing that belongs to a copy of the layer, or that comes out of a pickle."""
        return type(None), ()


def why_not_cache(cache: Any) -> str | None:
    """Why the layers of a cache are left to transformers, whatever they are."""
    if type(cache) not in CACHES or "update" in cache.__dict__:
        return f"the cache is a {type(cache).__qualname__} with an update of its own"
    if cache.offloading:
        return "the cache is offloaded"
    if any(kind.update is not own for kind, own in UPDATES):
        return "the update of a class of caches was replaced"
    return None


def is_plain(x: Any, shape: tuple[int, ...], like: Tensor) -> bool:
    return type(x) is Tensor and x.shape == shape and x.dtype == like.dtype and x.device == like.device


def first_rows(mask: Tensor, position: Tensor) -> Tensor | None:
    """The first row that each sequence attends to, int64 [batch], of a mask [batch, 1, 1, rows] of booleans or of
    what is added to scores; None where it does not attend to all rows from there to `position` and to none behind.
    Waits for the device."""
    mask = mask[:, 0, 0]
    seen = mask if mask.dtype == torch.bool else mask == 0
    rows = torch.arange(mask.shape[1], device=mask.device)
    starts: Tensor = position + 1 - seen.sum(-1)
    expected = (rows >= starts[:, None]) & (rows <= position)
    right = seen == expected
    if mask.dtype != torch.bool:
        right &= seen | (mask <= torch.finfo(mask.dtype).min)
    return starts if bool(right.all() & seen.any(-1).all()) else None


def append(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """The larger keys and values of a layer, which has one row more from now on: to be written."""
    keys, values, spare = layer.keys, layer.values, layer.__dict__.get("_minivllm")
    rows = keys.shape[2] + 1
    if spare is None or spare.keys is not keys or spare.values is not values or rows > spare.capacity:
        spare = layer._minivllm = Spare(keys, values)
    layer.keys = spare.keys = spare.all_keys.narrow(2, 0, rows)
    layer.values = spare.values = spare.all_values.narrow(2, 0, rows)
    return spare.all_keys, spare.all_values


def release(cache: Any, index: int) -> None:
    """Lets go of the larger tensors of a layer to which transformers is about to append."""
    layers = getattr(cache, "layers", ())
    if index < len(layers):
        layers[index].__dict__.pop("_minivllm", None)
