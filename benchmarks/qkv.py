"""rms_norm_qkv: RMSNorm and the projection to q, k and v, few tokens and many.

Calls form a dependent chain: the x of each is a contiguous part of the output of the one before it, so no variant can
start early on anything but its weights; and they walk over more weights than the cache holds. The GEMM alone reads a
fixed x, since a chain without a norm would run into zero or infinity.
"""

import argparse
import math

import minivllm
from benchmarks import peers
from benchmarks.cases import ELEMENT_BYTES, ours, rows, time_case
from benchmarks.report import Report
from benchmarks.results import OURS
from minivllm.testing.shapes import MODELS, QKVShape, model
from minivllm.testing.timing import copies_needed

CUDA_WEIGHT_BYTES = 400e6
CUDA_TOKENS = (1, 2, 4, 8, 16, 64, 96, 128, 200, 256, 384, 512, 1000, 1024, 2048, 4096, 8192, 16384)
CPU_TOKENS = (1, 128)
QUICK_TOKENS = (1, 16, 128, 1024, 4096)
FEW_TOKENS = 64  # up to here reading the weights is what takes the time, and the read floor is shown
HEADS = "decode_heads_sm90a"  # the kernel for few tokens by whole heads, which dispatch never takes by itself
OPTIONS = {"": {}, " fp32": {"rounding": "fp32"}, " invariant": {"batch_invariant": True}}
# A chain of calls writes no weights, so it promises that they are static; this variant is the default, which does not.
CUDA_OPTIONS = OPTIONS | {" not static": {"static_weights": False}}

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph; median and quartiles over replays, variants in turns; a dependent "
    "chain walking over 4 to 64 weights (400 MB)",
    "cpu": "us per call; median and quartiles over calls, variants in turns; a dependent chain walking over weights "
    "of four times the largest cache; peak_bytes: growth of the resident set in one call",
}


def copies(weights: int, dtype: str, device: str, cache_bytes: int) -> int:
    """How many layers of so many weights a chain walks over."""
    weight_bytes = weights * ELEMENT_BYTES[dtype]
    if device == "cuda":
        return min(max(math.ceil(CUDA_WEIGHT_BYTES / weight_bytes), 4), 64)
    return copies_needed(weight_bytes, cache_bytes)


def layers_of(shape: QKVShape, dtype: str, device: str, count: int) -> list:
    """(norm weight, weight, bias) of `count` layers."""
    kind = {"dtype": dtype, "device": device}
    return [
        (
            peers.normal(shape.hidden, mean=1.0, scale=0.1, **kind),
            peers.normal(shape.qkv, shape.hidden, scale=0.02, **kind),
            peers.normal(shape.qkv, scale=0.1, **kind) if shape.bias else None,
        )
        for _ in range(count)
    ]


def case_of(shape: QKVShape, tokens: int, dtype: str, count: int) -> dict:
    weights = (shape.qkv + 1) * shape.hidden + (shape.qkv if shape.bias else 0)
    return {
        "op": "rms_norm_qkv",
        "shape": shape.name,
        "tokens": tokens,
        "hidden": shape.hidden,
        "outputs": shape.qkv,
        "dtype": dtype,
        "mode": "chain",
        "copies": count,
        "bytes": (weights + tokens * (shape.hidden + shape.qkv)) * ELEMENT_BYTES[dtype],
        "flops": 2 * tokens * shape.hidden * shape.qkv,
    }


class Chain:
    """Two outputs in turns; the x of call i is a contiguous part of the output of call i - 1."""

    def __init__(self, shape: QKVShape, tokens: int, dtype: str, device: str, layers: list):
        self.shape, self.tokens, self.layers = shape, tokens, layers
        self.outs = [peers.normal(tokens, shape.qkv, dtype=dtype, device=device) for _ in range(2)]
        self.xs = [self.input_of(out) for out in self.outs]
        self.fixed = self.xs[0].clone()

    def input_of(self, out):
        return out.reshape(-1)[: self.tokens * self.shape.hidden].view(self.tokens, self.shape.hidden)

    def layer(self, i: int):
        return self.layers[i % len(self.layers)]

    def fused(self, i: int, x=None, layer=None, weight_layout="out_in", **options) -> None:
        norm_weight, weight, bias = layer or self.layer(i)
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        out = self.outs[1 - i % 2]
        minivllm.rms_norm_qkv(
            self.xs[i % 2] if x is None else x,
            norm_weight,
            weight,
            heads,
            kv_heads,
            peers.EPS,
            bias=bias,
            out=out,
            weight_layout=weight_layout,
            **{"static_weights": True, **options},
        )

    def torch_pair(self, function):
        """A variant that makes its own outputs. Call 0 starts from a buffer that outlives every graph."""
        last = {}

        def call(i: int) -> None:
            x = self.xs[0] if i == 0 else self.input_of(last["out"])
            last["out"] = function(x, *self.layer(i))
            last["out"].split([self.shape.q_size, self.shape.kv_size, self.shape.kv_size], dim=-1)

        return call

    def gemm(self, i: int) -> None:
        import torch.nn.functional as F

        _, weight, bias = self.layer(i)
        F.linear(self.fixed, weight, bias)

    def triton(self, i: int) -> None:
        from benchmarks import triton_peer

        triton_peer.rms_norm_qkv(self.xs[i % 2], *self.layer(i), self.outs[1 - i % 2], peers.EPS)

    def numpy(self):
        layers = [tuple(None if t is None else t.numpy() for t in layer) for layer in self.layers]
        fixed = self.fixed.numpy()
        return lambda i: peers.numpy_rms_norm_qkv(fixed, *layers[i % len(layers)])


def by_heads(chain: Chain, dtype: str) -> dict:
    """The variant that splits the outputs by whole heads, where the GPU has that kernel and it takes the call."""
    name = f"{dtype}_{HEADS}"
    if name not in rows("rms_norm_qkv", dtype, "cuda", ["all"]):
        return {}

    def call(i: int) -> None:
        chain.fused(i, kernel=name)

    try:
        call(0)
    except ValueError:  # too many tokens, or outputs that are no multiple of 128
        return {}
    return {f"{OURS} heads": call}


def with_tf32(chain: Chain) -> dict:
    """float32 whose products may be of TF32: ours, and torch's with its switch on."""
    import torch

    def allowed(function):
        def call(i: int) -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                function(i)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return call

    return {
        f"{OURS} tf32": lambda i: chain.fused(i, allow_tf32=True),
        "torch tf32": allowed(chain.torch_pair(peers.rms_norm_qkv)),
        "gemm alone tf32": allowed(chain.gemm),
    }


def variants_of(chain: Chain, dtype: str, args: argparse.Namespace, environment: dict) -> dict:
    tokens, cuda = chain.tokens, args.device == "cuda"
    options = CUDA_OPTIONS if cuda else OPTIONS
    found = ours(chain.fused, rows("rms_norm_qkv", dtype, args.device, args.kernel), options)
    if cuda:
        found |= by_heads(chain, dtype)
    found["torch"] = chain.torch_pair(peers.rms_norm_qkv)
    found["gemm alone"] = chain.gemm
    if cuda and args.tf32 and dtype == "f32":
        found |= with_tf32(chain)
    for name, function in peers.compiled(peers.rms_norm_qkv, args.compile).items():
        found[name] = chain.torch_pair(function)
    if cuda and tokens == 1 and "triton" in environment["packages"]:
        found["triton per output"] = chain.triton
    if cuda and tokens <= FEW_TOKENS:
        from benchmarks import device_peers

        found |= device_peers.read_floors([weight for _, weight, _ in chain.layers], environment["gpu_sms"])
    if cuda and args.surroundings:
        from benchmarks.surroundings import surroundings

        found |= surroundings(chain)
    if not cuda and dtype == "f32":
        found["numpy"] = chain.numpy()
    return found


def run(args: argparse.Namespace, report: Report) -> None:
    shapes = [model(name) for name in args.shapes] if args.shapes else MODELS

    def chain_of(shape: QKVShape, dtype: str, count: int):
        layers = layers_of(shape, dtype, args.device, count)
        return lambda tokens: Chain(shape, tokens, dtype, args.device, layers)

    sized = [(shape, shape.qkv * shape.hidden) for shape in shapes]
    run_chains(args, report, sized, chain_of, case_of, variants_of)


def run_chains(args: argparse.Namespace, report: Report, shapes, chain_of, case_of, variants_of) -> None:
    """Every shape x dtype x token count of the command line. shapes: with their numbers of weights; chain_of(shape,
    dtype, count) has `count` layers, and makes a chain of them for some tokens."""
    environment = report.data["environment"]
    default_tokens = CPU_TOKENS if args.device == "cpu" else QUICK_TOKENS if args.quick else CUDA_TOKENS
    for shape, weights in shapes:
        for dtype in args.dtype:
            count = copies(weights, dtype, args.device, environment["cpu_cache_bytes"])
            make = chain_of(shape, dtype, count)
            for each in args.tokens or default_tokens:
                chain = make(each)
                case = case_of(shape, each, dtype, count)
                variants = variants_of(chain, dtype, args, environment)
                results, columns = time_case(case, variants, args.device, count, args.quick)
                if args.device == "cuda":
                    from benchmarks.device_peers import fastest

                    fastest(results, "read_floor")
                    fastest(results, "read_floor_pdl")
                report.add(case, results, columns)
