"""What the tests of minivllm.transformers share: prompts, and how their results are compared."""

import torch

TINY = ("tiny-qwen2", "tiny-qwen3", "tiny-llama")
LAYERS = 3

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 6}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
SMOLLM = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "use_sliding_window": True}
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 32}),
    "phi3": ("Phi3", {"resid_pdrop": 0.5, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3 with windows": ("Phi3", {"sliding_window": 6}),
    "granite": ("Granite", {
        "residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "attention_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], **SMOLLM}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **GEMMA}),
    "gemma3": ("Gemma3", GEMMA),
}  # fmt: skip


def model_of(kind, dtype=torch.float32, attention="eager"):
    import transformers

    name, changes = FAMILIES[kind]
    config = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")(**SMALL | changes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("norm.weight"):
            parameter.normal_(0.0 if name.startswith("Gemma") else 1.0, 0.3)
        if parameter_name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
    return model.to(dtype)


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
