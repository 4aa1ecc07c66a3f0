"""What a call costs the host: microseconds from Python until the call returns, on shapes whose work is next to nothing.

On CUDA a call returns when its launch is queued; the device is waited for between samples, off the clock. The steps
show where the time goes: each differs from the one before it by what its name says.
"""

import argparse

import minivllm
from benchmarks import peers
from benchmarks.report import Report
from minivllm.testing.shapes import QKVShape
from minivllm.testing.timing import time_cpu

TINY = QKVShape("host", 64, 2, 1, 32)  # on the CPU
SMALL = QKVShape("host", 1024, 16, 8, 128)  # on the GPU, where the host does not wait
METHOD = {"all": "us of host time per call; median and quartiles over batches, variants in turns"}


def variants_of(shape: QKVShape, dtype: str, device: str) -> dict:
    import torch
    import torch.nn.functional as F

    kind = {"dtype": dtype, "device": device}
    x, gamma = peers.normal(1, shape.hidden, **kind), peers.normal(shape.hidden, **kind)
    weight = peers.normal(shape.qkv, shape.hidden, scale=0.02, **kind)
    out, packed = torch.empty_like(x), torch.empty(1, shape.qkv, dtype=x.dtype, device=device)
    residual_out = torch.empty_like(x)
    sizes = [shape.q_size, shape.kv_size, shape.kv_size]
    heads = shape.num_heads, shape.num_kv_heads
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=gamma, qkv_weight=weight, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads
    )
    found = {
        "an empty lambda": lambda i: None,
        "a call into the extension": lambda i: minivllm.get_num_threads(),
        "rms_norm, out=": lambda i: minivllm.rms_norm(x, gamma, out=out),
        "rms_norm": lambda i: minivllm.rms_norm(x, gamma),
        "add_rms_norm, both out=": lambda i: minivllm.add_rms_norm(x, x, gamma, out=out, residual_out=residual_out),
        "rms_norm_qkv, out=": lambda i: minivllm.rms_norm_qkv(x, gamma, weight, *heads, out=packed),
        "rms_norm_qkv": lambda i: minivllm.rms_norm_qkv(x, gamma, weight, *heads),
        "layer(x, out=)": lambda i: layer(x, out=packed),
        "layer(x)": lambda i: layer(x),
        "torch.empty": lambda i: torch.empty(1, shape.qkv, dtype=x.dtype, device=device),
        "torch split in three": lambda i: packed.split(sizes, dim=-1),
        "torch rms_norm": lambda i: F.rms_norm(x, (shape.hidden,), gamma, peers.EPS),
        "torch rms_norm + linear + split": lambda i: peers.rms_norm_qkv(x, gamma, weight, None).split(sizes, dim=-1),
    }
    if device == "cpu" and dtype == "f32":
        x_np, gamma_np, weight_np, out_np = (tensor.numpy() for tensor in (x, gamma, weight, out))
        found |= {
            "rms_norm, out=, NumPy arrays": lambda i: minivllm.rms_norm(x_np, gamma_np, out=out_np),
            "rms_norm_qkv, NumPy arrays": lambda i: minivllm.rms_norm_qkv(x_np, gamma_np, weight_np, *heads),
            "numpy rms_norm + matmul": lambda i: peers.numpy_rms_norm_qkv(x_np, gamma_np, weight_np, None),
        }
    return found


def run(args: argparse.Namespace, report: Report) -> None:
    import torch

    shape = SMALL if args.device == "cuda" else TINY
    for dtype in args.dtype:
        case = {"op": "host", "shape": shape.name, "tokens": 1, "hidden": shape.hidden, "outputs": shape.qkv}
        case |= {"dtype": dtype, "mode": "host", "copies": 1, "bytes": 0, "flops": 0}
        variants = variants_of(shape, dtype, args.device)
        between, batch = (torch.cuda.synchronize, 100) if args.device == "cuda" else (None, None)
        results = time_cpu(variants, seconds=0.2 if args.quick else 0.5, between=between, batch=batch)
        report.add(case, results)
