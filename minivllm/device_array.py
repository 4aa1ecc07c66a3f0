"""DeviceArray: a minimal buffer on a GPU, for people who have NumPy and a GPU and nothing else.

It computes nothing. It goes in and out of NumPy, is an argument and a result of every op, and speaks DLPack and the
CUDA array interface to everybody else. All its work, memory included, is ordered on its GPU's legacy default stream.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from . import _C

if TYPE_CHECKING:
    import numpy

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "bool": 1}
_KIND = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "int64": "<i8", "bool": "|b1"}  # as NumPy calls them
_CUDA = 2  # DLPack's number for it


class DeviceArray:
    """An array on a GPU, made by `empty`, `to_device`, `DeviceArray.from_dlpack`, or an op.

    shape: a tuple of int. dtype: "float32", "float16" or "bfloat16", and "int32", "int64" or "bool" where an op takes
    or gives those. device: such as "cuda:0".
    """

    shape: tuple[int, ...]
    dtype: str
    __slots__ = ("__weakref__", "_index", "_memory", "_pointer", "_strides", "dtype", "shape")

    def __init__(
        self, memory: object, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, index: int
    ) -> None:
        self._memory = memory  # keeps the bytes; views share it
        self._pointer = pointer
        self._strides = strides  # in elements
        self._index = index  # of the GPU
        self.shape = shape
        self.dtype = dtype

    @property
    def device(self) -> str:
        return f"cuda:{self._index}"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps between them."""
        return _product(self.shape) * _ITEMSIZE[self.dtype]

    @classmethod
    def from_dlpack(cls, array: Any) -> DeviceArray:
        """A DeviceArray over the memory of any tensor on a GPU, without a copy. ValueError for one on the CPU."""
        pointer, shape, strides, dtype, device, _, keeper = _C._view(array)
        if not device.startswith("cuda:"):
            raise ValueError(f"DeviceArray.from_dlpack: array is on {device}, expected a GPU; use to_device")
        return cls(keeper, pointer, shape, strides, dtype, _index_of(device, "DeviceArray.from_dlpack"))

    def numpy(self) -> numpy.ndarray[Any, Any]:
        """A NumPy copy; waits for the GPU. bfloat16 comes back as ml_dtypes.bfloat16 where ml_dtypes is installed, else
        as float32 with the same values."""
        import numpy

        bits = _bits_of(self.dtype)
        if 0 in self.shape:
            return _from_bits(numpy.empty(self.shape, bits), self.dtype)
        reach = [(size - 1) * stride for size, stride in zip(self.shape, self._strides, strict=True)]
        before = -sum(min(r, 0) for r in reach)  # elements in front of the first one, by negative strides
        span = numpy.empty(before + sum(max(r, 0) for r in reach) + 1, bits)
        _C._copy_to_host(self._index, self._pointer - before * span.itemsize, span, 0)
        byte_strides = [stride * span.itemsize for stride in self._strides]
        view = numpy.lib.stride_tricks.as_strided(span[before:], self.shape, byte_strides)
        return _from_bits(numpy.array(view, order="C"), self.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA, self._index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """stream: that of the consumer, which is made to wait for this array (None and 1: the legacy default stream, 2:
        that of the thread, -1: no waiting). BufferError where a copy or another device is asked for."""
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"DeviceArray is on {self.device}, and is not copied to device {dl_device}; use numpy()")
        if copy:
            raise BufferError("DeviceArray is exported without a copy: copy=True cannot be served")
        if stream not in (None, -1, 1):
            if stream == 0:
                raise ValueError("stream 0 is ambiguous, expected None or 1 (legacy default stream) or 2 (per thread)")
            _C._stream_wait(self._index, stream, 0)
        versioned = max_version is not None and max_version[0] >= 1
        return _C._to_dlpack(self, self._index, self._pointer, self.dtype, self.shape, self._strides, versioned)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == "bfloat16":
            raise AttributeError("the CUDA array interface has no bfloat16: use __dlpack__")
        itemsize = _ITEMSIZE[self.dtype]
        return {
            "shape": self.shape,
            "typestr": _KIND[self.dtype],
            "data": (0 if 0 in self.shape else self._pointer, False),
            "strides": tuple(stride * itemsize for stride in self._strides),
            "version": 3,
            "stream": 1,
        }

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype!r}, device={self.device!r})"

    def _split_heads(self, *counts_and_head_dim):
        """Views of the packed q | k | v, [..., heads, head_dim] or [..., heads * head_dim]."""
        *counts, head_dim = counts_and_head_dim
        lead = self.ndim - (2 if self.shape[-1] == head_dim else 1)
        strides = (*self._strides[:lead], head_dim, 1)
        first = self._pointer
        parts = []
        for count in counts:
            shape = (*self.shape[:lead], count, head_dim)
            parts.append(DeviceArray(self._memory, first, shape, strides, self.dtype, self._index))
            first += count * head_dim * _ITEMSIZE[self.dtype]
        return tuple(parts)


def empty(
    shape: SupportsIndex | Sequence[SupportsIndex], dtype: Any = "float32", device: object = "cuda:0"
) -> DeviceArray:
    """A new C-contiguous DeviceArray, not initialised. dtype: "float32", "float16", "bfloat16", "int32", "int64" or
    "bool"."""
    return _new(_shape_of(shape), _dtype_of(dtype, "empty"), _index_of(device, "empty"), "empty")


def _new(shape, dtype, index, function):
    try:
        memory = _C._allocate(index, _product(shape) * _ITEMSIZE[dtype])
    except OverflowError:
        raise MemoryError(f"{function}: an array of shape {shape} is larger than any memory") from None
    except (RuntimeError, MemoryError) as error:
        raise type(error)(f"{function}: {error}") from None
    strides = tuple(_product(shape[d + 1 :]) for d in range(len(shape)))
    return DeviceArray(memory, _C._address(memory), shape, strides, dtype, index)


def to_device(
    array: Any, device: object = "cuda:0", dtype: Any = None, stream: SupportsIndex | None = None
) -> DeviceArray:
    """A copy of `array` on a GPU, as a DeviceArray.

    array: anything that numpy.asarray takes, a DeviceArray, or any framework's tensor on a GPU; the last two come by
    way of the host (DeviceArray.from_dlpack shares their memory instead).

    dtype: that of `array` unless given; a conversion rounds to nearest, ties to even. stream: the handle of a CUDA
    stream to copy on, which the legacy default stream then waits for. The host memory is free again on return.
    """
    import numpy

    if _is_on_gpu(array):
        array = DeviceArray.from_dlpack(array)
    if isinstance(array, DeviceArray):
        dtype = array.dtype if dtype is None else dtype
        array = array.numpy()
    array = numpy.asarray(array)
    if dtype is None and array.dtype.name not in _ITEMSIZE:
        raise TypeError(f"to_device: array has dtype {array.dtype}, expected {', '.join(_ITEMSIZE)}; pass dtype=")
    dtype = _dtype_of(array.dtype.name if dtype is None else dtype, "to_device")
    result = _new(array.shape, dtype, _index_of(device, "to_device"), "to_device")
    stream = 0 if stream is None else operator.index(stream)
    if stream:
        _C._stream_wait(result._index, stream, 0)  # the memory is there
    _C._copy_from_host(result._index, result._pointer, _to_bits(array, dtype), stream)
    if stream:
        _C._stream_wait(result._index, 0, stream)
    return result


def _is_on_gpu(array):
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[0] == _CUDA
    return hasattr(array, "__cuda_array_interface__")


def _bits_of(dtype):
    """The unsigned integer of the width of `dtype`."""
    import numpy

    return numpy.dtype(f"u{_ITEMSIZE[dtype]}")


def _to_bits(array, dtype):
    """The elements as C-contiguous unsigned integers of the width of `dtype`."""
    import numpy

    if dtype != "bfloat16" or array.dtype.name == dtype:
        array = numpy.ascontiguousarray(array, array.dtype.newbyteorder("=") if dtype == "bfloat16" else dtype)
        return array.reshape(-1).view(_bits_of(dtype))
    # To float32 first, rounding to odd: an inexact value keeps its lowest bit set, so that rounding again cannot take
    # it for a tie (Boldo and Melquiond, 2008).
    with numpy.errstate(over="ignore", invalid="ignore"):  # signalling NaNs
        exact = numpy.ascontiguousarray(array, numpy.float64).reshape(-1)
        single = exact.astype(numpy.float32)
    away = numpy.abs(single) > numpy.abs(exact)
    bits = single.view(numpy.uint32) - away
    bits |= single != exact
    is_nan = numpy.isnan(exact)
    bits = numpy.where(is_nan, numpy.uint32(0x7FC00000), bits + 0x7FFF + ((bits >> 16) & 1))
    return (bits >> 16).astype(numpy.uint16)


def _from_bits(bits, dtype):
    """The opposite, but for bfloat16 without ml_dtypes: then float32."""
    import importlib.util

    import numpy

    if dtype != "bfloat16":
        return bits.view(dtype)
    if importlib.util.find_spec("ml_dtypes"):
        import ml_dtypes

        return bits.view(ml_dtypes.bfloat16)
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _shape_of(shape):
    try:
        sizes = tuple(map(operator.index, (shape,) if hasattr(shape, "__index__") else shape))
    except TypeError:
        raise TypeError(f"empty: shape is {shape!r}, expected an integer or a sequence of integers") from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"empty: shape is {sizes}, expected sizes >= 0")
    return sizes


def _dtype_of(dtype, function):
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
    if name not in _ITEMSIZE:
        raise TypeError(f"{function}: dtype is {dtype!r}, expected {', '.join(_ITEMSIZE)}")
    return name


def _index_of(device, function):
    kind, _, index = str(device).partition(":")
    if kind != "cuda" or not (index or "0").isdecimal() or int(index or 0) >= 2**31:
        raise ValueError(f"{function}: device is {device!r}, expected 'cuda' or 'cuda:<index>'")
    return int(index or 0)
