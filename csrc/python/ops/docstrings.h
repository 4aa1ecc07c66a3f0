/* docstrings.h: what help() shows. The first line of each is the signature that inspect.signature() reads. */
#ifndef MV_DOCSTRINGS_H
#define MV_DOCSTRINGS_H

#define DOC_TENSORS                                                                                                    \
    "Tensors may come from torch, NumPy (bfloat16 by ml_dtypes), CuPy, JAX, or have __dlpack__ or\n"                   \
    "__cuda_array_interface__; all on one device. Results are of the framework of x.\n"

#define DOC_ERRORS                                                                                                     \
    "Raises TypeError for what is no tensor, wrong dtypes and unknown arguments; ValueError for shapes, devices,\n"    \
    "strides, values, read-only or overlapping outputs; BufferError where an exporter refuses; RuntimeError for "      \
    "CUDA,\n"                                                                                                          \
    "and where an op that is told where to write would have to carry a gradient.\n"

#define DOC_rms_norm                                                                                                   \
    "rms_norm($module, x, weight, eps=1e-06, *, out=None, rounding='hf', weight_offset=0.0, kernel=None)\n--\n\n"      \
    "out = x * r * (weight_offset + weight), r = 1 / sqrt(mean(x^2 over the last dimension) + eps)\n\n"                \
    "x: [..., hidden], float32, float16 or bfloat16; any strides of the leading dimensions, the last contiguous.\n"    \
    "weight: [hidden], of x's dtype or float32; None: ones. out: like x; may be x itself. Returns out, or a new\n"     \
    "tensor.\n"                                                                                                        \
    "Sums are float32. rounding 'hf' rounds x * r to x's dtype before the weight multiplies it (HF, vLLM); 'fp32'\n"   \
    "rounds once, at the end (FlashInfer, TE, Gemma). weight_offset=1.0 is Gemma's. kernel: a name of "                \
    "kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_add_rms_norm                                                                                               \
    "add_rms_norm($module, x, residual, weight, eps=1e-06, *, out=None, residual_out=None, rounding='hf', "            \
    "weight_offset=0.0, kernel=None)\n--\n\n"                                                                          \
    "residual_out = x + residual, rounded to x's dtype; out = rms_norm(residual_out, weight). Returns both.\n\n"       \
    "residual, out, residual_out: of x's shape and dtype; an output may be exactly x or exactly residual, so that\n"   \
    "out=x, residual_out=residual works in place. weight, eps, rounding, weight_offset, kernel: as in "                \
    "rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_fused_add_rms_norm                                                                                         \
    "fused_add_rms_norm($module, x, residual, weight, eps=1e-06, *, rounding='hf', weight_offset=0.0)\n--\n\n"         \
    "residual += x; x = rms_norm(residual, weight): in place on both, as in vLLM and FlashInfer. Returns them.\n\n"    \
    "x, residual: of one shape and dtype, writable. weight, eps, rounding, weight_offset: as in "                      \
    "rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_rms_norm_qkv                                                                                               \
    "rms_norm_qkv($module, x, norm_weight, qkv_weight, num_heads, num_kv_heads, eps=1e-06, *, bias=None, "             \
    "residual=None, head_dim=None, out=None, residual_out=None, weight_layout='auto', rounding='hf', "                 \
    "weight_offset=0.0, batch_invariant=False, allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"           \
    "q, k, v = split(rms_norm(x, norm_weight) @ qkv_weight.T + bias), in one call\n\n"                                 \
    "x: [..., hidden]. norm_weight: [hidden]. qkv_weight: [qkv, hidden] as nn.Linear keeps it, or [hidden, qkv] "      \
    "(its\n"                                                                                                           \
    ".t(), also contiguous), where qkv = (num_heads + 2 * num_kv_heads) * head_dim; or a tuple (wq, wk, wv). bias:\n"  \
    "[qkv], or a tuple. Weights and biases are of x's dtype or float32; none is copied.\n"                             \
    "Returns (q, k, v): [..., num_heads, head_dim] and twice [..., num_kv_heads, head_dim], views of one packed\n"     \
    "buffer [..., qkv], which out= may give. With a residual the norm sees x + residual, and the sum comes back as\n"  \
    "well: (q, k, v, residual_out).\n"                                                                                 \
    "weight_layout: 'auto' decides by shape; weights that are all square need 'out_in' (a Linear's .weight) or\n"      \
    "'in_out' (its .t()). batch_invariant: a row's bits do not depend on the other rows. allow_tf32: float32\n"        \
    "products may be rounded to TF32. static_weights=True: you vouch that no unfinished work in front of this\n"       \
    "call on its stream writes weights or biases; a GPU then reads them before that work ends, which is faster.\n"     \
    "head_dim: checked if given, else qkv / (num_heads + 2 * num_kv_heads). residual_out: where the sum goes, as in\n" \
    "add_rms_norm. eps, rounding, weight_offset, kernel: as in rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_rms_norm_linear                                                                                            \
    "rms_norm_linear($module, x, norm_weight, weight, eps=1e-06, *, bias=None, residual=None, out=None, "              \
    "residual_out=None, weight_layout='auto', rounding='hf', weight_offset=0.0, batch_invariant=False, "               \
    "allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                                                     \
    "rms_norm(x, norm_weight) @ weight.T + bias, in one call\n\n"                                                      \
    "x: [..., hidden]. norm_weight: [hidden]. weight: [outputs, hidden] as nn.Linear keeps it, or [hidden, outputs]\n" \
    "(its .t(), also contiguous); bias: [outputs]. Weights and biases are of x's dtype or float32; none is copied.\n"  \
    "Returns [..., outputs], or with a residual, which x is added to before the norm, the sum as well: (out,\n"        \
    "residual_out). out, residual_out: where they go; they must overlap nothing.\n"                                    \
    "weight_layout, batch_invariant, allow_tf32, static_weights: as in rms_norm_qkv. eps, rounding, weight_offset,\n"  \
    "kernel: as in rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_linear                                                                                                     \
    "linear($module, x, weight, *, bias=None, out=None, weight_layout='auto', rounding='hf', batch_invariant=False, "  \
    "allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                                                     \
    "x @ weight.T + bias\n\n"                                                                                          \
    "x: [..., hidden]. weight: [outputs, hidden] as nn.Linear keeps it, or [hidden, outputs] (its .t(), also\n"        \
    "contiguous); bias: [outputs]. Weight and bias are of x's dtype or float32; neither is copied. Returns\n"          \
    "[..., outputs], in x's dtype; out: where it goes, which must overlap nothing.\n"                                  \
    "Sums are float32, the bias joins them, and they are rounded once, in either rounding. weight_layout,\n"           \
    "batch_invariant, allow_tf32, static_weights: as in rms_norm_qkv. kernel: a name of "                              \
    "kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_linear_add                                                                                                 \
    "linear_add($module, x, weight, residual, *, bias=None, scale=1.0, out=None, weight_layout='auto', "               \
    "rounding='hf', "                                                                                                  \
    "batch_invariant=False, allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                              \
    "residual + scale * (x @ weight.T + bias), in one call\n\n"                                                        \
    "x, weight, bias: as in linear. residual: [..., outputs], of x's dtype. Returns [..., outputs]; out: where it\n"   \
    "goes, which may be exactly residual (in place), and must overlap nothing else.\n"                                 \
    "rounding 'hf' rounds to x's dtype wherever torch would: the product with its bias, what scale makes of it (not\n" \
    "for scale=1.0), and the sum; 'fp32' rounds once, at the end. weight_layout, batch_invariant, allow_tf32,\n"       \
    "static_weights: as in rms_norm_qkv. kernel: a name of kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_silu_and_mul                                                                                               \
    "silu_and_mul($module, x, *, out=None, rounding='hf', kernel=None)\n--\n\n"                                        \
    "out = silu(gate) * up, where x is gate | up and silu(z) = z / (1 + exp(-z))\n\n"                                  \
    "x: [..., 2 * d], float32, float16 or bfloat16; any strides of the leading dimensions, the last contiguous.\n"     \
    "out: [..., d], which may share no memory with x. Returns out, or a new tensor.\n"                                 \
    "The activation is computed in float32. rounding 'hf' rounds it to x's dtype before up multiplies it (HF);\n"      \
    "'fp32' rounds once, at the end. kernel: a name of kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_gelu_and_mul                                                                                               \
    "gelu_and_mul($module, x, *, approximate='tanh', out=None, rounding='hf', kernel=None)\n--\n\n"                    \
    "out = gelu(gate) * up, where x is gate | up\n\n"                                                                  \
    "approximate, as in torch: 'tanh' is 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) (Gemma), 'none' is\n"       \
    "0.5 z (1 + erf(z / sqrt(2))). x: [..., 2 * d]; out: [..., d]; rounding, kernel: as in "                           \
    "silu_and_mul.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_CALL_LAYER                                                                                                 \
    "__call__($self, x, *, residual=None, out=None, residual_out=None)\n--\n\n"                                        \
    "x: [..., hidden] -> (q, k, v): [..., heads, head_dim] each; with a residual (q, k, v, residual_out)."

#endif
