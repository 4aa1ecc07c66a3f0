"""A drawn case on a device, called many times with several variants of its values, eagerly and in CUDA graphs."""

import random

import late
import numpy as np
from frameworks import TORCH_CUDA

import minivllm
from fuzz import calls
from fuzz.drawing import Case, members, parameters
from fuzz.layouts import Block
from fuzz.memory import OnTorch

VARIANTS = 3
EAGER = 24  # calls of a program outside of graphs
CAPTURED, REPLAYS = 6, 60  # calls in a graph, and how often it runs


def variants_of(case: Case, kept: frozenset[str]) -> list[list[np.ndarray]]:
    """The images of the blocks with other values at the same places: those of each input that is not `kept`, moved on by
    some elements."""
    written = {case.tensors[name] for name in case.outputs.values()}
    moved = {spec for name, specs in case.tensors.items() if name not in kept for spec in members(specs)}
    images = []
    for variant in range(VARIANTS):
        copies = [block.image.copy() for block in case.blocks]
        for spec in moved:
            only_output = spec in written and "x" not in case.outputs.values()
            if not only_output and 0 not in spec.shape:
                values = spec.of(case.blocks[spec.block].image)
                spec.of(copies[spec.block])[...] = np.roll(values.copy(), 7 * variant)
        images.append(copies)
    return images


class Program:
    """A case on a device, with its variants, its expectations and its ways to write and to call."""

    PROMISES = ("static_weights",)  # the options by which a caller vouches that inputs are written by nothing in front

    def __init__(self, case: Case, device: str, rng: random.Random, *, vouches: bool, writes_late: float):
        """`vouches`: the inputs that the op's promises are about keep their values. `writes_late`: how often, of 1."""
        self.case, self.device, self.rng, self.vouches = case, device, rng, vouches
        self.torch = TORCH_CUDA.torch
        self.memory = OnTorch(case.blocks, device)
        self.images = variants_of(case, self.promised() if vouches else frozenset())
        self.masters = [[self.memory.copy(image) for image in images] for images in self.images]
        self.arguments = calls.prepare(case, self.memory)
        for name in set(self.PROMISES) & parameters(case.op):
            self.arguments[name] = vouches
        self.bad = self.torch.zeros((), dtype=self.torch.int64, device=device)
        self.layer = None
        self.prepacked = bool(case.options.get("prepack"))
        if case.op == "FusedRMSNormQKV":
            self.arguments["static_weights"] = None  # torch's counters tell
        if case.op == "FusedRMSNormQKV" and (self.prepacked or rng.random() < 0.7):
            constant = {name: value for name, value in self.arguments.items() if name not in calls.LAYER_CALL}
            self.layer = minivllm.FusedRMSNormQKV(**constant)
        self.first: list = []
        self.late = []
        counted = case.op == "FusedRMSNormQKV" and not vouches  # torch does not see that the late copy writes
        if writes_late and not counted and device == "cuda" and not late.why_not():
            self.late = [late.LateCopy(self.memory.memory, masters) for masters in self.masters]
        self.writes_late = writes_late

    def promised(self) -> frozenset[str]:
        """The inputs that `PROMISES` are about."""
        return frozenset(name for name in self.case.tensors if name.endswith("weight") or name == "bias")

    def write(self, variant: int):
        """All that the call reads, by a kernel or by a copy. What is promised keeps its bytes meanwhile."""
        if self.late and self.rng.random() < self.writes_late:
            return self.late[variant]()
        for memory, master in zip(self.memory.memory, self.masters[variant]):
            way = self.rng.randrange(2 if self.vouches else 3)
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
        calls.check_memory(self.case._replace(blocks=images), self.memory, self.written())

    def written(self):
        """The arguments that a call may write to."""
        return self.case.outputs.values()
