"""rms_norm and add_rms_norm.

Two kinds of cases. "walk": prefill shapes, each call on buffers of its own, so that nothing is in the L2 cache.
"chain": few tokens, where each call reads what the one before it wrote, as the layers of a model do.
"""

import argparse
import math

import minivllm
from benchmarks import peers
from benchmarks.cases import ELEMENT_BYTES, ours, rows, time_case
from benchmarks.report import Report
from minivllm.testing.timing import copies_needed

CUDA_WALK = (
    (128, 4096),
    (4096, 1024),
    (4096, 4096),
    (32768, 1024),
    (32768, 4096),
    (32768, 8192),
    (16384, 16384),
)
CPU_WALK = ((128, 4096), (4096, 1024), (4096, 4096))
CHAIN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
QUICK_TOKENS = (1, 16, 128)
CHAIN_HIDDEN = (1024, 2048, 4096)
WALK_BYTES = 400e6  # of buffers, read and written, that the calls of a walk go over
OPTIONS = {"": {}, " fp32": {"rounding": "fp32"}}

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph; median and quartiles over replays, variants in turns; walk: over "
    "4 to 64 buffers (400 MB); chain: x is the output of the call before. copies move the same bytes",
    "cpu": "us per call; median and quartiles over calls, variants in turns; walk: over buffers of four times the "
    "largest cache; chain: x is the output of the call before. copies move the same bytes",
}


class Buffers:
    """`count` inputs and outputs, each [planes, tokens, hidden]: plane 0 is x or out, plane 1 the residual. As a chain,
    the output of call i is the input of call i + 1."""

    def __init__(self, op: str, tokens: int, hidden: int, dtype: str, device: str, chain: bool, count: int):
        planes = 2 if op == "add_rms_norm" else 1
        kind = {"dtype": dtype, "device": device}
        self.weight = peers.normal(hidden, mean=1.0, scale=0.1, **kind)
        self.ins = [peers.normal(planes, tokens, hidden, **kind) for _ in range(2 if chain else count)]
        self.outs = self.ins[::-1] if chain else [peers.normal(planes, tokens, hidden, **kind) for _ in range(count)]
        self.chain, self.adds = chain, planes == 2

    def of(self, i: int):
        i %= len(self.ins)
        return self.ins[i], self.outs[i]

    def fused(self, i: int, **options) -> None:
        source, to = self.of(i)
        if self.adds:
            minivllm.add_rms_norm(
                source[0], source[1], self.weight, peers.EPS, out=to[0], residual_out=to[1], **options
            )
        else:
            minivllm.rms_norm(source[0], self.weight, peers.EPS, out=to[0], **options)

    def torch(self, function):
        """A variant that makes its own outputs. Call 0 starts from a buffer that outlives every graph."""
        last = {}

        def call(i: int) -> None:
            inputs = last["out"] if self.chain and i > 0 else tuple(self.of(i)[0])
            out = function(*inputs, self.weight)
            last["out"] = out if self.adds else (out,)

        return call

    def fresh(self, *tensors):
        """Ours as torch is called: without out=. On a GPU the allocator gives every call of a graph the same memory,
        which then may stay in L2; on a CPU large outputs are new pages, which the kernel clears first."""
        *inputs, weight = tensors
        if self.adds:
            return minivllm.add_rms_norm(*inputs, weight, peers.EPS)
        return minivllm.rms_norm(*inputs, weight, peers.EPS)

    def copy(self, i: int) -> None:
        source, to = self.of(i)
        to.copy_(source)

    def copy_packets(self, i: int) -> None:
        from benchmarks import device_peers

        source, to = self.of(i)
        device_peers.copy(to, source, programmatic=True)

    def numpy(self):
        x, weight = self.ins[0][0].numpy(), self.weight.numpy()
        if self.adds:
            residual = self.ins[0][1].numpy()
            return lambda i: peers.numpy_rms_norm(x + residual, weight)
        return lambda i: peers.numpy_rms_norm(x, weight)


def case_of(op: str, tokens: int, hidden: int, dtype: str, chain: bool, count: int) -> dict:
    planes = 2 if op == "add_rms_norm" else 1
    return {
        "op": op,
        "shape": f"{tokens}x{hidden}",
        "tokens": tokens,
        "hidden": hidden,
        "outputs": hidden,
        "dtype": dtype,
        "mode": "chain" if chain else "walk",
        "copies": count,
        "bytes": 2 * planes * tokens * hidden * ELEMENT_BYTES[dtype],
        "flops": 0,
    }


def variants_of(op: str, buffers: Buffers, dtype: str, args: argparse.Namespace) -> dict:
    function = peers.add_rms_norm if op == "add_rms_norm" else peers.rms_norm
    found = ours(buffers.fused, rows(op, dtype, args.device, args.kernel), OPTIONS)
    found["minivllm fresh outputs"] = buffers.torch(buffers.fresh)
    found["torch"] = buffers.torch(function)
    if args.tokens or not buffers.chain:
        for name, compiled in peers.compiled(function, args.compile).items():
            found[name] = buffers.torch(compiled)
    found["torch copy"] = buffers.copy
    if args.device == "cuda":
        found["16-byte copy"] = buffers.copy_packets
    elif dtype == "f32":
        found["numpy"] = buffers.numpy()
    return found


def cases(args: argparse.Namespace) -> list[tuple[int, int, bool]]:
    """(tokens, hidden, chain) as the command line asks: --shapes are walks, --tokens chains; without either, both."""
    found = []
    if args.shapes or not args.tokens:
        default = CUDA_WALK if args.device == "cuda" else CPU_WALK
        walks = [tuple(int(part) for part in shape.split("x")) for shape in args.shapes] or default
        found += [(tokens, hidden, False) for tokens, hidden in walks]
    if args.tokens or not args.shapes:
        tokens = args.tokens or (QUICK_TOKENS if args.quick or args.device == "cpu" else CHAIN_TOKENS)
        found += [(each, hidden, True) for hidden in CHAIN_HIDDEN for each in tokens]
    return found


def run(op: str, args: argparse.Namespace, report: Report) -> None:
    """Every dtype x case of the command line."""
    for dtype in args.dtype:
        for tokens, hidden, chain in cases(args):
            case = case_of(op, tokens, hidden, dtype, chain, 2)
            if not chain:
                cache = report.data["environment"]["cpu_cache_bytes"]
                if args.device == "cuda":
                    case["copies"] = min(max(math.ceil(WALK_BYTES / case["bytes"]), 4), 64)
                else:
                    case["copies"] = copies_needed(case["bytes"], cache)
            buffers = Buffers(op, tokens, hidden, dtype, args.device, chain, case["copies"])
            variants = variants_of(op, buffers, dtype, args)
            results, columns = time_case(case, variants, args.device, case["copies"], args.quick)
            report.add(case, results, columns)
