"""minivllm.transformers: real architectures of transformers, loaded from a checkpoint, fused, and judged against
float64."""

import copy
import json
import threading

import pytest
from processes import PACKAGE, ROOT, run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

import minivllm  # noqa: E402
import minivllm.transformers  # noqa: E402
from minivllm.testing.models import OUTLIER, causal_lm, configuration  # noqa: E402

TINY = ("tiny-qwen2", "tiny-qwen3", "tiny-llama")
LAYERS = 3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The ops that fused layers call, counted by name."""
    counts = {}

    class Spy:
        def __getattr__(self, name):
            counts[name] = counts.get(name, 0) + 1
            return getattr(minivllm, name)

    monkeypatch.setattr(minivllm.transformers.layer, "minivllm", Spy())
    return counts


def prompt(batch=2, tokens=19, seed=1):
    return torch.randint(0, 512, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, new=12, **options):
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def rms(x):
    return float(x.double().square().mean().sqrt())


def close(a, b):
    """float32 against float32: sums in another order, which the outlier in k_norm makes larger."""
    return torch.allclose(a, b, rtol=1e-3, atol=5e-4)


def all_close(got, expected):
    return len(got) == len(expected) > 0 and all(map(close, got, expected))


def recording(model, ids, **options):
    """The outputs of the model's layers, as hooks see them, and the logits."""
    seen = []
    handles = [layer.register_forward_hook(lambda *args: seen.append(args[2])) for layer in model.model.layers]
    logits = model(ids, **options).logits
    for handle in handles:
        handle.remove()
    return seen, logits


# ---- the loading path, and what the results are worth ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_is_no_further_from_float64_than_before(name, dtype, device, tmp_path, calls):
    causal_lm(name, dtype, seed=3).save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").to(device)
    prompts = [prompt(1, tokens, seed).to(device) for seed, tokens in enumerate((1, 2, 7, 33, 70))]
    exact = copy.deepcopy(model).double()
    before = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    report = minivllm.transformers.apply(model, fused_tokens=64)
    assert report.fused == [f"model.layers.{i}" for i in range(LAYERS)] + ["model.norm"] and not report.left_alone
    after = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    assert calls["rms_norm_qkv"] == LAYERS * (len(prompts) - 1)  # 70 tokens are too many
    assert calls["rms_norm"] == len(prompts) * (1 + 2 * LAYERS * (name == "tiny-qwen3")) + 1
    assert not report.fallbacks
    # Sums in another order move single logits either way; the mean must not grow by more than that.
    assert sum(after) <= (1.1 if dtype != "float32" else 1.5) * sum(before), (before, after)
    if dtype == "float32":
        assert sum(after) / len(after) < 2e-5


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"fused_tokens": 0}, {"packed": True, "fused_tokens": 0}], ids=str
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name, options, cache, device):
    model = causal_lm(name, device=device)
    ids = prompt().to(device)
    how = {
        "cache_implementation": cache,
        "disable_compile": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = greedy(model, ids, **how)
    report = minivllm.transformers.apply(model, **options)
    got = greedy(model, ids, **how)
    assert got.sequences.equal(expected.sequences) and all_close(got.logits, expected.logits)
    assert len(report.fused) == LAYERS + 1 and not report.fallbacks
    assert (report.packed_bytes > 0) == ("packed" in options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding(attention, cache, device):
    """A batch of prompts of several lengths gives what each gives alone."""
    model = causal_lm("tiny-qwen3", device=device)
    model.set_attn_implementation(attention)
    ids = prompt(3, 24).to(device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 17)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    how = {"attention_mask": mask, "cache_implementation": cache, "disable_compile": True}
    expected = greedy(model, ids, **how)
    minivllm.transformers.apply(model)
    got = greedy(model, ids, **how)
    assert got.equal(expected)
    for row, padding in enumerate((0, 5, 17)):
        assert greedy(model, ids[row : row + 1, padding:])[0, -12:].equal(got[row, -12:])


def test_sliding_windows(device):
    """Layers of two kinds, each with its mask: the first sees everything, the others eight tokens."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model, ids = causal_lm("tiny-qwen2", device=device, **windows), prompt(1, 30).to(device)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    expected = decode(model, model, ids)
    minivllm.transformers.apply(model)
    assert close(decode(model, model, ids), expected)


def test_a_long_prompt_in_parts():
    """More tokens than fused_tokens, then fewer, on one cache."""
    model, ids = causal_lm("tiny-qwen3"), prompt(1, 400)
    exact = copy.deepcopy(model).double()(ids).logits
    before = rms(model(ids).logits - exact)
    for packed in (False, True):
        minivllm.transformers.apply(model, packed=packed, fused_tokens=64)
        cache, parts = None, []
        for part in ids.split([300, 99, 1], 1):
            outputs = model(part, past_key_values=cache, use_cache=True)
            cache, parts = outputs.past_key_values, [*parts, outputs.logits]
        assert rms(torch.cat(parts, 1) - exact) < 1.5 * before < 2e-5


def test_512_steps():
    """Fed the same tokens, the fused bfloat16 model chooses what the float32 model does as often as the plain one."""
    plain = causal_lm("tiny-qwen3", "bfloat16", seed=5)
    tokens = prompt(1, 520)
    true = copy.deepcopy(plain).float()(tokens).logits[:, 7:]
    steps = []
    for fused in (False, True):
        if fused:
            report = minivllm.transformers.apply(plain)
        cache = transformers.StaticCache(config=plain.config, max_cache_len=520)
        logits = [plain(tokens[:, :8], past_key_values=cache).logits[:, -1:]]
        logits += [plain(token, past_key_values=cache).logits for token in tokens[:, 8:].split(1, 1)]
        steps.append(torch.cat(logits, 1))
    assert not report.fallbacks
    agreed = [int((logits.argmax(-1) == true.argmax(-1)).sum()) for logits in steps]
    errors = [rms(logits - true) for logits in steps]
    assert true.argmax(-1).unique().numel() > 100
    assert agreed[1] >= agreed[0] - 5 and agreed[1] > 256, agreed  # five of 513 are ties that fall either way
    assert errors[1] <= 1.05 * errors[0], errors


def test_the_default_limit(device, monkeypatch):
    def limit(dtype):
        model = causal_lm("tiny-llama", dtype, device)
        minivllm.transformers.apply(model)
        return model.model.layers[0]._minivllm.fused_tokens

    row = minivllm.Kernel("rms_norm_qkv", "bf16_of_hopper", "bfloat16", "sm90a", True, "")
    for usable in (False, True):
        monkeypatch.setattr(minivllm.transformers, "kernels", lambda op: [row._replace(usable=usable)])
        assert limit("bfloat16") == (64 if device == "cuda" and not usable else None)
        assert limit("float32") == (64 if device == "cuda" else None)


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


def test_layers_keep_their_contract(calls):
    """Whoever calls a layer or hooks it sees whole hidden states, as does output_hidden_states."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
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
    assert calls == {
        "rms_norm_qkv": LAYERS,
        "rms_norm": 2 * LAYERS + 1,
        "add_rms_norm": 1,
        "fused_add_rms_norm": LAYERS - 1,
    }


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
    assert close(torch.load(tmp_path / "model.pt", weights_only=False)(ids).logits, expected)


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
    adapt: "self_attn.v_proj is a LoRALinear, expected Linear",
    quantise: "self_attn.q_proj is a Quantised, expected Linear",
    hook: "self_attn.q_norm has a hook, which would not be called",
    pre_hook: "self_attn has a hook, which would not be called",
    replace_forward: "post_attention_layernorm is a Qwen3RMSNorm whose forward was replaced",
    parametrise: "self_attn.k_proj is a ParametrizedLinear, expected Linear",
    replace_layer: "it is a MyLayer, expected Qwen3DecoderLayer",
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


def test_dtypes_biases_and_other_models():
    model = causal_lm("tiny-qwen2").double()
    report = minivllm.transformers.apply(model)
    assert not report.fused and len(report.left_alone) == LAYERS + 1
    assert report.left_alone["model.norm"] == "weight has dtype torch.float64, expected float32, float16 or bfloat16"
    model = causal_lm("tiny-qwen2")
    model.model.layers[0].self_attn.k_proj.bias = None
    model.model.layers[1].self_attn.k_proj.half()
    left_alone = minivllm.transformers.apply(model).left_alone
    assert left_alone["model.layers.0"] == "some of q_proj, k_proj and v_proj have a bias and some have none"
    assert left_alone["model.layers.1"].startswith("its weights differ in dtype or device: torch.float16 on cpu")
    other = torch.nn.Linear(3, 3)
    assert minivllm.transformers.apply(other).left_alone == {
        "": "Linear holds none of LlamaModel, Qwen2Model, Qwen3Model"
    }
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


# ---- graphs ---------------------------------------------------------------------------------------------------------


def decode(model, call, ids):
    """The logits of feeding the last four tokens one by one, on a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :-4], past_key_values=cache)
    return torch.cat([call(token, past_key_values=cache).logits.clone() for token in ids[:, -4:].split(1, 1)], 1)


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen3"])
def test_compile(name, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model = causal_lm(name, device=device)
    ids = prompt().to(device)
    expected = decode(model, model, ids)
    report = minivllm.transformers.apply(model)
    counter = CompileCounterWithBackend("aot_eager")
    assert close(decode(model, torch.compile(model, fullgraph=True, backend=counter), ids), expected)
    ops = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert (
        ops.count("minivllm.rms_norm_qkv.default") == 1 and ops.count("minivllm.add_rms_norm_qkv.default") == LAYERS - 1
    )
    assert not report.fallbacks


@pytest.mark.gpu
def test_compile_reduce_overhead():
    torch.compiler.reset()
    model = causal_lm("tiny-qwen3", "bfloat16", "cuda")
    ids = prompt(1).cuda()
    expected = decode(model, model, ids)
    minivllm.transformers.apply(model)
    got = decode(model, torch.compile(model, fullgraph=True, mode="reduce-overhead"), ids)
    assert rms(got - expected) < 0.1 * rms(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph_of_a_step(packed):
    """Captured once, replayed with other tokens, on a static cache."""
    model = causal_lm("tiny-qwen3", "float16", "cuda")
    ids = prompt(1).cuda()
    expected = decode(model, model, ids)
    minivllm.transformers.apply(model, packed=packed)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :-4], past_key_values=cache)
    state = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
    token, graph = ids[:, -4:-3].clone(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(token, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = model(token, past_key_values=cache).logits
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
    for tensor, value in zip(held, state):
        tensor.copy_(value)
    got = []
    for next_token in ids[:, -4:].split(1, 1):
        token.copy_(next_token)
        graph.replay()
        got.append(logits.clone())
    assert rms(torch.cat(got, 1) - expected) < 0.05 * rms(expected)


# ---- the example and the benchmark ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_layer_of_the_example(dtype, device, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from examples import nano_layer

    before, after = nano_layer.compare(device, dtype)
    assert after <= (1.25 if dtype == torch.float32 else 1.05) * before


def test_the_benchmark(tmp_path):
    """On the CPU, where it has no graphs."""
    path = tmp_path / "model.json"
    arguments = [
        "-m",
        "benchmarks",
        "model",
        "--device",
        "cpu",
        "--shapes",
        "tiny-llama",
        "--quick",
        "--json",
        str(path),
    ]
    done = run(None, arguments=arguments, paths=(PACKAGE, ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    speed = [(row["mode"], row["batch"], row["variant"]) for row in rows if "us" in row]
    cases = [("decode, eager", 1), ("decode, eager", 16), ("prefill, eager", 1)]
    assert [row for row in speed if row[2] != "minivllm and linear"] == [
        (*case, variant) for case in cases for variant in ("transformers", "minivllm")
    ]
    errors = {(row["kind"], row["variant"]): row["mean_error"] for row in rows if "kind" in row}
    assert len(errors) == 6 and not any("error" in row for row in rows)
    for (kind, variant), error in errors.items():
        assert 0 < error <= 1.05 * errors[kind, "transformers"], (kind, variant)


# ---- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b"])
def test_full_size(name):
    """Random weights, the outlier among them. Errors are against float32 on the same GPU."""
    model = causal_lm(name, "bfloat16", "cuda")
    if name == "qwen3-0.6b":
        assert all(float(layer.self_attn.k_norm.weight.max()) == OUTLIER for layer in model.model.layers)
    exact = copy.deepcopy(model).float()
    prompts = [torch.randint(0, 150000, (1, tokens), device="cuda") for tokens in (5, 33, 64, 700)]
    before = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    report = minivllm.transformers.apply(model)
    after = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    assert len(report.fused) == model.config.num_hidden_layers + 1 and not report.fallbacks
    assert sum(after) <= 1.03 * sum(before), (before, after)
    logits = decode(model, model, prompts[1])
    assert rms(logits - exact(prompts[1]).logits[:, -4:]) <= 2 * max(before)
