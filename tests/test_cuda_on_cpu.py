"""The CUDA kernels, compiled for the CPU (tests/emulation), against float64: what they compute is tested where there is no
GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT, SANITIZED
from test_prefill import LATE, MEANWHILE, SHAPES
from test_rms_norm_gate_up import TILES as GATED
from test_tf32 import SHAPES as TF32

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


def run_driver(tree, sources, *arguments, driver="driver"):
    """What a driver prints, of the kernels in these files."""
    build, cpp = tree
    cuda = build / "csrc" / "cuda"
    jobs = [[*cpp, "-w", "-c", "-x", "c++", path, "-o", path.with_suffix(".o")] for path in sources]
    jobs += [[*cpp, *WARNINGS, "-c", EMULATION / f"{driver}.cpp", "-o", cuda / f"{driver}.o"]]
    c = ["gcc", "-std=c11", "-fno-pie", "-w", "-I", build / "csrc", "-DMV_WITH_CUDA=1", "-c"]
    for name in LISTS:
        jobs += [[*c, build / "csrc" / "ops" / f"{name}.c", "-o", cuda / f"ops_{name}.o"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, jobs))
    # The lists name the kernels of the CPU too: those are not linked.
    objects, program = [job[-1] for job in jobs], build / driver
    compiled(["g++", *CHECKS, "-no-pie", "-Wl,--unresolved-symbols=ignore-all", *objects, "-o", program])
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=1200)


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
    assert taken >= {(steps, outputs) for outputs in (32, 64, 96)} | {(tiles, 192)}
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


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_qkv"])
def test_no_kernel_is_left_out(op, report):
    rows = re.findall(rf"^{op} (\w+) (.*)$", report.stdout, re.MULTILINE)
    assert rows
    for name, what in rows:
        assert "is not linked here" not in what, name
