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
    "Sums are float32. rounding 'hf' rounds x * r to x's dtype before the weight multiplies it (HF, vLLM);\n"          \
    "'hf_once' and 'fp32' round once, at the end (Gemma, FlashInfer, TE); in ops that do more 'hf_once' is 'hf' but\n" \
    "for that. weight_offset=1.0 is Gemma's. kernel: a name of kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

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

#define DOC_norm_add                                                                                                   \
    "norm_add($module, x, weight, residual, eps=1e-06, *, out=None, rounding='hf', weight_offset=0.0, kernel=None)\n"  \
    "--\n\n"                                                                                                           \
    "out = residual + rms_norm(x, weight), as Gemma has a norm on either side of a sublayer. Returns out.\n\n"         \
    "residual, out: of x's shape and dtype; out may be exactly x or exactly residual. rounding 'hf' and\n"             \
    "'hf_once' round the norm to x's dtype before it is added, 'fp32' the sum alone. weight, eps, weight_offset,\n"    \
    "kernel: as in rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

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

#define DOC_rms_norm_gate_up                                                                                           \
    "rms_norm_gate_up($module, x, norm_weight, gate_up_weight, eps=1e-06, *, activation='silu', bias=None, "           \
    "residual=None, out=None, residual_out=None, weight_layout='auto', rounding='hf', weight_offset=0.0, "             \
    "batch_invariant=False, allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                              \
    "activation(gate) * up, where gate | up = rms_norm(x, norm_weight) @ gate_up_weight.T + bias, in one call\n\n"     \
    "x: [..., hidden]. norm_weight: [hidden]. gate_up_weight: [2 * d, hidden], whose first d outputs are the\n"        \
    "gate's, or [hidden, 2 * d] (its .t(), also contiguous); or a tuple (gate, up) of one dtype that lie alike. "      \
    "bias:\n"                                                                                                          \
    "[2 * d], or a tuple. Weights and biases are of x's dtype or float32; none is copied.\n"                           \
    "Returns [..., d], or with a residual, which x is added to before the norm, the sum as well: (out,\n"              \
    "residual_out). out, residual_out: where they go; they must overlap nothing.\n"                                    \
    "activation: 'silu'; 'gelu_tanh' (Gemma) and 'gelu' are what gelu_and_mul calls 'tanh' and 'none'. rounding "      \
    "'hf'\n"                                                                                                           \
    "and 'hf_once' round gate, up and the activation to x's dtype before they are multiplied, besides what they\n"     \
    "round in the norm; 'fp32' rounds the result alone. weight_layout, batch_invariant, allow_tf32,\n"                 \
    "static_weights: as in rms_norm_qkv. eps, weight_offset, kernel: as in rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_silu_and_mul                                                                                               \
    "silu_and_mul($module, x, *, out=None, rounding='hf', kernel=None)\n--\n\n"                                        \
    "out = silu(gate) * up, where x is gate | up and silu(z) = z / (1 + exp(-z))\n\n"                                  \
    "x: [..., 2 * d], float32, float16 or bfloat16; any strides of the leading dimensions, the last contiguous.\n"     \
    "out: [..., d], which may share no memory with x. Returns out, or a new tensor.\n"                                 \
    "The activation is computed in float32. rounding 'hf', or 'hf_once', rounds it to x's dtype before up\n"           \
    "multiplies it (HF); 'fp32' rounds once, at the end. kernel: a name of kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_gelu_and_mul                                                                                               \
    "gelu_and_mul($module, x, *, approximate='tanh', out=None, rounding='hf', kernel=None)\n--\n\n"                    \
    "out = gelu(gate) * up, where x is gate | up\n\n"                                                                  \
    "approximate, as in torch: 'tanh' is 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) (Gemma), 'none' is\n"       \
    "0.5 z (1 + erf(z / sqrt(2))). x: [..., 2 * d]; out: [..., d]; rounding, kernel: as in "                           \
    "silu_and_mul.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_linear                                                                                                     \
    "linear($module, x, weight, *, bias=None, out=None, weight_layout='auto', rounding='hf', batch_invariant=False, "  \
    "allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                                                     \
    "x @ weight.T + bias\n\n"                                                                                          \
    "x: [..., hidden]. weight: [outputs, hidden] as nn.Linear keeps it, or [hidden, outputs] (its .t(), also\n"        \
    "contiguous); bias: [outputs]. Weight and bias are of x's dtype or float32; neither is copied. Returns\n"          \
    "[..., outputs], in x's dtype; out: where it goes, which must overlap nothing.\n"                                  \
    "Sums are float32, the bias joins them, and they are rounded once, in every rounding. weight_layout,\n"            \
    "batch_invariant, allow_tf32, static_weights: as in rms_norm_qkv. kernel: a name of "                              \
    "kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_linear_add                                                                                                 \
    "linear_add($module, x, weight, residual, *, bias=None, scale=1.0, out=None, weight_layout='auto', "               \
    "rounding='hf', "                                                                                                  \
    "batch_invariant=False, allow_tf32=False, static_weights=False, kernel=None)\n--\n\n"                              \
    "residual + scale * (x @ weight.T + bias), in one call\n\n"                                                        \
    "x, weight, bias: as in linear. residual: [..., outputs], of x's dtype. Returns [..., outputs]; out: where it\n"   \
    "goes, which may be exactly residual (in place), and must overlap nothing else.\n"                                 \
    "rounding 'hf' or 'hf_once' rounds to x's dtype wherever torch would: the product with its bias, what scale\n"     \
    "makes of it (not for scale=1.0), and the sum; 'fp32' rounds once, at the end. weight_layout, batch_invariant,\n"  \
    "allow_tf32, static_weights: as in rms_norm_qkv. kernel: a name of kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_decode_attention                                                                                           \
    "decode_attention($module, q, k, v, key_cache, value_cache, positions, *, cos=None, sin=None, "                    \
    "q_norm_weight=None, k_norm_weight=None, eps=1e-06, weight_offset=0.0, interleaved=False, block_table=None, "      \
    "cache_layout=None, ring=False, starts=None, scale=None, window=None, soft_cap=None, out=None, rounding='hf', "    \
    "batch_invariant=False, static_weights=False, static_rows=False, kernel=None)\n--\n\n"                             \
    "One new token per sequence: k and v join the cache, and q attends to it, in one call\n\n"                         \
    "q: [B, heads, D] or [B, 1, heads, D]; k, v: [B, kv_heads, D], as rms_norm_qkv returns them. Returns out, like\n"  \
    "q. positions: int32 or int64, [B] or [], on q's device: how many tokens each sequence has in the cache. q and "   \
    "k\n"                                                                                                              \
    "go through the norm of their heads where q_norm_weight and k_norm_weight [D] are given, then through the "        \
    "rotary\n"                                                                                                         \
    "embedding where cos and sin are: rows [B, R] or [1, R] for these positions, in halves or interleaved. The new\n"  \
    "k and v are written to the caches, and q attends to max(starts, positions - window + 1) to positions: softmax\n"  \
    "of scale * q k, or of soft_cap * tanh(scale * q k / soft_cap); scale is 1 / sqrt(D) if not given. Sums and P\n"   \
    "are float32.\n"                                                                                                   \
    "key_cache, value_cache, in place: [B, kv_heads, S, D]; with ring=True position p is row p % S; with\n"            \
    "block_table [B, blocks] (int32; negative: no page) and cache_layout 'NHD' [pages, page, kv_heads, D] or 'HND'\n"  \
    "[pages, kv_heads, page, D]. Any strides but the last.\n"                                                          \
    "A sequence whose position is negative is skipped: zeros. Where a position or a page is outside of the cache,\n"   \
    "or starts exceeds the position, out is NaN. Neither is written to the cache.\n"                                   \
    "batch_invariant: a sequence's bits do not depend on the others. static_weights: as in rms_norm_qkv;\n"            \
    "static_rows: the same of what is in the caches already. eps, weight_offset, rounding, kernel: as in "             \
    "rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_qk_norm_rope                                                                                               \
    "qk_norm_rope($module, q, k, cos=None, sin=None, *, q_norm_weight=None, k_norm_weight=None, eps=1e-06, "           \
    "weight_offset=0.0, interleaved=False, rounding='hf', out_q=None, out_k=None, v=None, key_cache=None, "            \
    "value_cache=None, slots=None, cache_layout=None, kernel=None)\n--\n\n"                                            \
    "The norm and the rotary embedding of the heads of q and k, and the cache that k and v join: (out_q, out_k)\n\n"   \
    "q: [..., heads, D]; k: [..., kv_heads, D], such as rms_norm_qkv returns. Each head goes through rms_norm where "  \
    "there\n"                                                                                                          \
    "is a q_norm_weight or k_norm_weight [D], then through the rotary embedding where cos and sin are: rows [..., "    \
    "R]\n"                                                                                                             \
    "gathered by position, in q's dtype or float32, R even and at most D, whose leading dimensions broadcast to the\n" \
    "tokens'. Pairs are in the halves of R, or with interleaved=True neighbours; columns from R on pass through. "     \
    "out_q may\n"                                                                                                      \
    "be q, and out_k may be k (in place).\n"                                                                           \
    "With v [..., kv_heads, D], key_cache, value_cache and slots, k and v also go to the cache, in place: slots "      \
    "(int32 or\n"                                                                                                      \
    "int64, one for each token) are b * S + row in caches [B, kv_heads, S, D], and page * page_size + row with\n"      \
    "cache_layout 'NHD' [pages, page_size, kv_heads, D] or 'HND' [pages, kv_heads, page_size, D], any strides but "    \
    "the\n"                                                                                                            \
    "last. A slot that is negative or outside of the cache is skipped. No two tokens may have the same one.\n"         \
    "eps, weight_offset, rounding, kernel: as in rms_norm.\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_greedy_tokens                                                                                              \
    "greedy_tokens($module, logits, *, finished=None, ends=None, pad=None, history=None, counts=None, "                \
    "positions=None, "                                                                                                 \
    "out=None, kernel=None)\n--\n\n"                                                                                   \
    "The token with the largest logit of each row, as torch.argmax finds it, and what follows the choice, in one "     \
    "call\n\n"                                                                                                         \
    "logits: [..., vocabulary], float32, float16 or bfloat16; any strides of the leading dimensions, the last\n"       \
    "contiguous. Returns out, int64 [...]: of equal logits the first counts, and NaN is the largest of all.\n"         \
    "What else is given is brought up to date in place, with one number for each row, and read when the kernel "       \
    "runs:\n"                                                                                                          \
    "finished (bool [...]), with ends (bool [vocabulary]) and pad (int64 [] or [1]): a row that is finished gets "     \
    "pad\n"                                                                                                            \
    "in place of its token, and one whose token is in ends is finished from then on. history (int64 [..., length]),\n" \
    "with counts (int64 [...]): the token goes to history[..., counts] where there is such a place, and counts grow\n" \
    "by 1. positions (int64 [...]) grow by 1. A pad outside of the vocabulary ends nothing. Without rows nothing is\n" \
    "done. out, and what is brought up to date, must overlap nothing else. kernel: a name of "                         \
    "kernels().\n\n" DOC_TENSORS "\n" DOC_ERRORS

#define DOC_CALL_LAYER                                                                                                 \
    "__call__($self, x, *, residual=None, out=None, residual_out=None)\n--\n\n"                                        \
    "x: [..., hidden] -> (q, k, v): [..., heads, head_dim] each; with a residual (q, k, v, residual_out)."

#endif
