"""What a figure depends on: device, driver, clocks, versions, git state."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from minivllm.testing.timing import cpu_cache_bytes

PACKAGES = ("torch", "transformers", "triton", "numpy", "ml_dtypes", "cupy-cuda13x", "jax", "llama-cpp-python")
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
VARIABLES = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR")


def output_of(*command: str) -> str | None:
    """What a command prints, or None when it is absent, fails, or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(commit: str | None) -> dict:
    """The commit that was named, of which nothing else is known; or that of the tree, and whether tracked files differ
    from it."""
    if commit:
        return {"sha": commit, "dirty": None}
    status = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {"sha": output_of("git", "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def cpu_field(name: str) -> str:
    """A field of the first core in /proc/cpuinfo, or ''."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def gpu_state() -> dict | None:
    """nvidia-smi's figures for the first GPU at this moment."""
    text = output_of("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", "-i", "0")
    return dict(zip(GPU_FIELDS, (field.strip() for field in text.split(",")), strict=False)) if text else None


def environment(device: str, commit: str | None) -> dict:
    """Everything of this module, as JSON holds it."""
    import minivllm

    info = {
        "device": device,
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cpu": cpu_field("model name"),
        "cpu_features": minivllm._C.cpu_features(),
        "cpu_has_amx": "amx_tile" in cpu_field("flags"),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_cache_bytes": cpu_cache_bytes(),
        "load_average": os.getloadavg()[0],
        "minivllm": minivllm._C.version,
        "minivllm_threads": minivllm.get_num_threads(),
        "packages": {package: version(package) for package in PACKAGES if version(package)},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git_state(commit),
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "gpu_sms": properties.multi_processor_count,
            "gpu_l2_bytes": properties.L2_cache_size,
            "gpu_state": gpu_state(),
            "cuda": torch.version.cuda,
            "cuda_archs": minivllm._C.cuda_archs(),
        }
    return info
