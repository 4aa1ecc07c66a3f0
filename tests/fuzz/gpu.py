"""The cases of `cpu` through torch on a GPU: the same draws, with the GPU's kernels forced. What lies around a tensor
is watched by canaries alone."""

import numpy as np
from frameworks import TORCH_CPU, TORCH_CUDA

from fuzz import calls, cases
from fuzz.drawing import Case
from fuzz.memory import OnTorch

DEVICE = "cuda"


def why_not() -> str | None:
    return TORCH_CUDA.why_not() if DEVICE == "cuda" else TORCH_CPU.why_not()


def prepare():
    np.seterr(all="ignore")


def describe(seed: int, index: int) -> str:
    return str(cases.draw(seed, index, DEVICE, allowed=Case.fits_torch))


def run(seed: int, index: int) -> tuple[int, int]:
    case = cases.draw(seed, index, DEVICE, allowed=Case.fits_torch)
    return calls.run(case, OnTorch(case.blocks, DEVICE))
