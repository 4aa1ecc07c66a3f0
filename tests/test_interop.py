"""Tensors in and out: every framework, every protocol, and what exporters get wrong."""

import gc
import sys
import weakref

import numpy as np
import pytest
from cases import CANARY, assert_same_bits, normal
from checks import QKV, expect_qkv, weight_data
from dlpack import BFLOAT, CPU, FLOAT, IS_COPIED, READ_ONLY, Exporter
from frameworks import FRAMEWORKS, NUMPY, TORCH_CPU, need

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import to_float64


def close(got, x, weight, dtype, **options):
    expected, s = reference.rms_norm(x, weight, dtype=dtype, round_last=False, **options)
    flips = numeric.may_flip(s, weight, options.get("eps", 1e-6), dtype)
    bound = numeric.tolerance(expected, expected, dtype, length=x.shape[-1], gain=abs(weight), flips=flips)
    numeric.assert_within(to_float64(got), expected, bound)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework(framework, dtype):
    """Results are the caller's own kind of tensor, right, and of x's shape and dtype."""
    need(framework, dtype)
    x, residual = normal((2, 3, 48), dtype, "x"), normal((2, 3, 48), dtype, "r")
    weight = normal((48,), dtype, "w", mean=1.0)
    tensors = [framework.tensor(values, dtype) for values in (x, residual, weight)]
    out = minivllm.rms_norm(tensors[0], tensors[2])
    framework.synchronize()
    assert framework.is_mine(out) and tuple(out.shape) == (2, 3, 48)
    assert out.dtype == tensors[0].dtype
    close(out, x, weight, dtype)
    out, sums = minivllm.add_rms_norm(*tensors)
    framework.synchronize()
    assert framework.is_mine(out) and framework.is_mine(sums)
    assert_same_bits(sums, reference.round_to(x + residual, dtype))
    close(out, x, weight, dtype, residual=residual)

    case = QKV((2, 3), 48, 3, 1, 8, dtype, bias=True)
    norm_weight, matrix, bias = weight_data(case)
    parts = minivllm.rms_norm_qkv(
        *(framework.tensor(t, dtype) for t in (x, norm_weight, matrix)), 3, 1, bias=framework.tensor(bias, dtype)
    )
    framework.synchronize()
    assert [tuple(part.shape) for part in parts] == [(2, 3, 3, 8), (2, 3, 1, 8), (2, 3, 1, 8)]
    assert all(framework.is_mine(part) for part in parts)
    packed = np.concatenate([to_float64(part).reshape(2, 3, -1) for part in parts], -1)
    expect_qkv(case, packed, x, norm_weight, matrix, bias)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_outputs_may_be_given(framework):
    need(framework, "f32")
    if framework.name == "jax":
        x, weight = framework.tensor(normal((3, 8), "f32"), "f32"), framework.tensor(np.ones(8), "f32")
        with pytest.raises(ValueError, match="rms_norm: out is read-only"):
            minivllm.rms_norm(x, weight, out=x)
        return
    x = normal((3, 40), "f32", "x")
    tensor, weight = framework.tensor(x, "f32"), framework.tensor(np.ones(40), "f32")
    out = framework.tensor(np.full((3, 40), CANARY), "f32")
    assert minivllm.rms_norm(tensor, weight, out=out) is out
    framework.synchronize()
    close(out, x, np.ones(40), "f32")
    first, second = minivllm.fused_add_rms_norm(tensor, out, weight)
    assert first is tensor and second is out


def test_frameworks_may_be_mixed(torch):
    """The result is of x's framework; an output given is filled, whosever it is."""
    x, weight = normal((3, 40), "f32", "x"), normal((40,), "f32", "w")
    from_numpy = minivllm.rms_norm(x.astype(np.float32), TORCH_CPU.tensor(weight, "f32"))
    assert type(from_numpy) is np.ndarray
    from_torch = minivllm.rms_norm(TORCH_CPU.tensor(x, "f32"), weight.astype(np.float32))
    assert type(from_torch) is torch.Tensor
    assert_same_bits(from_numpy, from_torch)
    out = np.full((3, 40), CANARY, np.float32)
    assert minivllm.rms_norm(TORCH_CPU.tensor(x, "f32"), weight.astype(np.float32), out=out) is out
    assert_same_bits(out, from_torch)


def test_parameters_without_gradients(torch):
    norm = torch.nn.Parameter(torch.ones(16))
    linear = torch.nn.Linear(16, 24)
    x = torch.randn(3, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert minivllm.rms_norm(x, norm).shape == (3, 16)
            q, k, v = minivllm.rms_norm_qkv(x, norm, linear.weight, 1, 1, bias=linear.bias)
            pair = linear(torch.nn.functional.rms_norm(x, (16,), norm, 1e-6))
            assert torch.allclose(torch.cat([q, k, v], -1).flatten(1), pair, atol=1e-5)
            assert not q.requires_grad


def test_torch_oddities(torch):
    weight = torch.ones(8)
    for spoilt in (torch.ones(2, 8).to_sparse(), torch.zeros(2, 8, dtype=torch.bits8)):
        with pytest.raises(TypeError, match="rms_norm: x has (layout|dtype) torch"):
            minivllm.rms_norm(spoilt, weight)
    inference = None
    with torch.inference_mode():
        inference = torch.randn(2, 8)
    assert minivllm.rms_norm(inference, weight).shape == (2, 8)
    out = minivllm.rms_norm(torch.randn(2, 8), weight)
    out.resize_(4, 8)  # a real torch storage
    assert out.untyped_storage().resizable()


@pytest.mark.gpu
def test_pinned_memory_is_cpu_memory(cuda_torch):
    x = cuda_torch.randn(2, 8).pin_memory()
    assert minivllm.rms_norm(x, cuda_torch.ones(8)).device.type == "cpu"


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
def test_dlpack_capsules(versioned):
    values = normal((4, 24), "f32", "x").astype(np.float32)
    weight = normal((24,), "f32", "w").astype(np.float32)
    right = minivllm.rms_norm(values, weight)
    for options in (
        {},
        {"strides": "null"},
        {"offset_bytes": 256},
        {"strides": "null", "offset_bytes": 4},
        {"takes_version": False},
        {"deleter": False},
    ):
        exporter = Exporter(values, versioned=versioned, **options)
        out = minivllm.rms_norm(exporter, weight)
        assert_same_bits(out, right, str(options))
        assert exporter.exports >= 1
        if options != {"deleter": False}:
            assert exporter.deleted == exporter.exports, "a capsule's deleter runs exactly once"
    out = np.full((4, 24), CANARY, np.float32)
    given = Exporter(out, versioned=versioned)
    assert minivllm.rms_norm(values, weight, out=given) is given
    assert_same_bits(out, right)
    assert given.deleted == given.exports


def test_strides_that_nobody_takes_are_not_read():
    """Both generations of exporters: 1, or anything, for dimensions of size 1."""
    weight = np.ones(24, np.float32)
    values = normal((1, 24), "f32", "x").astype(np.float32)
    right = minivllm.rms_norm(values, weight)
    for stride in (1, 0, 24, -7, 2**62):
        assert_same_bits(minivllm.rms_norm(Exporter(values, strides=(stride, 1)), weight), right)
    column = normal((5, 1), "f32", "c").astype(np.float32)
    for stride in (1, 0, 3, -(2**62)):
        got = minivllm.rms_norm(Exporter(column, strides=(1, stride)), weight[:1])
        assert_same_bits(got, minivllm.rms_norm(column, weight[:1]))
    matrix = normal((3, 24), "f32", "m").astype(np.float32)[:, :1]
    for stride in (1, 24, 2**62):
        exporter = Exporter(np.ascontiguousarray(matrix), strides=(1, stride))
        minivllm.rms_norm_qkv(column, weight[:1], exporter, 1, 1, weight_layout="out_in")


def test_dlpack_flags():
    values, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    for flag in (READ_ONLY, IS_COPIED):
        assert minivllm.rms_norm(Exporter(values, flags=flag), weight) is not None
        exporter = Exporter(values.copy(), flags=flag)
        with pytest.raises(ValueError, match="rms_norm: out is read-only"):
            minivllm.rms_norm(values, weight, out=exporter)
        assert exporter.deleted == exporter.exports


def test_dlpack_refusals():
    values, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    doubles = np.ones((2, 8), np.float64)
    for exporter, exception, message in (
        (Exporter(values, major=2), BufferError, r"x was exported as DLPack version 2, expected 1"),
        (Exporter(values, name=b"used_dltensor"), BufferError, r"x has a __dlpack__ that gave .*expected a capsule"),
        (Exporter(doubles), TypeError, r"x has dtype float64, expected float32, float16 or bfloat16"),
        (Exporter(values, dtype=(FLOAT, 32, 2)), TypeError, r"x has dtype float32 in vectors of 2"),
        (Exporter(values, dtype=(0, 32, 1)), TypeError, r"x has dtype int32"),
        (Exporter(values, dtype=(10, 8, 1)), TypeError, r"x has dtype float8"),
        (Exporter(values, null_data=True), BufferError, r"x has no data"),
        (Exporter(values, device=(10, 0)), ValueError, r"x is on a device of DLPack type 10"),
    ):
        with pytest.raises(exception, match=rf"^rms_norm: {message}"):
            minivllm.rms_norm(exporter, weight)
        if exporter.name != b"used_dltensor":
            assert exporter.deleted == exporter.exports


def test_an_exporters_own_error_is_the_cause():
    class Broken:
        def __dlpack__(self, **options):
            raise BufferError("the tensor went to lunch")

        def __dlpack_device__(self):
            return (CPU, 0)

    with pytest.raises(
        BufferError, match=r"rms_norm: x cannot be read through its __dlpack__: the tensor went to lunch"
    ) as caught:
        minivllm.rms_norm(Broken(), np.ones(8, np.float32))
    assert isinstance(caught.value.__cause__, BufferError) and str(caught.value.__cause__) == "the tensor went to lunch"

    class Interrupted(Broken):
        def __dlpack__(self, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minivllm.rms_norm(Interrupted(), np.ones(8, np.float32))

    class Nonsense(Broken):
        def __dlpack__(self, **options):
            return 42

    with pytest.raises(BufferError, match="gave 42"):
        minivllm.rms_norm(Nonsense(), np.ones(8, np.float32))


def test_bfloat16_through_dlpack():
    values = normal((3, 16), "bf16", "x")
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weight = np.ones(16, np.float32)
    need(NUMPY, "bf16")
    out = minivllm.rms_norm(Exporter(bits, dtype=(BFLOAT, 16, 1)), weight)
    assert_same_bits(out, minivllm.rms_norm(NUMPY.tensor(values, "bf16"), weight))


def test_empty_arrays_through_every_protocol():
    weight = np.ones(8, np.float32)
    empty = np.zeros((0, 8), np.float32)
    for tensor in (
        empty,
        Exporter(empty, null_data=True),
        Exporter(empty, null_data=True, strides="null", versioned=False),
    ):
        assert tuple(minivllm.rms_norm(tensor, weight).shape) == (0, 8)


def test_dlpack_subclasses_of_arrays():
    class Own(np.ndarray):
        pass

    x = np.ones((2, 8), np.float32).view(Own)
    assert minivllm.rms_norm(x, np.ones(8, np.float32)).shape == (2, 8)
    masked = np.ma.masked_array(np.ones((2, 8), np.float32), mask=False)
    with pytest.raises(TypeError, match="rms_norm: x is a masked array"):
        minivllm.rms_norm(masked, np.ones(8, np.float32))


class CudaArray:
    """Nothing but __cuda_array_interface__, over a torch tensor."""

    def __init__(self, tensor, **changes):
        self.tensor, self.changes = tensor, changes

    @property
    def __cuda_array_interface__(self):
        return self.tensor.__cuda_array_interface__ | self.changes


@pytest.mark.gpu
def test_cuda_array_interface(cuda_torch):
    torch = cuda_torch
    x, weight = torch.randn(4, 48, device="cuda"), torch.randn(48, device="cuda")
    right = to_float64(minivllm.rms_norm(x, weight))
    torch.cuda.synchronize()
    out = minivllm.rms_norm(CudaArray(x), CudaArray(weight))
    assert type(out) is minivllm.DeviceArray
    assert_same_bits(out, right)
    wide = torch.randn(4, 100, device="cuda")
    strided = wide[:, :48]
    torch.cuda.synchronize()
    assert_same_bits(
        minivllm.rms_norm(CudaArray(strided), CudaArray(weight)), minivllm.rms_norm(strided.contiguous(), weight)
    )
    given = torch.full((4, 48), CANARY, device="cuda")
    torch.cuda.synchronize()
    minivllm.rms_norm(CudaArray(x), CudaArray(weight), out=CudaArray(given))
    assert_same_bits(given, right)
    data = x.__cuda_array_interface__["data"]
    for changes, exception, message in (
        ({"typestr": "<f8"}, TypeError, r"x has typestr '<f8'"),
        ({"stream": 0}, ValueError, r"x has a __cuda_array_interface__ with stream 0"),
        ({"mask": x}, ValueError, r"x is masked"),
        ({"data": data[0]}, BufferError, r"x has a __cuda_array_interface__ whose data is not"),
        ({"shape": None}, BufferError, r"x has a __cuda_array_interface__ with a malformed shape"),
        ({"strides": (4,)}, BufferError, r"x has a __cuda_array_interface__ with a malformed strides"),
    ):
        with pytest.raises(exception, match=message):
            minivllm.rms_norm(CudaArray(x, **changes), weight)
    with pytest.raises(ValueError, match="out is read-only"):
        minivllm.rms_norm(x, weight, out=CudaArray(given, data=(data[0], True)))


@pytest.mark.gpu
def test_device_array(cuda_torch):
    array = np.arange(24, dtype=np.float32).reshape(2, 12)
    there = minivllm.to_device(array)
    assert tuple(there.shape) == (2, 12) and str(there.dtype) == "float32" and str(there.device) == "cuda:0"
    assert_same_bits(there.numpy(), array)
    as_torch = cuda_torch.from_dlpack(there)
    assert as_torch.device.type == "cuda" and as_torch.data_ptr() == there.__cuda_array_interface__["data"][0]
    del there
    gc.collect()
    cuda_torch.cuda.synchronize()
    assert_same_bits(as_torch, array, "the memory lives as long as the import")
    half = minivllm.to_device(array, dtype="float16")
    assert str(half.dtype) == "float16" and to_float64(half).max() == 23
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, np.inf, -0.0], np.float32)
    rounded = minivllm.to_device(ties, dtype="bfloat16")
    assert str(rounded.dtype) == "bfloat16"
    assert_same_bits(cuda_torch.from_dlpack(rounded), reference.round_to(ties.astype(np.float64), "bf16"))
    made = minivllm.empty((3, 5), "bfloat16")
    assert tuple(made.shape) == (3, 5) and made.__dlpack_device__() == (2, 0)
    back = minivllm.to_device(cuda_torch.ones(3, device="cuda"))
    assert type(back) is minivllm.DeviceArray and (to_float64(back) == 1).all()


def test_device_array_without_a_gpu():
    from conftest import NO_GPU

    if not NO_GPU:
        pytest.skip("there is a GPU here: test_device_array covers it")
    for call in (lambda: minivllm.empty((2, 2)), lambda: minivllm.to_device(np.ones(3, np.float32))):
        with pytest.raises(RuntimeError, match=r"(?i)cuda|gpu|driver"):
            call()


def test_nothing_is_kept_alive():
    """References to arguments and results are given back, also after a refusal."""

    class Array(np.ndarray):
        pass

    x, weight = np.ones((2, 8), np.float32).view(Array), np.ones(8, np.float32).view(Array)
    counts = sys.getrefcount(x), sys.getrefcount(weight)
    for _ in range(10):
        minivllm.rms_norm(x, weight)
        minivllm.rms_norm(x, weight, out=x)
        with pytest.raises(ValueError):
            minivllm.rms_norm(x, weight[:7])
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == counts
    result = weakref.ref(minivllm.rms_norm(x, weight, out=np.ones((2, 8), np.float32).view(Array)))
    gc.collect()
    assert result() is None


def test_an_out_that_cannot_be_cut_is_refused_before_the_op_runs():
    class Plain:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    x, packed = np.ones((3, 8), np.float32), np.zeros((3, 16), np.float32)
    with pytest.raises(TypeError, match=r"rms_norm_qkv: out cannot be cut into q, k and v: it has no reshape"):
        minivllm.rms_norm_qkv(x, x[0], np.ones((16, 8), np.float32), 2, 1, out=Plain(packed))
    assert not packed.any()
    out = Plain(np.zeros_like(x))
    assert minivllm.rms_norm(x, x[0], out=out) is out and out.array.all()


def test_numpy_dtypes_that_are_equal_are_the_same():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.ones((3, 8), np.dtype(ml_dtypes.bfloat16).newbyteorder("="))
    assert x.dtype is not np.dtype(ml_dtypes.bfloat16)
    assert (minivllm.rms_norm(x, np.ones(8, np.float32)) == 1).all()
