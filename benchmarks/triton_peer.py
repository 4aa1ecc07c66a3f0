"""The Triton kernel this project started from, in outline: one program per output element.

Each program loops over the hidden size in blocks, reads x, the norm weight and its own row of the projection weight
under a mask, and so recomputes the statistic of the norm for every output. Sums are float32; the block is the next
power of two of the hidden size, 1024 at most.
"""

import triton
import triton.language as tl


@triton.jit
def one_output_kernel(
    x, norm_weight, weight, bias, out, hidden, outputs, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    output = tl.program_id(0)
    token = tl.program_id(1)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < hidden
        x_f32 = tl.load(x + token * hidden + k, mask=mask, other=0.0).to(tl.float32)
        gamma_f32 = tl.load(norm_weight + k, mask=mask, other=0.0).to(tl.float32)
        row_f32 = tl.load(weight + output * hidden + k, mask=mask, other=0.0).to(tl.float32)
        squares += x_f32 * x_f32
        products += x_f32 * gamma_f32 * row_f32
    r = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / hidden + eps)
    result = tl.sum(products, axis=0) * r
    if HAS_BIAS:
        result += tl.load(bias + output).to(tl.float32)
    tl.store(out + token * outputs + output, result.to(out.dtype.element_ty))


def rms_norm_qkv(x, norm_weight, weight, bias, out, eps: float) -> None:
    """out [tokens, outputs] from contiguous x [tokens, hidden] and weight [outputs, hidden]."""
    tokens, hidden = x.shape
    outputs = weight.shape[0]
    block = min(triton.next_power_of_2(hidden), 1024)
    one_output_kernel[(outputs, tokens)](
        x, norm_weight, weight, bias, out, hidden, outputs, eps, HAS_BIAS=bias is not None, BLOCK=block
    )
