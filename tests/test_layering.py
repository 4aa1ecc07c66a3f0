"""The rules of the source tree: who may include or import whom, and that every kernel file has a row."""

import ast
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".cu", ".cuh"})
# A directory of csrc: the files outside itself that it may include. Arrows point down only.
MAY_INCLUDE = {
    "": {"mv.h"},
    "python": {"mv.h"},
    "ops": {"mv.h", "kernel.h", "cpu/cpu.h", "cuda/cuda.h"},
    "cpu": {"mv.h", "kernel.h"},
    "cuda": {"mv.h", "kernel.h"},
}
# Folders of csrc/cpu and csrc/cuda: of kernels, and of what kernels stand on, which includes nothing of theirs.
KERNEL_FOLDERS = {"norm", "linear", "attention", "activation", "sampling"}
LOW_FOLDERS = {"cpu": {"simd", "pool"}, "cuda": {"arch"}}
# The folders of csrc/python, from the lowest to the highest; what is in none of them stands on all.
BINDING_FOLDERS = ["base", "frameworks", "convert", "ops", "xla", "python"]
# Headers that are no .c file's own: layouts that other projects gave to their structs, and texts.
HEADERS_ALONE = {"dlpack_abi.h", "xla_ffi_abi.h", "docstrings.h"}
CUDA_HEADERS = re.compile(r"^(cuda|cooperative_groups|cub/|thrust/|mma|driver_types|nvtx)")
CXX_HEADERS = {"algorithm", "array", "atomic", "functional", "iostream", "map", "memory", "mutex", "new", "string", "tuple", "utility",
               "vector", "type_traits", "unordered_map"}  # fmt: skip


def folder_of(path):
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else ""


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def python_files(*folders):
    return [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts
    ]


def imports(path):
    """The modules that a file imports, with whether at its top level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            yield (".".join(filter(None, (inside, node.module))), id(node) in top)


def test_there_is_something_to_check():
    assert {folder_of(path) for path in SOURCES} == set(MAY_INCLUDE)
    assert len(SOURCES) > 30


def test_lines_have_at_most_120_columns():
    """The formatter leaves comments alone."""
    paths = [*SOURCES, *(ROOT / "tests" / "emulation").glob("*.*"), *(ROOT / "tests" / "c").glob("*.c")]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_down(path):
    folder = folder_of(path)
    for quote, name in includes(path):
        if quote == '"':
            target = next((base / name for base in (path.parent, CSRC) if (base / name).exists()), None)
            assert target is not None, f"{path.name} includes {name}, which does not exist"
            relative = target.resolve().relative_to(CSRC)
            inside = (relative.parts[0] if len(relative.parts) > 1 else "") == folder
            assert inside or str(relative) in MAY_INCLUDE[folder], f"csrc/{folder} must not include {relative}"
            continue
        assert name != "Python.h" or folder == "python", "Python.h belongs to csrc/python"
        assert not CUDA_HEADERS.match(name) or folder == "cuda", f"{name} belongs to csrc/cuda"
        assert name not in CXX_HEADERS and not name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "numpy/")), (
            f"{name} is not allowed"
        )


BINDING = [path for path in SOURCES if folder_of(path) == "python"]


@pytest.mark.parametrize("path", BINDING, ids=lambda path: str(path.relative_to(CSRC / "python")))
def test_includes_of_the_binding_point_down(path):
    level = BINDING_FOLDERS.index(path.parent.name)
    for quote, name in includes(path):
        target = (path.parent / name).resolve()
        if quote == '"' and target.exists():
            assert BINDING_FOLDERS.index(target.parent.name) <= level, f"{path.name} includes {name}, which is above it"


def test_headers_of_the_binding_belong_to_one_file_each():
    alone = {path.name for path in BINDING if path.suffix == ".h" and not path.with_suffix(".c").exists()}
    assert alone == HEADERS_ALONE


def symbols(path, *options):
    done = subprocess.run(["nm", *options, path], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def test_no_files_of_the_binding_stand_on_each_other(tmp_path):
    """An arrow from a file to each one that defines what it uses, by what the compiler makes of them: no circle."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if not shutil.which(compiler[0]) or not shutil.which("nm"):
        pytest.skip("needs a C compiler and nm")
    flags = ["-std=c11", "-O1", f"-I{CSRC}", f"-I{sysconfig.get_path('include')}", "-c"]

    def compiled(path):
        target = tmp_path / f"{path.relative_to(CSRC).as_posix().replace('/', '.')}.o"
        subprocess.run([*compiler, *flags, path, "-o", target], check=True, capture_output=True)
        return target

    files = [path for path in BINDING if path.suffix == ".c"]
    with ThreadPoolExecutor() as pool:
        objects = dict(zip((str(path.relative_to(CSRC / "python")) for path in files), pool.map(compiled, files)))
    home = {symbol: name for name, path in objects.items() for symbol in symbols(path, "-g", "--defined-only")}
    uses = {name: {home[symbol] for symbol in symbols(path, "-u") if symbol in home} for name, path in objects.items()}
    assert "convert/arguments.c" in uses["ops/norms.c"] and len(uses) > 20
    while free := [name for name, others in uses.items() if not others & uses.keys()]:
        for name in free:
            del uses[name]
    assert not uses, f"these files stand on each other, or on some that do: {uses}"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_folders_of_kernels_stand_on_the_others(backend):
    """And an include names a file by its path from csrc."""
    low = LOW_FOLDERS[backend]
    for path in SOURCES:
        if folder_of(path) != backend:
            continue
        for name in [name for quote, name in includes(path) if quote == '"'] + BODY.findall(path.read_text()):
            assert (CSRC / name).exists(), f"{path.name} includes {name}, which is no path from csrc"
            inside = Path(name).parent.name
            assert path.parent.name not in low or inside in {*low, backend, ""}, f"{path.name} includes {name}"


CUDA_TYPE = re.compile(
    r"^(?:template <[^{};]*>\s*)?(?:struct|class|enum class|enum|union)\s+(?:alignas\(\d+\)\s*)?(\w+)\s*[:{]", re.M
)
CUDA_FUNCTION = re.compile(
    r'^(?:template <.*>\s*)?(?:(?:static|inline|constexpr|const|extern|"C"|__device__|__host__|__forceinline__)\s+)*'
    r"[\w:]+(?:<[^()]*>)?[\s*&]+(\w+)\([^;{]*\)\s*(?:->[^{;]*)?\{",
    re.M,
)


def test_a_name_in_the_cuda_kernels_means_one_thing():
    """A type or function of a file's outermost level is defined in one file; specialisations of a template are beside
    it, since `struct Name<...> {` is no new name. What is inside of a type has names of its own."""
    homes = {}
    for path in SOURCES:
        if folder_of(path) == "cuda":
            text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            for name in {*CUDA_TYPE.findall(text), *CUDA_FUNCTION.findall(text)} - {"__launch_bounds__"}:
                homes.setdefault(name, []).append(str(path.relative_to(CSRC)))
    assert len(homes) > 300
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


VOCABULARY = {f"arch/{name}.cuh" for name in ("ptx", "mma", "mbarrier", "tma", "wgmma")}


def test_inline_assembly_lives_in_the_device_vocabulary():
    for path in SOURCES:
        if folder_of(path) == "cuda" and str(path.relative_to(CSRC / "cuda")) not in VOCABULARY:
            assert not re.search(r"\basm\b", path.read_text()), f"{path.name}: PTX belongs to {VOCABULARY}"


def test_loads_that_the_compiler_may_move_are_not_used():
    """__ldcg and its like are not volatile for 16-bit floats: nothing keeps them behind the wait for the kernel in
    front, or inside the condition that guards them. load_past_l1 of arch/ptx.cuh is."""
    for path in SOURCES:
        if folder_of(path) == "cuda":
            code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            assert not (found := re.findall(r"\b__ld\w+", code)), f"{path.name}: {found}"


# The ops are the files of csrc/ops that hold a list of kernels.
OPS = [path.stem for path in (CSRC / "ops").glob("*.c") if re.search(r"define \w+_KERNELS\(", path.read_text())]
BODY = re.compile(r'define BODY "([^"]+)"')


def rows():
    """The rows of the lists in csrc/ops, as op -> names without their dtype: from the source, so that also those of other builds count."""
    found = {}
    for op in OPS:
        text = (CSRC / "ops" / f"{op}.c").read_text().replace("\\\n", " ")
        family = "linear" if op == "rms_norm_qkv" else op  # its kernels serve all linear ops
        each = re.findall(rf"MV_(?:ALL|16BIT)_DTYPES\(\s*K,\s*{family},\s*(\w+),\s*(\w+),", text)
        each += re.findall(rf"[^A-Z_]K\(\s*{family},\s*\w+,\s*\w+,\s*(\w+),\s*(\w+),", text)
        found[op] = set(each)
    return found


def test_every_kernel_file_has_a_row_and_every_row_a_file():
    """csrc/<backend>/<folder>/<op>[_<variant>]_<isa>.{c,cu}, without the op in `linear`, whose kernels are all in the
    list of rms_norm_qkv: one file may serve several variants of its isa."""
    lists = rows()
    assert all(len(found) >= 3 for found in lists.values())
    isas = {isa for found in lists.values() for _, isa in found}
    served = set()
    for path in SOURCES:
        if folder_of(path) not in ("cpu", "cuda") or path.suffix not in (".c", ".cu"):
            continue
        isa = path.stem.rpartition("_")[2]
        linear = path.parent.name == "linear" and isa in isas
        op = "rms_norm_qkv" if linear else next((op for op in OPS if path.stem.startswith(op + "_")), None)
        if op is None:
            assert isa not in isas, f"{path.name} is of no op that csrc/ops has a list for"
            continue
        assert path.parent.name in KERNEL_FOLDERS, f"{path.relative_to(ROOT)} is in no folder of kernels"
        rest = path.stem if linear else path.stem[len(op) + 1 :]
        mine = {
            (name, isa)
            for name, isa in lists[op]
            if name == rest
            or name.endswith("_" + rest)
            or (rest.endswith(isa) and name.endswith(isa) and name.startswith(rest.removesuffix(isa)))
        }
        assert mine, f"{path.relative_to(ROOT)} has no row in csrc/ops/{op}.c"
        assert rest.endswith(next(iter(mine))[1]), f"{path.name} does not end with its isa"
        served |= {(op, *row) for row in mine}
    for op, found in lists.items():
        for name, isa in found:
            assert (op, name, isa) in served, f"row {name} of {op} has no file in csrc"


def test_the_package_imports_frameworks_only_where_used():
    """numpy, torch and the like inside functions only, outside minivllm.testing and the module or package that a
    framework gives its name to; transformers and nn stand on torch."""
    for path in python_files("minivllm"):
        if "testing" in path.parts:
            continue
        allowed = {path.stem.partition("_")[0], path.parent.name}
        allowed |= {"torch"} if allowed & {"transformers", "nn"} else set()
        for module, at_top in imports(path):
            root = module.split(".")[0]
            assert not (at_top and root in {"numpy", "torch", "transformers", "cupy", "jax", "ml_dtypes"} - allowed), (
                f"{path.name} imports {module} at the top"
            )
            assert not module.startswith("minivllm.testing") or path.name.startswith("doctor"), (
                f"{path.name} imports {module}"
            )


def test_the_package_imports_itself_relatively():
    """So that it also works where a loader gives it another name."""
    for path in python_files("minivllm"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            else:
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in named:
                assert name.split(".")[0] != "minivllm", f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_testing_imports_without_a_framework():
    for path in python_files("minivllm/testing"):
        for module, at_top in imports(path):
            assert not (at_top and module.split(".")[0] in {"torch", "cupy", "jax", "ml_dtypes"}), (
                f"{path.name} imports {module} at the top"
            )


def test_benchmarks_do_not_import_tests():
    names = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in python_files("benchmarks", "examples", "minivllm"):
        for module, _ in imports(path):
            assert module.split(".")[0] not in names | {"tests"}, f"{path.relative_to(ROOT)} imports {module}"


CLOCKS = re.compile(
    r"\b(?:time\.(?:time|perf_counter|monotonic|process_time)(?:_ns)?\b|perf_counter|timeit\b|elapsed_time\b|cudaEventElapsedTime|Event\(enable_timing)"
)


def test_there_is_one_clock():
    """minivllm/testing/timing.py, for tests and benchmarks alike. generation.py reports to its caller what the caller's
    own processors cost, and the package proper does not stand on minivllm.testing."""
    timing = ROOT / "minivllm" / "testing" / "timing.py"
    reporting = ROOT / "minivllm" / "transformers" / "generation.py"
    assert CLOCKS.search(timing.read_text()) and CLOCKS.search(reporting.read_text())
    for path in python_files("minivllm", "benchmarks", "examples", "tests"):
        if path not in (timing, reporting, Path(__file__).resolve()):
            match = CLOCKS.search(path.read_text())
            assert not match, f"{path.relative_to(ROOT)} has a clock of its own: {match.group()}"


def test_nothing_falls_back_in_silence():
    for path in python_files("minivllm", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                assert not silent, f"{path.relative_to(ROOT)}:{node.lineno} swallows an exception"


def test_environment_variables_are_all_known():
    """Those of the README, and no others."""
    known = {"MINIVLLM_LOG", "OMP_NUM_THREADS", "MINIVLLM_CUDA", "MINIVLLM_CUDA_ARCHS", "MINIVLLM_SANITIZE", "MINIVLLM_WERROR",
             "CC", "NVCC", "CUDA_HOME"}  # fmt: skip
    read = set()
    for path in [*SOURCES, ROOT / "setup.py", *python_files("minivllm")]:
        read |= set(re.findall(r"""(?:getenv\(|environ(?:\.get\(|\[)|getenv\()\s*["'](\w+)["']""", path.read_text()))
    assert read - known <= {"CUDACXX", "CUDA_PATH", "PATH", "LDFLAGS", "CFLAGS", "CXX"}, read - known
    readme = (ROOT / "README.md").read_text()
    for name in known - {"CC", "NVCC", "CUDA_HOME"}:
        assert name in readme, f"README.md does not mention {name}"
