"""One face for every framework, so that one test body serves all of them.

A test's own currency is the float64 NumPy array whose values a dtype ("f32", "f16", "bf16") can represent. A framework turns it into
its tensor, and `to_float64` turns any tensor back.
"""

import functools
import importlib
import os

import numpy as np
import pytest

import minivllm

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU from the others


@functools.cache
def optional(module: str):
    """The module, or None; a module that is there but broken counts as missing, and the reason is kept in `why_missing`."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 -- a broken framework raises anything
        why_missing[module] = f"{module} does not import: {error}"
        return None


why_missing: dict[str, str] = {}


class NumPy:
    """NumPy on the CPU; bfloat16 is that of ml_dtypes."""

    name, device = "numpy", "cpu"

    def dtype(self, dtype: str):
        if dtype == "bf16":
            return np.dtype(optional("ml_dtypes").bfloat16)
        return np.dtype({"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}[dtype])

    def why_not(self, dtype: str = "f32"):
        if dtype == "bf16" and optional("ml_dtypes") is None:
            return why_missing["ml_dtypes"]
        return None

    def tensor(self, values, dtype: str):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(np.asarray(values, np.float64).astype(self.dtype(dtype)))

    def integers(self, values, wide: bool):
        return np.array(values, np.int64 if wide else np.int32)

    def flags(self, values):
        return np.array(values, np.bool_)

    def full(self, shape, value: float, dtype: str):
        return np.full(shape, value, self.dtype(dtype))

    def strided(self, buffer, shape, strides, offset: int = 0):
        """A view into a flat tensor; strides and offset in elements."""
        return np.ndarray(
            shape,
            buffer.dtype,
            buffer=buffer,
            offset=offset * buffer.itemsize,
            strides=[s * buffer.itemsize for s in strides],
        )

    def is_mine(self, tensor) -> bool:
        return type(tensor) is np.ndarray

    def pointer(self, tensor) -> int:
        return tensor.ctypes.data

    def strides(self, tensor):
        return tuple(s // tensor.itemsize for s in tensor.strides)

    def synchronize(self):
        pass


class Torch:
    """torch on one device."""

    name = "torch"

    def __init__(self, device: str):
        self.device = device

    @property
    def torch(self):
        return optional("torch")

    def dtype(self, dtype: str):
        names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i32": "int32", "i64": "int64"}
        return getattr(self.torch, names[dtype])

    def why_not(self, dtype: str = "f32"):
        if self.torch is None:
            return why_missing["torch"]
        if self.device == "cuda" and not self.torch.cuda.is_available():
            return "torch sees no GPU"
        return None

    def tensor(self, values, dtype: str):
        values = np.ascontiguousarray(values, np.float64)
        return self.torch.from_numpy(values.copy()).to(self.device).to(self.dtype(dtype))

    def integers(self, values, wide: bool):
        return self.torch.tensor(values, dtype=self.torch.int64 if wide else self.torch.int32, device=self.device)

    def flags(self, values):
        return self.torch.tensor(values, dtype=self.torch.bool, device=self.device)

    def full(self, shape, value: float, dtype: str):
        return self.torch.full(shape, value, dtype=self.dtype(dtype), device=self.device)

    def strided(self, buffer, shape, strides, offset: int = 0):
        return self.torch.as_strided(buffer, shape, strides, offset)

    def is_mine(self, tensor) -> bool:
        return type(tensor) is self.torch.Tensor

    def pointer(self, tensor) -> int:
        return tensor.data_ptr()

    def strides(self, tensor):
        return tensor.stride()

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class CuPy:
    name, device = "cupy", "cuda"

    def why_not(self, dtype: str = "f32"):
        cupy = optional("cupy")
        if cupy is None:
            return why_missing["cupy"]
        if dtype == "bf16":
            return "CuPy has no bfloat16 of its own"
        return None

    def integers(self, values, wide: bool):
        return optional("cupy").asarray(NumPy().integers(values, wide))

    def flags(self, values):
        return optional("cupy").asarray(NumPy().flags(values))

    def tensor(self, values, dtype: str):
        return optional("cupy").asarray(NumPy().tensor(values, dtype))

    def is_mine(self, tensor) -> bool:
        return type(tensor) is optional("cupy").ndarray

    def synchronize(self):
        optional("cupy").cuda.get_current_stream().synchronize()


class JAX:
    """JAX arrays, eagerly."""

    name = "jax"

    def __init__(self, device: str):
        self.device = device

    def _platform(self):
        jax = optional("jax")
        return jax.devices("cpu" if self.device == "cpu" else "gpu")[0]

    def why_not(self, dtype: str = "f32"):
        if optional("jax") is None:
            return why_missing["jax"]
        try:
            self._platform()
        except RuntimeError as error:
            return f"JAX has no {self.device} backend: {error}"
        return None

    def tensor(self, values, dtype: str):
        return optional("jax").device_put(NumPy().tensor(values, dtype), self._platform())

    def is_mine(self, tensor) -> bool:
        return isinstance(tensor, optional("jax").Array)

    def synchronize(self):
        pass


class DeviceArray:
    """minivllm's own buffer."""

    name, device = "DeviceArray", "cuda"

    def why_not(self, dtype: str = "f32"):
        return NumPy().why_not(dtype)

    def tensor(self, values, dtype: str):
        import minivllm

        return minivllm.to_device(NumPy().tensor(values, dtype))

    def integers(self, values, wide: bool):
        return minivllm.to_device(NumPy().integers(values, wide))

    def flags(self, values):
        return minivllm.to_device(NumPy().flags(values))

    def is_mine(self, tensor) -> bool:
        import minivllm

        return type(tensor) is minivllm.DeviceArray

    def synchronize(self):
        pass


NUMPY = NumPy()
TORCH_CPU = Torch("cpu")
TORCH_CUDA = Torch("cuda")
ALL = (NUMPY, TORCH_CPU, JAX("cpu"), TORCH_CUDA, CuPy(), JAX("cuda"), DeviceArray())
FRAMEWORKS = [
    pytest.param(
        framework,
        id=f"{framework.name}-{framework.device}",
        marks=[pytest.mark.gpu] if framework.device == "cuda" else [],
    )
    for framework in ALL
]


def need(framework, dtype: str):
    """Skips the test where the framework is missing or lacks the dtype."""
    if reason := framework.why_not(dtype):
        pytest.skip(reason)


def native(device: str):
    """The framework in which tests of a device are written when the framework does not matter."""
    return NUMPY if device == "cpu" else TORCH_CUDA


def hopper_dtype(dtype: str, kernel: str) -> str:
    """dtype, where torch has a Hopper GPU and this build the kernel `<dtype>_<kernel>` for it; skips the test elsewhere."""
    if reason := TORCH_CUDA.why_not(dtype):
        pytest.skip(reason)
    if not any(row.usable and row.name == f"{dtype}_{kernel}" for row in minivllm.kernels()):
        pytest.skip("the kernel needs compute capability 9.0")
    return dtype
