"""Errors against float64, beside torch's unfused pair on the same data.

Each figure pools 256 tokens. "torch" is F.rms_norm + F.linear, "torch hf" the expression of HF Llama and Qwen; minivllm
appears in both roundings, with 256 tokens in one call and with one token in each of 256 calls. The reference of
add_rms_norm starts from the rounded sum, which is what the op defines.
"""

import argparse

import minivllm
from benchmarks import peers
from benchmarks.cases import rows
from benchmarks.report import Report
from benchmarks.results import OURS
from minivllm.testing import numeric, reference
from minivllm.testing.shapes import QKVShape, model
from minivllm.testing.timing import failure

TOKENS = 256
HIDDEN = (1024, 4096, 8192)
NAMES = ("qwen2.5-0.5b", "qwen3-0.6b", "qwen3-8b")
OPS = ("rms_norm", "add_rms_norm", "rms_norm_qkv")
KINDS = ("normal", "outlier channels", "scale 1e-6", "scale 1e4", "norm weight 96.5")
METHOD = {"all": f"errors against float64 over {TOKENS} tokens; reference from the inputs as rounded to the dtype"}


def data(kind: str, hidden: int, dtype: str, device: str):
    """(x, residual, norm weight) of one kind."""
    where = {"dtype": dtype, "device": device}
    scale = {"scale 1e-6": 1e-6, "scale 1e4": 1e4}.get(kind, 1.0)
    x = peers.normal(TOKENS, hidden, scale=scale, **where)
    residual = peers.normal(TOKENS, hidden, scale=scale, **where)
    gamma = peers.normal(hidden, mean=1.0, scale=0.1, **where)
    if kind == "outlier channels":
        x[:, ::97] *= 100
    if kind == "norm weight 96.5":
        gamma[hidden // 3] = 96.5
    return x, residual, gamma


def one_by_one(call, x, *rest):
    """A call per token, the results joined."""
    import torch

    return torch.cat([call(x[t : t + 1], *(r[t : t + 1] for r in rest)) for t in range(x.shape[0])])


class Op:
    """One op on one data set: its true result, and ways to compute it by variant name."""

    def __init__(self, op: str, shape: QKVShape, kind: str, dtype: str, device: str):
        self.op, self.shape = op, shape
        self.x, self.residual, self.gamma = data(kind, shape.hidden, dtype, device)
        where = {"dtype": dtype, "device": device}
        self.weight = peers.normal(shape.qkv, shape.hidden, scale=0.02, **where) if op == "rms_norm_qkv" else None
        self.bias = peers.normal(shape.qkv, scale=0.1, **where) if op == "rms_norm_qkv" and shape.bias else None

    def true(self):
        wide = {
            name: None if t is None else t.double() for name, t in vars(self).items() if name not in ("op", "shape")
        }
        x = (self.x + self.residual).double() if self.op == "add_rms_norm" else wide["x"]
        if self.op == "rms_norm_qkv":
            return reference.rms_norm_qkv(x, wide["gamma"], wide["weight"], peers.EPS, bias=wide["bias"])[0]
        return reference.rms_norm(x, wide["gamma"], peers.EPS)[0]

    def fused(self, x, residual, **options):
        if self.op == "rms_norm":
            return minivllm.rms_norm(x, self.gamma, peers.EPS, **options)
        if self.op == "add_rms_norm":
            return minivllm.add_rms_norm(x, residual, self.gamma, peers.EPS, **options)[0]
        out = x.new_empty(x.shape[0], self.shape.qkv)
        heads = self.shape.num_heads, self.shape.num_kv_heads
        minivllm.rms_norm_qkv(
            x, self.gamma, self.weight, *heads, peers.EPS, bias=self.bias, out=out, weight_layout="out_in", **options
        )
        return out

    def torch(self, prefix: str):
        function = getattr(peers, prefix + self.op)
        if self.op == "rms_norm":
            return function(self.x, self.gamma)
        if self.op == "add_rms_norm":
            return function(self.x, self.residual, self.gamma)[0]
        return function(self.x, self.gamma, self.weight, self.bias)

    def triton(self):
        from benchmarks import triton_peer

        out = self.x.new_empty(self.x.shape[0], self.shape.qkv)
        triton_peer.rms_norm_qkv(self.x, self.gamma, self.weight, self.bias, out, peers.EPS)
        return out

    def variants(self, kernels: list[str]) -> dict:
        found = {"torch": lambda: self.torch(""), "torch hf": lambda: self.torch("hf_")}
        if self.op == "rms_norm_qkv" and self.x.is_cuda:
            found["triton per output"] = self.triton
        for rounding in ("hf", "fp32"):
            call = lambda x, residual, rounding=rounding: self.fused(x, residual, rounding=rounding)  # noqa: E731
            found[f"{OURS} {rounding}"] = lambda call=call: call(self.x, self.residual)
            found[f"{OURS} {rounding}, one token"] = lambda call=call: one_by_one(call, self.x, self.residual)
        for name in kernels:
            found[f"{OURS}:{name}"] = lambda name=name: self.fused(self.x, self.residual, kernel=name)
        return found


def shapes_of(op: str, args: argparse.Namespace) -> list[QKVShape]:
    if op == "rms_norm_qkv":
        chosen = [model(name) for name in args.shapes or NAMES]
        return chosen[:1] if args.quick else chosen
    hidden = HIDDEN[:1] if args.quick else HIDDEN
    return [QKVShape(str(each), each, 1, 1, 1) for each in hidden]


def measured(problem: Op, kernels: list[str], dtype: str, case: dict) -> list[dict]:
    """A row per variant."""
    true, found = problem.true(), []
    for name, call in problem.variants(kernels).items():
        row = case | {"variant": name}
        try:
            figures = numeric.errors(call().double(), true, dtype)
            row |= {f"{key}_error" if key in ("max", "rms") else key: value for key, value in figures._asdict().items()}
            if name.startswith(OURS):
                row["kernel"] = minivllm.last_kernel().name
        except Exception as error:
            row["error"] = failure(error).error
        found.append(row)
    return found


def print_rows(case: dict, found: list[dict]) -> None:
    print(f"\n{case['op']} {case['shape']} {case['dtype']}, {case['kind']}")
    for row in found:
        if "error" in row:
            print(f"  {row['variant']:30} {row['error'][:120]}")
            continue
        right = f"{100 * row['correctly_rounded']:.2f} % correctly rounded"
        print(
            f"  {row['variant']:30} max {row['max_error']:.3e}  RMS {row['rms_error']:.4e}  {right}",
            row.get("kernel", ""),
        )


def run(args: argparse.Namespace, report: Report) -> None:
    """Every op x shape x dtype x kind of data."""
    import torch

    torch.manual_seed(20)
    names = [(op, shape) for op in OPS for shape in shapes_of(op, args)]
    for dtype in args.dtype:
        for op, shape in names:
            for kind in KINDS[:2] if args.quick else KINDS:
                case = {
                    "op": op,
                    "shape": shape.name,
                    "hidden": shape.hidden,
                    "dtype": dtype,
                    "kind": kind,
                    "tokens": TOKENS,
                }
                problem = Op(op, shape, kind, dtype, args.device)
                found = measured(problem, rows(op, dtype, args.device, args.kernel), dtype, case)
                print_rows(case, found)
                report.add_rows(found)
