"""torch.compile and torch.export: one graph, and the bits and strides of a plain call."""

import pytest
from processes import succeeds
from torch_calls import CALLS, HEADS, KV_HEADS, Inputs, assert_same

import minivllm
from minivllm.signatures import OPS


@pytest.fixture(autouse=True)
def fresh(torch):
    torch.compiler.reset()


def compiled(torch, call, **options):
    return torch.compile(call, fullgraph=True, **options)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_graph_is_the_call(torch, device, call):
    """aot_eager functionalises, asks the fake implementations, and then runs the registered ops."""
    for dtype in ("f32", "bf16"):
        inputs = Inputs(device, dtype)
        assert_same(compiled(torch, call, backend="aot_eager")(inputs), call(inputs))


def everything(inputs):
    return [tensor for call in CALLS.values() for tensor in call(inputs)]


def test_inductor(torch, device):
    inputs, expected, graph = Inputs(device, "bf16"), everything(Inputs(device, "bf16")), compiled(torch, everything)
    assert_same(graph(inputs), expected)
    with torch.inference_mode():
        assert_same(graph(inputs), expected)


def test_inductor_fuses_around_an_op(torch, device):
    """Work before and after, and the heads of q and k, which are views of one buffer, straight into the next op."""

    def block(x, i):
        q, k, v = minivllm.rms_norm_qkv(x.relu(), i.norm, i.wide, HEADS, KV_HEADS)
        return minivllm.rms_norm(q, i.norm[:16]), minivllm.rms_norm(k, i.norm[:16]) + 1, v * 2

    i = Inputs(device)
    assert_same(compiled(torch, block)(i.x, i), block(i.x, i))


def test_two_views_of_one_tensor_are_written_to(torch, device):
    """test_decode_attention_calls.py has the caches, and what is refused."""
    inputs = Inputs(device, "f32")
    x, residual, weight = inputs.x, inputs.residual, inputs.norm
    wanted = minivllm.add_rms_norm(x, residual, weight)
    for compile in (torch.compile, lambda call: torch.compile(call, fullgraph=True)):
        both = torch.stack([x, residual])
        torch.compiler.reset()
        if compile is torch.compile:
            compile(lambda x, residual: minivllm.fused_add_rms_norm(x, residual, weight))(*both)
        else:
            compile(lambda both: minivllm.fused_add_rms_norm(both[0], both[1], weight))(both)
        assert_same(list(both), list(wanted))


def test_dynamic_shapes_compile_once(torch, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 5, 9):
        inputs = Inputs(device, tokens=tokens)
        assert_same(graph(inputs), everything(inputs))
    assert counter.frame_count == 1


def test_a_layer_object(torch, device):
    i = Inputs(device)
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=torch.nn.Parameter(i.norm), qkv_weight=i.wide, num_heads=HEADS, num_kv_heads=KV_HEADS
    )
    prepacked = minivllm.FusedRMSNormQKV(
        norm_weight=i.norm, qkv_weight=i.wide.t(), num_heads=HEADS, num_kv_heads=KV_HEADS, prepack=True
    )
    with torch.no_grad():
        for held in (layer, prepacked):
            graph = compiled(torch, lambda x, r, held=held: held(x, residual=r), backend="aot_eager")
            assert_same(graph(i.x, i.residual), held(i.x, residual=i.residual))


class Block:
    """A module around the op, its weights Parameters."""

    def __new__(cls, torch, i):
        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.qkv = torch.nn.Parameter(i.norm), torch.nn.Parameter(i.wide)

            def forward(self, x, residual):
                q, k, v, total = minivllm.rms_norm_qkv(x, self.norm, self.qkv.t(), HEADS, KV_HEADS, residual=residual)
                return q, k, v, minivllm.rms_norm(total, self.norm)

        return Module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(torch, device, strict, grad):
    i, more = Inputs(device), Inputs(device, tokens=7)
    module = Block(torch, i)
    tokens = torch.export.Dim("tokens", min=2)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            module, (i.x, i.residual), dynamic_shapes={"x": {0: tokens}, "residual": {0: tokens}}, strict=strict
        )
    with torch.no_grad():
        assert "minivllm.rms_norm.default" in str(program.graph)
        for each in (i, more):
            assert_same(program.module()(each.x, each.residual), module(each.x, each.residual))
    assert all(tensor.requires_grad for tensor in program.module()(i.x, i.residual))  # not detached in silence


def test_an_exported_program_in_another_process(torch, tmp_path):
    i = Inputs()
    module = Block(torch, i)
    torch.export.save(torch.export.export(module, (i.x, i.residual)), tmp_path / "program.pt2")
    torch.save([i.x, i.residual, *module(i.x, i.residual)], tmp_path / "tensors.pt")
    succeeds(f"""
        import torch, minivllm.torch
        x, residual, *expected = torch.load({str(tmp_path / "tensors.pt")!r})
        for a, b in zip(torch.export.load({str(tmp_path / "program.pt2")!r}).module()(x, residual), expected):
            assert torch.equal(a, b)
    """)


def test_what_the_op_refuses_it_refuses_in_a_graph(torch):
    i = Inputs()
    graph = compiled(torch, lambda x: minivllm.rms_norm(x, i.norm, rounding="bf16"), backend="aot_eager")
    with pytest.raises(ValueError, match="rms_norm: rounding is 'bf16'"):
        graph(i.x)


REGISTERED = [
    *OPS,
    *(f"add_{op}" for op, takes in OPS.items() if any(p.name == "residual" and not p.required for p in takes)),
    "greedy_tokens_in_place",
]
NORM = {"eps": 1e-6, "rounding": "hf", "weight_offset": 0.0}
QKV = NORM | {
    "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": None, "weight_layout": "out_in", "batch_invariant": False,
    "allow_tf32": False, "static_weights": True, "kernel": None,
}  # fmt: skip

LINEAR = {name: value for name, value in QKV.items() if name not in ("num_heads", "num_kv_heads", "head_dim")}
PLAIN = {name: value for name, value in LINEAR.items() if name not in ("eps", "weight_offset")}


def attention_arguments(like):
    """Of decode_attention as registered, but for its norms."""
    arrays = {
        "q": (3, 4, 16),
        "k": (3, 2, 16),
        "v": (3, 2, 16),
        "key_cache": (3, 2, 9, 16),
        "value_cache": (3, 2, 9, 16),
    }
    absent = ("cos", "sin", "q_norm_weight", "k_norm_weight", "block_table", "cache_layout", "scale", "window", "soft_cap",
              "kernel")  # fmt: skip
    flags = ("interleaved", "ring", "batch_invariant", "static_weights", "static_rows")
    positions = {name: (like.flatten()[:3] * 0).long() for name in ("positions", "starts")}
    tensors = {name: like.new_ones(shape) for name, shape in arrays.items()} | positions
    return tensors | dict.fromkeys(absent) | dict.fromkeys(flags, False)


def qk_arguments(like):
    """Of qk_norm_rope as registered, but for its weights."""
    shapes = {
        "q": (3, 4, 16),
        "k": (3, 2, 16),
        "v": (3, 2, 16),
        "key_cache": (3, 2, 9, 16),
        "value_cache": (3, 2, 9, 16),
    }
    tensors = {name: like.new_ones(shape) for name, shape in shapes.items()}
    rows = {name: like.new_ones(3, 8) for name in ("cos", "sin")}
    slots = {"slots": (like.flatten()[:3] * 0).long(), "interleaved": False}
    absent = ("q_norm_weight", "k_norm_weight", "cache_layout", "kernel")
    return tensors | rows | slots | dict.fromkeys(absent)


def greedy_arguments(logits):
    """Of greedy_tokens as registered."""
    lead, integers = logits.shape[:-1], logits.flatten().long()
    numbers = {name: integers[: lead.numel()].reshape(lead) * 0 for name in ("counts", "positions")}
    flags = {"finished": numbers["counts"] > 0, "ends": logits.flatten()[: logits.shape[-1]] > 0}
    history = {"history": numbers["counts"].new_zeros(*lead, 4), "pad": integers[0] * 0}
    return {"logits": logits, "kernel": None} | numbers | flags | history


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_registered_ops(torch, device, dtype):
    """Schema, fake implementation and tags, by torch's own checks."""
    import minivllm.torch  # noqa: F401

    i, ops = Inputs(device, dtype), torch.ops.minivllm
    samples = {
        ops.rms_norm: NORM | {"x": i.x, "weight": i.norm, "kernel": None},
        ops.add_rms_norm: NORM
        | {"x": i.x, "residual": i.residual, "weight": i.norm, "weight_offset": 1.0, "kernel": None},
        ops.norm_add: NORM | {"x": i.x, "weight": i.norm, "residual": i.residual, "kernel": None},
        ops.fused_add_rms_norm: NORM | {"x": i.x.clone(), "residual": i.residual.clone(), "weight": None},
        ops.rms_norm_qkv: QKV | {"x": i.x, "norm_weight": i.norm, "qkv_weight": [i.wide], "bias": []},
        ops.add_rms_norm_qkv: QKV
        | {"x": i.x, "residual": i.residual, "norm_weight": i.norm, "qkv_weight": [i.square], "bias": [i.bias]},
        ops.rms_norm_linear: LINEAR | {"x": i.x, "norm_weight": i.norm, "weight": i.wide, "bias": None},
        ops.add_rms_norm_linear: LINEAR
        | {"x": i.x, "residual": i.residual, "norm_weight": i.norm, "weight": i.square, "bias": i.bias},
        ops.rms_norm_gate_up: LINEAR
        | {"x": i.x, "norm_weight": i.norm, "gate_up_weight": [i.wide], "bias": [], "activation": "gelu"},
        ops.add_rms_norm_gate_up: LINEAR
        | {"x": i.x, "residual": i.residual, "norm_weight": i.norm, "activation": "silu"}
        | {"gate_up_weight": list(i.square.chunk(2)), "bias": list(i.bias.chunk(2))},
        ops.silu_and_mul: {"x": i.x, "rounding": "fp32", "kernel": None},
        ops.decode_attention: NORM | attention_arguments(i.x),
        ops.qk_norm_rope: NORM | qk_arguments(i.x),
        ops.greedy_tokens: {"logits": i.x, "kernel": None},
        ops.greedy_tokens_in_place: greedy_arguments(i.x),
        ops.gelu_and_mul: {"x": i.x, "approximate": "none", "rounding": "hf", "kernel": None},
        ops.linear: PLAIN | {"x": i.x, "weight": i.wide, "bias": None},
        ops.linear_add: PLAIN | {"x": i.x, "residual": i.residual, "weight": i.square, "bias": i.bias, "scale": 0.22},
    }
    assert {op.default.name() for op in samples} == {f"minivllm::{op}" for op in REGISTERED}
    for op, arguments in samples.items():
        names = [argument.name for argument in op.default._schema.arguments]
        torch.library.opcheck(op.default, tuple(arguments.pop(name) for name in names))
        assert not arguments


def test_a_registered_op_takes_what_the_op_takes(torch):
    """By the names of C's description, rows first; in place where the op is; what is optional there, is here."""
    import minivllm.torch  # noqa: F401

    for name in REGISTERED:
        op = name if name in OPS else name.removeprefix("add_").removesuffix("_in_place")
        schema = getattr(torch.ops.minivllm, name).default._schema
        given = {
            p.name: p
            for p in OPS[op]
            if p.role != "output"
            and (p.name != "residual" or p.required or name.startswith("add_"))
            and (name != "greedy_tokens" or p.name in ("logits", "kernel"))
        }
        arguments = {argument.name: argument for argument in schema.arguments}
        assert arguments.keys() == given.keys() and next(iter(arguments)) == OPS[op][0].name
        for parameter in given.values():
            argument = arguments[parameter.name]
            assert argument.is_write == (parameter.role == "in place")
            may_be_none = isinstance(argument.type, torch.OptionalType)
            assert may_be_none == (parameter.optional and parameter.type != "tensors" and parameter.name != "residual")


def test_a_lazily_negated_tensor(torch):
    """In a graph torch itself negates what it has only marked, before the op sees it."""
    x, weight = torch.randn(3, 8), torch.randn(8)
    graph = torch.compile(lambda x: minivllm.rms_norm(torch._neg_view(x), weight), fullgraph=True, backend="aot_eager")
    assert graph(x).equal(minivllm.rms_norm(-x, weight))


ORDERS = {
    "minivllm first": "import minivllm, torch",
    "torch first": "import torch, minivllm",
    "torch.compile first": "import torch, torch._dynamo, minivllm",
    "by its name": "import minivllm.torch, torch",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_any_order_of_imports(torch, order):
    """torch.compile knows the ops without being told; a program that does not compile never loads it for us."""
    succeeds(f"""
        {order}
        import sys
        import importlib
        importlib.reload(minivllm)
        x, weight = torch.ones(2, 8), torch.ones(8)
        minivllm.rms_norm(x, weight)
        assert "torch._dynamo" not in sys.modules or "_dynamo" in {order!r}
        assert "minivllm.torch" not in sys.modules or "." in {order!r}, "an eager call has no use for it"
        graph = torch.compile(lambda x: minivllm.rms_norm(x, weight), fullgraph=True, backend="eager")
        assert graph(x).shape == (2, 8)
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("minivllm")]
    """)


@pytest.mark.parametrize("other", ["torch._dynamo", "torch"])
def test_looking_for_torch_compile_is_not_loading_it(torch, other):
    succeeds(f"""
        import importlib.util, sys, torch, minivllm
        for _ in range(2):
            assert importlib.util.find_spec({other!r}) is not None
        assert "torch._dynamo" not in sys.modules
        x, weight = torch.ones(2, 8), torch.ones(8)
        graph = torch.compile(lambda x: minivllm.rms_norm(x, weight), fullgraph=True, backend="eager")
        assert graph(x).shape == (2, 8)
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("minivllm")]
    """)


@pytest.mark.gpu
def test_reduce_overhead(cuda_torch):
    """CUDA graphs: replayed with changed inputs and weights, and none skipped."""
    from torch._dynamo.utils import counters

    torch, inputs = cuda_torch, [Inputs("cuda", "bf16", tokens) for tokens in (1, 4)]
    for call in (CALLS["residual"], CALLS["tuple"], CALLS["rms_norm"]):
        torch.compiler.reset(), counters.clear()
        graph = compiled(torch, call, mode="reduce-overhead")
        for step in range(5):
            for i in inputs:
                i.x.mul_(-1.5), i.norm.add_(0.125), i.wide.mul_(0.5)
                torch.compiler.cudagraph_mark_step_begin()
                assert_same([tensor.clone() for tensor in graph(i)], [tensor.clone() for tensor in call(i)])
            assert step < 3 or not counters["inductor"]["cudagraph_skips"]
