"""minivllm.transformers: code that somebody puts in place of what fused layers stand in for is run, and a model that
does not run on the fused ops says so once."""

import copy
import functools
import io
import pickle
import types
import warnings

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

import torch.nn.functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from transformer_models import LAYERS, close, prompt  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3 as qwen3  # noqa: E402

import minivllm.layers  # noqa: E402
import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import NotFusedWarning  # noqa: E402

# Where everything is left alone, `apply` warns: what is asserted here is why.
pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.filterwarnings("ignore:apply. nothing was fused")]


# ---- replaced functions ---------------------------------------------------------------------------------------------


def twice(result):
    return tuple(map(twice, result)) if isinstance(result, tuple) else result * 2


# Where the function is, its name, and what takes its place, made of it.
PLACES = {
    "apply_rotary_pos_emb": (qwen3, "apply_rotary_pos_emb"),
    "rotate_half": (qwen3, "rotate_half"),
    "attention": (qwen3.Qwen3Attention, "forward"),
    "norm": (qwen3.Qwen3RMSNorm, "forward"),
    "layer": (qwen3.Qwen3DecoderLayer, "forward"),
    "Linear": (torch.nn.Linear, "forward"),
    "F.linear": (F, "linear"),
}
REPLACED = {
    "apply_rotary_pos_emb": "apply_rotary_pos_emb of transformers.models.qwen3.modeling_qwen3 was replaced",
    "rotate_half": "rotate_half of transformers.models.qwen3.modeling_qwen3 was replaced",
    "attention": "self_attn is a Qwen3Attention whose forward was replaced",
    "norm": "input_layernorm is a Qwen3RMSNorm whose forward was replaced",
    "layer": "it is a Qwen3DecoderLayer whose forward was replaced",
    "Linear": "self_attn.q_proj is a Linear whose forward was replaced",
    "F.linear": "torch.nn.functional.linear was replaced",
}


def replacement(own, calls):
    """Wraps it as a careful person would, and changes its results; `calls` counts."""

    @functools.wraps(own)
    def function(*args, **kwargs):
        calls.append(1)
        result = own(*args, **kwargs)
        changed = [twice(each) if isinstance(each, torch.Tensor) else each for each in result]
        return tuple(changed) if isinstance(result, tuple) else twice(result)

    return function


@pytest.mark.parametrize("name", PLACES)
def test_what_is_replaced_later_is_run(name, monkeypatch):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    fused = copy.deepcopy(model)
    report = minivllm.transformers.apply(fused)
    twin = copy.deepcopy(fused)
    plain, calls = model(ids).logits, []
    where, attribute = PLACES[name]
    own = getattr(where, attribute)
    monkeypatch.setattr(where, attribute, replacement(own, calls))
    expected = model(ids).logits
    count = len(calls)
    assert count >= LAYERS and not close(expected, plain)
    for each in (fused, twin):
        calls.clear()
        assert each(ids).logits.equal(expected)
        assert len(calls) == count
    assert len(report.fallbacks) == LAYERS
    assert set(report.fallbacks.values()) == {
        "its code was replaced after apply, in its class, in its module or in torch.nn: apply again"
    }
    monkeypatch.setattr(where, attribute, own)  # taken back, all is as before
    report.fallbacks.clear()
    assert close(fused(ids).logits, plain) and not report.fallbacks


@pytest.mark.parametrize("name", PLACES)
def test_what_was_replaced_before_is_left_alone(name, monkeypatch):
    model, ids, calls = causal_lm("tiny-qwen3"), prompt(), []
    where, attribute = PLACES[name]
    monkeypatch.setattr(where, attribute, replacement(getattr(where, attribute), calls))
    expected = model(ids).logits
    count = len(calls)
    report = minivllm.transformers.apply(model)
    assert REPLACED[name] in report.left_alone.values()
    calls.clear()
    assert close(model(ids).logits, expected)
    assert len(calls) == count


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "norm", "F.linear"])
def test_compiled_calls_obey_as_well(name, monkeypatch):
    model, ids = causal_lm("tiny-qwen3", num_hidden_layers=1), prompt()
    fused = copy.deepcopy(model)
    minivllm.transformers.apply(fused)
    where, attribute = PLACES[name]
    monkeypatch.setattr(where, attribute, replacement(getattr(where, attribute), []))
    expected = model(ids).logits
    torch.compiler.reset()
    assert close(torch.compile(fused, backend="aot_eager")(ids).logits, expected)


def test_a_rotary_embedding_that_is_replaced_between_compiled_calls(monkeypatch):
    model, ids = causal_lm("tiny-qwen3", num_hidden_layers=1), prompt()
    fused = copy.deepcopy(model)
    minivllm.transformers.apply(fused)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager")
    assert close(compiled(ids).logits, model(ids).logits)
    monkeypatch.setattr(qwen3, "apply_rotary_pos_emb", replacement(qwen3.apply_rotary_pos_emb, []))
    assert close(compiled(ids).logits, model(ids).logits)


def test_the_forward_of_the_model_may_be_replaced(monkeypatch):
    """It then sees whole hidden states between the layers."""
    model, ids, seen = causal_lm("tiny-qwen3"), prompt(), []

    def forward(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        embeddings = self.rotary_emb(x, torch.arange(x.shape[1])[None])
        kwargs = {name: value for name, value in kwargs.items() if name == "minivllm_step"}
        for layer in self.layers:
            seen.append(x)
            x = layer(x, position_embeddings=embeddings, **kwargs)
        return self.norm(x)

    monkeypatch.setattr(qwen3.Qwen3Model, "forward", forward)
    expected = model.model(ids)
    monkeypatch.undo()
    before = list(seen)
    seen.clear()
    minivllm.transformers.apply(model)
    monkeypatch.setattr(qwen3.Qwen3Model, "forward", forward)
    assert close(model.model(ids), expected)
    assert all(map(close, seen, before)) and len(seen) == LAYERS


class Counting(TorchFunctionMode):
    """Counts calls by name, and doubles what the projections give."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.counts[name] = self.counts.get(name, 0) + 1
        result = function(*args, **(kwargs or {}))
        return result * 2 if name == "linear" else result


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_mode_sees_what_the_classes_compute(compiled):
    model, ids = causal_lm("tiny-qwen3", num_hidden_layers=2), prompt()
    report = minivllm.transformers.apply(model)
    plain = copy.deepcopy(model)
    minivllm.transformers.undo(plain)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    assert close(call(ids).logits, plain(ids).logits) and not report.fallbacks
    with Counting() as expected:
        true = plain(ids).logits
    with Counting() as mode:
        got = call(ids).logits
    assert close(got, true)
    if not compiled:
        assert mode.counts.pop("__get__") >= expected.counts.pop("__get__")  # the questions are seen, too
        assert mode.counts == expected.counts and mode.counts["linear"] == 2 * 7 + 1
        assert set(report.fallbacks.values()) == {"a TorchFunctionMode is active"}


def test_a_default_device_is_no_such_mode(calls):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    report = minivllm.transformers.apply(model)
    with torch.device("cpu"):
        model(ids)
    assert not report.fallbacks and calls["rms_norm_qkv"] == LAYERS


def test_dropout_of_an_attention_in_training_mode():
    """With a rate of 1 nothing is left of what attention adds, if that alone trains."""
    model, ids = causal_lm("tiny-qwen3", attention_dropout=1.0), prompt()
    fused = copy.deepcopy(model)
    report = minivllm.transformers.apply(fused)
    plain = model(ids).logits
    for each in (model, fused):
        for layer in each.model.layers:
            layer.self_attn.train()
    expected = model(ids).logits
    assert not close(expected, plain)
    assert close(fused(ids).logits, expected)
    assert set(report.fallbacks.values()) == {"it is in training mode: call model.eval()"}


def test_the_eager_attention_is_the_modules_own(monkeypatch):
    model, ids = causal_lm("tiny-qwen3"), prompt()
    model.set_attn_implementation("eager")
    minivllm.transformers.apply(model)
    plain = copy.deepcopy(model)
    minivllm.transformers.undo(plain)
    monkeypatch.setattr(qwen3, "eager_attention_forward", replacement(qwen3.eager_attention_forward, []))
    assert close(model(ids).logits, plain(ids).logits)


def test_a_linear_of_an_adapter_says_whose_it_is():
    """peft calls its own classes Linear, too."""
    theirs = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = causal_lm("tiny-llama")
    model.model.layers[1].self_attn.q_proj.__class__ = theirs
    report = minivllm.transformers.apply(model)
    assert report.left_alone == {
        "model.layers.1": "self_attn.q_proj is a peft.tuners.lora.layer.Linear, expected Linear"
    }


# ---- one warning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plain_loop_with_gradients_warns_once(compiled):
    model, ids = causal_lm("tiny-qwen3", num_hidden_layers=2), prompt(1, 5)
    report = minivllm.transformers.apply(model)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    with warnings.catch_warnings(record=True) as warned, torch.enable_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            call(ids)
    ours = [each for each in warned if each.category is NotFusedWarning]
    assert len(ours) == 1 and "gradient mode is on: call it under torch.no_grad()" in str(ours[0].message)
    assert all("gradient mode is on" in why for why in report.fallbacks.values()) and len(report.fallbacks) == 2


def test_training_and_inference_do_not_warn():
    model, ids = causal_lm("tiny-qwen3"), prompt(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFusedWarning)
        minivllm.transformers.apply(model)
        model(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        copy.deepcopy(model)(ids)
        model.train()
        with torch.enable_grad():
            model(ids)


@pytest.mark.skipif(
    isinstance(qwen3.apply_rotary_pos_emb, torch.nn.Module),
    reason="with the package kernels no model of transformers can be pickled",
)
def test_what_comes_out_of_a_pickle_warns_once():
    model, ids = causal_lm("tiny-qwen3"), prompt(1, 5)
    expected = model(ids).logits
    minivllm.transformers.apply(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert [each.category for each in warned] == [NotFusedWarning]
    assert "came out of a pickle" in str(warned[0].message)
    assert loaded(ids).logits.equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(minivllm.transformers.apply(loaded).fused) == LAYERS + 1


# ---- the kernels of the Hugging Face hub ----------------------------------------------------------------------------


def put(module, layer):
    """As `kernelize` does: the forward of another class, or of the module's own where there is no kernel for it."""
    module.forward = types.MethodType(layer.forward, module)


class Doubling(torch.nn.Module):
    """A stateless layer, as the hub has them."""

    def forward(self, hidden_states):
        return hidden_states * 2


def norms_of(model):
    return [module for module in model.modules() if type(module) is qwen3.Qwen3RMSNorm]


@pytest.mark.parametrize("first", ["kernelize", "apply"])
def test_layers_of_the_hub_are_run(first):
    """Whichever of kernelize and apply comes first."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
    fused = copy.deepcopy(model)
    if first == "apply":
        report = minivllm.transformers.apply(fused)
    for each in (model, fused):
        for norm in norms_of(each):
            put(norm, Doubling)
    if first == "kernelize":
        report = minivllm.transformers.apply(fused)
    assert fused(ids).logits.equal(model(ids).logits)
    reasons = report.left_alone if first == "kernelize" else report.fallbacks
    assert {f"model.layers.{i}" for i in range(LAYERS)} <= set(reasons)
    assert all("replaced" in why for why in reasons.values())


@pytest.mark.parametrize("first", ["kernelize", "apply"])
def test_layers_without_a_kernel_are_fused(first, calls):
    """kernelize then sets the forward of a module to that of its class."""
    model, ids = causal_lm("tiny-qwen3"), prompt()
    expected = model(ids).logits
    steps = [minivllm.transformers.apply, lambda each: [put(norm, type(norm)) for norm in norms_of(each)]]
    for step in steps if first == "apply" else steps[::-1]:
        step(model)
    assert close(model(ids).logits, expected)
    assert calls["rms_norm_qkv"] == LAYERS
    minivllm.transformers.undo(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_layer_for_the_hub(dtype):
    layer = minivllm.layers.RMSNorm
    assert layer.__init__ is torch.nn.Module.__init__ and layer.can_torch_compile and layer.has_backward
    extra = set(dir(layer)) - set(dir(torch.nn.Module))
    assert extra <= {"can_torch_compile", "has_backward"}
    norm = causal_lm("tiny-qwen3", dtype).model.norm
    x = torch.randn(64, norm.weight.numel(), dtype=norm.weight.dtype)
    expected = norm(x)
    put(norm, layer)
    assert norm(x).dtype == expected.dtype and float((norm(x) != expected).float().mean()) < (
        0.001 if dtype == "bfloat16" else 1
    )
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    exact = exact * norm.weight.double()
    assert float((norm(x) - exact).abs().max()) <= 2 * float((expected - exact).abs().max()) + 1e-6
    with pytest.raises(AttributeError, match=r"module 'minivllm.layers' has no attribute 'LayerNorm'"):
        minivllm.layers.LayerNorm  # noqa: B018


def test_kernelize_itself():
    """The package `kernels`, with our layer in place of one that is downloaded."""
    kernels = pytest.importorskip("kernels", reason="the package kernels of Hugging Face is not installed")
    if not transformers.utils.is_kernels_available():
        pytest.skip(f"transformers {transformers.__version__} does not use version {kernels.__version__} of kernels")

    class Repository:
        def load(self):
            return minivllm.layers.RMSNorm

    model, ids = causal_lm("tiny-qwen3"), prompt()
    expected = model(ids).logits
    report = minivllm.transformers.apply(model)
    assert len(report.fused) == LAYERS + 1
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": Repository()}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    assert all(norm.forward.__func__ is minivllm.layers.RMSNorm.forward for norm in norms_of(model))
    assert close(model(ids).logits, expected)
    assert set(report.fallbacks.values()) == {"the forward of one of its modules was replaced"}
    with kernels.use_kernel_mapping({}, inherit_mapping=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no kernel
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    report = minivllm.transformers.apply(model)
    assert len(report.fused) == LAYERS + 1
    assert close(model(ids).logits, expected) and not report.fallbacks
