"""The rows of a model's rotary embedding at all positions of a Decoder, computed once: a step only looks them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .code import is_replaced


class RotaryRows:
    """Stands in for the rotary embedding of a model while its Decoder takes steps.

    length: positions from 0 on. The tables are made at the first call, by the module itself, and stay where they are,
    so that a captured graph can read them; `refresh` makes them anew in place if the module's buffers have changed.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._module: Any = None
        self._made_from: list[tuple[int, int]] = []
        self._tables: dict[tuple[torch.dtype, str | None], Tensor] = {}  # [length, 2, columns]: cos and sin

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def instead_of(self, module: Any, home: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The look-up; the module itself where that is not the code of transformers' file `home`, or has a hook."""
        is_hooked = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
        if type(module).__module__ != home or is_replaced(module) or is_hooked:
            return module  # type: ignore[no-any-return]
        if self._module is not module:
            self._module, self._made_from, self._tables = module, self._state(module), {}
        return self._look_up

    def refresh(self) -> None:
        """To be called before a text begins."""
        if self._module is None or self._made_from == self._state(self._module):
            return
        self._made_from = self._state(self._module)
        for (dtype, kind), table in self._tables.items():
            table.copy_(self._rows(table.device, dtype, kind))

    def _look_up(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, tokens, columns] in x's dtype, as the module gives them."""
        table = self._tables.get((x.dtype, layer_type))
        if table is None:
            table = self._tables[x.dtype, layer_type] = self._rows(x.device, x.dtype, layer_type)
        rows = table.index_select(0, position_ids.reshape(-1)).view(*position_ids.shape, *table.shape[1:])
        return rows[..., 0, :], rows[..., 1, :]

    def _rows(self, device: torch.device, dtype: torch.dtype, layer_type: str | None) -> Tensor:
        kind = () if layer_type is None else (layer_type,)
        with torch.inference_mode(False), torch.no_grad():  # so that they can be written later
            positions = torch.arange(self.length, device=device)[None]
            return torch.stack(self._module(torch.empty(0, dtype=dtype, device=device), positions, *kind), 2)[0]

    @staticmethod
    def _state(module: torch.nn.Module) -> list[tuple[int, int]]:
        """Where the buffers are, and how often they were written. Inference tensors do not count that."""
        return [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in module.buffers()]
