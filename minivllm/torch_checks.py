"""What the C functions refuse, refused where torch takes part in a call: before it is dispatched.

From there on an op may meet tensors without memory, or none of the outputs that it is told to write to. So the call is
planned, as the C function would, with stand-ins: arrays of the same shapes, strides and places, which nobody touches.
"""

import torch

from . import _C
from .signatures import type_of

_LIKE_X = ("residual", "out", "residual_out", "k", "v", "key_cache", "value_cache", "out_q", "out_k")
_KINDS = {"integers": "i", "flags": "b"}  # as NumPy calls them; others are floats
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_NO_MEMORY = 1 << 57  # addresses from here on are nobody's: a tensor without memory gets one for its storage


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


def check(op, tensors, **options):
    """Refuses what minivllm.<op> refuses. tensors: by argument, a torch.Tensor, several, or None; x comes first.
    Names of kernels are left to the device that has them."""
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
