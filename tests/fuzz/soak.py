"""One GPU shared by many processes: random calls of every op, eager and in CUDA graphs, whose inputs and weights are
written just before the call, by kernels and by copies, over memory that held infinities and NaNs. Some of these kernels
let the call begin before they write (`late`).

A program is a drawn case with several variants of its values. Each variant's result is held against float64 once, in
float64 on the device; every later call of it must give the same bits. A stale read shows because the call before had
other values. Some programs vouch: with `static_weights=True` the weights keep their values, and all else changes.

With `--device cpu` the same program runs on CPU tensors, its graphs as plain loops: a dry run of the logic.
"""

import json
import multiprocessing
import random
import time
import traceback
from pathlib import Path

import numpy as np
from frameworks import TORCH_CPU, TORCH_CUDA

from fuzz import attention, cases
from fuzz.drawing import Case
from fuzz.program import CAPTURED, EAGER, REPLAYS, VARIANTS, Program
from minivllm.testing.timing import stopwatch

OPS = (*cases.OPS, attention.OP)
FIELDS = ("programs", "eager", "in graphs", "refused", "wrong")
MOST_FAILURES = 20


def draw(seed: int, index: int, device: str) -> Case:
    """A case that torch holds, and that must be served."""
    op = OPS[index % len(OPS)]
    if op == attention.OP:
        return attention.draw(seed, index, device)
    return cases.draw(seed, index, device, op, allowed=lambda case: case.fits_torch() and not case.refused)


def run(seed: int, index: int, device: str) -> dict:
    """The counts of one program; raises where something is wrong."""
    case, rng = draw(seed, index, device), random.Random((seed << 40) + index)
    kind = attention.Attention if case.op == attention.OP else Program
    program = kind(case, device, rng, vouches=rng.random() < 0.4, writes_late=rng.choice((0, 0.4, 1)))
    try:
        program.start()
    except ValueError as error:
        if case.may_refuse and "cannot serve this call" in str(error):
            return {"refused": 1}
        raise
    program.eager()
    program.graphs()
    program.finish()
    return {"programs": 1, "eager": VARIANTS + EAGER, "in graphs": CAPTURED * REPLAYS}


def worker(rank: int, shared, device: str, seed: int, first: int, seconds: float):
    """One of the processes: its own seed, its own place in `shared`: the next index, then the counts."""
    np.seterr(all="ignore")
    elapsed, index = stopwatch(), first
    own = seed * 1000 + rank
    while elapsed() < seconds and sum(shared[at] for at in _failures(shared)) < MOST_FAILURES:
        counts = {}
        try:
            counts = run(own, index, device)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is a finding
            counts = {"wrong": 1}
            text = "".join(traceback.format_exception(error)[-2:])
            print(f"\nFAILED  python -m fuzz soak --only {own}:{index}\n{draw(own, index, device)}\n{text}", flush=True)
        index += 1
        at = rank * (1 + len(FIELDS))
        shared[at] = index
        for name, count in counts.items():
            shared[at + 1 + FIELDS.index(name)] += count


def _failures(shared):
    width = 1 + len(FIELDS)
    return [rank * width + 1 + FIELDS.index("wrong") for rank in range(len(shared) // width)]


def why_not(device: str) -> str | None:
    return (TORCH_CUDA if device == "cuda" else TORCH_CPU).why_not()


def main(device: str, processes: int, seconds: float, seed: int, state: Path | None) -> int:
    if reason := why_not(device):
        print(f"fuzz soak: nothing ran: {reason}")
        return 2
    held = {"seed": seed, "processes": processes, "next": [0] * processes, "seconds": 0.0}
    held["counts"] = dict.fromkeys(FIELDS, 0)
    if state and state.exists():
        held = json.loads(state.read_text())
        if (held["seed"], held["processes"]) != (seed, processes):
            raise SystemExit(f"{state} is of seed {held['seed']} in {held['processes']} processes")
    context = multiprocessing.get_context("spawn")
    width = 1 + len(FIELDS)
    shared = context.RawArray("q", processes * width)
    elapsed = stopwatch()
    running = []
    for rank in range(processes):
        shared[rank * width] = held["next"][rank]
        arguments = (rank, shared, device, seed, held["next"][rank], seconds)
        running.append(context.Process(target=worker, args=arguments))
        running[-1].start()

    def counts():
        return {name: held["counts"][name] + sum(shared[rank * width + 1 + i] for rank in range(processes))
                for i, name in enumerate(FIELDS)}  # fmt: skip

    def line():
        found = counts()
        made = found["eager"] + found["in graphs"]
        before = held["counts"]["eager"] + held["counts"]["in graphs"]
        rate = (made - before) / max(elapsed(), 1e-9)
        return f"soak on {device}, {processes} processes: {made} calls ({rate:.0f} a second), " + ", ".join(
            f"{found[name]} {name}" for name in FIELDS
        )

    said = stopwatch()
    while any(process.is_alive() for process in running):
        time.sleep(0.1)
        if said() > 5:
            said = stopwatch()
            print(line(), flush=True)
    died = [f"{rank} ended with {process.exitcode}" for rank, process in enumerate(running) if process.exitcode]
    print(line(), *(f"process {what}" for what in died), sep="\n", flush=True)
    if state:
        following = [shared[rank * width] for rank in range(processes)]
        now = held | {"next": following, "counts": counts(), "seconds": held["seconds"] + elapsed()}
        state.write_text(json.dumps(now) + "\n")
    return int(bool(died) or counts()["wrong"] > held["counts"]["wrong"])
