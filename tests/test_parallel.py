"""shard_qkv: the heads of each rank, in every layout and framework, and what it refuses."""

import frameworks
import numpy as np
import pytest
from cases import assert_same_bits, normal
from checks import QKV, expect_qkv, weight_data

import minivllm
from minivllm.testing.reference import to_float64

HEAD_DIM, HIDDEN = 4, 24
# (num_heads, num_kv_heads, world_size): plain, grouped, fewer kv heads than ranks, one, all on one rank
SPLITS = [(8, 8, 2), (8, 2, 2), (8, 4, 4), (8, 2, 4), (8, 2, 8), (6, 1, 3), (5, 1, 1), (6, 3, 1)]
ARRAYS = [
    pytest.param(each, id=f"{each.name}-{each.device}", marks=[pytest.mark.gpu] * (each.device == "cuda"))
    for each in frameworks.ALL
    if each.name != "DeviceArray"
]


def rows(heads):
    return [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


def blocks(num_heads, num_kv_heads):
    """wq, wk, wv whose elements are all different and exact in float32."""
    sizes = [heads * HEAD_DIM for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return np.split(np.arange(sum(sizes) * HIDDEN, dtype=np.float64).reshape(-1, HIDDEN), np.cumsum(sizes)[:-1])


def expected_heads(num_heads, num_kv_heads, rank, world_size):
    """A rank's query heads, and those of the keys and values that attention lets them see."""
    mine = np.split(np.arange(num_heads), world_size)[rank]
    return mine, sorted({head * num_kv_heads // num_heads for head in mine})


@pytest.mark.parametrize("num_heads,num_kv_heads,world_size", SPLITS)
@pytest.mark.parametrize("framework", ARRAYS)
def test_each_rank_gets_its_heads(framework, num_heads, num_kv_heads, world_size):
    if reason := framework.why_not():
        pytest.skip(reason)
    whole = blocks(num_heads, num_kv_heads)
    biases = [block[:, 0] for block in whole]

    def tensors(arrays):
        return tuple(framework.tensor(array, "f32") for array in arrays)

    counts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "world_size": world_size}
    for rank in range(world_size):
        heads, kv_heads = expected_heads(num_heads, num_kv_heads, rank, world_size)
        taken = [block[rows(which)] for block, which in zip(whole, (heads, kv_heads, kv_heads))]
        packed, packed_bias = np.concatenate(taken), np.concatenate([block[:, 0] for block in taken])

        given, given_bias = tensors([np.concatenate(whole), np.concatenate(biases)])
        shard = minivllm.shard_qkv(given, given_bias, rank=rank, **counts)
        assert (shard.num_heads, shard.num_kv_heads) == (len(heads), len(kv_heads))
        assert framework.is_mine(shard.qkv_weight) and framework.is_mine(shard.bias)
        assert_same_bits(shard.qkv_weight, packed)
        assert_same_bits(shard.bias, packed_bias)
        if world_size == 1:
            assert shard.qkv_weight is given and shard.bias is given_bias

        shard = minivllm.shard_qkv(given.T, rank=rank, weight_layout="in_out", **counts)
        assert shard.bias is None
        assert_same_bits(shard.qkv_weight, packed.T)

        shard = minivllm.shard_qkv(tensors(whole), tensors(biases), rank=rank, **counts)
        for got, expected in zip((*shard.qkv_weight, *shard.bias), (*taken, *[block[:, 0] for block in taken])):
            assert_same_bits(got, expected)
        shard = minivllm.shard_qkv([w.T for w in tensors(whole)], rank=rank, weight_layout="in_out", **counts)
        for got, expected in zip(shard.qkv_weight, taken):
            assert_same_bits(got, expected.T)


@pytest.mark.parametrize("num_heads,num_kv_heads,world_size", SPLITS)
@pytest.mark.parametrize("square", [False, True], ids=["", "square"])
def test_a_shard_goes_into_the_op_and_the_layer(num_heads, num_kv_heads, world_size, square):
    """Each rank's q, k, v are the whole's, computed from the shard alone; of one that happens to be square, too."""
    dtype = "f32"
    hidden = (num_heads // world_size + 2 * max(1, num_kv_heads // world_size)) * HEAD_DIM if square else 40
    whole = QKV((3,), hidden, num_heads, num_kv_heads, HEAD_DIM, "f32", bias=True)
    x = normal((3, hidden), dtype, "x")
    norm_weight, weight, bias = weight_data(whole)
    arrays = [array.astype(np.float32) for array in (x, norm_weight, weight, bias)]
    for rank in range(world_size):
        shard = minivllm.shard_qkv(
            *arrays[2:], num_heads=num_heads, num_kv_heads=num_kv_heads, rank=rank, world_size=world_size,
            weight_layout="out_in")  # fmt: skip
        parts = minivllm.rms_norm_qkv(*arrays[:2], **shard._asdict())
        layer = minivllm.FusedRMSNormQKV(norm_weight=arrays[1], **shard._asdict())
        for got, again in zip(parts, layer(arrays[0])):
            assert_same_bits(got, again)
        heads, kv_heads = expected_heads(num_heads, num_kv_heads, rank, world_size)
        assert [part.shape for part in parts] == [(3, len(which), HEAD_DIM) for which in (heads, kv_heads, kv_heads)]
        of_k, of_v = num_heads + np.array(kv_heads), num_heads + num_kv_heads + np.array(kv_heads)
        mine = rows([*heads, *of_k, *of_v])
        case = whole._replace(num_heads=len(heads), num_kv_heads=len(kv_heads))
        packed = np.concatenate([to_float64(part).reshape(3, -1) for part in parts], -1)
        expect_qkv(case, packed, x, norm_weight, weight[mine], bias[mine])


def test_what_is_a_view_and_what_is_not():
    """Slices of a tuple are views; a packed weight's shard keeps nothing of the whole alive."""
    whole = [block.astype(np.float32) for block in blocks(8, 2)]
    options = {"num_heads": 8, "num_kv_heads": 2, "rank": 1, "world_size": 2}
    for part, block in zip(minivllm.shard_qkv(tuple(whole), **options).qkv_weight, whole):
        assert np.shares_memory(part, block)
    packed = np.concatenate(whole)
    shard = minivllm.shard_qkv(packed, **options).qkv_weight
    assert shard.flags.c_contiguous and not np.shares_memory(shard, packed)


def test_gradients_reach_the_whole_weight(torch):
    weight = torch.nn.Parameter(torch.randn(12 * HEAD_DIM, HIDDEN))
    shard = minivllm.shard_qkv(weight, num_heads=8, num_kv_heads=2, rank=1, world_size=2)
    shard.qkv_weight.sum().backward()
    touched = weight.grad.sum(1) != 0
    assert touched.nonzero().flatten().tolist() == rows([4, 5, 6, 7, 9, 11])


def test_inside_jit():
    jax = pytest.importorskip("jax", reason="needs JAX")
    weight = np.concatenate(blocks(8, 2)).astype(np.float32)
    options = {"num_heads": 8, "num_kv_heads": 2, "rank": 1, "world_size": 2}
    traced = jax.jit(lambda w: minivllm.shard_qkv(w, **options).qkv_weight)(weight)
    assert_same_bits(traced, minivllm.shard_qkv(weight, **options).qkv_weight)


WEIGHT = np.ones((12 * HEAD_DIM, HIDDEN), np.float32)
TUPLE = tuple(np.ones((heads * HEAD_DIM, HIDDEN), np.float32) for heads in (8, 2, 2))
GOOD = {"weight": WEIGHT, "num_heads": 8, "num_kv_heads": 2, "rank": 0, "world_size": 2}
REFUSED = [
    ({"world_size": 3}, ValueError, r"num_heads is 8, expected a multiple of world_size, which is 3"),
    ({"num_kv_heads": 3, "world_size": 2}, ValueError, r"num_kv_heads is 3, expected a multiple of world_size, which is 2, or a divisor"),
    ({"num_kv_heads": 16}, ValueError, r"num_heads is 8, expected a multiple of num_kv_heads, which is 16, .*swapped"),
    ({"num_kv_heads": 1, "world_size": 1, "rank": 0, "weight": np.ones((40, 40))}, ValueError, r"weight is square \(shape \(40, 40\)\), so .*weight_layout"),
    ({"num_heads": 1, "num_kv_heads": 1, "world_size": 1, "rank": 0, "weight": (np.ones((4, 4)),) * 3}, ValueError, r"weight is square \(shape \(4, 4\)\)"),
    ({"rank": 2}, ValueError, r"rank is 2, expected less than world_size, which is 2"),
    ({"rank": -1}, ValueError, r"rank is -1, expected at least 0"),
    ({"world_size": 0}, ValueError, r"world_size is 0, expected at least 1"),
    ({"num_heads": 0}, ValueError, r"num_heads is 0, expected at least 1"),
    ({"num_heads": 8.0}, TypeError, r"num_heads must be an integer, got float"),
    ({"rank": None}, TypeError, r"rank must be an integer, got NoneType"),
    ({"weight_layout": "auto"}, ValueError, r'weight_layout is \'auto\', expected "out_in" or "in_out"'),
    ({"weight": WEIGHT[1:]}, ValueError, r"weight has 47 outputs \(shape \(47, 24\)\), expected a multiple of 12"),
    ({"weight": WEIGHT.T[:23]}, ValueError, r'weight has 23 outputs .*pass weight_layout="in_out" if it is \[hidden, qkv\]'),
    ({"weight": WEIGHT[:0]}, ValueError, r"weight has 0 outputs"),
    ({"weight": WEIGHT[0]}, ValueError, r"weight has shape \(24,\), expected 2 dimensions"),
    ({"weight": TUPLE[:2]}, ValueError, r"weight has 2 members, expected one packed array or three \(q, k, v\)"),
    ({"weight": (TUPLE[0], TUPLE[1], TUPLE[2][1:])}, ValueError, r"weight\[2\] has 7 outputs .*expected 8: 2 heads of 4, as weight\[0\] has them"),
    ({"weight": TUPLE[0]}, ValueError, r"weight has 32 outputs .*expected a multiple of 12: 12 heads of one size"),
    ({"weight": [1, 2, 3]}, TypeError, r"weight\[0\] must be an array of torch, NumPy, CuPy or JAX, got int"),
    ({"weight": "wq"}, TypeError, r"weight must be an array of torch, NumPy, CuPy or JAX, got str"),
    ({"bias": WEIGHT}, ValueError, r"bias has shape \(48, 24\), expected 1 dimension"),
    ({"bias": WEIGHT[:24, 0]}, ValueError, r"bias has 2 elements per head, expected 4 \(as weight has\)"),
    ({"bias": TUPLE}, ValueError, r"bias\[0\] has shape \(32, 24\), expected 1 dimension"),
]  # fmt: skip


@pytest.mark.parametrize("changes,exception,message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_it_refuses(changes, exception, message):
    minivllm.shard_qkv(**GOOD)
    with pytest.raises(exception, match=f"^shard_qkv: {message}"):
        minivllm.shard_qkv(**(GOOD | changes))
