"""The binding's tables: what does not fit one is seen before anything is written past it."""

import re
import subprocess
import sysconfig

import pytest
from processes import ROOT, SANITIZED

pytestmark = pytest.mark.skipif(SANITIZED, reason="what the compiler refuses is the same there")


def compile_with(tmp_path, source, name, value):
    """The compiler's messages about a file of csrc/python, with another value for a constant of its headers."""
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(rf"\b{name} = \d+", f"{name} = {value}", path.read_text()))
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    command = [
        *compiler,
        "-std=c11",
        "-fsyntax-only",
        "-Icsrc",
        f"-I{sysconfig.get_path('include')}",
        f"csrc/python/{source}",
    ]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr


def test_a_table_of_parameters_that_is_too_long_does_not_compile(tmp_path):
    assert compile_with(tmp_path, "ops/rms_norm_qkv.c", "MAX_PARAMETERS", 32) == ""
    assert "has more than MAX_PARAMETERS parameters" in compile_with(
        tmp_path, "ops/rms_norm_qkv.c", "MAX_PARAMETERS", 17
    )
