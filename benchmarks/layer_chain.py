"""A decoder layer as a chain of its five kernels, beside each of them in a chain of its own, in microseconds.

    python -m benchmarks.layer_chain qwen3-0.6b [--tokens 1 8] [--context 512] [--rounding fp32 hf]

A chain walks over the weights of enough layers that none is in L2 when it is read again, in a replayed CUDA graph with
programmatic launch; every kernel waits for the one before it. What the layer takes beyond the sum of its kernels is
what they do to each other: instructions that are no longer in the caches of an SM, and weights that cannot be on their
way yet. The rounding is that of the norms, of attention and of gate and up; o_proj and down, which add a residual, have
their default. `read` is one kernel for each weight and for the keys and values, which only reads it.
"""

import argparse
from collections.abc import Callable

import torch

import minivllm
from benchmarks import device_peers
from benchmarks.peers import EPS, normal
from minivllm.testing.models import configuration
from minivllm.testing.timing import Failed, busy_cuda, time_cuda

KERNELS = {"q": "qkv", "a": "attention", "o": "o_proj", "g": "gate, up", "d": "down"}
CHAINS = (*KERNELS, "qogd", "qaogd")
WEIGHTS_BYTES = 400e6  # of all layers together, at least
OPTIONS = {"static_weights": True, "weight_layout": "out_in"}


class Layers:
    """The layers of a model with random weights, and one token each of some sequences that go through them."""

    def __init__(self, name: str, tokens: int, context: int, rounding: str) -> None:
        config = configuration(name)
        self.rounding, self.tokens = rounding, tokens
        self.heads, self.kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, middle, columns = config.hidden_size, config.intermediate_size, self.heads * dim
        outputs = (self.heads + 2 * self.kv_heads) * dim

        def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return normal(*shape, dtype="bf16", device="cuda") * scale

        def matrix(rows: int, of: int) -> torch.Tensor:
            return some(rows, of, scale=of**-0.5)

        each = 2 * (outputs * hidden + hidden * columns + 3 * middle * hidden)
        self.weights = [
            {
                "q": matrix(outputs, hidden), "o": matrix(hidden, columns), "g": matrix(2 * middle, hidden),
                "d": matrix(hidden, middle), "norms": [some(hidden), some(hidden), some(dim), some(dim)],
                "a": [some(tokens, self.kv_heads, context + 1, dim) for _ in range(2)],
            }
            for _ in range(max(2, round(WEIGHTS_BYTES / each)))
        ]  # fmt: skip
        self.x, self.h = some(tokens, hidden), some(tokens, hidden)
        self.qkv, self.attended = some(tokens, self.heads + 2 * self.kv_heads, dim), some(tokens, self.heads, dim)
        self.middle, self.cos, self.sin = some(tokens, middle), some(tokens, dim), some(tokens, dim)
        self.positions = torch.full((tokens,), context, device="cuda")

    def run(self, kernel: str, number: int) -> None:
        layer = self.weights[number % len(self.weights)]
        norms, weight, rounding = layer["norms"], layer[kernel], {"rounding": self.rounding}
        if kernel == "q":
            out = self.qkv.view(self.tokens, -1)
            minivllm.rms_norm_qkv(
                self.x, norms[0], weight, self.heads, self.kv_heads, EPS, out=out, **rounding, **OPTIONS
            )
        elif kernel == "a":
            q, k, v = self.qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
            minivllm.decode_attention(
                q, k, v, *weight, self.positions, cos=self.cos, sin=self.sin, q_norm_weight=norms[2],
                k_norm_weight=norms[3], out=self.attended, static_rows=True,
                static_weights=True, **rounding)  # fmt: skip
        elif kernel == "g":
            minivllm.rms_norm_gate_up(self.h, norms[1], weight, EPS, out=self.middle, **rounding, **OPTIONS)
        elif kernel == "o":
            minivllm.linear_add(self.attended.view(self.tokens, -1), weight, self.x, out=self.h, **OPTIONS)
        else:
            minivllm.linear_add(self.middle, weight, self.h, out=self.x, **OPTIONS)

    def chain(self, kernels: str) -> Callable[[int], None]:
        def run(number: int) -> None:
            for kernel in kernels:
                self.run(kernel, number)

        return run

    def read(self, number: int) -> None:
        layer = self.weights[number % len(self.weights)]
        for tensor in (layer["q"], *layer["a"], layer["o"], layer["g"], layer["d"]):
            device_peers.read(tensor, torch.cuda.get_device_properties(0).multi_processor_count, programmatic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of minivllm.testing.models")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=512, help="tokens in the caches")
    parser.add_argument("--rounding", nargs="+", choices=("fp32", "hf", "hf_once"), default=["fp32", "hf"])
    args = parser.parse_args()
    busy_cuda()
    print(f"{args.model}, bf16, {args.context} tokens in the caches, {torch.cuda.get_device_name()}: us")
    print(f"{'tokens':>7} {'rounding':>8}", *(f"{KERNELS.get(c, c):>9}" for c in CHAINS), f"{'read':>9}")
    for tokens in args.tokens:
        for rounding in args.rounding:
            layers = Layers(args.model, tokens, args.context, rounding)
            calls = {kernels: layers.chain(kernels) for kernels in CHAINS} | {"read": layers.read}
            found = time_cuda(calls, calls=2 * len(layers.weights)).values()
            if failed := [one for one in found if isinstance(one, Failed)]:
                raise SystemExit(f"{args.model}, {tokens} tokens: {failed[0]}")
            print(f"{tokens:7} {rounding:>8}", *(f"{one.us:9.2f}" for one in found), flush=True)


if __name__ == "__main__":
    main()
