"""silu_and_mul and gelu_and_mul: each call on buffers of its own, so that nothing is in the L2 cache.

A shape is TOKENSxHIDDEN, hidden that of the output; x is twice as wide. The tokens of a decode step come first.
"""

import argparse
import math

import minivllm
from benchmarks import peers
from benchmarks.cases import ELEMENT_BYTES, ours, rows, time_case
from benchmarks.report import Report
from minivllm.testing.timing import copies_needed

CUDA_SHAPES = ((1, 3072), (1, 12288), (16, 12288), (128, 12288), (4096, 3072), (4096, 12288), (16384, 14336))
CPU_SHAPES = ((1, 3072), (1, 12288), (128, 3072), (512, 12288))
WALK_BYTES = 400e6  # of buffers, read and written, that the calls go over
OPTIONS = {"": {}, " fp32": {"rounding": "fp32"}}

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph, over 4 to 64 buffers (400 MB); median and quartiles over replays, "
    "variants in turns. copies move the same bytes",
    "cpu": "us per call, over buffers of four times the largest cache; median and quartiles over calls, variants in "
    "turns. copies move the same bytes",
}


class Buffers:
    """`count` inputs [tokens, 2 hidden] and outputs [tokens, hidden]; and for the copies, which read as much as they
    write, outputs of half the bytes of both."""

    def __init__(self, tokens: int, hidden: int, dtype: str, device: str, count: int):
        kind = {"dtype": dtype, "device": device}
        self.ins = [peers.normal(tokens, 2 * hidden, **kind) for _ in range(count)]
        self.outs = [peers.normal(tokens, hidden, **kind) for _ in range(count)]
        self.copied = 3 * tokens * hidden // 2
        self.copies = [peers.normal(self.copied, **kind) for _ in range(count)]

    def fused(self, op: str):
        function = getattr(minivllm, op)

        def call(i: int, **options) -> None:
            i %= len(self.ins)
            function(self.ins[i], out=self.outs[i], **options)

        return call

    def fresh(self, function):
        """A variant that makes its own outputs."""
        return lambda i: function(self.ins[i % len(self.ins)])

    def of_copy(self, i: int):
        i %= len(self.ins)
        return self.ins[i].view(-1)[: self.copied], self.copies[i]

    def copy(self, i: int) -> None:
        source, to = self.of_copy(i)
        to.copy_(source)

    def copy_packets(self, i: int) -> None:
        from benchmarks import device_peers

        source, to = self.of_copy(i)
        device_peers.copy(to, source, programmatic=True)


def case_of(op: str, tokens: int, hidden: int, dtype: str) -> dict:
    return {
        "op": op,
        "shape": f"{tokens}x{hidden}",
        "tokens": tokens,
        "hidden": hidden,
        "outputs": hidden,
        "dtype": dtype,
        "mode": "walk",
        "bytes": 3 * tokens * hidden * ELEMENT_BYTES[dtype],
        "flops": 0,
    }


def variants_of(op: str, buffers: Buffers, dtype: str, args: argparse.Namespace) -> dict:
    function = getattr(peers, op)
    found = ours(buffers.fused(op), rows(op, dtype, args.device, args.kernel), OPTIONS)
    found["minivllm fresh outputs"] = buffers.fresh(getattr(minivllm, op))
    found["torch"] = buffers.fresh(function)
    for name, compiled in peers.compiled(function, args.compile).items():
        found[name] = buffers.fresh(compiled)
    found["torch copy"] = buffers.copy
    if args.device == "cuda":
        found["16-byte copy"] = buffers.copy_packets
    return found


def run(op: str, args: argparse.Namespace, report: Report) -> None:
    """Every dtype x shape of the command line, or of the lists above."""
    default = CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    for dtype in args.dtype:
        for tokens, hidden in [map(int, shape.split("x")) for shape in args.shapes] or default:
            case = case_of(op, tokens, hidden, dtype)
            if args.device == "cuda":
                case["copies"] = min(max(math.ceil(WALK_BYTES / case["bytes"]), 4), 64)
            else:
                case["copies"] = copies_needed(case["bytes"], report.data["environment"]["cpu_cache_bytes"])
            buffers = Buffers(tokens, hidden, dtype, args.device, case["copies"])
            results, columns = time_case(
                case, variants_of(op, buffers, dtype, args), args.device, case["copies"], args.quick
            )
            report.add(case, results, columns)
