"""linear, linear_add, rms_norm_linear and rms_norm_gate_up: the projections that close the halves of a layer, the head
of a language model, and gate and up of the MLP, beside the time of reading their weights and cuBLAS.

x is the same in all calls, since a chain without a norm would run into zero or infinity. They walk over more weights
than the cache holds; linear_add adds to one residual in place, so each call waits for the one before it.
"""

import argparse

import minivllm
from benchmarks import peers
from benchmarks.cases import ELEMENT_BYTES, ours, rows
from benchmarks.qkv import CUDA_OPTIONS, FEW_TOKENS, OPTIONS, run_chains
from benchmarks.report import Report
from minivllm.testing.shapes import GATE_UPS, HEADS, PROJECTIONS, LinearShape

SHAPES = {
    "linear": PROJECTIONS,
    "linear_add": PROJECTIONS,
    "rms_norm_linear": HEADS,
    "rms_norm_gate_up": GATE_UPS,
}

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph; median and quartiles over replays, variants in turns; walking "
    "over 4 to 64 weights (400 MB)",
    "cpu": "us per call; median and quartiles over calls, variants in turns; walking over weights of four times the "
    "largest cache; peak_bytes: growth of the resident set in one call",
}


class Calls:
    """Calls of an op on one x, two outputs in turns or one in place, and `layers`: (norm weight, weight) of each."""

    def __init__(self, op: str, shape: LinearShape, tokens: int, dtype: str, device: str, layers: list):
        self.op, self.shape, self.tokens, self.layers = op, shape, tokens, layers
        self.x = peers.normal(tokens, shape.hidden, dtype=dtype, device=device)
        self.columns = shape.outputs // 2 if op == "rms_norm_gate_up" else shape.outputs
        self.outs = [peers.normal(tokens, self.columns, dtype=dtype, device=device) for _ in range(2)]

    def layer(self, i: int):
        return self.layers[i % len(self.layers)]

    def fused(self, i: int, **options) -> None:
        norm_weight, weight = self.layer(i)
        options = {"static_weights": True, "weight_layout": "out_in", "out": self.outs[i % 2], **options}
        if self.op == "linear":
            minivllm.linear(self.x, weight, **options)
        elif self.op == "linear_add":
            minivllm.linear_add(self.x, weight, self.outs[0], **options | {"out": self.outs[0]})
        else:
            getattr(minivllm, self.op)(self.x, norm_weight, weight, peers.EPS, **options)

    def two_ops(self, i: int) -> None:
        """What rms_norm_gate_up is one call of: the intermediate goes through memory."""
        norm_weight, weight = self.layer(i)
        gate_up = minivllm.rms_norm_linear(
            self.x, norm_weight, weight, peers.EPS, static_weights=True, weight_layout="out_in"
        )
        minivllm.silu_and_mul(gate_up, out=self.outs[i % 2])

    def torch(self, i: int) -> None:
        """The expressions that the op replaces."""
        import torch.nn.functional as F

        norm_weight, weight = self.layer(i)
        x = peers.rms_norm(self.x, norm_weight) if self.op.startswith("rms_norm") else self.x
        out = F.linear(x, weight)
        if self.op == "linear_add":
            self.outs[0].add_(out)
        if self.op == "rms_norm_gate_up":
            gate, up = out.chunk(2, -1)
            F.silu(gate).mul_(up)

    def gemm(self, i: int) -> None:
        """cuBLAS alone, which can add in its own end."""
        import torch
        import torch.nn.functional as F

        _, weight = self.layer(i)
        if self.op == "linear_add":
            torch.addmm(self.outs[0], self.x, weight.t(), out=self.outs[1])
        else:
            F.linear(self.x, weight)


def case_of(op: str, shape: LinearShape, tokens: int, dtype: str, count: int) -> dict:
    read = shape.outputs if op == "linear_add" else 0
    written = shape.outputs // 2 if op == "rms_norm_gate_up" else shape.outputs
    moved = shape.outputs * shape.hidden + tokens * (shape.hidden + written + read)
    return {
        "op": op,
        "shape": shape.name,
        "tokens": tokens,
        "hidden": shape.hidden,
        "outputs": shape.outputs,
        "dtype": dtype,
        "mode": "walk",
        "copies": count,
        "bytes": moved * ELEMENT_BYTES[dtype],
        "flops": 2 * tokens * shape.hidden * shape.outputs,
    }


def variants_of(calls: Calls, dtype: str, args: argparse.Namespace, environment: dict) -> dict:
    cuda = args.device == "cuda"
    kernels = rows(calls.op, dtype, args.device, args.kernel)
    found = ours(calls.fused, [name for name in kernels if takes(calls, name)], CUDA_OPTIONS if cuda else OPTIONS)
    found |= {"torch": calls.torch, "gemm alone": calls.gemm}
    if calls.op == "rms_norm_gate_up":
        found |= {"minivllm two ops": calls.two_ops}
    if cuda and calls.tokens <= FEW_TOKENS:
        from benchmarks import device_peers

        found |= device_peers.read_floors([weight for _, weight in calls.layers], environment["gpu_sms"])
    return found


def takes(calls: Calls, kernel: str) -> bool:
    try:
        calls.fused(0, kernel=kernel)
    except ValueError:
        return False
    return True


def run(op: str, args: argparse.Namespace, report: Report) -> None:
    """Every shape x dtype x token count of the command line."""
    shapes = [shape for shape in SHAPES[op] if not args.shapes or shape.name in args.shapes]

    def calls_of(shape: LinearShape, dtype: str, count: int):
        kind = {"dtype": dtype, "device": args.device}
        layers = [
            (
                peers.normal(shape.hidden, mean=1.0, scale=0.1, **kind),
                peers.normal(shape.outputs, shape.hidden, scale=0.02, **kind),
            )
            for _ in range(count)
        ]
        return lambda tokens: Calls(op, shape, tokens, dtype, args.device, layers)

    def case(shape: LinearShape, tokens: int, dtype: str, count: int) -> dict:
        return case_of(op, shape, tokens, dtype, count)

    run_chains(args, report, [(s, s.outputs * s.hidden) for s in shapes], calls_of, case, variants_of)
