"""The end of a language model: the final norm and lm_head in one call, rms_norm_linear, for few tokens.

    hidden = decoder(...)                            without its norm
    logits = rms_norm_linear(hidden, norm, lm_head)  of the tokens whose logits are asked for

The forwards of both classes run as they are, on a stand-in for the module in which one part is another: in the decoder
the norm, which leaves its work to be done, and in the model around it lm_head, which does it. So whatever else these
forwards do stays as it is: scaled or capped logits, a loss, the class of the result.

The norm and lm_head are looked at in every call, as layer.py does with its own; where one of them is more than it was,
or where hidden states are asked for, the modules are called as in transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import _C as ops
from .code import Applied, Family, is_replaced, is_watched

END = "minivllm_end"  # the keyword argument in which an End goes from the language model to its decoder
HEAD_TOKENS = 64  # with more, the norm takes a small part of the head's time


class Instead:
    """A module, but for the parts that are given: what a forward of its class is called on."""

    def __init__(self, module: torch.nn.Module, **parts: Any) -> None:
        self.__dict__.update(parts)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Head:
    """A language model's end as `apply` found it. Lives on the model as `_minivllm`.

    can_norm: whether the final norm is one that the ops may stand in for, in a call on this tensor."""

    def __init__(self, model: Any, applied: Applied, can_norm: Callable[[Any, Tensor], bool]) -> None:
        self.applied, self.can_norm = applied, can_norm
        self.model, self.decoder, self.norm, self.lm_head = model, model.model, model.model.norm, model.lm_head
        self.forward = applied.family.causal.forward

    def is_usable(self) -> bool:
        """Whether the model still has its own code and these parts."""
        parts = self.model._modules
        return (
            type(self.model).forward is self.forward
            and parts.get("model") is self.decoder
            and parts.get("lm_head") is self.lm_head
            and self.decoder._modules.get("norm") is self.norm
            and not is_watched(self.decoder._forward_hooks)
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        )

    def may_join(self, x: Tensor) -> bool:
        """Whether norm and lm_head may be one call on hidden states like x."""
        norm, lm_head = self.norm, self.lm_head
        if type(lm_head) is not torch.nn.Linear or is_replaced(lm_head) or torch.is_autocast_enabled(x.device.type):
            return False
        if any((each._forward_hooks or each._forward_pre_hooks) for each in (norm, lm_head)):
            return False
        for parameter in lm_head._parameters.values():
            if parameter is not None and (
                type(parameter) is not torch.nn.Parameter or (parameter.dtype, parameter.device) != (x.dtype, x.device)
            ):
                return False
        return "weight" in lm_head._parameters and self.can_norm(norm, x)


class End:
    """One call of a language model: its decoder, the decoder's norm and lm_head, as the stand-ins have them."""

    def __init__(self, head: Head) -> None:
        self.head, self.is_open = head, False

    def decoder(self, *args: Any, **kwargs: Any) -> Any:
        return self.head.decoder(*args, **kwargs, **{END: self})

    def norm(self, x: Tensor) -> Any:
        self.is_open = self.head.may_join(x)
        return x if self.is_open else self.head.norm(x)

    def lm_head(self, x: Tensor) -> Any:
        norm, lm_head, applied = self.head.norm, self.head.lm_head, self.head.applied
        if not self.is_open:
            return lm_head(x)
        if x.shape[:-1].numel() > HEAD_TOKENS:
            return lm_head(norm(x))
        return ops.rms_norm_linear(
            x, norm.weight, lm_head.weight, bias=lm_head.bias, weight_layout="out_in", static_weights=True,
            **applied.family.norm_options(norm, applied.rounding))  # fmt: skip


@functools.cache
def causal_forward(family: Family) -> Callable[..., Any]:
    """The forward of a language model around a decoder of this family. It has the signature of the class's, at which
    transformers looks."""
    own = family.causal.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = type(self).forward
        head: Head = self._minivllm
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training or not head.is_usable():
            return call(self, *args, **kwargs)
        end = End(head)
        return call(Instead(self, model=end.decoder, lm_head=end.lm_head), *args, **kwargs)

    return forward
