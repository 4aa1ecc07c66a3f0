"""The CUDA kernels, compiled for the CPU (tests/emulation), against float64: what they compute is tested where there is no
GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT, SANITIZED

EMULATION = ROOT / "tests" / "emulation"


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    return next(
        (Path(home, "include") for home in homes if home and Path(home, "include", "cuda_bf16.h").exists()), None
    )


def compiled(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(map(str, command)) + "\n" + done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the driver prints."""
    headers = cuda_headers()
    if headers is None or not shutil.which("g++"):
        pytest.skip("needs g++ and the headers of CUDA")
    if SANITIZED:
        pytest.skip("fibers switch stacks, which AddressSanitizer does not follow")
    build = tmp_path_factory.mktemp("emulation")
    shutil.copytree(ROOT / "csrc", build / "csrc")
    cuda = build / "csrc" / "cuda"
    for path in EMULATION.glob("*.cuh"):
        shutil.copy(path, cuda)
    sources = [path for path in cuda.glob("*.cu") if path.name != "device.cu"]
    for path in sources:  # shared memory belongs to the emulated block
        text = re.sub(
            r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
            r"\1 *const \2 = reinterpret_cast<\1 *>(cpu::shared());",
            path.read_text(),
        )
        path.write_text(text.replace("__shared__ ", "static "))
    common = ["-fno-pie", "-w", "-I", build / "csrc", "-DMV_WITH_CUDA=1", "-c"]
    cpp = ["g++", "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-I", headers, "-I", EMULATION, "-include", "cuda_on_cpu.h"]
    jobs = [[*cpp, *common, "-x", "c++", path, "-o", path.with_suffix(".o")] for path in sources]
    jobs += [[*cpp, *common, EMULATION / "driver.cpp", "-o", cuda / "driver.o"]]
    for name in ("rms_norm", "rms_norm_qkv", "dispatch", "checks"):  # the lists, and what they and the kernels call
        jobs += [["gcc", "-std=c11", *common, build / "csrc" / "ops" / f"{name}.c", "-o", cuda / f"ops_{name}.o"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, jobs))
    # The lists name the kernels of the CPU too: those are not linked.
    driver = build / "driver"
    compiled(["g++", "-no-pie", "-Wl,--unresolved-symbols=ignore-all", *cuda.glob("*.o"), "-o", driver])
    return subprocess.run([driver], capture_output=True, text=True, timeout=600)


def test_every_case_of_every_kernel(report):
    assert report.returncode == 0, report.stdout + report.stderr


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_qkv"])
def test_no_kernel_is_left_out(op, report):
    rows = re.findall(rf"^{op} (\w+) (.*)$", report.stdout, re.MULTILINE)
    assert rows
    for name, what in rows:
        assert "is not linked here" not in what, name
