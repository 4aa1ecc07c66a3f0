"""greedy_tokens: every kernel against plain NumPy, over ties, NaN, infinities and layouts; what follows the choice; and
the same as torch computes."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from cases import CONTIGUOUS, LAYOUTS, PADDED, RAGGED, TRANSPOSED, UNALIGNED, Layout, Placed, random
from conftest import changed, short_dtype
from frameworks import FRAMEWORKS, need
from test_large import sparse_rows

import minivllm
from minivllm.testing.reference import round_to

STATE = ("finished", "history", "counts", "positions")  # what is brought up to date
KINDS = ("normal", "ties", "nan", "infinite", "zeros", "subnormal")


class Case(NamedTuple):
    lead: tuple = (3,)
    vocabulary: int = 1000
    kind: str = "normal"
    layout: Layout = CONTIGUOUS
    ends: bool = False  # finished, ends and pad
    length: int | None = None  # of history, with counts
    positions: bool = False
    out: bool = False
    one_buffer: bool = False  # numbers of a row lie beside each other, flags too


def to_numpy(tensor):
    """Integers and flags of any framework."""
    if hasattr(tensor, "cpu"):
        tensor = tensor.cpu()
    elif hasattr(tensor, "get"):
        tensor = tensor.get()
    return tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)


def draw_logits(case, dtype, *key):
    """Float64 values that dtype holds."""
    rng, shape = random("logits", *case[:3], *key), (*case.lead, case.vocabulary)
    if case.kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float64)
    if case.kind == "zeros":
        return rng.choice([0.0, -0.0], shape)
    if case.kind == "subnormal":
        return rng.integers(-2, 3, shape) * (2.0**-149 if dtype == "f32" else 2.0**-24 if dtype == "f16" else 2.0**-133)
    values = round_to(3 * rng.standard_normal(shape), dtype)
    if case.kind == "nan":
        values[rng.random(shape) < 0.002] = np.nan
        values[rng.random(shape) < 0.002] = np.inf
    if case.kind == "infinite":
        values[...] = np.where(rng.random(shape) < 0.001, values, -np.inf)
    return values


def largest(logits):
    """By the rule itself: of equal logits the first, and NaN in front of all."""
    found = np.zeros(logits.shape[:-1], np.int64)
    for row in np.ndindex(found.shape):
        values = logits[row]
        is_nan = np.isnan(values)
        most = is_nan if is_nan.any() else values == values.max()
        found[row] = np.flatnonzero(most)[0]
    return found


def expected(logits, state, ends, pad):
    """(out, the state after the call)"""
    out, state = largest(logits), {name: value.copy() for name, value in state.items()}
    if "finished" in state:
        out = np.where(state["finished"], pad, out)
        inside = (out >= 0) & (out < len(ends))
        state["finished"] |= inside & ends[np.where(inside, out, 0)]
    if "counts" in state:
        for row in np.ndindex(out.shape):
            if 0 <= state["counts"][row] < state["history"].shape[-1]:
                state["history"][row][state["counts"][row]] = out[row]
        state["counts"] += 1
    if "positions" in state:
        state["positions"] += 1
    return out, state


def draw_state(case, *key):
    """(the state, ends, pad) of a case, in NumPy."""
    rng, state, ends, pad = random("state", *case[:3], *key), {}, None, None
    if case.ends:
        state["finished"] = rng.random(case.lead) < 0.3
        ends, pad = rng.random(case.vocabulary) < 0.4, int(rng.choice([-1, 0, case.vocabulary - 1, case.vocabulary]))
    if case.length is not None:
        state["history"] = rng.integers(-9, 0, (*case.lead, case.length))
        state["counts"] = rng.integers(-1, case.length + 2, case.lead)
    if case.positions:
        state["positions"] = rng.integers(-1, 2**40, case.lead)
    return state, ends, pad


def placed(framework, case, values):
    """In memory with something between the numbers, where the case says so."""
    make = framework.flags if values.dtype == np.bool_ else lambda v: framework.integers(v, True)
    if not case.one_buffer or values.ndim == 0:
        return make(values), None
    wide = np.full((*values.shape, 3), values.dtype == np.bool_ or -7, values.dtype)
    wide[..., 1] = values
    buffer = make(wide)
    return buffer[..., 1], buffer


def check(framework, case, dtype, kernel=None, *key):
    logits = draw_logits(case, dtype, *key)
    state, ends, pad = draw_state(case, *key)
    wanted, after = expected(logits, state, ends, pad)
    tensor = Placed(framework, logits.shape, dtype, case.layout, logits)
    given, buffers = {}, {}
    for name, values in state.items():
        single = name == "history"  # whose rows are contiguous
        given[name], buffers[name] = placed(framework, case._replace(one_buffer=case.one_buffer and not single), values)
    options = {"kernel": kernel}
    if case.ends:
        options |= {"ends": framework.flags(ends), "pad": framework.integers([pad] if case.length else pad, True)}
    if case.out:
        options["out"] = framework.integers(np.full(case.lead, -3), True)
    got = minivllm.greedy_tokens(tensor.tensor, **given, **options)
    framework.synchronize()
    assert not case.out or got is options["out"]
    assert framework.is_mine(got) and tuple(got.shape) == case.lead
    np.testing.assert_array_equal(to_numpy(got), wanted)
    assert to_numpy(got).dtype == np.int64
    for name, values in after.items():
        np.testing.assert_array_equal(to_numpy(given[name]), values, err_msg=name)
        if buffers[name] is not None:
            around = to_numpy(buffers[name])[..., ::2]
            assert (around == (True if name == "finished" else -7)).all(), f"around {name}"
    tensor.check_canaries("logits")


CASES = (
    Case(),
    Case((), 7),
    Case((1,), 1),
    Case((2,), 2, "ties"),
    Case((4,), 151936),
    Case((1,), 151936, "infinite", ends=True, length=9, positions=True),
    Case((5,), 33, "ties", UNALIGNED),
    Case((5,), 513, "nan", RAGGED, ends=True),
    Case((6,), 5000, "nan", PADDED, ends=True, length=3, positions=True, out=True),
    Case((2, 3), 777, "ties", TRANSPOSED, ends=True, length=1, positions=True, one_buffer=True),
    Case((2, 3, 4), 70, "ties", TRANSPOSED, ends=True, length=5, positions=True),
    Case((3, 2, 2), 300, "normal", PADDED, length=0, one_buffer=True),
    Case((70,), 1100, "infinite", length=4, out=True),
    Case((3,), 4097, "zeros", positions=True),
    Case((300,), 17, "subnormal", RAGGED, ends=True, one_buffer=True),
)


@pytest.mark.sanitize
@pytest.mark.rows("greedy_tokens")
@pytest.mark.parametrize("case", CASES, ids=changed)
def test_every_kernel(kernel, framework, case):
    check(framework, case, short_dtype(kernel.dtype), kernel.name)


@pytest.mark.rows("greedy_tokens")
def test_kinds_and_lengths(kernel, framework):
    for kind, vocabulary in itertools.product(KINDS, (1, 3, 8, 31, 64, 511, 512, 1025, 2048, 3001)):
        check(framework, Case((2,), vocabulary, kind), short_dtype(kernel.dtype), kernel.name)


@pytest.mark.rows("greedy_tokens")
@pytest.mark.parametrize("vocabulary", [9, 1500])
def test_ties_and_nan_at_every_place(kernel, framework, vocabulary):
    """A row for each place of the first of two: of equal logits, of NaN, and of NaN behind infinity. The long rows
    take some of the places."""
    places = np.array([(i, j) for i in range(vocabulary) for j in range(i + 1, vocabulary)])
    places = places[:: max(1, len(places) // 1000)]
    rows = np.arange(len(places))
    for first, second, in_front in (
        (5.0, 5.0, True),
        (np.nan, np.nan, True),
        (np.inf, np.nan, False),
        (0.0, -0.0, True),
    ):
        logits = np.full((len(places), vocabulary), -1.0)
        logits[rows, places[:, 0]], logits[rows, places[:, 1]] = first, second
        tensor = framework.tensor(logits, short_dtype(kernel.dtype))
        got = minivllm.greedy_tokens(tensor, kernel=kernel.name)
        np.testing.assert_array_equal(to_numpy(got), places[:, 0 if in_front else 1])


def drawn(index):
    rng = random("drawn", index)
    choose = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    vocabulary = choose(int(rng.integers(1, 70)), int(rng.integers(400, 1200)), int(rng.integers(1200, 9000)))
    lead = tuple(int(rng.integers(1, 5)) for _ in range(choose(0, 1, 1, 1, 2, 3)))
    return Case(lead, vocabulary, choose(*KINDS), choose(*LAYOUTS) if lead else CONTIGUOUS, bool(rng.random() < 0.5),
                choose(None, 0, 1, 6), bool(rng.random() < 0.5), bool(rng.random() < 0.3), bool(rng.random() < 0.3))  # fmt: skip


@pytest.mark.rows("greedy_tokens")
def test_drawn_cases(kernel, framework):
    for index in range(80):
        check(framework, drawn(index), short_dtype(kernel.dtype), kernel.name, index)


@pytest.mark.rows("greedy_tokens")
def test_rows_far_apart(kernel, framework):
    """More than 2^31 elements between two rows."""
    if framework.device == "cuda":
        kind = framework.dtype(short_dtype(kernel.dtype))
        logits = framework.torch.empty_strided((2, 100), (2**31 + 64, 1), dtype=kind, device="cuda").normal_()
        assert minivllm.greedy_tokens(logits, kernel=kernel.name).equal(logits.argmax(-1))
        return
    dtype = framework.dtype(short_dtype(kernel.dtype))
    logits = sparse_rows(3, 100, dtype.itemsize, dtype)
    logits[...] = random("far").standard_normal((3, 100))
    assert (minivllm.greedy_tokens(logits, kernel=kernel.name) == logits.astype(np.float64).argmax(-1)).all()


@pytest.mark.parametrize("lead", [(0,), (0, 4), (2, 0)])
def test_no_rows(device, framework, lead):
    """Nothing to choose, and nothing else happens."""
    given = {name: framework.integers(np.zeros(lead), True) for name in ("counts", "positions")}
    history, finished = framework.integers(np.zeros((*lead, 3)), True), framework.flags(np.zeros(lead))
    ends, pad = framework.flags([True] * 5), framework.integers(0, True)
    logits = framework.full((*lead, 5), 1.0, "f32")
    got = minivllm.greedy_tokens(logits, finished=finished, ends=ends, pad=pad, history=history, **given)
    assert tuple(got.shape) == lead and to_numpy(got).dtype == np.int64


def test_steps_until_all_is_full(device, framework):
    """A text that ends, one that goes on, and a history that is too short for it."""
    vocabulary, length = 50, 4
    state = {"finished": np.array([False, False]), "history": np.zeros((2, length), np.int64)}
    state |= {"counts": np.zeros(2, np.int64), "positions": np.array([7, 3])}
    ends, pad, rng = np.arange(vocabulary) == 11, 11, random("steps")
    given = {
        name: framework.flags(x) if x.dtype == np.bool_ else framework.integers(x, True) for name, x in state.items()
    }
    fixed = {"ends": framework.flags(ends), "pad": framework.integers(pad, True)}
    for step in range(6):
        logits = rng.standard_normal((2, vocabulary)).astype(np.float32)
        logits[0, 11] += 100 * (step == 1)
        logits[1, 11] = -100
        wanted, state = expected(logits, state, ends, pad)
        got = minivllm.greedy_tokens(framework.tensor(logits, "f32"), **given, **fixed)
        assert (to_numpy(got) == wanted).all() and (to_numpy(got)[0] == 11) == (step >= 1)
        for name, values in state.items():
            assert (to_numpy(given[name]) == values).all(), name
    assert to_numpy(given["counts"]).tolist() == [6, 6] and to_numpy(given["positions"]).tolist() == [13, 9]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks(framework):
    """The result is the framework's own, int64 where it has that."""
    need(framework, "f32")
    logits = random("frameworks").standard_normal((3, 200))
    logits[1, 7] = logits[1, 90] = 9.0
    if framework.name == "jax":
        jax = pytest.importorskip("jax")
        with jax.enable_x64():
            got = minivllm.greedy_tokens(framework.tensor(logits, "f32"))
            assert got.dtype == np.int64
    else:
        got = minivllm.greedy_tokens(framework.tensor(logits, "f32"))
        state = {
            "counts": framework.integers(np.array([0, 1, 2]), True),
            "history": framework.integers(np.zeros((3, 2)), True),
        }
        flags = {"finished": framework.flags([True, False, False]), "ends": framework.flags([False] * 200)}
        again = minivllm.greedy_tokens(
            framework.tensor(logits, "f32"), pad=framework.integers([5], True), **state, **flags
        )
        assert to_numpy(again).tolist() == [5, 7, int(logits[2].argmax())]
        assert to_numpy(state["history"]).tolist() == [[5, 0], [0, 7], [0, 0]]
    assert framework.is_mine(got) and to_numpy(got).tolist() == logits.astype(np.float32).argmax(-1).tolist()


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_arguments(torch, device="cpu", batch=3, vocabulary=400, dtype="float32"):
    torch.manual_seed(batch)
    counters = torch.arange(2 * batch, device=device)
    return {
        "logits": torch.randn(batch, vocabulary, device=device).to(getattr(torch, dtype)),
        "finished": torch.arange(batch, device=device) % 3 == 2,
        "ends": torch.arange(vocabulary, device=device) % 2 == 0,
        "pad": torch.tensor([vocabulary - 1], device=device),
        "history": torch.zeros(batch, batch + 1, dtype=torch.int64, device=device),
        "counts": counters[:batch],
        "positions": counters[batch:],
    }


def in_torch(torch, logits, finished, ends, pad, history, counts, positions):
    """The expressions that the op takes the place of."""
    tokens = torch.where(finished, pad, logits.argmax(-1))
    finished |= ends[tokens]
    history.scatter_(1, counts[:, None], tokens[:, None])
    counts += 1
    positions += 1
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_as_in_torch(device, torch, dtype, batch):
    given = torch_arguments(torch, device, batch, 3000, dtype)
    given["logits"][0, 5], given["logits"][-1, 2000:2002] = float("inf"), float("nan")
    copies = {name: x.clone() for name, x in given.items()}
    assert minivllm.greedy_tokens(**given).equal(in_torch(torch, **copies))
    for name, x in given.items():
        assert torch.equal(x.nan_to_num(), copies[name].nan_to_num()), name


def test_torch_knows_what_is_written(device, torch):
    given = torch_arguments(torch, device)
    out = torch.zeros(3, dtype=torch.int64, device=device)
    before = {name: x._version for name, x in (given | {"out": out}).items()}
    minivllm.greedy_tokens(**given, out=out)
    changed_ones = {name for name, x in (given | {"out": out}).items() if x._version != before[name]}
    assert changed_ones == {*STATE, "out"}


def test_no_gradients(torch):
    """As torch.argmax: of logits that require grad, without one."""
    logits = torch.randn(3, 40, requires_grad=True)
    tokens = minivllm.greedy_tokens(logits)
    assert tokens.equal(logits.argmax(-1)) and not tokens.requires_grad


@pytest.mark.parametrize("state", [False, True])
def test_compiled(device, torch, state):
    given = torch_arguments(torch, device)
    given["counts"], given["positions"] = given["counts"].clone(), given["positions"].clone()
    if not state:
        given = {"logits": given["logits"]}
    copies = {name: x.clone() for name, x in given.items()}
    torch.compiler.reset()
    got = torch.compile(lambda given: minivllm.greedy_tokens(**given) + 0, fullgraph=True)(given)
    assert got.equal(minivllm.greedy_tokens(**copies))
    for name, x in given.items():
        assert torch.equal(x, copies[name]), name


def test_without_memory(torch):
    """On the meta device, and while it is traced: the shape and the dtype, and what is refused."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        given = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in torch_arguments(torch).items()}
        fake = minivllm.greedy_tokens(**given)
    for tokens in (fake, minivllm.greedy_tokens(torch.empty(3, 40, device="meta"))):
        assert tokens.shape == (3,) and tokens.dtype == torch.int64
    with pytest.raises(ValueError, match=r"greedy_tokens: counts has shape \[2\], expected \[3\]"):
        minivllm.greedy_tokens(
            torch.empty(3, 40, device="meta"), counts=torch.empty(2, dtype=torch.int64, device="meta"),
            history=torch.empty(3, 2, dtype=torch.int64, device="meta"))  # fmt: skip
    with pytest.raises(TypeError, match=r"finished has dtype torch.float32, expected bool"):
        minivllm.greedy_tokens(torch.empty(3, 40, device="meta"), finished=torch.empty(3, device="meta"))


def test_vmap(torch):
    logits = torch.randn(4, 3, 40)
    assert torch.vmap(minivllm.greedy_tokens)(logits).equal(logits.argmax(-1))


@pytest.mark.gpu
def test_in_a_graph(cuda_torch):
    """Captured once, replayed with other logits: as eager calls on copies, and as torch."""
    torch = cuda_torch
    given = torch_arguments(torch, "cuda", 4, 151936, "bfloat16")
    given["history"] = torch.zeros(4, 40, dtype=torch.int64, device="cuda")
    minivllm.greedy_tokens(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = minivllm.greedy_tokens(**given)
    for seed in range(20):
        torch.manual_seed(seed)
        given["logits"].copy_(torch.randn(4, 151936, device="cuda"))
        copies = {name: x.clone() for name, x in given.items()}
        graph.replay()
        assert tokens.equal(in_torch(torch, **copies))
        for name, x in given.items():
            assert torch.equal(x, copies[name]), name


# ---- JAX ------------------------------------------------------------------------------------------------------------


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    case = Case((4,), 500, "ties", ends=True, length=3, positions=True)
    logits = draw_logits(case, "f32").astype(np.float32)
    state, ends, _ = draw_state(case)
    with pytest.raises(
        RuntimeError, match="greedy_tokens: tokens are int64, which JAX has only after .*jax_enable_x64"
    ):
        ops.greedy_tokens(logits)
    with jax.enable_x64():
        wanted, after = expected(logits, state, ends, 3)
        for call in (ops.greedy_tokens, jax.jit(ops.greedy_tokens)):
            out, *rest = call(jax.numpy.asarray(logits), ends=ends, pad=np.int64(3)[None], **state)
            assert out.dtype == np.int64 and out.tolist() == wanted.tolist() and len(rest) == len(STATE)
            for name, got in zip(STATE, rest):
                assert np.asarray(got).tolist() == after[name].tolist(), name
        alone = ops.greedy_tokens(jax.numpy.asarray(logits))
        assert alone.tolist() == largest(logits).tolist()
        stacked = jax.vmap(ops.greedy_tokens)(jax.numpy.stack([logits, -logits]))
        assert stacked.tolist() == [largest(logits).tolist(), largest(-logits).tolist()]

        def loss(x):
            return (x[0] * ops.greedy_tokens(x)[0]).sum()

        gradient = jax.grad(loss)(jax.numpy.asarray(logits))
        assert (np.asarray(gradient[0]) == wanted_first(logits)).all() and not np.asarray(gradient[1:]).any()


def wanted_first(logits):
    return largest(logits)[0]


# ---- what is refused ------------------------------------------------------------------------------------------------


def arguments(**changes):
    arrays = {
        "logits": np.zeros((2, 3, 8), np.float32), "finished": np.zeros((2, 3), np.bool_), "ends": np.zeros(8, np.bool_),
        "pad": np.int64(0)[None], "history": np.zeros((2, 3, 5), np.int64), "counts": np.zeros((2, 3), np.int64),
        "positions": np.zeros((2, 3), np.int64), "out": np.zeros((2, 3), np.int64),
    }  # fmt: skip
    return arrays | changes


SHARED = np.zeros((2, 3, 6), np.int64)
LENT = np.zeros(8 * 4 * 6, np.uint8)
REFUSED = [
    ({"logits": np.float32(1)}, (TypeError, ValueError), r"logits "),
    ({"logits": np.zeros((2, 3, 0), np.float32)}, ValueError, r"logits has shape .*, expected \[\.\.\., vocabulary\]"),
    ({"logits": np.zeros((2, 3, 8))}, TypeError, r"logits has dtype float64, expected float32, float16 or bfloat16"),
    ({"logits": np.zeros((2, 3, 8), np.int64)}, TypeError, r"logits has dtype int64, expected float32"),
    ({"logits": np.zeros((2, 3, 16), np.float32)[..., ::2]}, ValueError, r"logits must be contiguous in its last dim"),
    ({"finished": np.zeros((2, 3), np.int64)}, TypeError, r"finished has dtype int64, expected bool; convert it"),
    ({"finished": np.zeros((2, 3), np.uint8)}, TypeError, r"finished has dtype uint8, expected bool; convert it"),
    ({"finished": np.zeros(3, np.bool_)}, ValueError, r"finished has shape \[3\], expected \[2, 3\] \(one for each row"),
    ({"finished": None}, ValueError, r"pad was given without finished; pass both"),
    ({"ends": None}, ValueError, r"pad was given without ends"),
    ({"pad": None}, ValueError, r"ends was given without pad"),
    ({"ends": np.zeros(7, np.bool_)}, ValueError, r"ends has shape \[7\], expected \[8\] \(does a token"),
    ({"ends": np.zeros(16, np.bool_)[::2]}, ValueError, r"ends must be contiguous"),
    ({"ends": np.zeros(8)}, TypeError, r"ends has dtype float64, expected bool"),
    ({"pad": np.zeros(1, np.int32)}, TypeError, r"pad is int32, expected int64; convert it"),
    ({"pad": np.zeros(2, np.int64)}, ValueError, r"pad has shape \[2\], expected \[\] or \[1\]"),
    ({"pad": 3}, TypeError, r"pad must be a tensor"),
    ({"history": None}, ValueError, r"counts was given without history"),
    ({"counts": None}, ValueError, r"history was given without counts"),
    ({"history": np.zeros((2, 5), np.int64)}, ValueError, r"history has shape .*, expected \[2, 3\] and a length"),
    ({"history": np.zeros((2, 3, 5), np.int32)}, TypeError, r"history is int32, expected int64"),
    ({"history": np.zeros((2, 3, 10), np.int64)[..., ::2]}, ValueError, r"history must be contiguous in its last"),
    ({"counts": np.zeros(1, np.int64)}, ValueError, r"counts has shape \[1\], expected \[2, 3\]"),
    ({"positions": np.zeros((2, 3), np.int32)}, TypeError, r"positions is int32, expected int64"),
    ({"positions": np.zeros((2, 3), np.float32)}, TypeError, r"positions has dtype float32, expected int32 or int64"),
    ({"positions": np.broadcast_to(np.int64(0), (2, 3))}, ValueError, r"positions is read-only"),
    ({"out": np.zeros((2, 3, 1), np.int64)}, ValueError, r"out has shape \[2, 3, 1\], expected \[2, 3\]"),
    ({"out": np.zeros((2, 3), np.int32)}, TypeError, r"out is int32, expected int64"),
    ({"out": np.zeros((2, 3), np.float32)}, TypeError, r"out has dtype float32, expected int32 or int64"),
    ({"counts": SHARED[..., 0], "positions": SHARED[..., 0]}, ValueError, r"positions overlaps counts; pass memory"),
    ({"counts": SHARED[..., 3], "history": SHARED[..., :5]}, ValueError, r"counts overlaps history"),
    ({"out": SHARED[..., 3], "history": SHARED[..., :5]}, ValueError, r"history overlaps out"),
    ({"out": LENT[:48].view(np.int64).reshape(2, 3), "logits": LENT.view(np.float32).reshape(2, 3, 8)}, ValueError,
     r"out overlaps logits"),
    ({"kernel": "nope"}, ValueError, r"kernel"),
]  # fmt: skip


@pytest.mark.parametrize("changes, exception, message", REFUSED)
def test_refused(changes, exception, message):
    with pytest.raises(exception, match=f"^greedy_tokens: .*{message}"):
        minivllm.greedy_tokens(**arguments(**changes))


def test_beside_each_other():
    """Numbers of one buffer that no two arguments share."""
    minivllm.greedy_tokens(**arguments(counts=SHARED[..., 5], history=SHARED[..., :5]))


def test_a_vocabulary_that_no_index_holds():
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1, 2**31), (0, 0))
    with pytest.raises(ValueError, match=r"greedy_tokens: logits has shape .*, expected fewer than 2\^31 tokens"):
        minivllm.greedy_tokens(logits)
