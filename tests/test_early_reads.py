"""No kernel of a GPU reads before its wait what the kernel in front may still write: every kernel of every op, forced,
behind a writer that lets it begin before anything is written. By default that is everything the call reads; where the
caller vouches for weights or cached rows, these keep their values and all the rest is written late."""

import random
import zlib

import late
import pytest
from conftest import short_dtype
from frameworks import TORCH_CUDA
from fuzz import attention, cases
from fuzz.drawing import parameters
from fuzz.program import Program

import minivllm

DRAWS = 200  # of calls, at most
PROGRAMS = 4  # calls that the kernel serves, of those
TURNS, REPLAYS = 6, 20
DRAWN = tuple(op for op in (*cases.OPS, attention.OP) if "kernel" in parameters(op))  # the others share their kernels
ROWS = [
    pytest.param(op, row, id=f"{op}-{row.name}")
    for op in (*DRAWN, "qk_norm_rope", "greedy_tokens")
    for row in minivllm.kernels()
    if row.op == op and row.isa.startswith("sm")
]
# Why a kernel serves no call of an op at all.
NEVER = (
    "it multiplies normalised rows only",
    "it does not multiply up by the activation of the gate",
    "it adds no residual to its outputs",
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def writes_late():
    if reason := late.why_not():
        pytest.skip(f"writes late: {reason}")


def draw(op: str, row, index: int):
    """A call that this kernel may serve, or None."""
    seed = zlib.crc32(f"{op} {row.name}".encode())
    if op == attention.OP:
        case, of = attention.draw(seed, index, "cuda"), "q"
    else:
        allowed = lambda case: case.fits_torch() and not case.refused  # noqa: E731
        case, of = cases.draw(seed, index, "cuda", op, allowed), "x"
    options = {name: value for name, value in case.options.items() if name not in ("batch_invariant", "prepack")}
    if case.tensors[of].dtype != short_dtype(row.dtype):
        return None
    return case._replace(options=options | {"kernel": row.name})


def programs(op: str, row):
    """What this kernel serves of the calls drawn, each begun; every second one vouches. Skips the test where it can
    serve none."""
    kind, vouches = (attention.Attention if op == attention.OP else Program), False
    for case in (draw(op, row, index) for index in range(DRAWS)):
        if case is not None:
            program = kind(case, "cuda", random.Random(case.name), vouches=vouches, writes_late=1)
            try:
                program.start()
            except ValueError as error:
                assert f"kernel '{row.name}' cannot serve this call" in str(error), error
                if any(reason in str(error) for reason in NEVER):
                    pytest.skip(str(error))
                continue
            vouches = not vouches
            yield program


class OfTensors:
    """A call whose inputs are a few tensors, each with one value for each variant; it may write them."""

    def __init__(self, call, *inputs):
        torch = TORCH_CUDA.torch
        self.call, self.memory = call, [torch.empty_like(values[0]) for values in inputs]
        self.late = [late.LateCopy(self.memory, list(variant)) for variant in zip(*inputs)]
        self.bad = torch.zeros((), dtype=torch.int64, device="cuda")
        self.first = []
        for write in self.late:
            write()
            torch.cuda.synchronize()
            self.first.append([result.clone() for result in self.results()])

    def results(self):
        return [*self.call(*self.memory), *self.memory]

    def eager(self):
        for turn in range(TURNS):
            self.late[turn % len(self.late)]()
            for got, first in zip(self.results(), self.first[turn % len(self.late)]):
                self.bad += (got != first).sum()

    def graphs(self):
        torch = TORCH_CUDA.torch
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.eager()
        for _ in range(REPLAYS):
            graph.replay()

    def finish(self):
        assert int(self.bad) == 0


def few_tensors(op: str, row):
    """Programs of the ops that no fuzzer draws for a GPU."""
    torch = TORCH_CUDA.torch
    dtype = getattr(torch, row.dtype)

    def drawn(*shape):
        return [torch.randn(*shape, device="cuda").to(dtype) for _ in range(3)]

    def integers(low, high, *shape):
        return [torch.randint(low, high, shape, device="cuda") for _ in range(3)]

    for rows, vocabulary in ((1, 151936), (3, 1000), (70, 5000)) if op == "greedy_tokens" else ():

        def choose(logits, finished, history, counts, positions, ends):
            state = {"finished": finished, "history": history, "counts": counts, "positions": positions}
            return [minivllm.greedy_tokens(logits, **state, ends=ends, pad=pad, kernel=row.name)]

        flags = [[given < 1 for given in integers(0, 3, size)] for size in (rows, vocabulary)]
        pad = torch.zeros((), dtype=torch.int64, device="cuda")
        counts, positions = integers(0, 9, rows), integers(0, 99, rows)
        yield OfTensors(choose, drawn(rows, vocabulary), flags[0], integers(0, 9, rows, 9), counts, positions, flags[1])
    shapes = (1, 16, 8, 128), (7, 4, 4, 64), (300, 6, 2, 96)
    for tokens, heads, kv_heads, dim in shapes if op == "qk_norm_rope" else ():

        def norm_and_rotate(packed, cos, sin, weights, caches, slots):
            q, k, v = packed.split([heads, kv_heads, kv_heads], 1)  # noqa: B023 -- called in this round alone
            options = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "v": v, "slots": slots}
            options |= {"key_cache": caches[0], "value_cache": caches[1], "kernel": row.name}
            return minivllm.qk_norm_rope(q, k, cos, sin, **options)

        slots = [torch.randperm(400, device="cuda")[:tokens] for _ in range(3)]
        inputs = (tokens, heads + 2 * kv_heads, dim), (tokens, dim), (tokens, dim), (2, dim), (2, 400, kv_heads, 1, dim)
        yield OfTensors(norm_and_rotate, *(drawn(*shape) for shape in inputs), slots)


@pytest.mark.parametrize("op,row", ROWS)
def test_every_kernel(op, row):
    if not row.usable:
        pytest.skip(f"{row.name}: {row.why_not}")
    ran = 0
    for program in (programs if op in DRAWN else few_tensors)(op, row):
        program.eager()
        program.graphs()
        program.finish()
        ran += 1
        if ran == PROGRAMS:
            break
    assert ran, "none of the calls drawn fits this kernel"
