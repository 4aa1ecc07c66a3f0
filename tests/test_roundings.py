"""Where each rounding rounds. In 16 bits every op and kernel gives the very bits of a reference that makes the same
roundings, but for the few that the order of a float32 sum flips, and not those of one that makes the others."""

import functools

import numpy as np
import pytest
from cases import assert_same_bits, normal
from conftest import roundings_of, short_dtype

import minivllm
from minivllm.testing import reference
from minivllm.testing.reference import round_to, to_float64

EPS = 1e-6
FLIPPED = 0.03  # of the elements, at most; another rounding moves at least three times as many


def of_a_layer(dtype, tokens=4, hidden=256, outputs=384):
    """Small and of shapes that every kernel takes: heads of 128, and 4 tokens."""
    return {
        "x": normal((tokens, hidden), dtype, "x", hidden),
        "norm_weight": normal((hidden,), dtype, "norm", hidden, scale=0.2, mean=1.0),
        "weight": normal((outputs, hidden), dtype, "weight", hidden, scale=hidden**-0.5),
        "residual": normal((tokens, hidden), dtype, "residual", hidden),
    }


def held(kernel, call, expected, alike=()):
    """call(rounding) and expected(rounding): lists of results. alike: a rounding that must give the bits of "hf_once"."""
    roundings = ("hf", "hf_once") if "hf" in roundings_of(kernel) else ()
    try:
        got = {rounding: [to_float64(each) for each in call(rounding)] for rounding in (*roundings, *alike)}
    except ValueError as error:
        assert "cannot serve this call" in str(error)
        pytest.skip(str(error))
    for rounding in alike:
        for one, other in zip(got["hf_once"], got[rounding], strict=True):
            assert_same_bits(one, other)
    for rounding in roundings:
        if short_dtype(kernel.dtype) == "f32":  # whose roundings there are none of
            for one, other in zip(got["hf"], got[rounding], strict=True):
                assert_same_bits(one, other)
            continue
        for right in ("hf", "hf_once", "fp32"):
            wanted = expected(right)
            for mine, of_right, of_mine in zip(got[rounding], wanted, expected(rounding), strict=True):
                wrong = (mine != of_right).mean()
                if right == rounding:
                    assert wrong <= FLIPPED, f"{rounding}: {wrong:.1%} are wrong"
                elif (of_right != of_mine).any():
                    assert wrong >= 3 * FLIPPED, f"{rounding} is as {right}: {wrong:.1%} differ"


def arguments(framework, dtype, values):
    return [framework.tensor(value, dtype) for value in values]


@pytest.mark.rows("rms_norm")
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_norms(kernel, framework, offset):
    dtype = short_dtype(kernel.dtype)
    values = of_a_layer(dtype)
    x, weight, residual = arguments(framework, dtype, (values[name] for name in ("x", "norm_weight", "residual")))
    options = {"weight_offset": offset, "kernel": kernel.name}

    def call(rounding):
        alone = minivllm.rms_norm(x, weight, EPS, rounding=rounding, **options)
        added, _ = minivllm.add_rms_norm(x, residual, weight, EPS, rounding=rounding, **options)
        return alone, added

    def expected(rounding):
        given = {"rounding": rounding, "weight_offset": offset, "dtype": dtype}
        return [reference.rms_norm(values["x"], values["norm_weight"], EPS, residual=r, **given)[0]
                for r in (None, values["residual"])]  # fmt: skip

    held(kernel, call, expected, alike=("fp32",))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_in_place(device, framework, dtype):
    values = of_a_layer(dtype)
    weight = framework.tensor(values["norm_weight"], dtype)
    x, residual, *kept = arguments(framework, dtype, 2 * [values["x"], values["residual"]])
    minivllm.fused_add_rms_norm(x, residual, weight, EPS, rounding="hf_once")
    assert_same_bits(x, minivllm.add_rms_norm(*kept, weight, EPS, rounding="hf_once")[0])


@pytest.mark.rows("norm_add")
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_norm_add(kernel, framework, offset):
    """ "hf_once" rounds what it adds, where "fp32" does not."""
    dtype = short_dtype(kernel.dtype)
    values = of_a_layer(dtype)
    x, weight, residual = (values[name] for name in ("x", "norm_weight", "residual"))
    tensors = arguments(framework, dtype, (x, weight, residual))

    def call(rounding):
        return [minivllm.norm_add(*tensors, EPS, rounding=rounding, weight_offset=offset, kernel=kernel.name)]

    def expected(rounding):
        given = {"rounding": rounding, "weight_offset": offset, "dtype": dtype, "round_last": rounding != "fp32"}
        return [round_to(reference.rms_norm(x, weight, EPS, **given)[0] + residual, dtype)]

    held(kernel, call, expected)


def projected(values, dtype, offset, rounding):
    return reference.rms_norm_qkv(values["x"], values["norm_weight"], values["weight"], EPS, rounding=rounding,
                                  weight_offset=offset, dtype=dtype)[0]  # fmt: skip


@pytest.mark.rows("rms_norm_qkv")
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_qkv(kernel, framework, offset):
    """ "hf_once" multiplies a y that is rounded."""
    dtype = short_dtype(kernel.dtype)
    values = of_a_layer(dtype)
    tensors = arguments(framework, dtype, (values[name] for name in ("x", "norm_weight", "weight")))

    def call(rounding):
        parts = minivllm.rms_norm_qkv(*tensors, 1, 1, EPS, rounding=rounding, weight_offset=offset, kernel=kernel.name)
        return [np.concatenate([to_float64(part).reshape(4, -1) for part in parts], 1)]

    held(kernel, call, lambda rounding: [projected(values, dtype, offset, rounding)])


@pytest.mark.rows("rms_norm_linear")
def test_linear_behind_a_norm(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    values = of_a_layer(dtype)
    tensors = arguments(framework, dtype, (values[name] for name in ("x", "norm_weight", "weight")))

    def call(rounding):
        return [minivllm.rms_norm_linear(*tensors, EPS, rounding=rounding, kernel=kernel.name)]

    held(kernel, call, lambda rounding: [projected(values, dtype, 0.0, rounding)])


@pytest.mark.rows("rms_norm_gate_up")
def test_gate_up(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    values = of_a_layer(dtype)
    tensors = arguments(framework, dtype, (values[name] for name in ("x", "norm_weight", "weight")))

    def call(rounding):
        return [minivllm.rms_norm_gate_up(*tensors, EPS, rounding=rounding, kernel=kernel.name)]

    def expected(rounding):
        gate_up, _, _ = reference.rms_norm_qkv(values["x"], values["norm_weight"], values["weight"], EPS, dtype=dtype,
                                               rounding=rounding, round_last=rounding != "fp32")  # fmt: skip
        return [reference.act_and_mul(gate_up, "silu", rounding=rounding, dtype=dtype)]

    held(kernel, call, expected)


def heads_of(dtype, dim=128):
    angles = np.arange(5)[:, None] * 100.0 ** (-np.arange(0, dim, 2) / dim)
    return {
        "q": normal((5, 4, dim), dtype, "q"),
        "k": normal((5, 2, dim), dtype, "k"),
        "cos": round_to(np.cos(np.concatenate([angles, angles], 1)), dtype),
        "sin": round_to(np.sin(np.concatenate([angles, angles], 1)), dtype),
        "q_norm_weight": normal((dim,), dtype, "q norm", scale=0.2, mean=1.0),
        "k_norm_weight": normal((dim,), dtype, "k norm", scale=0.2, mean=1.0),
    }


def prepared(values, name, dtype, rounding):
    n, _ = reference.rms_norm(values[name], values[f"{name}_norm_weight"], EPS, rounding=rounding, dtype=dtype,
                              round_last=rounding != "fp32")  # fmt: skip
    cos, sin = values["cos"][:, None], values["sin"][:, None]
    return reference.rotary(n, cos, sin, rounding=rounding, rows=dtype, dtype=dtype)


@pytest.mark.rows("qk_norm_rope")
def test_heads(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    values = heads_of(dtype)
    tensors = {name: framework.tensor(value, dtype) for name, value in values.items()}
    held(
        kernel,
        lambda rounding: minivllm.qk_norm_rope(**tensors, rounding=rounding, kernel=kernel.name),
        lambda rounding: [prepared(values, name, dtype, rounding) for name in ("q", "k")],
    )


@pytest.mark.rows("decode_attention")
def test_keys_of_the_cache(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    values = heads_of(dtype)
    tensors = {name: framework.tensor(value, dtype) for name, value in values.items()}
    positions = framework.integers([0] * 5, True)

    def call(rounding):
        caches = {name: framework.full((5, 2, 3, 128), 0.0, dtype) for name in ("key_cache", "value_cache")}
        minivllm.decode_attention(v=tensors["k"], **tensors, **caches, positions=positions, rounding=rounding,
                                  kernel=kernel.name)  # fmt: skip
        return [to_float64(caches["key_cache"])[:, :, 0]]

    held(kernel, call, lambda rounding: [prepared(values, "k", dtype, rounding)])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_ops_without_a_norm(device, framework, dtype):
    """ "hf_once" is "hf" there."""
    values = of_a_layer(dtype)
    x, weight, residual = arguments(framework, dtype, (values["x"], values["weight"][:256], values["residual"]))
    for call in (
        functools.partial(minivllm.silu_and_mul, x),
        functools.partial(minivllm.gelu_and_mul, x),
        functools.partial(minivllm.linear, x, weight, weight_layout="out_in"),
        functools.partial(minivllm.linear_add, x, weight, residual, scale=0.22, weight_layout="out_in"),
    ):
        assert_same_bits(call(rounding="hf_once"), call(rounding="hf"))
