"""minivllm.transformers: `rounding` reaches every norm of a model, bit by bit, whichever way its layers run."""

import copy

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import FAMILIES, model_of, prompt  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")

LAYERS = 2  # one without and one with a pending residual
WAYS = {
    "one call": {},
    "norm, then linear": {"fused_tokens": 0},
    "packed": {"packed": True, "fused_tokens": 0},
    "compiled": {},
}


def transparent(device):
    """A bfloat16 model in which every norm shows: k and v are the normed input's first columns, the rotation of every
    token is by nothing, attention adds nothing, and the MLP is the identity."""
    model = causal_lm("tiny-qwen3", "bfloat16", device, num_hidden_layers=LAYERS)
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight.copy_(torch.eye(*linear.weight.shape))
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp = torch.nn.Identity()
    return model


def seen(model, call, ids):
    """By name, what the norms of a transparent model made of some tokens."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1])
    last = call(ids, past_key_values=cache, position_ids=torch.zeros_like(ids)).last_hidden_state
    results = {"norm": last}
    for i, layer in enumerate(cache.layers):
        results |= {f"{i}.k_norm": layer.keys, f"{i}.input_layernorm": layer.values}
    return results


def formulas(model, ids, rounding):
    """The same by name, from the formulas; those of the second norms are in whatever follows."""

    def norm(module, x, rounding):
        y = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + module.variance_epsilon)
        y = y.to(x.dtype).double() if rounding == "hf" else y
        return (y * module.weight.double()).to(x.dtype)

    x, results = model.embed_tokens(ids), {}
    for i, layer in enumerate(model.layers):
        attention = layer.self_attn
        y = norm(layer.input_layernorm, x, rounding)
        v = y[..., : attention.v_proj.out_features].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        results |= {f"{i}.k_norm": norm(attention.k_norm, v, rounding), f"{i}.input_layernorm": v}
        x = x + norm(layer.post_attention_layernorm, x, rounding)
    return results | {"norm": norm(model.norm, x, rounding)}


def wrong(got, expected):
    """By name, the share of elements that differ: at most those that are ties but for the last bit of a float32 sum."""
    return {name: float((got[name] != true).float().mean()) for name, true in expected.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rounding", ["default", "hf", "fp32"])
def test_every_norm_rounds_as_told(rounding, way, device):
    torch.compiler.reset()
    # with more than 64 tokens "fp32" may round x times the norm weight, where the formula rounds that times r
    model, ids = transparent(device).model, prompt(2, 32).to(device)
    plain = seen(model, model, ids)
    options = WAYS[way] | ({} if rounding == "default" else {"rounding": rounding})
    report = minivllm.transformers.apply(model, **options)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if way == "compiled" else model
    got = seen(model, call, ids)
    assert not report.left_alone and not report.fallbacks
    other = {"default": "hf", "hf": "fp32", "fp32": "hf"}[rounding]
    right = formulas(model, ids, "fp32" if rounding == "default" else rounding)
    assert max(wrong(got, right).values()) < 0.002, wrong(got, right)
    assert min(wrong(got, formulas(model, ids, other)).values()) > 0.1
    if rounding == "hf":
        assert max(wrong(got, plain).values()) < 0.002, wrong(got, plain)


@pytest.mark.parametrize("kind", ["tiny-qwen3", "tiny-llama", "gemma3", "phi3"])
def test_heads_round_as_in_transformers(kind, device):
    """With "hf": their norms and the rotary embedding of a prompt."""
    model = model_of(kind, torch.bfloat16) if kind in FAMILIES else causal_lm(kind, "bfloat16")
    minivllm.transformers.apply(model.to(device), rounding="hf")
    fused = model.model.layers[0]._minivllm
    torch.manual_seed(0)
    q, k = (torch.randn(2, 40, n, fused.head_dim, device=device).bfloat16() for n in (fused.heads, fused.kv_heads))
    kinds = ("sliding_attention",) if kind == "gemma3" else ()
    embeddings = model.model.rotary_emb(q, torch.arange(40, device=device)[None], *kinds)
    normed = [norm(x) for norm, x in zip(fused.head_norms, (q, k))] or (q, k)
    expected = fused.family.module.apply_rotary_pos_emb(*normed, *embeddings, unsqueeze_dim=2)
    fused.norm_and_turn(q, k, k, embeddings, None)
    assert all(float((got != true).float().mean()) < 0.002 for got, true in zip((q, k), expected))


def test_unknown_roundings():
    model = causal_lm("tiny-llama")
    for rounding in ("bf16", None, ["hf"]):
        with pytest.raises(ValueError, match=r"apply: rounding is .*, expected 'hf' or 'fp32'"):
            minivllm.transformers.apply(model, rounding=rounding)
    assert not any("_minivllm" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_the_default_is_closer_to_float32(name, device):
    """Logits of the bfloat16 model: the mean over prompts of the difference in error, beyond three standard errors."""
    model, ids = causal_lm(name, "bfloat16", device, seed=4), prompt(64, 64).to(device)
    exact = copy.deepcopy(model).float()(ids).logits

    def errors():
        return (model(ids).logits.double() - exact).square().mean((1, 2)).sqrt()

    before = errors()
    minivllm.transformers.apply(model)
    more = (errors() - before) / before.mean()
    assert more.mean() + 3 * more.std() / len(more) ** 0.5 < 0, (more.mean(), more.std())
