"""No tokens: right empty outputs, and no launch."""

import pytest
from cases import normal

import minivllm


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_no_tokens(device, framework, dtype, lead):
    if reason := framework.why_not(dtype):
        pytest.skip(reason)
    minivllm.rms_norm(framework.full((1, 8), 1.0, dtype), framework.full((8,), 1.0, dtype))
    before = minivllm.last_kernel()
    x = framework.full((*lead, 24), 1.0, dtype)
    weight = framework.full((24,), 1.0, dtype)
    out = minivllm.rms_norm(x, weight)
    assert framework.is_mine(out) and tuple(out.shape) == (*lead, 24) and out.dtype == x.dtype
    out, sums = minivllm.add_rms_norm(x, x, weight)
    assert tuple(out.shape) == tuple(sums.shape) == (*lead, 24)
    same = minivllm.rms_norm(x, weight, out=x)
    assert same is x
    first, second = minivllm.fused_add_rms_norm(x, framework.full((*lead, 24), 1.0, dtype), weight)
    assert first is x and tuple(second.shape) == (*lead, 24)
    for gated in (minivllm.silu_and_mul(x), minivllm.gelu_and_mul(x, out=framework.full((*lead, 12), 1.0, dtype))):
        assert framework.is_mine(gated) and tuple(gated.shape) == (*lead, 12) and gated.dtype == x.dtype
    matrix = framework.tensor(normal((40, 24), dtype), dtype)
    for weights in (matrix, matrix.T, (matrix[:24], matrix[24:32], matrix[32:])):
        q, k, v = minivllm.rms_norm_qkv(x, weight, weights, 3, 1)
        assert tuple(q.shape) == (*lead, 3, 8) and tuple(k.shape) == tuple(v.shape) == (*lead, 1, 8)
        assert framework.is_mine(q) and q.dtype == x.dtype
    parts = minivllm.rms_norm_qkv(x, weight, matrix, 3, 1, residual=x, out=framework.full((*lead, 40), 1.0, dtype))
    assert len(parts) == 4 and tuple(parts[3].shape) == (*lead, 24)
    assert minivllm.last_kernel() == before, "something ran"


def test_arguments_are_checked_without_tokens_too(device, framework):
    x = framework.full((0, 24), 1.0, "f32")
    with pytest.raises(ValueError, match="weight has 23 elements"):
        minivllm.rms_norm(x, framework.full((23,), 1.0, "f32"))
    with pytest.raises(TypeError, match="weight is float16"):
        minivllm.rms_norm(x, framework.full((24,), 1.0, "f16"))
    with pytest.raises(ValueError, match="qkv_weight has 41 outputs"):
        minivllm.rms_norm_qkv(x, framework.full((24,), 1.0, "f32"), framework.full((41, 24), 1.0, "f32"), 3, 1)
    with pytest.raises(ValueError, match="expected an even last dimension"):
        minivllm.silu_and_mul(framework.full((0, 23), 1.0, "f32"))
    with pytest.raises(ValueError, match="no kernel is called"):
        minivllm.gelu_and_mul(x, kernel="f32_abacus")
    with pytest.raises(ValueError, match="no kernel is called"):
        minivllm.rms_norm(x, framework.full((24,), 1.0, "f32"), kernel="f32_abacus")
    with pytest.raises(ValueError, match="no kernel is called"):
        matrix = framework.full((40, 24), 1.0, "f32")
        minivllm.rms_norm_qkv(x, framework.full((24,), 1.0, "f32"), matrix, 3, 1, kernel="f32_abacus")
