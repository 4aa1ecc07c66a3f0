"""minivllm.transformers on every family beyond Llama, Qwen2 and Qwen3: what transformers' own model gives, in forwards,
with caches, in a Decoder and compiled, and the model as it was after undo."""

import copy
import warnings

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import FAMILIES, SMALL, close, decoded, model_of, prompt, rms  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.transformers import Decoder, NotFusedWarning  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")


def cached(model, ids, steps):
    """The same on the cache of transformers."""
    out = model(ids[:, :-steps], use_cache=True)
    logits, cache = [out.logits[:, -1:]], out.past_key_values
    logits += [model(token, past_key_values=cache).logits for token in ids[:, -steps:].split(1, 1)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(kind, attention, device, calls):
    """Of a prompt, one by one, in a Decoder before and after apply, with a hook on each MLP, and after undo."""
    model, ids = model_of(kind, attention=attention).to(device), prompt(2, 14).to(device)
    expected = model(ids).logits
    assert close(decoded(model, ids, 3), expected[:, -4:])
    report = minivllm.transformers.apply(model)
    assert not report.left_alone and len(report.fused) == 3
    calls.clear()
    assert close(model(ids).logits, expected)
    assert calls["rms_norm_qkv"] == 2 and calls["qk_norm_rope"] == 2 - (kind == "smollm3")
    assert close(cached(model, ids, 3), expected[:, -4:])
    calls.clear()
    assert close(decoded(model, ids, 3), expected[:, -4:]) and calls["decode_attention"] == 2 * 3
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *args: None)
    calls.clear()
    assert close(model(ids).logits, expected) and "linear_add" not in calls and "linear" not in calls
    if attention == "sdpa":
        minivllm.transformers.apply(model, packed=True, fused_tokens=0)
        calls.clear()
        assert close(model(ids).logits, expected) and "rms_norm_qkv" not in calls
    assert not report.fallbacks
    minivllm.transformers.undo(model)
    assert model(ids).logits.equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_are_replayed(kind):
    model, ids = model_of(kind, attention="sdpa").cuda(), prompt(2, 14).cuda()
    expected = model(ids).logits[:, -1]
    minivllm.transformers.apply(model)
    decoder = Decoder(model, 2, 32)
    for _ in range(3):
        assert close(decoder.prefill(ids), expected)
    assert decoder._prompts.captures == 1


@pytest.mark.parametrize("kind", ["phi3 with windows", "smollm3", "gemma3"])
def test_generate_with_padding(kind):
    """The tokens that transformers chooses for left-padded prompts, on the device's own loop."""
    model, ids = model_of(kind, attention="sdpa"), prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(ids * mask, **options)
    minivllm.transformers.apply(model)
    for loop in ({}, {"custom_generate": minivllm.transformers.generate}):
        assert model.generate(ids * mask, **options, **loop).equal(expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_16_bits_are_as_near_to_float32(kind, device):
    """Over prompts and steps; both roundings."""
    errors = dict.fromkeys(("plain", "hf", "fp32"), 0.0)
    model, ids = model_of(kind, torch.bfloat16).to(device), prompt(8, 14).to(device)
    exact = copy.deepcopy(model).float()(ids).logits[:, -4:]
    for rounding in errors:
        if rounding != "plain":
            minivllm.transformers.apply(model, rounding=rounding)
        for few in (ids, ids[:2]):
            got = model(few).logits[:, -4:]
            errors[rounding] += rms(got.float() - exact[: len(few)])
        errors[rounding] += rms(decoded(model, ids, 3).float() - exact)
    assert max(errors["hf"], errors["fp32"]) <= 1.15 * errors["plain"], errors


@pytest.mark.parametrize(
    "kind, rounding", [("granite", "hf"), ("smollm3", "fp32"), ("gemma2", "hf"), ("gemma2", "fp32")]
)
def test_compile(kind, rounding):
    model, ids = model_of(kind, attention="sdpa"), prompt(2, 7)
    expected = model(ids).logits
    report = minivllm.transformers.apply(model, rounding=rounding)
    torch.compiler.reset()
    assert close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits, expected)
    assert not report.fallbacks


def test_dropouts_between_the_parts_of_a_layer():
    """Phi-3 has them; one that trains, or that somebody watches, is called."""
    model, ids = model_of("phi3"), prompt(2, 7)
    expected = model(ids).logits
    report = minivllm.transformers.apply(model)
    model.model.layers[0].resid_mlp_dropout.train()
    assert not close(model(ids).logits, expected) and "training mode" in report.fallbacks["model.layers.0"]
    model.eval()
    model.model.layers[1].resid_attn_dropout.register_forward_hook(lambda module, args, output: output * 2)
    got = model(ids).logits
    minivllm.transformers.undo(model)
    assert close(got, model(ids).logits) and not close(got, expected)


def test_what_is_left_alone_is_named_once():
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL)).eval()
    expected = model(prompt()).logits
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = minivllm.transformers.apply(model)
    assert [each.category for each in warned] == [NotFusedWarning]
    assert report.left_alone == {"model": "OLMo 2 norms all heads of q and of k at once, which no op here does"}
    assert model(prompt()).logits.equal(expected)
    with pytest.raises(NotImplementedError, match=r"Olmo2ForCausalLM .* is not served; served are .* gemma3_text"):
        Decoder(model)
    gemma = model_of("gemma3")
    gemma.config.use_bidirectional_attention = True
    with pytest.raises(NotImplementedError, match="Gemma3ForCausalLM attends in both directions"):
        Decoder(gemma)
