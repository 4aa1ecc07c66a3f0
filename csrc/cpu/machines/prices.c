/* prices.c: what the kernels of the CPU for linear layers and decode_attention take, in microseconds, by the rates of
 * the machine. */
#include "cpu/cpu.h"
#include "cpu/machines/rates.h"
#include "cpu/workspace.h"

#include <stdatomic.h>

/* Asked for every row that a call prices; two threads find the same. */
static const mv_machine *machine(void) {
    static _Atomic(const mv_machine *) known;
    const mv_machine *found = atomic_load_explicit(&known, memory_order_relaxed);
    if (!found) {
        found = mv_cpu_is_zen4() ? &mv_epyc9004 : &mv_epyc9005;
        atomic_store_explicit(&known, found, memory_order_relaxed);
    }
    return found;
}

static double weights_of(const mv_task *t) { return (double)t->linear.outputs * (double)t->hidden; }

/* The weights are read as they lie, for a few tokens at a time. */
static double few_us(const mv_task *t, const mv_rates *rates) {
    return weights_of(t) *
           ((double)mv_dtype_bytes(t->linear.weight_dtype) / rates->bytes + 2 * (double)t->tokens / rates->few_flops);
}

/* A lane of a vector is a token, so `at_once` tokens, those of one vector or of two with AVX2, take as long as one. */
static double many_us(const mv_task *t, const mv_rates *rates, int at_once) {
    const double weights = t->linear.weight_dtype == MV_F32 ? rates->read : rates->converted;
    const double tokens = (double)((t->tokens + at_once - 1) / at_once * at_once);
    return weights_of(t) * (1 / weights + 2 * tokens / rates->many_flops);
}

/* decode_attention, where every sequence has all the keys that it may have. */
static double attention_us(const mv_task *t, const mv_rates *rates) {
    const mv_attention *a = &t->attention;
    const double products = (double)(a->rows < a->window ? a->rows : a->window) * (double)t->tokens * (double)t->hidden;
    const double bytes = 2 * products * (double)a->kv_heads / (double)a->heads * (double)mv_dtype_bytes(t->dtype);
    return bytes / rates->bytes + 4 * products / rates->few_flops;
}

#define DECIDE(kind, isa, us, needs)                                                                                   \
    const char *mv_##kind##_##isa##_decide(const mv_task *t, double below, mv_decision *decision) {                    \
        if (!mv_at_price(decision, us, below)) return mv_too_dear;                                                     \
        decision->workspace = needs;                                                                                   \
        return NULL;                                                                                                   \
    }
#define DECIDE_LINEAR(isa, at_once)                                                                                    \
    DECIDE(decode, isa, few_us(t, &machine()->isa), mv_decode_workspace(t))                                            \
    DECIDE(prefill, isa, many_us(t, &machine()->isa, at_once), mv_prefill_workspace(t))
DECIDE_LINEAR(avx512bf16, 16)
DECIDE_LINEAR(avx512, 16)
DECIDE_LINEAR(avx2, 16)
DECIDE_LINEAR(neon, 4)
DECIDE_LINEAR(portable, 4)

#define DECIDE_ATTENTION(isa) DECIDE(attention, isa, attention_us(t, &machine()->isa), mv_attention_workspace(t, NULL))
DECIDE_ATTENTION(avx512)
DECIDE_ATTENTION(avx2)
DECIDE_ATTENTION(neon)
DECIDE_ATTENTION(portable)
