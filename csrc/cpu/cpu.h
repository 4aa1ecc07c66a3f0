/* cpu.h: what the ops need to know about the CPU backend.
 *
 * The kernels themselves are declared by the lists in csrc/ops. A kernel named *_<isa> may be called only where
 * mv_cpu_supports("<isa>") is true.
 */
#ifndef MV_CPU_H
#define MV_CPU_H

#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* True when this CPU and its operating system can run the kernels of that instruction set: "portable", "avx2",
 * "avx512", "avx512bf16", "amx", "neon". False for any other name. */
bool mv_cpu_supports(const char *isa);

/* True on AMD's Zen 4, whose units are 256 bits wide: an instruction of AVX-512 passes through them twice. */
bool mv_cpu_is_zen4(void);

/* What the projection kernels of an instruction set make of a task: all can serve it. */
mv_decide mv_decode_avx512bf16_decide, mv_decode_avx512_decide, mv_decode_avx2_decide, mv_decode_neon_decide,
    mv_decode_portable_decide;
mv_decide mv_prefill_amx_decide, mv_prefill_avx512bf16_decide, mv_prefill_avx512_decide, mv_prefill_avx2_decide,
    mv_prefill_neon_decide, mv_prefill_portable_decide;

/* What the kernels of decode_attention make of a task: all can serve it. */
mv_decide mv_attention_avx512_decide, mv_attention_avx2_decide, mv_attention_neon_decide, mv_attention_portable_decide;

/* True when a call on that much computes for more than some tens of microseconds. outputs: of the projection, or 0. */
bool mv_is_long_on_cpu(int64_t tokens, int64_t hidden, int64_t outputs);

#ifdef __cplusplus
}
#endif
#endif
