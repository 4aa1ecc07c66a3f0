"""The doctor behind `python -m minivllm [--json | --regret]`.

Every section is one function, run by `Doctor.examine`, which writes down what a section raised and goes on: a broken
extension, driver or framework is a finding. The exit code is 1 when there was one, otherwise 0.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .doctor_regret import report as report_regret
from .doctor_text import render

FRAMEWORKS = {
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "torch": ("torch",),
    "jax": ("jax",),
    "cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x"),
}
IMPORT_SECONDS = 120  # torch on a cold disk
TOKENS = 16
BENCHMARK_SECONDS = 5.0


class Doctor:
    """Collects the report; `problems` says what is wrong, one sentence each."""

    def __init__(self):
        self.report: dict = {}
        self.problems: list[str] = []

    def examine(self, name: str, section: Callable[[], object], *, fault: bool = True) -> None:
        """Puts section() into the report; what it raises goes there too and, if that is a fault, among the problems."""
        try:
            self.report[name] = section()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name in FRAMEWORKS:
                text = f"needs {error.name}, which is not installed: pip install {error.name}"
            self.report[name] = {"error": text}
            if fault:
                self.problems.append(f"{name}: {text}")

    def run(self) -> None:
        self.examine("host", host)
        self.examine("extension", extension)
        self.examine("driver", driver, fault=False)
        self.examine("frameworks", self.frameworks)
        if "error" in self.report["extension"]:
            return  # nothing below can run
        self.examine("cpu", cpu)
        self.examine("cuda", self.cuda)
        self.examine("kernels", kernels)
        self.examine("self_check", self.self_check)
        self.examine("benchmark", lambda: benchmark(self.devices()))

    def devices(self) -> list[str]:
        """Where ops can run here."""
        gpus = self.report["cuda"].get("gpus", [])
        return ["cpu", *(f"cuda:{index}" for index, gpu in enumerate(gpus) if gpu["usable"])]

    def frameworks(self) -> dict:
        """Versions by metadata, then a real import of each in a process of its own, all at once."""
        found = {name: version for name in FRAMEWORKS if (version := installed_version(name))}
        trials = {
            name: subprocess.Popen(
                [sys.executable, "-c", f"import {name}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for name in found
        }
        result = {}
        for name, trial in trials.items():
            error = import_error(trial)
            result[name] = {"version": found[name], "imports": error is None, "error": error}
            if error is not None:
                self.problems.append(f"frameworks: import {name}: {error}")
        return result

    def cuda(self) -> dict:
        """Whether the CUDA backend was built, for what, and the GPUs it sees. A build with CUDA must be able to use
        the GPUs that the driver shows; a machine without a driver is fine."""
        from . import _C

        archs = _C.cuda_archs()
        result = {"built": bool(archs), "archs": archs.split(), "gpus": [], "why_not": ""}
        try:
            result["gpus"] = [_C.cuda_device_info(index) for index in range(_C.cuda_device_count())]
            if not result["gpus"]:
                result["why_not"] = "no GPU is visible"
        except RuntimeError as error:
            result["why_not"] = str(error)
            if archs and "error" not in self.report["driver"]:
                self.problems.append(f"cuda: {error}")
        for index, gpu in enumerate(result["gpus"]):
            if not gpu["usable"]:
                self.problems.append(f"cuda: GPU {index} ({gpu['name']}) is not usable: this build has {archs}")
        return result

    def self_check(self) -> list[dict]:
        """Every op in every dtype on every device against float64."""
        rows = []
        for device in self.devices():
            for dtype in ("float32", "float16", "bfloat16"):
                rows += self.checked(device, dtype)
        return rows

    def checked(self, device: str, dtype: str) -> list[dict]:
        if dtype == "bfloat16" and not self.report["frameworks"].get("ml_dtypes", {}).get("imports"):
            return [
                {
                    "device": device,
                    "op": "all",
                    "dtype": dtype,
                    "skipped": "NumPy needs ml_dtypes for it: pip install ml_dtypes",
                }
            ]
        rows = check(device, dtype)
        for row in rows:
            if not row["ok"]:
                what = f"{row['op']} in {dtype} on {device} ({row['kernel']})"
                self.problems.append(f"self_check: {what} is off by {row['max_ulp']:.3g} ulp")
        return rows


def host() -> dict:
    return {
        "minivllm": installed_version("minivllm") or "in a source tree",
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }


def extension() -> dict:
    from . import _C

    return {"version": _C.version, "path": _C.__file__}


def driver() -> dict:
    """Asks the driver itself, so that it works without the extension."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"there is none ({error})") from error
    version = ctypes.c_int()
    if status := library.cuDriverGetVersion(ctypes.byref(version)):
        raise RuntimeError(f"cuDriverGetVersion: error {status}")
    proc = Path("/proc/driver/nvidia/version")
    return {
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "kernel_module": proc.read_text().splitlines()[0] if proc.exists() else "",
    }


def installed_version(framework: str) -> str | None:
    for package in FRAMEWORKS.get(framework, (framework,)):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def import_error(trial: subprocess.Popen) -> str | None:
    """The last line that an import in a process of its own left on stderr, when it failed."""
    try:
        _, text = trial.communicate(timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        trial.kill()
        trial.communicate()
        return f"takes longer than {IMPORT_SECONDS} s"
    if trial.returncode == 0:
        return None
    return (text.strip().splitlines() or [f"exit status {trial.returncode}"])[-1]


def cpu() -> dict:
    from . import _C, get_num_threads

    return {"features": _C.cpu_features().split(), "threads": get_num_threads()}


def kernels() -> list[dict]:
    from . import kernels

    return [row._asdict() for row in kernels()]


def array(values, dtype: str):
    """values as a NumPy array of dtype; bfloat16 is ml_dtypes'."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16)


def check(device: str, dtype: str) -> list[dict]:
    """One row per op: the largest error in ULP of the dtype, and whether all are within the documented tolerance.

    An ULP is the dtype's spacing at the exact value, or at the RMS of all of them where that is larger: of a sum of
    products that cancels, no finite precision gets the last digits right.
    """
    import numpy as np

    from . import add_rms_norm, last_kernel, rms_norm, rms_norm_qkv, to_device
    from .testing import numeric, reference
    from .testing.shapes import model

    shape, short = model("qwen3-0.6b"), {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    random = np.random.default_rng(0)
    x = array(random.standard_normal((TOKENS, shape.hidden)), dtype)
    residual = array(random.standard_normal((TOKENS, shape.hidden)), dtype)
    norm_weight = array(1 + 0.1 * random.standard_normal(shape.hidden), dtype)
    qkv_weight = array(0.02 * random.standard_normal((shape.qkv, shape.hidden)), dtype)
    x64, residual64, gain, w64 = (a.astype(np.float64) for a in (x, residual, norm_weight, qkv_weight))
    s64 = reference.round_to(x64 + residual64, short)
    if device != "cpu":
        x, residual, norm_weight, qkv_weight = (to_device(a, device) for a in (x, residual, norm_weight, qkv_weight))

    def row(op, call, source64, weight64=None):
        got = call()
        y, _ = reference.rms_norm(source64, gain)
        exact = y if weight64 is None else y @ weight64.T
        error = abs(np.concatenate([reference.to_float64(a).reshape(TOKENS, -1) for a in got], axis=1) - exact)
        bound = numeric.tolerance(
            exact, y, short, length=shape.hidden, weight=weight64, gain=abs(gain), roundings=1 + (weight64 is not None)
        )
        rms = np.full_like(exact, np.sqrt((exact**2).mean()))
        ulp = np.maximum(reference.quantum(exact, short), reference.quantum(rms, short))
        return {
            "device": device,
            "op": op,
            "dtype": dtype,
            "kernel": last_kernel().name,
            "max_ulp": float((error / ulp).max()),
            "max_error": float(error.max()),
            "ok": bool((error <= bound).all()),
        }

    qkv = (norm_weight, qkv_weight, shape.num_heads, shape.num_kv_heads)
    return [
        row("rms_norm", lambda: [rms_norm(x, norm_weight)], x64),
        row("add_rms_norm", lambda: add_rms_norm(x, residual, norm_weight)[:1], s64),
        row("rms_norm_qkv", lambda: rms_norm_qkv(x, *qkv), x64, w64),
    ]


def benchmark(devices: list[str]) -> list[dict]:
    """One decode step and one norm of Qwen3-0.6B's shape in float32, the weights as warm as a loop leaves them."""
    import numpy as np

    from . import rms_norm, rms_norm_qkv, to_device
    from .testing.shapes import model
    from .testing.timing import time_cpu

    shape, random = model("qwen3-0.6b"), np.random.default_rng(0)
    x, many, gain, weight = (
        random.standard_normal(size, dtype=np.float32)
        for size in ((1, shape.hidden), (4096, shape.hidden), shape.hidden, (shape.qkv, shape.hidden))
    )
    tokens = {"rms_norm": len(many), "rms_norm_qkv": 1}
    moved = {"rms_norm": 2 * many.nbytes, "rms_norm_qkv": weight.nbytes}
    rows = []
    for device in devices:
        if device != "cpu":
            x, many, gain, weight = (to_device(a, device) for a in (x, many, gain, weight))
        out = rms_norm(many, gain)
        layer = (x, gain, weight, shape.num_heads, shape.num_kv_heads)
        cases = {
            "rms_norm": lambda _, a=(many, gain), o=out: rms_norm(*a, out=o),
            "rms_norm_qkv": lambda _, a=layer: rms_norm_qkv(*a),
        }
        synchronise = (lambda a=out: a.numpy()) if device != "cpu" else None
        seconds = BENCHMARK_SECONDS / len(devices) / len(cases)
        for op, timing in time_cpu(cases, seconds=seconds, between=synchronise).items():
            row = {"device": device, "op": op, "dtype": "float32", "tokens": tokens[op], "hidden": shape.hidden}
            if hasattr(timing, "error"):
                raise RuntimeError(f"{op} on {device}: {timing.error}")
            rows.append(row | {"us": round(timing.us, 2), "gb_per_s": round(moved[op] / timing.us / 1e3, 1)})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm", description="What works here, and what does not.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the report as JSON")
    how.add_argument(
        "--regret",
        action="store_true",
        help="instead of the report: time the kernels chosen at some points beside the others, 10 seconds a device",
    )
    options = parser.parse_args(arguments)
    if options.regret:
        return report_regret()
    doctor = Doctor()
    doctor.run()
    if options.json:
        print(json.dumps(doctor.report | {"problems": doctor.problems}, indent=1))
    else:
        print(render(doctor.report, doctor.problems))
    return 1 if doctor.problems else 0
