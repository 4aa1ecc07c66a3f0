"""What the benchmarks of an op share: which kernels there are, how minivllm is called, how a case is timed."""

from collections.abc import Callable, Mapping

import minivllm
from benchmarks import memory
from benchmarks.peers import DTYPES
from benchmarks.results import OURS
from minivllm.testing.points import ELEMENT_BYTES as ELEMENT_BYTES
from minivllm.testing.timing import Failed, Timing, calls_per_graph, conceivable_us, time_cpu, time_cuda


def rows(op: str, dtype: str, device: str, wanted: list[str]) -> list[str]:
    """The usable kernels of an op for a dtype and a device, by name; wanted: names, "all", or [] for none."""
    there = [
        kernel.name
        for kernel in minivllm.kernels(op)
        if kernel.usable
        and kernel.dtype in (dtype, DTYPES[dtype])
        and kernel.isa.startswith("sm") == (device == "cuda")
    ]
    return there if "all" in wanted else [name for name in there if name in wanted]


def ours(call: Callable[..., object], kernels: list[str], options: Mapping[str, dict]) -> dict:
    """Variants of minivllm: its own choice under each of some options, and every kernel forced.

    call(i, **options) does the work; options: by suffix, such as {"": {}, " fp32": {"rounding": "fp32"}}.
    """
    variants = {OURS + suffix: (lambda i, kwargs=kwargs: call(i, **kwargs)) for suffix, kwargs in options.items()}
    for name in kernels:
        variants[f"{OURS}:{name}"] = lambda i, name=name: call(i, kernel=name)
    return variants


def what_ran(variant: Callable[[int], object]) -> dict:
    """The kernel one more call ran, and why."""
    variant(0)
    ran = minivllm.last_kernel()
    return {} if ran is None else {"kernel": ran.name, "why": ran.why}


def time_case(case: dict, variants: dict, device: str, copies: int, quick: bool) -> tuple[dict, dict]:
    """(results, columns) by variant; columns: the kernel that ran and, on the CPU, the growth of memory in a call."""
    results: dict[str, Timing | Failed]
    if device == "cuda":
        floor_us = conceivable_us(case["bytes"], case["flops"], case["dtype"])
        calls = calls_per_graph(floor_us, copies)
        results = time_cuda(variants, calls=calls, floor_us=floor_us, replays=5 if quick else 7)
    else:
        results = time_cpu(variants, seconds=0.2 if quick else 0.6, rounds=4 if quick else 6)
    columns: dict[str, dict] = {name: {} for name in variants}
    for name, result in results.items():
        if isinstance(result, Failed):
            continue
        if name.startswith(OURS):
            columns[name] |= what_ran(variants[name])
        if device == "cpu":
            columns[name]["peak_bytes"] = memory.peak_bytes(lambda name=name: variants[name](0))
    return results, columns
