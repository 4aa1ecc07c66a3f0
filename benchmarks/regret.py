"""regret: how much longer the chosen kernels take than the best ones, over a grid of all ops, and how far the
estimates that choose them are from what is measured. minivllm/testing/regret.py has the method and says what counts;
the doctor measures the same at a few points.

--seconds takes so many points from the front of a shuffled grid, always the same for a --seed. The JSON file is written
after every point.
"""

import argparse

from benchmarks.report import Report, rounded
from benchmarks.results import OURS, cases_of
from minivllm.testing import points
from minivllm.testing.points import Point
from minivllm.testing.regret import Outcome, figures, line, measure
from minivllm.testing.timing import Failed

CUDA_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 200, 256, 512, 1024, 2048, 4096)
CPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
QUICK_TOKENS = (1, 16, 128)

METHOD = {
    "cuda": "us per op inside a replayed CUDA graph, over 2 to 64 weights (400 MB); every row that can serve the call "
    "forced by name, two replays each in turns; then the chosen row and the fastest five times in turns. regret: the "
    "median of the five ratios, or 1 where the chosen row is slower in fewer than four",
    "cpu": "us per call from Python, over weights of four times the largest cache; every row that can serve the call "
    "forced by name, two turns each; then the chosen row and the fastest five times in turns. regret: the median of "
    "the five ratios, or 1 where the chosen row is slower in fewer than four",
}


def case_of(point: Point, isas: list[str]) -> dict:
    """What the rows of a point share before it is measured. The op that was called is `of`."""
    case = point._asdict() | {"op": "regret", "of": point.op, "isas": " ".join(isas)}
    case["mode"] = ", ".join(filter(None, (point.op, case["isas"])))
    if point.context is None:
        del case["context"]
    return case


def rows_of(case: dict, outcome: Outcome) -> list[dict]:
    """One row for each kernel of a point."""
    case = case | {"regret": round(outcome.regret, 4), "chosen": outcome.chosen, "best": outcome.best}
    case["pairs"] = [[round(us, 4) for us in pair] for pair in outcome.pairs]
    rows = []
    for name, row in outcome.rows.items():
        estimate = {} if row.estimate_us is None else {"estimate_us": row.estimate_us}
        rows.append(case | {"variant": f"{OURS}:{name}", "kernel": name} | estimate | rounded(row.timing._asdict()))
    return rows


def grid_of(args: argparse.Namespace) -> list[Point]:
    """The points of the command line, in the order in which they are measured."""
    tokens = args.tokens or (QUICK_TOKENS if args.quick else CPU_TOKENS if args.device == "cpu" else CUDA_TOKENS)
    contexts = args.contexts or points.CONTEXTS
    return points.grid(
        args.device, args.dtype, tokens, ops=args.ops, shapes=args.shapes, contexts=contexts, seed=args.seed
    )


def run(args: argparse.Namespace, report: Report) -> None:
    """Every point of the command line, or as many as --seconds allow; the summary and the tables at the end."""
    from benchmarks import regret_tables

    found = grid_of(args)
    cache_bytes = report.data["environment"]["cpu_cache_bytes"]
    single = tried = 0
    regrets = []
    for point in found:
        if args.seconds is not None and report.elapsed() >= args.seconds:
            break
        tried += 1
        case = case_of(point, args.isa)
        try:
            outcome = measure(point, args.device, cache_bytes, isas=args.isa)
        except (RuntimeError, ValueError, MemoryError) as error:
            print(f"failed  {point}: {error}", flush=True)
            report.add_rows([case | {"variant": OURS} | Failed(f"{type(error).__name__}: {error}"[:400])._asdict()])
            continue
        if outcome is None:
            single += 1
            continue
        regrets.append(outcome.regret)
        print(line(outcome), flush=True)
        report.add_rows(rows_of(case, outcome))
    print(f"\n{tried} of {len(found)} points tried; {single} of them have one row")
    if regrets:
        print(figures(regrets))
        print("\n" + regret_tables.page(list(cases_of(report.data).values())))
