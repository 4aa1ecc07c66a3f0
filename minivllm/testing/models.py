"""Whole models of transformers with random weights, by name: real configurations, and a tiny one per architecture."""

from .shapes import model as qkv_shape

OUTLIER = 96.5  # the largest weight of Qwen3-0.6B's k_norms, where narrow arithmetic shows first

_QWEN3 = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960}
_TINY = {
    "vocab_size": 512,
    "initializer_range": 0.1,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
# name: (architecture, what its configuration says beyond the shape of its q, k and v)
MODELS = {
    "qwen2.5-0.5b": ("Qwen2", _QWEN3 | {"intermediate_size": 4864, "num_hidden_layers": 24, "tied": True}),
    "qwen3-0.6b": ("Qwen3", _QWEN3 | {"intermediate_size": 3072, "num_hidden_layers": 28, "tied": True}),
    "qwen3-8b": ("Qwen3", _QWEN3 | {"intermediate_size": 12288, "num_hidden_layers": 36, "tied": False}),
    "tiny-qwen2": ("Qwen2", _TINY | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tied": True}),
    "tiny-qwen3": ("Qwen3", _TINY | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tied": True}),
    "tiny-llama": ("Llama", _TINY | {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tied": False}),
}
_TINY_HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}


def configuration(name, **changes):
    """The transformers configuration called `name`; KeyError lists the names."""
    import transformers

    if name not in MODELS:
        raise KeyError(f"no model {name!r}; there are {', '.join(MODELS)}")
    architecture, values = MODELS[name]
    values = dict(values)
    if name.startswith("tiny"):
        values |= _TINY_HEADS
    else:
        shape = qkv_shape(name)
        values |= {"hidden_size": shape.hidden, "num_attention_heads": shape.num_heads}
        values |= {"num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    values["tie_word_embeddings"] = values.pop("tied")
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return getattr(transformers, f"{architecture}Config")(**values | changes)


def causal_lm(name, dtype="float32", device="cpu", seed=0, **changes):
    """A causal language model with random weights, in eval mode: norm weights around 1, one channel of every k_norm
    OUTLIER, biases not zero. dtype: a name of torch. changes: to the configuration."""
    import torch
    import transformers

    config = configuration(name, dtype=dtype, **changes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            if parameter_name.endswith("k_norm.weight"):
                parameter[parameter.numel() // 3] = OUTLIER
    return model
