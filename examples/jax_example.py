"""minivllm inside jax.jit and jax.grad, on whatever device JAX uses. Usage: python -m examples.jax_example"""

import jax
from jax import numpy as jnp

import minivllm.jax

hidden, heads, kv_heads, head_dim = 1024, 16, 8, 128
keys = jax.random.split(jax.random.key(0), 2)
x = jax.random.normal(keys[0], (4, hidden), jnp.bfloat16)
norm_weight = jnp.ones(hidden, jnp.bfloat16)
qkv_weight = 0.02 * jax.random.normal(keys[1], ((heads + 2 * kv_heads) * head_dim, hidden), jnp.bfloat16)


@jax.jit
def attention_input(x):
    return minivllm.jax.rms_norm_qkv(x, norm_weight, qkv_weight, heads, kv_heads)


q, k, v = attention_input(x)
gradient = jax.grad(lambda x: attention_input(x)[0].astype(jnp.float32).sum())(x)
print(f"q {q.shape}, k {k.shape}, v {v.shape} and gradient {gradient.shape} on {q.device}")
