"""Which models a Decoder serves, and what it has to know of one."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .code import FAMILIES
from .layer import FORWARDS
from .sharding import SummedLinear

SERVED = {family.model_type: family for family in FAMILIES.values()}
ATTENTIONS = ("sdpa", "eager")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose rows of earlier tokens change with the length


class Shape(NamedTuple):
    """What the decoder takes from a model. sliding: by layer. window: how many keys such a layer sees, or None."""

    weight: Tensor
    vocabulary: int
    heads: int
    head_dim: int
    sliding: list[bool]
    window: int | None
    by_layer: bool
    attention: str

    def as_mask(self, seen: Tensor) -> Tensor:
        """Booleans as the model's attention wants them: itself for sdpa, what is added to the scores for eager."""
        if self.attention == "sdpa":
            return seen
        lowest = torch.finfo(self.weight.dtype).min
        return torch.zeros_like(seen, dtype=self.weight.dtype).masked_fill(~seen, lowest)

    def pick(self, masks: dict[str, Tensor]) -> Any:
        """The masks as the model's forward takes them."""
        return masks if self.by_layer else masks["sliding_attention" if any(self.sliding) else "full_attention"]


def check_model(model: Any) -> Shape:
    """Its shape, or an error that names what cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Decoder: model is of type {type(model).__qualname__}, expected a model of transformers")
    name, config = type(model).__name__, model.config
    family = SERVED.get(config.model_type)
    if family is None or not name.endswith("ForCausalLM"):
        raise NotImplementedError(
            f"Decoder: {name} (model type {config.model_type}) is not served; served are the ForCausalLM models of "
            f"{', '.join(SERVED)}"
        )
    if not model._can_compile_fullgraph:
        raise NotImplementedError(f"Decoder: {name} does not support the static cache of transformers")
    if model.training:
        raise RuntimeError("Decoder: the model is in training mode: call model.eval()")
    if (attention := config._attn_implementation) not in ATTENTIONS:
        raise NotImplementedError(
            f"Decoder: attention {attention!r} is not served: load the model with attn_implementation='sdpa' or 'eager'"
        )
    ropes = getattr(config, "rope_parameters", None) or {}
    by_kind = [rope for rope in ropes.values() if isinstance(rope, dict)]  # of each kind of layer, or one for all
    if rope := next(
        (each["rope_type"] for each in by_kind or [ropes] if each.get("rope_type") in LENGTH_DEPENDENT), ""
    ):
        raise NotImplementedError(
            f"Decoder: RoPE of type {rope!r} is not served: its rows depend on the length of the text"
        )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or devices.pop().type not in ("cpu", "cuda"):
        raise NotImplementedError("Decoder: the model has to be on one device, the CPU or a CUDA GPU, as a whole")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise NotImplementedError("Decoder: accelerate moves parts of the model while it runs, which is not served")
    if getattr(config, "use_bidirectional_attention", False):
        raise NotImplementedError(f"Decoder: {name} attends in both directions, which is not served")
    window = getattr(config, "sliding_window", None) if family.traits.window else None
    kinds = getattr(config, "layer_types", None) if family.traits.by_layer else None
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"Decoder: layers of type {', '.join(sorted(unknown))} are not served")
    sliding = [kind == "sliding_attention" for kind in kinds]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        weight=model.get_output_embeddings().weight, vocabulary=model.get_output_embeddings().weight.shape[0],
        heads=config.num_key_value_heads, head_dim=head_dim, sliding=sliding, window=window if any(sliding) else None,
        by_layer=family.traits.by_layer, attention=attention)  # fmt: skip


class Places:
    """Where the weights of a model were: a quick look before a graph that reads them runs."""

    def __init__(self, model: Any) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._places = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]

    def hold(self) -> bool:
        """Whether the same tensors are still there. Others may have joined them."""
        return all((now := tensor()) is not None and now.data_ptr() == place for tensor, place in self._places)


class Facts(NamedTuple):
    """What a captured forward depends on. is_plain: no module has a hook, a forward that `apply` did not put there, or
    a sum over ranks: what Python code does in a forward is what a graph of it does."""

    facts: tuple[Any, ...]
    is_plain: bool


def fingerprint(model: Any) -> Facts:
    """Where the weights are, the classes of modules and their code, what stands in for it, hooks, the functions around
    it, and the process groups that sum over ranks."""
    attention, family, is_plain = model.config._attn_implementation, SERVED[model.config.model_type], True
    facts: list[Any] = [attention, ALL_ATTENTION_FUNCTIONS.get(attention), F.silu, F.scaled_dot_product_attention]
    facts += [getattr(family.module, "create_causal_mask", None), *family.functions()]
    modules, seen = [model], set()
    while modules:
        module = modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        modules.extend(each for each in own["_modules"].values() if each is not None)
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    facts += (tensor.data_ptr(), tensor.dtype)
        forward = own.get("forward")
        function = getattr(forward, "__func__", forward)
        facts += (type(module).forward, function, own["training"])
        if "_minivllm" in own:
            facts.append(getattr(own["_minivllm"], "number", None))
        if forward is not None and function not in FORWARDS:
            is_plain = False
        if own["_forward_pre_hooks"] or own["_forward_hooks"]:
            facts += (*own["_forward_pre_hooks"], *own["_forward_hooks"])
            is_plain = False
        if type(module) is SummedLinear:
            facts.append(module.process_group())
            is_plain = False
    return Facts(tuple(facts), is_plain)
