"""Modules without state, for `kernelize` of the package `kernels`, which puts their forward into a model's own modules.

That package finds them as attributes of `minivllm.layers`, the name that it expects of every kernel.
"""

from typing import Any

import torch

from ._C import rms_norm


class RMSNorm(torch.nn.Module):
    """Stands in for the RMSNorm of transformers' Llama, Qwen2 and Qwen3, bit for bit but for ties."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        module: Any = self  # one that has a weight and a variance_epsilon
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
