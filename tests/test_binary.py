"""The extension as a file: what its linker and compiler were told, seen by readelf."""

import shutil
import subprocess
from pathlib import Path

import pytest
from processes import ROOT, SANITIZED

import minivllm

EXTENSION = Path(minivllm._C.__file__)


def readelf(option):
    if not shutil.which("readelf"):
        pytest.skip("needs readelf, of binutils")
    return subprocess.run(["readelf", "-W", option, EXTENSION], check=True, capture_output=True, text=True).stdout


def test_relocations_are_read_only_and_nothing_is_searched_for():
    assert "GNU_RELRO" in readelf("--program-headers")
    dynamic = readelf("--dynamic")
    assert "BIND_NOW" in dynamic
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


@pytest.mark.skipif(SANITIZED, reason="the sanitizers take the place of these checks")
def test_the_stack_and_copies_are_guarded():
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols, "built without -fstack-protector-strong"
    assert "_chk@" in symbols, "built without _FORTIFY_SOURCE"


@pytest.mark.skipif(SANITIZED, reason="such a build is for the machine that made it")
def test_no_path_of_the_build_is_left():
    content = EXTENSION.read_bytes()
    for path in (ROOT, Path.home()):
        assert str(path).encode() + b"/" not in content, f"the extension holds the path {path}"
