"""A decoder layer over several ranks: tensor parallelism with minivllm's ops and torch.distributed.

Each rank holds its heads of the attention (`shard_qkv`) and its part of the MLP. The ranks meet twice per layer, where
they add what each has of the output and down projections. Rotary embedding, which works head by head and so changes
nothing in this, is left out.

Run, and compared with one process by the error of each against float64:

    torchrun --nproc-per-node 2 -m examples.tensor_parallel [--device cpu] [--dtype float32]
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from minivllm import FusedRMSNormQKV, fused_add_rms_norm, shard_qkv

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EPS = 256, 8, 2, 32, 512, 1e-6
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class DecoderLayer:
    """One rank's part of a layer; alone, all of it.

    weights: `random_weights`' names, whole. Calls take x and residual [tokens, hidden] and return the next layer's; the
    first layer's residual is zero, so that x + residual is the embedding.
    """

    def __init__(self, weights, num_heads, num_kv_heads, rank=0, world_size=1):
        shard = shard_qkv(
            weights["qkv"],
            weights["qkv_bias"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            rank=rank,
            world_size=world_size,
            weight_layout="out_in",
        )
        self.qkv = FusedRMSNormQKV(norm_weight=weights["input_norm"], eps=EPS, **shard._asdict())
        self.post_norm = weights["post_norm"]
        self.gate, self.up = (weights[name].chunk(world_size)[rank].clone() for name in ("gate", "up"))
        self.o, self.down = (weights[name].chunk(world_size, dim=1)[rank].clone() for name in ("o", "down"))
        self.world_size = world_size

    def __call__(self, x, residual):
        q, k, v, residual = self.qkv(x, residual=residual)
        x = self.sum_over_ranks(linear(attend(q, k, v), self.o))
        x, residual = fused_add_rms_norm(x, residual, self.post_norm, EPS)
        x = self.sum_over_ranks(linear(silu(linear(x, self.gate)) * linear(x, self.up), self.down))
        return x, residual

    def sum_over_ranks(self, partial):
        if self.world_size > 1:
            dist.all_reduce(partial)
        return partial


def attend(q, k, v):
    """Causal attention of [tokens, heads, head_dim], as [tokens, heads * head_dim]."""
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def random_weights(dtype, device, seed=0):
    """A layer's weights, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

    def vector(size, mean):
        return (mean + 0.1 * torch.randn(size, generator=generator)).to(device, dtype)

    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return {
        "input_norm": vector(HIDDEN, 1.0), "qkv": matrix(qkv, HIDDEN), "qkv_bias": vector(qkv, 0.0),
        "o": matrix(HIDDEN, HEADS * HEAD_DIM), "post_norm": vector(HIDDEN, 1.0),
        "gate": matrix(INTERMEDIATE, HIDDEN), "up": matrix(INTERMEDIATE, HIDDEN), "down": matrix(HIDDEN, INTERMEDIATE),
    }  # fmt: skip


def exact_layer(weights, x, residual):
    """The layer in float64, on one process and without minivllm."""
    w = {name: weight.double() for name, weight in weights.items()}
    residual = x + residual
    y = linear(rms_norm(residual, (HIDDEN,), w["input_norm"], EPS), w["qkv"], w["qkv_bias"])
    x = linear(attend(*y.unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=-2)), w["o"])
    residual = x + residual
    y = rms_norm(residual, (HIDDEN,), w["post_norm"], EPS)
    return linear(silu(linear(y, w["gate"])) * linear(y, w["up"]), w["down"]), residual


def run_layers(layers, x):
    """What the last layer leaves: x + residual."""
    residual = torch.zeros_like(x)
    for layer in layers:
        x, residual = layer(x, residual)
    return x + residual


def join(device):
    """This process's rank and device, once all are there: torchrun says the rest in the environment."""
    local_rank = int(os.environ["LOCAL_RANK"])
    here = torch.device(device, local_rank if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(BACKENDS[device])
    return dist.get_rank(), here


@torch.inference_mode()
def compare(device, dtype, tokens=24, layers=3):
    """(RMS error of one process, RMS error of all ranks together) against float64, of `layers` layers."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weights = [random_weights(dtype, device, seed) for seed in range(layers)]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(99)).to(device, dtype)
    exact = run_layers([lambda x, residual, w=w: exact_layer(w, x, residual) for w in weights], x.double())
    alone = run_layers([DecoderLayer(w, HEADS, KV_HEADS) for w in weights], x)
    together = run_layers([DecoderLayer(w, HEADS, KV_HEADS, rank, world_size) for w in weights], x)
    return [float((got.double() - exact).square().mean().sqrt()) for got in (alone, together)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=BACKENDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 -m examples.tensor_parallel")
    rank, device = join(options.device)
    alone, together = compare(device, getattr(torch, options.dtype))
    if rank == 0:
        print(
            f"{dist.get_world_size()} ranks over {BACKENDS[options.device]}, {options.dtype}: RMS error {together:.3g} "
            f"against float64; one process {alone:.3g}"
        )
    dist.destroy_process_group()
    return 0 if together <= 2 * alone else 1


if __name__ == "__main__":
    raise SystemExit(main())
