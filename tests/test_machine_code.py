"""The loops of Hopper's products as the GPU gets them. Nothing hides what lies between two of its steps, and the compiler
has moved it out of the uniform registers before: right, and slower (docs/speed/many_tokens.md)."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import minivllm

PACKAGED = Path(sysconfig.get_path("platlib"), "nvidia", "cu13", "bin", "cuobjdump")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$")


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """The SASS for sm_90a of every kernel, by its mangled name."""
    tool = shutil.which("cuobjdump") or (str(PACKAGED) if PACKAGED.exists() else None)
    if tool is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    if "sm_90a" not in minivllm._C.cuda_archs().split():
        pytest.skip("needs a build with CUDA, and with kernels for sm_90a")
    directory = tmp_path_factory.mktemp("cubins")

    def ask(*arguments):
        done = subprocess.run([tool, *map(str, arguments)], cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, f"{tool}: {done.stdout[-2000:]}{done.stderr}"
        return done.stdout

    ask("-xelf", "sm_90a", minivllm._C.__file__)
    cubins = list(directory.glob("*.sm_90a.cubin"))
    assert cubins, f"{minivllm._C.__file__} holds nothing for sm_90a"
    parts = [part for cubin in cubins for part in ask("-sass", cubin).split("Function : ")[1:]]
    return {part.split("\n", 1)[0]: part for part in parts}


def loops(code):
    """The instructions from each backward branch's target to the branch."""
    instructions = INSTRUCTION.findall(code)
    place = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    for end, (_, text) in enumerate(instructions):
        branch = BRANCH.search(text)
        if branch and (begin := place[int(branch[1], 16)]) < end:
            yield [text for _, text in instructions[begin : end + 1]]


@pytest.mark.parametrize("source, products", [("wgmma", (4, 8)), ("tf32", (12, 16))])
def test_loop_of_the_product(machine_code, source, products):
    """Four products a step; eight for 128 tokens, which take 768 cycles and all registers; twelve of TF32, sixteen in two steps where it is allowed.
    In a step of TF32 for 128 tokens a thread may read its number again, for which there is no register left; so it may twice
    where addends join (WgmmaForm 3 and 4) 224 and 256 outputs."""
    kernels = {name: code for name, code in machine_code.items() if f"{source}_kernel" in name}
    assert kernels
    for name, code in kernels.items():
        hot = [loop for loop in loops(code) if sum("HGMMA" in text for text in loop) in products]
        assert hot, f"{name}: there is no loop of so many products"
        loop = min(hot, key=len)
        detours = [text for text in loop if re.search(r"\b(R2UR|S2UR|S2R|LDL|STL)\b", text)]
        adds = re.search("Li(224|256)ELNS_9WgmmaFormE[34]E", name) is not None
        allowed = {"tf32": 1, "wgmma": 1 if sum("HGMMA" in text for text in loop) == 4 and not adds else 2}[source]
        assert len(detours) <= allowed, f"{name}: {detours}"


def test_nothing_is_loaded_as_if_it_never_changed(machine_code):
    """A kernel may begin while the one in front of it still writes the weights: no load goes past coherence."""
    assert len(machine_code) > 100
    for name, code in machine_code.items():
        constant = [text for _, text in INSTRUCTION.findall(code) if re.search(r"\bLDG\b.*\.CONSTANT", text)]
        assert not constant, f"{name}: {constant}"


def test_only_a_bias_is_loaded_before_the_wait(machine_code):
    """In the decode kernel of Hopper, whose product is also run before the wait for the kernel in front: the compiler
    has moved loads of addends, which that kernel may write, out of the loop and in front of the wait."""
    kernels = {name: code for name, code in machine_code.items() if "decode_sm90a_kernel" in name}
    assert kernels
    for name, code in kernels.items():
        instructions = [text for _, text in INSTRUCTION.findall(code)]
        waits = [i for i, text in enumerate(instructions) if "ACQBULK" in text]
        early = [text for text in instructions[: waits[-1]] if re.search(r"\bLDG?\b", text)]
        assert len(early) <= 2, f"{name}: {early}"  # in float32 or in x's dtype
