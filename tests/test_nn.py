"""minivllm.nn: modules of torch, which compute with what they hold at the time of the call, however it came there."""

import copy
import io
import pickle
import warnings

import pytest
from processes import run

torch = pytest.importorskip("torch", reason="minivllm.nn holds modules of torch")

import minivllm  # noqa: E402
from minivllm.nn import FusedRMSNormQKV, NotFusedWarning, RMSNorm  # noqa: E402
from minivllm.testing import numeric, reference  # noqa: E402

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EPS = 48, 4, 2, 24, 1e-5
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LAYOUTS = {"packed": True, "separate": False}


def inputs(dtype=torch.float32, tokens=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype)


def make(packed=True, seed=0, **options):
    torch.manual_seed(seed)
    options = {"bias": True, "packed": packed} | options
    layer = FusedRMSNormQKV(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EPS, **options)
    if not layer.norm.weight.is_meta:
        torch.nn.init.normal_(layer.norm.weight, 1 - layer.weight_offset, 0.2)
    return layer


def weights_of(layer):
    """(norm weight, the projection packed, its bias packed or None), as a reader of the module would find them."""
    linears = [getattr(layer, name) for name in layer.names]
    biases = [linear.bias for linear in linears]
    return (
        layer.norm.weight,
        torch.cat([linear.weight for linear in linears]),
        None if biases[0] is None else torch.cat(biases),
    )


def right(layer, x, residual=None):
    """What the module should give: the stateless op on the weights that it has now."""
    norm, matrix, bias = weights_of(layer)
    return minivllm.rms_norm_qkv(
        x, norm, matrix, HEADS, KV_HEADS, EPS, bias=bias, residual=residual, head_dim=HEAD_DIM, weight_layout="out_in",
        rounding=layer.rounding, weight_offset=layer.weight_offset)  # fmt: skip


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def is_far(got, before):
    return all(float((a - b).abs().max()) > 1e-2 for a, b in zip(got, before))


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@torch.no_grad()
def test_against_float64(layout, rounding, dtype):
    """With a bias, a residual and Gemma's offset."""
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    layer = make(LAYOUTS[layout], rounding=rounding, weight_offset=1.0, dtype=kind)
    x, residual = inputs(kind), inputs(kind, seed=2)
    *parts, total = layer(x, residual)
    assert total.equal(x + residual)
    assert [part.shape for part in parts] == [(5, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    s, norm, matrix, bias = map(reference.to_float64, (total, *weights_of(layer)))
    exact, y, _ = reference.rms_norm_qkv(s, norm, matrix, EPS, bias=bias, rounding=rounding, weight_offset=1.0)
    bound = numeric.tolerance(
        exact, y, dtype, length=HIDDEN, weight=matrix, gain=abs(1 + norm), roundings=2 if dtype == "bf16" else 0
    )
    got = reference.to_float64(torch.cat([part.flatten(1) for part in parts], 1))
    numeric.assert_within(got, exact, bound)


@torch.no_grad()
def test_the_norm():
    norm = RMSNorm(HIDDEN, EPS, weight_offset=1.0)
    assert not norm.weight.any() and "eps=1e-05" in repr(norm)
    norm.weight.normal_()
    expected = minivllm.rms_norm(inputs(), norm.weight, EPS, weight_offset=1.0)
    assert norm(inputs()).equal(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    """Those of torch's own operations in float64."""
    layer, x = make(LAYOUTS[layout]), inputs().requires_grad_()
    residual = inputs(seed=2)
    sum(part.square().mean() for part in layer(x, residual)).backward()
    twin, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    norm, matrix, bias = weights_of(twin)
    total = wide + residual.double()
    out = torch.nn.functional.rms_norm(total, (HIDDEN,), norm, EPS) @ matrix.t() + bias
    counts = [HEADS * HEAD_DIM, *[KV_HEADS * HEAD_DIM] * 2]
    twin.zero_grad()
    sum(part.square().mean() for part in (*out.split(counts, 1), total)).backward()
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    for parameter, exact in zip(layer.parameters(), twin.parameters()):
        assert torch.allclose(parameter.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradients", [False, True])
def test_compile_is_one_graph(layout, gradients):
    torch.compiler.reset()
    layer, x, residual = make(LAYOUTS[layout]), inputs(), inputs(seed=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        assert_same(compiled(x), right(layer, x))
        assert_same(compiled(x, residual), right(layer, x, residual))
        for name in layer.names:  # a compiled call sees what was replaced, too
            setattr(layer, name, torch.nn.Linear(HIDDEN, getattr(layer, name).out_features))
        assert_same(compiled(x), right(layer, x))


# ---- nothing goes stale ---------------------------------------------------------------------------------------------


def other(layer):
    return make(len(layer.names) == 1, seed=9).state_dict()


def assign(layer):
    layer.load_state_dict(other(layer), assign=True)


def load(layer):
    layer.load_state_dict(other(layer))


def replace_linears(layer):
    for name in layer.names:
        setattr(layer, name, torch.nn.Linear(HIDDEN, getattr(layer, name).out_features))


def replace_norm(layer):
    layer.norm = RMSNorm(HIDDEN, EPS)
    torch.nn.init.uniform_(layer.norm.weight, -2, -1)


def replace_parameters(layer):
    for name in layer.names:
        linear = getattr(layer, name)
        linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))


def parametrize(layer):
    class Negative(torch.nn.Module):
        def forward(self, weight):
            return -weight

    for name in ("norm", *layer.names):
        torch.nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", Negative())
    layer.norm.parametrizations.weight.original.data.mul_(3)


def weight_norm(layer):
    for name in layer.names:
        torch.nn.utils.parametrizations.weight_norm(getattr(layer, name))
        getattr(layer, name).parametrizations.weight.original0.data.mul_(3)


def data(layer):
    for name in layer.names:
        linear = getattr(layer, name)
        linear.weight.data = torch.randn_like(linear.weight)


CHANGES = [assign, load, replace_linears, replace_norm, replace_parameters, parametrize, weight_norm, data]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_is_seen(change, layout):
    layer, x = make(LAYOUTS[layout], seed=3), inputs()
    before = layer(x)
    change(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFusedWarning)
        got = layer(x)
    assert is_far(got, before)
    assert_same(got, right(layer, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call(layout, compiled):
    layer, x = make(LAYOUTS[layout]), inputs()
    twin = make(LAYOUTS[layout], seed=5)
    given = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}

    def call(given, x):
        return torch.func.functional_call(layer, given, (x,))

    torch.compiler.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    assert is_far(function(given, x), layer(x))
    assert_same(function(given, x), right(twin, x))
    gradients = torch.func.grad(lambda given: call(given, x)[0].square().sum())(given)
    twin(x)[0].square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_made_on_meta(layout):
    state = make(LAYOUTS[layout], seed=4).state_dict()
    layer, x = make(LAYOUTS[layout], device="meta"), inputs()
    q, k, v = layer(x.to("meta"))
    assert q.is_meta and q.shape == (5, HEADS, HEAD_DIM)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="meta"):
        layer(x)
    for way in ("assign", "to_empty"):
        layer = make(LAYOUTS[layout], device="meta")
        if way == "to_empty":
            layer.to_empty(device="cpu")
        layer.load_state_dict(state, assign=way == "assign")
        assert_same(layer(x), right(make(LAYOUTS[layout], seed=4), x))
    with torch.device("meta"):
        assert make(LAYOUTS[layout]).norm.weight.is_meta


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_copies_pickles_and_dtypes(layout):
    layer, x = make(LAYOUTS[layout]), inputs()
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    fresh = make(LAYOUTS[layout], seed=8)
    fresh.load_state_dict(layer.state_dict())
    for parameter in layer.parameters():
        parameter.zero_()
    for each in (*copies, fresh):
        assert_same(each(x), expected)
        for kind in (torch.float16, torch.bfloat16):
            narrow = copy.deepcopy(each).to(kind)
            assert_same(narrow(x.to(kind)), right(narrow, x.to(kind)))
            assert narrow(x.to(kind))[0].dtype == kind
    assert not layer(x)[0].any()


def test_names_of_parameters():
    names = [name for name, _ in make(bias=False).named_parameters()]
    assert names == ["norm.weight", "qkv_proj.weight"]
    names = [name for name, _ in make(False).named_parameters()]
    assert names == ["norm.weight", *[f"{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")]]
    assert FusedRMSNormQKV(HIDDEN, 4, 2).head_dim == HIDDEN // 4
    assert "num_heads=4, num_kv_heads=2, head_dim=24, eps=1e-05" in repr(make())


# ---- around modules that there are ----------------------------------------------------------------------------------


class Norm(torch.nn.Module):
    """As transformers writes it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(HIDDEN))
        self.variance_epsilon = EPS

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Block(torch.nn.Module):
    """A layer of a model, whose own names stay those of its checkpoint."""

    def __init__(self):
        super().__init__()
        self.input_layernorm = Norm()
        linears = [torch.nn.Linear(HIDDEN, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.fused = FusedRMSNormQKV.from_modules(
            self.input_layernorm, *linears, num_heads=HEADS, num_kv_heads=KV_HEADS
        )

    def forward(self, x):
        return self.fused(x)


@torch.no_grad()
def test_from_modules():
    block, x = Block(), inputs()
    fused = block.fused
    assert fused.eps == EPS and fused.norm is block.input_layernorm
    y = block.input_layernorm(x)
    for part, linear in zip(block(x), (fused.q_proj, fused.k_proj, fused.v_proj)):
        assert torch.allclose(part.flatten(1), linear(y), rtol=1e-5, atol=1e-6)
    before = block(x)
    block.load_state_dict({name: -2 * tensor for name, tensor in block.state_dict().items()}, assign=True)
    assert is_far(block(x), before)
    assert_same(block(x), right(fused, x))
    twin = copy.deepcopy(block)
    assert twin.fused.norm is twin.input_layernorm
    packed = torch.nn.Linear(HIDDEN, QKV, bias=False)
    one = FusedRMSNormQKV.from_modules(torch.nn.RMSNorm(HIDDEN, EPS), packed, num_heads=HEADS, num_kv_heads=KV_HEADS)
    assert one.qkv_proj is packed
    assert_same(one(x), right(one, x))


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + x.sum(-1, keepdim=True)


def adapt(layer):
    layer.q_proj = Adapter(layer.q_proj)


def hook(layer):
    layer.k_proj.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_norm(layer):
    layer.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))


def forward(layer):
    layer.v_proj.forward = lambda x: x[..., :1] * torch.ones(KV_HEADS * HEAD_DIM)


def another_norm(layer):
    layer.norm = torch.nn.LayerNorm(HIDDEN)


def no_bias(layer):
    layer.k_proj.bias = None


MORE = {
    adapt: "q_proj is a test_nn.Adapter, expected Linear",
    hook: "k_proj has a hook",
    hook_on_norm: "norm has a hook",
    forward: "the forward of v_proj was replaced",
    another_norm: "norm is a torch.nn.modules.normalization.LayerNorm, expected RMSNorm",
    no_bias: "some of q_proj, k_proj and v_proj have a bias and some have none",
}


@pytest.mark.parametrize("change", MORE, ids=lambda change: change.__name__)
@torch.no_grad()
def test_modules_that_are_more_than_they_seem_are_called(change):
    """With one warning."""
    layer, x, residual = make(False), inputs(), inputs(seed=2)
    before = layer(x)
    change(layer)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        got, with_residual = layer(x), layer(x, residual)
    assert [each.category for each in warned] == [NotFusedWarning] and MORE[change] in str(warned[0].message)
    y = layer.norm(x)
    parts = [projection(y).unflatten(-1, (-1, HEAD_DIM)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)]
    assert_same(got, parts)
    assert any(not torch.allclose(a, b) for a, b in zip(got, before))
    assert with_residual[3].equal(x + residual)
    assert_same(with_residual[:3], layer(x + residual))


def test_what_it_refuses():
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    norm, linear = Norm(), torch.nn.Linear(HIDDEN, QKV)
    with pytest.raises(TypeError, match="FusedRMSNormQKV: 2 projections were given, expected one or three"):
        FusedRMSNormQKV.from_modules(norm, linear, linear, **heads)
    with pytest.raises(TypeError, match="norm is a LayerNorm, expected an RMSNorm"):
        FusedRMSNormQKV.from_modules(torch.nn.LayerNorm(HIDDEN), linear, **heads)
    with pytest.raises(TypeError, match=r"qkv_proj is a test_nn\.Adapter, expected a torch\.nn\.Linear"):
        FusedRMSNormQKV.from_modules(norm, Adapter(linear), **heads)
    with pytest.raises(ValueError, match="norm, a RMSNorm, has no variance_epsilon or eps; pass eps"):
        FusedRMSNormQKV.from_modules(torch.nn.RMSNorm(HIDDEN), linear, **heads)
    with pytest.raises(ValueError, match=r"qkv_proj has 192 outputs, expected 9 heads of one size \(num_heads is 5"):
        FusedRMSNormQKV.from_modules(norm, linear, num_heads=5, num_kv_heads=2)
    linears = [torch.nn.Linear(HIDDEN, outputs) for outputs in (96, 48, 46)]
    with pytest.raises(ValueError, match="v_proj has 46 outputs, expected 2 heads of 24, as q_proj has them"):
        FusedRMSNormQKV.from_modules(norm, *linears, **heads)
    with pytest.raises(
        ValueError, match="hidden is 48, expected a multiple of num_heads, which is 5; or pass head_dim"
    ):
        FusedRMSNormQKV(HIDDEN, 5, 5)
    with pytest.raises(ValueError, match="rms_norm_qkv: norm_weight has 48 elements, expected 47"):
        make()(torch.ones(2, 47))


# ---- importing ------------------------------------------------------------------------------------------------------


def test_without_torch_the_import_says_what_is_missing():
    done = run("""
        import sys
        sys.modules["torch"] = None
        import minivllm
        import minivllm.nn
    """)
    assert done.returncode != 0
    assert "ImportError: minivllm.nn holds modules of torch, which cannot be imported here" in done.stderr
    assert "pip install torch" in done.stderr
