"""minivllm on CuPy arrays: on the current stream, out of CuPy's memory pool. Usage: python -m examples.cupy_example"""

import cupy
import numpy as np

import minivllm

hidden, heads, kv_heads, head_dim = 1024, 16, 8, 128
random = np.random.default_rng(0)
x = cupy.asarray(random.standard_normal((4, hidden)).astype(np.float16))
norm_weight = cupy.asarray(np.ones(hidden, np.float16))
qkv_weight = cupy.asarray(0.02 * random.standard_normal(((heads + 2 * kv_heads) * head_dim, hidden)), dtype=np.float16)

with cupy.cuda.Stream():
    q, k, v = minivllm.rms_norm_qkv(x, norm_weight, qkv_weight, heads, kv_heads)
    print(f"q {q.shape}, k {k.shape}, v {v.shape} by {minivllm.last_kernel().name}")
