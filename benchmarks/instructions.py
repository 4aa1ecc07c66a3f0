"""Instructions of a call in this checkout and in another one: `python -m benchmarks.instructions OTHER`.

valgrind counts them, so the same build gives the same figures on a busy machine too: NumPy's arrays of float32, one
token, with one thread. It has AVX2 at most. A row is one call: instructions here and there, with what the interpreter
takes for the call, and with the kernel.
"""

import argparse
import gc
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CALLS = 1000
ROOT = Path(__file__).parent.parent.resolve()


def calls_of(package) -> dict:
    import numpy as np

    def normal(*shape):
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    wide, gamma_wide, out_wide, sums = normal(1, 1024), normal(1024), normal(1, 1024), normal(1, 1024)
    x, gamma, weight, out, packed = normal(1, 64), normal(64), normal(128, 64), normal(1, 64), normal(1, 128)
    known = inspect.signature(package.FusedRMSNormQKV).parameters  # an old one had no choice
    layer = package.FusedRMSNormQKV(
        norm_weight=gamma,
        qkv_weight=weight,
        num_heads=2,
        num_kv_heads=1,
        weight_layout="out_in",
        **({"static_weights": True} if "static_weights" in known else {}),
    )
    return {
        "rms_norm, 1024, out=": lambda: package.rms_norm(wide, gamma_wide, out=out_wide),
        "rms_norm, 1024": lambda: package.rms_norm(wide, gamma_wide),
        "rms_norm, 64, out=": lambda: package.rms_norm(x, gamma, out=out),
        "add_rms_norm, 1024, both out=": lambda: package.add_rms_norm(
            wide, wide, gamma_wide, out=out_wide, residual_out=sums
        ),
        "rms_norm_qkv, out=": lambda: package.rms_norm_qkv(x, gamma, weight, 2, 1, out=packed, static_weights=True),
        "rms_norm_qkv": lambda: package.rms_norm_qkv(x, gamma, weight, 2, 1, static_weights=True),
        "layer(x, out=)": lambda: layer(x, out=packed),
        "layer(x)": lambda: layer(x),
    }


def repeat(call, count: int) -> None:
    for _ in range(count):
        call()


def make_calls() -> None:
    """Under valgrind, which writes down its counts at every getpgid()."""
    import minivllm

    calls = calls_of(minivllm)
    gc.disable()
    for call in calls.values():
        repeat(call, 300)
    for call in calls.values():
        os.getpgid(0)
        repeat(call, CALLS)
        os.getpgid(0)
    print("\n".join(calls))


def count(root: Path) -> dict[str, float]:
    """By call, in the checkout at `root`, which is built in place."""
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        counts = f"{folder}/counts"
        valgrind = ["valgrind", "--tool=callgrind", "--dump-before=getpgid", f"--callgrind-out-file={counts}"]
        code = "from benchmarks.instructions import make_calls; make_calls()"
        run = subprocess.run(
            [*valgrind, sys.executable, "-c", f"import minivllm, sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
            cwd=root,
            env={**os.environ, **alone, "PYTHONPATH": str(root)},
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        names = run.stdout.splitlines()
        dumps = [Path(f"{counts}.{2 * i + 2}").read_text() for i in range(len(names))]
    totals = [int(re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)[1]) for dump in dumps]
    return {name: total / CALLS for name, total in zip(names, totals, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout, built in place")
    ours, theirs = (count(root) for root in (ROOT, parser.parse_args().other.resolve()))
    for name, here in ours.items():
        print(f"{name:30} {here:8.0f}, there {theirs[name]:8.0f}: quotient {here / theirs[name]:.3f}")


if __name__ == "__main__":
    main()
