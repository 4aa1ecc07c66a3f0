"""Cases on the CPU: NumPy arrays, and one in seven torch tensors, against guard pages."""

import numpy as np
from frameworks import NUMPY, TORCH_CPU

from fuzz import calls, cases
from fuzz.drawing import DTYPES
from fuzz.memory import Guarded, regions
from fuzz.values import TAME, WILD, pool


def why_not() -> str | None:
    return NUMPY.why_not("bf16")


def prepare():
    """What every case needs, made once: children inherit it."""
    np.seterr(all="ignore")
    regions()
    for dtype in DTYPES:
        for kind in TAME + WILD:
            pool(dtype, kind)
    TORCH_CPU.why_not()


def describe(seed: int, index: int) -> str:
    return str(cases.draw(seed, index))


def run(seed: int, index: int) -> tuple[int, int]:
    """(calls, of which refused)"""
    case = cases.draw(seed, index)
    # The number of ops and 7 have no divisor in common: every op has its turn.
    by_torch = index % 7 == 3 and case.fits_torch() and not TORCH_CPU.why_not()
    return calls.run(case, Guarded(case.blocks, "torch" if by_torch else "numpy"))
