"""The decoder layer of minivllm.nn and its parts, and the model in the examples that is made of them."""

import copy
import warnings

import pytest
from processes import ROOT

torch = pytest.importorskip("torch", reason="minivllm.nn holds modules of torch")

import torch.nn.functional as F  # noqa: E402

from minivllm import decode_attention, nn_layer  # noqa: E402
from minivllm.nn import Attention, DecoderLayer, GatedMLP, LinearAdd, NotFusedWarning, RMSNorm  # noqa: E402

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, EPS = 48, 80, 4, 2, 16, 1e-5
KINDS = {"qwen3": {"qk_norm": True}, "packed": {"packed": True, "bias": True, "activation": "gelu_tanh"}}


def make(kind="qwen3", **options):
    torch.manual_seed(0)
    layer = DecoderLayer(HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, EPS, **KINDS[kind] | options)
    for name, parameter in layer.named_parameters():
        if "norm" in name and not parameter.is_meta:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return layer


def inputs(tokens=7, batch=2):
    """x, cos and sin."""
    angles = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM).repeat(2)
    torch.manual_seed(1)
    return torch.randn(batch, tokens, HIDDEN), angles.cos(), angles.sin()


def caches(rows, batch=2):
    return [torch.zeros(batch, KV_HEADS, rows, HEAD_DIM) for _ in "kv"]


def formula(layer, x, cos, sin, window=None):
    """What a layer computes, in operations of torch."""

    def norm(norm, x):
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    attention, mlp = layer.self_attn, layer.mlp
    y = norm(layer.input_layernorm, x)
    packed = torch.cat([getattr(attention, name)(y) for name in attention.names], -1).unflatten(-1, (-1, HEAD_DIM))
    q, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], -2)
    if attention.q_norm is not None:
        q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    mask = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    q, k, v = (part.transpose(1, 2) for part in (rotated(q), rotated(k), v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    x = x + F.linear(out.transpose(1, 2).flatten(2), attention.o_proj.weight)
    y = norm(layer.post_attention_layernorm, x)
    gate, up = torch.cat([getattr(mlp, name)(y) for name in mlp.names], -1).chunk(2, -1)
    active = F.silu(gate) if mlp.activation == "silu" else F.gelu(gate, approximate="tanh")
    return x + F.linear(active * up, mlp.down_proj.weight)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_caller_vouches_for(monkeypatch):
    """Both promises reach the attention, and change nothing where they are kept."""
    given = []

    def recorded(*args, **options):
        given.append({name: options[name] for name in ("static_weights", "static_rows")})
        return decode_attention(*args, **options)

    monkeypatch.setattr(nn_layer, "decode_attention", recorded)
    x, cos, sin = inputs(1)
    positions, results = torch.zeros(2, dtype=torch.int64), []
    for static in (False, True):
        layer = make(static_weights=static, static_rows=static)
        with torch.no_grad():
            results.append(layer(x, cos, sin, *caches(3), positions))
    assert given == [dict.fromkeys(("static_weights", "static_rows"), static) for static in (False, True)]
    assert torch.equal(*results)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer(kind, window, device):
    """Whole, as a prompt with steps behind it, and token by token."""
    layer, (x, cos, sin) = make(kind, window=window).to(device), (each.to(device) for each in inputs())
    expected = formula(layer, x, cos, sin, window)
    assert close(layer(x, cos, sin), expected)
    for prompt in (0, 4):
        cache, got = [each.to(device) for each in caches(9)], []
        if prompt:
            got.append(layer(x[:, :prompt], cos[:prompt], sin[:prompt], *cache))
        for t in range(prompt, 7):
            positions = torch.tensor([t, t], device=device)
            got.append(layer(x[:, t : t + 1], cos[t : t + 1], sin[t : t + 1], *cache, positions))
        assert close(torch.cat(got, 1), expected)
        assert not cache[0][:, :, 7:].any() and not cache[1][:, :, 7:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer, (x, cos, sin) = make(kind), inputs()
    twin = copy.deepcopy(layer)
    layer(x.requires_grad_(), cos, sin).square().mean().backward()
    other = x.detach().clone().requires_grad_()
    formula(twin, other, cos, sin).square().mean().backward()
    assert close(x.grad, other.grad)
    assert all(close(a.grad, b.grad) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


@torch.no_grad()
def test_names_meta_and_copies():
    """Those of transformers' own layer, and what is made on the meta device is loaded by them."""
    layer, (x, cos, sin) = make(), inputs()
    empty = make(device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(layer.state_dict(), assign=True)
    for each in (empty, copy.deepcopy(layer)):
        assert each(x, cos, sin).equal(layer(x, cos, sin))
    names = [name.removesuffix(".weight") for name in layer.state_dict()]
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    assert sorted(names) == sorted(linears + norms)
    assert {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"} <= set(make("packed").state_dict())


@torch.no_grad()
def test_compile():
    torch.compiler.reset()
    layer, (x, cos, sin) = make(), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert close(compiled(x, cos, sin), layer(x, cos, sin))
    cache, expected = caches(9), caches(9)
    token, positions = (x[:, :1], cos[:1], sin[:1]), torch.tensor([2, 0])
    assert close(compiled(*token, *cache, positions), layer(*token, *expected, positions))
    assert all(map(close, cache, expected)) and cache[0].any()


MORE = {
    "self_attn.v_proj": lambda module, args, output: output * 2,
    "self_attn.k_norm": lambda module, args, output: output * 2,
    "self_attn.o_proj": lambda module, args, output: output * 2,
    "mlp.up_proj": lambda module, args, output: output * 2,
    "post_attention_layernorm": lambda module, args, output: output + 1,
}


@pytest.mark.parametrize("name", MORE)
@torch.no_grad()
def test_hooks_are_called(name):
    layer, (x, cos, sin) = make(), inputs(3)
    before, calls = layer(x, cos, sin), []
    module = layer.get_submodule(name)
    handle = module.register_forward_hook(lambda *args: calls.append(1))
    is_called_anyway = name == "self_attn.o_proj"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert close(layer(x, cos, sin), before) and len(calls) == 1
        layer(x, cos, sin)
    assert [each.category for each in warned] == [NotFusedWarning] * (not is_called_anyway)
    handle.remove()
    module.register_forward_hook(MORE[name])
    assert not close(layer(x, cos, sin), before)


@torch.no_grad()
def test_parts_and_what_they_refuse():
    x, cos, sin = inputs(1)
    linear, norm = LinearAdd(HIDDEN, HIDDEN, True, scale=0.5), RMSNorm(HIDDEN, EPS)
    assert close(linear(x, x), x + 0.5 * F.linear(x, linear.weight, linear.bias)) and "scale=0.5" in repr(linear)
    assert "silu" in repr(GatedMLP(HIDDEN, INTERMEDIATE)) and "num_heads=4" in repr(make())
    with pytest.raises(ValueError, match="GatedMLP: activation is 'relu', expected 'silu', 'gelu_tanh' or 'gelu'"):
        GatedMLP(HIDDEN, INTERMEDIATE, activation="relu")
    with pytest.raises(ValueError, match="Attention: hidden is 48, expected a multiple of num_heads, which is 5"):
        Attention(HIDDEN, 5, 5)
    attention, (keys, values) = Attention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM), caches(4)
    for more in ((keys,), (None, values), (None, None, torch.tensor([0, 0]))):
        with pytest.raises(ValueError, match="Attention: key_cache and value_cache go together, and positions only"):
            attention(x, norm, cos, sin, *more)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad and grad mode is on"):
        attention(x, norm, cos, sin, keys, values, torch.tensor([0, 0]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_example(tied, tmp_path, monkeypatch):
    """A checkpoint of transformers in the example, against transformers."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(ROOT)
    from transformer_models import close, prompt

    from examples import qwen3
    from minivllm.testing.models import causal_lm

    theirs, ids = causal_lm("tiny-qwen3", tie_word_embeddings=tied), prompt()
    theirs.save_pretrained(tmp_path)
    ours = qwen3.load(tmp_path)
    assert len((ROOT / "examples" / "qwen3.py").read_text().splitlines()) <= 150
    tokens = torch.stack(list(qwen3.generate(ours, ids, 8)), 1)
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokens.equal(expected[:, ids.shape[1] :])
        ours.start(2, 32)
        logits = theirs(ids).logits
        assert close(ours(ids[:, :-1]), logits[:, -2])
        assert close(ours(ids[:, -1:], torch.full((2,), ids.shape[1] - 1)), logits[:, -1])
