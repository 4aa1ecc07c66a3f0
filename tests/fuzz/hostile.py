"""Objects that are no honest tensors, and values that no argument takes: how each is made of an array that would do, and
what an op must answer.

FINE: the same result as for the array itself. A tuple of exceptions: one of them, with the op's name in it. ANY: a
result, or what an op documents.
"""

import gc
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from dlpack import BFLOAT, CPU, IS_COPIED, READ_ONLY, Exporter, new_capsule

import minivllm

FINE, ANY = "fine", "any"
REFUSED = (TypeError, ValueError, BufferError)
BUFFER, TYPE, VALUE = (BufferError,), (TypeError,), (ValueError,)
NO_GPU = (RuntimeError, ValueError, BufferError)


class Own(Exception):
    """Raised inside of protocol methods."""


class Stop(BaseException):
    """As KeyboardInterrupt is: nothing may swallow it."""


class Kind(NamedTuple):
    make: Callable  # (array, again) -> object; again() makes the whole call with good arguments
    answer: object  # for an input; an output is held to `answer` or REFUSED
    for_output: object = None


def exported(array, **options):
    """Whatever the dtype: NumPy itself knows no bfloat16."""
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return Exporter(array.view(np.uint16), **({"dtype": (BFLOAT, 16, 1)} | options))
    return Exporter(array, **options)


def spoilt(array, field, value, **options):
    """A DLPack tensor with one field of its own choice."""
    exporter = exported(array, **options)
    setattr(exporter.managed.tensor, field, value)
    return exporter


def shaped(array, shape, strides=None):
    """A DLPack tensor that claims this shape."""
    exporter = exported(array)
    n = len(shape)
    exporter.shape, exporter.strides = (type(exporter.shape)._type_ * n)(*shape), None
    exporter.managed.tensor.shape, exporter.managed.tensor.ndim = exporter.shape, n
    if strides is not None:
        exporter.strides = (type(exporter.shape)._type_ * n)(*strides)
    exporter.managed.tensor.strides = exporter.strides
    return exporter


class Speaking:
    """__dlpack__ and __dlpack_device__ that do what they are told."""

    def __init__(self, array, dlpack=None, device=None):
        self.exporter = exported(array)
        self.says = dlpack or (lambda: self.exporter._export())
        self.device = device or (lambda: (CPU, 0))

    def __dlpack__(self, **options):
        return self.says()

    def __dlpack_device__(self):
        return self.device()


def raising(error):
    def act(*_, **__):
        raise error

    return act


def calls_again(array, again):
    """Re-entrance: the op runs inside of its own reading of an argument."""
    speaking = Speaking(array)

    def act():
        again()
        gc.collect()
        minivllm.set_num_threads(1)
        return speaking.exporter._export()

    speaking.says = act
    return speaking


def calls_itself(array, again):
    """An export that never ends."""
    speaking = Speaking(array)
    speaking.says = lambda: minivllm.rms_norm(speaking, np.ones(array.shape[-1:], np.float32))
    return speaking


def capsule(array, name):
    speaking = Speaking(array)
    keep = np.zeros(64, np.uint64)
    speaking.says = lambda: (keep, new_capsule(keep.ctypes.data, name, None))[1]
    return speaking


def consumed(array, again):
    """The same capsule each time: at the second it is used up."""
    speaking = Speaking(array)
    once = speaking.exporter._export()
    minivllm.rms_norm(Speaking(array, lambda: once), np.ones(array.shape[-1:], np.float32))
    speaking.says = lambda: once
    return speaking


class CudaArray:
    def __init__(self, interface):
        self.__cuda_array_interface__ = interface


class RaisingProperty:
    def __getattr__(self, name):
        raise Own(name)

    @property
    def __cuda_array_interface__(self):
        raise Own("__cuda_array_interface__")

    @property
    def __dlpack__(self):
        raise Own("__dlpack__")


def interface(array, **changes):
    typestr = {4: "<f4", 2: "<f2"}[array.itemsize]
    honest = {"shape": array.shape, "typestr": typestr, "data": (array.ctypes.data, False), "version": 3,
              "strides": array.strides, "stream": None}  # fmt: skip
    held = {name: value for name, value in (honest | changes).items() if value is not Ellipsis}
    return CudaArray(held)


def shape_that_deletes(array):
    """While its sizes are read, strides leaves the dict."""
    made = interface(array, strides=tuple(int(s) for s in array.strides))

    class Shape(tuple):
        def __iter__(self):
            made.__cuda_array_interface__.pop("strides", None)
            gc.collect()
            return super().__iter__()

    class Size:
        def __init__(self, size):
            self.size = size

        def __index__(self):
            made.__cuda_array_interface__.clear()
            gc.collect()
            return self.size

    made.__cuda_array_interface__["shape"] = Shape(Size(n) for n in array.shape)
    return made


class Interface:
    """__array_interface__ alone is no protocol that an op reads."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


class TorchFunction:
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        raise Own("__torch_function__")


def subclassed(array, **members):
    return array.view(type("Lying", (np.ndarray,), members))


def misaligned(array, _):
    raw = np.zeros(array.nbytes + 8, np.uint8)
    return raw[1 : 1 + array.nbytes].view(array.dtype).reshape(array.shape)


def fields(array, _):
    """Strides that are no multiple of an element."""
    record = np.zeros(array.shape, [("value", array.dtype), ("odd", np.uint8)])
    return record["value"]


def read_only(array, _):
    array.flags.writeable = False
    return array


def as_type(dtype):
    return lambda array, _: np.ones(array.shape, dtype)


def swapped(array, _):
    return np.ones(array.shape, np.dtype(np.float32).newbyteorder())


HUGE = 2**62
TENSORS = {
    # DLPack that is fine
    "dlpack": Kind(lambda a, _: exported(a), FINE),
    "dlpack, legacy": Kind(lambda a, _: exported(a, versioned=False), FINE),
    "dlpack, no strides": Kind(lambda a, _: exported(a, strides="null"), FINE),
    "dlpack, no deleter": Kind(lambda a, _: exported(a, deleter=False), FINE),
    "dlpack, pinned": Kind(lambda a, _: exported(a, device=(3, 0)), FINE),
    "dlpack, minor 99": Kind(lambda a, _: _minor(a), FINE),
    "dlpack, read-only": Kind(lambda a, _: exported(a, flags=READ_ONLY), FINE, VALUE),
    "dlpack, a copy": Kind(lambda a, _: exported(a, flags=IS_COPIED), FINE, VALUE),
    "dlpack, calls again": Kind(calls_again, FINE),
    "dlpack, a device as a list": Kind(lambda a, _: Speaking(a, device=lambda: [CPU, 0]), FINE),
    # and DLPack that is not
    "dlpack, used": Kind(lambda a, _: exported(a, name=b"used_dltensor"), BUFFER),
    "dlpack, other name": Kind(lambda a, _: capsule(a, b"nonsense"), BUFFER),
    "dlpack, no name": Kind(lambda a, _: capsule(a, None), BUFFER),
    "dlpack, consumed": Kind(consumed, REFUSED),
    "dlpack, major 2": Kind(lambda a, _: exported(a, major=2), BUFFER),
    "dlpack, major 0": Kind(lambda a, _: exported(a, major=0), BUFFER),
    "dlpack, no data": Kind(lambda a, _: exported(a, null_data=True), BUFFER),
    "dlpack, no shape": Kind(lambda a, _: spoilt(a, "shape", None), REFUSED),
    "dlpack, no shape, no strides": Kind(lambda a, _: spoilt(a, "shape", None, strides="null"), REFUSED),
    "dlpack, ndim -1": Kind(lambda a, _: spoilt(a, "ndim", -1), REFUSED),
    "dlpack, ndim lowest": Kind(lambda a, _: spoilt(a, "ndim", -(2**31)), REFUSED),
    "dlpack, ndim 65": Kind(lambda a, _: spoilt(a, "ndim", 65), REFUSED),
    "dlpack, ndim largest": Kind(lambda a, _: spoilt(a, "ndim", 2**31 - 1), REFUSED),
    "dlpack, negative size": Kind(lambda a, _: shaped(a, (-1,) * a.ndim), REFUSED),
    "dlpack, one huge size": Kind(lambda a, _: shaped(a, (*a.shape[:-1], 2**63 - 1)), REFUSED),
    "dlpack, huge sizes": Kind(lambda a, _: shaped(a, (2**32,) * max(a.ndim, 2)), REFUSED),
    "dlpack, span past 64 bits": Kind(lambda a, _: shaped(a, (3, *a.shape), (HUGE, *_strides(a))), REFUSED),
    "dlpack, span below": Kind(lambda a, _: shaped(a, (3, *a.shape), (-HUGE - 1, *_strides(a))), REFUSED),
    "dlpack, lowest stride": Kind(lambda a, _: shaped(a, (2, *a.shape), (-(2**63), *_strides(a))), REFUSED),
    "dlpack, odd address": Kind(lambda a, _: spoilt(a, "byte_offset", 1), VALUE),
    "dlpack, lanes 0": Kind(lambda a, _: spoilt(a, "lanes", 0), TYPE),
    "dlpack, lanes 4": Kind(lambda a, _: spoilt(a, "lanes", 4), TYPE),
    "dlpack, bits 0": Kind(lambda a, _: spoilt(a, "bits", 0), TYPE),
    "dlpack, code 255": Kind(lambda a, _: spoilt(a, "code", 255), TYPE),
    "dlpack, integers": Kind(lambda a, _: spoilt(a, "code", 0), TYPE),
    "dlpack, device 0": Kind(lambda a, _: exported(a, device=(0, 0)), VALUE),
    "dlpack, device -1": Kind(lambda a, _: exported(a, device=(-1, -1)), VALUE),
    "dlpack, device metal": Kind(lambda a, _: exported(a, device=(8, 0)), VALUE),
    "dlpack, on no GPU": Kind(lambda a, _: exported(a, device=(2, 77)), NO_GPU),
    "dlpack, None": Kind(lambda a, _: Speaking(a, lambda: None), BUFFER),
    "dlpack, a number": Kind(lambda a, _: Speaking(a, lambda: 2**80), BUFFER),
    "dlpack, itself": Kind(lambda a, _: Speaking(a, lambda: a), BUFFER),
    "dlpack raises": Kind(lambda a, _: Speaking(a, raising(Own("dlpack"))), BUFFER),
    "dlpack raises TypeError": Kind(lambda a, _: Speaking(a, raising(TypeError("never"))), BUFFER),
    "dlpack raises an empty message": Kind(lambda a, _: Speaking(a, raising(Own())), BUFFER),
    "dlpack raises lines": Kind(lambda a, _: Speaking(a, raising(Own("\n\0\ud800\n" * 9))), BUFFER),
    "dlpack stops": Kind(lambda a, _: Speaking(a, raising(Stop())), (Stop,)),
    "dlpack has no memory": Kind(lambda a, _: Speaking(a, raising(MemoryError())), (MemoryError,)),
    "dlpack calls itself": Kind(calls_itself, (RecursionError, BufferError)),
    "dlpack device raises": Kind(lambda a, _: Speaking(a, device=raising(Own("device"))), BUFFER),
    "dlpack device stops": Kind(lambda a, _: Speaking(a, device=raising(Stop())), (Stop,)),
    "dlpack device None": Kind(lambda a, _: Speaking(a, device=lambda: None), BUFFER),
    "dlpack device of one": Kind(lambda a, _: Speaking(a, device=lambda: (1,)), BUFFER),
    "dlpack device text": Kind(lambda a, _: Speaking(a, device=lambda: "12"), BUFFER),
    "dlpack device huge": Kind(lambda a, _: Speaking(a, device=lambda: (2**80, 0)), BUFFER),
    # the CUDA array interface, where no pointer is one of a GPU
    "cuda array": Kind(lambda a, _: interface(a), (*REFUSED, RuntimeError)),
    "cuda array, nothing": Kind(lambda a, _: CudaArray({}), REFUSED),
    "cuda array, no dict": Kind(lambda a, _: CudaArray([1]), REFUSED),
    "cuda array, no shape": Kind(lambda a, _: interface(a, shape=...), REFUSED),
    "cuda array, shape a number": Kind(lambda a, _: interface(a, shape=3), REFUSED),
    "cuda array, shape of text": Kind(lambda a, _: interface(a, shape=("a",) * a.ndim), REFUSED),
    "cuda array, shape huge": Kind(lambda a, _: interface(a, shape=(2**80,) * a.ndim), REFUSED),
    "cuda array, shape negative": Kind(lambda a, _: interface(a, shape=(-3,) * a.ndim), REFUSED),
    "cuda array, many dimensions": Kind(lambda a, _: interface(a, shape=(1,) * 99), REFUSED),
    "cuda array, shape that deletes": Kind(lambda a, _: shape_that_deletes(a), (*REFUSED, RuntimeError)),
    "cuda array, strides a number": Kind(lambda a, _: interface(a, strides=3), REFUSED),
    "cuda array, strides too few": Kind(lambda a, _: interface(a, strides=()), REFUSED),
    "cuda array, strides of objects": Kind(lambda a, _: interface(a, strides=(object(),) * a.ndim), REFUSED),
    "cuda array, strides odd": Kind(lambda a, _: interface(a, shape=(2, 3), strides=(7, 1)), REFUSED),
    "cuda array, typestr": Kind(lambda a, _: interface(a, typestr=">f4"), REFUSED),
    "cuda array, typestr None": Kind(lambda a, _: interface(a, typestr=None), REFUSED),
    "cuda array, typestr surrogate": Kind(lambda a, _: interface(a, typestr="\ud800"), REFUSED),
    "cuda array, data": Kind(lambda a, _: interface(a, data=3), REFUSED),
    "cuda array, data of text": Kind(lambda a, _: interface(a, data=("p", "q")), REFUSED),
    "cuda array, data huge": Kind(lambda a, _: interface(a, data=(2**99, False)), REFUSED),
    "cuda array, null": Kind(lambda a, _: interface(a, data=(0, False)), REFUSED),
    "cuda array, stream": Kind(lambda a, _: interface(a, stream="s"), (*REFUSED, RuntimeError)),
    "cuda array, stream 0": Kind(lambda a, _: interface(a, stream=0), (*REFUSED, RuntimeError)),
    "cuda array, masked": Kind(lambda a, _: interface(a, mask=a), REFUSED),
    "properties raise": Kind(lambda a, _: RaisingProperty(), (*REFUSED, Own)),
    # NumPy
    "a subclass": Kind(lambda a, _: subclassed(a), FINE),
    "no array struct": Kind(lambda a, _: subclassed(a, __array_struct__=None), BUFFER),
    "array struct a number": Kind(lambda a, _: subclassed(a, __array_struct__=5), BUFFER),
    "array struct raises": Kind(lambda a, _: subclassed(a, __array_struct__=property(raising(Own()))), BUFFER),
    "array struct stops": Kind(lambda a, _: subclassed(a, __array_struct__=property(raising(Stop()))), (Stop,)),
    "masked": Kind(lambda a, _: np.ma.masked_array(a), TYPE),
    "read-only": Kind(read_only, FINE, VALUE),
    "misaligned": Kind(misaligned, VALUE),
    "odd strides": Kind(fields, VALUE),
    "byte-swapped": Kind(swapped, TYPE),
    "float64": Kind(as_type(np.float64), TYPE),
    "integers": Kind(as_type(np.int32), TYPE),
    "booleans": Kind(as_type(bool), TYPE),
    "complex": Kind(as_type(np.complex64), TYPE),
    "objects": Kind(as_type(object), TYPE),
    "text": Kind(as_type("U3"), TYPE),
    "records": Kind(as_type([("a", np.float32)]), TYPE),
    "bytes of two": Kind(as_type("V2"), TYPE),
    "no dimensions": Kind(lambda a, _: np.float32(1.0), REFUSED),
    "many dimensions": Kind(lambda a, _: a.reshape((1,) * 40 + a.shape), ANY),
    "empty": Kind(lambda a, _: np.zeros((0,) * a.ndim, a.dtype), REFUSED),
    # no tensors at all
    "array interface": Kind(lambda a, _: Interface(a), TYPE),
    "torch function": Kind(lambda a, _: TorchFunction(), TYPE),
    "a type": Kind(lambda a, _: np.ndarray, TYPE),
    "a number": Kind(lambda a, _: 3, TYPE),
    "text of one": Kind(lambda a, _: "x", TYPE),
    "a list": Kind(lambda a, _: a.tolist(), REFUSED),
    "bytes": Kind(lambda a, _: a.tobytes(), TYPE),
    "an object": Kind(lambda a, _: object(), TYPE),
}


def _minor(array):
    exporter = exported(array)
    exporter.managed.minor = 99
    return exporter


def _strides(array):
    return [stride // array.itemsize for stride in array.strides]
