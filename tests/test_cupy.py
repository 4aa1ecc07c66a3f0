"""CuPy: its current stream, its memory pool, its graphs, its current device."""

import frameworks
import pytest
from cases import assert_same_bits, normal
from processes import PACKAGE, ROOT, succeeds

import minivllm
from minivllm.testing.reference import to_float64

pytestmark = pytest.mark.gpu
FRAMEWORK = next(each for each in frameworks.ALL if each.name == "cupy")
TOKENS, HIDDEN = 40, 256


@pytest.fixture
def cupy():
    if reason := FRAMEWORK.why_not():
        pytest.skip(reason)
    module = frameworks.optional("cupy")
    yield module
    module.cuda.Device().synchronize()


def tensor(shape, *key, **options):
    return FRAMEWORK.tensor(normal(shape, "f16", *key, **options), "f16")


def arguments():
    return (
        tensor((TOKENS, HIDDEN), "x"),
        tensor((HIDDEN,), "norm", scale=0.2, mean=1.0),
        tensor((5 * 64, HIDDEN), "matrix", scale=0.05),
    )


def kernels_that_serve(*given):
    """The projection's kernels, by name; a forced one may refuse."""
    for row in minivllm.kernels("rms_norm_qkv"):
        if row.usable and row.isa.startswith("sm") and row.dtype == "float16":
            try:
                minivllm.rms_norm_qkv(*given, 3, 1, kernel=row.name)
            except ValueError as error:
                assert "cannot serve this call" in str(error)
                continue
            yield row.name


def calls():
    """Every op, and every kernel of the projection: (name, (x, norm_weight, qkv_weight) -> arrays)."""
    yield "rms_norm", lambda x, norm, matrix: [minivllm.rms_norm(x, norm)]
    yield "add_rms_norm", lambda x, norm, matrix: minivllm.add_rms_norm(x, x, norm)
    for name in list(kernels_that_serve(*arguments())):
        yield name, lambda *given, name=name: minivllm.rms_norm_qkv(*given, 3, 1, kernel=name)


def assert_all_same(got, expected, what):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert_same_bits(a, b, what)


def test_the_current_stream(cupy, cuda_torch):
    """x is filled late: a launch on any other stream would read what was there before."""
    for name, call in calls():
        late, *weights = arguments()
        expected = [to_float64(array) for array in call(late, *weights)]
        x, stream = cupy.zeros_like(late), cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with stream:
            with cuda_torch.cuda.stream(cuda_torch.cuda.ExternalStream(stream.ptr)):
                cuda_torch.cuda._sleep(50_000_000)  # clock cycles
            x[...] = late
            got = call(x, *weights)
        stream.synchronize()
        assert all(type(array) is cupy.ndarray for array in got)
        assert_all_same(got, expected, name)


def test_the_per_thread_default_stream(cupy):
    succeeds(
        """
        import cupy
        import numpy as np
        import minivllm
        assert cupy.cuda.get_current_stream().ptr == cupy.cuda.Stream.ptds.ptr == 2
        x, weight = np.arange(64, dtype=np.float32).reshape(2, 32), np.ones(32, np.float32)
        y = minivllm.rms_norm(cupy.asarray(x), cupy.asarray(weight), 0.0)
        assert np.allclose(y.get(), x / np.sqrt((x * x).mean(-1, keepdims=True)))
        """,
        CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1,
    )


def test_memory_comes_from_cupys_allocator(cupy):
    """Results and scratch alike; a call that is given its output and needs no scratch takes nothing."""
    x, norm, matrix = arguments()
    names = list(kernels_that_serve(x, norm, matrix))
    pool, taken = cupy.cuda.MemoryPool(), []

    def allocate(size):
        memory = pool.malloc(size)
        taken.append((memory.ptr, size))
        return memory

    with cupy.cuda.using_allocator(allocate):
        out = minivllm.rms_norm(x, norm)
        assert taken == [(out.data.ptr, out.nbytes)]
        taken.clear()
        minivllm.rms_norm(x, norm, out=out)
        assert taken == []
        packed, scratch = cupy.empty((TOKENS, 5 * 64), cupy.float16), {}
        for name in names:
            taken.clear()
            minivllm.rms_norm_qkv(x, norm, matrix, 3, 1, out=packed, kernel=name)
            scratch[name] = sum(size for _, size in taken)
        assert any(size >= x.nbytes for size in scratch.values()), f"no kernel took scratch: {scratch}"
        assert any(size == 0 for size in scratch.values()), f"every kernel took scratch: {scratch}"
        taken.clear()
        q, k, v = minivllm.rms_norm_qkv(x, norm, matrix, 3, 1, kernel=min(scratch, key=scratch.get))
        assert taken == [(q.data.ptr, packed.nbytes)]


def test_graphs_replay_with_changed_data(cupy):
    for name, call in calls():
        x, norm, matrix = arguments()
        pool = cupy.cuda.MemoryPool()  # nobody else's: the scratch of a captured call is in use at each replay
        cupy.cuda.Device().synchronize()
        with cupy.cuda.using_allocator(pool.malloc), cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            results = call(x, norm, matrix)
            graph = stream.end_capture()
        for key in (1, 2):
            for array in (x, norm, matrix)[::key]:
                array.set(tensor(array.shape, "replay", key, scale=0.1).get())
            cupy.cuda.Device().synchronize()
            graph.launch(stream=stream)
            stream.synchronize()
            assert_all_same(results, call(x, norm, matrix), f"{name}, replay {key}")


COLD = """
    import cupy
    import numpy as np
    import minivllm
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal((40, 256)).astype(np.float16) for _ in range(2))
    x, matrix = cupy.asarray(first), cupy.asarray(generator.standard_normal((320, 256)).astype(np.float16))
    norm, pool = cupy.asarray(np.ones(256, np.float16)), cupy.cuda.MemoryPool()
    def call():
        y, total = minivllm.add_rms_norm(x, x, norm)
        return [y, total, *minivllm.rms_norm_qkv(y, norm, matrix, 3, 1),
                *minivllm.rms_norm_qkv(y, norm, matrix, 3, 1, batch_invariant=True)]
    cupy.cuda.Device().synchronize()
    with cupy.cuda.using_allocator(pool.malloc), cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()  # the process's first launches: nothing was warmed up
        captured = call()
        graph = stream.end_capture()
        x.set(second)
        graph.launch()
        stream.synchronize()
        for a, b in zip(captured, call()):
            assert (a.get() == b.get()).all()
"""


def test_cold_capture(cupy):
    succeeds(COLD)


def test_arrays_of_another_gpu_than_the_current_one(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = arguments()
    with cupy.cuda.Device(1):
        there = [cupy.asarray(array.get()) for array in here]
    results = [minivllm.rms_norm(*there[:2]), *minivllm.rms_norm_qkv(*there, 3, 1)]
    assert cupy.cuda.Device().id == 0 and {array.device.id for array in results} == {1}
    expected = [minivllm.rms_norm(*here[:2]), *minivllm.rms_norm_qkv(*here, 3, 1)]
    for got, right in zip(results, expected):
        with got.device:
            assert_same_bits(got.get(), right.get())
    with pytest.raises(ValueError, match=r"weight is on cuda:0, expected cuda:1 \(where x is\)"):
        minivllm.rms_norm(there[0], here[1])


def test_the_example(cupy):
    printed = succeeds(None, arguments=("-m", "examples.cupy_example"), paths=(PACKAGE, ROOT))
    assert "q (4, 16, 128), k (4, 8, 128), v (4, 8, 128) by f16_" in printed
