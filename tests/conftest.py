"""Fixtures: the kernels that exist, the devices that do, and why the others are skipped."""

import sys

import pytest
from frameworks import TORCH_CUDA, native
from processes import SANITIZED

import minivllm

# Numbers, whole models, other processes and other people's compilers: minutes each under the sanitizers, through code
# that other tests take them to.
SLOW_UNDER_SANITIZERS = ("accuracy", "benchmarks", "docs", "import", "nn", "nn_layer", "numeric", "paged", "shard",
                         "tensor_parallel", "torch_compile", "torch_grad", "transformers", "transformers_caches",
                         "transformers_code", "transformers_families", "transformers_rest", "transformers_head",
                         "transformers_kept", "transformers_rounding")  # fmt: skip
collect_ignore = [f"test_{name}.py" for name in SLOW_UNDER_SANITIZERS] if SANITIZED else []


def why_no_gpu() -> str | None:
    """None when GPU tests can run; otherwise what is missing."""
    if minivllm._C.cuda_archs() == "":
        return "needs a GPU: this build has no CUDA backend"
    try:
        if minivllm._C.cuda_device_count() == 0:
            return "needs a GPU: the driver reports none"
        info = minivllm._C.cuda_device_info(0)
    except RuntimeError as error:
        return f"needs a GPU: {error}"
    return None if info["usable"] else f"needs a GPU this build has code for: {info['name']}"


NO_GPU = why_no_gpu()
OPS_OF_ROWS = (
    "rms_norm",
    "rms_norm_qkv",
    "norm_add",
    "rms_norm_linear",
    "rms_norm_gate_up",
    "linear",
    "linear_add",
    "silu_and_mul",
    "gelu_and_mul",
    "decode_attention",
    "qk_norm_rope",
    "greedy_tokens",
)
ROWS = {op: minivllm.kernels(op) for op in OPS_OF_ROWS}


def device_of(row) -> str:
    return "cuda" if row.isa.startswith("sm") else "cpu"


def pytest_addoption(parser):
    parser.addoption("--leak-calls", type=int, default=3000, help="of each op in test_leaks.py; a tenth of it compiled")


@pytest.fixture
def leak_calls(request):
    return request.config.getoption("--leak-calls")


def pytest_configure(config):
    config.addinivalue_line("markers", "rows(op, device=None): the fixture `kernel` runs over the kernels of this op")


def pytest_report_header():
    usable = sum(row.usable for rows in ROWS.values() for row in rows)
    total = sum(len(rows) for rows in ROWS.values())
    return f"minivllm {minivllm.__version__}: {usable} of {total} kernels usable here; GPU: {NO_GPU or 'yes'}"


def _kernel_param(row):
    marks = [pytest.mark.gpu] if device_of(row) == "cuda" else []
    if not row.usable:
        marks.append(pytest.mark.skip(reason=f"{row.name}: {row.why_not}"))
    return pytest.param(row, id=row.name, marks=marks)


@pytest.hookimpl(
    trylast=True
)  # so that kernels vary fastest, and what a test's other parameters cost is shared by them
def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("rows")
        op, *devices = marker.args
        metafunc.parametrize(
            "kernel", [_kernel_param(row) for row in ROWS[op] if not devices or device_of(row) in devices]
        )
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def pytest_collection_modifyitems(items):
    if NO_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture
def framework(request):
    """The framework native to the device of the test's `kernel` or `device`."""
    values = request.node.callspec.params
    device = device_of(values["kernel"]) if "kernel" in values else values["device"]
    chosen = native(device)
    dtype = values["kernel"].dtype if "kernel" in values else values.get("dtype", "f32")
    if reason := chosen.why_not(short_dtype(dtype)):
        pytest.skip(reason)
    return chosen


def short_dtype(name: str) -> str:
    """ "f32" of "float32" and so on; the short names stay."""
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(name, name)


def changed(case) -> str:
    """An id for a NamedTuple of options: those that are not at their default."""
    other = {name: value for name, value in case._asdict().items() if value != case._field_defaults.get(name)}
    return ",".join(f"{name}={getattr(value, 'name', value)}" for name, value in other.items()) or "defaults"


def head_dim_for(kernel, small: int) -> int:
    """A head size for a test of every kernel: small, but 128 for those that split the outputs by whole heads."""
    return 128 if "heads" in kernel.name else small


def roundings_of(kernel) -> tuple[str, ...]:
    """What a kernel of the projection takes: where the row factor joins late there is "fp32" alone. "hf_once"
    goes the way of "hf": it is left to test_roundings.py and to the calls that are drawn."""
    return ("fp32",) if kernel.name == "bf16_wgmma_sm90a" else ("hf", "fp32")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with torch, which is not installed")


@pytest.fixture
def cuda_torch():
    if reason := TORCH_CUDA.why_not():
        pytest.skip(reason)
    return TORCH_CUDA.torch


@pytest.fixture(autouse=True)
def gigabytes_given_back(request):
    """After a test on a GPU torch keeps no more than a gigabyte: other processes of the run need the memory."""
    yield
    if request.node.get_closest_marker("gpu") and "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        if cuda.is_initialized() and cuda.memory_reserved() > 2**30:
            cuda.empty_cache()


@pytest.fixture
def no_gradients():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The ops that fused layers of minivllm.transformers call, counted by name, and again where they are in place."""
    import minivllm.transformers

    counts = {}

    class Spy:
        def __getattr__(self, name):
            def call(x, *args, **kwargs):
                for key in [name] + [f"{name} in place"] * (kwargs.get("out") is x):
                    counts[key] = counts.get(key, 0) + 1
                return getattr(minivllm, name)(x, *args, **kwargs)

            return call

    for module in (minivllm.transformers.layer, minivllm.transformers.rest, minivllm.transformers.head):
        monkeypatch.setattr(module, "ops", Spy())
    return counts
