"""Decode steps on the caches of transformers: decode_attention where it is right, the same texts, and caches that look
to everybody else as those of an unpatched model do."""

import copy
import pickle

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import FAMILIES, LAYERS, TINY, close, greedy, model_of, prompt  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import room  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")

ROWS = 24


def pair(kind, attention="sdpa", device="cpu"):
    """(a plain model, the same with apply, its report)"""
    plain = model_of(kind) if kind in FAMILIES else causal_lm(kind)
    plain.to(device).config._attn_implementation = attention
    ours = copy.deepcopy(plain)
    return plain, ours, minivllm.transformers.apply(ours)


def cache_of(kind, model):
    return (
        StaticCache(config=model.config, max_cache_len=ROWS) if kind == "static" else DynamicCache(config=model.config)
    )


def sliding(model):
    """The layers whose caches slide, which are left to transformers."""
    return {
        f"model.layers.{i}" for i, is_sliding in enumerate(DynamicCache(config=model.config).is_sliding) if is_sliding
    }


def steps(calls):
    return calls.get("decode_attention", 0)


def padded(ids):
    """A mask of prompts padded on the left, each by another length."""
    return (
        torch.arange(ids.shape[1], device=ids.device) >= 3 * torch.arange(len(ids), device=ids.device)[:, None]
    ).long()


def same(ours, plain):
    """Two caches, to whoever looks at them."""
    for mine, other in zip(ours.layers, plain.layers, strict=True):
        assert mine.keys.shape == other.keys.shape and close(mine.keys, other.keys) and close(mine.values, other.values)
        assert type(mine) is type(other) and int(mine.get_seq_length()) == int(other.get_seq_length())


class Twins:
    """One text in the caches of two models, which have to agree after each piece of it."""

    def __init__(self, plain, ours, *caches):
        self.models, self.caches = (plain, ours), list(caches) or [DynamicCache(), DynamicCache()]

    def feed(self, ids, **more):
        expected, got = (model(ids, past_key_values=c, **more).logits for model, c in zip(self.models, self.caches))
        assert close(got, expected)
        same(self.caches[1], self.caches[0])

    def each(self, change):
        for cache in self.caches:
            change(cache)


@pytest.fixture
def twins():
    plain, ours, report = pair("tiny-qwen3")
    each = Twins(plain, ours)
    each.report = report
    each.feed(prompt(2, 7))
    return each


TOKEN = prompt(2, 1, seed=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*TINY, *FAMILIES])
def test_generate(kind, attention, calls):
    """The tokens of transformers, with and without padding, on both caches."""
    plain, ours, report = pair(kind, attention)
    left, ids, new = sliding(ours), prompt(3, 9), 6
    fused = len(ours.model.layers) - len(left)
    for mask in (torch.ones_like(ids), padded(ids)):
        for options in ({}, {"cache_implementation": "static"}):
            calls.clear()
            options |= {"attention_mask": mask, "eos_token_id": None}
            assert greedy(ours, ids * mask, new, **options).equal(greedy(plain, ids * mask, new, **options))
            assert steps(calls) == fused * (new - 1)
    assert set(report.attentions) == left and not report.fallbacks
    assert all("SlidingWindowLayer" in why for why in report.attentions.values())


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", [*TINY, *FAMILIES])
def test_a_text_step_by_step(kind, cache, with_mask, device, calls):
    """Logits, and after each step both caches: their rows, their shapes and their counters."""
    plain, ours, _ = pair(kind, device=device)
    ids = prompt(2, 14).to(device)
    twins = Twins(plain, ours, cache_of(cache, plain), cache_of(cache, ours))
    mask, positions = padded(ids), padded(ids).cumsum(-1).sub(1).clamp_min(0)
    for begin, end in ((0, 8), *((i, i + 1) for i in range(8, 11)), (11, 13), (13, 14)):
        more = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]} if with_mask else {}
        twins.feed(ids[:, begin:end], **more)
    assert steps(calls) == 4 * (len(ours.model.layers) - len(sliding(ours)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["mistral", "phi3 with windows", "smollm3", "gemma2", "gemma3"])
def test_windows_in_a_cache_that_keeps_all_rows(kind, attention, calls):
    """Which is what DynamicCache() is: nothing slides, and the mask has the window."""
    plain, ours, report = pair(kind, attention)
    twins, ids = Twins(plain, ours), prompt(2, 14)
    for piece in ids.split([4, *[1] * 10], 1):
        twins.feed(piece)
    assert steps(calls) == 10 * 2 and not report.attentions


def test_a_model_with_a_layer_that_is_left_alone(calls):
    """There is no step in common then: each layer looks at its mask and counts for itself."""
    plain, ours, report = pair("tiny-qwen3")
    ours.model.layers[1].self_attn.q_norm.register_forward_hook(lambda module, args, output: output)
    report = minivllm.transformers.apply(ours)
    assert list(report.left_alone) == ["model.layers.1"]
    for cache in ("dynamic", "static"):
        calls.clear()
        twins = Twins(plain, ours, cache_of(cache, plain), cache_of(cache, ours))
        for piece in prompt(2, 12).split([9, 1, 1, 1], 1):
            twins.feed(piece)
        assert steps(calls) == 3 * (LAYERS - 1)


# ---- masks ----------------------------------------------------------------------------------------------------------


def holes(ids):
    mask = torch.ones(len(ids), 8, dtype=torch.long)
    mask[1, 2] = 0
    return mask


def blind(ids):
    """The newest token of the second sequence does not see itself."""
    mask = torch.ones(len(ids), 1, 1, 8, dtype=torch.bool)
    mask[1, 0, 0, 7] = False
    return mask


def bias(ids):
    """Scores that are changed, and hide nothing."""
    return torch.linspace(-1, 0, 8).expand(len(ids), 1, 1, 8)


def by_head(ids):
    return torch.ones(len(ids), 6, 1, 8, dtype=torch.bool).tril(3)


RUNS = {"1111000": 0, "0111000": 1, "0001000": 3}
OTHERS = ("0000000", "1011000", "1110000", "1111100", "1110100", "1100011")


@pytest.mark.parametrize("hidden", [False, float("-inf"), torch.finfo(torch.float32).min])
def test_the_first_row_of_a_mask(hidden):
    """Of masks of booleans and of what is added to scores, for a token in row 3."""

    def first(*texts):
        seen = torch.tensor([[letter == "1" for letter in text] for text in texts])
        mask = seen if hidden is False else torch.zeros(seen.shape).masked_fill(~seen, hidden)
        starts = room.first_rows(mask[:, None, None], torch.tensor(3))
        return starts if starts is None else starts.tolist()

    assert first(*RUNS) == list(RUNS.values())
    assert all(first(other) is None and first("1111000", other) is None for other in OTHERS)


@pytest.mark.parametrize("make", [holes, blind, bias, by_head], ids=lambda make: make.__name__)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_masks_that_decode_attention_does_not_know(make, cache, calls):
    plain, ours, report = pair("tiny-qwen3")
    twins = Twins(plain, ours, cache_of(cache, plain), cache_of(cache, ours))
    twins.feed(prompt(2, 7))
    mask = make(TOKEN)
    if mask.dim() == 4 and cache == "static":
        hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = torch.cat([mask, torch.full((*mask.shape[:3], ROWS - 8), hidden, dtype=mask.dtype)], -1)
    twins.feed(TOKEN, attention_mask=mask)
    assert steps(calls) == 0 and set(report.attentions) == {f"model.layers.{i}" for i in range(LAYERS)}
    assert set(report.attentions.values()) == {"its mask is not one run of tokens that ends with the newest"}
    assert "left its attention to transformers: its mask" in repr(report)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_that_is_left_padding(dtype, calls):
    """It is looked at, whoever made it."""
    plain, ours, _ = pair("tiny-qwen3")
    twins, seen = Twins(plain, ours), padded(prompt(2, 8))[:, None, None].bool()
    twins.feed(prompt(2, 7))
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    twins.feed(TOKEN, attention_mask=mask)
    assert steps(calls) == LAYERS


def test_a_model_that_makes_other_masks(monkeypatch, calls):
    """A mask function of somebody else counts as a mask that was handed in."""
    plain, ours, _ = pair("tiny-qwen3")
    twins = Twins(plain, ours, cache_of("static", plain), cache_of("static", ours))
    twins.feed(prompt(2, 7))
    module = transformers.models.qwen3.modeling_qwen3
    own = module.create_causal_mask

    def other(**options):
        mask = own(**options).clone()
        mask[..., 3] = False
        return mask

    monkeypatch.setattr(module, "create_causal_mask", other)
    twins.feed(TOKEN)
    assert steps(calls) == 0


# ---- what others do with a DynamicCache -----------------------------------------------------------------------------


def test_rows_are_appended_in_place(twins, calls):
    """Until the larger tensors are full: no key is copied but the new one."""
    twins.feed(TOKEN)
    places = [layer.keys.data_ptr() for layer in twins.caches[1].layers]
    for _ in range(3):
        twins.feed(TOKEN)
    assert [layer.keys.data_ptr() for layer in twins.caches[1].layers] == places and steps(calls) == 4 * LAYERS


def test_tensors_that_are_full_grow(twins, monkeypatch, calls):
    monkeypatch.setattr(room, "GROWTH", 3)
    for _ in range(7):
        twins.feed(TOKEN)
    assert steps(calls) == 7 * LAYERS


CHANGES = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(1),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "reset": lambda cache: cache.reset(),
    "other keys": lambda cache: setattr(cache.layers[1], "keys", cache.layers[1].keys + 1),
    "other values": lambda cache: setattr(cache.layers[1], "values", cache.layers[1].values + 1),
    "in place": lambda cache: cache.layers[1].keys.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_is_gone_on_with(change, twins, calls):
    for _ in range(2):
        twins.feed(TOKEN)
        twins.each(CHANGES[change])
        twins.feed(TOKEN)
    assert steps(calls) == 4 * LAYERS


def test_older_views_keep_their_rows(twins):
    """Whoever holds the keys of an earlier step, whatever is done to the cache after that."""
    twins.feed(TOKEN)
    twins.feed(TOKEN)
    cache = twins.caches[1]
    held = [(layer.keys, layer.values) for layer in cache.layers]
    rows = [(keys.clone(), values.clone()) for keys, values in held]
    twins.feed(TOKEN)
    longer = [layer.keys for layer in cache.layers]
    long_rows = [keys.clone() for keys in longer]
    for layer, other, (keys, values) in zip(cache.layers, twins.caches[0].layers, held):
        layer.keys, layer.values = keys, values  # back to what it was
        other.crop(-1)
    twins.feed(TOKEN + 1)
    twins.each(lambda cache: cache.crop(-3))
    twins.feed(TOKEN + 2)
    assert all(k.equal(a) and v.equal(b) for (k, v), (a, b) in zip(held, rows))
    assert all(keys.equal(before) for keys, before in zip(longer, long_rows))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_copies_go_their_own_way(how, twins, calls):
    twins.feed(TOKEN)
    mine = twins.caches[1]
    assert b"minivllm.transformers" not in pickle.dumps(mine)
    if how == "copy":
        other = copy.copy(mine)
        other.layers = [copy.copy(layer) for layer in mine.layers]
    else:
        other = copy.deepcopy(mine) if how == "deepcopy" else pickle.loads(pickle.dumps(mine))
    branch = Twins(*twins.models, copy.deepcopy(twins.caches[0]), other)
    for i in range(3):
        twins.feed(TOKEN)
        branch.feed(TOKEN + 1 + i)
    same(twins.caches[1], twins.caches[0])
    assert steps(calls) == 7 * LAYERS


def test_several_tokens_after_a_step(twins, calls):
    """They are transformers' to append, and the larger tensors of the step are let go."""
    twins.feed(TOKEN)
    twins.feed(prompt(2, 5))
    assert not any(layer.__dict__.get("_minivllm") for layer in twins.caches[1].layers)
    twins.feed(TOKEN)
    assert steps(calls) == 2 * LAYERS


def test_a_cache_that_two_models_write(twins):
    """The plain model goes on where ours was, and the other way round."""
    for _ in range(2):
        twins.feed(TOKEN)
        twins.caches.reverse()
        twins.feed(TOKEN)


def test_a_first_token(calls):
    """A prompt of one token, on an empty cache of either kind and without one."""
    plain, ours, report = pair("tiny-qwen3")
    for cache in ("dynamic", "static"):
        Twins(plain, ours, cache_of(cache, plain), cache_of(cache, ours)).feed(TOKEN)
    assert close(ours(TOKEN, use_cache=False).logits, plain(TOKEN, use_cache=False).logits)
    assert steps(calls) == 0 and not report.attentions


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["beams", "lookup"])
def test_other_searches(options, calls):
    plain, ours, _ = pair("tiny-qwen3")
    ids = prompt(1, 4).repeat(1, 3)
    assert greedy(ours, ids, 8, **options).equal(greedy(plain, ids, 8, **options))
    assert steps(calls) > 0


# ---- what is left to transformers -----------------------------------------------------------------------------------


class OtherCache(DynamicCache):
    def update(self, *args, **options):
        keys, values = super().update(*args, **options)
        return keys * 2, values


class OtherLayer(transformers.cache_utils.DynamicLayer):
    def update(self, *args, **options):
        keys, values = super().update(*args, **options)
        return keys * 2, values


def wrap_layers(cache):
    for layer in cache.layers:
        own = layer.update
        layer.update = lambda *args, own=own, **options: own(*args, **options)


@pytest.mark.parametrize("what", ["cache", "layers", "wrapped layers", "class", "attention"])
def test_caches_of_somebody_else(what, monkeypatch, calls):
    plain, ours, report = pair("tiny-qwen3")
    make = OtherCache if what == "cache" else DynamicCache
    twins = Twins(plain, ours, make(config=plain.config), make(config=plain.config))
    if what == "layers":
        twins.each(lambda cache: setattr(cache, "layers", [OtherLayer() for _ in cache.layers]))
    twins.feed(prompt(2, 7))
    if what == "wrapped layers":
        twins.each(wrap_layers)
    if what == "class":
        kind = transformers.cache_utils.DynamicLayer
        own = kind.update
        monkeypatch.setattr(kind, "update", lambda *args, **options: own(*args, **options))
    if what == "attention":
        attentions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        own = attentions["sdpa"]
        monkeypatch.setitem(attentions, "sdpa", lambda *args, **options: own(*args, **options))
    twins.feed(TOKEN)
    assert steps(calls) == 0 and len(report.attentions) == LAYERS


def test_a_full_static_cache():
    """On the CPU the error of transformers, and nothing is written."""
    _, ours, _ = pair("tiny-qwen3")
    cache = StaticCache(config=ours.config, max_cache_len=8)
    ours(prompt(2, 7), past_key_values=cache)
    ours(TOKEN, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises((IndexError, RuntimeError)):
        ours(TOKEN, past_key_values=cache)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, before))


def test_gradients_after_steps(twins):
    """The code of the classes goes on where decode_attention was."""
    twins.feed(TOKEN)
    with torch.enable_grad(), pytest.warns(minivllm.transformers.NotFusedWarning):
        twins.feed(TOKEN)
    twins.feed(TOKEN)


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tiny-qwen3", "tiny-llama", "granite"])
def test_a_captured_step(kind, calls):
    """One graph for all lengths: the counters on the device are the positions, and each replay advances them once."""
    plain, ours, report = pair(kind, device="cuda")
    ids = prompt(2, 14).cuda()
    caches = [cache_of("static", model) for model in (plain, ours)]
    token = ids[:, 7:8].clone()

    def start():
        for model, cache in zip((plain, ours), caches):
            cache.reset()
            model(ids[:, :7], past_key_values=cache)

    start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(token, past_key_values=caches[1])
    torch.cuda.current_stream().wait_stream(stream)
    start()
    calls.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = ours(token, past_key_values=caches[1]).logits
    assert steps(calls) == len(ours.model.layers) and not report.attentions
    start()
    for i in range(7, 14):
        expected = plain(ids[:, i : i + 1], past_key_values=caches[0]).logits
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        assert close(logits, expected)
        same(caches[1], caches[0])


@pytest.mark.gpu
def test_a_mask_in_a_captured_step_is_left_to_transformers(calls):
    """What it holds in a replay is not known when it is captured."""
    plain, ours, report = pair("tiny-qwen3", device="cuda")
    ids, cache = prompt(2, 8).cuda(), cache_of("static", ours)
    mask = torch.ones(2, ROWS, dtype=torch.long, device="cuda")
    ours(ids[:, :7], past_key_values=cache, attention_mask=mask[:, :7])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = ours(ids[:, 7:], past_key_values=cache, attention_mask=mask).logits
    mask[1, 2] = 0
    graph.replay()
    expected = cache_of("static", plain)
    plain(ids[:, :7], past_key_values=expected, attention_mask=torch.ones_like(ids[:, :7]))
    assert close(logits, plain(ids[:, 7:], past_key_values=expected, attention_mask=mask).logits)
    assert steps(calls) == 0 and set(report.attentions.values()) == {"a mask was given, and a graph is captured"}
