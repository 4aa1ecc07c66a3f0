"""Tries a wheel as a stranger would: `python tools/try_wheel.py dist/cpu/*.whl`.

A fresh environment that holds no torch and whose PATH has no compiler; pip installs the wheel, then the README's first
example and `python -m minivllm` run, in another directory. Says how long that took, and fails where it took more than
--seconds. Run by the interpreter that is to be tried; --pytest also runs the tests that need NumPy alone.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_rms_norm.py", "test_rms_norm_qkv.py", "test_arguments.py", "test_api.py", "test_zero_tokens.py"]
ABSENT = "import importlib.util, shutil; assert not importlib.util.find_spec('torch'); assert not shutil.which('gcc')"


def first_example():
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--pip", type=Path, help="a wheel of pip, for an interpreter whose ensurepip has none")
    parser.add_argument("--pytest", action="store_true", help="also run the tests that need no framework")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bare = ["--without-pip"] if args.pip else []
        subprocess.run([sys.executable, "-m", "venv", *bare, f"{directory}/venv"], check=True)
        pip = [f"{args.pip.resolve()}/pip"] if args.pip else ["-m", "pip"]
        pip += ["install", "-q", "--disable-pip-version-check", "--only-binary", ":all:"]
        python = f"{directory}/venv/bin/python"
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC")}
        environment["PATH"] = f"{directory}/venv/bin"

        def run(*command, cwd=directory):
            subprocess.run([python, *map(str, command)], check=True, cwd=cwd, env=environment)

        started = time.monotonic()
        run(*pip, args.wheel.resolve())
        run("-c", ABSENT)
        run("-c", first_example() + "\nassert v.shape == (1, kv_heads, head_dim), v.shape\n")
        seconds = time.monotonic() - started
        run("-m", "minivllm")
        print(
            f"{args.wheel.name} on Python {sys.version.split()[0]}: installed, and the README's first example run, "
            f"without a compiler and without torch, in {seconds:.1f} s"
        )
        if seconds > args.seconds:
            raise SystemExit(f"that took more than {args.seconds:g} s")
        if args.pytest:
            run(*pip, "pytest", "hypothesis", "ml_dtypes")
            run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(ROOT / "tests" / name for name in TESTS))


if __name__ == "__main__":
    main()
