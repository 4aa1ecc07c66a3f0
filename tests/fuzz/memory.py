"""Where a case's blocks come to lie: between pages that nobody may touch, or in a framework's memory, copied there and
back. Both give tensors of a block, and its bytes after the call; and for what the call must give, the float64 numbers
of a tensor (`wide`), and those of a result where these are (`computed`)."""

import ctypes
import functools
import mmap

import numpy as np
from frameworks import NUMPY, TORCH_CPU, TORCH_CUDA

from fuzz.layouts import Block, Spec
from fuzz.values import ITEMSIZE

PAGE = mmap.PAGESIZE
REGION = 128 << 20  # the largest block: three square float32 weights beside each other, every second value
REGIONS = 16  # blocks of one case
NO_ACCESS = 0  # PROT_NONE


@functools.cache
def regions() -> list[np.ndarray]:
    """Bytes with an inaccessible page before their first and one behind their last; touched ones alone cost memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for _ in range(REGIONS):
        memory = mmap.mmap(-1, REGION + 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        bytes_of = np.frombuffer(memory, np.uint8)  # keeps the mapping alive
        for at in (0, PAGE + REGION):
            if libc.mprotect(ctypes.c_void_p(bytes_of.ctypes.data + at), PAGE, NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "mprotect of a guard page")
        found.append(bytes_of[PAGE : PAGE + REGION])
    return found


class Guarded:
    """NumPy arrays, or torch tensors of the same memory, against guard pages."""

    device = "cpu"

    def __init__(self, blocks: list[Block], through: str = "numpy"):
        self.through, self.memory = through, []
        for block, region in zip(blocks, regions(), strict=False):
            size = block.image.size
            self.memory.append(region[REGION - size :] if block.at_end else region[:size])
        self.restore(blocks)

    def restore(self, blocks: list[Block]):
        for memory, block in zip(self.memory, blocks):
            memory[:] = block.image

    def tensor(self, spec: Spec):
        if self.through == "torch":
            return _torch_view(TORCH_CPU.torch.from_numpy(self.memory[spec.block]), spec)
        return spec.of(self.memory[spec.block])

    def after(self, index: int) -> np.ndarray:
        return self.memory[index]

    def wide(self, spec: Spec, block: np.ndarray) -> np.ndarray:
        return spec.of(block).astype(np.float64)

    def computed(self, values: np.ndarray) -> np.ndarray:
        return values


def _torch_view(block, spec: Spec):
    framework = TORCH_CPU  # dtypes are those of every device
    flat = block.view(framework.dtype(spec.dtype))
    return framework.torch.as_strided(flat, spec.shape, spec.strides, spec.offset if 0 not in spec.shape else 0)


class OnTorch:
    """Blocks in torch's memory on a device, which ends where nobody watches but the canaries."""

    through = "torch"

    def __init__(self, blocks: list[Block], device: str = "cuda"):
        self.device, self.torch = device, TORCH_CUDA.torch
        self.memory = [self.copy(block.image) for block in blocks]

    def copy(self, values: np.ndarray):
        return self.torch.from_numpy(values).to(self.device, copy=True)

    def wide(self, spec: Spec, block):
        """`block`: an array, or a tensor on the device."""
        return _torch_view(self.torch.as_tensor(block, device=self.device), spec).double()

    computed = copy

    def restore(self, blocks: list[Block]):
        for memory, block in zip(self.memory, blocks):
            memory.copy_(self.torch.from_numpy(block.image))

    def tensor(self, spec: Spec):
        return _torch_view(self.memory[spec.block], spec)

    def after(self, index: int) -> np.ndarray:
        return self.memory[index].cpu().numpy()


def to_numpy(tensor, dtype: str) -> np.ndarray:
    """A result's bits as a NumPy array of its dtype, whosever it is; no copy where it is on the CPU."""
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = TORCH_CPU.torch
    bits = {4: torch.int32, 2: torch.int16}[ITEMSIZE[dtype]]
    return tensor.detach().contiguous().view(bits).cpu().numpy().view(NUMPY.dtype(dtype))
