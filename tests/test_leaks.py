"""References and memory: a long run ends where it began."""

import gc
import os
import sys

import frameworks
import numpy as np
import pytest
from dlpack import Exporter
from processes import SANITIZED

import minivllm


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calls(framework):
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
        layer(x), packed(x, residual=x)
        minivllm.kernels("rms_norm"), minivllm.last_kernel()
        refused(minivllm.rms_norm, x, bias)
        refused(minivllm.rms_norm, x, weight, kernel="none")
        refused(minivllm.rms_norm, x, [1.0])
        refused(minivllm.rms_norm, x, weight, nonsense=1)
        refused(minivllm.rms_norm_qkv, x, weight, (matrix, matrix, 3), 3, 1)
        refused(minivllm.rms_norm_qkv, x, weight, matrix, 4, 1)

    return one_of_everything, (x, weight, matrix, bias, out)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_no_references_are_kept(device, name):
    framework = next(f for f in frameworks.ALL if f.name == name and f.device in (device, "cpu"))
    if device == "cuda":
        framework = frameworks.TORCH_CUDA
    if reason := framework.why_not():
        pytest.skip(reason)
    one_of_everything, held = calls(framework)
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


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory for a while, by design")
def test_memory_does_not_grow():
    one_of_everything, _ = calls(frameworks.NUMPY)
    exporter_array = np.ones((4, 64), np.float32)
    weight = np.ones(64, np.float32)
    large = np.ones((256, 4096), np.float32), np.ones(4096, np.float32)

    def one_round():
        one_of_everything()
        minivllm.rms_norm(Exporter(exporter_array), weight)
        minivllm.rms_norm(*large)

    for _ in range(100):
        one_round()
    gc.collect()
    before = resident_bytes()
    for _ in range(400):
        one_round()
    gc.collect()
    grown = resident_bytes() - before
    assert grown < 4 << 20, f"{grown / 2**20:.1f} MiB more after 400 rounds; one large output alone is 4 MiB"


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
    one_of_everything, _ = calls(frameworks.TORCH_CUDA)
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
