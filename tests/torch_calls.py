"""Calls of every op on torch tensors, each as inputs -> tensors, for tests of what torch does around a call."""

import math
import re

from cases import assert_same_bits, normal
from frameworks import TORCH_CPU, TORCH_CUDA

import minivllm

HIDDEN, HEADS, KV_HEADS = 48, 4, 1
SIZES = [HEADS * 8, KV_HEADS * 8, KV_HEADS * 8]  # of a square projection: six heads of 8


class Inputs:
    """x and residual of some tokens, and the weights of every op."""

    def __init__(self, device="cpu", dtype="f32", tokens=3):
        framework = TORCH_CUDA if device == "cuda" else TORCH_CPU

        def tensor(*shape, scale=1.0, mean=0.0):
            return framework.tensor(normal(shape, dtype, *shape, scale=scale, mean=mean), dtype)

        self.x, self.residual = tensor(tokens, HIDDEN), tensor(tokens, HIDDEN, mean=0.5)
        self.dtype = dtype
        self.norm = tensor(HIDDEN, scale=0.2, mean=1.0)
        self.wide = tensor(2 * HIDDEN, HIDDEN, scale=0.1)
        self.square = tensor(HIDDEN, HIDDEN, scale=0.1)
        self.bias = tensor(HIDDEN)


def _in_place(i):
    x, residual = i.x.clone(), i.residual.clone()
    minivllm.fused_add_rms_norm(x, residual, None, rounding="fp32", weight_offset=1.0)
    return minivllm.fused_add_rms_norm(x, residual, i.norm)


def _given_outputs(i):
    out, total = i.x.clone(), i.residual.clone()
    minivllm.add_rms_norm(out, total, i.norm, out=out, residual_out=total)
    packed = i.x.new_zeros(len(i.x), 2 * HIDDEN)
    minivllm.rms_norm_qkv(out, i.norm, i.wide, HEADS, KV_HEADS, out=packed)
    return total, packed, minivllm.rms_norm(out, i.norm, out=out)


# Each as (inputs, ops=minivllm) -> tensors; `ops` may be something else with the same functions.
FUNCTIONAL = {
    "rms_norm": lambda i, ops=minivllm: (ops.rms_norm(i.x, i.norm, 1e-5, rounding="fp32", weight_offset=1.0),),
    "add_rms_norm": lambda i, ops=minivllm: ops.add_rms_norm(i.x, i.residual, i.norm),
    "no weight": lambda i, ops=minivllm: ops.add_rms_norm(i.x, i.residual, None, weight_offset=0.5),
    "rms_norm_qkv": lambda i, ops=minivllm: ops.rms_norm_qkv(i.x, i.norm, i.wide, HEADS, KV_HEADS),
    ".t()": lambda i, ops=minivllm: ops.rms_norm_qkv(
        i.x, i.norm, i.square.t(), HEADS, KV_HEADS, bias=i.bias, weight_layout="in_out"
    ),
    "in_out": lambda i, ops=minivllm: ops.rms_norm_qkv(
        i.x, i.norm, i.square, HEADS, KV_HEADS, weight_layout="in_out", weight_offset=-0.5
    ),
    "tuple": lambda i, ops=minivllm: ops.rms_norm_qkv(
        i.x, i.norm, i.square.split(SIZES), HEADS, KV_HEADS, weight_layout="out_in", bias=i.bias.split(SIZES)
    ),
    "residual": lambda i, ops=minivllm: ops.rms_norm_qkv(i.x, i.norm, i.wide, HEADS, KV_HEADS, residual=i.residual),
    "norm_add": lambda i, ops=minivllm: (ops.norm_add(i.x, i.norm, i.residual, weight_offset=0.5),),
    "silu_and_mul": lambda i, ops=minivllm: (ops.silu_and_mul(i.x),),
    "gelu_and_mul": lambda i, ops=minivllm: (ops.gelu_and_mul(i.x, approximate="none", rounding="fp32"),),
    "three dimensions": lambda i, ops=minivllm: ops.rms_norm_qkv(i.x[None], i.norm, i.wide, HEADS, KV_HEADS),
    "one dimension": lambda i, ops=minivllm: ops.rms_norm_qkv(i.x[0], i.norm, i.wide, HEADS, KV_HEADS, head_dim=16),
}
WRITING = {"fused_add_rms_norm": _in_place, "out=": _given_outputs}
CALLS = FUNCTIONAL | WRITING


def assert_same(got, expected):
    """Bits, shapes, strides and dtypes."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert_same_bits(a, b)


def largest_allocation(code):
    """Elements of the largest buffer that a compiled graph makes; code: what run_and_get_code() gives."""
    shapes = re.findall(r"= empty_strided\w*\(\(([\d, ]*)\)", "".join(code))
    return max((math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes), default=0)
