"""minivllm.jax: the ops under jit, vmap and grad, and as foreign functions of XLA."""

import subprocess
import sysconfig
from pathlib import Path

import frameworks
import numpy as np
import pytest
from cases import assert_same_bits, normal
from checks import QKV, WEIGHTS, expect_qkv, weight_data
from processes import PACKAGE, ROOT, SANITIZED, succeeds

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import to_float64

jax = pytest.importorskip("jax", reason="needs JAX")
import minivllm.jax as ops  # noqa: E402

jnp = jax.numpy
DTYPES = ("f32", "f16", "bf16")
compiles_long = pytest.mark.skipif(SANITIZED, reason="XLA compiles it for half a minute, through no other code of ours")


@pytest.fixture
def arrays(device):
    """(values, dtype) -> a JAX array on the device of the test."""
    framework = frameworks.JAX(device)
    if reason := framework.why_not():
        pytest.skip(reason)
    return framework.tensor


def packed(parts):
    return np.concatenate([to_float64(part).reshape(*part.shape[:-2], np.prod(part.shape[-2:])) for part in parts], -1)


def test_no_weight_is_ones(device, arrays):
    x, ones = (
        arrays(normal((3, 40), "bf16", "x"), "bf16"),
        jnp.ones(40, "bfloat16", device=arrays(np.ones(1), "f32").device),
    )

    def norms(weight):
        return lambda x: (ops.rms_norm(x, weight), *ops.add_rms_norm(x, x, weight, weight_offset=0.5))

    for got, expected in zip(jax.jit(norms(None))(x), norms(ones)(x)):
        assert_same_bits(got, expected)
    slopes = [jax.grad(lambda x, weight=weight: norms(weight)(x)[0].sum())(x) for weight in (None, ones)]
    assert_same_bits(*slopes)


# ---- jit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_under_jit(device, arrays, dtype, rounding):
    for shape in ((7,), (3, 40), (2, 3, 4, 33), (0, 40)):
        x, residual = normal(shape, dtype, "x"), normal(shape, dtype, "r")
        weight = normal(shape[-1:], "f32", "w", scale=0.2, mean=0.5)
        given = arrays(x, dtype), arrays(residual, dtype), arrays(weight, "f32")
        options = {"rounding": rounding, "weight_offset": 0.5, "eps": 1e-5}

        @jax.jit
        def both(x, residual, weight, options=options):
            return ops.rms_norm(x, weight, **options), *ops.add_rms_norm(x, residual, weight, **options)

        for got, added in zip(both(*given)[:2], (None, residual)):
            assert got.dtype == given[0].dtype and got.shape == shape
            expected, s = reference.rms_norm(
                x, weight, 1e-5, residual=added, rounding=rounding, weight_offset=0.5, dtype=dtype, round_last=False
            )
            flips = numeric.may_flip(s, 0.5 + weight, 1e-5, dtype) if rounding == "hf" else None
            bound = numeric.tolerance(expected, expected, dtype, length=shape[-1], gain=abs(0.5 + weight), flips=flips)
            numeric.assert_within(to_float64(got), expected, bound)
        assert_same_bits(both(*given)[2], reference.round_to(x + residual, dtype))
        assert_same_bits(ops.rms_norm(given[0], given[2], **options), both(*given)[0], "outside of jit")


@pytest.mark.parametrize("weights", ["packed", "in_out", "tuple", "tuple_in_out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_under_jit(device, arrays, dtype, weights):
    for lead, bias, residual in (
        ((1,), None, True),
        ((2, 3), "packed", False),
        ((70,), "tuple", True),
        ((0,), None, False),
    ):
        case = QKV(lead, 48, 3, 1, 8, dtype, bias=bias is not None, residual=residual)
        x, added = normal((*lead, 48), dtype, "x"), normal((*lead, 48), dtype, "r") if residual else None
        norm_weight, weight, bias_values = weight_data(case)
        options = {}
        if bias:
            parts = np.split(bias_values, np.cumsum(case.sizes)[:-1]) if bias == "tuple" else [bias_values]
            given = tuple(arrays(part, dtype) for part in parts)
            options["bias"] = given if bias == "tuple" else given[0]
        if residual:
            options["residual"] = arrays(added, dtype)
        matrix = jax.tree.map(
            lambda array: arrays(to_float64(array), dtype),
            WEIGHTS[weights](frameworks.NUMPY, weight, dtype, case.sizes),
        )

        @jax.jit
        def project(x, norm_weight, matrix, options):
            return ops.rms_norm_qkv(x, norm_weight, matrix, 3, 1, **options)

        given_x = arrays(x, dtype)
        parts = project(given_x, arrays(norm_weight, dtype), matrix, options)
        assert [part.shape for part in parts[:3]] == [(*lead, heads, 8) for heads in (3, 1, 1)]
        assert all(part.dtype == given_x.dtype for part in parts)
        expect_qkv(case, packed(parts[:3]), x, norm_weight, weight, bias_values, added)
        assert len(parts) == (4 if residual else 3)
        if residual:
            assert_same_bits(parts[3], reference.round_to(x + added, dtype))


def test_it_is_the_eager_op(device, arrays):
    """The same kernel on the same data, between other operations of XLA's."""
    x, weight = arrays(normal((5, 64), "f32", "x"), "f32"), arrays(normal((64,), "f32", "w"), "f32")
    matrix = arrays(normal((40, 64), "f32", "m"), "f32")

    @jax.jit
    def traced(x, weight, matrix):
        doubled = 2 * x
        return doubled, jnp.negative(ops.rms_norm_qkv(doubled, weight, matrix, 3, 1)[1])

    doubled, k = traced(x, weight, matrix)
    assert_same_bits(-k, minivllm.rms_norm_qkv(doubled, weight, matrix, 3, 1)[1])


@pytest.mark.gpu
def test_repeated_calls_with_changed_data(arrays, device="cuda"):
    """Enough calls in one program for XLA to capture them in a CUDA graph, prefill with its scratch and decode."""
    norm = arrays(normal((256,), "bf16", "n", scale=0.2, mean=1.0), "bf16")
    matrix = arrays(normal((256, 256), "bf16", "m", scale=1 / 16), "bf16")

    def chain(module, x):
        residual = x
        for _ in range(8):
            q, k, v, residual = module.rms_norm_qkv(x, norm, matrix, 2, 1, residual=residual, weight_layout="out_in")
            x = module.rms_norm(jnp.concatenate([q, k, v], -2).reshape(x.shape), norm)
        return x

    traced = jax.jit(lambda x: chain(ops, x))
    for tokens in (1, 3, 200):
        for key in range(5):
            x = arrays(normal((tokens, 256), "bf16", "x", tokens, key), "bf16")
            assert_same_bits(traced(x), chain(minivllm, x), f"{tokens} tokens, call {key}")


# ---- vmap -------------------------------------------------------------------------------------------------------------


@compiles_long
def test_vmap(device, arrays):
    """A batch of rows is one call, a batch of weights one for each; and that also twice, and under jit."""
    x, residual = arrays(normal((4, 2, 3, 48), "f32", "x"), "f32"), arrays(normal((4, 3, 48), "f32", "r"), "f32")
    norms = arrays(normal((4, 48), "f32", "n"), "f32")
    matrices = arrays(normal((4, 40, 48), "f32", "m"), "f32")

    def calls(x, residual, norm, matrix):
        return [*ops.rms_norm_qkv(x, norm, matrix, 3, 1, residual=residual), ops.rms_norm(x, norm)]

    def call_by_call(axes, *given):
        each = [[a if axis is None else jnp.take(a, i, axis) for a, axis in zip(given, axes)] for i in range(4)]
        return [jnp.stack(parts) for parts in zip(*[calls(*one) for one in each])]

    first = x[:, 0]
    for axes, given in (
        ((0, 0, None, None), (first, residual, norms[0], matrices[0])),
        ((0, None, None, None), (first, residual[0], norms[0], matrices[0])),
        ((None, 0, None, None), (first[0], residual, norms[0], matrices[0])),
        ((1, 0, None, None), (jnp.moveaxis(first, 0, 1), residual, norms[0], matrices[0])),
        ((0, 0, 0, None), (first, residual, norms, matrices[0])),
        ((None, None, None, 0), (first[0], residual[0], norms[0], matrices)),
    ):
        for vmapped in (jax.vmap(calls, axes), jax.jit(jax.vmap(calls, axes))):
            for got, expected in zip(vmapped(*given), call_by_call(axes, *given)):
                tolerance = numeric.tolerance(to_float64(expected), np.full(expected.shape, 48.0), "f32", length=48)
                numeric.assert_within(to_float64(got), to_float64(expected), 2 * tolerance, str(axes))
    twice = jax.vmap(jax.vmap(lambda x: ops.rms_norm(x, norms[0])))(x)
    assert_same_bits(twice, ops.rms_norm(x, norms[0]))
    assert (
        str(jax.make_jaxpr(jax.vmap(calls, (0, 0, None, None)))(first, residual, norms[0], matrices[0])).count(
            "ffi_call"
        )
        == 2
    )


# ---- grad -------------------------------------------------------------------------------------------------------------


def norm_gradients(s, gain, eps, c):
    """(d s, d weight, the size of the terms that d s is a sum of) for gradients c of y, in float64."""
    r = 1 / np.sqrt((s * s).mean(-1, keepdims=True) + eps)
    n = s * r
    terms = r * (abs(c * gain) + abs(n) * (abs(c * gain * n)).mean(-1, keepdims=True))
    return r * (c * gain - n * (c * gain * n).mean(-1, keepdims=True)), (c * n).sum(0), terms


@compiles_long
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("in_out", [False, True])
def test_gradients(device, arrays, dtype, in_out):
    """Of everything that has one, through every result, against float64; in 16 bits up to the roundings on the way."""
    tokens, hidden, qkv, eps, offset = 6, 48, 40, 1e-5, 0.5
    values = {
        "x": normal((tokens, hidden), dtype, "x"),
        "residual": normal((tokens, hidden), dtype, "r"),
        "norm_weight": normal((hidden,), dtype, "n", scale=0.2, mean=0.5),
        "qkv_weight": normal((qkv, hidden), dtype, "m", scale=0.1),
        "bias": normal((qkv,), dtype, "b"),
    }
    c, c_sum = normal((tokens, qkv), dtype, "c"), normal((tokens, hidden), dtype, "cs")
    given = {name: arrays(array, dtype) for name, array in values.items()}
    if in_out:
        given["qkv_weight"] = given["qkv_weight"].T

    def project(given):
        *parts, sums = ops.rms_norm_qkv(
            given["x"], given["norm_weight"], given["qkv_weight"], 3, 1, eps, bias=given["bias"], weight_offset=offset,
            residual=given["residual"])  # fmt: skip
        return jnp.concatenate(parts, -2).reshape(tokens, qkv), sums

    got = jax.jit(lambda given, c: jax.vjp(project, given)[1](c)[0])(given, (arrays(c, dtype), arrays(c_sum, dtype)))
    got = {name: to_float64(array) for name, array in got.items()}
    if in_out:
        got["qkv_weight"] = got["qkv_weight"].T

    s = reference.round_to(values["x"] + values["residual"], dtype)
    gain, matrix = offset + values["norm_weight"], values["qkv_weight"]
    n = s / np.sqrt((s * s).mean(-1, keepdims=True) + eps)
    d_s, d_norm, _ = norm_gradients(s, gain, eps, c @ matrix)
    _, _, terms = norm_gradients(s, gain, eps, abs(c) @ abs(matrix))
    expected = {
        "x": (d_s + c_sum, terms + abs(c_sum)),
        "residual": (d_s + c_sum, terms + abs(c_sum)),
        "norm_weight": (d_norm, (abs(c) @ abs(matrix) * abs(n)).sum(0)),
        "qkv_weight": (c.T @ (n * gain), abs(c).T @ abs(n * gain)),
        "bias": (c.sum(0), abs(c).sum(0)),
    }
    roundings = 0 if dtype == "f32" else 4
    for name, (exact, terms) in expected.items():
        bound = numeric.tolerance(exact, terms, dtype, length=hidden + qkv, roundings=roundings)
        numeric.assert_within(got[name], exact, bound, name)

    d_x, d_weight = jax.grad(
        lambda x, w: (ops.rms_norm(x, w, eps) * arrays(c_sum, dtype)).astype("float32").sum(), (0, 1)
    )(given["x"], given["norm_weight"])
    x, weight = values["x"], values["norm_weight"]
    exact_x, exact_weight, terms = norm_gradients(x, weight, eps, c_sum)
    bound = numeric.tolerance(exact_x, terms, dtype, length=hidden, roundings=roundings)
    numeric.assert_within(to_float64(d_x), exact_x, bound, "x of rms_norm")
    bound = numeric.tolerance(exact_weight, abs(c_sum * n).sum(0), dtype, length=hidden, roundings=roundings)
    numeric.assert_within(to_float64(d_weight), exact_weight, bound, "weight of rms_norm")


@compiles_long
def test_gradients_of_batches(device, arrays):
    x, weight = arrays(normal((4, 3, 48), "f32", "x"), "f32"), arrays(normal((48,), "f32", "w"), "f32")
    gradient = jax.grad(lambda x, w: jnp.sin(ops.rms_norm(x, w)).sum(), (0, 1))
    got = jax.vmap(gradient, (0, None))(x, weight)
    assert gradient(x[0, :0], weight)[0].shape == (0, 48)
    matrix = arrays(normal((40, 48), "f32", "m"), "f32")
    nothing = jax.grad(lambda m: sum(part.sum() for part in ops.rms_norm_qkv(x[:, :0], weight, m, 3, 1)))(matrix)
    assert_same_bits(nothing, np.zeros((40, 48)), "of no tokens")
    for i in range(4):
        for batched, single in zip(got, gradient(x[i], weight)):
            assert jnp.allclose(batched[i], single, rtol=1e-5, atol=1e-6)


# ---- refusals ---------------------------------------------------------------------------------------------------------

X, W, M = np.ones((3, 48), np.float32), np.ones(48, np.float32), np.ones((40, 48), np.float32)
REFUSED = [
    (lambda: ops.rms_norm(X, W[:3]), ValueError, r"rms_norm: weight has 3 elements, expected 48"),
    (lambda: jax.jit(ops.rms_norm)(X, W[:3]), ValueError, r"rms_norm: weight has 3 elements, expected 48"),
    (lambda: ops.rms_norm(X.astype(np.int32), W), TypeError, r"rms_norm: x has dtype int32, expected float32, float16 or bfloat16"),
    (lambda: ops.rms_norm(X.astype(np.float16), W.astype(jnp.bfloat16)), TypeError, r"rms_norm: weight is bfloat16, expected float16 \(the dtype of x\)"),
    (lambda: ops.rms_norm([1.0], W), TypeError, r"rms_norm: x must be a tensor .*got list"),
    (lambda: ops.rms_norm(X, W, -1.0), ValueError, r"rms_norm: eps is -1, expected a finite number"),
    (lambda: ops.rms_norm(X, W, rounding="up"), ValueError, r"rms_norm: rounding is 'up', expected"),
    (lambda: ops.rms_norm(X, W, kernel="f32_fast"), ValueError, r"rms_norm: no kernel is called 'f32_fast'"),
    (lambda: jax.jit(ops.rms_norm)(X, W, 1e-6), TypeError, r"rms_norm: eps is a JAX array, expected a Python value"),
    (lambda: ops.add_rms_norm(X, X[:2], W), ValueError, r"add_rms_norm: residual has shape \[2, 48\]"),
    (lambda: ops.rms_norm_qkv(X, W, M[:, :40], 3, 1), ValueError, r"rms_norm_qkv: qkv_weight has shape \[40, 40\]"),
    (lambda: ops.rms_norm_qkv(X[:, :40], W[:40], M[:, :40], 3, 1), ValueError, r"rms_norm_qkv: qkv_weight is square .*weight_layout"),
    (lambda: ops.rms_norm_qkv(X, W, M, 3, 1.0), TypeError, r"rms_norm_qkv: num_kv_heads must be an integer, got float"),
    (lambda: ops.rms_norm_qkv(X, W, (M, M), 3, 1), ValueError, r"rms_norm_qkv: qkv_weight has 2 members"),
    (lambda: jax.jvp(ops.rms_norm, (X, W), (X, W)), TypeError, r"forward-mode"),
    (lambda: jax.jit(minivllm.rms_norm)(X, W), TypeError, r"rms_norm: x is a tracer.*use the ops of minivllm.jax"),
]  # fmt: skip


@pytest.mark.parametrize("call,exception,message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_it_refuses(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_options_that_are_equal_are_not_the_same():
    x, weight = jnp.ones((3, 48)), jnp.ones(48)
    matrix = jnp.ones((48 * 4, 48))
    ops.rms_norm_qkv(x, weight, matrix, 2, 1)
    with pytest.raises(TypeError, match=r"rms_norm_qkv: num_heads must be an integer, got float"):
        ops.rms_norm_qkv(x, weight, matrix, 2.0, 1)
    assert (ops.rms_norm(x, weight, np.array(1e-6)) == ops.rms_norm(x, weight, 1e-6)).all()


def test_what_a_handler_refuses():
    """What only it can see comes back as an error of XLA's, in our words; nothing is written past a result."""
    kernel = "f32_prefill_portable"
    plan = minivllm._C._plan("rms_norm_qkv", -1, X, W, M, 3, 1, 1e-6, kernel=kernel)
    outputs, in_out, scratch, attributes = plan
    assert (outputs, in_out) == ((((3, 40), "float32"),), False) and scratch > 256

    def call(*arrays, out=(3, 5, 8), dtype=np.float32, scratch=scratch, **changes):
        results = [jax.ShapeDtypeStruct(out, dtype), jax.ShapeDtypeStruct((scratch,), np.uint8)]
        given = {name: value for name, value in (attributes | changes).items() if value is not None}
        return jax.ffi.ffi_call("minivllm_rms_norm_qkv", results)(*arrays, **given)[0].block_until_ready()

    expected = minivllm.rms_norm_qkv(X, W, M, 3, 1, 1e-6, kernel=kernel)
    assert_same_bits(call(X, W, M).reshape(3, 40), packed(expected))
    for bad, message in (
        (
            lambda: call(X, W, M, scratch=scratch - 1),
            rf"result 1 has room for {scratch - 1} elements, expected {scratch}",
        ),
        (lambda: call(X, W, M, out=(3, 4, 8)), r"result 0 has room for 96 elements, expected 120"),
        (lambda: call(X, W, M, dtype=np.float16), r"result 0 has room for 0 elements, expected 120"),
        (lambda: call(X, W), r"argument 2 is missing"),
        (lambda: call(X, W[:3], M), r"norm_weight has 3 elements, expected 48"),
        (lambda: call(X.astype(np.int32), W, M), r"x is int32, expected float32, float16 or bfloat16"),
        (lambda: call(X, W, M, eps=None), r"attribute eps is missing or of another type"),
        (lambda: call(X, W, M, eps=1), r"attribute eps is missing or of another type"),
        (lambda: call(X, W, M, kernel=7), r"attribute kernel is missing or of another type"),
        (lambda: call(X, W, M, kernel="k" * 200), r"attribute kernel is too long"),
        (lambda: call(X, W, M, kernel="f32_fast"), r"no kernel is called 'f32_fast'"),
        (lambda: call(X, W, M, weight_layout=7), r"rms_norm_qkv: "),
    ):
        with pytest.raises(
            Exception, match=rf"INVALID_ARGUMENT: rms_norm_qkv: {message.removeprefix('rms_norm_qkv: ')}"
        ):
            bad()


def test_a_build_without_cuda_says_so():
    if minivllm._C.cuda_archs():
        pytest.skip("this build has the CUDA backend")
    with pytest.raises(RuntimeError, match="CUDA"):
        minivllm._C._plan("rms_norm", 0, X, W)


# ---- XLA's side -------------------------------------------------------------------------------------------------------

# Ours, theirs, and the fields of each that hold the same.
STRUCTS = [
    ("xla_extension", "XLA_FFI_{Extension}", "struct_size:struct_size type:type next:next"),
    ("xla_version", "XLA_FFI_Api_Version", "extensions:extension_start major:major_version minor:minor_version"),
    ("xla_metadata", "XLA_FFI_Metadata", "struct_size:struct_size version:api_version traits:traits"),
    ("xla_metadata_extension", "XLA_FFI_Metadata_Extension", "metadata:metadata"),
    ("xla_buffer", "XLA_FFI_Buffer", "dtype:dtype data:data rank:rank dims:dims"),
    ("xla_span", "XLA_FFI_ByteSpan", "text:ptr length:len"),
    ("xla_scalar", "XLA_FFI_Scalar", "dtype:dtype value:value"),
    ("xla_buffers", "XLA_FFI_Args", "count:size types:types values:args"),
    ("xla_buffers", "XLA_FFI_Rets", "count:size types:types values:rets"),
    ("xla_attributes", "XLA_FFI_Attrs", "count:size types:types names:names values:attrs"),
    ("xla_error_create", "XLA_FFI_Error_Create_Args", "message:message code:errc"),
    ("xla_stream_get", "XLA_FFI_Stream_Get_Args", "context:ctx stream:stream"),
    ("xla_device_get", "XLA_FFI_DeviceOrdinal_Get_Args", "context:ctx ordinal:device_ordinal"),
    ("xla_api", "XLA_FFI_Api", "version:api_version internal:internal_api error_create:XLA_FFI_Error_Create "
     "stream_get:XLA_FFI_Stream_Get device_get:XLA_FFI_DeviceOrdinal_Get"),
    ("xla_call", "XLA_FFI_CallFrame", "api:api context:ctx stage:stage arguments:args results:rets attributes:attrs"),
]  # fmt: skip
CONSTANTS = {
    "XLA_MAJOR": "XLA_FFI_API_MAJOR",
    "XLA_METADATA": "XLA_FFI_Extension_Metadata",
    "XLA_COMMAND_BUFFER_COMPATIBLE": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "XLA_EXECUTE": "XLA_FFI_ExecutionStage_EXECUTE",
    "XLA_SCALAR": "XLA_FFI_AttrType_SCALAR",
    "XLA_STRING": "XLA_FFI_AttrType_STRING",
    **{f"XLA_{name}": f"XLA_FFI_DataType_{name}" for name in ("PRED", "S64", "U8", "F16", "F32", "F64", "BF16")},
    **{f"XLA_{name}": f"XLA_FFI_Error_Code_{name}" for name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "INTERNAL")},
}


def test_the_layout_is_that_of_the_installed_jaxlib(tmp_path):
    """Sizes, offsets and constants, by the compiler; the header itself is no part of the build."""
    header = "xla/ffi/api/c_api.h"
    text = Path(jax.ffi.include_dir(), header).read_text()
    extension = "XLA_FFI_InternalExtension" if "XLA_FFI_InternalExtension;" in text else "XLA_FFI_Extension_Base"
    lines = ['#include "xla_ffi_abi.h"', f"#include <{header}>"]
    lines.append('_Static_assert(XLA_BUFFER == XLA_FFI_ArgType_BUFFER && XLA_BUFFER == XLA_FFI_RetType_BUFFER, "");')
    lines += [f'_Static_assert((int){ours} == (int){theirs}, "{ours}");' for ours, theirs in CONSTANTS.items()]
    for ours, theirs, fields in STRUCTS:
        theirs = theirs.replace("XLA_FFI_{Extension}", extension)
        for pair in fields.split():
            mine, its = pair.split(":")
            lines.append(
                f"_Static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {its}) && "
                f'sizeof((({ours} *)0)->{mine}) == sizeof((({theirs} *)0)->{its}), "{ours}.{mine}");'
            )
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines) + "\n")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    done = subprocess.run(
        [
            *compiler,
            "-std=c11",
            "-fsyntax-only",
            f"-I{ROOT / 'csrc/python/xla'}",
            f"-I{jax.ffi.include_dir()}",
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_ranks_of_shard_map():
    """Each device its heads, as docs/parallel.md has it for torch."""
    succeeds(
        """
        import jax
        import numpy as np
        from jax.sharding import Mesh, PartitionSpec as P
        import minivllm
        import minivllm.jax as ops
        random = np.random.default_rng(0)
        x, norm = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 48), (48,)))
        matrix = random.standard_normal((8 * 8, 48)).astype(np.float32)
        counts = {"num_heads": 4, "num_kv_heads": 2}
        shards = [minivllm.shard_qkv(matrix, **counts, rank=rank, world_size=2) for rank in range(2)]
        mesh = Mesh(np.array(jax.devices()), ("tp",))
        def project(x, norm, matrix):
            return ops.rms_norm_qkv(x, norm, matrix[0], 2, 1)
        sharded = jax.jit(jax.shard_map(project, mesh=mesh, in_specs=(P(), P(), P("tp")), out_specs=P(None, "tp")))
        for got, whole in zip(sharded(x, norm, np.stack([s.qkv_weight for s in shards])), minivllm.rms_norm_qkv(x, norm, matrix, 4, 2)):
            assert len(got.devices()) == 2 and np.allclose(got, whole, atol=1e-4)
        """,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


@compiles_long
def test_the_example():
    printed = succeeds(None, arguments=("-m", "examples.jax_example"), paths=(PACKAGE, ROOT))
    assert "q (4, 16, 128), k (4, 8, 128), v (4, 8, 128)" in printed and "gradient (4, 1024)" in printed
