"""Instructions of a call in this checkout and in another one: `python -m benchmarks.instructions OTHER`.

valgrind counts them, so the same build gives the same figures on a busy machine too: NumPy's arrays of float32, or with
--torch its tensors of them on the CPU without gradients, one token, with one thread. It has AVX2 at most. A row is one
call: instructions here and there, with what the interpreter takes for the call, and with the kernel.

With --torch, what malloc takes itself is left out: how long it looks for memory of torch's alignment depends on what
was freed before, by some hundred instructions. Its names are those of glibc's debug symbols, which valgrind needs.
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
MALLOC = re.compile(r"_int_|unlink_chunk|malloc_consolidate|sysmalloc|systrim")
ROOT = Path(__file__).parent.parent.resolve()


def calls_of(package, framework: str) -> dict:
    import numpy as np

    if framework == "torch":
        import torch

        torch.set_grad_enabled(False)

    def normal(*shape):
        array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(array) if framework == "torch" else array

    wide, gamma_wide, out_wide, sums = normal(1, 1024), normal(1024), normal(1, 1024), normal(1, 1024)
    x, gamma, weight, out, packed = normal(1, 64), normal(64), normal(128, 64), normal(1, 64), normal(1, 128)
    residual, sums_narrow = normal(1, 64), normal(1, 64)
    three, biases = (normal(64, 64), normal(32, 64), normal(32, 64)), (normal(64), normal(32), normal(32))
    known = inspect.signature(package.FusedRMSNormQKV).parameters  # an old one had no choice
    vouches = {"static_weights": True} if "static_weights" in known else {}
    layer, layer_of_three = (
        package.FusedRMSNormQKV(
            norm_weight=gamma, qkv_weight=given, num_heads=2, num_kv_heads=1, weight_layout="out_in", **vouches
        )
        for given in (weight, three)
    )
    return {
        "rms_norm, 1024, out=": lambda: package.rms_norm(wide, gamma_wide, out=out_wide),
        "rms_norm, 1024": lambda: package.rms_norm(wide, gamma_wide),
        "rms_norm, 64, out=": lambda: package.rms_norm(x, gamma, out=out),
        "add_rms_norm, 1024, both out=": lambda: package.add_rms_norm(
            wide, wide, gamma_wide, out=out_wide, residual_out=sums
        ),
        "add_rms_norm, 64": lambda: package.add_rms_norm(x, residual, gamma),
        "rms_norm_qkv, out=": lambda: package.rms_norm_qkv(x, gamma, weight, 2, 1, out=packed, static_weights=True),
        "rms_norm_qkv": lambda: package.rms_norm_qkv(x, gamma, weight, 2, 1, static_weights=True),
        "rms_norm_qkv, (q, k, v)": lambda: package.rms_norm_qkv(x, gamma, three, 2, 1, static_weights=True),
        "rms_norm_qkv, three biases": lambda: package.rms_norm_qkv(x, gamma, three, 2, 1, bias=biases),
        "rms_norm_qkv, residual": lambda: package.rms_norm_qkv(x, gamma, weight, 2, 1, residual=residual),
        "rms_norm_qkv, residual, both out=": lambda: package.rms_norm_qkv(
            x, gamma, weight, 2, 1, residual=residual, out=packed, residual_out=sums_narrow
        ),
        "layer(x, out=)": lambda: layer(x, out=packed),
        "layer(x)": lambda: layer(x),
        "layer(x), (q, k, v)": lambda: layer_of_three(x),
        "layer(x, residual=)": lambda: layer(x, residual=residual),
    }


def repeat(call, count: int) -> None:
    for _ in range(count):
        call()


def make_calls(framework: str) -> None:
    """Under valgrind, which writes down its counts at every getpgid()."""
    import minivllm

    calls = calls_of(minivllm, framework)
    gc.disable()
    for call in calls.values():
        repeat(call, 300)
    for call in calls.values():
        os.getpgid(0)
        repeat(call, CALLS)
        os.getpgid(0)
    print("\n".join(calls))


def total(dump: str) -> int:
    return int(re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)[1])


def of_malloc(dump: str) -> int:
    """What its functions take without those that they call: of callgrind's lines those behind their "fn=", where a
    line behind "calls=" is of another function. A name is spelled out once, then it is a number."""
    names, taken, inside, called = {}, 0, False, False
    for line in dump.splitlines():
        if named := re.match(r"(c?fn)=\((\d+)\)(?: (.*))?", line):
            kind, number, name = named.groups()
            names[number] = name or names[number]
            inside = inside if kind == "cfn" else bool(MALLOC.match(names[number]))
        elif line.startswith("calls="):
            called = True
        elif line[:1] in "+-*0123456789" and line:
            taken += int(line.split()[1]) if inside and not called else 0
            called = False
    return taken


def count(root: Path, framework: str) -> dict[str, float]:
    """By call, in the checkout at `root`, which is built in place."""
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        counts = f"{folder}/counts"
        valgrind = ["valgrind", "--tool=callgrind", "--dump-before=getpgid", f"--callgrind-out-file={counts}"]
        code = f"from benchmarks.instructions import make_calls; make_calls({framework!r})"
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
    totals = [total(dump) - (of_malloc(dump) if framework == "torch" else 0) for dump in dumps]
    return {name: total / CALLS for name, total in zip(names, totals, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout, built in place")
    parser.add_argument("--torch", action="store_true", help="torch's tensors in place of NumPy's arrays")
    arguments = parser.parse_args()
    framework = "torch" if arguments.torch else "numpy"
    ours, theirs = (count(root, framework) for root in (ROOT, arguments.other.resolve()))
    for name, here in ours.items():
        print(f"{name:33} {here:8.0f}, there {theirs[name]:8.0f}: quotient {here / theirs[name]:.3f}")


if __name__ == "__main__":
    main()
