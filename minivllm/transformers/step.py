"""What the layers of a model hand to each other in one forward."""

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
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None

    def bias_of(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask of booleans as what is added to scores: torch would make that anew in every layer."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self.mask is not mask:
            self.mask = mask
            self.bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self.bias
