"""Compiles device_peers.cu with nvcc for the GPU at hand, and calls it on torch's current stream."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device_peers.cu")


def nvcc() -> str:
    """The CUDA compiler: NVCC, CUDA_HOME/bin/nvcc, the PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("NVCC") or shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if not found:
        raise RuntimeError("the read floor needs nvcc: none in NVCC, CUDA_HOME or PATH")
    return found


def compile_library(capability: str, to: str) -> None:
    """SOURCE -> a shared library for one compute capability such as '90'."""
    arch = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    command = [nvcc(), "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", arch, "-o", to, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {SOURCE.name}: {done.stderr.strip() or done.stdout.strip()}")


@functools.cache
def library() -> ctypes.CDLL:
    """Built once per process, into a directory that goes when it is loaded."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/device_peers.so"
        compile_library(f"{major}{minor}", path)
        loaded = ctypes.CDLL(path)
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.read_floor.argtypes = [pointer, count, count, flag, pointer]
    loaded.copy_floor.argtypes = [pointer, pointer, count, flag, pointer]
    loaded.error_text.argtypes, loaded.error_text.restype = [flag], ctypes.c_char_p
    return loaded


def check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: {library().error_text(status).decode()}")


def nbytes(tensor) -> int:
    """Whole 16-byte packets of a tensor."""
    return tensor.numel() * tensor.element_size() // 16 * 16


def read(tensor, blocks: int, programmatic: bool) -> None:
    """A kernel that only reads the tensor's bytes."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    check(library().read_floor(tensor.data_ptr(), nbytes(tensor), blocks, programmatic, stream), "read_floor")


def copy(to, source, programmatic: bool) -> None:
    """A kernel that copies a contiguous tensor in 16-byte packets."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    status = library().copy_floor(to.data_ptr(), source.data_ptr(), nbytes(source), programmatic, stream)
    check(status, "copy_floor")


def read_floors(tensors: list, sms: int) -> dict:
    """Variants that read one tensor per call: without and with programmatic launch, one, two and four blocks per SM.

    read_floor, read_floor_pdl: the number of the variant's blocks per SM is the suffix; the fastest is the floor.
    """
    return {
        f"read_floor{'_pdl' if programmatic else ''}_x{each}": (
            lambda i, blocks=sms * each, programmatic=programmatic: read(
                tensors[i % len(tensors)], blocks, programmatic
            )
        )
        for programmatic in (False, True)
        for each in (1, 2, 4)
    }


def fastest(results: dict, name: str) -> None:
    """Replaces the variants of read_floors called name_x* by the fastest, under `name`."""
    found = {key: results.pop(key) for key in list(results) if key.startswith(f"{name}_x")}
    timed = [result for result in found.values() if hasattr(result, "us")]
    if found:
        results[name] = min(timed, key=lambda result: result.us) if timed else next(iter(found.values()))
