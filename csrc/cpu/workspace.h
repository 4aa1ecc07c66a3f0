/* workspace.h: bytes of task->workspace that any decode or prefill kernel of the CPU needs for this task: enough for
 * every instruction set and for any number of threads. The norm kernels need none. */
#ifndef MV_CPU_WORKSPACE_H
#define MV_CPU_WORKSPACE_H

#include "../kernel.h"

size_t mv_decode_workspace(const mv_task *task);
size_t mv_prefill_workspace(const mv_task *task);

#endif
