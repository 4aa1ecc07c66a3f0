"""The doctor's short look at the choice of kernels, `python -m minivllm --regret`: some points of a small model on each
device, the chosen kernel of each beside the best one. The benchmarks measure the same over the whole grid."""

import importlib.util
from collections.abc import Iterator

POINTS = 20  # on each device
SECONDS = 10.0  # no point begins later
TOKENS = (1, 16, 128)
SHAPES = ("qwen3-0.6b", "qwen3-0.6b-o", "qwen3-0.6b-down", "qwen3-0.6b-gate_up")
CACHE_BYTES = 32 << 20  # a larger cache is not walked around here
TURN_SECONDS = 0.005


def missing(module: str) -> str | None:
    """What to say where a module is not installed."""
    return None if importlib.util.find_spec(module) else f"needs {module}: pip install {module}"


def devices() -> dict[str, str | None]:
    """Where kernels run here, with what keeps them from being measured. A GPU is torch's current one."""
    from . import _C

    found = {"cpu": missing("numpy")}
    if any(row[4] and row[3].startswith("sm") for row in _C.kernels()):
        found["cuda"] = missing("torch")
    return found


def dtypes(device: str) -> list[str]:
    """bfloat16 on the CPU is ml_dtypes'."""
    return ["bf16", "f32"] if device == "cuda" or not missing("ml_dtypes") else ["f32"]


def outcomes(device: str) -> Iterator:
    """Up to POINTS of them, in the order measured; of a point with one row alone there is none."""
    from .testing import points, regret
    from .testing.timing import busy_cuda, cpu_cache_bytes, stopwatch

    if device == "cuda":
        busy_cuda()
    elapsed, count = stopwatch(), 0
    cache_bytes = min(cpu_cache_bytes(), CACHE_BYTES)
    for point in points.grid(device, dtypes(device), TOKENS, shapes=SHAPES, contexts=(512,)):
        if count == POINTS or elapsed() > SECONDS:
            return
        if outcome := regret.measure(point, device, cache_bytes, seconds=TURN_SECONDS):
            count += 1
            yield outcome


def lines() -> Iterator[str]:
    """One for each point, and a summary of each device."""
    for device, why_not in devices().items():
        if why_not:
            yield f"{device}: {why_not}"
            continue
        from .testing import regret

        regrets = []
        yield f"regret  point on {device}, then the chosen kernel and, where it is another, the fastest"
        for outcome in outcomes(device):
            regrets.append(outcome.regret)
            yield regret.line(outcome)
        yield f"{device}: {regret.figures(regrets)}" if regrets else f"{device}: no call has two kernels to choose from"


def report() -> int:
    """Prints the lines as they come; the exit status, 1 where the extension cannot be loaded."""
    try:
        for line in lines():
            print(line, flush=True)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0
