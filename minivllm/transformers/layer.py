"""Decoder layers of transformers (Llama, Qwen2, Qwen3) on the fused ops; minivllm.transformers puts them in place.

These functions stand in for `forward` of a model, of its layers and of its final norm. What a layer computes:

    q, k, v, total = rms_norm_qkv(hidden, residual=pending)     norm, projection, and the sum the layer before left open
    q, k           = rms_norm(q), rms_norm(k)                   Qwen3, in place
    q, k           = rotary embedding of both in one go         torch, in place
    attention, o_proj                                           as in transformers
    y, total       = add_rms_norm(o_proj's, total)              in place
    hidden         = mlp(y)                                     and total stays pending for the next layer

Every module that is skipped by this is looked at again in each call, so that an adapter, a hook or a quantised weight
that arrives later is not passed over: the layer then runs the code of its class, and its report says why.
"""

import itertools
import sys
import types
import weakref

import torch
import torch.nn.functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import minivllm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEP = "minivllm_step"  # the keyword argument in which a Step goes from the model to its layers
RECORDERS = "transformers.utils.output_capturing"  # its hooks stay on the modules, and act where outputs are asked for
NORMS = ("input_layernorm", "post_attention_layernorm")
LONE_HEADS = 64  # fewer heads of keys than this, each on one SM, take longer than copying them does once it is compiled


def is_watched(hooks):
    """Whether some forward hooks are more than those by which transformers records outputs."""
    return any(hook.__module__ != RECORDERS for hook in hooks.values())


def is_replaced(module):
    """Whether a module has a forward of its own in place of its class's."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_fused(module, forward):
    """Whether `forward`, of those below, stands in for the module's own."""
    own = module.__dict__.get("forward")
    return isinstance(own, types.MethodType) and own.__func__ is forward  # as Dynamo of torch 2.11 can follow it


def named_forward(function):
    """Called as the attribute is, so that a pickled model comes back with the forward of its class."""
    function.__name__ = "forward"
    return function


class Step:
    """One forward of the model: what its layers hand to each other.

    pending: the residual that the next layer has to add to its input; None where that input is the sum itself.
    last: the layer after which no sum may be pending; None where layers are watched, so that none ever is.
    """

    def __init__(self, last):
        self.pending = None
        self.last = last
        self.embeddings = self.rotation = None
        self.mask = self.bias = None

    def rotation_of(self, embeddings):
        """rotation(embeddings), computed once for all layers."""
        if self.embeddings is not embeddings:
            self.embeddings, self.rotation = embeddings, rotation(embeddings)
        return self.rotation

    def bias_of(self, mask, dtype):
        """A mask of booleans as what is added to scores: torch would make that anew in every layer."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self.mask is not mask:
            self.mask = mask
            self.bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self.bias


def rotation(embeddings):
    """(cos, sin) for `rotate`, [batch, tokens, 1, head_dim], from those of transformers, [batch, tokens, head_dim]."""
    cos, sin = embeddings
    half = sin.shape[-1] // 2
    return cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)


def rotate(x, cos, sin):
    """x cos + rotate_half(x) sin in place, with the very roundings of transformers: the sign that rotate_half gives to
    the first half is in `sin`. x: [batch, tokens, heads, head_dim]."""
    turned = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).add_(turned.mul_(sin))


def traced_norm(norm, x, rounding):
    """A norm under torch.compile: in operations of torch, which the compiler fuses with their surroundings."""
    if rounding == "hf":
        return type(norm).forward(norm, x)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return (y * norm.weight.float()).to(x.dtype)


ALIVE = weakref.WeakValueDictionary()  # every FusedLayer by its number
NUMBERS = itertools.count()


@torch.compiler.assume_constant_result
def why_not_modules_now(number):
    """`why_not_modules` of a FusedLayer for a call that is traced. A constant: all that it looks at would be looked at
    again in every compiled call. By number: Dynamo of torch 2.11 hands over no objects."""
    return ALIVE[number].why_not_modules({}) or ""


class FusedLayer:
    """A decoder layer's parts, and whether a call may use them. Lives on the layer as `_minivllm`.

    packed: the q, k and v weights in one matrix, of which the Parameters are views, or None. fused_tokens: calls with
    more tokens take the norm and torch's linear, None: no limit; traced_tokens: the same under torch.compile, where
    more take the code of the layer's class. rounding: of every norm. fallbacks: the report's, by layer name.
    """

    def __init__(self, name, layer, packed, fused_tokens, traced_tokens, rounding, fallbacks):
        attention = layer.self_attn
        self.name, self.packed, self.rounding, self.fallbacks = name, packed, rounding, fallbacks
        self.fused_tokens, self.traced_tokens = fused_tokens, traced_tokens
        self.layer, self.attention, self.o_proj, self.mlp = layer, attention, attention.o_proj, layer.mlp
        self.input_norm, self.post_norm = (getattr(layer, norm) for norm in NORMS)
        self.projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self.skipped = (self.input_norm, self.post_norm, attention, *self.projections, *self.head_norms)
        self.parts, self.types = self._parts(), tuple(map(type, self.skipped))
        self.hooks = [hooks for module in self.skipped for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads, _ = (linear.out_features // self.head_dim for linear in self.projections)
        self.eager_attention = sys.modules[type(attention).__module__].eager_attention_forward
        self.apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self._enter()

    def _enter(self):
        self.number = next(NUMBERS)
        ALIVE[self.number] = self

    def __setstate__(self, state):
        """A copy, or what comes out of a pickle, is another layer's."""
        self.__dict__.update(state)
        self._enter()

    def _parts(self):
        return (*self.layer._modules.values(), *self.attention._modules.values())

    def why_not(self, x, args, kwargs):
        """Why this call has to run the code of the layer's class; None if it need not."""
        if torch.is_grad_enabled():
            return "gradient mode is on: call it under torch.no_grad() or torch.inference_mode()"
        if args:
            return "it was called with more than one positional argument"
        if self._parts() != self.parts:
            return "one of its modules was replaced: apply again"
        if torch.compiler.is_compiling():
            why = why_not_modules_now(self.number) or (kwargs.get("output_attentions") and "attentions are recorded")
        else:
            why = self.why_not_modules(kwargs)
        if why:
            return why
        weight = self.projections[0].weight
        if x.dtype != weight.dtype or x.dtype not in DTYPES or type(weight) is not torch.nn.Parameter:
            return f"hidden states are {x.dtype}, the weight of q_proj is a {type(weight).__name__} of {weight.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        return None

    def why_not_modules(self, kwargs):
        """The same of the modules as they are now."""
        if self.layer.training:
            return "it is in training mode: call model.eval()"
        if tuple(map(type, self.skipped)) != self.types:
            return "one of its modules changed its class: apply again"
        if any(self.hooks) and (why := self._why_hooked(kwargs)):
            return why
        if _has_any_global_hook():
            return "a hook on all modules is registered"
        if any("forward" in module.__dict__ for module in self.skipped) and any(map(is_replaced, self.skipped)):
            return "the forward of one of its modules was replaced"
        return None

    def _why_hooked(self, kwargs):
        for module in self.skipped:
            if module._forward_pre_hooks or is_watched(module._forward_hooks):
                return f"a {type(module).__name__} of it has a hook"
        return "attentions are recorded" if kwargs.get("output_attentions") else None

    def is_fused_for(self, x):
        """Whether norm and projection of so many tokens are one call."""
        limit = self.traced_tokens if torch.compiler.is_compiling() else self.fused_tokens
        return limit is None or x.shape[0] * x.shape[1] <= limit

    def norm_qkv(self, x, residual):
        """(q, k, v, total): q, k, v as [batch, tokens, heads, head_dim], views of one packed buffer."""
        wq, wk, wv = self.projections
        bias = None if wq.bias is None else (wq.bias, wk.bias, wv.bias)
        parts = minivllm.rms_norm_qkv(
            x, self.input_norm.weight, (wq.weight, wk.weight, wv.weight), self.heads, self.kv_heads,
            self.input_norm.variance_epsilon, bias=bias, residual=residual, head_dim=self.head_dim,
            weight_layout="out_in", rounding=self.rounding)  # fmt: skip
        return (*parts, x) if residual is None else parts

    def norm_then_qkv(self, x, residual):
        """The same by the norm and torch's linear: where the weights are packed one, else three with a buffer each."""
        norm = self.input_norm
        if residual is None:
            y, total = minivllm.rms_norm(x, norm.weight, norm.variance_epsilon, rounding=self.rounding), x
        else:
            y, total = self.add_norm(norm, x, residual, residual_out=residual)
        lead = x.shape[:-1]
        if self.is_packed():
            biases = [linear.bias for linear in self.projections]
            packed = F.linear(y, self.packed, None if biases[0] is None else torch.cat(biases))
            counts = (self.heads, self.kv_heads, self.kv_heads)
            q, k, v = packed.view(*lead, -1, self.head_dim).split(counts, -2)
        else:
            q, k, v = (F.linear(y, w.weight, w.bias).view(*lead, -1, self.head_dim) for w in self.projections)
        return q, k, v, total

    def add_norm(self, norm, x, residual, **out):
        """(the norm of x + residual, that sum)"""
        return minivllm.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon, rounding=self.rounding, **out)

    def is_packed(self):
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

    def norm_and_rotate(self, q, k, cos, sin, in_one_buffer):
        """q_norm, k_norm and the rotary embedding, in place; in one buffer k follows q, and both are rotated as one."""
        for norm, x in zip(self.head_norms, (q, k)):
            minivllm.rms_norm(x, norm.weight, norm.variance_epsilon, out=x, rounding=self.rounding)
        if in_one_buffer:
            batch, tokens, _, head_dim = q.shape
            rotate(q.as_strided((batch, tokens, self.heads + self.kv_heads, head_dim), q.stride()), cos, sin)
        else:
            rotate(q, cos, sin)
            rotate(k, cos, sin)

    def attend(self, q, k, v, step, mask, cache, kwargs):
        """The attention of transformers, from [batch, tokens, heads, head_dim] to [batch, tokens, heads * head_dim]."""
        attention = self.attention
        batch, tokens, heads, head_dim = q.shape
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        position = kwargs.pop("cache_position", None)  # early versions of transformers 5 hand it to the cache
        if cache is not None:
            more = () if position is None else ({"cache_position": position},)
            k, v = cache.update(k, v, attention.layer_idx, *more)
        name = attention.config._attn_implementation
        interface = self.eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        few = torch.compiler.is_compiling() and batch * self.kv_heads < LONE_HEADS
        if tokens == 1 and not few and interface is sdpa_attention_forward and (mask is None or mask.shape[1] == 1):
            # One query per head: the query heads that share keys become the queries of one head. transformers would
            # instead copy the keys and values of the whole cache, once per query head.
            q = q.view(batch, self.kv_heads, heads // self.kv_heads, head_dim)
            if step is not None:
                mask = step.bias_of(mask, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling)
        else:
            more = {"sliding_window": attention.sliding_window} if hasattr(attention, "sliding_window") else {}
            q = q.transpose(1, 2)
            out, _ = interface(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling, **more, **kwargs)
        return out.reshape(batch, tokens, heads * head_dim)


@named_forward
def layer_forward(self, hidden_states, *args, **kwargs):
    """Of a decoder layer: [batch, tokens, hidden] to the same. In a Step the result may lack the residual."""
    fused = self._minivllm
    step = kwargs.pop(STEP, None)
    pending = None if step is None else step.pending
    traced = torch.compiler.is_compiling()
    why = fused.why_not(hidden_states, args, kwargs)
    if why is not None or (traced and not fused.is_fused_for(hidden_states)):
        if why is not None and not traced:
            fused.fallbacks[fused.name] = why
        if pending is not None:
            hidden_states, step.pending = pending + hidden_states, None
        return type(self).forward(self, hidden_states, *args, **kwargs)
    mask, cache = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
    embeddings = kwargs.pop("position_embeddings")
    run = traced_layer if traced else eager_layer
    hidden_states, total = run(fused, hidden_states, pending, step, mask, cache, embeddings, kwargs)
    if step is not None:
        step.pending = total if step.last is not None and step.last is not self else None
        if step.pending is not None:
            return hidden_states
    return total + hidden_states


def eager_layer(fused, x, pending, step, mask, cache, embeddings, kwargs):
    """(the MLP's output, the residual that belongs to it). Writes to its own buffers wherever it can: on a GPU the
    host is what an eager step waits for, and every allocation is as long as a launch."""
    in_one_call = fused.is_fused_for(x)
    q, k, v, total = fused.norm_qkv(x, pending) if in_one_call else fused.norm_then_qkv(x, pending)
    cos, sin = rotation(embeddings) if step is None else step.rotation_of(embeddings)
    fused.norm_and_rotate(q, k, cos, sin, in_one_call or fused.packed is not None)
    o_proj = fused.o_proj
    out = o_proj(fused.attend(q, k, v, step, mask, cache, kwargs))
    is_plain = type(o_proj) is torch.nn.Linear and not o_proj._forward_hooks and not is_replaced(o_proj)
    if total is x or not is_plain:  # not ours alone
        y, total = fused.add_norm(fused.post_norm, out, total)
    else:
        y, total = fused.add_norm(fused.post_norm, out, total, out=out, residual_out=total)
    return fused.mlp(y), total


def traced_layer(fused, x, pending, step, mask, cache, embeddings, kwargs):
    """The same under torch.compile, which fuses the norms of heads, the rotary embedding and the second norm with their
    surroundings by itself: only the norm with the projection is ours."""
    q, k, v, total = fused.norm_qkv(x, pending)
    if fused.head_norms:
        q, k = [traced_norm(norm, x, fused.rounding) for norm, x in zip(fused.head_norms, (q, k))]
    q, k = fused.apply_rotary(q, k, *embeddings, unsqueeze_dim=2)
    total = total + fused.o_proj(fused.attend(q, k, v, step, mask, cache, kwargs))
    return fused.mlp(traced_norm(fused.post_norm, total, fused.rounding)), total


@named_forward
def model_forward(self, *args, **kwargs):
    """Of a model: that of its class, with a Step for its layers if all of them are fused."""
    if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
        kwargs["output_attentions"] = True  # for the layers, which do not see the configuration
    layers = list(self.layers._modules.values())[: self.config.num_hidden_layers]
    if layers and all(is_fused(layer, layer_forward) for layer in layers):
        watched = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        watched = watched or any(layer._forward_pre_hooks or is_watched(layer._forward_hooks) for layer in layers)
        kwargs[STEP] = Step(None if watched else layers[-1])
    return type(self).forward(self, *args, **kwargs)


@named_forward
def norm_forward(self, hidden_states):
    """Of the final norm."""
    x, rounding = hidden_states, self._minivllm
    if self.training or torch.is_grad_enabled() or x.dtype != self.weight.dtype or x.dtype not in DTYPES:
        return type(self).forward(self, x)
    if torch.compiler.is_compiling():
        return traced_norm(self, x, rounding)
    return minivllm.rms_norm(x, self.weight, self.variance_epsilon, rounding=rounding)
