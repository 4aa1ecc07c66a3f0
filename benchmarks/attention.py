"""decode_attention: one new token per sequence against its cache, with the norms of heads and the rotary embedding of
Qwen3, beside the attention alone of torch and FlashInfer and the time of reading the keys and values.

Calls form a dependent chain: the q of each is the output of the one before it. They walk over more caches than the L2
cache holds. The caches are contiguous, [batch, kv_heads, keys, 128], and full once the new token is in them.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import minivllm
from benchmarks import peers
from benchmarks.cases import ELEMENT_BYTES, ours, rows, time_case
from benchmarks.report import Report
from minivllm.testing.points import CUDA_CACHE_BYTES
from minivllm.testing.timing import copies_needed

SHAPES = ("16x8", "32x8")  # query heads x key-value heads
HEAD_DIM = 128
BATCHES, QUICK_BATCHES, CPU_BATCHES = (1, 16, 64), (1, 16), (1,)
CONTEXTS, QUICK_CONTEXTS, CPU_CONTEXTS = (512, 2048, 8192, 32768), (512, 8192), (512, 4096)
MOST_CACHE_BYTES = 16 * 2**30  # of all copies; what needs more is left out
PAGE = 16  # keys of a page, as FlashInfer is given the same memory
WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer recommends it
# A chain of calls writes no weights and none of the older rows, so it promises that both are static; this variant is
# the default, which does not.
OPTIONS = {"": {}, " not static": {"static_weights": False, "static_rows": False}}

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph; median and quartiles over replays, variants in turns; a dependent "
    "chain walking over 2 to 64 caches (400 MB)",
    "cpu": "us per call; median and quartiles over calls, variants in turns; a dependent chain walking over caches of "
    "four times the largest cache of the CPU; peak_bytes: growth of the resident set in one call",
}


class Shape(NamedTuple):
    """One call: `keys` in each sequence's cache, the new token's included."""

    heads: int
    kv_heads: int
    batch: int
    keys: int

    def cache_bytes(self, dtype: str) -> int:
        """Of the keys and values of all sequences."""
        return 2 * self.batch * self.kv_heads * self.keys * HEAD_DIM * ELEMENT_BYTES[dtype]


def heads_of(shape: str) -> tuple[int, int]:
    """(query heads, key-value heads) of a name such as 16x8."""
    heads, kv_heads = map(int, shape.split("x"))
    return heads, kv_heads


class Chain:
    """Two outputs in turns; the q of call i is the output of call i - 1."""

    def __init__(self, shape: Shape, dtype: str, device: str, copies: int):
        import torch

        self.shape, self.dtype = shape, dtype
        normal = functools.partial(peers.normal, dtype=dtype, device=device)
        self.caches = [normal(2, shape.batch, shape.kv_heads, shape.keys, HEAD_DIM) for _ in range(copies)]
        self.outs = [normal(shape.batch, shape.heads, HEAD_DIM) for _ in range(2)]
        self.new = [normal(shape.batch, shape.kv_heads, HEAD_DIM) for _ in range(2)]
        self.norms = [normal(HEAD_DIM, mean=1.0, scale=0.1) for _ in range(2)]
        angles = torch.rand(shape.batch, HEAD_DIM // 2, device=device).repeat(1, 2) * 6.28
        self.cos, self.sin = (f(angles).to(self.outs[0].dtype) for f in (torch.cos, torch.sin))
        self.positions = torch.full((shape.batch,), shape.keys - 1, device=device)

    def cache(self, i: int):
        return self.caches[i % len(self.caches)]

    def fused(self, i: int, **options) -> None:
        keys, values = self.cache(i)
        q_norm, k_norm = self.norms
        minivllm.decode_attention(
            self.outs[i % 2], *self.new, keys, values, self.positions, cos=self.cos, sin=self.sin,
            q_norm_weight=q_norm, k_norm_weight=k_norm, eps=peers.EPS, out=self.outs[1 - i % 2],
            **{"static_weights": True, "static_rows": True, **options})  # fmt: skip

    def alone(self, attend: Callable) -> Callable[[int], None]:
        """A variant that makes its own outputs: attend(q, cache). Call 0 starts from one that outlives every graph."""
        last = {}

        def call(i: int) -> None:
            q = self.outs[0] if i == 0 else last["out"]
            last["out"] = attend(q, self.cache(i)).view_as(q)

        return call


def torch_attention(backend: str | None) -> Callable:
    """torch's attention, by one of its backends or by its own choice."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, cache):
        keys, values = cache
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)

    def by_backend(q, cache):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attend(q, cache)

    return attend if backend is None else by_backend


def flashinfer_attention(shape: Shape, tensor_cores: bool) -> Callable:
    """FlashInfer's, which is looked for and made ready in the first call."""

    @functools.cache
    def made() -> Callable:
        import flashinfer

        if shape.batch == 1:
            single = functools.partial(
                flashinfer.single_decode_with_kv_cache, kv_layout="HND", use_tensor_cores=tensor_cores
            )
            return lambda q, cache: single(q[0], cache[0, 0], cache[1, 0])
        return paged(flashinfer, shape, tensor_cores)

    return lambda q, cache: made()(q, cache)


def paged(flashinfer, shape: Shape, tensor_cores: bool) -> Callable:
    """FlashInfer's for several sequences, which takes the memory of the caches as pages."""
    import torch

    pages = shape.keys // PAGE  # of a sequence
    integers = functools.partial(torch.arange, dtype=torch.int32, device="cuda")
    starts, indices = integers(shape.batch + 1) * pages, integers(shape.batch * pages)
    last = torch.full_like(starts[1:], PAGE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "HND",
        use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.clone())  # fmt: skip

    @functools.cache
    def plan(dtype) -> None:
        wrapper.plan(
            starts, indices, last, shape.heads, shape.kv_heads, HEAD_DIM, PAGE, q_data_type=dtype, kv_data_type=dtype
        )

    def attend(q, cache):
        plan(q.dtype)
        return wrapper.run(q, tuple(cache.view(2, -1, shape.kv_heads, PAGE, HEAD_DIM)))

    return attend


def variants_of(chain: Chain, args: argparse.Namespace, environment: dict) -> dict:
    found = ours(chain.fused, rows("decode_attention", chain.dtype, args.device, args.kernel), OPTIONS)
    if args.device == "cpu":
        return found | {"torch": chain.alone(torch_attention(None))}

    from benchmarks import device_peers

    others = {"torch cudnn": torch_attention("CUDNN_ATTENTION"), "torch flash": torch_attention("FLASH_ATTENTION")}
    others |= {
        f"flashinfer{' tensor cores' if tensor_cores else ''}": flashinfer_attention(chain.shape, tensor_cores)
        for tensor_cores in (False, True)
    }
    found |= {name: chain.alone(attend) for name, attend in others.items()}
    # Not those of programmatic launches: of two copies the kernels in flight would read one at the same time, from L2.
    floors = device_peers.read_floors(chain.caches, environment["gpu_sms"])
    return found | {name: floor for name, floor in floors.items() if "pdl" not in name}


def case_of(shape: Shape, dtype: str, copies: int) -> dict:
    heads, kv_heads, batch, keys = shape
    moved = batch * (2 * heads + 2 * kv_heads) * HEAD_DIM  # q, out, and the new key and value
    return {
        "op": "decode_attention",
        "shape": f"{heads}x{kv_heads}",
        "tokens": batch,
        "hidden": heads * HEAD_DIM,
        "outputs": heads * HEAD_DIM,
        "dtype": dtype,
        "mode": f"chain, {keys} keys",
        "copies": copies,
        "bytes": shape.cache_bytes(dtype) + moved * ELEMENT_BYTES[dtype],
        "flops": 4 * batch * heads * keys * HEAD_DIM,
        "context": keys,
    }


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """Every pair of head counts x batch x keys of the command line."""
    cpu, quick = args.device == "cpu", args.quick
    batches = args.tokens or (CPU_BATCHES if cpu else QUICK_BATCHES if quick else BATCHES)
    contexts = CPU_CONTEXTS if cpu else QUICK_CONTEXTS if quick else CONTEXTS
    names = args.shapes or SHAPES
    return [Shape(*heads_of(name), batch, keys) for name in names for batch in batches for keys in contexts]


def run(args: argparse.Namespace, report: Report) -> None:
    environment = report.data["environment"]
    cache_bytes = CUDA_CACHE_BYTES if args.device == "cuda" else environment["cpu_cache_bytes"]
    for shape in shapes_of(args):
        for dtype in args.dtype:
            each = shape.cache_bytes(dtype)
            copies = copies_needed(each, cache_bytes, most=64)
            if copies * each > MOST_CACHE_BYTES:
                continue
            chain = Chain(shape, dtype, args.device, copies)
            case = case_of(shape, dtype, copies)
            variants = variants_of(chain, args, environment)
            results, columns = time_case(case, variants, args.device, copies, args.quick)
            if args.device == "cuda":
                from benchmarks.device_peers import fastest

                fastest(results, "read_floor")
            report.add(case, results, columns)
