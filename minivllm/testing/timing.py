"""The clock: what a call costs, beside its peers, in one run. No other file of the project reads a clock.

A variant is a callable that takes the number of the call, 0, 1, 2, ..., and does the work once; it uses the number to
walk over more copies of its weights than a cache holds. Variants of one dictionary are timed in turns, so that a
machine that slows down slows all of them down. The figure is the median; its spread is the quartiles beside it. A
variant that raises becomes a Failed, and the others go on.

CPU: every sample is one call (or a batch of them, for calls under 200 us). Before each turn the timer sleeps until the
threads that another library left spinning sleep too, and then the variant runs untimed for a moment.

CUDA (through torch): every sample is one replay of a CUDA graph that holds many calls, divided by their number. A
replay of the same graph runs right before it, so the host is never what is measured.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Variant = Callable[[int], object]

BATCH_US = 200.0  # a CPU sample lasts at least this long: 1000 times what reading the clock costs
SETTLE_SECONDS = 0.15  # threads of other libraries spin before they sleep: those of OpenBLAS up to 2^28 cycles
WARM_SECONDS = 0.02  # then caches, clocks and own threads wake up
GRAPH_US = 1000.0  # a CUDA graph lasts about this long: the gap between two replays is then under 1 %
GRAPH_CALLS = 512  # and holds at most so many calls
CUDA_BYTES_PER_US = 3.2e6  # faster than any H100
CUDA_FLOPS_PER_US = {"f32": 60e6, "f16": 900e6, "bf16": 900e6}
TOO_SLOW = 20.0  # a CUDA variant this many times slower than the fastest conceivable one, and
TOO_SLOW_US = 1000.0  # over this long, is not timed


class Timing(NamedTuple):
    """Microseconds per call: the median of `samples`, the quartiles around it, the fastest."""

    us: float
    low_us: float
    high_us: float
    best_us: float
    samples: int


class Failed(NamedTuple):
    """A variant that did not run, and what it said."""

    error: str


def summary(samples_us: list[float]) -> Timing:
    """Median and quartiles of some samples."""
    low, middle, high = statistics.quantiles(samples_us, n=4) if len(samples_us) > 1 else samples_us * 3
    return Timing(middle, low, high, min(samples_us), len(samples_us))


def summaries(turns: Mapping[str, list[list[float]] | Failed]) -> dict[str, Timing | Failed]:
    """Each variant's samples of all turns in one Timing; a Failed stays one."""
    return {name: t if isinstance(t, Failed) else summary(sum(t, [])) for name, t in turns.items()}


def failure(error: BaseException) -> Failed:
    """The first cause of an error in one line: a broken capture hides the error that broke it."""
    while error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split())
    return Failed(f"{type(error).__name__}: {text}"[:400])


def in_turns(names: list[str], rounds: int):
    """Each name once per round, every round beginning one further on."""
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        yield from names[first:] + names[:first]


class Host:
    """A variant on the host: counts its calls, and keeps its samples."""

    def __init__(self, call: Variant, batch: int | None, between: Callable[[], object] | None):
        self.call, self.between, self.calls, self.turns = call, between, 0, []
        self.batch = 1
        self.sample()  # lazy initialisation
        if batch is None:
            batch = math.ceil(BATCH_US / max(min(self.sample(), self.sample()), 0.01))
        self.batch = batch

    def sample(self) -> float:
        """Microseconds per call of one batch."""
        if self.between is not None:
            self.between()
        call, first = self.call, self.calls
        self.calls += self.batch
        begin = time.perf_counter_ns()
        for number in range(first, self.calls):
            call(number)
        return (time.perf_counter_ns() - begin) / self.batch / 1e3

    def turn(self, seconds: float, settle: float) -> None:
        """Sleeps for `settle` seconds, calls untimed for WARM_SECONDS, then samples for `seconds`, two at least."""
        time.sleep(settle)
        warm = time.perf_counter() + WARM_SECONDS
        end = warm + seconds
        while time.perf_counter() < warm:
            self.sample()
        samples = []
        while len(samples) < 2 or time.perf_counter() < end:
            samples.append(self.sample())
        self.turns.append(samples)


def turns_cpu(
    variants: Mapping[str, Variant],
    *,
    seconds: float = 0.5,
    rounds: int = 5,
    batch: int | None = None,
    between: Callable[[], object] | None = None,
    settle: float = SETTLE_SECONDS,
) -> dict[str, list[list[float]] | Failed]:
    """The samples of each turn of variants that are done when they return (or, for the cost of a launch, when the host
    is free again): turn k of one stands beside turn k of the others.

    seconds: per variant, split over `rounds` turns. batch: calls per sample; None: enough for 200 us. between: called
    before every sample, off the clock (such as a device synchronisation). settle: seconds of sleep before each turn.
    """
    results: dict[str, Failed] = {}
    hosts: dict[str, Host] = {}
    for name, call in variants.items():
        try:
            hosts[name] = Host(call, batch, between)
        except Exception as error:
            results[name] = failure(error)
    for name in in_turns(list(hosts), rounds):
        if name in results:
            continue
        try:
            hosts[name].turn(seconds / rounds, settle)
        except Exception as error:
            results[name] = failure(error)
    return {name: results.get(name) or hosts[name].turns for name in variants}


def time_cpu(variants: Mapping[str, Variant], **options) -> dict[str, Timing | Failed]:
    """Times variants on the host: what all turns of each say together. Takes the options of turns_cpu."""
    return summaries(turns_cpu(variants, **options))


def once_us(call: Callable[[], object]) -> float:
    """Microseconds of one call on the host: for a bound, not for a figure."""
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def cpu_cache_bytes() -> int:
    """The largest cache of the first core as the kernel reports it, 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1:] in "KM"), default=32 << 20
    )


def copies_needed(bytes_each: int, cache_bytes: int, least: int = 2, most: int = 512) -> int:
    """How many copies of some weights to walk over so that no cache of that size ever helps: four times it."""
    return min(max(math.ceil(4 * cache_bytes / max(bytes_each, 1)), least), most)


def conceivable_us(moved_bytes: float, flops: float, dtype: str) -> float:
    """A time that no call on a GPU falls below: it bounds only how many calls a graph holds, and which are too slow."""
    return max(moved_bytes / CUDA_BYTES_PER_US, flops / CUDA_FLOPS_PER_US[dtype], 1.0)


def calls_per_graph(floor_us: float, copies: int) -> int:
    """Calls in one CUDA graph: about GRAPH_US of them at the fastest conceivable time, whole walks over the copies."""
    calls = min(max(GRAPH_US / max(floor_us, 0.5), 4), GRAPH_CALLS)
    return copies * max(1, round(calls / copies))


def event_us(torch, call: Callable[[], object]) -> float:
    """Microseconds on the device from before a call to after its work, behind what is queued already."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def captured(torch, call: Variant, calls: int, floor_us: float):
    """A CUDA graph of `calls` calls, after a few untimed ones on the same stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            call(number)
        side.synchronize()
        once_us = min(event_us(torch, lambda: call(3)), event_us(torch, lambda: call(4)))
        if once_us > max(TOO_SLOW * floor_us, TOO_SLOW_US):
            raise RuntimeError(f"too slow to time: {once_us:.0f} us a call, where {floor_us:.1f} us is conceivable")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for number in range(calls):
                call(number)
    side.synchronize()
    return graph


def turns_cuda(
    variants: Mapping[str, Variant], *, calls: int, floor_us: float = 1.0, replays: int = 7
) -> dict[str, list[list[float]] | Failed]:
    """The samples, one a turn, of variants that launch on torch's current CUDA stream, as nodes of a replayed CUDA
    graph: turn k of one stands beside turn k of the others.

    calls: per graph. To time a dependent chain, let each call read what the call before it wrote: the nodes of a graph
    captured from one stream run in order, and only programmatic launch lets two of them overlap.
    floor_us: a lower bound on one call; a variant TOO_SLOW times slower is refused.
    """
    import torch

    results: dict[str, Failed] = {}
    graphs, turns = {}, {}
    for name, call in variants.items():
        try:
            graphs[name] = captured(torch, call, calls, floor_us)
            turns[name] = []
        except Exception as error:
            results[name] = failure(error)
    for name in in_turns(list(graphs), replays):
        try:
            graphs[name].replay()
            turns[name].append([event_us(torch, graphs[name].replay) / calls])
        except Exception as error:
            results[name] = failure(error)
    return {name: results.get(name) or turns[name] for name in variants}


def time_cuda(variants: Mapping[str, Variant], **options) -> dict[str, Timing | Failed]:
    """Times variants in replayed CUDA graphs: what all turns of each say together. Takes the options of turns_cuda."""
    return summaries(turns_cuda(variants, **options))


def busy_cuda(seconds: float = 0.3) -> None:
    """Keeps the GPU busy so that its clocks are up before the first sample."""
    import torch

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def now() -> str:
    """Date and time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stopwatch() -> Callable[[], float]:
    """Seconds since this call: for progress lines, not for figures."""
    begin = time.perf_counter()
    return lambda: time.perf_counter() - begin
