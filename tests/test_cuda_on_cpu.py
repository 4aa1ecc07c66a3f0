"""The CUDA kernels, compiled for the CPU (tests/emulation), against float64: what they compute is tested where there is no
GPU."""

import json
import os
import re
import shutil
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT, SANITIZED
from test_prefill import LATE, MEANWHILE, SHAPES
from test_rms_norm_gate_up import TILES as GATED
from test_tf32 import SHAPES as TF32

from minivllm.testing import points

EMULATION = ROOT / "tests" / "emulation"
# A GPU ends a kernel whose address is not aligned for what it loads, where this CPU would go on.
CHECKS = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
# Of the drivers. The kernels are nvcc's to warn of, which alone knows its pragmas.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Of csrc/ops: the lists of kernels, and what they stand on.
LISTS = ["rms_norm", "rms_norm_qkv", "act_and_mul", "decode_attention", "qk_norm_rope", "greedy_tokens", "heads", "dispatch",
         "checks"]  # fmt: skip


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    return next(
        (Path(home, "include") for home in homes if home and Path(home, "include", "cuda_bf16.h").exists()), None
    )


def compiled(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(map(str, command)) + "\n" + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(a copy of csrc whose instructions are those of the emulation, the command that compiles C++ there)."""
    headers = cuda_headers()
    if headers is None or not shutil.which("g++"):
        pytest.skip("needs g++ and the headers of CUDA")
    if SANITIZED:
        pytest.skip("fibers switch stacks, which AddressSanitizer does not follow")
    build = tmp_path_factory.mktemp("emulation")
    shutil.copytree(ROOT / "csrc", build / "csrc")
    cuda = build / "csrc" / "cuda"
    for path in EMULATION.glob("*.cuh"):
        shutil.copy(path, cuda / "arch")
    for path in cuda.rglob("*.cu*"):  # shared memory belongs to the emulated block
        text = re.sub(
            r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
            r"\1 *const \2 = reinterpret_cast<\1 *>(cpu::shared());",
            path.read_text(),
        )
        path.write_text(text.replace("__shared__ ", "static "))
    cpp = ["g++", "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-isystem", headers, "-I", EMULATION,
           "-include", "cuda_on_cpu.h"]  # fmt: skip
    return build, [*cpp, *CHECKS, "-fno-pie", "-I", build / "csrc", "-DMV_WITH_CUDA=1"]


def run_driver(tree, sources, *arguments, driver="driver", given=None):
    """What a driver prints, of the kernels in these files; what has been compiled before is not again. given: its input."""
    build, cpp = tree
    cuda = build / "csrc" / "cuda"
    jobs = [[*cpp, "-w", "-c", "-x", "c++", path, "-o", path.with_suffix(".o")] for path in sources]
    jobs += [[*cpp, *WARNINGS, "-c", EMULATION / f"{driver}.cpp", "-o", cuda / f"{driver}.o"]]
    c = ["gcc", "-std=c11", "-fno-pie", "-w", "-I", build / "csrc", "-DMV_WITH_CUDA=1", "-c"]
    for name in LISTS:
        jobs += [[*c, build / "csrc" / "ops" / f"{name}.c", "-o", cuda / f"ops_{name}.o"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, [job for job in jobs if not Path(job[-1]).exists()]))
    # The lists name the kernels of the CPU too: those are not linked.
    objects, program = [job[-1] for job in jobs], build / driver
    compiled(["g++", *CHECKS, "-no-pie", "-Wl,--unresolved-symbols=ignore-all", *objects, "-o", program])
    return subprocess.run([program, *arguments], input=given, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def report(tree):
    build, _ = tree
    return run_driver(tree, [path for path in (build / "csrc" / "cuda").rglob("*.cu") if path.name != "device.cu"])


@pytest.mark.gate
def test_every_case_of_the_norms(tree):
    """A part of what follows, for who cannot wait for all of it."""
    build, _ = tree
    done = run_driver(tree, (build / "csrc" / "cuda").glob("norm/*.cu"), "norms")
    assert done.returncode == 0 and done.stdout.count("at most") == 6, done.stdout + done.stderr


def test_every_case_of_the_activations(tree):
    build, _ = tree
    done = run_driver(tree, (build / "csrc" / "cuda").glob("activation/*.cu"), driver="act_and_mul")
    assert done.returncode == 0 and done.stdout.count(" 0 wrong results") == 3, done.stdout + done.stderr


def test_every_case_of_the_attention(tree):
    build, _ = tree
    done = run_driver(
        tree, (build / "csrc" / "cuda").glob("attention/decode_attention_*.cu"), driver="decode_attention"
    )
    assert done.returncode == 0 and done.stdout.count(" 0 wrong") == 7, done.stdout + done.stderr


def test_every_case_of_the_heads(tree):
    build, _ = tree
    done = run_driver(tree, (build / "csrc" / "cuda").glob("attention/qk_norm_rope_*.cu"), driver="qk_norm_rope")
    assert done.returncode == 0 and done.stdout.count(" 0 wrong") == 3, done.stdout + done.stderr


def test_every_case_of_the_choice(tree):
    build, _ = tree
    done = run_driver(tree, (build / "csrc" / "cuda").glob("sampling/*.cu"), driver="greedy_tokens")
    assert done.returncode == 0 and done.stdout.count(" 0 wrong") == 6, done.stdout + done.stderr


def test_every_case_of_every_kernel(report):
    assert report.returncode == 0, report.stdout + report.stderr


def test_the_shapes_of_the_gpu_tests_take_every_tile(tree):
    """Every tile for Hopper's tensor cores that there is code for, and every way to run one."""
    build, cpp = tree
    compiled([*cpp, *WARNINGS, EMULATION / "tiles.cpp", "-no-pie", "-o", build / "tiles"])

    def choices(shapes, what):
        text = "".join(f"{tokens} {hidden} {outputs} {what}\n" for tokens, hidden, outputs in shapes)
        done = subprocess.run([build / "tiles"], input=text, capture_output=True, text=True, check=True)
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    tokens, steps, tiles, late = range(4)
    plain, meanwhile = choices(SHAPES, "out_in"), choices(MEANWHILE, "out_in")
    taken = {choice[:2] for choice in plain}
    assert taken >= {(tokens, outputs) for outputs in range(64, 257, 16)}
    assert taken >= {(steps, outputs) for outputs in range(32, 97, 16)} | {(tiles, 192)}
    for sharing in (tokens, tiles):
        assert {choice[2] for choice in plain if choice[0] == sharing} == {1, 2}, "with clusters and without"
    for sharing in (tokens, steps, tiles):
        assert max(choice[4] for choice in plain if choice[0] == sharing) > 1, "several waves"
    assert all(choice[3] for choice in meanwhile), "rows are normalised meanwhile"
    assert {choice[:2] for choice in meanwhile} == {(tiles, 192), *((tokens, outputs) for outputs in (224, 240, 256))}
    assert {choice[2] for choice in meanwhile} == {1, 2}
    turned = choices([(tokens, hidden, outputs) for tokens, hidden, outputs in SHAPES if tokens > 64], "in_out")
    assert {choice[:2] for choice in turned} == {(tokens, 128), (tokens, 256)}
    gated = choices([(tokens, hidden, 2 * d) for tokens, hidden, d in GATED], "gated")
    taken = {choice[:2] for choice in gated}
    assert taken >= {(tokens, outputs) for outputs in range(64, 257, 32)}
    assert taken >= {(steps, outputs) for outputs in (32, 64, 96)} | {(tiles, 160), (tiles, 192)}
    assert {choice[2:4] for choice in gated if choice[0] == tiles} == {(1, 0), (2, 0), (2, 1)}
    assert {choice[2:4] for choice in gated if choice[0] == tokens} == {(1, 0), (2, 0), (2, 1)}
    when_late = choices(LATE, "late")
    assert {choice[:2] for choice in when_late} == {(late, outputs) for outputs in range(64, 257, 32)}
    assert {choice[4] for choice in when_late} >= {1, 2}
    for what in ("tf32", "tf32_allowed"):
        tf32 = choices(TF32, what)  # tokens, whole tiles, split ones, CTAs that share these
        assert {choice[0] for choice in tf32} == {8, 16, 32, 64, 96, 128}, (what, tf32)
        assert any(whole and split for _, whole, split, _ in tf32), what
        assert any(whole and not split for _, whole, split, _ in tf32), what
        shared = [(split, sharers) for _, _, split, sharers in tf32 if split]
        assert any(sharers == split for split, sharers in shared), f"{what}: a CTA for each tile"
        assert any(sharers % split == 0 and sharers > split for split, sharers in shared), f"{what}: whole parts"
        if what == "tf32":  # with wider tiles it is never the cheapest
            assert any(sharers % split for split, sharers in shared), "parts of two tiles"


def sizes_of(point):
    """What the driver of the choice reads of a point: five sizes."""
    shape = next(shape for shape in points.OPS[point.op].shapes if shape.name == point.shape)
    if point.context:
        return point.tokens, shape.head_dim, point.context, shape.num_heads, shape.num_kv_heads
    return point.tokens, shape.hidden, shape.qkv if point.op == "rms_norm_qkv" else shape.outputs, 0, 0


def estimates(tree, report, gpu, asked):
    """Of (point, dtype): each row's estimate by name, on a GPU of so many SMs and GB/s. report: all is compiled."""
    build, _ = tree
    sources = [path for path in (build / "csrc" / "cuda").rglob("*.cu") if path.name != "device.cu"]
    lines = [" ".join(map(str, (*gpu, point.op, point.dtype, *sizes_of(point)))) for point in asked]
    done = run_driver(tree, sources, driver="choice", given="\n".join(lines))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(asked), done.stderr
    words = map(str.split, done.stdout.splitlines())
    return [dict(zip(each[::2], map(float, each[1::2]), strict=True)) for each in words]


H100, H200 = (132, 3352), (132, 4800)  # SMs, GB/s
PRICED = ("rms_norm_qkv", "rms_norm_linear", "rms_norm_gate_up", "linear", "linear_add", "decode_attention")
MEASURED = ROOT / "benchmarks" / "results" / "log" / "regret_3_h100.json"


def test_the_choice_by_measured_times(tree, report):
    """Of the rows that were measured on an H100 the one that would be chosen is the fastest, or close to it."""
    times = {}
    for row in json.loads(MEASURED.read_text())["rows"]:
        point = points.Point(row["of"], row["shape"], row["tokens"], row["dtype"], row.get("context"))
        if row.get("us") and point.op in PRICED:
            times.setdefault(point, {})[row["kernel"]] = row["us"]
    found = []
    for (point, us), estimated in zip(times.items(), estimates(tree, report, H100, list(times)), strict=True):
        chosen = min(estimated, key=estimated.__getitem__)
        found.append((us[chosen] / min(us.values()), estimated[chosen] / us[chosen], point))
    assert len(found) > 200 and max(found)[0] < 1.15, max(found)
    assert statistics.geometric_mean(regret for regret, *_ in found) < 1.004
    assert statistics.mean(0.8 < estimate < 1.25 for _, estimate, _ in found) > 0.95


@pytest.mark.parametrize("gpu", [H100, H200])
def test_the_choice_at_some_shapes(tree, report, gpu):
    """Where the fastest row was found by forcing all, on an H100; an H200 differs by its memory."""
    expected = {
        points.Point("linear_add", "qwen2.5-0.5b-o", 96, "bf16"): "bf16_norm_wgmma_sm90a",
        points.Point("linear_add", "qwen2.5-0.5b-o", 200, "f16"): "f16_norm_wgmma_sm90a",
        points.Point("linear", "qwen3-14b-o", 16, "f16"): "f16_norm_wgmma_sm90a",
        points.Point("rms_norm_qkv", "qwen3-0.6b", 8, "bf16"): "bf16_decode_sm90a",
        points.Point("rms_norm_gate_up", "qwen2.5-0.5b-gate_up", 2048, "bf16"): "bf16_norm_wgmma_sm90a",
        points.Point("decode_attention", "qwen3-8b", 4, "bf16", 4096): "bf16_mma_sm80",
        points.Point("decode_attention", "llama-70b", 2, "f16", 512): "f16_mma_sm90a",
    }
    for point, estimated in zip(expected, estimates(tree, report, gpu, list(expected)), strict=True):
        assert min(estimated, key=estimated.__getitem__) == expected[point], (point, estimated)


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_qkv"])
def test_no_kernel_is_left_out(op, report):
    rows = re.findall(rf"^{op} (\w+) (.*)$", report.stdout, re.MULTILINE)
    assert rows
    for name, what in rows:
        assert "is not linked here" not in what, name
