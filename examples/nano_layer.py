"""A decoder layer written the way small engines write them, before and after: packed qkv_proj, gate and up in one
matrix, the residual passed along so that every sum is made by the norm behind it.

`Before` is torch alone. `After` overrides the two methods in which minivllm's ops stand. Both run on the same
weights and are compared by their errors against float64:

    python -m examples.nano_layer [--device cuda] [--dtype bfloat16]
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

import minivllm

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EPS = 256, 8, 2, 32, 512, 1e-6


class Before(nn.Module):
    """A layer of Qwen3: x, residual [tokens, hidden] -> the next layer's x and residual."""

    def __init__(self):
        super().__init__()
        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.input_norm, self.post_norm = (nn.Parameter(1 + 0.1 * torch.randn(HIDDEN)) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(1 + 0.1 * torch.randn(HEAD_DIM)) for _ in range(2))
        self.qkv_proj = nn.Linear(HIDDEN, qkv, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x, residual, cos, sin):
        q, k, v, residual = self.norm_and_project(x, residual)
        x = self.o_proj(attend(rotated(q, cos, sin), rotated(k, cos, sin), v))
        x, residual = self.norm(x, residual)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(silu(gate) * up), residual

    def norm_and_project(self, x, residual):
        residual = x + residual
        qkv = self.qkv_proj(rms_norm(residual, self.input_norm))
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=-2)
        q = rms_norm(q, self.q_norm)
        k = rms_norm(k, self.k_norm)
        return q, k, v, residual

    def norm(self, x, residual):
        residual = x + residual
        return rms_norm(residual, self.post_norm), residual


class After(Before):
    """The same layer. q and k are views of one buffer and are normed where they lie, x and residual likewise."""

    def norm_and_project(self, x, residual):
        q, k, v, residual = minivllm.rms_norm_qkv(
            x, self.input_norm, self.qkv_proj.weight, HEADS, KV_HEADS, EPS, residual=residual, weight_layout="out_in"
        )
        minivllm.rms_norm(q, self.q_norm, EPS, out=q)
        minivllm.rms_norm(k, self.k_norm, EPS, out=k)
        return q, k, v, residual

    def norm(self, x, residual):
        return minivllm.fused_add_rms_norm(x, residual, self.post_norm, EPS)


def rms_norm(x, weight):
    """As transformers and small engines write it: in float32 or wider, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rotated(x, cos, sin):
    """The rotary embedding of x [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q, k, v):
    """Causal attention of [tokens, heads, head_dim], as [tokens, heads * head_dim]."""
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def angles(tokens):
    """cos and sin of every position, [tokens, 1, head_dim]."""
    frequencies = 1e6 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(tokens)[:, None, None] * frequencies.repeat(2)
    return angle.cos(), angle.sin()


@torch.inference_mode()
def compare(device, dtype, tokens=24, layers=3):
    """(RMS error before, RMS error after) against float64, of `layers` layers and a projection of the last sum."""
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN).to(device, dtype)
    cos, sin = (part.to(device, dtype) for part in angles(tokens))
    before = nn.ModuleList(Before() for _ in range(layers)).to(device, dtype)
    after = nn.ModuleList(After() for _ in range(layers)).to(device, dtype)
    after.load_state_dict(before.state_dict())

    def run(stack, x, cos, sin):
        residual = torch.zeros_like(x)
        for layer in stack:
            x, residual = layer(x, residual, cos, sin)
        return x + residual

    results = [run(stack, x, cos, sin).double() for stack in (before, after)]
    exact = run(before.double(), x.double(), cos.double(), sin.double())
    return [float((result - exact).square().mean().sqrt()) for result in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    before, after = compare(options.device, getattr(torch, options.dtype))
    print(f"{options.dtype}: RMS error against float64 {before:.3g} before, {after:.3g} after")
    return 0 if after <= 1.25 * before else 1


if __name__ == "__main__":
    raise SystemExit(main())
