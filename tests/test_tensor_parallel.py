"""The decoder layer of examples/tensor_parallel.py on two processes, stage by stage against float64 and as a whole against one."""

import numpy as np
import pytest
from conftest import short_dtype
from processes import on_ranks

from minivllm.testing import numeric, reference
from minivllm.testing.reference import quantum, to_float64

RANKS = 2
DTYPES = ("float32", "bfloat16", "float16")

WORKER = """
import sys
import torch
import torch.distributed as dist
from examples import tensor_parallel as tp
from torch.nn.functional import linear

device, folder, *dtypes = sys.argv[1:]
rank, here = tp.join(device)
saved = {}
for name in dtypes:
    dtype = getattr(torch, name)
    weights = tp.random_weights(dtype, here)
    x, residual = torch.randn(2, 24, tp.HIDDEN, generator=torch.Generator().manual_seed(1)).to(here, dtype)
    with torch.inference_mode():
        layer = tp.DecoderLayer(weights, tp.HEADS, tp.KV_HEADS, rank, dist.get_world_size())
        *qkv, sums = layer.qkv(x, residual=residual)
        attended = tp.attend(*qkv)
        projected = layer.sum_over_ranks(linear(attended, layer.o))
        saved[name] = {"x": x, "residual": residual, "qkv": qkv, "sums": sums, "attended": attended,
                       "projected": projected, "weights": weights, "errors": tp.compare(here, dtype)}
torch.save(saved, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def check_stages(ranks, dtype):
    """q, k, v of every rank, and the sum over ranks of the output projection: the two places where sharding shows."""
    weights = {name: to_float64(weight) for name, weight in ranks[0]["weights"].items()}
    x, residual = to_float64(ranks[0]["x"]), to_float64(ranks[0]["residual"])
    gain = weights["input_norm"]
    whole, y, s = reference.rms_norm_qkv(
        x, gain, weights["qkv"], bias=weights["qkv_bias"], residual=residual, dtype=dtype, round_last=False
    )
    flips = numeric.may_flip(s, gain, 1e-6, dtype)
    bound = numeric.tolerance(whole, y, dtype, weight=weights["qkv"], length=x.shape[-1], gain=abs(gain), flips=flips)
    heads = [part.shape[-2] for part in ranks[0]["qkv"]]
    # q of rank 0, q of rank 1, k of rank 0, ...: the whole's own order, as no kv head has two ranks here.
    got = np.concatenate([to_float64(rank["qkv"][i]).reshape(len(x), -1) for i in range(3) for rank in ranks], -1)
    assert heads == [4, 1, 1]
    numeric.assert_within(got, whole, bound, "q, k, v of all ranks")

    attended = np.concatenate([to_float64(rank["attended"]) for rank in ranks], -1)
    exact = attended @ weights["o"].T
    bound = numeric.tolerance(exact, attended, dtype, weight=weights["o"], length=attended.shape[-1])
    # Besides the sum, each rank's part is rounded.
    for part, columns in zip(np.split(attended, RANKS, -1), np.split(weights["o"], RANKS, -1)):
        bound = bound + quantum(part @ columns.T, dtype) / 2
    for rank in ranks:
        numeric.assert_within(to_float64(rank["projected"]), exact, bound, "the sum over ranks")


def run_ranks(torch, device, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    on_ranks(str(worker), device, str(tmp_path), *DTYPES, ranks=RANKS)
    saved = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(RANKS)]
    for name in DTYPES:
        ranks = [each[name] for each in saved]
        check_stages(ranks, short_dtype(name))
        for rank in ranks:
            alone, together = rank["errors"]
            # As in the accuracy gate: of one draw no more than twice the other's error.
            assert 0 < together <= 2 * alone, f"{name}: RMS error {together} on {RANKS} ranks, {alone} on one process"


def test_two_processes(torch, tmp_path):
    run_ranks(torch, "cpu", tmp_path)


@pytest.mark.gpu
def test_two_gpus(cuda_torch, tmp_path):
    if cuda_torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs")
    run_ranks(cuda_torch, "cuda", tmp_path)


def test_the_example_itself(torch):
    printed = on_ranks("-m", "examples.tensor_parallel", "--device", "cpu", "--dtype", "float32")
    assert "2 ranks over gloo, float32: RMS error" in printed
