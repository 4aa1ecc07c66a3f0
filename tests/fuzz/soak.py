"""One GPU shared by many processes: random calls of every op, eager and in CUDA graphs, whose inputs and weights are
written just before the call, by kernels and by copies, over memory that held infinities and NaNs.

A program is a drawn case with several variants of its values. Each variant's result is held against float64 once, in
float64 on the device; every later call of it must give the same bits. A stale read shows because the call before had
other values. Weights are those of a caller who vouches for nothing: `static_weights` is left at its default.

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

import minivllm
from fuzz import calls, cases
from fuzz.drawing import Case
from fuzz.layouts import Block
from fuzz.memory import OnTorch
from minivllm.testing.timing import stopwatch

VARIANTS = 3
EAGER = 24  # calls of a program outside of graphs
CAPTURED, REPLAYS = 6, 60  # calls in a graph, and how often it runs
FIELDS = ("programs", "eager", "in graphs", "refused", "wrong")
MOST_FAILURES = 20


def variants_of(case: Case) -> list[list[np.ndarray]]:
    """The images of the blocks with other values at the same places: those of each input, moved on by some elements."""
    written = {case.tensors[name] for name in case.outputs.values()}
    images = []
    for variant in range(VARIANTS):
        copies = [block.image.copy() for block in case.blocks]
        for spec in set(case.specs()):
            only_output = spec in written and "x" not in case.outputs.values()
            if not only_output and 0 not in spec.shape:
                values = spec.of(case.blocks[spec.block].image)
                spec.of(copies[spec.block])[...] = np.roll(values.copy(), 7 * variant)
        images.append(copies)
    return images


class Program:
    """A case on a device, with its variants, its expectations and its ways to write and to call."""

    def __init__(self, case: Case, device: str, rng: random.Random):
        self.case, self.device, self.rng = case, device, rng
        self.torch = TORCH_CUDA.torch
        self.memory = OnTorch(case.blocks, device)
        self.images = variants_of(case)
        self.masters = [[self.memory.copy(image) for image in images] for images in self.images]
        self.arguments = calls.prepare(case, self.memory)
        self.arguments.pop("static_weights", None)
        self.bad = self.torch.zeros((), dtype=self.torch.int64, device=device)
        self.layer = None
        self.prepacked = bool(case.options.get("prepack"))
        if case.op == "FusedRMSNormQKV" and (self.prepacked or rng.random() < 0.7):
            constant = {name: value for name, value in self.arguments.items() if name not in calls.LAYER_CALL}
            self.layer = minivllm.FusedRMSNormQKV(**constant)
        self.first: list = []

    def write(self, variant: int):
        """All that the call reads, by a kernel or by a copy."""
        for memory, master in zip(self.memory.memory, self.masters[variant]):
            way = self.rng.randrange(3)
            if way == 0:
                memory.copy_(master)
            elif way == 1:
                self.torch.bitwise_or(master, 0, out=memory)
            else:
                memory.fill_(0xFF)
                self.torch.bitwise_and(memory, master, out=memory)

    def call(self):
        """The results as tensors, whatever the op returns."""
        if self.prepacked:
            self.layer.refresh()
        if self.layer is not None:
            at_call = {name: self.arguments[name] for name in calls.LAYER_CALL if name in self.arguments}
            returned = self.layer(at_call.pop("x"), **at_call)
        else:
            returned = calls.call(self.case, self.arguments)
        return returned if isinstance(returned, tuple) else (returned,)

    def churn(self):
        """Memory that comes next from the allocator holds what would show."""
        for _ in range(self.rng.randint(0, 3)):
            elements = 1 << self.rng.randint(8, 20 if self.device == "cuda" else 14)
            value = self.rng.choice((float("inf"), float("-inf"), float("nan")))
            self.torch.full((elements,), value, device=self.device)

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def differs(self, results, variant: int):
        """Counts, on the device, what differs from the variant's first results in a bit."""
        for got, first in zip(results, self.first[variant]):
            bits = {4: self.torch.int32, 2: self.torch.int16}[got.element_size()]
            same = (got.contiguous().view(bits) == first.view(bits)) | ((got != got) & (first != first))
            self.bad += (~same).sum()

    def judge(self, variant: int, results):
        """The variant's results against float64, on the device."""
        judge, lead = calls.Judge(self.case, self.memory, self.masters[variant]), self.case.tensors["x"].shape[:-1]
        what = f"variant {variant}, first call, by {minivllm.last_kernel()}: "
        judge.check(calls.results_of(self.case, results, lead), what)

    def start(self):
        """The first call of each variant."""
        for variant in range(VARIANTS):
            self.churn()
            self.write(variant)
            results = self.call()
            self.first.append(tuple(part.clone().contiguous() for part in results))
            self.judge(variant, self.first[-1])

    def check(self, what: str):
        bad = int(self.bad)
        if bad:
            ran = minivllm.last_kernel()
            raise calls.Wrong(
                f"{what}: {bad} elements differ in a bit from the first call with the same values; ran {ran}"
            )

    def eager(self):
        for turn in range(EAGER):
            variant = turn % VARIANTS
            self.churn()
            if self.rng.random() < 0.3:
                self.synchronize()  # a launch after the host has waited comes early
            self.write(variant)
            self.differs(self.call(), variant)
        self.check("eager")

    def _captured(self):
        for turn in range(CAPTURED):
            self.write(turn % VARIANTS)
            self.differs(self.call(), turn % VARIANTS)

    def graphs(self):
        if self.device != "cuda":
            for _ in range(REPLAYS):
                self._captured()
            return self.check("loop")
        self.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            self._captured()
        for _ in range(REPLAYS):
            self.churn()
            if self.rng.random() < 0.3:
                self.synchronize()
            graph.replay()
        return self.check("graph")

    def finish(self):
        """The memory around the tensors, after the last call."""
        variant = (CAPTURED - 1) % VARIANTS
        images = [Block(image, block.at_end) for image, block in zip(self.images[variant], self.case.blocks)]
        calls.check_memory(self.case._replace(blocks=images), self.memory, self.case.outputs.values())


def draw(seed: int, index: int, device: str) -> Case:
    """A case that torch holds, and that must be served."""
    return cases.draw(seed, index, device, allowed=lambda case: case.fits_torch() and not case.refused)


def run(seed: int, index: int, device: str) -> dict:
    """The counts of one program; raises where something is wrong."""
    program = Program(draw(seed, index, device), device, random.Random((seed << 40) + index))
    try:
        program.start()
    except ValueError as error:
        if program.case.may_refuse and "cannot serve this call" in str(error):
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
