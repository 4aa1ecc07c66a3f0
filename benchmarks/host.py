"""What a call costs the host: microseconds from Python until the call returns, on shapes whose work is next to nothing.

On CUDA a call returns when its launch is queued; the device is waited for between samples, off the clock. Every case is
timed as models are served, without gradients, and again with them recorded (of nothing here: no tensor requires any).

`net_us` is without what no caller can avoid: on CUDA the launch of an empty kernel, which the same run times from
Python; on the CPU the kernel, whose own time is the step `run` below.

Of our own calls the extension itself counts the steps, in batches apart from the timed ones, because a clock read costs
about 25 ns: read (arguments, and views of the tensors), plan (every check, and the choice of a kernel), allocate, run
(the launch, or on the CPU the kernel) and return (the objects q, k and v, and letting go of the arguments). What they
lack of the whole is Python's part: the call itself, and the end of the results.
"""

import argparse
import statistics

import minivllm
from benchmarks import peers
from benchmarks.report import Report
from minivllm import _C
from minivllm.testing.shapes import QKVShape
from minivllm.testing.timing import time_cpu

TINY = QKVShape("host", 64, 2, 1, 32)  # on the CPU
SMALL = QKVShape("host", 1024, 16, 8, 128)  # on the GPU, where the host does not wait
METHOD = {
    "all": "us of host time per call; median and quartiles over batches, variants in turns",
    "net_us": "us less the launch of an empty kernel (CUDA) or less run_us (CPU)",
    "steps": "read_us, plan_us, allocate_us, run_us, return_us: medians over other batches, of 100 calls",
}
STEPS = ("read", "plan", "allocate", "run", "return")
LAUNCH = "an empty kernel"


def variants_of(shape: QKVShape, dtype: str, device: str) -> tuple[dict, dict]:
    """Ours, whose steps are counted, and the others."""
    import torch
    import torch.nn.functional as F

    kind = {"dtype": dtype, "device": device}
    x, gamma = peers.normal(1, shape.hidden, **kind), peers.normal(shape.hidden, **kind)
    weight = peers.normal(shape.qkv, shape.hidden, scale=0.02, **kind)
    out, packed = torch.empty_like(x), torch.empty(1, shape.qkv, dtype=x.dtype, device=device)
    residual_out = torch.empty_like(x)
    sizes = [shape.q_size, shape.kv_size, shape.kv_size]
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=gamma, qkv_weight=weight, num_heads=heads, num_kv_heads=kv_heads, weight_layout="out_in"
    )
    ours = {
        "rms_norm, out=": lambda i: minivllm.rms_norm(x, gamma, out=out),
        "rms_norm": lambda i: minivllm.rms_norm(x, gamma),
        "add_rms_norm, both out=": lambda i: minivllm.add_rms_norm(x, x, gamma, out=out, residual_out=residual_out),
        "rms_norm_qkv, out=": lambda i: minivllm.rms_norm_qkv(x, gamma, weight, heads, kv_heads, out=packed),
        "rms_norm_qkv": lambda i: minivllm.rms_norm_qkv(x, gamma, weight, heads, kv_heads),
        "layer(x, out=)": lambda i: layer(x, out=packed),
        "layer(x)": lambda i: layer(x),
    }
    others = {
        "an empty lambda": lambda i: None,
        "a call into the extension": lambda i: minivllm.get_num_threads(),
        "torch.empty": lambda i: torch.empty(1, shape.qkv, dtype=x.dtype, device=device),
        "torch split in three": lambda i: packed.split(sizes, dim=-1),
        "torch rms_norm": lambda i: F.rms_norm(x, (shape.hidden,), gamma, peers.EPS),
        "torch rms_norm + linear + split": lambda i: peers.rms_norm_qkv(x, gamma, weight, None).split(sizes, dim=-1),
    }
    if device == "cuda":
        others[LAUNCH] = lambda i: _C._launch_nothing(0)
    if device == "cpu" and dtype == "f32":
        x_np, gamma_np, weight_np, out_np = (tensor.numpy() for tensor in (x, gamma, weight, out))
        ours |= {
            "rms_norm, out=, NumPy arrays": lambda i: minivllm.rms_norm(x_np, gamma_np, out=out_np),
            "rms_norm, NumPy arrays": lambda i: minivllm.rms_norm(x_np, gamma_np),
            "rms_norm_qkv, NumPy arrays": lambda i: minivllm.rms_norm_qkv(x_np, gamma_np, weight_np, heads, kv_heads),
        }
        others["numpy rms_norm + matmul"] = lambda i: peers.numpy_rms_norm_qkv(x_np, gamma_np, weight_np, None)
    return ours, others


def steps_of(variant, between, batches: int = 15, calls: int = 100) -> dict[str, float]:
    """Microseconds of each step of a call."""
    sums = []
    for _ in range(batches):
        if between is not None:
            between()
        _C._steps(True)
        for number in range(calls):
            variant(number)
        sums.append(_C._steps(False))
    return {f"{step}_us": statistics.median(each[at] for each in sums) / calls / 1e3 for at, step in enumerate(STEPS)}


def with_net(results: dict, steps: dict, device: str) -> dict:
    """The further columns of every variant."""
    extra = {name: dict(columns) for name, columns in steps.items()}
    for name, timing in results.items():
        if not hasattr(timing, "us"):
            continue
        if device == "cuda" and hasattr(results[LAUNCH], "us"):
            extra.setdefault(name, {})["net_us"] = timing.us - results[LAUNCH].us
        elif device == "cpu" and name in steps:
            extra[name]["net_us"] = timing.us - steps[name]["run_us"]
    return extra


def print_steps(extra: dict) -> None:
    print(f"  {'of which':34}" + "".join(f"{name:>10}" for name in (*STEPS, "net")))
    for name, columns in extra.items():
        values = [columns.get(f"{step}_us") for step in (*STEPS, "net")]
        print(f"  {name:34}" + "".join(f"{'' if value is None else f'{value:.2f}':>10}" for value in values))


def run(args: argparse.Namespace, report: Report) -> None:
    import torch

    with torch.inference_mode(False):  # whose tensors torch keeps no versions of, which no caller is sure of
        time_calls(args, report)


def time_calls(args: argparse.Namespace, report: Report) -> None:
    import torch

    shape = SMALL if args.device == "cuda" else TINY
    between, batch = (torch.cuda.synchronize, 100) if args.device == "cuda" else (None, None)
    for dtype in args.dtype:
        ours, others = variants_of(shape, dtype, args.device)
        case = {"op": "host", "shape": shape.name, "tokens": 1, "hidden": shape.hidden, "outputs": shape.qkv}
        case |= {"dtype": dtype, "copies": 1, "bytes": 0, "flops": 0}
        for mode, records in (("host, no_grad", False), ("host", True)):
            with torch.set_grad_enabled(records):
                results = time_cpu(ours | others, seconds=0.2 if args.quick else 0.5, between=between, batch=batch)
                steps = {name: steps_of(variant, between) for name, variant in ours.items()}
            extra = with_net(results, steps, args.device)
            print(f"\n{mode}:", end="")
            report.add(case | {"mode": mode}, results, extra)
            print_steps(extra)
