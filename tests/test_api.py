"""The face: signatures, the stub, the list of kernels, and what ran."""

import ast
import inspect
import re
import textwrap

import numpy as np
import pytest
from processes import PACKAGE, ROOT, SANITIZED, run

import minivllm
from minivllm.signatures import OPS

EMPTY = inspect.Parameter.empty


def arguments_by(op, *without):
    """As C describes them: positional and keyword-only ones, each with its default."""
    rows = [p for p in OPS[op] if p.role not in without]
    defaults = {p.name: EMPTY if p.required else p.default for p in rows}
    return tuple({p.name: defaults[p.name] for p in rows if p.positional == positional} for positional in (True, False))


def arguments_of(function):
    parameters = inspect.signature(function).parameters.values()
    parameters = [p for p in parameters if p.name != "self" and p.kind is not p.VAR_POSITIONAL]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    keyword_only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert len(positional) + len(keyword_only) == len(parameters)
    return positional, keyword_only


def in_order(arguments):
    return [list(part.items()) for part in arguments]


def test_the_ops_are_public():
    assert set(OPS) <= set(minivllm.__all__)
    assert arguments_by("rms_norm") == (
        {"x": EMPTY, "weight": EMPTY, "eps": 1e-6},
        {"out": None, "rounding": "hf", "weight_offset": 0.0, "kernel": None},
    )


@pytest.mark.parametrize("name", OPS)
def test_signatures(name):
    """The docstring, where inspect.signature() looks, says what the table of the parser does."""
    assert in_order(arguments_of(getattr(minivllm, name))) == in_order(arguments_by(name))


@pytest.mark.parametrize("name", OPS)
def test_signatures_in_torch(name):
    module = pytest.importorskip("minivllm.torch", reason="needs torch, which is not installed")
    assert in_order(arguments_of(getattr(module, name))) == in_order(arguments_by(name))


@pytest.mark.parametrize("name", [name for name in OPS if name != "fused_add_rms_norm"])
def test_signatures_in_jax(name):
    """Arrays of JAX never change, so none is told where to write."""
    module = pytest.importorskip("minivllm.jax", reason="needs jax, which is not installed")
    assert in_order(arguments_of(getattr(module, name))) == in_order(arguments_by(name, "output"))
    assert name in module.__all__


def test_signatures_of_the_layer():
    """What a layer holds is all that an op takes, but for what differs from call to call."""
    assert arguments_of(minivllm.FusedRMSNormQKV.forward) == arguments_by("rms_norm_qkv")
    positional, options = arguments_by("rms_norm_qkv", "rows", "output")
    held = positional | options
    del held["kernel"]
    own = {"static_weights": None, "prepack": False}
    assert arguments_of(minivllm.FusedRMSNormQKV) == ({}, held | own)
    positional, options = arguments_by("rms_norm_qkv", "weight", "option")
    assert arguments_of(minivllm.FusedRMSNormQKV.__call__) == (positional, options)


def test_signatures_of_the_modules_of_torch(torch):
    """They own the weights, and let the shape of those speak; the rest is as in the ops."""
    from minivllm import nn

    place = {"device": None, "dtype": None}
    _, options = arguments_by("rms_norm", "weight", "output")
    del options["kernel"]
    assert arguments_of(nn.RMSNorm) == ({"hidden": EMPTY, "eps": 1e-6}, options | place)
    positional, options = arguments_by("rms_norm_qkv", "rows", "weight", "output")
    for name in ("kernel", "weight_layout", "head_dim"):
        del options[name]
    of_parts = positional | {"eps": None}  # None: that of the module
    assert arguments_of(nn.FusedRMSNormQKV.from_modules)[1] == of_parts | options
    eps = positional.pop("eps")
    own = {"bias": False, "packed": True}
    sizes = {"hidden": EMPTY} | positional | {"head_dim": None, "eps": eps}
    assert arguments_of(nn.FusedRMSNormQKV) == (sizes, own | options | place)
    _, of_call = arguments_by("rms_norm_qkv", "weight", "option", "output")
    assert arguments_of(nn.FusedRMSNormQKV.forward) == ({"x": EMPTY} | of_call, {})


def test_signatures_of_the_buffers():
    assert arguments_of(minivllm.empty)[0] == {"shape": EMPTY, "dtype": "float32", "device": "cuda:0"}
    assert arguments_of(minivllm.to_device)[0] == {"array": EMPTY, "device": "cuda:0", "dtype": None, "stream": None}


def test_arguments_work_by_position_and_by_name():
    x, weight, matrix = np.ones((2, 8), np.float32), np.ones(8, np.float32), np.ones((16, 8), np.float32)
    by_position = minivllm.rms_norm_qkv(x, weight, matrix, 2, 1, 1e-5)
    by_name = minivllm.rms_norm_qkv(eps=1e-5, num_kv_heads=1, num_heads=2, qkv_weight=matrix, norm_weight=weight, x=x)
    assert all((a == b).all() for a, b in zip(by_position, by_name))
    assert (
        minivllm.add_rms_norm(x, x, weight, 1e-5)[0]
        == minivllm.add_rms_norm(weight=weight, residual=x, x=x, eps=1e-5)[0]
    ).all()


@pytest.mark.parametrize(
    "name", [*OPS, "FusedRMSNormQKV", "DeviceArray", "kernels", "last_kernel", "empty", "to_device", "shard_qkv"]
)
def test_everything_public_is_documented(name):
    assert name in minivllm.__all__
    assert len((getattr(minivllm, name).__doc__ or "").split()) >= 8


@pytest.mark.parametrize("name", OPS)
def test_the_docstring_of_an_op_explains_every_argument(name):
    text = getattr(minivllm, name).__doc__
    explained = re.findall(r"\w+", text)
    for word in [*(p.name for p in OPS[name]), "TypeError", "ValueError"]:
        assert word in explained, f"{name}: {word}"


def stub():
    return ast.parse((ROOT / "minivllm" / "_C.pyi").read_text())


def test_the_stub_matches_the_module():
    declared = {node.name for node in stub().body if isinstance(node, ast.FunctionDef)}
    declared |= {node.target.id for node in stub().body if isinstance(node, ast.AnnAssign)}
    there = {name for name in dir(minivllm._C) if not name.startswith("__")}
    public = {name for name in there if not name.startswith("_")}
    assert public <= declared, f"not in the stub: {public - declared}"
    assert declared <= there, f"only in the stub: {declared - there}"


def variants_of(name):
    """The stub's declarations of a function; one with several is an object that can be called."""
    functions = [node for node in stub().body if isinstance(node, ast.FunctionDef) and node.name == name]
    if functions:
        return functions
    (kind,) = [n.annotation.id for n in stub().body if isinstance(n, ast.AnnAssign) and n.target.id == name]
    (protocol,) = [node for node in stub().body if isinstance(node, ast.ClassDef) and node.name == kind]
    return protocol.body


@pytest.mark.parametrize("name", OPS)
def test_the_stub_has_the_right_arguments(name):
    variants = variants_of(name)
    assert len(variants) == (2 if any(p.name == "residual" and not p.required for p in OPS[name]) else 1)
    for node in variants:
        arguments = [argument for argument in node.args.args if argument.arg != "self"]
        required = [EMPTY] * (len(arguments) - len(node.args.defaults))
        written = [*node.args.defaults, *node.args.kw_defaults]
        defaults = [*required, *(EMPTY if default is None else ast.literal_eval(default) for default in written)]
        declared = [argument.arg for argument in [*arguments, *node.args.kwonlyargs]]
        positional, options = arguments_by(name)
        with_residual = {"residual": EMPTY} if node in variants[1:] else {}
        assert dict(zip(declared, defaults)) == positional | options | with_residual
        assert declared == [*positional, *options]


def test_type_checkers_see_how_a_layer_is_called():
    """C adds `__call__`, so layers.py declares it for them: three results, or with a residual four."""
    tree = ast.parse((ROOT / "minivllm" / "layers.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__call__"]
    real = list(inspect.signature(minivllm.FusedRMSNormQKV.__call__).parameters)
    for node in calls:
        assert [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]] == real
        assert len(node.args.kwonlyargs) == 3
    overloads = [node for node in calls if node.decorator_list]
    assert [len(node.returns.slice.elts) for node in overloads] == [3, 4]


def python_functions():
    """Every Python function that a user calls, methods included."""
    for name in minivllm.__all__:
        found = getattr(minivllm, name)
        members = [found] if inspect.isfunction(found) else []
        if inspect.isclass(found) and not issubclass(found, tuple):
            members = [
                getattr(member, "fget", None) or getattr(member, "__func__", member)
                for base in found.__mro__[:-1]
                for key, member in vars(base).items()
                if not key.startswith("_") or key == "__init__"
            ]
        yield from (member for member in members if inspect.isfunction(member))


def test_what_python_declares_is_annotated():
    functions = list(python_functions())
    assert {"__init__", "refresh", "numpy", "empty", "to_device", "kernels"} <= {f.__name__ for f in functions}
    for function in functions:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        missing = [p.name for p in parameters if p.annotation is EMPTY]
        assert not missing, f"{function.__qualname__}: {missing}"
        assert signature.return_annotation is not EMPTY, function.__qualname__


TYPED = """
    from typing import Any

    import minivllm

    class Tensor:
        shape: tuple[int, ...]
        dtype: str

    def use(x: Tensor, array: Any) -> None:
        layer = minivllm.FusedRMSNormQKV(norm_weight=x, qkv_weight=(x, x, x), num_heads=3, num_kv_heads=1, prepack=True)
        q, k, v = layer(x)
        reveal_type(q)  # Tensor
        reveal_type(layer(x, residual=x))  # tuple[Tensor, Tensor, Tensor, Tensor]
        reveal_type(layer.forward(x, x, x, 3, 1))  # tuple[Tensor, Tensor, Tensor]
        reveal_type(layer.forward(x, x, x, 3, 1, residual=x))  # tuple[Tensor, Tensor, Tensor, Tensor]
        reveal_type(minivllm.rms_norm(x, x, rounding="fp32"))  # Tensor
        reveal_type(layer.refresh())  # None
        reveal_type(layer.hidden)  # int
        reveal_type(minivllm.to_device(array, dtype="float16"))  # DeviceArray
        reveal_type(layer(minivllm.empty((2, 8)))[2])  # DeviceArray
        reveal_type(minivllm.empty(8).shape)  # tuple[int, ...]
        reveal_type(minivllm.__version__)  # str
        minivllm.set_num_threads(n=2)
"""


TYPED_WITH_TORCH = """
    import torch

    import minivllm.nn
    import minivllm.transformers

    def use(x: torch.Tensor, model: torch.nn.Module) -> None:
        layer = minivllm.nn.FusedRMSNormQKV(64, 4, 2, bias=True, device="cpu", rounding="fp32")
        reveal_type(layer(x))  # tuple[Tensor, Tensor, Tensor]
        reveal_type(layer(x, x))  # tuple[Tensor, Tensor, Tensor, Tensor]
        layer = layer.from_modules(minivllm.nn.RMSNorm(64), torch.nn.Linear(64, 128), num_heads=4, num_kv_heads=2)
        decoder_layer = minivllm.nn.DecoderLayer(64, 128, 4, 2, qk_norm=True, packed=True, window=8)
        reveal_type(decoder_layer(x, None, None, key_cache=x, value_cache=x, positions=x))  # Tensor
        reveal_type(minivllm.nn.GatedMLP(64, 128, activation="gelu")(x, minivllm.nn.RMSNorm(64)))  # Tensor
        report = minivllm.transformers.apply(model, packed=True, fused_tokens=None, rounding="hf")
        reveal_type(report)  # Report
        reveal_type(report.fused)  # list[str]
        reveal_type(report.left_alone)  # dict[str, str]
        reveal_type(report.undo())  # None
        minivllm.transformers.undo(model)
"""


def run_mypy(tmp_path, script, skipped, *files):
    """mypy --strict on a script and files of the package, without reading some libraries: the types it reveals, beside
    those that the script expects."""
    pytest.importorskip("mypy.api", reason="needs mypy, which is not installed")
    path, config = tmp_path / "script.py", tmp_path / "mypy.ini"
    path.write_text(textwrap.dedent(script))
    config.write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-{skipped}]\nfollow_imports = skip\n")
    options = [f"--config-file={config}", f"--cache-dir={tmp_path / 'cache'}", str(path), *map(str, files)]
    done = run(None, arguments=("-m", "mypy", *options), timeout=600, MYPYPATH=PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    kinds = [re.sub(r"\b(script|minivllm\.[a-z_.]+|torch\._tensor|builtins)\.", "", kind) for kind in revealed]
    return kinds, re.findall(r"reveal_type\(.*\)  # (.*)", script)


@pytest.mark.skipif(SANITIZED, reason="it runs mypy alone, which takes minutes there")
def test_mypy_reveals_the_right_types(tmp_path):
    revealed, expected = run_mypy(tmp_path, TYPED, "torch.*")  # nothing here is torch's: its 1,400 files take long
    assert revealed == expected


@pytest.mark.skipif(SANITIZED, reason="it runs mypy alone, which takes minutes there")
def test_mypy_accepts_what_stands_on_torch(tmp_path):
    """In full, on the types of torch; transformers would be as much again."""
    pytest.importorskip("torch", reason="its types are torch's, which is not installed")
    package = PACKAGE / "minivllm"
    files = [*package.glob("nn*.py"), package / "torch_layers.py", *sorted((package / "transformers").glob("*.py"))]
    revealed, expected = run_mypy(tmp_path, TYPED_WITH_TORCH, "transformers.*,sympy.*,numpy.*", *files)
    assert revealed == expected


def test_there_is_a_py_typed():
    assert (ROOT / "minivllm" / "py.typed").exists()


def test_the_list_of_kernels():
    rows = minivllm.kernels()
    assert {row.op for row in rows} >= {"rms_norm", "add_rms_norm", "rms_norm_qkv"}
    for row in rows:
        assert row._fields == ("op", "name", "dtype", "isa", "usable", "why_not")
        assert row.dtype in ("float32", "float16", "bfloat16")
        short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[row.dtype]
        assert row.name.startswith(short + "_") and row.name.endswith(row.isa)
        assert bool(row.why_not) == (not row.usable)
    for op in ("rms_norm", "add_rms_norm", "rms_norm_qkv"):
        names = [row.name for row in minivllm.kernels(op)]
        assert len(set(names)) == len(names)
        assert {
            f"{dtype}_{kind}portable"
            for dtype in ("f32", "f16", "bf16")
            for kind in (("decode_", "prefill_") if op == "rms_norm_qkv" else ("",))
        } <= set(names)
    with pytest.raises(ValueError, match="kernels: there is no op 'attention'; the ops are rms_norm, "):
        minivllm.kernels("attention")


def test_what_ran_last():
    x, weight, matrix = np.ones((3, 8), np.float32), np.ones(8, np.float32), np.ones((16, 8), np.float32)
    minivllm.rms_norm(x, weight)
    ran = minivllm.last_kernel()
    assert ran.op == "rms_norm" and ran.name in {row.name for row in minivllm.kernels("rms_norm") if row.usable}
    assert "tokens=3 hidden=8" in ran.why and "cheapest" in ran.why
    minivllm.fused_add_rms_norm(x, x.copy(), weight)
    assert minivllm.last_kernel().op == "fused_add_rms_norm"
    minivllm.rms_norm_qkv(x, weight, matrix, 2, 1, kernel="f32_prefill_portable")
    ran = minivllm.last_kernel()
    assert (
        (ran.op, ran.name) == ("rms_norm_qkv", "f32_prefill_portable")
        and "forced" in ran.why
        and "outputs=16" in ran.why
    )
    with pytest.raises(ValueError):
        minivllm.rms_norm(x, weight[:7])
    assert minivllm.last_kernel() == ran, "a refused call runs nothing"


def test_a_forced_kernel_that_this_machine_cannot_run_is_refused():
    x, weight = {}, {}
    for dtype, kind in (("float32", np.float32), ("float16", np.float16)):
        x[dtype], weight[dtype] = np.ones((2, 8), kind), np.ones(8, kind)
    tried = 0
    for row in minivllm.kernels("rms_norm"):
        if not row.usable and row.dtype in x:
            with pytest.raises((ValueError, RuntimeError), match=row.name):
                minivllm.rms_norm(x[row.dtype], weight[row.dtype], kernel=row.name)
            tried += 1
    if not tried:
        pytest.skip("every kernel is usable here")


@pytest.mark.parametrize("value,lines", [("1", 2), ("0", 0), (None, 0)])
def test_the_log(value, lines):
    done = run(
        """
        import numpy as np
        import minivllm
        x, weight = np.ones((3, 8), np.float32), np.ones(8, np.float32)
        minivllm.rms_norm(x, weight)
        minivllm.rms_norm_qkv(x, weight, np.ones((16, 8), np.float32), 2, 1, kernel="f32_decode_portable")
        minivllm.rms_norm(x[:0], weight)
        """,
        MINIVLLM_LOG=value,
    )
    assert done.returncode == 0, done.stderr
    logged = [line for line in done.stderr.splitlines() if line.startswith("minivllm: ")]
    assert len(logged) == lines == len(done.stderr.splitlines())
    if lines:
        assert "rms_norm ran f32_" in logged[0] and "tokens=3 hidden=8" in logged[0]
        assert "rms_norm_qkv ran f32_decode_portable" in logged[1] and "forced" in logged[1]


def test_steps_of_a_call_are_counted_when_asked():
    x, weight = np.ones((4, 64), np.float32), np.ones(64, np.float32)
    minivllm._C._steps(True)
    minivllm.rms_norm(x, weight)
    minivllm.rms_norm(x, weight)
    counted = minivllm._C._steps(False)
    assert len(counted) == 5 and min(counted) > 0
    minivllm.rms_norm(x, weight)
    assert minivllm._C._steps(False) == (0, 0, 0, 0, 0)
