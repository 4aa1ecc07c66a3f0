"""minivllm.transformers: what it leaves as it was, and what it leaves alone, and says so."""

import copy
import threading

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import LAYERS, all_close, close, prompt, recording, rms  # noqa: E402

import minivllm  # noqa: E402
import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm, configuration  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- what stays as it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_state_dict_and_saving(packed, tmp_path):
    model = causal_lm("tiny-qwen2")
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    minivllm.transformers.apply(model, packed=packed)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(tensor.equal(before[name][0]) for name, tensor in after.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    moved = {name for name, tensor in after.items() if tensor.data_ptr() != before[name][1]}
    expected = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(LAYERS) for x in "qkv"]
    assert moved == (set(expected) if packed else set())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(tensor.equal(before[name][0]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("packed", [False, True])
def test_undo(packed):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    expected = model(ids).logits
    report = minivllm.transformers.apply(model, packed=packed)
    report.undo()
    assert not any({"forward", "_minivllm"} & set(module.__dict__) for module in model.modules())
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)
    assert model(ids).logits.equal(expected)
    report.undo()  # nothing left to do
    minivllm.transformers.apply(minivllm.transformers.apply(model)._model)
    assert close(model(ids).logits, expected)


def test_undo_refuses_what_others_put_on_top():
    model = causal_lm("tiny-llama")
    report = minivllm.transformers.apply(model)
    layer = model.model.layers[1]
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"undo: the forward of model\.layers\.1 was replaced after apply"):
        report.undo()
    expected = causal_lm("tiny-llama")(prompt()).logits
    assert close(model(prompt()).logits, expected)  # such a layer is not handed an open sum
    layer.forward = ours
    report.undo()


@pytest.mark.parametrize("hooked", [False, True], ids=["", "a hook on the MLP"])
def test_layers_keep_their_contract(calls, hooked):
    """Whoever calls a layer or hooks it sees whole hidden states, as does output_hidden_states."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
    for layer in model.model.layers if hooked else ():
        layer.mlp.register_forward_pre_hook(lambda *args: None)
    expected = model(ids, output_hidden_states=True).hidden_states
    seen_before, _ = recording(model, ids)
    minivllm.transformers.apply(model)
    seen, logits = recording(model, ids)
    assert all_close(seen, seen_before) and all_close(model(ids, output_hidden_states=True).hidden_states, expected)
    x = expected[0]
    position = torch.arange(ids.shape[1])[None]
    for layer, true in zip(model.model.layers, seen_before):
        x = layer(x, position_embeddings=model.model.rotary_emb(x, position))
        assert close(x, true)
    calls.clear()
    assert close(model(ids).logits, logits)
    # The recorders of transformers stay on the modules after their first use; they stop nothing.
    rest = {"linear_add": 2 * LAYERS, "rms_norm_gate_up": LAYERS, "rms_norm_linear": 1}
    if hooked:
        rest = {"add_rms_norm": LAYERS, "add_rms_norm in place": LAYERS - 1, "rms_norm_linear": 1}
    assert calls == {"rms_norm_qkv": LAYERS, "qk_norm_rope": LAYERS} | rest


def test_pre_hooks_see_the_sum():
    model, ids, seen = causal_lm("tiny-llama"), prompt(), []
    expected = model(ids, output_hidden_states=True).hidden_states
    minivllm.transformers.apply(model)
    model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    assert close(seen[0], expected[2])


def test_attentions_are_recorded():
    model, ids = causal_lm("tiny-qwen3"), prompt()
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    report = minivllm.transformers.apply(model)
    assert all_close(model(ids, output_attentions=True).attentions, expected)
    assert set(report.fallbacks.values()) == {"attentions are recorded"}
    model.config.output_attentions = True
    assert all_close(model(ids).attentions, expected)


def test_the_callers_embeddings_are_not_written_to():
    model = causal_lm("tiny-qwen3")
    minivllm.transformers.apply(model)
    embeddings = model.get_input_embeddings()(prompt())
    before = embeddings.clone()
    model(inputs_embeds=embeddings)
    assert embeddings.equal(before)


def test_a_copy_is_a_model_of_its_own(tmp_path):
    model, ids = causal_lm("tiny-qwen2"), prompt()
    minivllm.transformers.apply(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.weight.zero_()
    expected = model(ids).logits
    plain = copy.deepcopy(twin)
    minivllm.transformers.undo(plain)
    assert close(twin(ids).logits, plain(ids).logits) and not close(twin(ids).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    with pytest.warns(minivllm.transformers.NotFusedWarning, match="came out of a pickle") as warned:
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(warned) == 1
    assert close(loaded(ids).logits, expected)
    assert len(minivllm.transformers.apply(loaded).fused) == LAYERS + 1
    assert close(loaded(ids).logits, expected)


def test_compiled_calls_look_at_their_own_modules():
    """Also those of a copy, and of a module that came after they were traced."""
    torch.compiler.reset()
    model, ids = causal_lm("tiny-qwen3"), prompt()
    report = minivllm.transformers.apply(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].input_layernorm.register_forward_hook(lambda module, args, y: y * 2)
    for each in (model, twin):
        call = torch.compile(each, backend="aot_eager")
        assert close(call(ids).logits, each(ids).logits)
    call = torch.compile(model, backend="aot_eager")
    before = call(ids).logits
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Tanh())
    after = call(ids).logits
    assert not close(after, before)
    report.undo()
    assert close(after, model(ids).logits)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_may_change_and_move(packed):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    report = minivllm.transformers.apply(model, packed=packed, fused_tokens=20)
    other = causal_lm("tiny-qwen3", seed=8)
    model.load_state_dict(other.state_dict())
    for part in (ids, ids[:1]):  # more than 20 tokens, and fewer
        assert close(model(part).logits, other(part).logits)
    model.load_state_dict(causal_lm("tiny-qwen3", seed=9).state_dict(), assign=True)
    other.load_state_dict(model.state_dict())
    for part in (ids, ids[:1]):
        assert close(model(part).logits, other(part).logits)
    model.bfloat16()
    other.bfloat16()
    for part in (ids, ids[:1]):
        assert rms(model(part).logits - other(part).logits) < 0.1 * rms(other(part).logits)
    assert not report.fallbacks


def test_two_threads():
    model = causal_lm("tiny-qwen3")
    prompts = [prompt(1, 11, seed) for seed in range(4)]
    expected = [model(ids).logits for ids in prompts]
    minivllm.transformers.apply(model)
    wrong = []

    def run(ids, true):
        with torch.no_grad():
            wrong.extend(1 for _ in range(30) if not close(model(ids).logits, true))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(prompts, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what is left alone, and says so --------------------------------------------------------------------------------


class LoRALinear(torch.nn.Module):
    """An adapter as they are: holds the linear, shows its weight, and adds to its result."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x.sum(-1, keepdim=True)


class Quantised(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.round(decimals=2), self.bias)


def adapt(layer):
    layer.self_attn.v_proj = LoRALinear(layer.self_attn.v_proj)


def quantise(layer):
    layer.self_attn.q_proj.__class__ = Quantised


def hook(layer):
    layer.self_attn.q_norm.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(layer):
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 2}), with_kwargs=True
    )


def replace_forward(layer):
    layer.post_attention_layernorm.forward = lambda x: x * 2


def parametrise(layer):
    torch.nn.utils.parametrizations.weight_norm(layer.self_attn.k_proj)


def replace_layer(layer):
    layer.__class__ = type("MyLayer", (type(layer),), {})


SPOILT = {
    adapt: "self_attn.v_proj is a test_transformers_kept.LoRALinear, expected Linear",
    quantise: "self_attn.q_proj is a test_transformers_kept.Quantised, expected Linear",
    hook: "self_attn.q_norm has a hook, which would not be called",
    pre_hook: "self_attn has a hook, which would not be called",
    replace_forward: "post_attention_layernorm is a Qwen3RMSNorm whose forward was replaced",
    parametrise: "self_attn.k_proj is a ParametrizedLinear, expected Linear",
    replace_layer: "it is a test_transformers_kept.MyLayer, expected Qwen3DecoderLayer",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_is_unknown_is_left_alone_and_named(spoil):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    plain = model(ids).logits
    spoil(model.model.layers[1])
    expected = model(ids).logits
    report = minivllm.transformers.apply(model)
    assert report.left_alone == {"model.layers.1": SPOILT[spoil]}
    assert report.fused == ["model.layers.0", "model.layers.2", "model.norm"]
    assert "model.layers.1: left alone: " + SPOILT[spoil] in repr(report)
    assert close(model(ids).logits, expected)
    if spoil not in (parametrise, replace_layer):  # those compute the same
        assert not close(expected, plain)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_comes_later_is_not_passed_over(spoil):
    if spoil is replace_layer:
        pytest.skip("a layer of another class runs that class's code by definition")
    model, ids = causal_lm("tiny-qwen3"), prompt()
    report = minivllm.transformers.apply(model)
    spoil(model.model.layers[1])
    got = model(ids).logits
    fallbacks = dict(report.fallbacks)
    report.undo()
    assert close(got, model(ids).logits)
    assert list(fallbacks) == ["model.layers.1"], fallbacks


def test_adapters_outside_what_is_fused_change_nothing():
    model, ids = causal_lm("tiny-qwen3"), prompt()
    for layer in model.model.layers:
        layer.self_attn.o_proj = LoRALinear(layer.self_attn.o_proj)
        layer.mlp.act_fn = torch.nn.Tanh()
    expected = model(ids).logits
    report = minivllm.transformers.apply(model)
    assert len(report.fused) == LAYERS + 1 and not report.left_alone
    assert close(model(ids).logits, expected) and not report.fallbacks


def test_what_o_proj_returns_may_be_anothers():
    """A forward of its own may keep its result, so that is not written to."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
    kept = torch.randn(*ids.shape, model.config.hidden_size)
    for layer in model.model.layers:
        layer.self_attn.o_proj.forward = lambda x: kept
    before, expected = kept.clone(), model(ids).logits
    report = minivllm.transformers.apply(model)
    assert len(report.fused) == LAYERS + 1
    assert close(model(ids).logits, expected) and not report.fallbacks
    assert kept.equal(before)


def test_dtypes_biases_and_other_models():
    model = causal_lm("tiny-qwen2").double()
    why = "weight has dtype float64, which is not supported; expected float32, float16 or bfloat16"
    with pytest.warns(minivllm.transformers.NotFusedWarning, match=f"nothing was fused: model.layers.0: .*{why}"):
        report = minivllm.transformers.apply(model)
    assert not report.fused and len(report.left_alone) == LAYERS + 1
    assert report.left_alone["model.norm"] == why
    model = causal_lm("tiny-qwen2")
    model.model.layers[0].self_attn.k_proj.bias = None
    model.model.layers[1].self_attn.k_proj.half()
    left_alone = minivllm.transformers.apply(model).left_alone
    assert left_alone["model.layers.0"] == "some of q_proj, k_proj and v_proj have a bias and some have none"
    assert left_alone["model.layers.1"].startswith("its weights differ in dtype or device: torch.float16 on cpu")
    other = torch.nn.Linear(3, 3)
    known = ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite", "SmolLM3", "Phi3", "Gemma2", "Gemma3Text")
    why = f"Linear holds none of {', '.join(f'{name}Model' for name in known)}"
    with pytest.warns(minivllm.transformers.NotFusedWarning, match=f"nothing was fused: the model: {why}") as warned:
        assert minivllm.transformers.apply(other).left_alone == {"": why}
    assert len(warned) == 1 and warned[0].filename == __file__
    with pytest.raises(TypeError, match="apply: model is of type str, expected a torch.nn.Module"):
        minivllm.transformers.apply("Qwen/Qwen3-0.6B")
    with pytest.raises(ValueError, match="apply: fused_tokens is -1, expected"):
        minivllm.transformers.apply(other, fused_tokens=-1)


def test_heads_on_top_and_bare_models():
    config = configuration("tiny-qwen3", num_labels=3, pad_token_id=0)
    for model in (transformers.Qwen3Model(config), transformers.Qwen3ForSequenceClassification(config)):
        model.eval()
        expected = model(prompt())[0]
        assert len(minivllm.transformers.apply(model).fused) == LAYERS + 1
        assert close(model(prompt())[0], expected)


def test_training_has_its_gradients():
    model, ids = causal_lm("tiny-qwen3"), prompt()
    expected = copy.deepcopy(model)
    report = minivllm.transformers.apply(model)
    for prepare in ("eval", "train", "gradient_checkpointing_enable"):
        for each in (model, expected):
            getattr(each, prepare)()
            each.zero_grad()
            with torch.enable_grad():
                each(ids, labels=ids, use_cache=False).loss.backward()
        for parameter, true in zip(model.parameters(), expected.parameters()):
            assert parameter.grad.equal(true.grad)
        assert len(report.fallbacks) == LAYERS and "gradient mode is on" in repr(report)
    report.fallbacks.clear()
    model(ids)
    assert set(report.fallbacks.values()) == {"it is in training mode: call model.eval()"}


def test_autocast():
    model, ids = causal_lm("tiny-qwen3"), prompt()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        report = minivllm.transformers.apply(model)
        assert rms(model(ids).logits - expected) < 0.02 * rms(expected)
    assert set(report.fallbacks.values()) == {"autocast is on"}
