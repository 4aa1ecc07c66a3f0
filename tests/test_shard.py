"""minivllm.transformers.shard: models over two processes against the same models on one."""

import copy

import pytest
from processes import on_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from sharded_models import CASES, NEW, STEPS, results_of, whole_model  # noqa: E402
from transformer_models import LAYERS, close, prompt, recording, rms, save_checkpoint  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import Decoder, shard  # noqa: E402
from minivllm.transformers.served import fingerprint  # noqa: E402

dist = torch.distributed
RANKS = 2


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def two(request, tmp_path_factory):
    """(a device, what each rank on such a device saved)"""
    device, folder = request.param, tmp_path_factory.mktemp("ranks")
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs")
    on_ranks("-m", "sharded_models", device, str(folder), ranks=RANKS)
    return device, [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture
def alone():
    """This process as a group of its own."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def second_of_four(monkeypatch):
    """This process as the second of four, which never meet."""
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 4}.items():
        monkeypatch.setattr(dist, name, lambda *args, value=value: value)


@pytest.mark.parametrize("how", ["plain", "applied"])
@pytest.mark.parametrize("kind,dtype", CASES)
def test_two_ranks_give_what_one_process_gives(kind, dtype, how, two):
    """Logits: where one process rounds a product once, RANKS parts and RANKS - 1 sums are rounded, so the error against
    float64 may grow by sqrt(2 RANKS - 1) < 2. All ranks have the same bits. One capture serves a Decoder's calls."""
    device, ranks = two
    model = whole_model(kind, dtype).to(device)
    exact = results_of(copy.deepcopy(model).cpu().double())
    if how == "applied":
        minivllm.transformers.apply(model)
    one = results_of(model)
    first, *others = [rank[kind, dtype][how] for rank in ranks]
    for name in ("many", "few", "decoder"):
        together = rms(first[name].double() - exact[name])
        assert together <= 2 * rms(one[name].double() - exact[name]), name
        assert all(other[name].equal(first[name]) for other in others)
    assert first["decoder"].shape[1] == STEPS + 1 and first["chosen"].shape[1] == NEW
    assert all(other["chosen"].equal(first["chosen"]) for other in others)
    if dtype == "float32":
        assert first["chosen"].equal(one["chosen"])
    assert first["captures"] == (device == "cuda")


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "llama with a key head for both ranks"])
def test_a_rank_holds_its_part_alone(kind, second_of_four):
    """Memory of its own, of a quarter of the size, under a configuration that counts it; a key head goes to several."""
    if kind == "phi3":
        model = whole_model(kind, "float32")
        heads, kv_heads, width = 4, 2, 96
    else:
        changes = {"num_key_value_heads": 1} if "both" in kind else {}
        model = causal_lm("tiny-qwen3" if kind == "qwen3" else "tiny-llama", num_attention_heads=8, **changes)
        heads, kv_heads, width = 8, 1 if changes else 2, 160
    given, layer = model.config, model.model.layers[1]
    old = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    shard(model)
    new, head_dim = dict(layer.named_parameters()), layer.self_attn.head_dim
    assert (given.num_attention_heads, given.num_key_value_heads, given.intermediate_size) == (heads, kv_heads, width)
    config = model.config
    assert config is model.model.config is layer.self_attn.config and config.head_dim == head_dim
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (
        heads // 4, 1, width // 4)  # fmt: skip
    q = slice(heads // 4 * head_dim, heads // 2 * head_dim)  # of the second rank; its key head is the first one
    if kind == "phi3":
        whole = old["self_attn.qkv_proj.weight"]
        kv = [whole[first : first + head_dim] for first in (heads * head_dim, (heads + kv_heads) * head_dim)]
        assert new["self_attn.qkv_proj.weight"].equal(torch.cat([whole[q], *kv]))
        gate, up = old["mlp.gate_up_proj.weight"].chunk(2)
        assert new["mlp.gate_up_proj.weight"].equal(torch.cat([gate.chunk(4)[1], up.chunk(4)[1]]))
    else:
        assert new["self_attn.q_proj.weight"].equal(old["self_attn.q_proj.weight"][q])
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            assert new[name].equal(old[name][:head_dim])
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            assert new[name].equal(old[name].chunk(4)[1])
    assert new["self_attn.o_proj.weight"].equal(old["self_attn.o_proj.weight"][:, q])
    assert new["mlp.down_proj.weight"].equal(old["mlp.down_proj.weight"].chunk(4, 1)[1])
    for parameter in new.values():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_contiguous()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_step_is_seven_calls_a_layer(alone, calls, monkeypatch):
    """With `apply`: linear and a sum over ranks twice, and no addition but that behind the last layer."""
    sums, own = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: (sums.append(x.shape), own(x, group=group))[1])
    whole, ids = causal_lm("tiny-qwen3"), prompt()
    model = copy.deepcopy(whole)
    shard(model)
    minivllm.transformers.apply(model)
    decoder = Decoder(model, 2, 32)
    decoder.prefill(ids[:, :-1])
    calls.clear(), sums.clear()
    logits = decoder.step(ids[:, -1])
    assert calls == {
        "rms_norm_qkv": LAYERS, "decode_attention": LAYERS, "linear": 2 * LAYERS, "rms_norm_gate_up": LAYERS,
        "rms_norm_linear": 1}  # fmt: skip
    assert sums == [(2, 1, 96)] * 2 * LAYERS
    with torch.no_grad():
        assert close(logits, whole(ids).logits[:, -1])
        seen, expected = recording(model, ids)[0], recording(whole, ids)[0]  # hooks see whole sums
    assert len(seen) == LAYERS and all(map(close, seen, expected))
    calls.clear()
    minivllm.transformers.undo(model)
    with torch.no_grad():
        assert close(model(ids).logits, whole(ids).logits) and not calls


@pytest.mark.usefixtures("no_gradients")
def test_in_one_graph_of_torch_compile(alone):
    whole, ids = causal_lm("tiny-qwen3"), prompt()
    model = copy.deepcopy(whole)
    shard(model)
    minivllm.transformers.apply(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert close(compiled(ids).logits, whole(ids).logits)


def test_a_decoder_notices(alone):
    """Of a model that was sharded meanwhile, and of another process group."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
    before = fingerprint(model)
    shard(model)
    after = fingerprint(model)
    assert before != after == fingerprint(model)
    decoder = Decoder(model, 2, 32)
    decoder.prefill(ids)
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    assert fingerprint(model) != after


def test_a_decoder_of_the_whole_model_is_refused(second_of_four):
    model = causal_lm("tiny-qwen3", num_attention_heads=8)
    decoder = Decoder(model, 1, 32)
    shard(model)
    with pytest.raises(RuntimeError, match="prefill: the model was sharded after its Decoder was made: make a new"):
        decoder.prefill(prompt(1))


def refused(error, match, model, group=None):
    """By an error, and the model stays as it was."""
    before = {name: id(x) for name, x in model.named_parameters()} if isinstance(model, torch.nn.Module) else None
    with pytest.raises(error, match=match):
        shard(model, group)
    assert before is None or before == {name: id(x) for name, x in model.named_parameters()}


def test_what_is_refused_by_name(second_of_four):
    refused(TypeError, "model is of type str, expected a model of transformers", "a path")
    refused(TypeError, "group is of type int, expected a ProcessGroup or None", causal_lm("tiny-llama"), 4)
    refused(NotImplementedError, "Linear is not served; served are LlamaForCausalLM, ", torch.nn.Linear(4, 4))
    refused(ValueError, "num_heads is 6, expected a multiple of world_size, which is 4", causal_lm("tiny-llama"))
    model = causal_lm("tiny-llama", num_attention_heads=12, num_key_value_heads=3)
    refused(ValueError, "4 ranks cannot share the heads of the model: .*num_kv_heads is 3", model)
    model = causal_lm("tiny-llama", num_attention_heads=8, intermediate_size=98)
    refused(ValueError, "intermediate_size is 98, expected a multiple of the 4 ranks of the group: take", model)


def test_weights_that_are_refused_by_name(second_of_four):
    def model():
        return causal_lm("tiny-llama", num_attention_heads=8)

    class Adapted(torch.nn.Linear):
        pass

    adapted, quantised, shared, replaced, applied = (model() for _ in range(5))
    adapted.model.layers[1].mlp.up_proj.__class__ = Adapted
    refused(
        NotImplementedError, "layers.1.mlp.up_proj is a .*Adapted, expected Linear; shard the model before", adapted
    )
    attention = quantised.model.layers[2].self_attn
    attention.k_proj.weight = torch.nn.Parameter(torch.zeros(64, 96, dtype=torch.int8), requires_grad=False)
    refused(NotImplementedError, "layers.2.self_attn.k_proj.weight is a Parameter of torch.int8, expected", quantised)
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    refused(NotImplementedError, "layers.2.mlp.up_proj.weight is layers.0.mlp.up_proj.weight as well", shared)
    replaced.model.layers[0].self_attn.o_proj.forward = lambda x: x
    refused(NotImplementedError, "layers.0.self_attn.o_proj is a Linear whose forward was replaced", replaced)
    minivllm.transformers.apply(applied)
    refused(RuntimeError, "apply stands in the model: call undo, then shard, then apply again", applied)


def test_when_it_is_refused(alone):
    model = causal_lm("tiny-llama")
    refused(ValueError, "this process is none of the group's ranks", model, dist.GroupMember.NON_GROUP_MEMBER)
    shard(model, dist.group.WORLD)
    refused(RuntimeError, "the model is sharded already: load the whole model again", model)
    dist.destroy_process_group()
    refused(RuntimeError, "no process group: call torch.distributed.init_process_group first", causal_lm("tiny-llama"))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())


def test_gradients_are_refused(alone):
    model, ids = causal_lm("tiny-llama"), prompt()
    whole = model(ids).logits
    shard(model)
    assert torch.is_grad_enabled() and close(model(ids).logits, whole) and not model(ids).logits.requires_grad
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="a sharded model passes no gradients on"):
        model(ids)


def test_the_example(tmp_path):
    pytest.importorskip("tokenizers")
    model = causal_lm("tiny-qwen3")
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    tokenizer = save_checkpoint(model, tmp_path)
    ids = tokenizer("w3 w4 w5", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, max_new_tokens=6, do_sample=False)
    arguments = (str(tmp_path), "w3 w4 w5", "--max-new-tokens", "6", "--device", "cpu")
    printed = on_ranks("-m", "examples.generate_sharded", *arguments)
    assert printed.count(tokenizer.decode(expected[0, 3:])) == 1
