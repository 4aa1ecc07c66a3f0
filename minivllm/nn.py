"""The ops as modules of torch, which own their Parameters or stand around modules that do.

    from minivllm.nn import FusedRMSNormQKV
    layer = FusedRMSNormQKV(1024, num_heads=16, num_kv_heads=8, head_dim=128)
    q, k, v = layer(x)

A whole decoder layer is DecoderLayer, made of Attention and GatedMLP, whose Parameters have the names that they have
in the checkpoints of Llama, Qwen2, Qwen3 and Mistral. Those two are handed the norm in front of them, because there it
stands beside them.

They look up what they compute with in every call and hand it to a stateless op, so that nothing goes stale, whoever
replaces it and by whatever means: load_state_dict(assign=True), functional_call, a parametrization, another module.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"minivllm.nn holds modules of torch, which cannot be imported here ({error}); install it by `pip install "
        "torch`, or use minivllm.FusedRMSNormQKV, which needs no framework"
    ) from error
from .nn_layer import Attention, DecoderLayer, GatedMLP
from .nn_modules import FusedRMSNormQKV, LinearAdd, NotFusedWarning, RMSNorm

__all__ = ["Attention", "DecoderLayer", "FusedRMSNormQKV", "GatedMLP", "LinearAdd", "NotFusedWarning", "RMSNorm"]

for _name in __all__:  # where users find them, in what is printed and in what is pickled
    globals()[_name].__module__ = __name__
