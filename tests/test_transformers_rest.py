"""What fused layers compute behind q, k and v, and when they leave that to the modules."""

import copy

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import LAYERS, TINY, close, prompt, rms  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import Decoder, rest  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")
STEPS = 4


def mlps(calls):
    """MLPs on the ops."""
    return calls.get("rms_norm_gate_up", 0)


def hook_down(layer):
    layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook_mlp(layer):
    layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replace_o_proj(layer):
    linear = layer.self_attn.o_proj
    linear.forward = lambda x: 2 * torch.nn.functional.linear(x, linear.weight)


def replace_activation(layer):
    layer.mlp.act_fn = torch.nn.Tanh()


def replace_mlp_forward(layer):
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * own(x)


def adapt_gate(layer):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.mlp.gate_proj.__class__ = Adapted


def parametrise_up(layer):
    torch.nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    layer.mlp.up_proj.parametrizations.weight.original0.mul_(2)


SPOILT = (hook_down, pre_hook_mlp, replace_o_proj, replace_activation, replace_mlp_forward, adapt_gate, parametrise_up)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_others_put_there_is_called(spoil, when, calls):
    """In the layer that has it, in a forward and in a Decoder's step; the other layers go on as they were."""
    plain, model, ids = causal_lm("tiny-qwen3"), causal_lm("tiny-qwen3"), prompt()
    unspoilt = plain(ids).logits
    spoil(plain.model.layers[1])
    expected = plain(ids).logits
    assert not close(expected, unspoilt)
    if when == "before":
        spoil(model.model.layers[1])
    minivllm.transformers.apply(model)
    if when == "after":
        spoil(model.model.layers[1])
    calls.clear()
    assert close(model(ids).logits, expected)
    assert calls["rms_norm_qkv"] == LAYERS and mlps(calls) == LAYERS - 1
    decoder = Decoder(model, 2, 32, graph=False)
    assert close(decoder.prefill(ids[:, :-1]), expected[:, -2])
    calls.clear()
    assert close(decoder.step(ids[:, -1]), expected[:, -1])
    assert calls["rms_norm_qkv"] == LAYERS and calls["decode_attention"] == mlps(calls) == LAYERS - 1


def test_a_silu_that_is_replaced(monkeypatch, calls):
    model, ids, own, seen = causal_lm("tiny-qwen3"), prompt(), torch.nn.functional.silu, []
    minivllm.transformers.apply(model)
    monkeypatch.setattr(torch.nn.functional, "silu", lambda *args, **more: (seen.append(1), own(*args, **more))[1])
    model(ids)
    assert len(seen) == LAYERS and mlps(calls) == 0


def test_the_forward_of_the_mlp_in_its_class(monkeypatch, calls):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    minivllm.transformers.apply(model)
    kind = type(model.model.layers[0].mlp)
    own, seen = kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda self, x: (seen.append(1), own(self, x))[1])
    model(ids)
    assert len(seen) == LAYERS and mlps(calls) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY)
def test_a_step_of_a_decoder(name, attention, calls, device):
    """Five calls a layer, and the logits of the whole text."""
    model = causal_lm(name, device=device)
    model.config._attn_implementation = attention
    plain, ids = causal_lm(name, device=device), prompt(3).to(device)
    minivllm.transformers.apply(model)
    decoder = Decoder(model, 3, 32, graph=False)
    logits = [decoder.prefill(ids).clone()]
    for _ in range(STEPS):
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], 1)
        calls.clear()
        logits.append(decoder.step(ids[:, -1]).clone())
        assert calls == {
            "rms_norm_qkv": LAYERS, "decode_attention": LAYERS, "linear_add": 2 * LAYERS, "rms_norm_gate_up": LAYERS,
            "rms_norm_linear": 1}  # fmt: skip
    expected = plain(ids).logits[:, -STEPS - 1 :]
    assert close(torch.stack(logits, 1), expected)


@pytest.mark.parametrize("where", ["transformers", "torch"])
def test_an_attention_that_is_replaced_is_called_by_a_decoder(where, monkeypatch, calls):
    model, ids, seen = causal_lm("tiny-qwen3"), prompt(), []
    minivllm.transformers.apply(model)
    attentions, functional = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, torch.nn.functional
    own = attentions["sdpa"] if where == "transformers" else functional.scaled_dot_product_attention

    def replacement(*args, **more):
        seen.append(1)
        return own(*args, **more)

    if where == "transformers":
        monkeypatch.setitem(attentions, "sdpa", replacement)
    else:
        monkeypatch.setattr(functional, "scaled_dot_product_attention", replacement)
    decoder = Decoder(model, 2, 32, graph=False)
    decoder.step(decoder.prefill(ids).argmax(-1))
    assert len(seen) == 2 * LAYERS and "decode_attention" not in calls and mlps(calls) == 2 * LAYERS


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_steps_are_as_accurate_as_those_of_transformers(dtype, rounding, device):
    """Teacher-forced steps against the same weights in float32."""
    torch_dtype = getattr(torch, dtype)
    errors = {"plain": 0.0, "ours": 0.0}
    for seed in range(6):
        model = causal_lm("tiny-qwen3", dtype, device, seed=seed)
        exact = causal_lm("tiny-qwen3", dtype, device, seed=seed).float()
        text = prompt(2, 19 + STEPS, seed).to(device)
        true = exact(text).logits[:, 19:]
        for name in errors:
            if name == "ours":
                minivllm.transformers.apply(model, rounding=rounding)
            decoder = Decoder(model, 2, 32, graph=False)
            decoder.prefill(text[:, :19])
            steps = torch.stack([decoder.step(text[:, 19 + i]).clone() for i in range(STEPS)], 1)
            assert steps.dtype == torch_dtype
            errors[name] += rms(steps.float() - true) ** 2
    # Of so few logits of so small a model; the benchmark `model` pools enough for the bound of 1.
    assert errors["ours"] <= 1.2 * errors["plain"], errors


def test_a_copy_looks_at_its_own_modules():
    model, ids = causal_lm("tiny-qwen3"), prompt()
    minivllm.transformers.apply(model)
    twin = copy.deepcopy(model)
    mine, other = (each.model.layers[1]._minivllm.rest for each in (model, twin))
    assert (
        isinstance(mine, rest.Rest) and mine.mlp is model.model.layers[1].mlp and other.mlp is twin.model.layers[1].mlp
    )
    hook_down(twin.model.layers[1])
    assert mine.is_usable(torch.float32) and not other.is_usable(torch.float32)
    assert not close(twin(ids).logits, model(ids).logits)
