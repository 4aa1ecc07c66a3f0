"""Tables of regrets: their figures by dtype and by op, the worst points with what was chosen and what was best, and how
far the estimate of each row is from its time."""

import math
import statistics
from collections.abc import Callable

from benchmarks.columns import DTYPE_NAMES, number, table
from benchmarks.results import OURS, Case
from minivllm.testing.regret import figures

WORST = 20  # points in the table of the worst


def measured(cases: list[Case]) -> list[Case]:
    """Those that did not fail."""
    return [case for case in cases if "regret" in next(iter(case.rows.values()))]


def shares(cases: list[Case], head: str, key: Callable[[Case], str]) -> str:
    """The figures of each group of cases, by what `key` calls it."""
    groups: dict[str, list[float]] = {}
    for case in measured(cases):
        groups.setdefault(key(case), []).append(case.any("regret"))
    rows = []
    for name, regrets in sorted(groups.items()):
        found = figures(regrets)
        over = [f"{100 * share:.0f} %" for share in (found.over_2_percent, found.over_10_percent)]
        rows.append([name, str(found.points), f"{found.mean:.3f}", f"{found.worst:.3f}", *over])
    return table([head, "points", "regret, geometric mean", "worst", "over 1.02", "over 1.10"], rows)


def by_dtype(cases: list[Case]) -> str:
    """With the instruction sets, where rows were limited to some."""

    def name(case: Case) -> str:
        return ", ".join(filter(None, (DTYPE_NAMES[case.dtype], case.any("isas"))))

    return shares(cases, "dtype", name)


def side(case: Case, which: str) -> list[str]:
    """The chosen or the best row of a case, its time, and its estimate."""
    row = case.rows[f"{OURS}:{case.any(which)}"]
    pairs = [pair[which == "best"] for pair in case.any("pairs")]
    return [f"`{row['kernel']}`", number(statistics.median(pairs or [row["us"]])), number(row.get("estimate_us"))]


def worst(cases: list[Case]) -> str:
    """The points with the largest regrets above 1."""
    found = sorted(measured(cases), key=lambda case: -case.any("regret"))
    rows = [
        [case.mode, case.shape, f"{case.tokens:,}", f"{case.context:,}" if case.context else "", case.dtype,
         f"{case.any('regret'):.3f}", *side(case, "chosen"), *side(case, "best")]
        for case in found[:WORST] if case.any("regret") > 1
    ]  # fmt: skip
    head = ["op", "shape", "tokens", "keys", "dtype", "regret", "chosen", "us", "estimated", "best", "us", "estimated"]
    return table(head, rows) if rows else ""


def prices(cases: list[Case]) -> str:
    """Estimate / time of each row: the geometric mean, the factor within which two of three lie around it, and the
    ends."""
    found: dict[tuple[str, str], list[float]] = {}
    for case in measured(cases):
        for row in case.rows.values():
            if row.get("estimate_us") and row.get("us"):
                found.setdefault((row["of"], row["kernel"]), []).append(row["estimate_us"] / row["us"])
    rows = []
    for (op, kernel), ratios in sorted(found.items()):
        spread = math.exp(statistics.pstdev(map(math.log, ratios)))
        figures = (statistics.geometric_mean(ratios), spread, min(ratios), max(ratios))
        rows.append([op, f"`{kernel}`", str(len(ratios)), *(f"{figure:.2f}" for figure in figures)])
    head = ["op", "row", "points", "estimate / time", "spread, a factor of", "least", "most"]
    return table(head, rows) if rows else ""


def page(cases: list[Case]) -> str:
    """All tables of some cases, "" where none was measured."""
    parts = {
        "The time of the chosen row over that of the best one:": by_dtype(cases),
        "By op:": shares(cases, "op", lambda case: case.mode),
        "The worst points, microseconds:": worst(cases),
        "Estimates over times:": prices(cases),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items() if text) if measured(cases) else ""
