"""The ops as torch's dispatcher knows them: torch.ops.minivllm.<name>, on the CPU and on CUDA.

They are no API. Their schemas are made from C's description of the ops. An op that may be given a residual has two:
<name> without and add_<name> with it. So has greedy_tokens, which need not work on anything in place: <name> does not,
and <name>_in_place does. Those of the projection return the packed buffer, because the outputs of an op
must not be views of each other. torch knows no gradient of them, and warns who goes backward through one that was
called without the function around it in minivllm/torch.py, as an exported program does.
"""

import itertools

import torch

from . import _C
from .signatures import OPS

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TYPES = {"tensor": "Tensor", "tensors": "Tensor[]", "integers": "Tensor", "flags": "Tensor", "number": "float",
          "integer": "int", "flag": "bool", "choice": "str", "text": "str"}  # fmt: skip
_library = torch.library.Library("minivllm", "DEF")
_SEVERAL = {op: frozenset(p.name for p in parameters if p.type == "tensors") for op, parameters in OPS.items()}
_IN_PLACE = {op: tuple(p.name for p in parameters if p.role == "in place") for op, parameters in OPS.items()}
# What is taken by an op that may but need not work in place, where it does not. (Inductor cannot have an op of one
# result that writes to None.)
_ALONE = {"greedy_tokens": ("logits", "kernel")}
_registered = {}


def call(op, arguments):
    """Calls `op` as registered, with arguments by name. Given a residual that it need not be given: add_<op>."""
    given = {name: listed(value) if name in _SEVERAL[op] else value for name, value in arguments.items()}
    if given.get("residual", 0) is None:
        del given["residual"]
    if torch.compiler.is_dynamo_compiling():
        for first, second in itertools.combinations(_IN_PLACE[op], 2):
            _keep_apart(given[first], given[second])
    if f"add_{op}" in _registered and "residual" in given:
        return _registered[f"add_{op}"](**given)
    if op in _ALONE and any(value is not None for name, value in given.items() if name not in _ALONE[op]):
        return _registered[f"{op}_in_place"](**given)
    return _registered[op](**{name: given[name] for name in _ALONE.get(op, given)})


def _keep_apart(first, second):
    """While a graph is traced, of two tensors that an op writes to: breaks the graph where they come from outside of
    it and have one memory. Inductor would write to one of them and to a copy of all that memory for the other, and
    torch 2.11 even makes the copy from the wrong place. Slices that are taken inside of the graph are no such case:
    their tensor comes in whole."""
    torch._dynamo.comptime.comptime(_break_for_views)


def _break_for_views(context):
    variables = [context.get_local(name) for name in ("first", "second")]
    given = [variable._i_will_not_complain_if_bc_breaks_VariableTracker() for variable in variables]
    if any(not isinstance(of, torch._dynamo.variables.TensorVariable) or of.source is None for of in given):
        return
    first, second = (variable.as_fake().untyped_storage()._cdata for variable in variables)
    if first == second:
        context.graph_break(
            "this op writes to two tensors that are views of one; with fullgraph=True give the compiled function that "
            "one, and slice it there"
        )


def listed(tensors):
    """None, a tensor or several, as a list."""
    return [] if tensors is None else list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]


def _register(op, name, without=()):
    """Registers `op` by this name, without some of the parameters that it may be given."""
    takes = [p for p in OPS[op] if p.role != "output" and p.name not in without]
    takes.sort(key=lambda p: p.role not in ("rows", "in place"))  # those come first
    in_place = [p.name for p in takes if p.role == "in place"]
    rows = [p.name for p in takes if p.role == "rows"]
    outputs = [p.name for p in OPS[op] if p.role == "output" and (p.name != "residual_out" or "residual" in rows)]
    arguments = ", ".join(_declaration(p, in_place) for p in takes)
    results = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
    # Strides stay as they are in eager mode, where it depends on them what is taken as it is and what is refused.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(f"{name}({arguments}) -> {results}", tags=tags)
    for backend in ("CPU", "CUDA"):
        _library.impl(name, _implementation(op, takes, outputs), backend)
    registered = getattr(torch.ops.minivllm, name).default
    torch.library.register_fake(f"minivllm::{name}", _fake(op, takes, outputs), lib=_library)
    if rows and not in_place:
        torch.library.register_vmap(f"minivllm::{name}", _batching_rule(registered, len(rows)), lib=_library)
    _registered[name] = registered


def _declaration(parameter, in_place):
    """Of a schema, such as "Tensor? weight". No tensors are an empty list; a residual that is taken is there."""
    kind = _TYPES[parameter.type]
    if parameter.name in in_place:
        kind += f"({'abcdefgh'[in_place.index(parameter.name)]}!)"
    may_be_none = parameter.optional and parameter.type != "tensors" and parameter.name != "residual"
    return f"{kind}{'?' if may_be_none else ''} {parameter.name}"


def _implementation(op, takes, outputs):
    function = getattr(_C, f"_{op}_packed", None) or getattr(_C, op)
    names = [p.name for p in takes]
    tensors = [p.name for p in takes if p.type in ("tensor", "integers", "flags")]
    several = [p.name for p in takes if p.type == "tensors"]

    def run(*values):
        given = dict(zip(names, values))
        for name in tensors:
            given[name] = _plain(given[name])
        for name in several:
            members = [_plain(tensor) for tensor in given[name]]
            given[name] = members[0] if len(members) == 1 else members or None
        result = function(**given)
        return result if outputs else None

    return run


def _plain(tensor):
    """The tensor without its subclass, whose work is done by the time that the op runs; None stays None."""
    return tensor if tensor is None or type(tensor) in _PLAIN else tensor.as_subclass(torch.Tensor)


def _fake(op, takes, outputs):
    """What the op gives, as tensors without memory. Its shapes are for the kernel to refuse. But a tensor on the meta
    device beside one elsewhere leads here, too, where no kernel would run and nothing be computed."""

    def fake(*values):
        given = {p.name: value for p, value in zip(takes, values)}
        x = values[0]
        for name, value in given.items():
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
                    raise ValueError(
                        f"{op}: {name} is on {tensor.device}, expected {x.device} (where {takes[0].name} is)"
                    )
        shapes = {"out": _shape_of_out(op, x, given)}
        if "out_k" in outputs:
            shapes["out_k"] = given["k"].shape
        dtype = torch.int64 if op == "greedy_tokens" else x.dtype
        results = tuple(x.new_empty(shapes.get(name, x.shape), dtype=dtype) for name in outputs)
        return results[0] if len(results) == 1 else results or None

    return fake


def _shape_of_out(op, x, given):
    if op.endswith("_and_mul"):  # x is gate | up
        return (*x.shape[:-1], x.shape[-1] // 2)
    if op == "greedy_tokens":
        return x.shape[:-1]
    if "weight_layout" not in given:
        return x.shape
    name = next(name for name in ("qkv_weight", "gate_up_weight", "weight") if name in given)
    matrices = listed(given[name])
    for matrix in matrices:
        if matrix.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {list(matrix.shape)}, expected two dimensions")
    dim = 1 if is_in_out(matrices, x.shape[-1], given["weight_layout"]) else 0
    outputs = sum(matrix.shape[dim] for matrix in matrices)
    return (*x.shape[:-1], outputs // 2 if op == "rms_norm_gate_up" else outputs)


def is_in_out(matrices, hidden, weight_layout):
    """Whether the weights are [hidden, out]: C's rule once more, because in a graph sizes may be symbols, which C does
    not know. What fits neither way is refused when the op runs; where weight_layout leaves it open, one is not square.
    """
    return weight_layout == "in_out" or any(matrix.shape[1] != hidden for matrix in matrices)


def _batching_rule(op, rows):
    """For torch.vmap: `op`, whose first `rows` arguments have rows, on a batch of them at once, since all rows are
    independent; with a batch of weights one by one."""

    def select(value, dim, i):
        if isinstance(value, list):
            return [select(each, each_dim, i) for each, each_dim in zip(value, dim)]
        if dim is None:
            return value
        if value.shape[dim] == 0:  # of no weights: what one would give, only for its shape
            shape, strides = list(value.shape), list(value.stride())
            del shape[dim], strides[dim]
            return value.new_empty_strided(shape, strides)
        return value.select(dim, i)

    def is_batched(dim):
        return any(map(is_batched, dim)) if isinstance(dim, list) else dim is not None

    def rule(info, dims, *arguments):
        if any(map(is_batched, dims[rows:])):
            batch = range(max(info.batch_size, 1))
            each = [op(*map(select, arguments, dims, [i] * len(dims))) for i in batch]
            results = tuple(map(torch.stack, zip(*each))) if isinstance(each[0], tuple) else torch.stack(each)
            if info.batch_size == 0:
                results = tuple(result[:0] for result in results) if isinstance(results, tuple) else results[:0]
        else:
            first = [
                tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0).contiguous()
                for tensor, dim in zip(arguments[:rows], dims)
            ]
            results = op(*first, *arguments[rows:])
        return results, (0, 0) if isinstance(results, tuple) else 0

    return rule


for _op, _parameters in OPS.items():
    if any(p.name == "residual" and not p.required for p in _parameters):
        _register(_op, _op, ("residual",))
        _register(_op, f"add_{_op}")
    elif _op in _ALONE:
        _register(_op, _op, [p.name for p in _parameters if p.name not in _ALONE[_op]])
        _register(_op, f"{_op}_in_place")
    else:
        _register(_op, _op)
