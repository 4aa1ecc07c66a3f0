"""The regret of the dispatch: the rule, the points, what is measured of one on the CPU, and the doctor's short look."""

import functools
import json
import re
import statistics

import numpy as np
import pytest
from processes import PACKAGE, ROOT, run

import minivllm
from minivllm.testing import points, regret
from minivllm.testing.points import Point
from minivllm.testing.timing import Failed, cpu_cache_bytes

POINT = Point("rms_norm_qkv", "qwen2.5-0.5b", 2, "f32")
SMALL_CACHE = 1 << 20


@pytest.mark.parametrize("pairs,expected", [
    ([], 1.0),
    ([(2.0, 1.0)] * 5, 2.0),
    ([(1.0, 2.0)] * 5, 1.0),
    ([(1.0, 1.0)] * 5, 1.0),
    ([(1.2, 1.0), (1.3, 1.0), (0.9, 1.0), (1.1, 1.0), (1.4, 1.0)], 1.2),  # four of five
    ([(1.2, 1.0), (1.3, 1.0), (0.9, 1.0), (1.0, 1.0), (1.4, 1.0)], 1.0),  # three of five
])  # fmt: skip
def test_a_gap_counts_where_it_repeats(pairs, expected):
    assert regret.regret(pairs) == pytest.approx(expected)


def test_pairs_of_equal_rows_seldom_count():
    noise = np.random.default_rng(0).normal(10, 1, (2000, 5, 2)).tolist()
    counted = [regret.regret(pairs) > 1 for pairs in noise]
    assert 0.15 < statistics.mean(counted) < 0.20


@pytest.mark.parametrize("why,us", [
    ("tokens=3 hidden=8: cheapest that fits, estimated 12.50 us", 12.5),
    ("tokens=3 hidden=8: forced by name, estimated 0.40 us", 0.4),
    ("tokens=3 hidden=8: forced by name", None),
])  # fmt: skip
def test_the_estimate_of_a_call(why, us):
    assert regret.estimate_us(why) == us


def test_the_cheapest_of_some_rows():
    assert regret.cheapest({"a": 3.0, "b": 2.0, "c": 2.0}) == "b"
    with pytest.raises(RuntimeError, match="estimated at"):
        regret.cheapest({"a": 3.0, "b": None})


def test_the_figures():
    found = regret.figures([1.0, 1.0, 1.05, 1.21])
    assert (found.points, found.worst, found.over_2_percent, found.over_10_percent) == (4, 1.21, 0.5, 0.25)
    assert found.mean == pytest.approx((1.05 * 1.21) ** 0.25)


def test_every_op_with_kernels_has_points():
    """A new op needs its line in minivllm/testing/points.py."""
    assert set(points.OPS) == {kernel.op for kernel in minivllm.kernels()}


@pytest.mark.parametrize("op", points.OPS)
def test_the_calls_of_an_op(op):
    """Each has arguments that the op takes, whole and in part. A token of decode_attention is as many as its heads."""
    found = points.grid("cpu", ["f32"], [4], ops=[op], contexts=[512])
    calls = points.Calls(min(found, key=lambda p: points.bytes_of(points.arguments(p).values(), "f32")), "cpu", 1)
    rows = {}
    for tokens, call in ((4, calls), (1, functools.partial(calls.part, 1))):
        call()
        ran = minivllm.last_kernel()
        rows[tokens] = int(re.match(r"tokens=(\d+) ", ran.why)[1])
        assert ran.op == op
    assert rows[4] == 4 * rows[1] and (rows[1] == 1 or op == "decode_attention")


def test_the_grid_is_the_same_for_a_seed_and_even():
    grid = points.grid("cpu", ["bf16", "f32"], [1, 16])
    assert grid == points.grid("cpu", ["bf16", "f32"], [1, 16]) and len(set(grid)) == len(grid)
    assert grid != points.grid("cpu", ["bf16", "f32"], [1, 16], seed=1)
    groups = [(op, dtype) for op in points.OPS for dtype in ("bf16", "f32")]
    assert {(point.op, point.dtype) for point in grid[: len(groups)]} == set(groups)


def test_the_outcome_of_a_point():
    found = regret.measure(POINT, "cpu", SMALL_CACHE, seconds=0.001)
    assert found.chosen in found.rows and found.best in found.rows
    assert set(found.rows) == set(regret.rows_of(POINT, "cpu")), "every row that runs here can serve the call"
    assert found.rows[found.chosen].estimate_us > 0
    timed = {name: row.timing.us for name, row in found.rows.items() if not isinstance(row.timing, Failed)}
    assert found.best == min(timed, key=timed.__getitem__)
    assert found.regret == regret.regret(found.pairs) and len(found.pairs) in (0, regret.PAIRS)
    assert POINT.op in regret.line(found) and found.chosen in regret.line(found)


def test_a_row_that_is_too_slow_is_found_out_with_few_tokens():
    calls = points.Calls(Point("rms_norm_qkv", "qwen2.5-0.5b", 64, "f32"), "cpu", SMALL_CACHE)
    assert regret.look(calls, "f32_decode_portable", 1e-3).endswith("us for 1 tokens")
    estimate, us = regret.look(calls, "f32_decode_portable", 1e12)
    assert us > 0 and (estimate is None or estimate > 0)


def test_rows_of_some_instruction_sets():
    """The one with the least estimate counts as chosen."""
    isas = [kernel.isa for kernel in minivllm.kernels(POINT.op) if kernel.usable and not kernel.isa.startswith("sm")]
    names = regret.rows_of(POINT, "cpu", isas[-1:])
    assert names and all(name.endswith(isas[-1]) for name in names)
    found = regret.measure(POINT, "cpu", SMALL_CACHE, isas=isas[-1:], seconds=0.001)
    assert set(found.rows) == set(names)
    assert found.chosen == min(found.rows.values(), key=lambda row: row.estimate_us).name


def test_the_doctors_short_look():
    done = run(None, arguments=("-m", "minivllm", "--regret"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " us" in line]
    assert 1 <= len(lines) <= 2 * 20 and all(float(line.split()[0]) >= 1 for line in lines)
    assert "points: regret 1." in done.stdout


def test_the_cache_of_this_cpu():
    assert cpu_cache_bytes() >= 1 << 10


def test_the_benchmark(tmp_path, monkeypatch):
    """Two points, and what the tables read of their JSON."""
    pytest.importorskip("torch", reason="the benchmarks need torch, which is not installed")
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import regret_tables, tables
    from benchmarks.results import Results

    path = tmp_path / "regret.json"
    options = ("--ops", "rms_norm", "rms_norm_qkv", "--shapes", "qwen2.5-0.5b", "--tokens", "2", "--dtype", "f32")
    arguments = ("-m", "benchmarks", "regret", "--device", "cpu", "--threads", "1", "--json", str(path), *options)
    done = run(None, arguments=arguments, paths=(PACKAGE, ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["op"] == "regret" and written["environment"]["minivllm_threads"] == 1
    for row in written["rows"]:
        assert row["variant"] == f"minivllm:{row['kernel']}" and row["regret"] >= 1
        assert row.get("us", 0) > 0 or row["error"]
    cases = Results(tmp_path).of("cpu", "regret")
    assert {case.mode for case in cases} == {"rms_norm", "rms_norm_qkv"}
    assert all("estimate_us" in case.rows[f"minivllm:{case.any('chosen')}"] for case in cases)
    assert "| float32 | 2 | 1." in tables.regret(Results(tmp_path), "cpu")
    page = tables.regret_page(Results(tmp_path))
    assert "| rms_norm_qkv | 1 | 1." in page and "estimate / time" in page
    case = cases[0]
    for row in case.rows.values():  # as if it were bad
        row |= {"regret": 1.5, "pairs": [[3.0, 2.0]] * 5}
    assert "| 1.500 | `" in regret_tables.worst(cases)


@pytest.mark.parametrize("options,message", [
    (("regret", "--ops", "attention"), "there is no op attention"),
    (("rms_norm", "--isa", "avx2"), "--isa is an option of regret, not of rms_norm"),
    (("regret", "--device", "cuda", "--isa", "avx2"), "name --device cpu"),
    (("regret", "--device", "cpu", "--isa", "avx3"), "no kernel of avx3 runs here; there are "),
])  # fmt: skip
def test_options_that_do_not_fit(monkeypatch, options, message):
    monkeypatch.syspath_prepend(ROOT)
    pytest.importorskip("torch", reason="the benchmarks need torch, which is not installed")
    from benchmarks.__main__ import parser, regret_error

    assert message in regret_error(parser().parse_args(options))


@pytest.mark.gpu
def test_a_point_on_a_gpu(cuda_torch):
    found = regret.measure(POINT._replace(dtype="bf16"), "cuda", SMALL_CACHE)
    assert found.rows[found.chosen].estimate_us > 0 and found.rows[found.chosen].timing.us > 0
    assert len(found.rows) > 1 and found.regret == regret.regret(found.pairs)
