/* cpu.h: what the ops need to know about the CPU backend.
 *
 * The kernels themselves are declared by the lists in csrc/ops. A kernel named *_<isa> may be called only where
 * mv_cpu_supports("<isa>") is true.
 */
#ifndef MV_CPU_H
#define MV_CPU_H

#include "../kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* True when this CPU and its operating system can run the kernels of that instruction set: "portable", "avx2",
 * "avx512", "avx512bf16". False for any other name. */
bool mv_cpu_supports(const char *isa);

/* Bytes of task->workspace that any decode or prefill kernel needs for this task; enough for every instruction set and
 * for any number of threads. The norm kernels need none. */
size_t mv_rms_norm_qkv_decode_cpu_workspace(const mv_task *task);
size_t mv_rms_norm_qkv_prefill_cpu_workspace(const mv_task *task);

/* True when a call on that much computes for more than some tens of microseconds. outputs: of the projection, or 0. */
bool mv_is_long_on_cpu(int64_t tokens, int64_t hidden, int64_t outputs);

#ifdef __cplusplus
}
#endif
#endif
