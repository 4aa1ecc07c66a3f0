"""Builds the wheels: `python tools/wheels.py cpu`, `python tools/wheels.py cuda [--archs "80;90;90a"]`.

gcc and nvcc compile, so the code is that of an ordinary build. ziglang, a package of PyPI, links against the C library
of the oldest Linux that the wheel is for, whatever this machine's own is. What comes out lies in dist/cpu or dist/cu13
and is looked over: abi3audit for the stable ABI, auditwheel for the C library, twine for the metadata, and below for
what is linked, paths of this machine, and the size.

Needs a C compiler and, for CUDA, nvcc; run by a Python that has tools/requirements.txt installed (`make wheels`).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
# Machine code for each; 90a is Hopper's own. sm_80 also runs on 8.6 and 8.9, sm_100 on 10.3, sm_120 on 12.1. The PTX
# is of compute_90 (setup.py), for what is newer than all of them.
ARCHS = "80;90;90a;100;120"
LARGEST_MB = 60
# The extension may need these and nothing else.
LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run(list(map(str, command)), check=True, cwd=ROOT, **options)


def output(*command):
    return run(*command, stdout=subprocess.PIPE, text=True).stdout


def build(kind, archs):
    """The wheel of one kind, in a directory of its own, from objects of its own."""
    work, dist = ROOT / "build" / "wheels" / kind, ROOT / "dist" / kind
    for directory in (work / "lib", work / "bdist", dist):
        shutil.rmtree(directory, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "CC": os.environ.get("CC", "gcc"),
        "LDSHARED": f"{sys.executable} -m ziglang cc -target x86_64-linux-gnu.{GLIBC} -shared -s",
        "MINIVLLM_CUDA": "0" if kind == "cpu" else "1",
        "MINIVLLM_CUDA_ARCHS": archs,
        "MINIVLLM_SANITIZE": "",
    }
    options = ["--tag-build", f"+{kind}"] if kind != "cpu" else []
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", work, *options,
        "build", "--build-base", work, "--build-lib", work / "lib",
        "bdist_wheel", "--bdist-dir", work / "bdist", "--dist-dir", dist, "--plat-name", PLATFORM,
        env=environment)  # fmt: skip
    (wheel,) = dist.glob("*.whl")
    return wheel


def check(wheel, kind):
    """Everything that can be known about a wheel without running it; SystemExit says what is wrong."""
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if not free_threaded:
        run(sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.11", wheel)
    shown = output(sys.executable, "-m", "auditwheel", "show", wheel)
    oldest = re.search(r'tag:\s+"manylinux_(\d+)_(\d+)_x86_64"', " ".join(shown.split()))
    if not oldest or (int(oldest[1]), int(oldest[2])) > tuple(map(int, GLIBC.split("."))):
        raise SystemExit(f"{wheel.name} does not run on {PLATFORM}:\n{shown}")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (extension,) = [name for name in names if name.endswith(".so")]
        binary = archive.read(extension)
    strays = [name for name in names if not re.match(r"minivllm(-[^/]+\.dist-info)?/", name)]
    if strays:
        raise SystemExit(f"{wheel.name} holds {strays}, which are no part of the package")
    for path in (str(ROOT), str(Path.home()) if Path.home() != Path("/root") else "/root/"):
        if path.encode() in binary:
            raise SystemExit(f"{extension} holds the path {path} of the machine that built it")
    unpacked = ROOT / "build" / "wheels" / kind / "checked.so"
    unpacked.write_bytes(binary)
    dynamic = output("readelf", "-dW", unpacked)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    if needed - LIBRARIES:
        raise SystemExit(f"{extension} needs {sorted(needed - LIBRARIES)} at run time")
    if re.search(r"\((RUNPATH|RPATH)\)", dynamic):
        raise SystemExit(f"{extension} has a path in which libraries are searched:\n{dynamic}")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", output("readelf", "-VW", unpacked))
    highest = max(tuple(map(int, version)) for version in versions)
    megabytes = wheel.stat().st_size / 1e6
    print(
        f"{wheel.relative_to(ROOT)}: {megabytes:.1f} MB, the extension {len(binary) / 1e6:.1f} MB; "
        f"highest symbol GLIBC_{highest[0]}.{highest[1]}; needs {' '.join(sorted(needed))}"
    )
    if megabytes > LARGEST_MB:
        raise SystemExit(f"{wheel.name} is larger than {LARGEST_MB} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=("cpu", "cuda"))
    parser.add_argument("--archs", default=ARCHS, help=f"of the CUDA wheel (default {ARCHS})")
    args = parser.parse_args()
    # The name of a CUDA wheel says which runtime is inside it.
    kind = "cpu" if args.kind == "cpu" else f"cu{cuda_major()}"
    check(build(kind, args.archs), kind)


def cuda_major():
    sys.path.insert(0, str(ROOT))
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not shutil.which(nvcc):
        raise SystemExit("the CUDA wheel needs nvcc, in NVCC or PATH")
    return re.search(r"release (\d+)", output(nvcc, "--version"))[1]


if __name__ == "__main__":
    main()
