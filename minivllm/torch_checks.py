"""What the C functions refuse, refused where torch takes part in a call: before it is dispatched.

From there on an op may meet tensors without memory, or none of the outputs that it is told to write to. So the call is
planned, as the C function would, with stand-ins: arrays of the same shapes, strides and places, which nobody touches.
"""

import torch

from . import _C
from .signatures import OPS, type_of

_FLOATS = (
    (torch.float32, torch.float16, torch.bfloat16),
    "float32, float16 or bfloat16; convert it, such as by .to(torch.float32)",
)
_DTYPES = {  # by the type of a parameter, with what a refusal says
    "tensor": _FLOATS,
    "tensors": _FLOATS,
    "integers": ((torch.int32, torch.int64), "int32 or int64; convert it"),
    "flags": ((torch.bool,), "bool; convert it"),
}
_IN_PLACE = dict.fromkeys(("rms_norm", "add_rms_norm", "fused_add_rms_norm"), ("x", "residual"))
_IN_PLACE["linear_add"] = ("residual",)  # what an output may be exactly
_MEMBERS = {op: {p.name: p.members for p in parameters} for op, parameters in OPS.items()}
_LIKE_X = ("residual", "out", "residual_out", "k", "v", "key_cache", "value_cache", "out_q", "out_k")
_KINDS = {"integers": "i", "flags": "b"}  # as NumPy calls them; others are floats
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_NO_MEMORY = 1 << 57  # addresses from here on are nobody's: a tensor without memory gets one for its storage


def wants_gradient(op, outputs, **tensors):
    """Whether a gradient is asked for, of tensors that may be None or several. Refuses what the dispatcher could only
    refuse in words of its own; `outputs`: those that the op is told to write to. An exported program holds the op
    alone: the function around it would come with its forward pass only, which is detached."""
    wants = False
    for name, given in (tensors | outputs).items():
        several = isinstance(given, (tuple, list))
        for i, tensor in enumerate(given if several else (given,)):
            if tensor is None:
                continue
            what = f"{op}: {name}[{i}]" if several else f"{op}: {name}"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"{what} is of type {type(tensor).__qualname__}, expected a torch.Tensor: a gradient, a tensor "
                    "subclass or a transformation of torch is involved"
                )
            if not torch.compiler.is_compiling() and tensor.is_nested:
                raise TypeError(
                    f"{what} is a nested tensor, expected a dense one; call this on its to_padded_tensor(0.0), or of a "
                    "jagged one's rows on its values()"
                )
            if tensor.layout is not torch.strided:
                raise TypeError(f"{what} has layout {tensor.layout}, expected a dense tensor; pass its to_dense()")
            dtypes, expected = _DTYPES[type_of(op, name)]
            if tensor.dtype not in dtypes:
                raise TypeError(f"{what} has dtype {tensor.dtype}, expected {expected}")
            # In a graph torch resolves the mark before the op runs.
            if not torch.compiler.is_compiling() and tensor.is_neg():
                raise ValueError(
                    f"{what} is lazily negated (is_neg()): its memory holds the values with the other sign; pass its "
                    "resolve_neg()"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                wants = True
                if any(output is not None for output in outputs.values()):
                    without = f"{op.replace('fused_', '')} without {', '.join(outputs)}, or"
                    how = "it" if "key_cache" in outputs else without  # which is not to be left out
                    raise RuntimeError(
                        f"{what} requires grad and grad mode is on, but an op that is told where to write carries no "
                        f"gradients; call {how} under torch.no_grad()"
                    )
    # torch.compiler.is_exporting() is the name of it, and in torch 2.11 true of torch.compile as well.
    return wants and not getattr(torch.compiler, "_is_exporting_flag", False)


def check(op, inputs, outputs, **options):
    """Refuses what the C function refuses. Ops of a graph do so when they run, but are not told of the outputs, nor
    how weights were given; and where a tensor is, torch.compile does not know."""
    if not torch.compiler.is_compiling():
        return _check_now(op, inputs | outputs, options)
    for name, given in inputs.items():
        members = _MEMBERS[op][name]
        if isinstance(given, (tuple, list)) and len(given) != len(members):
            count = {2: "two", 3: "three"}.get(len(members))
            raise ValueError(
                f"{op}: {name} has {len(given)} members, expected one packed tensor or {count} ({', '.join(members)})"
            )
    given = {name: out for name, out in outputs.items() if out is not None}
    if "residual_out" in given and inputs["residual"] is None:
        raise ValueError(f"{op}: residual_out was given without a residual")
    for name, out in given.items():
        for other, tensor in (inputs | given).items():
            if out is tensor and name != other and other not in _IN_PLACE.get(op, ()):
                raise ValueError(f"{op}: {name} overlaps {other}; pass memory of its own")


def written(op, name, out, result):
    """`result`, written to `out` where that is given."""
    if out is None:
        return result
    if out.dtype != result.dtype:
        why = " (the dtype of x)" if result.is_floating_point() else ""
        raise TypeError(f"{op}: {name} is {out.dtype}, expected {result.dtype}{why}")
    if (out.shape, out.device) != (result.shape, result.device):
        raise ValueError(
            f"{op}: {name} is {list(out.shape)} on {out.device}, expected {list(result.shape)} on {result.device}"
        )
    out.copy_(result)
    return out


# ---- stand-ins, for tensors that may have no memory -----------------------------------------------------------------


class _Unknown(Exception):
    """A size is a symbol: the call is checked when it runs."""


class _Place:
    """For NumPy: an array that is said to be there."""

    def __init__(self, address, shape, strides, itemsize, kind):
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"<{kind}{itemsize}",
            "data": (address, False),
            "shape": shape,
            "strides": tuple(stride * itemsize for stride in strides),
        }


def _contiguous(shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides[: len(shape)])


def _place(name, tensor, storages):
    """(address, shape, strides, itemsize). A storage without memory gets an address of its own."""
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    try:
        storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    except (NotImplementedError, RuntimeError):  # inside torch.vmap: the op will get rows that are contiguous
        base = storages.setdefault(id(tensor), (len(storages) + 1) * _NO_MEMORY)
        return base, shape, strides if name in ("qkv_weight", "gate_up_weight") else _contiguous(shape), itemsize
    base = 0
    if type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:  # a fake tensor would warn
        try:
            base = storage.data_ptr()
        except RuntimeError:  # inside torch.func.functionalize
            base = 0
    base = base or storages.setdefault(storage._cdata, (len(storages) + 1) * _NO_MEMORY)
    return base + offset * itemsize, shape, strides, itemsize


def _stand_in(numpy, kind, address, shape, strides, itemsize):
    if not all(type(number) is int for number in (address, *shape, *strides)):
        raise _Unknown
    return numpy.asarray(_Place(address, shape, strides, itemsize, kind))


def _kind(op, name):
    """Of the numbers of an argument, as NumPy calls it. What works in place has outputs of its own."""
    return _KINDS.get(type_of(op.replace("fused_", ""), name), "f")


def _check_like(op, name, tensor, first, x):
    """Dtype and device, which a stand-in does not have. first: the name of x."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device} (where {first} is)")
    if _kind(op, name.partition("[")[0]) != "f":
        return
    if tensor.dtype != x.dtype and (name in _LIKE_X or tensor.dtype != torch.float32):
        also = "" if name in _LIKE_X or x.dtype == torch.float32 else " or float32"
        raise TypeError(
            f"{op}: {name} is {_name(tensor.dtype)}, expected {_name(x.dtype)} (the dtype of {first}){also}"
        )


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _check_now(op, tensors, options):
    """`check` where tensors have memory. tensors: by argument, x first. Names of kernels are left to the device that
    has them."""
    if isinstance(options.get("kernel"), str):
        options["kernel"] = None
    first, x = next(iter(tensors.items()))
    with torch._C.DisableTorchFunctionSubclass():
        for name, given in tensors.items():
            several = isinstance(given, (tuple, list))
            for i, tensor in enumerate(given if several else (given,)):
                if tensor is not None:
                    _check_like(op, f"{name}[{i}]" if several else name, tensor, first, x)
    if not _is_right(op, tensors, options):
        _check_stand_ins(op, tensors, options)


def _plan(op, tensors, options):
    return _C._plan(op.replace("fused_", ""), -1, **tensors, **options)


def _is_right(op, tensors, options):
    """Whether the tensors are ordinary ones, and right: this is quick. If not, the stand-ins tell why."""
    flat = [
        tensor for given in tensors.values() for tensor in (given if isinstance(given, (tuple, list)) else (given,))
    ]
    if not all(tensor is None or type(tensor) in _ORDINARY for tensor in flat):
        return False
    try:
        with torch.no_grad():
            _plan(op, tensors, options)
    except (TypeError, ValueError, BufferError):
        return False
    return True


def _check_stand_ins(op, tensors, options):
    import numpy

    storages, stand_ins = {}, {}
    try:
        with torch._C.DisableTorchFunctionSubclass():
            for name, given in tensors.items():
                several, kind = isinstance(given, (tuple, list)), _kind(op, name)
                made = [
                    None if tensor is None else _stand_in(numpy, kind, *_place(name, tensor, storages))
                    for tensor in (given if several else (given,))
                ]
                stand_ins[name] = made if several else made[0]
    except _Unknown:
        return
    try:
        _plan(op, stand_ins, options)
    except (TypeError, ValueError) as refusal:
        raise type(refusal)(str(refusal).replace(op.replace("fused_", ""), op, 1)) from None
