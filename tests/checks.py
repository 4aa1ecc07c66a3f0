"""One call of an op, held against float64: result, canaries, untouched inputs. What most tests are made of."""

from typing import NamedTuple

import numpy as np
from cases import CONTIGUOUS, Layout, Placed, assert_same_bits, normal

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64


class Norm(NamedTuple):
    """A call of rms_norm, or of add_rms_norm when there is a residual."""

    shape: tuple  # of x
    dtype: str
    weight_dtype: str | None = None  # None: dtype
    residual: bool = False
    rounding: str = "hf"
    weight_offset: float = 0.0
    eps: float = 1e-6
    kernel: str | None = None
    x_layout: Layout = CONTIGUOUS
    residual_layout: Layout = CONTIGUOUS
    out_layout: Layout | None = CONTIGUOUS  # None: a fresh output
    weight_layout: Layout = CONTIGUOUS


def check_norm(framework, case: Norm, x=None, weight=None):
    """Runs the case on normal data, or on the given x and weight; gives back the output as float64."""
    hidden, dtype, weight_dtype = case.shape[-1], case.dtype, case.weight_dtype or case.dtype
    if x is None:
        x = normal(case.shape, dtype, "x", case.shape)
    if weight is None:
        weight = normal((hidden,), weight_dtype, "weight", hidden, scale=0.2, mean=1.0 - case.weight_offset)
    added = normal(case.shape, dtype, "residual", case.shape) if case.residual else None

    placed_x = Placed(framework, case.shape, dtype, case.x_layout, x)
    placed_weight = Placed(framework, (hidden,), weight_dtype, case.weight_layout, weight)
    out = Placed(framework, case.shape, dtype, case.out_layout) if case.out_layout else None
    options = {name: getattr(case, name) for name in ("rounding", "weight_offset", "kernel")}
    options["out"] = out.tensor if out else None
    if case.residual:
        placed_residual = Placed(framework, case.shape, dtype, case.residual_layout, added)
        sums = Placed(framework, case.shape, dtype, case.out_layout) if case.out_layout else None
        options["residual_out"] = sums.tensor if sums else None
        got, got_sum = minivllm.add_rms_norm(
            placed_x.tensor, placed_residual.tensor, placed_weight.tensor, case.eps, **options
        )
        framework.synchronize()
        assert_same_bits(got_sum, round_to(x + added, dtype), "residual_out")
        assert_same_bits(placed_residual.tensor, added, "residual, an input")
        if sums:
            sums.check_canaries("residual_out")
    else:
        got = minivllm.rms_norm(placed_x.tensor, placed_weight.tensor, case.eps, **options)
        framework.synchronize()
    if out:
        assert got is out.tensor
        out.check_canaries("out")
    else:
        assert framework.is_mine(got) and tuple(got.shape) == tuple(case.shape)
    assert_same_bits(placed_x.tensor, x, "x, an input")
    assert_same_bits(placed_weight.tensor, weight, "weight, an input")

    expected, s = reference.rms_norm(
        x,
        weight,
        case.eps,
        residual=added,
        rounding=case.rounding,
        weight_offset=case.weight_offset,
        dtype=dtype,
        round_last=False,
    )
    gain = case.weight_offset + weight
    flips = numeric.may_flip(s, gain, case.eps, dtype) if case.rounding == "hf" else None
    bound = numeric.tolerance(expected, expected, dtype, length=hidden, gain=abs(gain), flips=flips)
    result = to_float64(got)
    numeric.assert_within(result, expected, bound, f"{case}\nout")
    if dtype != "f32":  # the same roundings: nothing but ties differs
        wrong = int((result != round_to(expected, dtype)).sum())
        assert wrong <= 2 + 0.005 * result.size, f"{case}: {wrong} of {result.size} elements are not correctly rounded"
    return result


class QKV(NamedTuple):
    """A call of rms_norm_qkv."""

    lead: tuple  # x is [*lead, hidden]
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    bias: bool = False
    residual: bool = False
    rounding: str = "hf"
    weights: str = "packed"  # one of WEIGHTS
    norm_dtype: str | None = None  # None: dtype
    weight_dtype: str | None = None
    bias_dtype: str | None = None
    weight_offset: float = 0.0
    eps: float = 1e-6
    batch_invariant: bool = False
    allow_tf32: bool = False
    static_weights: bool = False
    kernel: str | None = None
    x_layout: Layout = CONTIGUOUS
    out_layout: Layout | None = CONTIGUOUS

    @property
    def sizes(self):
        return (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim)

    @property
    def qkv(self):
        return sum(self.sizes)


# How the projection weight [qkv, hidden] may be handed over. Each: (framework, weight, dtype, sizes) -> (argument, buffers).
def _placed(framework, weight, dtype, layout=CONTIGUOUS):
    return Placed(framework, weight.shape, dtype, layout, weight)


def _packed(framework, weight, dtype, sizes):
    return _placed(framework, weight, dtype).tensor


def _packed_t(framework, weight, dtype, sizes):
    return _placed(framework, weight, dtype).tensor.T


def _in_out(framework, weight, dtype, sizes):
    return _placed(framework, np.ascontiguousarray(weight.T), dtype).tensor


def _wide_rows(extra, offset):
    layout = Layout("rows", lambda shape: (shape[-1] + extra, 1), offset)
    return lambda framework, weight, dtype, sizes: _placed(framework, weight, dtype, layout).tensor


def _split(weight, sizes):
    return np.split(weight, np.cumsum(sizes)[:-1])


def _tuple(framework, weight, dtype, sizes):
    return tuple(_placed(framework, part, dtype).tensor for part in _split(weight, sizes))


def _tuple_of_slices(framework, weight, dtype, sizes):
    packed = _placed(framework, weight, dtype).tensor
    ends = np.cumsum(sizes)
    return tuple(packed[end - size : end] for end, size in zip(ends, sizes))


def _tuple_t(framework, weight, dtype, sizes):
    return tuple(part.T for part in _tuple(framework, weight, dtype, sizes))


def _tuple_in_out(framework, weight, dtype, sizes):
    return tuple(_in_out(framework, part, dtype, sizes) for part in _split(weight, sizes))


def _tuple_unaligned(framework, weight, dtype, sizes):
    layout = Layout("rows", lambda shape: (shape[-1] + 1, 1), 65)
    return tuple(_placed(framework, part, dtype, layout).tensor for part in _split(weight, sizes))


WEIGHTS = {
    "packed": _packed,
    "packed_t": _packed_t,
    "in_out": _in_out,
    "padded": _wide_rows(8, 64),
    "unaligned": _wide_rows(0, 65),
    "ragged": _wide_rows(3, 67),
    "tuple": _tuple,
    "tuple_of_slices": _tuple_of_slices,
    "tuple_t": _tuple_t,
    "tuple_in_out": _tuple_in_out,
    "tuple_unaligned": _tuple_unaligned,
}
IS_IN_OUT = {"packed_t", "in_out", "tuple_t", "tuple_in_out"}


def weight_data(case: QKV):
    """(norm weight, qkv weight, bias or None) of a case, float64."""
    hidden, qkv = case.hidden, case.qkv
    norm_weight = normal(
        (hidden,), case.norm_dtype or case.dtype, "norm", hidden, scale=0.2, mean=1.0 - case.weight_offset
    )
    weight = normal((qkv, hidden), case.weight_dtype or case.dtype, "qkv", qkv, hidden, scale=0.02)
    bias = normal((qkv,), case.bias_dtype or case.dtype, "bias", qkv, scale=0.5) if case.bias else None
    return norm_weight, weight, bias


def check_qkv(framework, case: QKV, x=None):
    """Runs the case on normal data, or on the given x; gives back the packed output as float64."""
    dtype, weight_dtype = case.dtype, case.weight_dtype or case.dtype
    shape = (*case.lead, case.hidden)
    if x is None:
        x = normal(shape, dtype, "x", shape)
    norm_weight, weight, bias = weight_data(case)
    added = normal(shape, dtype, "residual", shape) if case.residual else None

    placed_x = Placed(framework, shape, dtype, case.x_layout, x)
    placed_norm = Placed(framework, (case.hidden,), case.norm_dtype or dtype, CONTIGUOUS, norm_weight)
    weight_argument = WEIGHTS[case.weights](framework, weight, weight_dtype, case.sizes)
    bias_argument = None
    if case.bias:
        is_tuple = case.weights.startswith("tuple")
        bias_parts = _split(bias, case.sizes) if is_tuple else (bias,)
        tensors = tuple(
            Placed(framework, part.shape, case.bias_dtype or dtype, CONTIGUOUS, part).tensor for part in bias_parts
        )
        bias_argument = tensors if is_tuple else tensors[0]
    out = Placed(framework, (*case.lead, case.qkv), dtype, case.out_layout) if case.out_layout else None
    placed_residual = Placed(framework, shape, dtype, CONTIGUOUS, added) if case.residual else None
    sums = Placed(framework, shape, dtype, case.out_layout) if case.residual and case.out_layout else None
    options = {
        name: getattr(case, name)
        for name in ("rounding", "weight_offset", "batch_invariant", "allow_tf32", "static_weights", "kernel")
    }
    if case.qkv == case.hidden or any(size == case.hidden for size in case.sizes):
        options["weight_layout"] = "in_out" if case.weights in IS_IN_OUT else "out_in"

    result = minivllm.rms_norm_qkv(
        placed_x.tensor,
        placed_norm.tensor,
        weight_argument,
        case.num_heads,
        case.num_kv_heads,
        case.eps,
        bias=bias_argument,
        residual=placed_residual.tensor if placed_residual else None,
        out=out.tensor if out else None,
        residual_out=sums.tensor if sums else None,
        **options,
    )
    framework.synchronize()
    q, k, v = result[:3]
    assert len(result) == (4 if case.residual else 3)
    for name, got, heads in (("q", q, case.num_heads), ("k", k, case.num_kv_heads), ("v", v, case.num_kv_heads)):
        assert tuple(got.shape) == (*case.lead, heads, case.head_dim), name
    packed = np.concatenate([to_float64(part).reshape(*case.lead, -1) for part in (q, k, v)], axis=-1)
    if out:
        assert_same_bits(out.values(), packed, "q, k, v are views of out:")
        out.check_canaries("out")
    if case.residual:
        assert_same_bits(result[3], round_to(x + added, dtype), "residual_out")
        assert_same_bits(placed_residual.tensor, added, "residual, an input")
        if sums:
            sums.check_canaries("residual_out")
    assert_same_bits(placed_x.tensor, x, "x, an input")
    expect_qkv(case, packed, x, norm_weight, weight, bias, added)
    return packed


def _on_gpu(*arrays):
    """Float64 arrays as tensors of a GPU, where torch has one; the same arrays otherwise."""
    try:
        import torch
    except ImportError:
        return arrays
    if not torch.cuda.is_available():
        return arrays
    return tuple(None if a is None else torch.as_tensor(a, device="cuda") for a in arrays)


def expect_qkv(case: QKV, got, x, norm_weight, weight, bias, added=None):
    """Holds a packed result against float64; a large one on the GPU, since a CPU takes a minute for its products."""
    if got.size * case.hidden > 1 << 30:
        got, x, norm_weight, weight, bias, added = _on_gpu(got, x, norm_weight, weight, bias, added)
    expected, y, s = reference.rms_norm_qkv(
        x,
        norm_weight,
        weight,
        case.eps,
        bias=bias,
        residual=added,
        rounding=case.rounding,
        weight_offset=case.weight_offset,
        dtype=case.dtype,
        round_last=False,
    )
    gain = case.weight_offset + norm_weight
    bound = numeric.tolerance(
        expected,
        y,
        case.dtype,
        weight=weight,
        length=case.hidden,
        gain=abs(gain),
        **numeric.lost_before_the_product(s, gain, case.eps, case.dtype, case.rounding),
        tf32=case.allow_tf32 and case.dtype == "f32",
    )
    numeric.assert_within(got, expected, bound, f"{case}\nout")
