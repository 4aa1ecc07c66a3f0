"""Many threads, fork, and the limits on how many threads the kernels use."""

import os
import sys
import threading

import numpy as np
import pytest
from cases import assert_same_bits, normal
from frameworks import NUMPY
from processes import SANITIZED, succeeds

import minivllm

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def keep_thread_count():
    before = minivllm.get_num_threads()
    yield
    minivllm.set_num_threads(before)


def work(seed):
    """Calls of very different sizes, and what they should give."""
    x = NUMPY.tensor(normal((seed % 7 * 9 + 1, 512), "f32", seed), "f32")
    weight = NUMPY.tensor(normal((512,), "f32", "w"), "f32")
    matrix = NUMPY.tensor(normal((200, 512), "f32", "m", scale=0.02), "f32")
    return lambda: (minivllm.rms_norm(x, weight), *minivllm.rms_norm_qkv(x, weight, matrix, 3, 1))


def test_many_threads_at_once():
    tasks = [work(seed) for seed in range(12)]
    right = [task() for task in tasks]
    start, problems = threading.Barrier(len(tasks)), []

    def loop(i):
        try:
            start.wait()
            for _ in range(60):
                for got, expected in zip(tasks[i](), right[i]):
                    assert_same_bits(got, expected)
        except BaseException as problem:  # noqa: BLE001 -- to be reported by the main thread
            problems.append(problem)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for round_ in range(200):
        minivllm.set_num_threads(round_ % 4 + 1)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if problems:
        raise problems[0]


@pytest.mark.rows("rms_norm", "cpu")
def test_every_thread_rounds_as_the_caller_does(kernel, torch):
    """Whether subnormal numbers are flushed to zero is a thread's own setting: a call obeys its caller's."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[kernel.dtype]
    x = torch.full((4096, 256), 1e-39 if dtype != torch.float16 else 1e-7, dtype=dtype)
    weight = torch.ones(256)
    minivllm.set_num_threads(4)
    zeros = {}
    try:
        for flush in (False, True, False):  # the pool's threads begin with whatever was set when they started
            torch.set_flush_denormal(flush)
            for _ in range(10):
                out = minivllm.rms_norm(x, weight, kernel=kernel.name)
                assert torch.equal(out, out[:1].expand_as(out)), f"rows differ where flushing is {flush}"
            zeros[flush] = bool((out == 0).all())
    finally:
        torch.set_flush_denormal(False)
    assert zeros == {False: False, True: dtype != torch.float16}  # widened to float32, no float16 is subnormal


def test_last_kernel_is_of_the_thread():
    x, weight = np.ones((1, 8), np.float32), np.ones(8, np.float32)
    minivllm.rms_norm(x, weight, kernel="f32_portable")
    seen = []

    def other():
        seen.append(minivllm.last_kernel())
        minivllm.rms_norm(x.astype(np.float16), weight)
        seen.append(minivllm.last_kernel().name)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] is None and seen[1].startswith("f16_")
    assert minivllm.last_kernel().name == "f32_portable"


def test_the_setter():
    for count in (1, 3, 2 * CORES + 1):
        minivllm.set_num_threads(count)
        assert minivllm.get_num_threads() == count
        task = work(6)
        assert_same_bits(task()[0], task()[0])
    for count in (0, -1):
        minivllm.set_num_threads(count)
        limit = int(os.environ.get("OMP_NUM_THREADS") or CORES)
        assert minivllm.get_num_threads() == min(CORES, limit)
    with pytest.raises(TypeError):
        minivllm.set_num_threads("two")


@pytest.mark.parametrize(
    "value,expected",
    [(None, CORES), ("1", 1), ("100000", CORES), ("", CORES), ("many", CORES), ("0", CORES), ("-3", CORES), ("1,4", 1)],
)
def test_omp_num_threads(value, expected):
    printed = succeeds("import minivllm; print(minivllm.get_num_threads())", OMP_NUM_THREADS=value)
    assert int(printed) == expected


def test_affinity():
    script = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import minivllm
        print(minivllm.get_num_threads())
    """
    assert int(succeeds(script, OMP_NUM_THREADS=None)) == 1


FORK = """
    import os, signal, sys, threading
    import numpy as np
    import minivllm

    x, weight = np.random.default_rng(0).standard_normal((64, 1024), np.float32), np.ones(1024, np.float32)
    matrix = np.random.default_rng(1).standard_normal((1280, 1024), np.float32)

    def compute():
        return minivllm.rms_norm_qkv(x, weight, matrix, 3, 1)[0]

    minivllm.set_num_threads(4)
    right = compute()
    busy = {busy}
    stop = threading.Event()
    def keep_busy():
        while not stop.is_set():
            compute()
    threads = [threading.Thread(target=keep_busy) for _ in range(3)] if busy else []
    for thread in threads:
        thread.start()
    for _ in range(15):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            same = all(np.array_equal(compute(), right) for _ in range(3))
            grandchild = os.fork()
            if grandchild == 0:
                signal.alarm(30)
                os._exit(0 if np.array_equal(compute(), right) else 1)
            status = os.waitpid(grandchild, 0)[1]
            os._exit(0 if same and status == 0 else 1)
        assert os.waitpid(child, 0)[1] == 0, "a forked child hung or computed something else"
        assert np.array_equal(compute(), right)
    stop.set()
    for thread in threads:
        thread.join()
"""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_fork(busy):
    """The pool survives fork, also while other threads are inside a kernel."""
    succeeds(FORK.replace("{busy}", str(busy)), timeout=300)


TORCH = """
    import os, signal
    import numpy as np, torch, minivllm

    def threads():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(3)
    x, w, m = torch.randn(64, 1024), torch.rand(1024), torch.randn(1000, 1024)
    arrays = [t.numpy().copy() for t in (x, w, m)]
    x @ m.t(), torch.randn(1 << 21).exp()  # torch's threads are there
    before = threads()
    compute = lambda: minivllm.rms_norm_linear(x, w, m, weight_layout="out_in")
    right = compute()
    assert threads() == before, "torch's threads compute what torch calls"
    for _ in range(20):
        assert compute().equal(right) and (x @ m.t()).isfinite().all()
    assert threads() == before
    minivllm.set_num_threads(3)
    assert np.array_equal(minivllm.rms_norm_linear(*arrays, weight_layout="out_in"), right.numpy())
    assert threads() == before + 2, "and others our own"
    assert compute().equal(right)
    minivllm.set_num_threads(0)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if compute().numpy().tobytes() == right.numpy().tobytes() else 1)
        assert os.waitpid(child, 0)[1] == 0, "a forked child hung or computed something else"
    torch.set_num_threads(1)
    assert compute().equal(right)
"""


FORK_BEFORE_THE_FIRST_CALL = """
    import os, signal
    import numpy as np, torch, minivllm

    torch.set_num_threads(3)
    x, w, m = torch.randn(64, 1024), torch.rand(1024), torch.randn(1000, 1024)
    x @ m.t(), torch.randn(1 << 21).exp()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        y = minivllm.rms_norm_linear(x, w, m, weight_layout="out_in").numpy()  # torch itself would hang here
        os._exit(0 if np.isfinite(y).all() else 1)
    assert os.waitpid(child, 0)[1] == 0, "a forked child hung"
"""


def test_torchs_threads_and_a_fork_before_the_first_call(torch):
    succeeds(FORK_BEFORE_THE_FIRST_CALL, timeout=300)


def test_torchs_threads(torch):
    """They compute the calls on torch's tensors, but in a child of fork: they spin behind torch's own operations, and
    ours would share their cores."""
    succeeds(TORCH, timeout=300)


SMALL_STACKS = """
    import ctypes, threading
    import numpy as np
    import minivllm

    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    assert libc.pthread_attr_init(attributes) == 0
    assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(65536)) == 0
    assert libc.pthread_setattr_default_np(attributes) == 0  # of the pool's threads
    threading.stack_size(65536)
    minivllm.set_num_threads(3)
    dtypes = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
    try:
        import ml_dtypes
        dtypes["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
    except ImportError:
        pass

    def calls(row, dtype):
        x, weight, bias = np.ones((200, 300), dtype), np.ones(300, dtype), np.ones(1000, dtype)
        matrix, transposed = np.ones((1000, 300), dtype), np.ones((300, 1000), dtype)
        q, kv, cache = np.ones((2, 6, 80), dtype), np.ones((2, 3, 80), dtype), np.ones((2, 3, 300, 80), dtype)
        positions, angles = np.array([299, 7]), np.ones((2, 80), dtype)
        kernel = {"kernel": row.name}
        of = {
            "rms_norm": lambda: minivllm.rms_norm(x, weight, **kernel),
            "add_rms_norm": lambda: minivllm.add_rms_norm(x, x, weight, **kernel),
            "norm_add": lambda: minivllm.norm_add(x, weight, x, **kernel),
            "rms_norm_qkv": lambda: [
                minivllm.rms_norm_qkv(x, weight, matrix, 6, 2, residual=x, bias=bias, **kernel),
                minivllm.rms_norm_qkv(x, weight, transposed, 6, 2, **kernel),
            ],
            "rms_norm_linear": lambda: minivllm.rms_norm_linear(x, weight, matrix, bias=bias, **kernel),
            "rms_norm_gate_up": lambda: [
                minivllm.rms_norm_gate_up(x, weight, matrix, bias=bias, activation="gelu", **kernel),
                minivllm.rms_norm_gate_up(x, weight, transposed, residual=x, **kernel),
            ],
            "linear": lambda: [minivllm.linear(x, matrix, **kernel), minivllm.linear(x, transposed, **kernel)],
            "linear_add": lambda: minivllm.linear_add(x, matrix, np.ones((200, 1000), dtype), bias=bias, **kernel),
            "silu_and_mul": lambda: minivllm.silu_and_mul(x, **kernel),
            "gelu_and_mul": lambda: minivllm.gelu_and_mul(x, approximate="none", **kernel),
            "decode_attention": lambda: minivllm.decode_attention(
                q, kv, kv, cache, cache.copy(), positions, cos=angles, sin=angles, **kernel
            ),
            "qk_norm_rope": lambda: minivllm.qk_norm_rope(
                q, kv, angles, angles, q_norm_weight=np.ones(80, dtype), **kernel
            ),
            "greedy_tokens": lambda: minivllm.greedy_tokens(x, **kernel),
        }
        for _ in range(3):
            of[row.op]()
        done.append(row.name)

    done = []
    rows = [row for row in minivllm.kernels() if row.usable and not row.isa.startswith("sm") and row.dtype in dtypes]
    for row in rows:
        thread = threading.Thread(target=calls, args=(row, dtypes[row.dtype]))
        thread.start()
        thread.join()
    print(len(rows), len(done))
"""


@pytest.mark.skipif(SANITIZED, reason="the sanitizers' own frames need more")
def test_threads_with_a_small_stack():
    """Every CPU kernel in a thread of 64 kB, helped by a pool of such threads."""
    rows, done = map(int, succeeds(SMALL_STACKS).split())
    assert rows == done > 0


def test_the_gil_is_released():
    """Another thread runs while a long kernel does."""
    x = np.ones((96, 2048), np.float32)
    weight, matrix = np.ones(2048, np.float32), np.ones((6144, 2048), np.float32)
    state, interval = {"running": False, "done": False}, sys.getswitchinterval()

    def long_call():
        state["running"] = True
        minivllm.rms_norm_qkv(x, weight, matrix, 32, 8, kernel="f32_prefill_portable")
        state["done"] = True

    thread = threading.Thread(target=long_call)
    sys.setswitchinterval(1.0)  # whoever holds the GIL keeps it: progress can only come from its release
    try:
        thread.start()
        progress = 0
        while not state["done"]:
            progress += state["running"]
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert progress > 1000


def test_exit_while_threads_compute():
    """Leaving the interpreter in the middle of things is no crash."""
    script = """
        import threading
        import numpy as np
        import minivllm
        x, weight = np.ones((64, 1024), np.float32), np.ones(1024, np.float32)
        matrix = np.ones((1280, 1024), np.float32)
        started = threading.Barrier(4)
        def loop():
            started.wait()
            while True:
                minivllm.rms_norm_qkv(x, weight, matrix, 3, 1)
        for _ in range(3):
            threading.Thread(target=loop, daemon=True).start()
        started.wait()
        minivllm.rms_norm(x, weight)
    """
    for _ in range(3):
        succeeds(script)


@pytest.mark.gpu
def test_concurrent_first_launch(cuda_torch):
    """Eight threads make the process's first CUDA launch at once."""
    script = """
        import threading
        import torch
        import minivllm
        hidden = 256
        x = torch.randn(64, hidden, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        matrix = torch.randn(5 * 64, hidden, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        start, results, problems = threading.Barrier(8), [None] * 8, []
        def first(i):
            try:
                start.wait()
                if i % 2:
                    results[i] = minivllm.rms_norm(x, weight)
                else:
                    results[i] = minivllm.rms_norm_qkv(x[: 1 if i % 4 else 64], weight, matrix, 3, 1)[0]
                torch.cuda.current_stream().synchronize()
            except BaseException as problem:
                problems.append(problem)
        threads = [threading.Thread(target=first, args=(i,)) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not problems, problems
        assert all(torch.equal(results[i], results[1]) for i in (3, 5, 7))
        again = minivllm.rms_norm_qkv(x, weight, matrix, 3, 1)[0]
        assert torch.equal(results[0], again) and torch.equal(results[4], again)
    """
    for _ in range(3):
        succeeds(script)
