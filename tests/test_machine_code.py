"""The loops of Hopper's products as the GPU gets them. Nothing hides what lies between two of its steps, and the compiler
has moved it out of the uniform registers before: right, and slower (docs/speed/many_tokens.md)."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from processes import ROOT

import minivllm

PACKAGED = Path(sysconfig.get_path("platlib"), "nvidia", "cu13", "bin", "cuobjdump")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$")


def machine_code(source, directory):
    """The SASS for sm_90a of each kernel of one of csrc/cuda's files, by its mangled name."""
    tool = shutil.which("cuobjdump") or (str(PACKAGED) if PACKAGED.exists() else None)
    if tool is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    cubin = f"{source}.sm_90a.cubin"
    if "sm_90a" not in minivllm._C.cuda_archs().split():
        pytest.skip("needs a build with CUDA, and with kernels for sm_90a")
    done = subprocess.run([tool, "-xelf", cubin, minivllm._C.__file__], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, f"{tool}: {done.stdout}{done.stderr}"
    assert (directory / cubin).exists(), f"{minivllm._C.__file__} has no {cubin}"
    done = subprocess.run([tool, "-sass", cubin], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {part.split("\n", 1)[0]: part for part in done.stdout.split("Function : ")[1:]}


def loops(code):
    """The instructions from each backward branch's target to the branch."""
    instructions = INSTRUCTION.findall(code)
    place = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    for end, (_, text) in enumerate(instructions):
        branch = BRANCH.search(text)
        if branch and (begin := place[int(branch[1], 16)]) < end:
            yield [text for _, text in instructions[begin : end + 1]]


@pytest.mark.parametrize("source, products", [("wgmma", (4, 8)), ("3xtf32", (12, 16))])
def test_loop_of_the_product(tmp_path, source, products):
    """Four products a step; eight for 128 tokens, which take 768 cycles and all registers; twelve of TF32, sixteen in two steps where it is allowed."""
    kernels = machine_code(f"rms_norm_qkv_{source}_sm90a", tmp_path)
    assert kernels and all(f"{source}_kernel" in name for name in kernels)
    for name, code in kernels.items():
        hot = [loop for loop in loops(code) if sum("HGMMA" in text for text in loop) in products]
        assert hot, f"{name}: there is no loop of so many products"
        loop = min(hot, key=len)
        detours = [text for text in loop if re.search(r"\b(R2UR|S2UR|S2R|LDL|STL)\b", text)]
        allowed = {"3xtf32": 0, "wgmma": 1 if sum("HGMMA" in text for text in loop) == 4 else 2}[source]
        assert len(detours) <= allowed, f"{name}: {detours}"


@pytest.mark.parametrize("source", sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("rms_norm*.cu")))
def test_nothing_is_loaded_as_if_it_never_changed(tmp_path, source):
    """A kernel may begin while the one in front of it still writes the weights: no load goes past coherence."""
    kernels = machine_code(source, tmp_path)
    assert kernels
    for name, code in kernels.items():
        loads = [text for _, text in INSTRUCTION.findall(code) if re.search(r"\bLDG\b", text)]
        constant = [text for text in loads if ".CONSTANT" in text]
        assert not constant, f"{name}: {constant}"
