"""FusedRMSNormQKV.forward on the shapes of real models: right, and how fast.

Every model of minivllm.testing.shapes, one token and a short prompt, float32 against NumPy and, where torch is
installed, bfloat16 against torch; on the GPU instead where torch sees one. The error is the largest one against
float64, beside the limit that minivllm.testing.numeric derives for it. A time is that of the fastest sample, and
weights stay where a loop leaves them, small ones in the caches: `python -m benchmarks` is what measures.

Usage: python -m examples.demo [--quick]
"""

import argparse
import importlib.util
import platform
import resource
from pathlib import Path

import numpy as np

import minivllm
from minivllm import FusedRMSNormQKV
from minivllm.testing import numeric, reference, timing
from minivllm.testing.shapes import MODELS

EPS = 1e-6
PROMPT = 64  # tokens
SECONDS = 0.15  # per variant
PREEMPTIONS = 50  # per second: about 1 was seen on cores of its own, over 300 on shared ones
BLOCK = 2048  # outputs checked at a time, so that float64 copies of the weights stay small
SHORT = {"float32": "f32", "bfloat16": "bf16"}
RULE = "─" * 110


def numpy_pair(x, norm_weight, qkv_weight, bias):
    """What a NumPy user would write, in float32."""
    y = x * (1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(EPS))) * norm_weight
    out = y @ qkv_weight.T
    return out if bias is None else out + bias


class Problem:
    """The tensors of one model in one dtype, as NumPy arrays or torch tensors."""

    def __init__(self, shape, dtype, torch=None, device="cpu"):
        self.shape, self.dtype, self.torch, self.device = shape, dtype, torch, device
        self.random = np.random.default_rng(0)
        self.norm_weight = self.tensor(1 + 0.1 * self.normal(shape.hidden))
        self.qkv_weight = self.tensor(np.float32(0.02) * self.normal(shape.qkv, shape.hidden))
        self.bias = self.tensor(0.1 * self.normal(shape.qkv)) if shape.bias else None

    def normal(self, *size):
        return self.random.standard_normal(size, dtype=np.float32)

    def tensor(self, values):
        values = values.astype(np.float32, copy=False)
        if self.torch is None:
            return values
        return self.torch.from_numpy(values).to(self.device, getattr(self.torch, self.dtype))

    def ours(self, x):
        return FusedRMSNormQKV.forward(
            x, self.norm_weight, self.qkv_weight, self.shape.num_heads, self.shape.num_kv_heads, EPS, bias=self.bias,
            weight_layout="out_in")  # fmt: skip

    def theirs(self, x):
        if self.torch is None:
            return numpy_pair(x, self.norm_weight, self.qkv_weight, self.bias)
        functional = self.torch.nn.functional
        y = functional.rms_norm(x, (self.shape.hidden,), self.norm_weight, EPS)
        return functional.linear(y, self.qkv_weight, self.bias)

    def error(self, x):
        """The largest error of q, k, v against float64, and the largest share of its limit that one takes."""
        got = np.concatenate([reference.to_float64(part).reshape(len(x), -1) for part in self.ours(x)], axis=1)
        gain = reference.to_float64(self.norm_weight)
        y, _ = reference.rms_norm(reference.to_float64(x), gain, EPS)
        worst, share = 0.0, 0.0
        for first in range(0, self.shape.qkv, BLOCK):
            block = slice(first, first + BLOCK)
            weight = reference.to_float64(self.qkv_weight[block])
            exact = y @ weight.T
            if self.bias is not None:
                exact += reference.to_float64(self.bias[block])
            bound = numeric.tolerance(
                exact, y, SHORT[self.dtype], length=self.shape.hidden, weight=weight, gain=abs(gain), roundings=2
            )
            error = abs(got[:, block] - exact)
            worst, share = max(worst, error.max()), max(share, (error / bound).max())
        return worst, share

    def times(self, x):
        variants = {"ours": lambda _: self.ours(x), "theirs": lambda _: self.theirs(x)}
        if self.device == "cpu":
            measured = timing.time_cpu(variants, seconds=SECONDS, rounds=2)
        else:
            measured = timing.time_cuda(variants, calls=64)
        return [measured[name].best_us for name in variants]


def human(us):
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


def processor():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {minivllm.get_num_threads()} threads"


def show(title, peer, problems):
    """One table; True when every error is within its limit."""
    print(f"\n{title}\n{RULE}")
    print(
        f"{'model':14} {'hidden → q+k+v':>14} {'tokens':>6}  {'kernel':24} {'error':>8} {'of limit':>8} "
        f"{'minivllm':>10} {peer:>10} {'speed-up':>8}"
    )
    right = True
    for problem in problems:
        shape = problem.shape
        for tokens in (1, PROMPT):
            x = problem.tensor(problem.normal(tokens, shape.hidden))
            worst, share = problem.error(x)
            kernel = minivllm.last_kernel().name
            ours, theirs = problem.times(x)
            right &= share <= 1
            size, verdict = f"{shape.hidden:>5} → {shape.qkv:>6}", "" if share <= 1 else "  WRONG"
            print(
                f"{shape.name:14} {size} {tokens:>6}  {kernel:24} {worst:8.1e} {share:>8.0%} "
                f"{human(ours):>10} {human(theirs):>10} {theirs / ours:>7.2f}×{verdict}",
                flush=True,
            )
    print("error: the largest one against float64; of limit: its share of what rounding may cost, 100 % at most")
    return right


def disturbed(seconds):
    """Whether other work runs here: by how often the system took a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > PREEMPTIONS * seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the three smallest models only")
    shapes = MODELS[:3] if parser.parse_args().quick else MODELS
    elapsed = timing.stopwatch()
    print(f"minivllm {minivllm._C.version}: q, k, v = rms_norm(x) @ W.T in one call, checked against float64")
    right = show(f"float32 arrays on {processor()}", "NumPy", (Problem(shape, "float32") for shape in shapes))
    if importlib.util.find_spec("torch"):
        import torch

        gpu = torch.cuda.is_available() and bool(minivllm._C.cuda_archs())
        where = torch.cuda.get_device_name() if gpu else processor()
        problems = (Problem(shape, "bfloat16", torch, "cuda" if gpu else "cpu") for shape in shapes)
        right &= show(f"bfloat16 tensors of torch {torch.__version__} on {where}", "torch", problems)
    else:
        print("\ntorch is not installed: no bfloat16 table (`make demo WITH=torch` installs it into .venv)")
    if disturbed(elapsed()):
        print("\nother work runs on this machine: the times mean little")
    print(f"\n{'Every result is within its limit.' if right else 'SOMETHING IS WRONG.'} ({elapsed():.0f} s)")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
