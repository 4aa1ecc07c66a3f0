"""A model of transformers cut for the ranks of a process group: the heads of its attention, the width of its MLP.

    q, k, v, gate, up     rows: the heads of this rank, and its part of the width
    o_proj, down_proj     the columns that take these; what they give is a part of a sum, and SummedLinear makes the sum

Embedding, norms and lm_head are whole on every rank. So are the hidden states from layer to layer, and they are bit for
bit the same on all of them, because an all-reduce gives every rank one result: all choose the same token.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import QKVShard, shard_qkv
from .code import FAMILIES, Family


class SummedLinear(torch.nn.Linear):
    """This rank's columns of a linear layer, and the sum over the ranks of what each makes of its part of x:
    [..., in_features] to [..., out_features]. The first rank alone has the bias. group: as torch.distributed takes it,
    None for all processes."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.sum_over_ranks(super().forward(input))

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """The sum of what all ranks have, in place."""
        if part.requires_grad:
            raise RuntimeError(
                "a sharded model passes no gradients on: leave requires_grad of its Parameters and inputs at False"
            )
        dist.all_reduce(part, group=self.group)
        return part

    def process_group(self) -> Any:
        return dist.group.WORLD if self.group is None else self.group


class Cut(NamedTuple):
    """What a rank of a group takes of the layers of a model. config: that of the whole model."""

    family: Family
    config: Any
    group: Any
    rank: int
    ranks: int

    def qkv(self, attention: Any, device: str | None = None) -> QKVShard:
        """The weights as `attention` has them, three or one that is packed; on a device of their own if asked for."""
        linears = [getattr(attention, name) for name in self.family.traits.projections]
        weights = tuple(each.weight.to(device or each.weight.device) for each in linears)
        biases = tuple(each.bias for each in linears)
        is_packed = len(linears) == 1
        return shard_qkv(
            weights[0] if is_packed else weights,
            biases[0] if is_packed or biases[0] is None else biases,
            num_heads=self.config.num_attention_heads, num_kv_heads=self.config.num_key_value_heads,
            rank=self.rank, world_size=self.ranks, weight_layout="out_in")  # fmt: skip

    def rows(self, x: Tensor, matrices: int) -> Tensor:
        """Of each of so many matrices, or biases, that stand in x one under the other."""
        return x.view(matrices, self.ranks, -1, *x.shape[1:])[:, self.rank].flatten(0, 1)

    def columns(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.ranks, 1)[self.rank]

    def attention(self, attention: Any) -> None:
        part, names = self.qkv(attention), self.family.traits.projections
        weights, biases = (x if isinstance(x, tuple) else (x,) * len(names) for x in (part.qkv_weight, part.bias))
        for name, weight, bias in zip(names, weights, biases):
            put(getattr(attention, name), weight, bias)
        self.sum_of(attention.o_proj)
        attention.num_key_value_groups = part.num_heads // part.num_kv_heads
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = part.num_kv_heads

    def mlp(self, mlp: Any) -> None:
        names = self.family.traits.gate_up  # two, or one of both
        for linear in (getattr(mlp, name) for name in names):
            weight, bias = (x if x is None else self.rows(x, 2 // len(names)) for x in (linear.weight, linear.bias))
            put(linear, weight, bias)
        self.sum_of(mlp.down_proj)

    def sum_of(self, linear: Any) -> None:
        """Makes it a SummedLinear: the module stays the same, with its hooks."""
        put(linear, self.columns(linear.weight), linear.bias if self.rank == 0 else None)
        linear.__class__, linear.group = SummedLinear, self.group


def put(linear: Any, weight: Any, bias: Any) -> None:
    """Copies of both as the layer's own, so that what they are parts of may go."""
    linear.weight = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    linear.bias = None if bias is None else torch.nn.Parameter(bias.clone(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


@torch.no_grad()
def shard(model: Any, group: Any = None) -> None:
    """Cuts `model` in place to what this rank of `group` computes. Every rank calls it on the same whole model, and
    then makes the same calls of the model as the others; each of them gets the whole result.

    model: one of the families of `apply`, as ...ForCausalLM or the decoder in it, on any device, its weights plain
    Parameters of any floating dtype. group: a process group of torch.distributed, None: all processes; of NCCL for a
    model on GPUs, of gloo on the CPU. A rank takes num_attention_heads / ranks of the query heads, the key and value
    heads that these attend to (where there are fewer than ranks, one, which several ranks have in common), and
    intermediate_size / ranks of the MLP, in memory of its own, so that the whole may go. Embedding, norms and lm_head
    stay whole.

    `model.config` becomes a copy that counts the heads and the width of the rank, state_dict() is the rank's, and no
    Parameter requires a gradient. Call `apply` afterwards, not before.

    TypeError: model or group is something else. NotImplementedError: a model that is not served, or a linear layer
    that is quantised, adapted, shared or otherwise not torch's own, by name. ValueError: heads or a width that do not
    divide, a group without this process. RuntimeError: no process group, a model that is sharded already, or `apply`
    before it.
    """
    rank, ranks = _place(group)
    family = _family_of(model)
    decoder: Any = model.model if type(model) is family.causal else model
    _check_linears(family, decoder)
    whole = decoder.config
    cut = Cut(family, whole, group, rank, ranks)
    if whole.intermediate_size % ranks:
        raise ValueError(
            f"shard: intermediate_size is {whole.intermediate_size}, expected a multiple of the {ranks} ranks of the "
            "group: take a group of another size"
        )
    try:
        part = cut.qkv(decoder.layers[0].self_attn, "meta")
    except ValueError as error:
        raise ValueError(f"shard: {ranks} ranks cannot share the heads of the model: {error}") from None
    for layer in decoder.layers:
        cut.attention(layer.self_attn)
        cut.mlp(layer.mlp)
    config = copy.deepcopy(whole)
    config.head_dim = decoder.layers[0].self_attn.head_dim  # some derive it from the number of heads
    config.num_attention_heads, config.num_key_value_heads = part.num_heads, part.num_kv_heads
    config.intermediate_size = whole.intermediate_size // ranks
    for module in model.modules():
        if module.__dict__.get("config") is whole:
            module.config = config
    model.requires_grad_(False)


def _place(group: Any) -> tuple[int, int]:
    """(this process's rank in the group, how many there are)"""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shard: torch.distributed has no process group: call torch.distributed.init_process_group first, in "
            "processes that torchrun has started"
        )
    if not isinstance(group, dist.ProcessGroup) and group not in (None, dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"shard: group is of type {type(group).__qualname__}, expected a ProcessGroup or None")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("shard: this process is none of the group's ranks: call it on the processes of the group")
    return rank, dist.get_world_size(group)


def _family_of(model: Any) -> Family:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"shard: model is of type {type(model).__qualname__}, expected a model of transformers")
    for module in model.modules():
        if type(module) is SummedLinear:
            raise RuntimeError("shard: the model is sharded already: load the whole model again to shard it otherwise")
        if "_minivllm" in module.__dict__:
            raise RuntimeError(
                "shard: minivllm.transformers.apply stands in the model: call undo, then shard, then apply again"
            )
    family = next((each for each in FAMILIES.values() if type(model) in (each.model, each.causal)), None)
    if family is None:
        served = ", ".join(each.causal.__name__ for each in FAMILIES.values())
        raise NotImplementedError(
            f"shard: {type(model).__name__} is not served; served are {served}, and the decoders in them"
        )
    return family


def _check_linears(family: Family, decoder: Any) -> None:
    """NotImplementedError that names the first linear layer which cannot be cut."""
    traits = family.traits
    names = [f"self_attn.{name}" for name in (*traits.projections, "o_proj")]
    names += [f"mlp.{name}" for name in (*traits.gate_up, "down_proj")]
    modules = {f"layers.{i}.{n}": layer.get_submodule(n) for i, layer in enumerate(decoder.layers) for n in names}
    if why := family.why_replaced(modules, dict.fromkeys(modules, torch.nn.Linear)):
        raise NotImplementedError(f"shard: {why}; shard the model before anything else is put into it")
    seen: dict[int, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if type(parameter) is not torch.nn.Parameter or not parameter.is_floating_point():
                what = f"{type(parameter).__qualname__} of {parameter.dtype}"
                raise NotImplementedError(f"shard: {name}.{key} is a {what}, expected a plain Parameter of floats")
            if (other := seen.setdefault(id(parameter), f"{name}.{key}")) != f"{name}.{key}":
                raise NotImplementedError(f"shard: {name}.{key} is {other} as well, expected a Parameter of its own")
