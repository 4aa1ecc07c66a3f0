"""What every op refuses: good arguments, the ways to spoil one of them, and what the message says then."""

import math

import minivllm

HIDDEN, HEADS, KV_HEADS, QKV = 64, 3, 1, 40


class Inputs:
    """Good arguments, one of which each test spoils."""

    def __init__(self, framework, dtype="f32"):
        self.framework, self.dtype = framework, dtype
        self.x = self.full(5, HIDDEN)
        self.residual = self.full(5, HIDDEN)
        self.weight = self.full(HIDDEN)
        self.matrix = self.full(QKV, HIDDEN)

    def full(self, *shape, dtype=None):
        return self.framework.full(shape, 1.0, dtype or self.dtype)

    def norm(self, **changes):
        arguments = {"x": self.x, "weight": self.weight} | changes
        positional = [arguments.pop(name) for name in ("x", "weight")]
        return minivllm.rms_norm(*positional, **arguments)

    def add_norm(self, **changes):
        arguments = {"x": self.x, "residual": self.residual, "weight": self.weight} | changes
        positional = [arguments.pop(name) for name in ("x", "residual", "weight")]
        return minivllm.add_rms_norm(*positional, **arguments)

    def qkv(self, **changes):
        arguments = {
            "x": self.x,
            "norm_weight": self.weight,
            "qkv_weight": self.matrix,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
        }
        arguments |= changes
        return minivllm.rms_norm_qkv(**arguments)

    def silu(self, **changes):
        return minivllm.silu_and_mul(**{"x": self.x} | changes)

    def gelu(self, **changes):
        return minivllm.gelu_and_mul(**{"x": self.x} | changes)


# (what, the spoilt argument, as a function of the inputs; the exception; its message)
NORM_REFUSALS = [
    (
        "short weight",
        lambda i: {"weight": i.full(60)},
        ValueError,
        r"weight has 60 elements, expected 64 \(= x\.shape\[-1\]\)",
    ),
    ("long weight", lambda i: {"weight": i.full(65)}, ValueError, r"weight has 65 elements, expected 64"),
    ("matrix weight", lambda i: {"weight": i.full(1, 64)}, ValueError, r"weight has shape \[1, 64\], expected \[64\]"),
    ("empty weight", lambda i: {"weight": i.full(0)}, ValueError, r"weight has 0 elements, expected 64"),
    ("scalar x", lambda i: {"x": i.full()}, ValueError, r"x has (0|no) dimensions, expected "),
    (
        "no columns",
        lambda i: {"x": i.full(3, 0), "weight": i.full(0)},
        ValueError,
        r"x has shape \[3, 0\], expected a hidden size >= 1",
    ),
    (
        "float16 weight for float32 x",
        lambda i: {"weight": i.full(64, dtype="f16")},
        TypeError,
        r"weight is float16, expected float32",
    ),
    ("negative eps", lambda i: {"eps": -1e-6}, ValueError, r"eps is -1e-06, expected a finite number >= 0"),
    ("infinite eps", lambda i: {"eps": math.inf}, ValueError, r"eps is inf, expected a finite number >= 0"),
    ("eps is no number", lambda i: {"eps": math.nan}, ValueError, r"eps is -?nan, expected a finite number >= 0"),
    ("eps None", lambda i: {"eps": None}, TypeError, r"eps .*(float|number)"),
    ("eps a string", lambda i: {"eps": "1e-6"}, TypeError, r"eps .*(float|number)"),
    ("rounding", lambda i: {"rounding": "HF"}, ValueError, r"rounding .*'?HF'?.*hf.*fp32"),
    ("rounding None", lambda i: {"rounding": None}, TypeError, r"rounding"),
    (
        "weight_offset",
        lambda i: {"weight_offset": math.nan},
        ValueError,
        r"weight_offset is -?nan, expected a finite number",
    ),
    (
        "kernel",
        lambda i: {"kernel": "f32_abacus"},
        ValueError,
        r"no kernel is called 'f32_abacus'; minivllm\.kernels\('",
    ),
    (
        "kernel of another dtype",
        lambda i: {"kernel": "bf16_sm80" if i.framework.device == "cuda" else "bf16_portable"},
        ValueError,
        r"kernel 'bf16_(sm80|portable)' takes bfloat16, x is float32; leave kernel= away",
    ),
    ("kernel number", lambda i: {"kernel": 7}, TypeError, r"kernel"),
    ("unknown keyword", lambda i: {"scale": 1.0}, TypeError, r"scale"),
    ("x a list", lambda i: {"x": [1.0, 2.0]}, TypeError, r"x must be a tensor .*, got list"),
    ("x None", lambda i: {"x": None}, TypeError, r"x must be a tensor .*, got NoneType"),
    ("weight a float", lambda i: {"weight": 1.0}, TypeError, r"weight must be a tensor .*, got float"),
    ("x a type", lambda i: {"x": type(i.x)}, TypeError, r"x must be a tensor"),
    ("out shape", lambda i: {"out": i.full(5, 63)}, ValueError, r"out has shape \[5, 63\], expected \[5, 64\]"),
    ("out rank", lambda i: {"out": i.full(1, 5, 64)}, ValueError, r"out has shape \[1, 5, 64\], expected \[5, 64\]"),
    (
        "out dtype",
        lambda i: {"out": i.full(5, 64, dtype="f16")},
        TypeError,
        r"out is float16, expected float32 \(the dtype of x\)",
    ),
    (
        "out that repeats",
        lambda i: {"out": i.framework.strided(i.full(64), (5, 64), (0, 1))},
        ValueError,
        r"out has elements that share memory",
    ),
    (
        "out that slides",
        lambda i: {"out": i.framework.strided(i.full(5 * 64), (5, 64), (63, 1))},
        ValueError,
        r"out has elements that share memory",
    ),
]
ADD_REFUSALS = [
    (
        "residual shape",
        lambda i: {"residual": i.full(4, 64)},
        ValueError,
        r"residual has shape \[4, 64\], expected \[5, 64\] \(the shape of x\)",
    ),
    (
        "residual dtype",
        lambda i: {"residual": i.full(5, 64, dtype="f16")},
        TypeError,
        r"residual is float16, expected float32",
    ),
    ("residual None", lambda i: {"residual": None}, TypeError, r"residual must be a tensor"),
    (
        "residual_out shape",
        lambda i: {"residual_out": i.full(5, 65)},
        ValueError,
        r"residual_out has shape \[5, 65\], expected \[5, 64\]",
    ),
    (
        "residual_out dtype",
        lambda i: {"residual_out": i.full(5, 64, dtype="f16")},
        TypeError,
        r"residual_out is float16, expected float32",
    ),
]
QKV_REFUSALS = [
    (
        "norm_weight",
        lambda i: {"norm_weight": i.full(1000)},
        ValueError,
        r"norm_weight has 1000 elements, expected 64 \(= x\.shape\[-1\]\)",
    ),
    (
        "matrix shape",
        lambda i: {"qkv_weight": i.full(40, 63)},
        ValueError,
        r"qkv_weight has shape \[40, 63\], expected \[qkv, 64\]",
    ),
    (
        "matrix rank",
        lambda i: {"qkv_weight": i.full(40)},
        ValueError,
        r"qkv_weight has shape \[40\], expected a matrix",
    ),
    (
        "matrix dtype",
        lambda i: {"qkv_weight": i.full(40, 64, dtype="f16")},
        TypeError,
        r"qkv_weight is float16, expected float32",
    ),
    (
        "outputs",
        lambda i: {"qkv_weight": i.full(41, 64)},
        ValueError,
        r"qkv_weight has 41 outputs, expected a multiple of 5 \(= num_heads \+ 2 \* num_kv_heads\)",
    ),
    ("no outputs", lambda i: {"qkv_weight": i.full(0, 64)}, ValueError, r"qkv_weight has 0 outputs"),
    ("layout name", lambda i: {"weight_layout": "row"}, ValueError, r"weight_layout .*row.*auto.*out_in.*in_out"),
    (
        "layout",
        lambda i: {"weight_layout": "in_out"},
        ValueError,
        r"qkv_weight has shape \[40, 64\], which does not fit the layout that weight_layout names",
    ),
    ("num_heads 0", lambda i: {"num_heads": 0}, ValueError, r"num_heads is 0, expected at least 1"),
    ("num_kv_heads -1", lambda i: {"num_kv_heads": -1}, ValueError, r"num_kv_heads is -1, expected at least 1"),
    ("num_heads huge", lambda i: {"num_heads": 2**62}, ValueError, r"num_heads"),
    (
        "num_heads past 32 bits",
        lambda i: {"num_heads": 2**31},
        ValueError,
        r"num_heads is 2147483648, expected at most",
    ),
    ("num_heads beyond 64 bits", lambda i: {"num_heads": 2**80}, (ValueError, OverflowError), r"num_heads"),
    ("num_heads a float", lambda i: {"num_heads": 3.0}, TypeError, r"num_heads .*int"),
    ("num_heads None", lambda i: {"num_heads": None}, TypeError, r"num_heads .*int"),
    ("head_dim", lambda i: {"head_dim": 16}, ValueError, r"head_dim is 16, expected 8"),
    ("head_dim 0", lambda i: {"head_dim": 0}, ValueError, r"head_dim is 0, expected"),
    ("head_dim negative", lambda i: {"head_dim": -8}, ValueError, r"head_dim is -8, expected at least 1"),
    ("bias size", lambda i: {"bias": i.full(39)}, ValueError, r"bias has 39 elements, expected 40"),
    ("bias dtype", lambda i: {"bias": i.full(40, dtype="f16")}, TypeError, r"bias is float16, expected float32"),
    ("bias tuple of two", lambda i: {"bias": (i.full(24), i.full(8))}, (TypeError, ValueError), r"bias .*(3|three)"),
    (
        "bias member",
        lambda i: {"bias": (i.full(24), i.full(8), i.full(9))},
        ValueError,
        r"bias\[2\] has 9 elements, expected 8",
    ),
    (
        "weight tuple of two",
        lambda i: {"qkv_weight": (i.matrix, i.matrix)},
        (TypeError, ValueError),
        r"qkv_weight .*(3|three)",
    ),
    (
        "weight tuple of four",
        lambda i: {"qkv_weight": (i.matrix,) * 4},
        (TypeError, ValueError),
        r"qkv_weight .*(3|three)",
    ),
    (
        "tuple sizes",
        lambda i: {"qkv_weight": (i.full(16, 64), i.full(16, 64), i.full(8, 64))},
        ValueError,
        r"qkv_weight\[0\] has 16 outputs, expected 24 \(= num_heads \* head_dim, where head_dim is 8\)",
    ),
    (
        "tuple layouts",
        lambda i: {"qkv_weight": (i.full(24, 64), i.full(64, 8), i.full(8, 64))},
        ValueError,
        r"qkv_weight\[1\] has shape \[64, 8\], which does not fit the layout that the other weights have",
    ),
    (
        "tuple member None",
        lambda i: {"qkv_weight": (i.full(24, 64), None, i.full(8, 64))},
        (TypeError, ValueError),
        r"qkv_weight\[1\]",
    ),
    (
        "residual_out alone",
        lambda i: {"residual_out": i.full(5, 64)},
        ValueError,
        r"residual_out was given without a residual",
    ),
    ("out shape", lambda i: {"out": i.full(5, 41)}, ValueError, r"out has shape \[5, 41\], expected \[5, 40\]"),
    ("batch_invariant", lambda i: {"batch_invariant": "no"}, TypeError, r"batch_invariant"),
    ("unknown keyword", lambda i: {"heads": 1}, TypeError, r"heads"),
]
ACT_AND_MUL_REFUSALS = [
    ("scalar x", lambda i: {"x": i.full()}, ValueError, r"x has (0|no) dimensions, expected "),
    ("no columns", lambda i: {"x": i.full(3, 0)}, ValueError, r"x has shape \[3, 0\]"),
    ("odd x", lambda i: {"x": i.full(3, 7)}, ValueError, r"x has shape \[3, 7\], expected an even last dimension"),
    (
        "x that steps",
        lambda i: {"x": i.framework.strided(i.full(5 * 64), (5, 32), (64, 2))},
        ValueError,
        r"x must be contiguous in its last dimension",
    ),
    ("x None", lambda i: {"x": None}, TypeError, r"x must be a tensor .*, got NoneType"),
    ("rounding", lambda i: {"rounding": "HF"}, ValueError, r"rounding .*'?HF'?.*hf.*fp32"),
    (
        "kernel",
        lambda i: {"kernel": "f32_abacus"},
        ValueError,
        r"no kernel is called 'f32_abacus'; minivllm\.kernels\('",
    ),
    ("unknown keyword", lambda i: {"eps": 1e-6}, TypeError, r"eps"),
    ("out as wide as x", lambda i: {"out": i.full(5, 64)}, ValueError, r"out has shape \[5, 64\], expected \[5, 32\]"),
    ("out rank", lambda i: {"out": i.full(1, 5, 32)}, ValueError, r"out has shape \[1, 5, 32\], expected \[5, 32\]"),
    (
        "out dtype",
        lambda i: {"out": i.full(5, 32, dtype="f16")},
        TypeError,
        r"out is float16, expected float32 \(the dtype of x\)",
    ),
    (
        "out that repeats",
        lambda i: {"out": i.framework.strided(i.full(32), (5, 32), (0, 1))},
        ValueError,
        r"out has elements that share memory",
    ),
    ("the gate", lambda i: {"out": i.x[:, :32]}, ValueError, r"out overlaps x; pass memory of its own"),
    ("up", lambda i: {"out": i.x[:, 32:]}, ValueError, r"out overlaps x; pass memory of its own"),
]
GELU_REFUSALS = [
    (
        "approximate",
        lambda i: {"approximate": "erf"},
        ValueError,
        r"approximate is 'erf', expected \"tanh\" or \"none\"",
    ),
    ("approximate None", lambda i: {"approximate": None}, TypeError, r"approximate .*\"tanh\" or \"none\""),
]
