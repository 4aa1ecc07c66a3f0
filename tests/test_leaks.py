"""References and memory: a long run ends where it began."""

import ctypes
import gc
import os
import sys

import frameworks
import numpy as np
import pytest
from dlpack import Exporter
from fuzz import calls, cases, plain
from processes import SANITIZED

import minivllm


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calls_of_everything(framework):
    """One of everything, also of what is refused."""
    x = framework.full((4, 64), 1.0, "f32")
    weight, matrix = framework.full((64,), 1.0, "f32"), framework.full((40, 64), 0.01, "f32")
    bias, out = framework.full((40,), 0.5, "f32"), framework.full((4, 40), 0.0, "f32")
    layer = minivllm.FusedRMSNormQKV(norm_weight=weight, qkv_weight=matrix, num_heads=3, num_kv_heads=1)
    packed = minivllm.FusedRMSNormQKV(norm_weight=weight, qkv_weight=matrix, num_heads=3, num_kv_heads=1, prepack=True)

    def refused(call, *arguments, **options):
        try:
            call(*arguments, **options)
        except (TypeError, ValueError):
            return
        raise AssertionError("not refused")

    def one_of_everything():
        minivllm.rms_norm(x, weight)
        minivllm.add_rms_norm(x, x, weight, rounding="fp32", weight_offset=1.0)
        minivllm.rms_norm_qkv(x, weight, matrix, 3, 1, bias=bias, residual=x, batch_invariant=True)
        minivllm.rms_norm_qkv(x, weight, (matrix[:24], matrix[24:32], matrix[32:]), 3, 1, out=out)
        minivllm.rms_norm_gate_up(x, weight, (matrix[:16], matrix[16:32]), residual=x, activation="gelu")
        minivllm.norm_add(x, weight, x)
        minivllm.silu_and_mul(x), minivllm.gelu_and_mul(x, approximate="none", rounding="fp32")
        layer(x), packed(x, residual=x)
        minivllm.kernels("rms_norm"), minivllm.last_kernel()
        refused(minivllm.rms_norm, x, bias)
        refused(minivllm.rms_norm, x, weight, kernel="none")
        refused(minivllm.rms_norm, x, [1.0])
        refused(minivllm.silu_and_mul, x, out=x)
        refused(minivllm.rms_norm, x, weight, nonsense=1)
        refused(minivllm.rms_norm_qkv, x, weight, (matrix, matrix, 3), 3, 1)
        refused(minivllm.rms_norm_qkv, x, weight, matrix, 4, 1)
        refused(minivllm.rms_norm_gate_up, x, weight, (matrix, 3))

    return one_of_everything, (x, weight, matrix, bias, out)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_no_references_are_kept(device, name):
    framework = next(f for f in frameworks.ALL if f.name == name and f.device in (device, "cpu"))
    if device == "cuda":
        framework = frameworks.TORCH_CUDA
    if reason := framework.why_not():
        pytest.skip(reason)
    one_of_everything, held = calls_of_everything(framework)
    singletons = (None, True, False, np.float32, 1, ())
    for _ in range(20):
        one_of_everything()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in held]
    shared = [sys.getrefcount(thing) for thing in singletons]
    for _ in range(500):
        one_of_everything()
    gc.collect()
    assert [sys.getrefcount(thing) for thing in held] == before
    if sys.version_info < (3, 12):  # from then on None and its kind are immortal
        grown = [now - then for now, then in zip((sys.getrefcount(thing) for thing in singletons), shared)]
        assert max(grown) < 100, f"references to {singletons} grew by {grown} in 500 rounds"


# ---- memory, of calls of every op --------------------------------------------------------------------------------------


class MallInfo(ctypes.Structure):
    """mallinfo2 of glibc, by fields."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use():
    """Blocks of Python's own allocator, and bytes of malloc where glibc counts them."""
    gc.collect()
    count = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if count is None:
        return sys.getallocatedblocks(), 0
    count.restype = MallInfo
    found = count()
    return sys.getallocatedblocks(), found.uordblks + found.hblkhd


def assert_no_growth(one_round, calls_of_a_round: int, calls: int, most_bytes: int = 8):
    """What leaks does so each time: of six stretches after a warm-up one must end with what it began with. Frameworks keep
    a little now and then, but neither half a block nor most_bytes a round."""
    rounds = max(1, calls // (6 * calls_of_a_round))
    gc.collect()
    gc.freeze()  # so that collecting looks at new objects alone
    for _ in range(3 * rounds):  # JAX goes on filling caches for some hundred calls
        one_round()
    in_use()
    resident, grown = resident_bytes(), []
    for _ in range(6):
        before = in_use()
        for _ in range(rounds):
            one_round()
        grown.append(tuple(after - then for after, then in zip(in_use(), before)))
    resident = (resident_bytes() - resident) >> 10
    gc.unfreeze()
    what = f"{6 * rounds * calls_of_a_round} calls: (blocks, bytes) more after each sixth {grown}; resident {resident} kB more"
    print(what)
    assert min(blocks for blocks, _ in grown) < max(8, rounds / 2), what
    assert min(size for _, size in grown) < most_bytes * rounds, what


def calls_of(op, framework, count=6, keep=lambda case: True):
    """Drawn calls of an op on this framework's tensors, made once: arguments -> results, again and again."""
    found, index = [], 0
    while len(found) < count:
        case = cases.draw(5, index, op=op)
        index += 1
        if (plain.is_plain(case) or case.refused) and case.fits_torch() and keep(case):
            made = plain.Plain(case, framework)
            found.append((made, made.arguments()))
    return found


def a_round(found, call):
    def one_round():
        for made, arguments in found:
            try:
                call(made.case, arguments)
            except (TypeError, ValueError):
                if not made.case.refused:
                    raise

    return one_round


leaks = pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory for a while, by design")


@leaks
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("framework", [frameworks.NUMPY, frameworks.TORCH_CPU], ids=lambda f: f.name)
def test_calls_of_every_op_leave_no_memory(op, framework, leak_calls):
    for dtype in ("f32", "f16", "bf16"):
        if reason := framework.why_not(dtype):
            pytest.skip(reason)
    served = calls_of(op, framework, keep=lambda case: not case.refused)
    refused = calls_of(op, framework, 2, keep=lambda case: case.refused and "shares" not in str(case.refused))
    assert_no_growth(a_round(served + refused, calls.call), 8, leak_calls)


@leaks
@pytest.mark.parametrize("op", [op for op in cases.OPS if "fused" not in op])
def test_calls_of_every_op_on_jax_arrays_leave_no_memory(op, leak_calls):
    framework = frameworks.JAX("cpu")
    if reason := framework.why_not():
        pytest.skip(reason)
    found = calls_of(op, framework, 4, keep=lambda case: not case.refused and not case.outputs)
    # JAX's own tables grow by up to 48 bytes a round. An object that each of our calls left behind would be 48 bytes a call.
    assert_no_growth(a_round(found, calls.call), 4, max(leak_calls // 10, 1200), most_bytes=4 * 48 // 2)


@leaks
@pytest.mark.parametrize("op", cases.OPS)
def test_compiled_calls_of_every_op_leave_no_memory(op, torch, leak_calls):
    """One graph for each drawn call."""
    in_place = {"out", "residual_out"} if op.startswith("fused") else set()

    def compiled(made, arguments):
        function, tensors = getattr(minivllm, op), {name: arguments[name] for name in made.case.tensors}
        options = {name: value for name, value in arguments.items() if name not in tensors and name != "kernel"}
        if op == "FusedRMSNormQKV":
            at_call = {name: tensors.pop(name) for name in calls.LAYER_CALL if name in tensors}
            layer, tensors = function(**tensors, **options), at_call
            return torch.compile(lambda x, residual=None: layer(x, residual=residual), backend=backend), tensors
        return torch.compile(lambda tensors: function(**tensors, **options), backend=backend), {"tensors": tensors}

    backend = "inductor" if leak_calls >= 100_000 else "aot_eager"
    torch.compiler.reset()
    found = calls_of(op, frameworks.TORCH_CPU, 2, lambda case: not case.refused and set(case.outputs) <= in_place)
    graphs = [compiled(made, arguments) for made, arguments in found]

    def one_round():
        for graph, arguments in graphs:
            graph(**arguments)

    assert_no_growth(one_round, len(graphs), max(leak_calls // 10, 600))


@leaks
def test_memory_of_everything_does_not_grow():
    """What `calls` holds, exporters and large outputs."""
    one_of_everything, _ = calls_of_everything(frameworks.NUMPY)
    exporter_array, weight = np.ones((4, 64), np.float32), np.ones(64, np.float32)
    large = np.ones((256, 4096), np.float32), np.ones(4096, np.float32)

    def one_round():
        one_of_everything()
        minivllm.rms_norm(Exporter(exporter_array), weight)
        minivllm.rms_norm(*large)

    assert_no_growth(one_round, 1, 500)


def test_type_objects_are_not_collected_into_trouble():
    """Types are remembered by address: thousands of short-lived ones must neither leak without bound nor be confused."""
    weight = np.ones(8, np.float32)
    for i in range(300):

        class Temporary(np.ndarray):
            pass

        x = np.full((1, 8), float(i + 1), np.float32).view(Temporary)
        assert np.allclose(np.asarray(minivllm.rms_norm(x, weight)), 1.0)

        class NoTensor:
            pass

        with pytest.raises(TypeError, match="must be a tensor"):
            minivllm.rms_norm(NoTensor(), weight)


@pytest.mark.gpu
def test_gpu_memory_does_not_grow(cuda_torch):
    torch = cuda_torch
    one_of_everything, _ = calls_of_everything(frameworks.TORCH_CUDA)
    for _ in range(20):
        one_of_everything()
    torch.cuda.synchronize()
    lost = []  # of the device, where other processes take and return memory, too: what leaks does so every time
    while len(lost) < 20 and min(lost, default=64 << 20) >= 64 << 20:
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        for _ in range(200):
            one_of_everything()
            minivllm.to_device(np.ones((64, 4096), np.float32))
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        lost.append(free - torch.cuda.mem_get_info()[0])
    assert min(lost) < 64 << 20, "200 buffers of 1 MiB are gone, each time"
