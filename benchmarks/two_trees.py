"""What a call costs the host in this checkout and in another one: `python -m benchmarks.two_trees OTHER [--json FILE]`.

Both are built and imported in one process, and batches of calls run in turns, so that both see the same clock rates. A
row is one call on one device: microseconds in either checkout, and the quartiles of the quotients of neighbouring
batches, ours by theirs. On a GPU a call returns when its launch is queued, and the GPU is waited for between batches.
"""

import argparse
import inspect
import json
import statistics
import sys
from pathlib import Path

from benchmarks.environment import environment
from minivllm.testing.shapes import QKVShape
from minivllm.testing.timing import Host, in_turns

CALLS = 400
SHAPES = {"cpu": QKVShape("host", 64, 2, 1, 32), "cuda": QKVShape("host", 1024, 16, 8, 128)}


def package_of(root: Path):
    """The package minivllm of that checkout, which another import of the name does not meet."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "minivllm"}
    root = root.resolve()
    sys.path.insert(0, str(root))
    try:
        import minivllm

        assert Path(minivllm.__file__).parent.parent == root, minivllm.__file__
        return minivllm
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "minivllm"]:
            del sys.modules[name]
        sys.modules.update(before)


def calls_of(package, device: str) -> dict:
    """Calls by name, with weights that are vouched for, which was once the default."""
    import torch

    shape, kind = SHAPES[device], {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    x, gamma = torch.randn(1, shape.hidden, **kind), torch.randn(shape.hidden, **kind)
    weight = torch.randn(shape.qkv, shape.hidden, **kind) * 0.02
    out, sums, packed = torch.empty_like(x), torch.empty_like(x), torch.empty(1, shape.qkv, **kind)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    known = inspect.signature(package.FusedRMSNormQKV).parameters  # an old one had no choice
    vouched = {"static_weights": True} if "static_weights" in known else {}
    layer = package.FusedRMSNormQKV(
        norm_weight=gamma,
        qkv_weight=weight,
        num_heads=heads,
        num_kv_heads=kv_heads,
        weight_layout="out_in",
        **vouched,
    )
    given = (x, gamma, weight, heads, kv_heads)
    return {
        "rms_norm, out=": lambda i: package.rms_norm(x, gamma, out=out),
        "rms_norm": lambda i: package.rms_norm(x, gamma),
        "add_rms_norm, both out=": lambda i: package.add_rms_norm(x, x, gamma, out=out, residual_out=sums),
        "rms_norm_qkv, out=": lambda i: package.rms_norm_qkv(*given, out=packed, static_weights=True),
        "rms_norm_qkv": lambda i: package.rms_norm_qkv(*given, static_weights=True),
        "layer(x, out=)": lambda i: layer(x, out=packed),
        "layer(x)": lambda i: layer(x),
    }


def compare(ours, theirs, device: str, batches: int) -> dict[str, float]:
    import torch

    between = torch.cuda.synchronize if device == "cuda" else None
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    hosts = {"ours": Host(ours, CALLS, between), "theirs": Host(theirs, CALLS, between)}
    for number, name in enumerate(in_turns(list(hosts), batches + 4)):
        took = hosts[name].sample()
        if number >= 8:  # before, caches fill
            times[name].append(took)
    quotients = sorted(a / b for a, b in zip(times["ours"], times["theirs"], strict=True))
    low, middle, high = statistics.quantiles(quotients, n=4)
    return {
        "us": statistics.median(times["ours"]),
        "other_us": statistics.median(times["theirs"]),
        "quotient": middle,
        "quotient_q1": low,
        "quotient_q3": high,
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout, built in place")
    parser.add_argument("--batches", type=int, default=200, help=f"of {CALLS} calls each, by each checkout")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    packages = package_of(Path(__file__).parent.parent), package_of(args.other)
    rows = []
    for device in devices:
        ours, theirs = (calls_of(package, device) for package in packages)
        for name in ours:
            row = compare(ours[name], theirs[name], device, args.batches)
            rows.append({"device": device, "call": name} | row)
            print(
                f"{device:5} {name:26} {row['us']:6.2f} us, there {row['other_us']:6.2f}: "
                f"quotient {row['quotient']:.3f} ({row['quotient_q1']:.3f} to {row['quotient_q3']:.3f})",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(devices[-1], None), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
