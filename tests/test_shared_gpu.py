"""Many processes on one GPU: what a kernel computes must not depend on how long a copy takes.

Where the GPU changes between processes a copy can take far longer than those after it, and a warp can stand still
while others go on. So every kernel of a projection with many steps along hidden runs here in several processes at
once: the first result is held against float64 beside torch's pair, and every later one must have the same bits.
"""

import os
import subprocess
import sys

import pytest
from frameworks import TORCH_CUDA
from processes import PACKAGE

import minivllm
from minivllm.testing.numeric import rms_error
from minivllm.testing.timing import stopwatch

PROCESSES, SECONDS = 12, 20
# Of 132 SMs: 80 outputs a block, 48, and tiles that several blocks share; hidden is many times what a block holds.
SHAPES = ((8192, 10240), (2560, 6144), (4096, 1536))
TOKENS = (1, 8, 24, 64, 200)
REPEATS = 12
# Times the RMS error of torch's pair. For few tokens cuBLAS splits float32 sums among blocks, where some kernels add all
# 8,192 products one after the other: 2.7 times its error. A step of hidden that is not the right one is 10,000 times.
MOST = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
EPS = 1e-6


class Case:
    """One kernel and one shape: its inputs, its first result, and how many elements of later ones differ from that."""

    def __init__(self, torch, kernel, hidden: int, outputs: int, tokens: int):
        dtype = getattr(torch, kernel.dtype)

        def normal(*shape):
            return torch.randn(*shape, device="cuda")

        self.torch, self.kernel = torch, kernel
        self.x, self.norm_weight = normal(tokens, hidden).to(dtype), (1 + 0.1 * normal(hidden)).to(dtype)
        self.weight = (0.02 * normal(outputs, hidden)).to(dtype)
        self.what = f"{kernel.name}, {tokens} tokens, {hidden} -> {outputs}"
        self.first = self.call()

    def call(self):
        return minivllm.rms_norm_linear(
            self.x, self.norm_weight, self.weight, eps=EPS, weight_layout="out_in", kernel=self.kernel.name
        )

    def judge(self) -> str | None:
        """What is wrong with the first result."""
        torch, x = self.torch, self.x.double()
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm_weight.double()
        truth = y @ self.weight.double().t()
        rounded = self.norm_weight * (
            self.x.float() * torch.rsqrt(self.x.float().square().mean(-1, keepdim=True) + EPS)
        ).to(self.x.dtype)
        pair = torch.nn.functional.linear(rounded, self.weight)
        ours, theirs = rms_error(self.first.double(), truth), rms_error(pair.double(), truth)
        if ours <= MOST[self.kernel.dtype] * theirs:
            return None
        return f"{self.what}: RMS error {ours:.3e}, torch's pair {theirs:.3e}"

    def repeat(self) -> str | None:
        """What is wrong with calls after the first."""
        bad = self.torch.zeros((), dtype=self.torch.int64, device="cuda")
        for _ in range(REPEATS):
            bad += (self.call() != self.first).sum()
        return f"{self.what}: {int(bad)} elements differ in {REPEATS} calls" if bad else None


def main(rank: int) -> int:
    """One of the processes: prints what is wrong, and how many cases it has run."""
    torch = TORCH_CUDA.torch
    torch.manual_seed(rank)
    kernels = [each for each in minivllm.kernels("rms_norm_linear") if each.usable and each.isa.startswith("sm")]
    elapsed, ran, wrong = stopwatch(), 0, []
    while elapsed() < SECONDS and len(wrong) < 5:
        hidden, outputs = SHAPES[int(torch.randint(len(SHAPES), ()))]
        tokens, kernel = TOKENS[int(torch.randint(len(TOKENS), ()))], kernels[int(torch.randint(len(kernels), ()))]
        try:
            case = Case(torch, kernel, hidden, outputs, tokens)
        except ValueError as error:
            assert "cannot serve this call" in str(error), error
            continue
        wrong += filter(None, (case.judge(), case.repeat()))
        ran += 1
    print(*wrong, f"{ran} cases", sep="\n")
    return 1 if wrong else 0


@pytest.mark.gpu
def test_every_kernel_of_a_projection_with_the_gpu_shared():
    if reason := TORCH_CUDA.why_not():
        pytest.skip(f"compares with torch: {reason}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])}
    each = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    said = [process.communicate(timeout=40 * SECONDS)[0] for process in each]
    failed = [text for process, text in zip(each, said) if process.returncode != 0]
    assert not failed, "\n".join(failed)
    assert all(int(text.split()[-2]) > 0 for text in said)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
