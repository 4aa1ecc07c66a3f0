"""What the tests of minivllm.transformers share: prompts, and how their results are compared."""

import torch

TINY = ("tiny-qwen2", "tiny-qwen3", "tiny-llama")
LAYERS = 3


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
