"""rms_norm_qkv: every kernel x shapes x dtypes x weight layouts, against float64."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from cases import CONTIGUOUS, LAYOUTS, PADDED, RAGGED, TRANSPOSED, UNALIGNED, assert_same_bits, normal, random
from checks import QKV, WEIGHTS, check_qkv, expect_qkv, weight_data
from conftest import head_dim_for, roundings_of, short_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import SANITIZED

import minivllm
from minivllm.testing import numeric, reference, shapes
from minivllm.testing.reference import round_to, to_float64

TOKENS = (1, 3, 8, 17, 65)


def case_of(shape, tokens, dtype, **options):
    lead = tokens if isinstance(tokens, tuple) else (tokens,)
    options.setdefault("bias", shape.bias)
    return QKV(lead, shape.hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype, **options)


def check_or_refuse(framework, case):
    """A forced kernel computes the case or says why it cannot; whether it did."""
    try:
        check_qkv(framework, case)
    except ValueError as error:
        assert f"kernel '{case.kernel}' cannot serve this call: " in str(error)
        return False
    assert minivllm.last_kernel().name == case.kernel
    return True


def takes_anything(kernel):
    """All but those that ask for whole tiles or aligned rows."""
    return not any(part in kernel.name for part in ("mma", "sm90a", "norm_few"))


def takes_aligned_rows(kernel):
    """Those that take every aligned call: all but the one whose row factor joins late, and the one of whole heads."""
    return kernel.name != "bf16_wgmma_sm90a" and "heads" not in kernel.name


@pytest.mark.rows("rms_norm_qkv")
@pytest.mark.parametrize("shape", shapes.QKV_EDGES, ids=lambda shape: shape.name)
def test_every_kernel_at_every_edge(kernel, framework, shape):
    dtype = short_dtype(kernel.dtype)
    ran = 0
    for tokens in TOKENS:
        for rounding in ("hf", "fp32"):
            ran += check_or_refuse(framework, case_of(shape, tokens, dtype, rounding=rounding, kernel=kernel.name))
        ran += check_or_refuse(
            framework,
            case_of(shape, tokens, dtype, residual=True, weight_offset=1.0, weights="tuple", kernel=kernel.name),
        )
    if takes_anything(kernel) and "decode" not in kernel.name:
        assert ran == 3 * len(TOKENS)
    assert ran > 0 or shape.hidden % 64 != 0 or not takes_aligned_rows(kernel)


@pytest.mark.rows("rms_norm_qkv")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kernel_with_every_weight_layout(kernel, framework, weights):
    dtype = short_dtype(kernel.dtype)
    ran = 0
    for hidden, tokens in ((128, 1), (128, 20), (72, 5), (37, 4)):
        plain = {"rounding": roundings_of(kernel)[0]}
        for options in (plain, {"weight_dtype": "f32", "bias_dtype": "f32"}, {"norm_dtype": "f32", "rounding": "fp32"}):
            case = QKV((tokens,), hidden, 3, 2, head_dim_for(kernel, 8), dtype, bias=True, weights=weights,
                       kernel=kernel.name, **options)  # fmt: skip
            ran += check_or_refuse(framework, case)
    if takes_anything(kernel) and "decode" not in kernel.name:
        assert ran == 12
    assert ran > 0 or weights not in ("packed", "tuple") or not takes_aligned_rows(kernel)


@pytest.mark.rows("rms_norm_qkv")
def test_every_kernel_with_every_layout_of_x_and_out(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    lead = (2, 2) if kernel.name == "f32_decode_sm90a" else (2, 3)  # that one takes four tokens at most
    ran = 0
    for hidden, x_layout in ((128, layout) for layout in LAYOUTS):
        for out_layout in (CONTIGUOUS, UNALIGNED, PADDED, RAGGED, TRANSPOSED, None):
            case = QKV(
                lead,
                hidden,
                2,
                1,
                head_dim_for(kernel, 8),
                dtype,
                residual="hf" in roundings_of(kernel),  # where the row factor joins late there is none
                rounding=roundings_of(kernel)[0],
                kernel=kernel.name,
                x_layout=x_layout,
                out_layout=out_layout,
            )
            ran += check_or_refuse(framework, case)
    if takes_anything(kernel):
        assert ran == 30
    assert ran > 0 or not takes_aligned_rows(kernel)


class Weights(NamedTuple):
    """A matrix whose rows are those of a small block, in a random order: a row read at the wrong place shows, and only the block
    has to be held against float64."""

    block: np.ndarray  # [rows, hidden], float64
    order: np.ndarray  # [qkv]
    tensor: object  # block[order] in the framework


# Under the sanitizers without the largest, which take most of the time.
MODELS = [shape for shape in shapes.MODELS if not SANITIZED or shape.hidden * shape.qkv < 3e7]


@functools.lru_cache(maxsize=3)  # the three dtypes of one shape; the largest takes 336 MB
def model_weights(framework, shape, dtype):
    block = normal((512, shape.hidden), dtype, "block", shape.hidden, scale=0.02)
    order = random("order", shape.name).integers(0, len(block), shape.qkv)
    return Weights(block, order, framework.tensor(block, dtype)[order])


@pytest.mark.rows("rms_norm_qkv")
@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_every_kernel_at_model_shapes(kernel, framework, shape):
    dtype = short_dtype(kernel.dtype)
    if framework.device == "cpu" and shape.hidden > 1024 and "portable" in kernel.name:
        pytest.skip("portable code at a large model: the same paths as at the small ones, and seconds each")
    block, order, tensor = model_weights(framework, shape, dtype)
    norm_weight = normal((shape.hidden,), dtype, "norm", shape.hidden, scale=0.2, mean=1.0)
    bias = normal((shape.qkv,), dtype, "bias", shape.qkv, scale=0.5) if shape.bias else None
    many = 130 if framework.device == "cuda" else 20
    for tokens, rounding, weight in (
        (1, "hf", tensor),
        (6, "fp32", tensor.T),
        (many, "hf", tensor.T),
        (many, "fp32", tensor),
    ):
        x = normal((tokens, shape.hidden), dtype, "x", tokens, shape.hidden)
        try:
            q, k, v = minivllm.rms_norm_qkv(
                framework.tensor(x, dtype),
                framework.tensor(norm_weight, dtype),
                weight,
                shape.num_heads,
                shape.num_kv_heads,
                bias=None if bias is None else framework.tensor(bias, dtype),
                rounding=rounding,
                kernel=kernel.name,
            )
        except ValueError as error:
            assert f"kernel '{kernel.name}' cannot serve this call" in str(error)
            assert "decode" in kernel.name or rounding not in roundings_of(kernel)
            continue
        assert minivllm.last_kernel().name == kernel.name
        got = np.concatenate([to_float64(part).reshape(tokens, -1) for part in (q, k, v)], axis=-1)
        case = case_of(shape, tokens, dtype, rounding=rounding, kernel=kernel.name)
        bounds = OfBlock(case, x, norm_weight, block)
        bounds.check(got, order, bias)


class OfBlock:
    """What the outputs of a block of weight rows should be, spread over the columns that repeat them."""

    def __init__(self, case, x, norm_weight, block):
        self.case = case
        self.expected, y, s = reference.rms_norm_qkv(
            x, norm_weight, block, case.eps, rounding=case.rounding, dtype=case.dtype, round_last=False
        )
        spread = numeric.tolerance(
            self.expected,
            y,
            case.dtype,
            weight=block,
            length=case.hidden,
            gain=abs(norm_weight),
            **numeric.lost_before_the_product(s, norm_weight, case.eps, case.dtype, case.rounding),
        )
        self.spread = spread - reference.quantum(self.expected, case.dtype) / 2

    def check(self, got, order, bias):
        expected = self.expected[:, order] + (0.0 if bias is None else bias)
        bound = (
            self.spread[:, order]
            + reference.quantum(expected, self.case.dtype) / 2
            + 2 * numeric.UNIT_F32 * abs(expected)
        )
        numeric.assert_within(got, expected, bound, f"{self.case}\nout")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_chosen_kernel(device, framework, dtype, weights):
    """Without a forced kernel everything is served, whatever its shape."""
    for shape in shapes.QKV_EDGES:
        for tokens in (1, 33, (2, 3)):
            check_qkv(framework, case_of(shape, tokens, dtype, weights=weights, residual=tokens == 33))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    lead=st.lists(st.integers(1, 9), max_size=2),
    hidden=st.integers(1, 300),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 24)),
    dtypes=st.tuples(st.sampled_from(["f32", "f16", "bf16"]), st.booleans(), st.booleans(), st.booleans()),
    bias=st.booleans(),
    residual=st.booleans(),
    rounding=st.sampled_from(["hf", "hf_once", "fp32"]),
    offset=st.sampled_from([0.0, 1.0]),
    weights=st.sampled_from(sorted(WEIGHTS)),
    batch_invariant=st.booleans(),
    static_weights=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
)
def test_any_call(
    device,
    framework,
    lead,
    hidden,
    heads,
    dtypes,
    bias,
    residual,
    rounding,
    offset,
    weights,
    batch_invariant,
    static_weights,
    layouts,
):
    dtype, *wide = dtypes
    if reason := framework.why_not(dtype):
        pytest.skip(reason)
    norm_dtype, weight_dtype, bias_dtype = ("f32" if is_wide else dtype for is_wide in wide)
    check_qkv(
        framework,
        QKV(
            tuple(lead),
            hidden,
            *heads,
            dtype,
            bias=bias,
            residual=residual,
            rounding=rounding,
            weights=weights,
            norm_dtype=norm_dtype,
            weight_dtype=weight_dtype,
            bias_dtype=bias_dtype,
            weight_offset=offset,
            batch_invariant=batch_invariant,
            static_weights=static_weights,
            x_layout=layouts[0],
            out_layout=layouts[1],
        ),
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_members_of_a_tuple_may_differ(device, framework, dtype):
    """In dtype, in layout, and in the dtype of their bias."""
    case = QKV((5,), 48, 3, 1, 16, dtype, bias=True)
    norm_weight, weight, bias = weight_data(case)
    ends = np.cumsum(case.sizes)[:-1]
    x = normal((5, 48), dtype, "x")
    wq, wk, wv = np.split(weight, ends)
    bq, bk, bv = np.split(bias, ends)
    got = minivllm.rms_norm_qkv(
        framework.tensor(x, dtype),
        framework.tensor(norm_weight, "f32"),
        (framework.tensor(wq, "f32"), framework.tensor(wk, dtype), framework.tensor(wv, "f32")),
        3,
        1,
        bias=(framework.tensor(bq, dtype), framework.tensor(bk, "f32"), framework.tensor(bv, dtype)),
        weight_layout="out_in",
    )
    expect_qkv(
        case, np.concatenate([to_float64(part).reshape(5, -1) for part in got], -1), x, norm_weight, weight, bias
    )


@pytest.mark.rows("rms_norm_qkv")
def test_one_matrix_with_three_biases_and_the_reverse(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    case = QKV((4,), 128, 3, 2, head_dim_for(kernel, 8), dtype, bias=True)
    norm_weight, weight, bias = weight_data(case)
    x = normal((4, 128), dtype, "x")
    ends = np.cumsum(case.sizes)[:-1]
    matrix, three = (
        framework.tensor(weight, dtype),
        tuple(framework.tensor(part, dtype) for part in np.split(weight, ends)),
    )
    vector, biases = (
        framework.tensor(bias, dtype),
        tuple(framework.tensor(part, dtype) for part in np.split(bias, ends)),
    )
    for weights, some_bias in ((matrix, biases), (matrix.T, biases), (three, vector)):
        try:
            got = minivllm.rms_norm_qkv(
                framework.tensor(x, dtype),
                framework.tensor(norm_weight, dtype),
                weights,
                3,
                2,
                bias=some_bias,
                kernel=kernel.name,
            )
        except ValueError as error:
            assert "mma" in kernel.name and "cannot serve this call" in str(error)
            continue
        packed = np.concatenate([to_float64(part).reshape(4, -1) for part in got], -1)
        expect_qkv(case, packed, x, norm_weight, weight, bias)


ASKS = r"so it could be .*weight_layout=\"out_in\" for a Linear's .weight, \"in_out\" for its .t\(\)"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_square_weight(device, framework, dtype):
    """Neither its shape nor its strides tell what it is: nothing is guessed."""
    shape = next(shape for shape in shapes.QKV_EDGES if shape.name == "square")
    case = case_of(shape, 3, dtype, bias=False)
    norm_weight, weight, _ = weight_data(case)
    x = normal((3, shape.hidden), dtype, "x")
    linear, heads = framework.tensor(weight, dtype), (shape.num_heads, shape.num_kv_heads)
    arguments = (framework.tensor(x, dtype), framework.tensor(norm_weight, dtype))

    def packed(result):
        return np.concatenate([to_float64(part).reshape(3, -1) for part in result], -1)

    given = dict(zip(("norm_weight", "num_heads", "num_kv_heads"), (arguments[1], *heads)))
    column_major = framework.tensor(np.ascontiguousarray(weight.T), dtype).T
    for w in (linear, linear.T, column_major):
        for call in (
            lambda w: minivllm.rms_norm_qkv(*arguments, w, *heads),
            lambda w: minivllm.FusedRMSNormQKV(qkv_weight=w, **given),
            lambda w: minivllm.FusedRMSNormQKV(qkv_weight=w, prepack=True, **given),
        ):
            with pytest.raises(ValueError, match=rf"qkv_weight is square \(\[192, 192\]\), {ASKS}"):
                call(w)
    for w, layout, means in (
        (linear, "out_in", weight),
        (column_major, "out_in", weight),
        (linear.T, "in_out", weight),
        (linear, "in_out", np.ascontiguousarray(weight.T)),
    ):
        for prepack in (None, False, True):
            if prepack is None:
                got = minivllm.rms_norm_qkv(*arguments, w, *heads, weight_layout=layout)
            else:
                layer = minivllm.FusedRMSNormQKV(qkv_weight=w, weight_layout=layout, prepack=prepack, **given)
                got = layer(arguments[0])
            expect_qkv(case, packed(got), x, norm_weight, means, None)


@pytest.mark.parametrize("size", [1, 8])
def test_three_square_members(device, framework, size):
    """As one square weight; of 1 x 1, too, although both layouts then mean the same."""
    case = QKV((4,), size, 1, 1, size, "f32", weights="tuple")
    norm_weight, weight, _ = weight_data(case)
    x = normal((4, size), "f32", "x")
    parts = [framework.tensor(part, "f32") for part in np.split(weight, 3)]
    arguments = (framework.tensor(x, "f32"), framework.tensor(norm_weight, "f32"))
    for weights in (parts, [part.T for part in parts]):
        with pytest.raises(
            ValueError, match=rf"qkv_weight has only members that are square \(\[{size}, {size}\]\), {ASKS}"
        ):
            minivllm.rms_norm_qkv(*arguments, tuple(weights), 1, 1)
    for weights, layout in ((parts, "out_in"), ([part.T for part in parts], "in_out")):
        got = minivllm.rms_norm_qkv(*arguments, tuple(weights), 1, 1, weight_layout=layout)
        expect_qkv(
            case, np.concatenate([to_float64(part).reshape(4, -1) for part in got], -1), x, norm_weight, weight, None
        )


def test_a_square_member_follows_the_others(device, framework):
    """Qwen3-8B's wq is square; wk and wv say which way round it is."""
    case = QKV((4,), 64, 4, 1, 16, "f32", weights="tuple")
    norm_weight, weight, _ = weight_data(case)
    x = normal((4, 64), "f32", "x")
    parts = [framework.tensor(part, "f32") for part in np.split(weight, np.cumsum(case.sizes)[:-1])]
    copies = [
        framework.tensor(np.ascontiguousarray(part.T), "f32") for part in np.split(weight, np.cumsum(case.sizes)[:-1])
    ]
    arguments = (framework.tensor(x, "f32"), framework.tensor(norm_weight, "f32"))
    for weights in (parts, [part.T for part in parts], copies):
        got = minivllm.rms_norm_qkv(*arguments, tuple(weights), 4, 1)
        expect_qkv(
            case, np.concatenate([to_float64(part).reshape(4, -1) for part in got], -1), x, norm_weight, weight, None
        )


def test_a_weight_of_any_strides(device, framework):
    """Neither dimension contiguous: right, or a ValueError that says so."""
    case = QKV((4,), 40, 2, 1, 8, "f32")
    norm_weight, weight, _ = weight_data(case)
    x = normal((4, 40), "f32", "x")
    buffer = framework.full((3 * 40 * 32,), np.nan, "f32")
    strided = framework.strided(buffer, (32, 40), (120, 3))
    strided[...] = framework.tensor(weight, "f32")
    try:
        got = minivllm.rms_norm_qkv(framework.tensor(x, "f32"), framework.tensor(norm_weight, "f32"), strided, 2, 1)
    except ValueError as error:
        assert "qkv_weight" in str(error) and "stride" in str(error)
        return
    expect_qkv(
        case, np.concatenate([to_float64(part).reshape(4, -1) for part in got], -1), x, norm_weight, weight, None
    )


@pytest.mark.rows("rms_norm_qkv")
def test_nan_and_infinity_stay_in_their_row(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    tokens = 4 if kernel.name in ("f32_decode_sm90a", "f32_decode_heads_sm90a") else 11  # they take no more
    case = QKV((tokens,), 128, 2, 1, head_dim_for(kernel, 16), dtype)
    norm_weight, weight, _ = weight_data(case)
    fixed = (framework.tensor(norm_weight, dtype), framework.tensor(weight, dtype), 2, 1)
    x = normal((tokens, 128), dtype, "nan")
    for rounding in roundings_of(kernel):
        dirty = x.copy()
        bad = {1: (64, np.nan), 3: (0, np.inf), tokens - 2: (127, -np.inf)}
        for row, (column, value) in bad.items():
            dirty[row, column] = value

        def run(values):
            result = minivllm.rms_norm_qkv(
                framework.tensor(values, dtype), *fixed, rounding=rounding, kernel=kernel.name
            )
            return np.concatenate([to_float64(part).reshape(tokens, -1) for part in result], -1)

        clean, got = run(x), run(dirty)
        assert np.isnan(got[list(bad)]).all()
        good = [row for row in range(tokens) if row not in bad]
        assert_same_bits(got[good], clean[good], "rows beside the bad ones")


@pytest.mark.parametrize("tokens", [2, 40])
def test_nothing_overflows_in_float16_that_the_formula_would_not(device, framework, tokens):
    """x of 1e4 times a weight of 96.5 exceeds 65504 before r brings it back."""
    case = QKV((tokens,), 96, 2, 1, 16, "f16")
    for rounding in ("hf", "fp32"):
        norm_weight, weight, _ = weight_data(case)
        norm_weight[:] = 96.5
        x = round_to(normal((tokens, 96), "f16", "huge") * 1e4, "f16")
        got = minivllm.rms_norm_qkv(
            framework.tensor(x, "f16"),
            framework.tensor(norm_weight, "f16"),
            framework.tensor(weight, "f16"),
            2,
            1,
            rounding=rounding,
        )
        packed = np.concatenate([to_float64(part).reshape(tokens, -1) for part in got], -1)
        expect_qkv(case._replace(rounding=rounding), packed, x, norm_weight, weight, None)


def test_tf32_only_when_asked(device, framework):
    """allow_tf32=True may round products to TF32; the default never does (its error is 1000 times smaller)."""
    case = QKV((64,), 512, 4, 2, 32, "f32")
    check_qkv(framework, case)
    check_qkv(framework, case._replace(allow_tf32=True))


def test_views_share_one_packed_buffer(device, framework):
    x = framework.tensor(normal((2, 3, 32), "f16", "x"), "f16")
    weight = framework.tensor(normal((40, 32), "f16", "w"), "f16")
    q, k, v = minivllm.rms_norm_qkv(x, framework.full((32,), 1.0, "f16"), weight, 3, 1, head_dim=8)
    assert tuple(q.shape) == (2, 3, 3, 8) and tuple(k.shape) == (2, 3, 1, 8) and tuple(v.shape) == (2, 3, 1, 8)
    start = framework.pointer(q)
    assert framework.pointer(k) == start + 2 * 24 and framework.pointer(v) == start + 2 * 32
    assert tuple(framework.strides(q)) == (120, 40, 8, 1)
    assert all(framework.is_mine(part) for part in (q, k, v))


def test_static_forward_is_the_function(device, framework):
    x = framework.tensor(normal((3, 64), "f32", "x"), "f32")
    norm_weight = framework.full((64,), 1.0, "f32")
    weight = framework.tensor(normal((80, 64), "f32", "w"), "f32")
    first = minivllm.FusedRMSNormQKV.forward(x, norm_weight, weight.T, 3, 1)
    second = minivllm.rms_norm_qkv(x, norm_weight, weight, 3, 1)
    for a, b in zip(first, second):
        assert_same_bits(a, b)


def test_a_head_norm_takes_q_where_it_lies(device, framework):
    x = framework.tensor(normal((5, 64), "f32", "x"), "f32")
    q, _, _ = minivllm.rms_norm_qkv(
        x, framework.full((64,), 1.0, "f32"), framework.tensor(normal((96, 64), "f32", "w"), "f32"), 4, 1
    )
    weight = framework.full((16,), 1.0, "f32")
    copied = framework.tensor(to_float64(q), "f32")
    assert_same_bits(minivllm.rms_norm(q, weight), minivllm.rms_norm(copied, weight))
    assert tuple(framework.strides(q)) == (96, 16, 1)


@pytest.mark.parametrize("tuple_of", [False, True])
def test_head_counts_the_wrong_way_round(tuple_of):
    """Where only the other way fits, the refusal says so."""
    x, norm_weight, weight = (np.ones(size, np.float32) for size in ((2, 8), 8, (48, 8)))
    weights = tuple(np.split(weight, [32, 40])) if tuple_of else weight
    assert [part.shape[1] for part in minivllm.rms_norm_qkv(x, norm_weight, weights, 4, 1)] == [4, 1, 1]
    with pytest.raises(
        ValueError, match=r"^rms_norm_qkv: qkv_weight.* outputs, .*are num_heads and num_kv_heads swapped"
    ):
        minivllm.rms_norm_qkv(x, norm_weight, weights, 1, 4)
    with pytest.raises(ValueError, match=r"^rms_norm_qkv: qkv_weight[^;]*$"):
        minivllm.rms_norm_qkv(x, norm_weight, weights, 5, 5)
