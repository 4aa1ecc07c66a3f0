"""What the layers of a model hand to each other in one forward, and the rotary embedding that they share in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .room import Rooms


class Step:
    """One forward of the model.

    pending: the residual that the next layer has to add to its input; None where that input is the sum itself.
    last: the layer after which no sum may be pending; None where layers are watched, so that none ever is.
    rooms: of a decode step, where the layers put their keys and values. is_causal: as Rooms has it.
    """

    def __init__(self, last: torch.nn.Module | None, is_causal: bool) -> None:
        self.pending: Tensor | None = None
        self.last, self.rooms = last, Rooms(is_causal)
        self.rotations: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None

    def rotation_of(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """rotation(embeddings), computed once for all layers of a kind."""
        for known, turned in self.rotations:
            if known is embeddings:
                return turned
        self.rotations.append((embeddings, rotation(embeddings)))
        return self.rotations[-1][1]

    def bias_of(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask of booleans as what is added to scores: torch would make that anew in every layer."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self.mask is not mask:
            self.mask = mask
            self.bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self.bias


def rotation(embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(cos, sin) for `rotate`, [batch, tokens, 1, head_dim], from those of transformers, [batch, tokens, head_dim]."""
    cos, sin = embeddings
    half = sin.shape[-1] // 2
    return cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x cos + rotate_half(x) sin in place, with the very roundings of transformers: the sign that rotate_half gives to
    the first half is in `sin`. x: [batch, tokens, heads, head_dim], of which the first columns, as many as `sin` has,
    are turned."""
    if x.shape[-1] != sin.shape[-1]:
        x = x[..., : sin.shape[-1]]
    turned = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).add_(turned.mul_(sin))
