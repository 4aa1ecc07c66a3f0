"""minivllm.transformers.Decoder and generate, against model.generate of transformers alone."""

import copy
import gc
import weakref

import pytest
from processes import PACKAGE, ROOT, succeeds

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import close, prompt, save_checkpoint  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import Decoder, generate, generation, last_generation  # noqa: E402
from minivllm.transformers.prompt import padded as columns_of  # noqa: E402
from minivllm.transformers.served import fingerprint  # noqa: E402

WINDOW = 8  # shorter than the prompts
SLIDING = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
MODELS = {
    "qwen2": ("tiny-qwen2", {}),
    "qwen2 with windows": ("tiny-qwen2", SLIDING),
    "qwen3": ("tiny-qwen3", {}),
    "qwen3 with windows": ("tiny-qwen3", SLIDING),
    "llama": ("tiny-llama", {}),
    "eager llama": ("tiny-llama", {"attn_implementation": "eager"}),
    "mistral": ("mistral", {}),
}
NEW = 10


def model_of(kind, device="cpu"):
    name, changes = MODELS[kind]
    changes = dict(changes)
    attention = changes.pop("attn_implementation", "sdpa")
    if name == "mistral":
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=32, initializer_range=0.1, sliding_window=WINDOW)  # fmt: skip
        model = transformers.MistralForCausalLM(config).eval().to(device)
    else:
        model = causal_lm(name, device=device, **changes)
    model.config._attn_implementation = attention
    # What is not asked for: no ends, and no padding that it would have to guess.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def qwen():
    return model_of("qwen3")


@pytest.fixture(params=["plain", "fused"])
def either(request, qwen):
    """Before and after minivllm.transformers.apply, which changes the sums' order."""
    if request.param == "fused":
        minivllm.transformers.apply(qwen)
    yield qwen
    minivllm.transformers.undo(qwen)


def padded(device="cpu", side="left"):
    """Prompts of 19, 6 and 13 tokens, and their mask."""
    ids, mask = prompt(3).to(device), torch.zeros(3, 19, dtype=torch.long, device=device)
    for b, tokens in enumerate((19, 6, 13)):
        if side == "left":
            mask[b, 19 - tokens :] = 1
        else:
            mask[b, :tokens] = 1
            ids[b] = ids[b].roll(tokens)
    return ids * mask, mask


def both(model, ids, seed=0, **options):
    """What transformers alone returns, and what it returns with our loop."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    results = []
    for more in ({}, {"custom_generate": generate}):
        torch.manual_seed(seed)
        results.append(model.generate(ids, **options, **more))
    return results


def test_a_model_in_float64(device):
    """Whose logits greedy_tokens does not take as they are."""
    model, ids = model_of("llama", device).double(), prompt(3).to(device)
    alone, ours = both(model, ids)
    assert ours.equal(alone)


def test_a_step_ends_in_one_call(qwen, monkeypatch):
    """What follows the logits is greedy_tokens and nothing else."""
    calls = []
    real = minivllm._C.greedy_tokens

    class Spy:
        @staticmethod
        def greedy_tokens(logits, **options):
            calls.append(options["positions"] is not None)
            return real(logits, **options)

    monkeypatch.setattr(minivllm.transformers.decoder, "ops", Spy)
    decoder = Decoder(qwen, 2, 40, graph=False)
    assert len(list(decoder.generate(prompt(2), 5))) == 5
    assert calls == [False, True, True, True, True]
    assert decoder._counts.tolist() == [5, 5] and decoder._positions.tolist() == [prompt(2).shape[1] + 4] * 2


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_those_of_transformers(kind, device):
    model = model_of(kind, device)
    ids, mask = padded(device)
    expected, got = both(model, ids, attention_mask=mask)
    assert torch.equal(got, expected) and last_generation().on_device and last_generation().tokens == NEW
    expected, got = both(model, ids[:1])
    assert torch.equal(got, expected)


def test_a_changed_rotary_embedding(either, device):
    """A step looks rows up that were computed before. They follow a change of the frequencies at the next prompt."""
    model = copy.deepcopy(either).to(device)
    decoder, ids = Decoder(model, 1, 32), prompt(1).to(device)
    for factor in (1, 0.5):
        model.model.rotary_emb.inv_freq *= factor
        decoder.prefill(ids)
        tokens = torch.tensor([[7, 11]], device=device)
        logits = [decoder.step(token).clone() for token in tokens.unbind(1)]
        with torch.no_grad():
            whole = model(torch.cat([ids, tokens], 1)).logits[0, -2:]
        assert close(torch.cat(logits), whole)


def test_tokens_of_a_fused_model(either):
    """Two float32 sums in another order: the tokens are the same as long as no two logits are as near as that."""
    ids, mask = padded()
    expected, got = both(either, ids, attention_mask=mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_whole_text(either, side, device):
    """Teacher-forced against one forward of each sequence alone, within the rounding of float32 (see `close`)."""
    model = copy.deepcopy(either).to(device)
    ids, mask = padded(device, side)
    texts = [row[keep.bool()] for row, keep in zip(ids, mask)]
    decoder = Decoder(model, 3, 32)
    logits = [decoder.prefill(ids, mask).clone()]
    for _ in range(4):
        tokens = logits[-1].argmax(-1)
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens)]
        logits.append(decoder.step(tokens).clone())
    for b, text in enumerate(texts):
        with torch.no_grad():
            whole = model(text[None]).logits[0, -5:]
        assert close(torch.stack([step[b] for step in logits]), whole)


def test_fewer_sequences_than_lanes_and_a_second_text(qwen, device):
    model = copy.deepcopy(qwen).to(device)
    decoder, ids = Decoder(model, 4, 40), prompt(2).to(device)
    for text in (ids, ids[:, :5], ids[:1]):
        expected = model.generate(text, max_new_tokens=NEW, do_sample=False)[:, text.shape[1] :]
        got = torch.stack(list(decoder.generate(text, NEW)), 1)
        assert torch.equal(got, expected.cpu())


# ---- ends of sequences, processors, sampling, streaming -------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_early_ends(qwen, options, device):
    """Every sequence ends at a token it is known to choose; the others go on as if nothing had happened."""
    model = copy.deepcopy(qwen).to(device)
    ids, mask = padded(device)
    free = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=mask, **options)[:, 19:]
    for ends in ([int(free[0, 2])], [int(free[1, 0]), int(free[2, 4])], [int(free[b, 3 - b]) for b in range(3)]):
        expected, got = both(model, ids, attention_mask=mask, eos_token_id=ends, pad_token_id=7, **options)
        assert torch.equal(got, expected), ends


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.3}, {"min_new_tokens": 6, "eos_token_id": list(range(256))}, {"max_length": 24},
    {"do_sample": True, "top_k": 20, "temperature": 1.5}, {"do_sample": True, "top_p": 0.8},
    {"do_sample": True, "num_return_sequences": 2}, {"max_new_tokens": 1}, {"no_repeat_ngram_size": 2},
], ids=str)  # fmt: skip
def test_processors_and_sampling(qwen, options):
    ids, mask = padded()
    if "max_length" in options:
        options = options | {"max_new_tokens": None}
    expected, got = both(qwen, ids, seed=3, attention_mask=mask, **options)
    assert torch.equal(got, expected)


def test_the_dict_output_and_the_cost(qwen):
    expected, got = both(
        qwen, prompt(), return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.2
    )
    assert type(got) is type(expected) and torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert all(close(a, b) for a, b in zip(getattr(got, name), getattr(expected, name), strict=True))
        assert getattr(got, name)[0].dtype == torch.float32
    cost = last_generation()
    assert cost.processors == ("RepetitionPenaltyLogitsProcessor",) and not cost.on_device and cost.tokens == NEW
    assert 0 < cost.choosing_seconds + cost.stopping_seconds < cost.seconds


class Seen(transformers.generation.BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=str)
def test_streaming(qwen, options):
    seen, ids = Seen(), prompt(1)
    got = both(qwen, ids, **options)[0]
    torch.manual_seed(0)
    options = {"do_sample": False} | options
    qwen.generate(ids, custom_generate=generate, token_streamer=seen, max_new_tokens=NEW, **options)
    assert seen.ended and torch.equal(seen.puts[0], ids)
    assert [put.shape for put in seen.puts[1:]] == [(1,)] * NEW and torch.equal(torch.cat(seen.puts[1:]), got[0, 19:])


def test_criteria_of_python_run_between_the_steps(qwen):
    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 22)

    expected, got = both(qwen, prompt(), stopping_criteria=transformers.StoppingCriteriaList([Stop()]))
    assert torch.equal(got, expected) and got.shape[1] == 22 and "Stop" in last_generation().criteria


@pytest.mark.parametrize("every", [1, 3, 100])
def test_looking_seldom_changes_nothing(qwen, every):
    decoder, ids = Decoder(qwen, 2, 64), prompt()
    expected = torch.stack(list(decoder.generate(ids, NEW)), 1)
    assert torch.equal(torch.stack(list(decoder.generate(ids, NEW, look_every=every)), 1), expected)
    ends = [int(expected[0, 2]), int(expected[1, 4])]
    steps = list(decoder.generate(ids, NEW, look_every=every, eos_token_id=ends, pad_token_id=9))
    over = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in expected]
    assert len(steps) == max(over) + 1
    for b, row in enumerate(torch.stack(steps, 1)):
        assert torch.equal(row[: over[b] + 1], expected[b, : over[b] + 1]) and (row[over[b] + 1 :] == 9).all()


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_a_second_call_uses_the_decoder_of_the_first(device):
    model, ids = model_of("llama", device), prompt().to(device)
    generation_ = []
    for tokens in (5, 9):
        model.generate(ids, custom_generate=generate, max_new_tokens=tokens, do_sample=False)
        generation_.append((generation._kept[model], last_generation().captures))
    assert generation_[0][0] is generation_[1][0]
    assert [captures for _, captures in generation_] == [int(device == "cuda"), 0]
    model.generate(ids[:1], custom_generate=generate, max_new_tokens=2, do_sample=False)
    assert generation._kept[model].batch_size == 1  # another batch size


def test_a_model_is_not_kept_alive():
    model = model_of("llama")
    model.generate(prompt(), custom_generate=generate, max_new_tokens=2, do_sample=False)
    alive, kept = weakref.ref(model), weakref.ref(generation._kept[model])
    del model
    gc.collect()
    assert alive() is None and kept() is None


def test_memory(qwen):
    decoder = Decoder(qwen, 2, 64)
    assert decoder.memory["keys and values"] == 2 * 3 * 2 * 2 * 64 * 32 * 4  # k and v, layers, batch, heads, rows, D
    assert decoder.memory["logits"] == 2 * 512 * 4


# ---- refusals -------------------------------------------------------------------------------------------------------


def refused(error, match, call, *args, **options):
    with pytest.raises(error, match=match):
        call(*args, **options)


def test_models_that_are_not_served(qwen):
    refused(TypeError, "of type Linear, expected a model of transformers", Decoder, torch.nn.Linear(2, 2))
    refused(NotImplementedError, "Qwen3Model .* is not served", Decoder, qwen.model)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).eval()
    refused(NotImplementedError, "GPT2LMHeadModel .*is not served; served are .* llama", Decoder, gpt)
    for rope in ("dynamic", "longrope"):
        parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
        parameters |= {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16} if rope == "longrope" else {}
        model = causal_lm("tiny-llama", rope_parameters=parameters)
        refused(NotImplementedError, f"RoPE of type '{rope}' is not served", Decoder, model)
    model = copy.deepcopy(qwen)
    model.config._attn_implementation = "flex_attention"
    refused(NotImplementedError, "attention 'flex_attention' is not served", Decoder, model)
    decoder = Decoder(copy_ := copy.deepcopy(qwen))
    copy_.train()
    refused(RuntimeError, "training mode", decoder.prefill, prompt())
    refused(RuntimeError, "training mode", Decoder, copy_)


def test_wrong_uses_of_a_decoder(qwen):
    for options in ({"batch_size": 0}, {"max_length": -1}, {"max_length": 2.0}, {"graph": "yes"}):
        refused(ValueError, f"Decoder: {next(iter(options))} is ", Decoder, qwen, **options)
    refused(RuntimeError, "graph=True needs the model on a CUDA device", Decoder, qwen, graph=True)
    decoder, ids, ones = Decoder(qwen, 2, 20), prompt(), torch.ones(2, 19, dtype=torch.long)
    refused(RuntimeError, "call prefill first", decoder.step, ids[:, 0])
    refused(ValueError, "3 sequences, the decoder has batch_size=2", decoder.prefill, prompt(3))
    refused(ValueError, "21 tokens are more than .* max_length=20", decoder.prefill, prompt(2, 21))
    refused(ValueError, "expected a torch tensor of int64", decoder.prefill, ids.float())
    refused(ValueError, "input_ids is on meta, the model on cpu", decoder.prefill, ids.to("meta"))
    refused(ValueError, r"shape \[19\], expected \[batch, tokens\]", decoder.prefill, ids[0])
    refused(ValueError, r"attention_mask is \[2, 3\] on cpu", decoder.prefill, ids, ones[:, :3])
    for holes in (lambda m: m[0, 3:5].zero_(), lambda m: m[1].zero_(), lambda m: m[0, 1].fill_(2)):
        mask = ones.clone()
        holes(mask)
        refused(ValueError, "masks with holes, without tokens or of other", decoder.prefill, ids, mask)
    refused(ValueError, "need max_length=21, the decoder has 20", decoder.generate, ids, 3)
    refused(ValueError, "max_new_tokens is 0", decoder.generate, ids, 0)
    refused(ValueError, r"eos_token_id is \[512\]", decoder.generate, ids, 1, eos_token_id=512)
    decoder.prefill(ids)
    refused(ValueError, r"shape \[1\], expected \[2\]", decoder.step, ids[0, :1])
    decoder.step(ids[:, 0])
    refused(RuntimeError, "the decoder is full: max_length is 20", decoder.step, ids[:, 0])
    tokens = decoder.generate(ids, 2)
    decoder.prefill(ids)
    refused(RuntimeError, "used for something else", next, tokens)


def test_wrong_uses_of_generate(qwen):
    calls = []
    handle = qwen.register_forward_hook(lambda *args: calls.append(args))
    ids, static = prompt(), transformers.DynamicCache(config=qwen.config)
    try:
        for match, options in {
            "'beam_search' is not served": {"num_beams": 2},
            "output_attentions is not served": {"output_attentions": True, "return_dict_in_generate": True},
            "output_hidden_states is not served": {"output_hidden_states": True, "return_dict_in_generate": True},
            "use_cache=False is not served": {"use_cache": False},
            "cache_implementation='offloaded' is not served": {"cache_implementation": "offloaded"},
            "past_key_values would stay empty": {"past_key_values": static},
            "position_ids other than": {"position_ids": torch.arange(19)[None] + 1},
        }.items():
            options = {"max_new_tokens": 3, "do_sample": False} | options
            refused(NotImplementedError, match, qwen.generate, ids, custom_generate=generate, **options)
        static.update(torch.zeros(2, 2, 3, 32), torch.zeros(2, 2, 3, 32), 0)
        options = {"max_new_tokens": 3, "do_sample": False, "past_key_values": static}
        refused(NotImplementedError, "holds 3 tokens already", qwen.generate, ids, custom_generate=generate, **options)
        assert not calls
    finally:
        handle.remove()


# ---- on a GPU: the graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.gpu
def test_one_graph_serves_every_length(is_fused):
    model = model_of("qwen3", "cuda")
    if is_fused:
        minivllm.transformers.apply(model)
    decoder, plain, ids = Decoder(model, 1, 64), Decoder(model, 1, 64, graph=False), prompt(1, 64).cuda()
    assert decoder.uses_graph and not plain.uses_graph
    decoder.prefill(ids[:, :1])
    plain.prefill(ids[:, :1])
    for length in range(1, 64):
        assert close(decoder.step(ids[:, length]), plain.step(ids[:, length])), length
    assert (decoder.captures, decoder.replays, plain.captures) == (1, 63, 0)
    for length in (1, 7, 30, 55):
        replays = decoder.replays
        got = torch.stack(list(decoder.generate(ids[:, :length], 9)), 1)
        assert torch.equal(got, torch.stack(list(plain.generate(ids[:, :length], 9)), 1))
        assert decoder.captures == 1 and decoder.replays == replays + 8  # the first token is the prompt's


@pytest.mark.gpu
def test_the_graph_is_captured_anew_for_other_code():
    model, ids = model_of("qwen3", "cuda"), prompt(1).cuda()
    decoder = Decoder(model, 1, 64)
    before = [int(token) for token in decoder.generate(ids, NEW)]
    minivllm.transformers.apply(model)
    assert [int(token) for token in decoder.generate(ids, NEW)] == before and decoder.captures == 2


def test_what_a_graph_depends_on():
    model = model_of("qwen3")
    mlp, seen = model.model.layers[1].mlp, [fingerprint(model)]
    for forward in (lambda x: x, lambda x: 2 * x):
        mlp.forward = forward
        seen.append(fingerprint(model))
        assert seen[-1] == fingerprint(model)
    assert seen[0] != seen[1] != seen[2]


def test_lengths_of_graphs_for_prompts():
    for length in range(1, 10000):
        assert length <= columns_of(length) <= max(length + 15, length * 9 / 8)
    assert len({columns_of(length) for length in range(1, 4097)}) < 60


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.gpu
def test_prompts_are_replayed(kind):
    """From the second of a length on, to the same logits and tokens, for one sequence and for two."""
    model = model_of(kind, "cuda")
    minivllm.transformers.apply(model)
    decoder, plain = Decoder(model, 2, 64), Decoder(model, 2, 64, graph=False)
    for turn in range(3):
        for batch, length in ((1, 1), (1, 16), (2, 17), (1, 5), (2, 30), (1, 33)):
            ids = prompt(batch, length, seed=turn).cuda()
            assert close(decoder.prefill(ids), plain.prefill(ids)), (turn, batch, length)
            got, expected = ([token.tolist() for token in each.generate(ids, 6)] for each in (decoder, plain))
            assert got == expected
    # Of 16 and 48 tokens, and of twice 32; masks of eager attention cannot be captured.
    assert decoder.captures == 1 and decoder._prompts.captures == (0 if kind == "eager llama" else 3)


@pytest.mark.gpu
def test_prompts_are_not_replayed_past_other_code(monkeypatch):
    """Weights that moved, hooks, and code that was replaced, in a module or in its class."""
    model, ids = model_of("qwen3", "cuda"), prompt(1, 9).cuda()
    minivllm.transformers.apply(model)
    decoder = Decoder(model, 1, 64)

    def logits():
        for _ in range(2):
            decoder.prefill(ids)
        return decoder.prefill(ids).clone()

    before, seen = logits(), []
    assert decoder._prompts.captures == 1
    model.cpu().cuda()
    assert close(logits(), before) and decoder._prompts.captures == 2
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert close(logits(), before) and len(seen) >= 3
    hook.remove()
    assert close(logits(), before) and decoder._prompts.captures == 3
    own = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: 2 * own(self, x))
    twice = Decoder(model, 1, 64, graph=False).prefill(ids)
    assert not close(twice, before) and close(logits(), twice)


def test_rows_past_the_cursor_do_not_matter(either, device):
    model = copy.deepcopy(either).to(device)
    ids, results = prompt().to(device), []
    for poison in (0.0, 100.0):
        decoder = Decoder(model, 2, 64)
        decoder.prefill(ids)
        for layer in decoder._cache.layers:
            layer.keys[:, :, 20:] = poison
            layer.values[:, :, 20:] = poison
        results.append(decoder.step(ids[:, 0]).clone())
    assert torch.equal(*results)


# ---- the example ----------------------------------------------------------------------------------------------------


def test_the_example(tmp_path):
    pytest.importorskip("tokenizers")
    model = model_of("qwen3")
    tokenizer = save_checkpoint(model, tmp_path)
    ids = tokenizer("w3 w4 w5", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, max_new_tokens=6)
    arguments = ("-m", "examples.generate", str(tmp_path), "w3 w4 w5", "--max-new-tokens", "6")
    printed = succeeds(None, arguments=arguments, paths=(PACKAGE, ROOT))
    assert tokenizer.decode(expected[0, 3:]) in printed
