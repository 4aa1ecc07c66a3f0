"""The final norm and lm_head of a fused language model: one call, unless somebody would miss one of them."""

import copy
import inspect

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="transformers models need torch")

from transformer_models import close, prompt  # noqa: E402

import minivllm.transformers  # noqa: E402
from minivllm.testing.models import causal_lm  # noqa: E402
from minivllm.transformers import Decoder, head  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def model():
    """Of one layer, with its weights tied."""
    return causal_lm("tiny-qwen3", num_hidden_layers=1)


def heads(calls):
    """How often norm and lm_head were one call; of two sequences the MLP is one of its own."""
    return calls.get("rms_norm_linear", 0)


def test_logits_of_the_last_tokens(model, calls, monkeypatch):
    """Tied and untied, with a bias, with indices; and of too many tokens by the modules, on those tokens alone."""
    ids = prompt(2, 3)
    for tied in (True, False):
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
            model.lm_head.bias = torch.nn.Parameter(torch.randn(512))
        expected = model(ids).logits
        minivllm.transformers.apply(model)
        for keep in (0, 1, 2, torch.tensor([0, 2])):
            calls.clear()
            kept = expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:]
            assert close(model(ids, logits_to_keep=keep).logits, kept) and heads(calls) == 1
        minivllm.transformers.undo(model)
    minivllm.transformers.apply(model)
    monkeypatch.setattr(head, "HEAD_TOKENS", 2)
    calls.clear()
    with torch.inference_mode():
        assert close(model(ids, logits_to_keep=2).logits, expected[:, -2:]) and heads(calls) == 0
        assert close(model(ids, logits_to_keep=1, labels=None).logits, expected[:, -1:]) and heads(calls) == 1


def test_a_step_of_a_decoder_is_one_call_of_it(model, calls, device):
    model, ids = model.to(device), prompt(2).to(device)
    plain = copy.deepcopy(model)
    minivllm.transformers.apply(model)
    decoder = Decoder(model, 2, 32, graph=False)
    assert close(decoder.prefill(ids[:, :-1]), plain(ids[:, :-1]).logits[:, -1])
    calls.clear()
    assert close(decoder.step(ids[:, -1]), plain(ids).logits[:, -1])
    assert heads(calls) == 1 and "rms_norm" not in calls


def hook_lm_head(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook_norm(model):
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_decoder(model):
    def double(module, args, output):
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.model.register_forward_hook(double)


def replace_lm_head(model):
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())


def replace_norm(model):
    model.model.norm = torch.nn.LayerNorm(96)


def replace_forward(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * own(x)


def adapt_lm_head(model):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Adapted


SPOILT = (hook_lm_head, pre_hook_norm, hook_decoder, replace_lm_head, replace_norm, replace_forward, adapt_lm_head)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_others_put_there_is_called(spoil, model, calls):
    plain, ids = copy.deepcopy(model), prompt(2, 3)
    unspoilt = plain(ids).logits
    spoil(plain)
    expected = plain(ids).logits
    assert not close(expected, unspoilt)
    later = copy.deepcopy(model)
    minivllm.transformers.apply(later)
    for each in (model, later):
        spoil(each)
    minivllm.transformers.apply(model)
    calls.clear()
    for each in (model, later):
        assert close(each(ids).logits, expected)
    assert heads(calls) == 0


def test_what_is_recorded_is_normed(model, calls):
    ids = prompt(2, 3)
    expected = model(ids, output_hidden_states=True)
    minivllm.transformers.apply(model)
    got = model(ids, output_hidden_states=True)
    assert close(got.hidden_states[-1], expected.hidden_states[-1]) and close(got.logits, expected.logits)
    assert close(model.model(ids).last_hidden_state, expected.hidden_states[-1]) and heads(calls) == 0


def test_a_forward_of_the_class_that_is_replaced(model, monkeypatch, calls):
    ids, kind = prompt(2, 3), type(model)
    minivllm.transformers.apply(model)
    assert inspect.signature(model.forward) == inspect.signature(causal_lm("tiny-qwen3").forward)
    monkeypatch.setattr(kind, "forward", lambda self, ids: self.model(ids).last_hidden_state)
    expected = model(ids)
    minivllm.transformers.undo(model)
    assert "forward" not in model.__dict__ and close(model(ids), expected) and heads(calls) == 0


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
def test_16_bits(rounding, calls):
    """No further from float32 than before."""
    model, ids = causal_lm("tiny-llama", "bfloat16", num_hidden_layers=1), prompt(16, 4)
    exact = copy.deepcopy(model).float()(ids).logits
    before = float((model(ids).logits.float() - exact).square().mean())
    minivllm.transformers.apply(model, rounding=rounding)
    after = model(ids).logits
    assert after.dtype == torch.bfloat16 and calls["rms_norm_linear"] == 1  # the head
    assert float((after.float() - exact).square().mean()) <= 1.1 * before
