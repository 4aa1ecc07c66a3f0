"""The ops as torch's dispatcher knows them: torch.ops.minivllm.<name>, on the CPU and on CUDA.

They are no API. Those of the projection return the packed buffer, because the outputs of an op must not be views of
each other. torch knows no gradient of them, and warns who goes backward through one that was called without the
function around it in minivllm/torch.py, as an exported program does.
"""

import torch

from . import _C

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_library = torch.library.Library("minivllm", "DEF")
_NORM = "Tensor? weight, float eps, str rounding, float weight_offset, str? kernel"
_QKV = (
    "Tensor norm_weight, Tensor[] qkv_weight, Tensor[] bias, int num_heads, int num_kv_heads, float eps, "
    "str weight_layout, str rounding, float weight_offset, bool batch_invariant, bool allow_tf32, "
    "bool static_weights, str? kernel"
)
QKV_OPTIONS = [part.split()[-1] for part in _QKV.split(", ")[3:]]


def _register(schema, fake):
    """Makes the function the op `schema` on the CPU and on CUDA. Strides have to stay as they are in eager mode,
    where it depends on them what is taken as it is and what is refused."""

    def decorate(function):
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        for backend in ("CPU", "CUDA"):
            _library.impl(name, function, backend)
        op = getattr(torch.ops.minivllm, name).default
        torch.library.register_fake(f"minivllm::{name}", _fake(op, fake), lib=_library)
        if not op._schema.is_mutable:
            rows = [argument.name for argument in op._schema.arguments if argument.name in ("x", "residual")]
            torch.library.register_vmap(f"minivllm::{name}", _batching_rule(op, len(rows)), lib=_library)
        return op

    return decorate


def _fake(op, results):
    """`results` is what `op` gives, as tensors without memory. Its shapes are for the kernel to refuse. But a tensor on
    the meta device beside one elsewhere leads here, too, where no kernel would run and nothing be computed."""
    name = op._schema.name.partition("::")[2]
    arguments = [argument.name for argument in op._schema.arguments][1:]

    def fake(x, *values):
        for argument, value in zip(arguments, values):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
                    raise ValueError(f"{name}: {argument} is on {tensor.device}, expected {x.device} (where x is)")
        return results(x, *values)

    return fake


def _new_like(x, *_):
    return x.new_empty(x.shape)


def _new_pair(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _new_packed(x, norm_weight, qkv_weight, *_):
    """[..., qkv]. Of a matrix in either layout, the dimension that is not hidden counts the outputs."""
    hidden = x.shape[-1]
    for w in qkv_weight:
        if w.ndim != 2:
            raise ValueError(f"rms_norm_qkv: qkv_weight has shape {list(w.shape)}, expected two dimensions")
    outputs = [w.shape[0] if w.shape[1] == hidden else w.shape[1] for w in qkv_weight]
    return x.new_empty((*x.shape[:-1], sum(outputs)))


def _new_packed_and_sum(x, residual, *weights):
    return _new_packed(x, *weights), x.new_empty(x.shape)


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


def _plain(tensor):
    """The tensor without its subclass, whose work is done by the time that the op runs; None stays None."""
    return tensor if tensor is None or type(tensor) in _PLAIN else tensor.as_subclass(torch.Tensor)


@_register(f"rms_norm(Tensor x, {_NORM}) -> Tensor", _new_like)
def rms_norm(x, weight, eps, rounding, weight_offset, kernel):
    return _C.rms_norm(_plain(x), _plain(weight), eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)


@_register(f"add_rms_norm(Tensor x, Tensor residual, {_NORM}) -> (Tensor, Tensor)", _new_pair)
def add_rms_norm(x, residual, weight, eps, rounding, weight_offset, kernel):
    return _C.add_rms_norm(
        _plain(x), _plain(residual), _plain(weight), eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel
    )


@_register(
    "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float eps, str rounding, "
    "float weight_offset) -> ()",
    lambda *_: None,
)
def fused_add_rms_norm(x, residual, weight, eps, rounding, weight_offset):
    _C.fused_add_rms_norm(
        _plain(x), _plain(residual), _plain(weight), eps, rounding=rounding, weight_offset=weight_offset
    )


def _one_or_three(tensors):
    if len(tensors) == 1:
        return _plain(tensors[0])
    return [_plain(tensor) for tensor in tensors] or None


def _run_qkv(
    residual, x, norm_weight, qkv_weight, bias, num_heads, num_kv_heads, eps, weight_layout, rounding, weight_offset,
    batch_invariant, allow_tf32, static_weights, kernel
):  # fmt: skip
    return _C._rms_norm_qkv_packed(
        _plain(x), _plain(norm_weight), _one_or_three(qkv_weight), num_heads, num_kv_heads, eps,
        bias=_one_or_three(bias), residual=residual, weight_layout=weight_layout, rounding=rounding,
        weight_offset=weight_offset, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
        static_weights=static_weights, kernel=kernel)  # fmt: skip


@_register(f"rms_norm_qkv(Tensor x, {_QKV}) -> Tensor", _new_packed)
def rms_norm_qkv(x, *arguments):
    return _run_qkv(None, x, *arguments)


@_register(f"add_rms_norm_qkv(Tensor x, Tensor residual, {_QKV}) -> (Tensor, Tensor)", _new_packed_and_sum)
def add_rms_norm_qkv(x, residual, *arguments):
    return _run_qkv(_plain(residual), x, *arguments)
