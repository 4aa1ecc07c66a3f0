"""float32 on Hopper's tensor cores: every height of tile, whole tiles and split ones; sums that are not finite."""

import numpy as np
import pytest
from cases import UNALIGNED, normal
from checks import QKV, check_qkv
from frameworks import TORCH_CUDA, hopper_dtype
from test_accuracy import EPS, KINDS, Gate, data, hf_norm, rms_error, wide

import minivllm
from minivllm.testing import reference, shapes

pytestmark = pytest.mark.gpu

ROW = "f32_norm_3xtf32_sm90a"

# tokens, hidden, outputs. On the 132 SMs of an H100: every tile, of 8 to 128 tokens, split so that each CTA has the same part of
# it, or so that each has as much, which may begin in one tile and end in the next; waves of whole tiles, with some left and with
# none; a single step, one that is short, and a tile that no other shares (test_cuda_on_cpu holds the list to that)
SHAPES = ((5, 72, 384), (8, 1028, 1152), (16, 2052, 6144), (30, 4096, 6144), (61, 4096, 6144), (90, 2564, 6144), (128, 4096, 6144),
          (128, 100, 16896), (1000, 516, 6144), (1408, 64, 1536), (130, 36, 10240), (2100, 132, 4096), (1, 32, 384), (200, 2052, 6144))  # fmt: skip


@pytest.fixture(autouse=True)
def hopper():
    hopper_dtype("f32", "norm_3xtf32_sm90a")


def case_of(tokens, hidden, outputs, **options):
    heads = outputs // 64
    return QKV((tokens,), hidden, heads - 2 * (heads // 6), heads // 6, 64, "f32", kernel=ROW, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["packed", "tuple", "packed_t", "padded", "tuple_of_slices"])
def test_every_tile(shape, weights):
    check_qkv(TORCH_CUDA, case_of(*shape, weights=weights, bias=True))
    check_qkv(TORCH_CUDA, case_of(*shape, weights=weights, residual=True, rounding="fp32", weight_offset=1.0))
    check_qkv(TORCH_CUDA, case_of(*shape, weights=weights, batch_invariant=True))
    check_qkv(TORCH_CUDA, case_of(*shape, weights=weights, allow_tf32=True))


def test_unaligned_outputs():
    for shape in SHAPES:
        check_qkv(TORCH_CUDA, case_of(*shape, bias=True, out_layout=UNALIGNED))
        check_qkv(TORCH_CUDA, case_of(*shape, bias=True, out_layout=UNALIGNED, allow_tf32=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(5, 72, 384), (61, 256, 768), (128, 516, 1152), (300, 72, 16896)], ids=str)
def test_under_the_sanitizer(shape):
    check_qkv(TORCH_CUDA, case_of(*shape, bias=True, residual=True))
    check_qkv(TORCH_CUDA, case_of(*shape, allow_tf32=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gate(kind):
    """As near to float64 as torch's pair without TF32, in tiles of few tokens and of many."""
    torch = TORCH_CUDA.torch
    for shape in shapes.MODELS:
        matrix = TORCH_CUDA.tensor(normal((512, shape.hidden), "f32", "gate matrix", shape.hidden, scale=0.02), "f32")
        gates = {tokens: Gate() for tokens in (64, 256)}
        for draw in range(4):
            x, weight = data(TORCH_CUDA, kind, "f32", shape.hidden, draw, rows=256)
            truth, _, _ = reference.rms_norm_qkv(wide(x), wide(weight), wide(matrix), EPS)
            pair = torch.nn.functional.linear(hf_norm(torch, x, weight), matrix)
            for tokens, gate in gates.items():
                parts = [minivllm.rms_norm_qkv(rows, weight, matrix, 2, 1, EPS, kernel=ROW) for rows in x.split(tokens)]
                ours = torch.cat([torch.cat([part.flatten(1) for part in each], 1) for each in parts])
                gate.add(truth, ours, pair, f"draw {draw} of {kind} at {shape.name}")
        for tokens, gate in gates.items():
            gate.judge(f"{kind} at {shape.name} in parts of {tokens} tokens")


def test_tf32_only_where_it_is_allowed():
    x, weight = data(TORCH_CUDA, "normal", "f32", 1024, 0, rows=200)
    matrix = TORCH_CUDA.tensor(normal((512, 1024), "f32", "gate matrix", 1024, scale=0.02), "f32")
    truth, _, _ = reference.rms_norm_qkv(wide(x), wide(weight), wide(matrix), EPS)
    rms = {}
    for allowed in (False, True):
        parts = minivllm.rms_norm_qkv(x, weight, matrix, 2, 1, EPS, kernel=ROW, allow_tf32=allowed)
        rms[allowed] = rms_error(wide(TORCH_CUDA.torch.cat([part.flatten(1) for part in parts], 1)), truth)
    assert 200 * rms[False] < rms[True] < 20000 * rms[False], rms


@pytest.mark.parametrize("allow_tf32, rtol", [(False, 1e-5), (True, 2.0**-10)])
def test_values_that_two_parts_cannot_hold(allow_tf32, rtol):
    """Infinite weights and norm weights, and the largest finite ones, give what the formula gives; NaN stays where it belongs."""
    torch = TORCH_CUDA.torch

    def run(*given):
        parts = minivllm.rms_norm_qkv(*given, 1, 1, 0.0, kernel=ROW, allow_tf32=allow_tf32)
        return torch.cat([part.flatten(1) for part in parts], 1)

    x = torch.ones(40, 256, device="cuda")
    x[3, 7], x[5, 9] = -1.0, np.nan
    matrix = torch.full((384, 256), 1e-3, device="cuda")
    matrix[1, 7], matrix[2, 8], matrix[130, 0], matrix[131, 1] = np.inf, -np.inf, 3.4e38, np.nan
    weight = torch.ones(256, device="cuda")
    weight[200] = 3e37
    got = run(x, weight, matrix)
    assert torch.isnan(got[5]).all() and torch.isnan(got[:, 131]).all()
    got, good = got[[row for row in range(40) if row != 5]], x[[row for row in range(40) if row != 5]]
    assert (got[:, 2] == -np.inf).all()
    assert (got[:, 1] == torch.where(good[:, 7] < 0, -np.inf, np.inf)).all()
    rest = [column for column in range(384) if column not in (1, 2, 131)]
    truth, _, _ = reference.rms_norm_qkv(wide(good), wide(weight), wide(matrix)[rest], 0.0)
    np.testing.assert_allclose(got[:, rest].double().cpu(), truth.cpu(), rtol=rtol)
    weight[200] = np.inf
    got = run(x[:3], weight, matrix)
    assert (got[:, :2] == np.inf).all() and torch.isnan(got[:, 2]).all()
