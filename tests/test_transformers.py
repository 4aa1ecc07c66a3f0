"""minivllm.transformers: real architectures of transformers, loaded from a checkpoint, fused, and judged against
float64."""

import copy
import json

import pytest
from processes import PACKAGE, ROOT, run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import LAYERS, TINY, all_close, close, greedy, prompt, rms  # noqa: E402

import minivllm  # noqa: E402
import minivllm.transformers  # noqa: E402
from minivllm.testing.models import OUTLIER, causal_lm  # noqa: E402
from minivllm.transformers import layer  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- the loading path, and what the results are worth ---------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_is_no_further_from_float64_than_before(name, dtype, rounding, device, tmp_path, calls):
    causal_lm(name, dtype, seed=3).save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").to(device)
    prompts = [prompt(1, tokens, seed).to(device) for seed, tokens in enumerate((1, 2, 7, 33, 70))]
    exact = copy.deepcopy(model).double()
    before = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    report = minivllm.transformers.apply(model, fused_tokens=64, rounding=rounding)
    assert report.fused == [f"model.layers.{i}" for i in range(LAYERS)] + ["model.norm"] and not report.left_alone
    after = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    assert calls["rms_norm_qkv"] == LAYERS * (len(prompts) - 1)  # 70 tokens are too many
    assert calls["rms_norm"] == 2  # of those alone: the norm of the first layer, and the final one
    assert calls["qk_norm_rope"] == LAYERS * len(prompts)
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


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
def test_512_steps(rounding):
    """Fed the same tokens, the fused bfloat16 model chooses what the float32 model does as often as the plain one."""
    plain = causal_lm("tiny-qwen3", "bfloat16", seed=5)
    tokens = prompt(1, 520)
    true = copy.deepcopy(plain).float()(tokens).logits[:, 7:]
    steps = []
    for fused in (False, True):
        if fused:
            report = minivllm.transformers.apply(plain, rounding=rounding)
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
        model = causal_lm("tiny-llama", dtype)
        minivllm.transformers.apply(model)
        assert model.model.layers[0]._minivllm.limits_now() == (None, None)
        return model.to(device).model.layers[0]._minivllm.limits_now()[0]  # where the model is now

    for capability in (0, 80, 90, 100):
        monkeypatch.setattr(minivllm.transformers, "_capability", lambda gpu: capability)
        for dtype in ("bfloat16", "float32"):
            assert limit(dtype) == (64 if device == "cuda" and capability != 90 else None)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def decode(model, call, ids):
    """The logits of feeding the last four tokens one by one, on a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :-4], past_key_values=cache)
    return torch.cat([call(token, past_key_values=cache).logits.clone() for token in ids[:, -4:].split(1, 1)], 1)


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("lone_heads", [0, 64])  # attention of our own, of transformers
def test_compile(name, rounding, lone_heads, device, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    monkeypatch.setattr(layer, "LONE_HEADS", lone_heads)
    model = causal_lm(name, device=device)
    ids = prompt().to(device)
    expected = decode(model, model, ids)
    report = minivllm.transformers.apply(model, rounding=rounding)
    counter = CompileCounterWithBackend("aot_eager")
    assert close(decode(model, torch.compile(model, fullgraph=True, backend=counter), ids), expected)
    ops = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert (
        ops.count("minivllm.rms_norm_qkv.default") == 1 and ops.count("minivllm.add_rms_norm_qkv.default") == LAYERS - 1
    )
    assert not report.fallbacks


@pytest.mark.parametrize("name", TINY)
def test_compile_of_more_tokens_than_the_limit_is_the_unpatched_graph(name, device):
    """No operation of ours, and none more or less: such a prefill cannot become slower."""
    model = causal_lm(name, "bfloat16", device)
    ids = prompt(1, 70).to(device)

    def graph():
        torch.compiler.reset()
        graphs = []
        torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(ids)
        return sorted(str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call"))

    before = graph()
    minivllm.transformers.apply(model, fused_tokens=64, rounding="hf")
    assert graph() == before and len(before) > 30 * LAYERS


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
    assert not any("error" in row for row in rows)


# ---- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b"])
def test_full_size(name, rounding):
    """Random weights, the outlier among them. Errors are against float32 on the same GPU."""
    model = causal_lm(name, "bfloat16", "cuda")
    if name == "qwen3-0.6b":
        assert all(float(layer.self_attn.k_norm.weight.max()) == OUTLIER for layer in model.model.layers)
    exact = copy.deepcopy(model).float()
    prompts = [torch.randint(0, 150000, (1, tokens), device="cuda") for tokens in (5, 33, 64, 700)]
    before = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    report = minivllm.transformers.apply(model, rounding=rounding)
    after = [rms(model(ids).logits - exact(ids).logits) for ids in prompts]
    assert len(report.fused) == model.config.num_hidden_layers + 1 and not report.fallbacks
    assert sum(after) <= 1.03 * sum(before), (before, after)
    logits = decode(model, model, prompts[1])
    assert rms(logits - exact(prompts[1]).logits[:, -4:]) <= 2 * max(before)
