"""Every refusal: its exception, and the message that names the op, the argument, what was got and what was expected."""

import numpy as np
import pytest
from cases import CANARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import (
    ACT_AND_MUL_REFUSALS,
    ADD_REFUSALS,
    GELU_REFUSALS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    NORM_REFUSALS,
    QKV,
    QKV_REFUSALS,
    Inputs,
)

import minivllm
from minivllm.testing.reference import to_float64


@pytest.fixture
def inputs(device, framework):
    return Inputs(framework)


def refuses(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def cases(refusals):
    return [pytest.param(spoil, exception, message, id=what) for what, spoil, exception, message in refusals]


@pytest.mark.parametrize("spoil,exception,message", cases(NORM_REFUSALS))
def test_rms_norm_refuses(inputs, spoil, exception, message):
    refuses(lambda: inputs.norm(**spoil(inputs)), exception, message)
    with pytest.raises(exception, match=r"^rms_norm(\(\))?: |rms_norm"):
        inputs.norm(**spoil(inputs))


@pytest.mark.parametrize("spoil,exception,message", cases([*NORM_REFUSALS, *ADD_REFUSALS]))
def test_add_rms_norm_refuses(inputs, spoil, exception, message):
    changes = spoil(inputs)
    if "x" in changes and not isinstance(changes["x"], (list, type, type(None))):
        changes["residual"] = changes["x"]
    refuses(lambda: inputs.add_norm(**changes), exception, message)
    with pytest.raises(exception, match=r"add_rms_norm"):
        inputs.add_norm(**changes)


@pytest.mark.parametrize("spoil,exception,message", cases(QKV_REFUSALS))
def test_rms_norm_qkv_refuses(inputs, spoil, exception, message):
    refuses(lambda: inputs.qkv(**spoil(inputs)), exception, message)
    with pytest.raises(exception, match=r"rms_norm_qkv"):
        inputs.qkv(**spoil(inputs))


SUMS = [refusal for refusal in ADD_REFUSALS if not refusal[0].startswith("residual_out")]


@pytest.mark.parametrize("spoil,exception,message", cases([*NORM_REFUSALS, *SUMS]))
def test_norm_add_refuses(inputs, spoil, exception, message):
    changes = spoil(inputs)
    if "x" in changes and not isinstance(changes["x"], (list, type, type(None))):
        changes["residual"] = changes["x"]
    refuses(lambda: inputs.norm_add(**changes), exception, message)
    with pytest.raises(exception, match=r"norm_add"):
        inputs.norm_add(**changes)


@pytest.mark.parametrize("spoil,exception,message", cases(ACT_AND_MUL_REFUSALS))
def test_silu_and_mul_refuses(inputs, spoil, exception, message):
    refuses(lambda: inputs.silu(**spoil(inputs)), exception, message)
    with pytest.raises(exception, match=r"^silu_and_mul(\(\))?: |silu_and_mul"):
        inputs.silu(**spoil(inputs))


@pytest.mark.parametrize("spoil,exception,message", cases([*ACT_AND_MUL_REFUSALS, *GELU_REFUSALS]))
def test_gelu_and_mul_refuses(inputs, spoil, exception, message):
    refuses(lambda: inputs.gelu(**spoil(inputs)), exception, message)
    with pytest.raises(exception, match=r"^gelu_and_mul(\(\))?: |gelu_and_mul"):
        inputs.gelu(**spoil(inputs))


def test_what_the_norm_refuses_the_projection_refuses(inputs):
    for _, spoil, exception, message in NORM_REFUSALS:
        changes = spoil(inputs)
        if "out" in changes or "weight" in changes or "kernel" in changes:
            continue
        refuses(lambda: inputs.qkv(**changes), exception, message)


def test_refused_calls_write_nothing(inputs):
    out = inputs.framework.full((5, HIDDEN), CANARY, "f32")
    packed = inputs.framework.full((5, QKV), CANARY, "f32")
    for call, options in (
        (inputs.norm, {"out": out, "eps": -1.0}),
        (inputs.norm, {"out": out, "weight": inputs.full(63)}),
        (inputs.add_norm, {"residual_out": out, "residual": inputs.full(5, 63)}),
        (inputs.qkv, {"out": packed, "num_heads": 4}),
        (inputs.qkv, {"out": packed, "bias": inputs.full(39)}),
    ):
        with pytest.raises(ValueError):
            call(**options)
    assert (to_float64(out) == CANARY).all() and (to_float64(packed) == CANARY).all()


def test_missing_and_surplus_arguments(inputs):
    x, weight, matrix = inputs.x, inputs.weight, inputs.matrix
    refuses(lambda: minivllm.rms_norm(x), TypeError, "weight")
    refuses(lambda: minivllm.rms_norm(), TypeError, "x")
    refuses(lambda: minivllm.rms_norm(x, weight, 1e-6, x), TypeError, r"positional|at most 3")
    refuses(lambda: minivllm.rms_norm(x, weight, x=x), TypeError, "x")
    refuses(lambda: minivllm.add_rms_norm(x, weight), TypeError, "weight")
    refuses(lambda: minivllm.fused_add_rms_norm(x, x, weight, 1e-6, 1), TypeError, r"positional|at most 4")
    refuses(lambda: minivllm.fused_add_rms_norm(x, inputs.residual, weight, kernel="f32_avx2"), TypeError, "kernel")
    refuses(lambda: minivllm.rms_norm_qkv(x, weight, matrix, 3), TypeError, "num_kv_heads")
    refuses(lambda: minivllm.rms_norm_qkv(x, weight, matrix, 3, 1, 1e-6, None), TypeError, r"positional|at most 6")


def test_surplus_arguments_are_given_by_name(inputs):
    x, weight = inputs.x, inputs.weight
    refuses(
        lambda: minivllm.rms_norm(x, weight, 1e-6, x),
        TypeError,
        r"takes at most 3 positional arguments \(x, weight, eps\), got 4; the others are given by name, such as out=$",
    )
    refuses(
        lambda: minivllm.fused_add_rms_norm(x, x, weight, 1e-6, 1),
        TypeError,
        r"\(x, residual, weight, eps\), got 5; the others are given by name, such as rounding=$",
    )


@pytest.mark.parametrize(
    "typo,meant",
    [
        ("wieght", "weight"),
        ("weigth", "weight"),
        ("weigh", "weight"),
        ("eps_", "eps"),
        ("kernal", "kernel"),
        ("outt", "out"),
    ],
)
def test_a_keyword_with_a_typo(inputs, typo, meant):
    refuses(
        lambda: minivllm.rms_norm(inputs.x, **{typo: 1}), TypeError, f"has no argument {typo}, did you mean {meant};"
    )


@pytest.mark.parametrize("name", ["y", "scale", "weights_", "\udc80", ""])
def test_a_keyword_like_no_other(inputs, name):
    refuses(
        lambda: minivllm.rms_norm(inputs.x, **{name: 1}), TypeError, r"has no argument .?.*; it takes x, weight, eps"
    )
    with pytest.raises(TypeError) as refusal:
        minivllm.rms_norm(inputs.x, **{name: 1})
    assert "did you mean" not in str(refusal.value)


def test_fused_add_rms_norm_names_itself(inputs):
    refuses(
        lambda: minivllm.fused_add_rms_norm(inputs.x, inputs.full(4, 64), inputs.weight),
        ValueError,
        r"fused_add_rms_norm: residual has shape",
    )
    refuses(
        lambda: minivllm.fused_add_rms_norm(inputs.x, inputs.x, inputs.weight),
        ValueError,
        r"fused_add_rms_norm: .*overlap",
    )


def test_numbers_of_any_kind_are_numbers(inputs):
    """eps may be an int or a NumPy scalar, a head count anything with __index__."""
    exact = to_float64(inputs.norm(eps=1.0))
    for eps in (1, np.float32(1.0), np.float64(1.0), np.int64(1)):
        assert (to_float64(inputs.norm(eps=eps)) == exact).all()
    assert tuple(inputs.qkv(num_heads=np.int64(3), num_kv_heads=np.int32(1))[0].shape) == (5, 3, 8)


@pytest.mark.parametrize(
    "dtype", ["float64", "int32", "uint8", "bool", "complex64", "int16", "S4", "object", "datetime64[s]"]
)
def test_other_dtypes_of_numpy(dtype):
    x = np.zeros((2, 8), dtype)
    weight = np.ones(8, np.float32)
    refuses(lambda: minivllm.rms_norm(x, weight), TypeError, r"rms_norm: x has .*expected float32, float16 or bfloat16")
    refuses(
        lambda: minivllm.rms_norm(np.zeros((2, 8), np.float32), np.zeros(8, dtype)), TypeError, r"rms_norm: weight has "
    )


FIX = r"expected float32, float16 or bfloat16; convert it, such as by "


def test_another_dtype_and_its_fix(torch):
    x, weight = torch.ones(2, 8), torch.ones(8)
    fix = FIX + r"\.to\(torch\.float32\)$"
    refuses(lambda: minivllm.rms_norm(x.double(), weight), TypeError, r"^rms_norm: x has dtype torch\.float64, " + fix)
    refuses(
        lambda: minivllm.rms_norm(x.double().requires_grad_(), weight), TypeError, r"x has dtype torch\.float64, " + fix
    )
    small = x.to(torch.float8_e4m3fn)
    refuses(lambda: minivllm.rms_norm(small, weight), TypeError, r"x has dtype torch\.float8_e4m3fn, " + fix)
    refuses(
        lambda: minivllm.rms_norm(np.ones((2, 8)), np.ones(8, np.float32)),
        TypeError,
        r"^rms_norm: x has dtype float64, " + FIX + r"\.astype\('float32'\)$",
    )


def test_what_is_no_tensor_and_its_fix(torch):
    x, weight = torch.ones(2, 8), torch.ones(8)
    refuses(
        lambda: minivllm.rms_norm_qkv(x, weight, torch.nn.Linear(8, 24), 1, 1),
        TypeError,
        r"^rms_norm_qkv: qkv_weight must be a tensor .*, got torch\.nn\.modules\.linear\.Linear; pass its \.weight$",
    )

    class Linear(torch.nn.Module):
        """As peft wraps one: its weight is not all that it computes with."""

        __module__ = "peft.tuners.lora.layer"

        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(8, 24)
            self.weight = self.base_layer.weight

    refuses(
        lambda: minivllm.FusedRMSNormQKV(norm_weight=weight, qkv_weight=Linear(), num_heads=1, num_kv_heads=1),
        TypeError,
        r"^FusedRMSNormQKV: qkv_weight must be a tensor .*, got peft\.tuners\.lora\.layer\..*Linear; merge what wraps "
        r"its base_layer into that, such as by merge_and_unload\(\), and pass the \.weight$",
    )
    for shape in ((8,), [8], torch.Size([8]), 8):
        refuses(
            lambda: minivllm.rms_norm(x, shape, weight),
            TypeError,
            r"^rms_norm: weight must be a tensor .*; it takes no shape, as torch's rms_norm does: rms_norm\(x, weight\)$",
        )
    for wrong, name in (([1.0], "list"), ((1.0, 2.0), "tuple")):
        refuses(
            lambda: minivllm.rms_norm(x, wrong), TypeError, rf"weight must be a tensor .*, got {name}; make an array"
        )
    for wrong, name in ((1.0, "float"), (torch.nn.Linear, "type")):
        refuses(lambda: minivllm.rms_norm(x, wrong), TypeError, rf"weight must be a tensor .*, got {name}$")


def test_the_wrong_byte_order():
    swapped = np.zeros((2, 8), np.dtype(np.float32).newbyteorder())
    refuses(
        lambda: minivllm.rms_norm(swapped, np.ones(8, np.float32)),
        TypeError,
        r"rms_norm: x is not in this machine's byte order",
    )


def test_mixed_16_bit_types():
    torch = pytest.importorskip("torch", reason="compares dtypes of torch, which is not installed")
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    refuses(
        lambda: minivllm.rms_norm(x, torch.ones(8, dtype=torch.float16)),
        TypeError,
        r"weight is float16, expected bfloat16 \(the dtype of x\) or float32",
    )
    refuses(
        lambda: minivllm.add_rms_norm(x, x.half(), torch.ones(8)), TypeError, r"residual is float16, expected bfloat16"
    )
    refuses(
        lambda: minivllm.add_rms_norm(x, x.float(), torch.ones(8)), TypeError, r"residual is float32, expected bfloat16"
    )


def test_a_misaligned_address_is_refused():
    raw = np.zeros(4 * 9 + 1, np.uint8)[1:]
    x = raw[: 4 * 8].view(np.float32).reshape(1, 8) if raw.ctypes.data % 4 else raw[1:33].view(np.float32).reshape(1, 8)
    assert x.ctypes.data % 4
    refuses(
        lambda: minivllm.rms_norm(x, np.ones(8, np.float32)), (ValueError, BufferError), r"rms_norm: x .*address|align"
    )


def test_read_only_outputs(inputs):
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    out = np.full((2, 8), CANARY, np.float32)
    out.flags.writeable = False
    refuses(lambda: minivllm.rms_norm(x, weight, out=out), ValueError, r"rms_norm: out is read-only")
    refuses(
        lambda: minivllm.add_rms_norm(x, x, weight, residual_out=out),
        ValueError,
        r"add_rms_norm: residual_out is read-only",
    )
    refuses(lambda: minivllm.fused_add_rms_norm(out, x, weight), ValueError, r"read-only")
    assert (out == CANARY).all()
    x.flags.writeable = weight.flags.writeable = False
    assert minivllm.rms_norm(x, weight).flags.writeable  # as inputs they are welcome


@pytest.mark.gpu
def test_tensors_on_different_devices(cuda_torch):
    torch = cuda_torch
    x, weight = torch.ones(2, 8, device="cuda"), torch.ones(8)
    refuses(lambda: minivllm.rms_norm(x, weight), ValueError, r"weight is on cpu, expected cuda:0 \(where x is\)")
    refuses(lambda: minivllm.rms_norm(x.cpu(), weight.cuda()), ValueError, r"weight is on cuda:0, expected cpu")
    refuses(
        lambda: minivllm.rms_norm(x, weight.cuda(), out=torch.ones(2, 8)), ValueError, r"out is on cpu, expected cuda:0"
    )
    refuses(
        lambda: minivllm.rms_norm(x, weight.cuda(), kernel="f32_portable"),
        ValueError,
        r"kernel 'f32_portable' runs on the CPU, x is on a GPU; leave kernel= away",
    )


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.sampled_from(
        [
            object(),
            type,
            print,
            {},
            range(3),
            slice(None),
            1j,
            np.float32,
            np.float32(1),
            np.zeros(0),
            np.zeros((0, 64), np.float32),
        ]
    ),
    st.builds(lambda shape: np.ones(shape, np.float32), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    st.just(np.ones((5, 64), np.float32)),
    st.just(np.ones(64, np.float32)),
    st.just(np.ones((40, 64), np.float32)),
    st.tuples(*[st.sampled_from([np.ones((8, 64), np.float32), None, 3])] * 3),
)
NAMES = ["eps", "out", "residual", "residual_out", "bias", "head_dim", "rounding", "weight_layout", "weight_offset", "batch_invariant",
         "allow_tf32", "static_weights", "kernel", "x", "norm_weight", "qkv_weight", "num_heads", "num_kv_heads", "bogus"]  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=4), st.lists(ANYTHING, max_size=7))
def test_any_nonsense_is_refused_or_computed(changes, positional):
    """Whatever is passed, there is a result or one of the documented exceptions, and no crash."""
    good = {
        "x": np.ones((5, HIDDEN), np.float32),
        "norm_weight": np.ones(HIDDEN, np.float32),
        "qkv_weight": np.ones((QKV, HIDDEN), np.float32),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
    }
    documented = (TypeError, ValueError, BufferError, OverflowError)
    for call in (
        lambda: minivllm.rms_norm_qkv(**(good | changes)),
        lambda: minivllm.rms_norm_qkv(*positional, **changes),
        lambda: minivllm.rms_norm(*positional),
        lambda: minivllm.add_rms_norm(*positional),
    ):
        try:
            result = call()
        except documented as error:
            assert str(error)
        else:
            assert result is not None


def test_the_good_arguments_are_good(inputs):
    """The refusals above are about what they spoil."""
    assert tuple(inputs.norm().shape) == (5, HIDDEN)
    assert len(inputs.add_norm()) == 2
    assert tuple(inputs.qkv()[0].shape) == (5, HEADS, 8)


def test_a_plan_for_jax_does_not_go_to_torch(torch):
    """Its arguments are only looked at, whatever they are: nothing is handed over, and no op runs."""
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8)
    minivllm.rms_norm(np.ones((3, 16), np.float32), np.ones(16, np.float32))
    before = minivllm.last_kernel()
    outputs, _, _, attributes = minivllm._C._plan("rms_norm", -1, x, weight, 1e-5)
    assert outputs == (((2, 8), "float32"),) and attributes["eps"] == 1e-5
    assert minivllm.last_kernel() == before


@pytest.mark.parametrize("weights", ["packed", "tuple", "tuple with squares"])
@pytest.mark.parametrize("in_out", [False, True])
def test_a_plan_tells_the_layout_of_the_weights(weights, in_out):
    """As the op decides it, for those who compute with the weights themselves: gradients, and copies of a layer's."""
    x, norm = np.ones((2, 16), np.float32), np.ones(16, np.float32)
    sizes, heads = {
        "packed": ((32,), (2, 1)),
        "tuple": ((24, 8, 8), (3, 1)),
        "tuple with squares": ((16, 8, 8), (2, 1)),
    }[weights]
    matrices = [np.ones((16, n) if in_out else (n, 16), np.float32) for n in sizes]
    given = matrices[0] if weights == "packed" else tuple(matrices)
    named = "in_out" if in_out else "out_in"
    for layout in ("auto", named):
        assert minivllm._C._plan("rms_norm_qkv", -1, x, norm, given, *heads, weight_layout=layout)[1] == in_out
        layer = minivllm.FusedRMSNormQKV(
            norm_weight=norm,
            qkv_weight=given,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            weight_layout=layout,
            prepack=True,
        )
        assert layer._packed.shape == (sum(sizes), 16)
    square = np.ones((16, 16), np.float32)
    assert minivllm._C._plan("rms_norm_qkv", -1, x, norm, square, 2, 1, weight_layout=named)[1] == in_out
    refuses(lambda: minivllm._C._plan("rms_norm_qkv", -1, x, norm, square, 2, 1), ValueError, "is square")
    assert minivllm._C._plan("rms_norm", -1, x, norm)[1] is False


def test_set_num_threads_by_name():
    before = minivllm.get_num_threads()
    try:
        minivllm.set_num_threads(n=1)
        assert minivllm.get_num_threads() == 1
        refuses(lambda: minivllm.set_num_threads(n="1"), TypeError, "set_num_threads: n must be an integer, got str")
        refuses(lambda: minivllm.set_num_threads(True), TypeError, "set_num_threads: n must be an integer, got bool")
        refuses(lambda: minivllm.set_num_threads(), TypeError, "set_num_threads: n is missing")
        refuses(lambda: minivllm.set_num_threads(1025), ValueError, "set_num_threads: n is 1025, expected at most 1024")
        assert minivllm.get_num_threads() == 1
    finally:
        minivllm.set_num_threads(n=before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: minivllm.empty((2**40, 2**40)), MemoryError, r"empty: an array of shape \(1099511627776, "),
        (lambda: minivllm.empty(2, device="cuda:99999999999"), ValueError, r"empty: device is 'cuda:99999999999', exp"),
        (lambda: minivllm.empty("ab"), TypeError, r"empty: shape is 'ab', expected an integer or a sequence"),
        (lambda: minivllm.empty(2.5), TypeError, r"empty: shape is 2\.5, expected an integer or a sequence"),
        (lambda: minivllm.DeviceArray.from_dlpack(np.ones(3)), TypeError, r"DeviceArray\.from_dlpack: array has dtype"),
    ],
)
def test_device_arrays_that_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()
