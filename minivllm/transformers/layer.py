"""Decoder layers of transformers on the fused ops; minivllm.transformers puts them in place.

These functions stand in for `forward` of a model, of its layers and of its final norm. What a layer computes:

    q, k, v, total = rms_norm_qkv(hidden, residual=pending)     norm, projection, and the sum the layer before left open
    q, k           = qk_norm_rope(q, k)                         norms of heads and rotary embedding, in place
    attention                                                   as in transformers, which has the cache
    hidden         = o_proj and MLP, by rest.py                 and nothing is pending, but for a model that is sharded

In a decode step the attention is decode_attention, in place of the last two of these, where room.py finds room for it
in the cache. Where the rest of a layer is not what rest.py takes it for, and for more tokens than norm and projection
are fused for:

    o_proj                                                      as in transformers
    y, total       = add_rms_norm(o_proj's, total)              in place
    hidden         = mlp(y)                                     and total stays pending for the next layer

Where norms stand behind attention and MLP as well (Gemma), norm_add joins their results to the residual, and nothing is
pending. What else the families differ in is in code.py. What one rank of a sharded model has, and where the ranks add,
is in sharding.py. head.py has the final norm with the language model's head.

Every module that is skipped by this is looked at again in each call, so that an adapter, a hook or a quantised weight
that arrives later is not passed over: the layer then runs the code of its class, and its report says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _C as ops
from .cache import DecoderCache
from .code import (
    ALIVE,
    FAMILIES,
    Applied,
    Family,
    Numbered,
    Rounding,
    is_fused,
    is_intercepted,
    is_replaced,
    is_watched,
)
from .head import END, End, Instead, causal_forward
from .rest import LINEARS, Rest, attend, finish, is_known_attention
from .room import Room, Rooms, release
from .step import Step

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEP = "minivllm_step"  # the keyword argument in which a Step goes from the model to its layers
LONE_HEADS = 64  # fewer heads of keys than this, each on one SM, take longer than copying them does once it is compiled
STATIC_WEIGHTS = True  # `apply` vouches for it: no unfinished work in front of a call writes the weights of the model
GRADIENTS = "gradient mode is on: call it under torch.no_grad() or torch.inference_mode()"
INTERCEPTED = "a TorchFunctionMode is active"


def named_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Called as the attribute is, so that a pickled model comes back with the forward of its class."""
    function.__name__ = "forward"
    return function


def traced_norm(family: Family, norm: Any, x: Tensor, rounding: Rounding) -> Tensor:
    """A norm under torch.compile: in operations of torch, which the compiler fuses with their surroundings."""
    if rounding == "hf":
        return cast(Tensor, type(norm).forward(norm, x))
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + getattr(norm, family.traits.eps))
    return cast(Tensor, (y * (family.traits.weight_offset + norm.weight.float())).to(x.dtype))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_now(number: int) -> str:
    """`why_not_now` of a FusedLayer or an Applied, by its number, for a call that is traced. A constant: all that it
    looks at would be looked at again in every compiled call."""
    return ALIVE[number].why_not_now({}) or ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced_limit(number: int) -> int | None:
    """How many tokens the FusedLayer with this number takes in a call that is traced."""
    return cast(FusedLayer, ALIVE[number]).limits_now()[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def note(number: int, why: str) -> None:
    """`note` of the FusedLayer with this number, for a call that is traced."""
    cast(FusedLayer, ALIVE[number]).note(why)


def heads_of(attention: Any, projections: tuple[Any, ...]) -> tuple[int, int]:
    """How many heads q has, and k and v each: as many as the projections give, or packed ones by the configuration."""
    if len(projections) == 1:
        return attention.config.num_attention_heads, attention.config.num_key_value_heads
    q_proj, k_proj, _ = (linear.out_features // attention.head_dim for linear in projections)
    return q_proj, k_proj


class FusedLayer(Numbered):
    """A decoder layer's parts, and whether a call may use them. Lives on the layer as `_minivllm`.

    packed: the q, k and v weights in one matrix, of which the Parameters are views, or None. limits: of the weight of
    q_proj, how many tokens a call may have that takes the ops with weights, eagerly and under torch.compile, None: any
    number. With more it takes norms and torch's linears, or under torch.compile the code of the layer's class.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        packed: Tensor | None,
        limits: Callable[[Tensor], tuple[int | None, int | None]],
        applied: Applied,
    ) -> None:
        attention, traits = layer.self_attn, applied.family.traits
        self.name, self.packed, self.applied, self.rounding = name, packed, applied, applied.rounding
        self.limits = limits
        self.known_limits: tuple[Any, Any, tuple[int | None, int | None]] = (None, None, (None, None))
        self.layer, self.attention, self.o_proj, self.mlp = layer, attention, attention.o_proj, layer.mlp
        self.norms = tuple(getattr(layer, norm) for norm in traits.norms)
        self.projections = tuple(getattr(attention, name) for name in traits.projections)
        self.head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self.dropouts = tuple(getattr(layer, name) for name in traits.dropouts)
        self.skipped = (*self.norms, attention, *self.projections, *self.head_norms, *self.dropouts)
        self.parts, self.types = self._parts(), tuple(map(type, self.skipped))
        self.hooks = [hooks for module in self.skipped for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self.family, self.rest = applied.family, Rest(layer, applied.family)
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads = heads_of(attention, self.projections)
        self.enter()

    def _parts(self) -> tuple[Any, ...]:
        return (*self.layer._modules.values(), *self.attention._modules.values())

    def why_not(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call has to run the code of the layer's class; None if it need not."""
        if torch.is_grad_enabled():
            return GRADIENTS
        if args:
            return "it was called with more than one positional argument"
        if self._parts() != self.parts:
            return "one of its modules was replaced: apply again"
        if torch.compiler.is_compiling():
            why = why_not_now(self.number) or (kwargs.get("output_attentions") and "attentions are recorded")
        else:
            why = self.why_not_now(kwargs)
        if why:
            return why
        if is_intercepted():
            return INTERCEPTED
        weight = self.projections[0].weight
        if x.dtype != weight.dtype or x.dtype not in DTYPES or type(weight) is not torch.nn.Parameter:
            return f"hidden states are {x.dtype}, the weight of q_proj is a {type(weight).__name__} of {weight.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        return None

    def why_not_now(self, kwargs: dict[str, Any]) -> str | None:
        """The same of the modules and of the code around them, as they are now."""
        if self.layer.training or self.attention.training or any(each.training for each in self.dropouts):
            return "it is in training mode: call model.eval()"
        if why := self.applied.why_not_now(kwargs):
            return why
        if tuple(map(type, self.skipped)) != self.types:
            return "one of its modules changed its class: apply again"
        if any(self.hooks) and (why := self._why_hooked(kwargs)):
            return why
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return "a hook on all modules is registered"
        if any("forward" in module.__dict__ for module in self.skipped) and any(map(is_replaced, self.skipped)):
            return "the forward of one of its modules was replaced"
        return None

    def _why_hooked(self, kwargs: dict[str, Any]) -> str | None:
        for module in self.skipped:
            if module._forward_pre_hooks or is_watched(module._forward_hooks):
                return f"a {type(module).__name__} of it has a hook"
        return "attentions are recorded" if kwargs.get("output_attentions") else None

    def note(self, why: str) -> None:
        """A call has run the code of the layer's class."""
        self.applied.fallbacks[self.name] = why
        if why == GRADIENTS and not self.layer.training:
            self.applied.warn_once(
                f"{self.name} and the layers around it run the code of their classes, because {why}. That is one "
                "warning for all calls of this model; its report says what each layer does"
            )

    def is_fused_for(self, x: Tensor) -> bool:
        """Whether norm and projection of so many tokens are one call."""
        limit = traced_limit(self.number) if torch.compiler.is_compiling() else self.limits_now()[0]
        return limit is None or x.shape[0] * x.shape[1] <= limit

    def limits_now(self) -> tuple[int | None, int | None]:
        """`limits` where the model is now."""
        weight = self.projections[0].weight
        if self.known_limits[:2] != (weight.device, weight.dtype):
            self.known_limits = weight.device, weight.dtype, self.limits(weight)
        return self.known_limits[2]

    def norm_options(self, norm: Any) -> dict[str, Any]:
        return self.family.norm_options(norm, self.rounding)

    def norm_qkv(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, total): q, k, v as [batch, tokens, heads, head_dim], views of one packed buffer."""
        weight: Any = tuple(linear.weight for linear in self.projections)
        bias: Any = tuple(linear.bias for linear in self.projections)
        if len(weight) == 1:
            weight, bias = weight[0], bias[0]
        elif bias[0] is None:
            bias = None
        parts: Any = ops.rms_norm_qkv(
            x, self.norms[0].weight, weight, self.heads, self.kv_heads, bias=bias, residual=cast(Any, residual),
            head_dim=self.head_dim, weight_layout="out_in", static_weights=STATIC_WEIGHTS,
            **self.norm_options(self.norms[0]))  # fmt: skip
        return (*parts, x) if residual is None else parts

    def norm_then_qkv(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same by the norm and torch's linear: where the weights are packed one, else three with a buffer each."""
        norm = self.norms[0]
        if residual is None:
            y, total = ops.rms_norm(x, norm.weight, **self.norm_options(norm)), x
        else:
            y, total = self.add_norm(norm, x, residual, residual_out=residual)
        lead, counts = x.shape[:-1], (self.heads, self.kv_heads, self.kv_heads)
        if len(self.projections) == 1 or (self.packed is not None and self.is_packed()):
            biases = [linear.bias for linear in self.projections]
            matrix = self.packed if len(self.projections) > 1 else self.projections[0].weight
            packed = F.linear(y, cast(Tensor, matrix), None if biases[0] is None else torch.cat(biases))
            q, k, v = packed.view(*lead, -1, self.head_dim).split_with_sizes(counts, -2)
        else:
            q, k, v = (F.linear(y, w.weight, w.bias).view(*lead, -1, self.head_dim) for w in self.projections)
        return q, k, v, total

    def add_norm(self, norm: Any, x: Tensor, residual: Tensor, **out: Any) -> tuple[Tensor, Tensor]:
        """(the norm of x + residual, that sum)"""
        return ops.add_rms_norm(x, residual, norm.weight, **self.norm_options(norm), **out)

    def norm_add(self, norm: Any, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the norm of x"""
        total: Tensor = ops.norm_add(x, norm.weight, residual, **self.norm_options(norm))
        return total

    def turns(self) -> bool:
        """Whether q and k get a rotary embedding."""
        return not self.family.traits.may_lack_rope or bool(self.attention.use_rope)

    def is_packed(self) -> bool:
        """Whether the Parameters still are views of the packed matrix; moving the model takes them out of it."""
        if self.packed is None:
            return False
        address, itemsize = self.packed.data_ptr(), self.packed.element_size()
        for linear in self.projections:
            if linear.weight.data_ptr() != address or linear.weight.dtype != self.packed.dtype:
                self.packed = None
                return False
            address += linear.weight.numel() * itemsize
        return True

    def norm_and_turn(self, q: Tensor, k: Tensor, v: Tensor, embeddings: tuple[Tensor, Tensor], cache: Any) -> Any:
        """The norms of heads and the rotary embedding, in place. Of a Decoder's prompt k and v go to its cache as well.
        Returns the cache in which the attention still has to put them, if any."""
        turns = self.turns()
        slots = cache.cursor.slots if isinstance(cache, DecoderCache) else None
        if not turns and not self.head_norms and slots is None:
            return cache
        cos, sin = embeddings if turns else (None, None)
        options = self.family.head_options(self.head_norms, self.rounding)
        if slots is not None:
            rows = cache.layers[self.attention.layer_idx]
            options |= {"v": v, "key_cache": rows.keys, "value_cache": rows.values, "slots": slots}
            cache = None
        ops.qk_norm_rope(q, k, cos, sin, out_q=q, out_k=k, **options)
        return cache

    def is_causal(self, step: Step | None, tokens: int) -> bool:
        """Whether each token of a prompt attends to all tokens up to itself, which SDPA does without a mask, and
        faster. transformers makes one all the same where a graph is captured."""
        if step is None or not step.rooms.is_causal or self.attention.config._attn_implementation != "sdpa":
            return False
        window = self.family.window(self.attention)
        return window is None or tokens <= window

    def room_for(self, k: Tensor, rooms: Rooms, mask: Tensor | None, cache: Any) -> Room | None:
        """Where decode_attention puts the key and value of one more token, and attends; None where transformers has to,
        for a reason that the report names."""
        attention = self.attention
        room: Room | str = "the attention of transformers was replaced, or is not sdpa or eager"
        if is_known_attention(attention, self.family):
            room = rooms.room_for(cache, attention.layer_idx, k, mask, self.family.window(attention))
        if not isinstance(room, str):
            return room
        if room:
            self.applied.attentions[self.name] = room
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step | None,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The attention of transformers, from [batch, tokens, heads, head_dim] to [batch, tokens, heads * head_dim]."""
        attention = self.attention
        batch, tokens, heads, head_dim = q.shape
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        position = kwargs.pop("cache_position", None)  # early versions of transformers 5 hand it to the cache
        if cache is not None:
            positions = () if position is None else ({"cache_position": position},)
            k, v = cache.update(k, v, attention.layer_idx, *positions)
        name, module = attention.config._attn_implementation, self.applied.family.module
        interface: Any = module.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        few = torch.compiler.is_compiling() and batch * self.kv_heads < LONE_HEADS
        if tokens == 1 and not few and interface is sdpa_attention_forward and (mask is None or mask.shape[1] == 1):
            # One query per head: the query heads that share keys become the queries of one head. transformers would
            # instead copy the keys and values of the whole cache, once per query head.
            q = q.view(batch, self.kv_heads, heads // self.kv_heads, head_dim)
            if step is not None:
                mask = step.bias_of(mask, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling)
        else:
            traits, q = self.family.traits, q.transpose(1, 2)
            more: dict[str, Any] = {"sliding_window": self.family.window(attention)} if traits.window else {}
            more |= {"softcap": self.family.soft_cap(attention)} if traits.soft_cap else {}
            out, _ = interface(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling, **more, **kwargs)
        return out.reshape(batch, tokens, heads * head_dim)


@named_forward
def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder layer: [batch, tokens, hidden] to the same. In a Step the result may lack the residual."""
    fused: FusedLayer = self._minivllm
    step: Step | None = kwargs.pop(STEP, None)
    pending = None if step is None else step.pending
    traced = torch.compiler.is_compiling()
    why = fused.why_not(hidden_states, args, kwargs)
    if why is not None or (traced and not fused.is_fused_for(hidden_states)):
        if why is not None and traced:
            note(fused.number, why)
        elif why is not None:
            fused.note(why)
        if step is not None and pending is not None:
            hidden_states, step.pending = pending + hidden_states, None
        return type(self).forward(self, hidden_states, *args, **kwargs)
    mask, cache = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
    embeddings = kwargs.pop("position_embeddings")
    run: Any = traced_layer if traced else eager_layer
    hidden_states, total = run(fused, hidden_states, pending, step, mask, cache, embeddings, kwargs)
    if step is not None:
        step.pending = total if step.last is not None and step.last is not self else None
        if step.pending is not None:
            return hidden_states
    return hidden_states if total is None else total + hidden_states


def eager_layer(
    fused: FusedLayer,
    x: Tensor,
    pending: Tensor | None,
    step: Step | None,
    mask: Tensor | None,
    cache: Any,
    embeddings: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """(the MLP's output, the residual that belongs to it; None: it is in it). Writes to its own buffers wherever
    it can: on a GPU the host is what an eager step waits for, and every allocation is as long as a launch."""
    is_fused = fused.is_fused_for(x)
    has_rest = is_fused and fused.rest.is_usable(x.dtype)
    q, k, v, total = fused.norm_qkv(x, pending) if is_fused else fused.norm_then_qkv(x, pending)
    rooms, room = Rooms(is_causal=False) if step is None else step.rooms, None
    if has_rest and x.shape[1] == 1 and cache is not None:
        room = fused.room_for(k, rooms, mask, cache)
    if room is not None:
        out = attend(
            fused.attention, fused.family, fused.head_norms, room, (q, k, v),
            embeddings if fused.turns() else (None, None), fused.rounding, static_weights=STATIC_WEIGHTS)  # fmt: skip
        if step is None:
            rooms.finish()
    else:
        given, cache = cache, fused.norm_and_turn(q, k, v, embeddings, cache)
        if cache is not given and fused.is_causal(step, x.shape[1]):
            mask = None
        release(cache, fused.attention.layer_idx)
        out = fused.attend(q, k, v, step, mask, cache, kwargs)
    if has_rest:
        return finish(fused.rest, out, total, fused.rounding, static_weights=STATIC_WEIGHTS)
    o_proj = fused.o_proj
    out = o_proj(out)
    if len(fused.norms) > 2:
        _, after, before, last = fused.norms
        total = fused.norm_add(after, out, total)
        y = ops.rms_norm(total, before.weight, **fused.norm_options(before))
        return fused.norm_add(last, fused.mlp(y), total), None
    is_plain = type(o_proj) in LINEARS and not o_proj._forward_hooks and not is_replaced(o_proj)
    out = fused.rest.scaled(out)
    if total is x or not is_plain:  # not ours alone
        y, total = fused.add_norm(fused.norms[1], out, total)
    else:
        y, total = fused.add_norm(fused.norms[1], out, total, out=out, residual_out=total)
    return fused.rest.scaled(fused.mlp(y)), total


def traced_layer(
    fused: FusedLayer,
    x: Tensor,
    pending: Tensor | None,
    step: Step | None,
    mask: Tensor | None,
    cache: Any,
    embeddings: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The same under torch.compile, which fuses the norms of heads, the rotary embedding and the second norm with their
    surroundings by itself: only the norm with the projection is ours."""
    family, rounding = fused.family, fused.rounding
    q, k, v, total = fused.norm_qkv(x, pending)
    if fused.head_norms:
        q, k = [traced_norm(family, norm, x, rounding) for norm, x in zip(fused.head_norms, (q, k))]
    if fused.turns():
        q, k = family.module.apply_rotary_pos_emb(q, k, *embeddings, unsqueeze_dim=2)
    out = fused.o_proj(fused.attend(q, k, v, step, mask, cache, kwargs))
    if len(fused.norms) > 2:
        _, after, before, last = fused.norms
        total = total + traced_norm(family, after, out, rounding)
        return traced_norm(family, last, fused.mlp(traced_norm(family, before, total, rounding)), rounding), total
    total = total + fused.rest.scaled(out)
    return fused.rest.scaled(fused.mlp(traced_norm(family, fused.norms[1], total, rounding))), total


@named_forward
def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a model: that of its class, with a Step for its layers if all of them are fused, without its norm where an End
    will see to that, and in a Decoder's step with rows of the rotary embedding that are known already. Another one,
    which somebody has put into the class, may look at what goes from layer to layer, so that is made whole for it."""
    applied: Applied = self._minivllm
    end: End | None = kwargs.pop(END, None)
    if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
        kwargs["output_attentions"] = True  # for the layers, which do not see the configuration
    layers = list(self.layers._modules.values())[: self.config.num_hidden_layers]
    fused = type(self).forward is applied.model_forward and all(is_fused(layer, layer_forward) for layer in layers)
    parts: dict[str, Any] = {}
    step, traced = None, torch.compiler.is_compiling()
    if layers and fused:
        recorded = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        watched = recorded or any(layer._forward_pre_hooks or is_watched(layer._forward_hooks) for layer in layers)
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        is_causal = given is None and not traced and applied.family.makes_causal_masks(self.config)
        kwargs[STEP] = step = Step(None if watched else layers[-1], is_causal)
        if end is not None and not recorded and "output_attentions" not in kwargs:
            parts["norm"] = end.norm
        if isinstance(cache := kwargs.get("past_key_values"), DecoderCache) and cache.cursor.positions is not None:
            parts["rotary_emb"] = cache.cursor.rotary.instead_of(self.rotary_emb, applied.family.module.__name__)
    result = type(self).forward(Instead(self, **parts) if parts else self, *args, **kwargs)
    if step is not None:
        step.rooms.finish()
    return result


def can_norm(norm: Any, x: Tensor) -> bool:
    """Whether the ops may stand in for a final norm that has `norm_forward`, or had it when `apply` put it there."""
    return (
        is_fused(norm, norm_forward)
        and not norm.training
        and not torch.is_grad_enabled()
        and x.dtype == norm.weight.dtype
        and x.dtype in DTYPES
        and not is_intercepted()
        and not (
            why_not_now(norm._minivllm.number) if torch.compiler.is_compiling() else norm._minivllm.why_not_now({})
        )
    )


@named_forward
def norm_forward(self: Any, hidden_states: Tensor) -> Any:
    """Of the final norm."""
    x, family, rounding = hidden_states, self._minivllm.family, self._minivllm.rounding
    if not can_norm(self, x):
        return type(self).forward(self, x)
    if torch.compiler.is_compiling():
        return traced_norm(family, self, x, rounding)
    return ops.rms_norm(x, self.weight, **family.norm_options(self, rounding))


FORWARDS = (model_forward, layer_forward, norm_forward, *map(causal_forward, FAMILIES.values()))  # that `apply` puts
