"""A writer that lets the kernel behind it begin before it has written anything.

A kernel that is launched with programmatic dependent launch may begin as soon as the one in front triggers. torch's
kernels never trigger, so a load that comes before its `griddepcontrol.wait` reads old values only once in thousands of
launches. This one triggers first, waits long enough for the call behind it to be through with all that it does before
its wait, and writes then: a load that comes too early reads old values every time.
"""

import functools

import numpy as np
from frameworks import TORCH_CUDA, optional, why_missing

WAIT = 25_000  # nanoseconds, several times what a call takes before its wait
BLOCKS, THREADS = 8, 512  # few enough to leave the call behind it room on every SM

SOURCE = r"""
extern "C" __global__ void write_late(const long long *parts, int count, int wait) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < wait);
  const long long thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (int i = 0; i < count; i++) {
    const uint4 *from = (const uint4 *)parts[3 * i];
    uint4 *to = (uint4 *)parts[3 * i + 1];
    const long long bytes = parts[3 * i + 2], wide = bytes / 16;
    for (long long at = thread; at < wide; at += threads) to[at] = from[at];
    for (long long at = 16 * wide + thread; at < bytes; at += threads) ((char *)to)[at] = ((const char *)from)[at];
  }
}
"""


def why_not() -> str | None:
    if reason := TORCH_CUDA.why_not():
        return reason
    if optional("cupy") is None:
        return f"CuPy compiles the writer: {why_missing['cupy']}"
    if TORCH_CUDA.torch.cuda.get_device_capability() < (9, 0):
        return "this GPU has no programmatic dependent launch"
    return None


@functools.cache
def _kernel():
    return optional("cupy").RawKernel(SOURCE, "write_late")


class LateCopy:
    """Copies each of `sources` over the tensor at the same position of `to`, late, on torch's current stream. All are
    whole allocations, so that they begin at multiples of 16 bytes."""

    def __init__(self, to, sources):
        self.torch, self.kept = TORCH_CUDA.torch, (to, sources)
        rows = [(source.data_ptr(), target.data_ptr(), source.nbytes) for target, source in zip(to, sources)]
        assert all(address % 16 == 0 for row in rows for address in row[:2])
        self.parts = self.torch.tensor(rows, dtype=self.torch.int64, device="cuda")

    def __call__(self, wait: int = WAIT):
        arguments = np.int64(self.parts.data_ptr()), np.int32(len(self.parts)), np.int32(wait)
        with optional("cupy").cuda.ExternalStream(self.torch.cuda.current_stream().cuda_stream):
            _kernel()((BLOCKS,), (THREADS,), arguments)
