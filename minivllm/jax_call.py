"""A call of any op on JAX arrays: traced and planned, differentiable, batched, and at last a foreign function of XLA.

The options are hashable pairs, the arrays a dict of those that there are.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp

from . import _C
from .jax_formulas import formula_of
from .signatures import names

for _op, _platform, _handler in _C._xla_handlers():
    jax.ffi.register_ffi_target(f"minivllm_{_op}", _handler, platform=_platform)


def call(op, arrays, **options):
    """What `op` gives, of arrays some of which may be None."""
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise TypeError(f"{op}: {name} is a JAX array, expected a Python value: it is part of what is compiled")
        if getattr(value, "ndim", None) == 0:  # NumPy's numbers, which may have no hash
            options[name] = value.item()
    jitted = _jitted_in_place if _in_place(op, arrays) else _jitted
    return jitted(op, tuple(options.items()), tuple(map(type, options.values())), arrays)


def _in_place(op, arrays):
    """What the op writes to of what it is given."""
    return [name for name in names(op, "in place") if name in arrays]


# types: of the options. 2, 2.0 and True are equal, but not all of them are numbers of heads.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _jitted(op, options, types, arrays):
    out, *sums = _differentiable(op, options, arrays)
    if op != "rms_norm_qkv":
        return out, *sums
    num_heads, num_kv_heads = dict(options)["num_heads"], dict(options)["num_kv_heads"]
    all_heads = num_heads + 2 * num_kv_heads
    heads = out.reshape(*out.shape[:-1], all_heads, out.shape[-1] // all_heads)
    return *jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=-2), *sums


# Without gradients, and no batch of caches.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _jitted_in_place(op, options, types, arrays):
    return tuple(_foreign_call(op, options, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(op, options, arrays):
    if op == "qk_norm_rope":  # whose rows of cos and sin broadcast: a batch is no more dimension of all
        return _foreign_call(op, options, arrays)
    return _batchable(op, options)(arrays)


def _forward(op, options, arrays):
    return _differentiable(op, options, arrays), arrays


def _backward(op, options, arrays, gradients):
    _, in_out, _, _ = _plan(op, options, arrays)
    formula = functools.partial(formula_of(op), in_out=in_out, **dict(options))
    _, pull_back = jax.vjp(formula, arrays)
    return pull_back(gradients)


_differentiable.defvjp(_forward, _backward)


def _batchable(op, options):
    """arrays -> results. Rows are independent: a batch of them is one more leading dimension; a batch of weights is a
    call for each."""

    @jax.custom_batching.custom_vmap
    def call(arrays):
        return _foreign_call(op, options, arrays)

    @call.def_vmap
    def batched(size, is_batched, arrays):
        (is_batched,) = is_batched  # of the one argument
        rows = [name for name in names(op, "rows") if name in arrays]
        weights = {name: is_batched[name] for name in arrays if name not in rows}
        if any(jax.tree.leaves(weights)):
            everything = jax.tree.map(functools.partial(_repeat, size), arrays, is_batched)
            results = lax.map(call, everything)
        else:
            results = call(arrays | {name: _repeat(size, arrays[name], is_batched[name]) for name in rows})
        return results, [True] * len(results)

    return call


def _repeat(size, array, is_batched):
    return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))


# ---- forward: the foreign function ----------------------------------------------------------------------------------


def _foreign_call(op, options, arrays):
    """[out] or [out, residual_out], where out is packed, [..., qkv], for q, k and v; then what the op has written to in
    place: arrays of their own, in the memory of the old ones if nobody needs those."""
    outputs, _, scratch_bytes, attributes = _plan(op, options, arrays)
    results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    in_order = [name for name in names(op, *_READ) if name in arrays]
    in_place = _in_place(op, arrays)
    aliases = {in_order.index(name): len(results) + i for i, name in enumerate(in_place)}
    results += [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in in_place]
    scratch = jax.ShapeDtypeStruct((scratch_bytes,), jnp.uint8)
    call = jax.ffi.ffi_call(f"minivllm_{op}", [*results, scratch], input_output_aliases=aliases)
    return list(call(*jax.tree.leaves([arrays[name] for name in in_order]), **attributes))[:-1]


_READ = ("rows", "weight", "in place")


def _plan(op, options, arrays):
    """As C's _plan: checked, and planned for both platforms that may run the call.

    JAX decides where only after this. So what both refuse is refused here, and what one of them does, there.
    """
    stand_ins = dict.fromkeys(names(op, *_READ)) | jax.tree.map(_stand_in, arrays)
    plans, refusals = [], []
    for device in _devices():
        try:
            plans.append(_C._plan(op, device, **stand_ins, **dict(options)))
        except (TypeError, ValueError, RuntimeError) as refusal:
            refusals.append(refusal)
    if not plans:
        raise refusals[-1]
    outputs, in_out, _, attributes = plans[0]
    return outputs, in_out, max(scratch for _, _, scratch, _ in plans), attributes


def _stand_in(array):
    """An array of the same shape and dtype, whose memory nobody touches."""
    import numpy as np

    return np.empty(array.shape, array.dtype) if hasattr(array, "dtype") else array


@functools.cache
def _devices():
    """-1 for the CPU, and the index of this process's first GPU, if JAX has one."""
    try:
        return -1, jax.local_devices(backend="cuda")[0].local_hardware_id
    except RuntimeError:
        return (-1,)
