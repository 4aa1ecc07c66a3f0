"""Importing: no framework, no CUDA context, no run-time dependency; and the doctor, also when things are broken."""

import json
import shutil

import pytest
from processes import PACKAGE, run, succeeds

import minivllm


def test_importing_loads_no_framework():
    printed = succeeds("""
        import sys
        import minivllm
        print([name for name in ("torch", "cupy", "jax", "ml_dtypes", "numpy") if name in sys.modules])
        minivllm.kernels(), minivllm.last_kernel(), minivllm.get_num_threads()
        print([name for name in ("torch", "cupy", "jax", "ml_dtypes") if name in sys.modules])
    """)
    assert printed.split("\n")[:2] == ["[]", "[]"]


def test_computing_on_numpy_loads_no_other_framework():
    printed = succeeds("""
        import sys
        import numpy as np
        import minivllm
        minivllm.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32))
        minivllm.FusedRMSNormQKV.forward(np.ones((2, 8), np.float32), np.ones(8, np.float32), np.ones((16, 8), np.float32), 2, 1)
        print([name for name in ("torch", "cupy", "jax", "ml_dtypes") if name in sys.modules])
    """)
    assert printed.strip() == "[]"


def test_importing_touches_no_driver():
    """No libcuda, no device file: so no context; and none of the libraries that must not be needed at run time."""
    printed = succeeds("""
        import os
        import minivllm
        maps = open("/proc/self/maps").read()
        preloaded = os.environ.get("LD_PRELOAD", "")
        unwanted = ("libcuda", "libcudart", "libstdc++", "libgomp", "libtorch")
        print([name for name in unwanted if name in maps and name not in preloaded])
        files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        print([name for name in files if "nvidia" in name])
    """)
    assert printed.split("\n")[:2] == ["[]", "[]"]


CPU_WORKS = """
    import numpy as np
    import minivllm
    out = minivllm.rms_norm(np.full((2, 8), 3.0, np.float32), np.ones(8, np.float32), 0.0)
    assert (out == 1).all()
    rows = [row for row in minivllm.kernels() if row.isa.startswith("sm")]
    assert all(not row.usable and row.why_not for row in rows), rows
    for name, argument in (("empty", (2, 2)), ("to_device", out)):
        try:
            getattr(minivllm, name)(argument)
        except RuntimeError as error:
            assert str(error).startswith(f"{name}: "), error
        else:
            raise AssertionError("memory of a GPU that cannot be seen")
"""


def test_a_hidden_gpu():
    succeeds(CPU_WORKS, CUDA_VISIBLE_DEVICES="")


def test_a_driver_that_does_not_load(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no library at all")
    succeeds(CPU_WORKS, LD_LIBRARY_PATH=tmp_path)


def doctor(*arguments, **environment):
    return run(None, arguments=("-m", "minivllm", *arguments), timeout=300, **environment)


def package(folder, name, code):
    """A package of that name and its metadata, found before any other."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-9.9.dist-info").mkdir()
    (folder / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    return folder


def test_the_doctor():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (minivllm.__version__, "rms_norm", "rms_norm_qkv", "bfloat16"):
        assert word in done.stdout, word


def test_the_doctor_speaks_json(tmp_path):
    done = doctor("--json", paths=[PACKAGE, package(tmp_path, "torch", "")])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["extension"]["version"] == minivllm.__version__
    assert {(row["op"], row["dtype"]) for row in report["self_check"]} >= {
        ("rms_norm", "float32"),
        ("rms_norm_qkv", "float16"),
    }


def copy_of_package(tmp_path, keep_extension):
    ignore = shutil.ignore_patterns("__pycache__", *([] if keep_extension else ["_C*.so"]))
    shutil.copytree(PACKAGE / "minivllm", tmp_path / "minivllm", ignore=ignore)
    return tmp_path


@pytest.mark.parametrize(
    "broken,arguments",
    [(False, ()), (True, ("--json",)), (False, ("--regret",))],
    ids=["missing", "broken", "no regret"],
)
def test_the_doctor_without_an_extension(tmp_path, broken, arguments):
    folder = package(copy_of_package(tmp_path, keep_extension=False), "torch", "")
    if broken:
        (folder / "minivllm" / "_C.abi3.so").write_text("no library at all")
    done = doctor(*arguments, paths=[folder])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "_C" in done.stdout
    if "--json" in arguments:
        assert "error" in json.loads(done.stdout)["extension"]


def test_the_doctor_with_a_broken_torch(tmp_path):
    """It reports, and everything else is examined all the same."""
    done = doctor("--json", paths=[PACKAGE, package(tmp_path, "torch", "raise OSError('libtorch.so: not today')")])
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert "not today" in report["frameworks"]["torch"]["error"]
    assert any(row["op"] == "rms_norm_qkv" for row in report["self_check"])


def test_importing_without_an_extension_says_what_to_do(tmp_path):
    done = run("import minivllm; minivllm.rms_norm", paths=[copy_of_package(tmp_path, keep_extension=False)])
    assert done.returncode != 0 and "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
    assert "python -m minivllm" in done.stderr or "pip install" in done.stderr


@pytest.mark.parametrize(
    "use",
    ["minivllm.rms_norm", "minivllm.__version__", "from minivllm import FusedRMSNormQKV", "from minivllm import *"],
)
def test_a_source_tree_without_an_extension_says_that_it_hides_an_installed_package(tmp_path, use):
    folder = copy_of_package(tmp_path, keep_extension=False)
    (folder / "csrc").mkdir()
    done = run(f"import minivllm; {use}" if "import" not in use else use, paths=[folder])
    assert done.returncode != 0
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: minivllm was imported from its source tree {tmp_path}, which hides an ")
    assert "Run Python from another directory" in said and "`pip install -e .`" in said
    assert "circular" not in done.stderr


def test_the_doctor_in_a_source_tree_without_an_extension(tmp_path):
    folder = package(copy_of_package(tmp_path, keep_extension=False), "torch", "")
    (folder / "csrc").mkdir()
    done = doctor("--json", paths=[folder])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "its source tree" in json.loads(done.stdout)["extension"]["error"]


def test_a_package_without_an_extension_still_has_no_attributes_that_python_looks_for(tmp_path):
    script = """
        import minivllm
        assert not hasattr(minivllm, "__wrapped__")
        try:
            minivllm.__version__
        except ImportError as error:
            print(error)
    """
    said = succeeds(script, paths=[copy_of_package(tmp_path, keep_extension=False)])
    assert "No module named 'minivllm._C'" in said and "circular" not in said


def missing(folder, name):
    return package(folder, name, f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')")


def test_the_doctor_without_numpy(tmp_path):
    done = doctor("--json", paths=[PACKAGE, missing(package(tmp_path, "torch", ""), "numpy")])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    report = json.loads(done.stdout)
    for section in ("self_check", "benchmark"):
        assert report[section] == {"error": "needs numpy, which is not installed: pip install numpy"}
        assert f"{section}: needs numpy, which is not installed: pip install numpy" in report["problems"]


def test_the_doctor_without_ml_dtypes(tmp_path):
    done = doctor(paths=[PACKAGE, missing(package(tmp_path, "torch", ""), "ml_dtypes")])
    assert "Traceback" not in done.stderr, done.stderr
    assert "skipped bfloat16 on cpu: NumPy needs ml_dtypes for it: pip install ml_dtypes" in done.stdout
