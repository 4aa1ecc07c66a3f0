"""Benchmarks of minivllm, each beside its peers, in one run. `python -m benchmarks --help`; README.md has the method.

__main__        the command line
norms           rms_norm, add_rms_norm
act_and_mul     silu_and_mul, gelu_and_mul
qkv             rms_norm_qkv
linear          linear, linear_add, rms_norm_linear, rms_norm_gate_up
host            what a call costs from Python
accuracy        errors against float64
model           whole models of transformers, plain and fused: speed, and errors against float32
plot, tables    what docs show, from committed JSON
report          rows, the JSON file, the lines on the screen
environment     what a figure depends on
peers           torch, torch.compile, NumPy
device_peers    the read floor and the copy (device_peers.cu), triton_peer: the Triton kernel of one output per program
memory          peak memory of a call on the CPU
"""
