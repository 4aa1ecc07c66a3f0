"""The fuzzers: a short run of each; that they cover every op, argument and kernel; and that they find what is planted."""

import collections
import ctypes
import inspect
import math
import os
import re
import signal

import numpy as np
import pytest
from frameworks import TORCH_CPU
from fuzz import calls, campaign, cases, cpu, layouts, memory, objects, soak
from fuzz.drawing import DTYPES, members, parameters
from processes import run

import minivllm

SECONDS = 4  # of each; `make fuzz` takes longer


def test_every_op_has_a_draw():
    """Those of the registry, and whatever else the package exports that is no helper."""
    assert {row.op for row in minivllm.kernels()} <= set(cases.OPS) | cases.DRAWN_ELSEWHERE
    assert set(minivllm.__all__) - cases.NO_OPS - cases.DRAWN_ELSEWHERE == set(cases.OPS)


@pytest.mark.parametrize("op", cases.OPS)
def test_every_argument_is_drawn(op):
    drawn = set()
    for index in range(600):
        case = cases.draw(0, index, op=op)
        drawn |= set(case.tensors) | set(case.options)
    assert drawn == parameters(op)


def test_every_usable_kernel_is_forced():
    rows = [row for row in minivllm.kernels() if row.usable and row.op not in cases.DRAWN_ELSEWHERE]
    wanted = {(row.op, row.name) for row in rows if not row.isa.startswith("sm")}
    drawn = (cases.draw(1, index) for index in range(5000))
    assert wanted <= {(case.op, case.options["kernel"]) for case in drawn if "kernel" in case.options}


STEP = 64  # elements of hidden that a ring in a GPU's shared memory gets at a time
STEPS = 64  # more than any ring holds, and several times what most of them hold
TOKENS = (1, 16, 64, 300)  # the most that one kind of kernel is made for


@pytest.mark.parametrize("op", cases.OPS)
def test_draws_for_a_gpu_are_as_large_as_models(op, monkeypatch):
    """Every dtype with every number of tokens, in rows of many steps, and the weights as tensor cores take them."""
    monkeypatch.setattr(layouts.Layouts, "fill", lambda at, spec, kind=None: spec)  # the values take most of the time
    met = collections.Counter()
    for index in range(700):
        case = cases.draw(0, index, "cuda", op)
        *lead, hidden = case.tensors["x"].shape
        dtype, weights = case.tensors["x"].dtype, members(case.tensors.get(calls.matrix_of(case), ()))
        tidy = all(w.dtype == dtype and w.strides == (hidden, 1) for w in weights)
        if tidy and hidden % STEP == 0 and hidden >= STEP * STEPS and 0 < math.prod(lead) <= TOKENS[-1]:
            met[dtype, min(most for most in TOKENS if math.prod(lead) <= most)] += 1
    assert all(met[dtype, most] for dtype in DTYPES for most in TOKENS), met


@pytest.mark.parametrize("drawn_for", ["cpu", "cuda"])
def test_a_case_is_the_same_each_time(drawn_for):
    for index in range(20):
        first, second = cases.draw(3, index, drawn_for), cases.draw(3, index, drawn_for)
        assert str(first) == str(second)
        assert all(np.array_equal(a.image, b.image) for a, b in zip(first.blocks, second.blocks))


def fuzz(*arguments):
    return run(None, arguments=("-m", "fuzz", *map(str, arguments)), timeout=600)


@pytest.mark.parametrize("kind", ["cpu", "objects"])
def test_short_run(kind):
    if kind == "cpu" and (reason := cpu.why_not()):
        pytest.skip(reason)
    done = fuzz(kind, "--seconds", SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    cases_run, calls_made = map(int, re.findall(r"(\d+) cases, (\d+) calls", done.stdout)[-1])
    assert calls_made > cases_run > 20 * SECONDS


def test_one_case_alone_and_where_nothing_can_run():
    done = fuzz("cpu", "--only", "1:7")
    assert done.returncode == 0 and "1:7  " in done.stdout and "1 cases" in done.stdout
    done = fuzz("gpu", "--seconds", 1)
    assert done.returncode in (0, 2) and (done.returncode == 0 or "nothing ran" in done.stdout)


class Few:
    """A kind of a few cases, some of which fail."""

    @staticmethod
    def prepare():
        pass

    @staticmethod
    def describe(seed, index):
        return f"case {index}"

    @staticmethod
    def run(seed, index):
        if index == 3:
            raise calls.Wrong("three")
        if index == 5:
            raise calls.Stray("five")
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2, 1


def test_counts_add_up_over_runs_and_a_crash_is_one_failure(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(campaign, "BATCH", 6)
    state = tmp_path / "state"
    assert not campaign.Campaign(Few, 9, state, most=3).run(60.0)
    printed = capfd.readouterr().out
    for index, what in ((3, "three"), (5, "five"), (7, "SIGKILL")):
        assert re.search(rf"FAILED  python -m fuzz Few --only 9:{index}\ncase {index}\n(.*\n)*.*{what}", printed)
    resumed = campaign.Campaign(Few, 9, state, most=3)
    assert resumed.first == 8
    assert resumed.total() == {"cases": 8, "calls": 10, "refused": 5, "wrong": 1, "stray": 1, "crashed": 1}
    assert resumed.run(0.05)
    counts = resumed.total()
    assert counts["cases"] > 8 and counts["calls"] == 2 * (counts["cases"] - 3)
    with pytest.raises(SystemExit, match="Few with seed 9, not Few with 8"):
        campaign.Campaign(Few, 8, state)


# ---- what is planted -----------------------------------------------------------------------------------------------


def last_is_wrong(out, x, weight):
    out[..., -1] *= 1.25


def writes_behind_a_row(out, x, weight):
    width = out.shape[-1] * out.itemsize
    if out.ndim > 1 and out.shape[-2] > 1 and out.strides[-2] > width:
        ctypes.memset(out.ctypes.data + width, 0, 1)


def writes_x(out, x, weight):
    if x.flags.writeable and not np.may_share_memory(out, x):
        x[...] = 0


def writes_weight(out, x, weight):
    weight[0] = 3


def depends_on_the_call(out, x, weight):
    depends_on_the_call.calls += 1
    if depends_on_the_call.calls % 2:
        out[...] = np.nextafter(out.astype(np.float32), np.float32(0)).astype(out.dtype)


depends_on_the_call.calls = 0


@pytest.mark.parametrize(
    "bug,kind",
    [(last_is_wrong, calls.Wrong), (writes_behind_a_row, calls.Stray), (writes_x, calls.Stray),
     (writes_weight, calls.Stray), (depends_on_the_call, calls.Wrong)],
)  # fmt: skip
def test_a_bug_is_found(bug, kind, monkeypatch):
    if reason := cpu.why_not():
        pytest.skip(reason)
    honest = minivllm.rms_norm

    def wrong(x, weight, *arguments, **options):
        out = honest(x, weight, *arguments, **options)
        if x.size > 1 and weight is not None:
            bug(out, x, weight)
        return out

    wrong.__signature__ = inspect.signature(honest)
    monkeypatch.setattr(minivllm, "rms_norm", wrong)
    cpu.prepare()
    found = []
    for index in range(60):
        case = cases.draw(2, index, op="rms_norm")
        try:
            calls.run(case, memory.Guarded(case.blocks))
        except AssertionError as error:
            found.append(type(error))
    assert found.count(kind) >= 3, found


def test_a_write_past_the_end_dies():
    """The guard page: the process is gone, and the campaign has its index."""
    script = """
        import numpy as np
        from fuzz import cases, memory
        from fuzz.layouts import Layouts
        import random, ctypes
        at = Layouts(random.Random(1), ("normal",), False)
        spec = at.place((4, 8), "f32", (8, 1))
        block = at.blocks[0]._replace(at_end=True)
        placed = memory.Guarded([block])
        array = placed.tensor(spec._replace(offset=block.image.size // 4 - 32))
        array[...] = 1
        print("inside", flush=True)
        ctypes.memset(array.ctypes.data + array.nbytes, 0, 1)
        print("outside")
    """
    done = run(script)
    assert "inside" in done.stdout and "outside" not in done.stdout and done.returncode != 0


# ---- the soak, on CPU tensors ----------------------------------------------------------------------------------------


@pytest.fixture
def with_torch():
    if reason := TORCH_CPU.why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("op", range(len(soak.OPS)), ids=soak.OPS)
def test_soak_on_cpu_tensors(op, with_torch):
    made = [soak.run(1, index, "cpu") for index in range(op, 4 * len(soak.OPS), len(soak.OPS))]
    assert sum(counts.get("eager", 0) + counts.get("in graphs", 0) for counts in made) > 100


def test_soak_finds_stale_weights(with_torch, monkeypatch):
    """What a call would do that read its weights before they were written: those of the call before."""
    honest, held = minivllm.rms_norm, []

    def stale(x, weight, *arguments, **options):
        held.append(weight.clone())
        return honest(x, held[-2] if len(held) == 20 else weight, *arguments, **options)

    stale.__signature__ = inspect.signature(honest)
    monkeypatch.setattr(minivllm, "rms_norm", stale)
    with pytest.raises(calls.Wrong, match="differ in a bit from the first call"):
        for index in range(0, 50, len(soak.OPS)):
            held.clear()
            soak.run(2, index, "cpu")


# ---- hostile objects -----------------------------------------------------------------------------------------------


def test_every_attack_is_made():
    made = {(attack.what, attack.argument) for attack in (objects.Attack(4, index) for index in range(6000))}
    assert {what for what, _ in made} >= set(objects.TENSORS)
    every = set().union(*map(parameters, cases.OPS)) - {"kernel"}
    assert {argument for _, argument in made} >= every
