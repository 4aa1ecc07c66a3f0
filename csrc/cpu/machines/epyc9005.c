/* epyc9005.c: what the projection kernels of the CPU take, in microseconds of two cores of an EPYC 9005: the weights at
 * the speed at which a kernel streams them, and the products at its rate. What counts is where the curves cross:
 * measured between 8 and 16 tokens in float32, between 16 and 32 with AVX512-BF16.
 *
 * NEON was measured nowhere: it is given the memory of AVX2, whose vectors are twice as long, and half its products. */
#include "cpu/cpu.h"
#include "cpu/workspace.h"

static double price(const mv_task *t, double bytes_per_us, double flops_per_us) {
    const double products = (double)t->linear.outputs * (double)t->hidden;
    return products * (double)mv_dtype_bytes(t->linear.weight_dtype) / bytes_per_us +
           2 * (double)t->tokens * products / flops_per_us;
}

#define DECIDE(kind, isa, bytes_per_us, flops_per_us)                                                                  \
    const char *mv_##kind##_##isa##_decide(const mv_task *task, double below, mv_decision *decision) {                 \
        if (!mv_at_price(decision, price(task, bytes_per_us, flops_per_us), below)) return mv_too_dear;                \
        decision->workspace = mv_##kind##_workspace(task);                                                             \
        return NULL;                                                                                                   \
    }

/* Of decode_attention, where every sequence has all the keys that it may have. */
#define DECIDE_ATTENTION(isa, bytes_per_us, flops_per_us)                                                              \
    const char *mv_attention_##isa##_decide(const mv_task *t, double below, mv_decision *decision) {                   \
        const mv_attention *a = &t->attention;                                                                         \
        const double products =                                                                                        \
            (double)(a->rows < a->window ? a->rows : a->window) * (double)t->tokens * (double)t->hidden;               \
        const double bytes = 2 * products * (double)a->kv_heads / (double)a->heads * (double)mv_dtype_bytes(t->dtype); \
        if (!mv_at_price(decision, bytes / bytes_per_us + 4 * products / flops_per_us, below)) return mv_too_dear;     \
        decision->workspace = mv_attention_workspace(t, NULL);                                                         \
        return NULL;                                                                                                   \
    }
DECIDE_ATTENTION(avx512, 3.8e4, 2.4e5)
DECIDE_ATTENTION(avx2, 3.5e4, 1.2e5)
DECIDE_ATTENTION(neon, 3.5e4, 6e4)
DECIDE_ATTENTION(portable, 3e4, 1e4)

DECIDE(decode, avx512bf16, 4e4, 4.5e5)
DECIDE(decode, avx512, 3.8e4, 2.4e5)
DECIDE(decode, avx2, 3.5e4, 1.2e5)
DECIDE(decode, neon, 3.5e4, 6e4)
DECIDE(decode, portable, 3e4, 1e4)
DECIDE(prefill, avx512bf16, 1.7e4, 1e6)
DECIDE(prefill, avx512, 2.4e4, 5e5)
DECIDE(prefill, avx2, 2e4, 2.5e5)
DECIDE(prefill, neon, 2e4, 1.25e5)
DECIDE(prefill, portable, 1.5e4, 2e4)
