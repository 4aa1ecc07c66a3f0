"""tools/hub.py: a wheel laid out as a repository of the kernels hub, as the package `kernels` loads it."""

import json
import sys
import zipfile

import pytest
from processes import PACKAGE, ROOT, SANITIZED, succeeds

sys.path.insert(0, str(ROOT / "tools"))
from hub import lay_out  # noqa: E402

LOADS = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
import kernels
import torch

minivllm = kernels.get_local_kernel(Path({directory!r}))
assert minivllm.__file__.startswith({directory!r}), minivllm.__file__
x, weight = torch.randn(3, 64, requires_grad=True), torch.ones(64)
y = minivllm.rms_norm(x, weight)  # with a gradient: through the package's own module for torch
y.sum().backward()
assert x.grad.shape == x.shape and torch.allclose(y, torch.nn.functional.rms_norm(x, (64,), weight, 1e-6))
assert issubclass(minivllm.layers.RMSNorm, torch.nn.Module)
"""


@pytest.fixture
def wheel(tmp_path):
    """The package as it lies here, as a wheel has it."""
    path = tmp_path / "minivllm-0.1.0-cp311-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((PACKAGE / "minivllm").rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(PACKAGE))
    return path


def test_the_layout(wheel, tmp_path):
    variant = lay_out(wheel, tmp_path / "hub")
    assert variant.relative_to(tmp_path / "hub").parts == ("build", "torch-stable-abi210-cpu-x86_64-linux")
    assert (variant / "__init__.py").exists() and list(variant.glob("_C*.so"))
    assert json.loads((variant / "metadata.json").read_text())["backend"] == {"type": "cpu"}
    cuda = wheel.rename(wheel.with_name("minivllm-0.1.0+cu13-cp311-abi3-manylinux_2_28_x86_64.whl"))
    assert lay_out(cuda, tmp_path / "hub").name == "torch-stable-abi210-cu130-x86_64-linux"


def test_the_loader_of_the_hub(wheel, tmp_path, torch):
    pytest.importorskip("kernels", reason="the package kernels of Hugging Face is not installed")
    if SANITIZED:
        pytest.skip("torch is imported in a new process, which takes minutes under the sanitizers")
    lay_out(wheel, tmp_path / "hub")
    succeeds(LOADS.format(directory=str(tmp_path / "hub")))
