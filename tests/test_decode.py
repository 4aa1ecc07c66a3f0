"""The projection of few tokens on Hopper: every number of row tiles and tokens, slots that are used again, several launches."""

import pytest
from cases import assert_same_bits
from checks import QKV, check_qkv
from frameworks import TORCH_CUDA, hopper_dtype

import minivllm

pytestmark = pytest.mark.gpu

# tokens, hidden, outputs: 1 to 5 tiles of 16 rows a block, two launches; few columns, and so many that slots are used again;
# two blocks of an SM, and one with a long ring; tokens read at once, copied before the ring is full, and copied after it
SHAPES = ((1, 64, 320), (2, 128, 2112), (4, 960, 4224), (7, 1536, 6336), (8, 2560, 7168), (11, 1024, 8448),
          (16, 448, 10560), (2, 5376, 15360), (1, 8192, 10240), (3, 3584, 4608), (12, 4096, 3072),
          (16, 1024, 4096))  # fmt: skip


@pytest.fixture(params=["f32", "f16", "bf16"])
def dtype(request):
    return hopper_dtype(request.param, "decode_sm90a")


@pytest.fixture(params=["f16", "bf16"])
def narrow(request):
    return hopper_dtype(request.param, "decode_sm90a")


def check(shape, dtype, **options):
    tokens, hidden, outputs = shape
    if dtype == "f32":
        tokens = (tokens + 3) // 4  # it takes up to 4
    heads = outputs // 64
    kv_heads = heads // 6 or 1
    check_qkv(TORCH_CUDA, QKV((tokens,), hidden, heads - 2 * kv_heads, kv_heads, 64, dtype,
                              kernel=f"{dtype}_decode_sm90a", **options))  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
def test_every_tile(dtype, shape, rounding):
    check(shape, dtype, rounding=rounding)


# Two groups of tokens, of 3 and 2; four of 3 (the last is empty), of 5, of 8 (in registers), of 16 (copied); and tokens
# that leave no room for groups. More than 16 are refused where there are none.
GROUPS = ((5, 896, 1152), (9, 896, 1152), (17, 576, 960), (32, 896, 1152), (61, 448, 1152), (31, 384, 1536), (13, 1536, 2048))  # fmt: skip


@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("options", [{}, {"rounding": "fp32", "bias": True},
                                     {"residual": True, "norm_dtype": "f32", "weight_offset": 1.0}], ids=str)  # fmt: skip
def test_groups_of_tokens(narrow, shape, options):  # float32 has none
    check(shape, narrow, **options)


# The row factor joins the sums ("fp32", bfloat16, up to 2 tokens): one and two tokens, in one group and in several
@pytest.mark.parametrize("shape", [(1, 64, 320), (1, 896, 1152), (2, 896, 1152), (5, 896, 1152), (8, 896, 1152), (1, 3072, 5120),
                                   (2, 2560, 6144)], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{"residual": True}, {"norm_dtype": "f32", "weight_offset": 1.0, "bias": True},
                                     {"weights": "tuple"}], ids=str)  # fmt: skip
def test_fp32_of_few_tokens(dtype, shape, options):
    check(shape, dtype, rounding="fp32", **options)


@pytest.mark.parametrize("weights", ["packed", "packed_t", "tuple"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
def test_everything_at_once(dtype, weights, tokens):
    check((tokens, 1024, 4224), dtype, weights=weights, bias=True, residual=True)


@pytest.mark.parametrize("shape", [(1, 1024, 1152), (4, 2048, 6144), (16, 2560, 6144)], ids=str)
def test_residual_and_offset_with_every_way_to_read_tokens(dtype, shape):
    check(shape, dtype, residual=True, norm_dtype="f32", weight_offset=1.0)


# hidden, heads of q, of k and v: on 132 SMs clusters of 8, 8, 4 and 2 blocks, and two launches of clusters of 2
HEADS = ((1024, 1, 1), (896, 7, 1), (1024, 16, 8), (4096, 32, 8), (1024, 64, 8))
HEAD_CALLS = ((1, {}), (1, {"rounding": "fp32", "residual": True, "weights": "tuple"}), (2, {"rounding": "fp32", "bias": True}),
              (3, {"bias": True, "weights": "tuple"}), (8, {"residual": True, "norm_dtype": "f32", "weight_offset": 1.0}),
              (16, {"bias": True, "residual": True, "weights": "tuple"}))  # fmt: skip


def heads_case(shape, tokens, dtype, **options):
    return QKV(((tokens + 3) // 4 if dtype == "f32" else tokens,), *shape, 128, dtype, **options)


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("call", HEAD_CALLS, ids=str)
def test_whole_heads(dtype, shape, call):
    """The head-aligned split adds in the order of the even one, and gives its bits unless that has groups of tokens."""
    tokens, options = call
    case = heads_case(shape, tokens, dtype, **options)
    got, even = (
        check_qkv(TORCH_CUDA, case._replace(kernel=f"{dtype}_{name}"))
        for name in ("decode_heads_sm90a", "decode_sm90a")
    )
    few_outputs = case.qkv <= 1152  # so that four tokens or more of 16 bits come in groups
    if dtype == "f32" or tokens < 4 or not few_outputs:
        assert_same_bits(got, even, "by whole heads")


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_whole_heads_only_when_asked_for(dtype, shape):
    check_qkv(TORCH_CUDA, heads_case(shape, 1, dtype))
    assert minivllm.last_kernel().name == f"{dtype}_decode_sm90a"


def test_what_has_no_whole_heads_is_refused(dtype):
    kernel = f"{dtype}_decode_heads_sm90a"
    case = QKV((1,), 1024, 2, 1, 64, dtype, kernel=kernel)  # 256 outputs, of which k and v have 64 each
    reason = f"kernel '{kernel}' cannot serve this call: the outputs of q, k or v are no multiple of 128"
    with pytest.raises(ValueError, match=reason):
        check_qkv(TORCH_CUDA, case)
    check_qkv(TORCH_CUDA, case._replace(head_dim=128))
    with pytest.raises(ValueError, match="cannot serve this call: it takes up to"):
        check_qkv(TORCH_CUDA, case._replace(head_dim=128, lead=(17,)))
