"""How much longer the chosen kernel of a call takes than the best one would have: its regret.

Every row of the op that can serve the call is forced by name and timed, which ranks them. Then the chosen row and the
fastest are timed again in pairs, one behind the other. The regret is

    1      where the chosen row is the fastest of the first pass;
    1      where it is not, but the gap does not repeat: fewer than REPEATS of the pairs have the chosen row slower;
    else   the median over the pairs of time(chosen) / time(best).

So the fastest of many noisy times is no reason for regret: the first pass picks it, and the second one, which did not,
says by how much. Pairs that go either way by chance count in less than one of five such points.

Rows that take more than TOO_DEAR times the fastest are not timed. On the CPU each is called with a few of the tokens
first, so that a slow one is found out in little time. Times on the CPU hold the call from Python, about a microsecond.
"""

import functools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .. import _C
from .points import DTYPES, Calls, Point
from .timing import (
    Failed,
    Timing,
    calls_per_graph,
    conceivable_us,
    once_us,
    summaries,
    turns_cpu,
    turns_cuda,
)

TOO_DEAR = 4.0
PAIRS, REPEATS = 5, 4
RANKING_ROUNDS = 2
PARTS = (64, 8, 1)  # the first calls of a row on the CPU: with a 64th of the tokens, an 8th, all
NOT_LEGAL = "cannot serve this call"  # a refusal of a row, not of the call


class Row(NamedTuple):
    """A row that can serve the call: what the dispatch expected, where the extension says that, and what it took.

    timing: Timing; Failed, also where it was too slow to be timed.
    """

    name: str
    estimate_us: float | None
    timing: Timing | Failed


class Outcome(NamedTuple):
    """A point: its rows, the chosen one and the fastest of the first pass, the microseconds of both in each pair of the
    second (none where they are the same row), and the regret."""

    point: Point
    rows: dict[str, Row]
    chosen: str
    best: str
    pairs: list[tuple[float, float]]
    regret: float

    def us(self, name: str) -> float:
        """Of the chosen or the best row: the median over the pairs, or of the first pass where there are none."""
        if not self.pairs:
            return self.rows[name].timing.us
        return statistics.median(pair[name == self.best] for pair in self.pairs)


def regret(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the pairs (chosen, best) in microseconds: the median of their ratios, or 1 where it repeats too seldom that
    the chosen row is slower: in fewer than REPEATS of PAIRS, or of as many in proportion. No pairs: 1."""
    slower = sum(chosen > best for chosen, best in pairs)
    if not pairs or slower * PAIRS < REPEATS * len(pairs):
        return 1.0
    return statistics.median(chosen / best for chosen, best in pairs)


def estimate_us(why: str) -> float | None:
    """The estimate in what last_kernel() says, or None where there is none."""
    found = re.search(r"estimated ([0-9.]+) us", why)
    return float(found[1]) if found else None


def rows_of(point: Point, device: str, isas: Iterable[str] = ()) -> list[str]:
    """The rows that this machine can run, of some instruction sets or of all."""
    return [
        name
        for op, name, dtype, isa, usable, _ in _C.kernels()
        if op == point.op and dtype == DTYPES[point.dtype] and usable
        if isa.startswith("sm") == (device == "cuda") and (not isas or isa in isas)
    ]


def look(calls: Calls, name: str, bound_us: float) -> tuple[float | None, float] | str | None:
    """Calls a row for the first time: (its estimate, the microseconds of a call), what keeps it from being timed, or
    None where it cannot serve the call. On a GPU, where the call is not waited for, the microseconds are infinite."""
    tokens = calls.point.tokens
    try:
        if calls.device == "cuda":
            calls(kernel=name)
            return estimate_us(_C.last_kernel()[2]), math.inf
        for count in dict.fromkeys(max(tokens // part, 1) for part in PARTS):
            call = functools.partial(calls.part, count, kernel=name)
            us = once_us(call)
            if us > bound_us:  # which may be the first touch of some memory
                us = min(us, once_us(call))
            if us > bound_us:
                return f"too slow to time: {us:.0f} us for {count} tokens"
        return estimate_us(_C.last_kernel()[2]), us
    except ValueError as error:
        if NOT_LEGAL in str(error):
            return None
        raise


def turns(calls: Calls, names: Iterable[str], rounds: int, seconds: float) -> dict:
    """The samples of some rows, turn by turn."""
    variants = {name: (lambda i, name=name: calls(i, kernel=name)) for name in names}
    if calls.device == "cuda":
        floor_us = conceivable_us(calls.bytes, calls.flops, calls.point.dtype)
        graph = calls_per_graph(floor_us, calls.copies)
        return turns_cuda(variants, calls=graph, floor_us=floor_us, replays=rounds)
    return turns_cpu(variants, seconds=rounds * seconds, rounds=rounds, settle=0.0)


def cheapest(estimates: Mapping[str, float | None]) -> str:
    """The row that the dispatch would take if there were only these. RuntimeError where an estimate is unknown."""
    if None in estimates.values():
        raise RuntimeError("of a row it is not known what it is estimated at, so none can be called the cheapest")
    return min(estimates, key=estimates.__getitem__)


def measure(
    point: Point, device: str, cache_bytes: int, *, isas: Iterable[str] = (), seconds: float = 0.02
) -> Outcome | None:
    """The outcome of a point, or None where fewer than two rows can serve it.

    device: "cpu" or "cuda", torch's current GPU. isas: of the CPU; the chosen row is then the cheapest of theirs by its
    estimate. seconds: of each turn on the CPU, behind 20 ms untimed. RuntimeError where the chosen row failed.
    """
    names = rows_of(point, device, isas)
    if len(names) < 2:
        return None
    calls = Calls(point, device, cache_bytes)
    chosen, estimates = None, {}
    if not isas:
        calls()
        _, chosen, why = _C.last_kernel()
        estimates[chosen] = estimate_us(why)
        names = sorted(names, key=chosen.__ne__)  # the chosen one first, whose time bounds the others'
    rows, bound_us = {}, math.inf
    for name in names:
        found = look(calls, name, bound_us)
        if found is None:
            continue
        if isinstance(found, str):
            rows[name] = Row(name, None, Failed(found))
            continue
        estimate, us = found
        estimates[name] = estimate if estimate is not None else estimates.get(name)
        bound_us = min(bound_us, TOO_DEAR * us)
        rows[name] = Row(name, estimates[name], Failed("not timed"))
    if len(rows) < 2:
        return None
    chosen = chosen or cheapest({name: rows[name].estimate_us for name in estimates})
    first = summaries(turns(calls, estimates, RANKING_ROUNDS, seconds))
    rows |= {name: rows[name]._replace(timing=timing) for name, timing in first.items()}
    if isinstance(rows[chosen].timing, Failed):
        raise RuntimeError(f"{point}: {chosen}: {rows[chosen].timing.error}")
    best = min(first, key=lambda name: math.inf if isinstance(first[name], Failed) else first[name].us)
    pairs = []
    if best != chosen:
        again = turns(calls, (chosen, best), PAIRS, seconds)
        sides = [again[name] for name in (chosen, best)]
        for side in sides:
            if isinstance(side, Failed):
                raise RuntimeError(f"{point}: {side.error}")
        pairs = [tuple(map(statistics.median, pair)) for pair in zip(*sides, strict=True)]
    return Outcome(point, rows, chosen, best, pairs, regret(pairs))


def line(outcome: Outcome) -> str:
    """A point in a line."""
    chosen = f"{outcome.chosen} {outcome.us(outcome.chosen):.2f} us"
    best = "" if outcome.best == outcome.chosen else f", {outcome.best} {outcome.us(outcome.best):.2f} us"
    return f"{outcome.regret:6.3f}  {outcome.point!s:56} {chosen}{best}"


class Figures(NamedTuple):
    """Of some regrets: how many, their geometric mean, the worst, the shares above 1.02 and 1.10."""

    points: int
    mean: float
    worst: float
    over_2_percent: float
    over_10_percent: float

    def __str__(self) -> str:
        return (
            f"{self.points} points: regret {self.mean:.3f} in the mean, {self.worst:.3f} at worst, over 1.02 in "
            f"{100 * self.over_2_percent:.0f} % of them, over 1.10 in {100 * self.over_10_percent:.0f} %"
        )


def figures(regrets: Sequence[float]) -> Figures:
    """Of one regret at least."""
    shares = [sum(each > limit for each in regrets) / len(regrets) for limit in (1.02, 1.10)]
    return Figures(len(regrets), statistics.geometric_mean(regrets), max(regrets), *shares)
