/* dispatch.c: which kernels exist, which can run here, which one serves a task, and which one did. */
#include "dispatch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../cpu/cpu.h"
#ifdef MV_WITH_CUDA
#include "../cuda/cuda.h"
#endif
#include "checks.h"

const char mv_too_dear[] = "another kernel is faster";

#define DECIDE(name, price)                                                                                            \
    const char *mv_decide_##name(const mv_task *task, double below, mv_decision *decision) {                           \
        const double us = (price)*1e-5 * (double)task->tokens * (double)task->hidden;                                  \
        return mv_at_price(decision, us, below) ? NULL : mv_too_dear;                                                  \
    }
DECIDE(wide, 1)
DECIDE(wide_except_zen4, mv_cpu_is_zen4() ? 3 : 1)
DECIDE(half, 2)
DECIDE(scalar, 10)

mv_status mv_bind_device(const char *op, mv_task *task, mv_error *error) {
    if (task->device.kind == MV_CPU) return MV_OK;
#ifdef MV_WITH_CUDA
    mv_gpu gpu;
    mv_error why_not;
    const mv_status status = mv_gpu_ready(task->device.index, &gpu, &why_not);
    if (status != MV_OK) return mv_fail(error, status, "%s: %.400s", op, why_not.text);
    task->compute_capability = gpu.compute_capability;
    task->sm_count = gpu.sm_count;
    task->smem_bytes = gpu.smem_bytes;
    task->l2_bytes = gpu.l2_bytes;
    task->memory_gbs = gpu.memory_gbs;
    task->programmatic_launch = gpu.programmatic_launch;
    return MV_OK;
#else
    return mv_fail(
        error, MV_DEVICE_ERROR,
        "%s: x is on cuda:%d, but this build of minivllm has no CUDA backend; rebuild it with MINIVLLM_CUDA=1, which "
        "needs nvcc",
        op, (int)task->device.index);
#endif
}

#ifdef MV_WITH_CUDA
/* NULL, or why a GPU of this compute capability cannot run the row. */
static const char *wrong_capability(const mv_row *row, int32_t device, int32_t has, mv_error *text) {
    if (has >= row->oldest && has <= row->newest) return NULL;
    snprintf(text->text, sizeof text->text, "it is for compute capability %d.%d%s, cuda:%d has %d.%d",
             (int)row->oldest / 10, (int)row->oldest % 10, row->newest == row->oldest ? "" : " and newer", (int)device,
             (int)has / 10, (int)has % 10);
    return text->text;
}
#endif

/* Can rows of this backend and ISA run at all? NULL, or why not; `text` holds the reason where it must be made. */
static const char *unusable(const mv_row *row, int32_t device, mv_error *text) {
    if (row->backend == MV_CPU) {
        if (mv_cpu_supports(row->isa)) return NULL;
        snprintf(text->text, sizeof text->text, "this CPU has no %s", row->isa);
        return text->text;
    }
#ifdef MV_WITH_CUDA
    mv_gpu gpu;
    if (mv_gpu_ready(device, &gpu, text) != MV_OK) return text->text;
    return wrong_capability(row, device, gpu.compute_capability, text);
#else
    (void)device;
    return NULL; /* such a build has no other rows */
#endif
}

static const mv_row *find_name(const mv_list *list, const char *name) {
    for (int i = 0; i < list->count; i++)
        if (strcmp(list->rows[i].name, name) == 0) return &list->rows[i];
    return NULL;
}

mv_status mv_check_kernel_name(const mv_list *list, const char *op, const char *name, mv_error *error) {
    if (!name || find_name(list, name)) return MV_OK;
    return mv_fail(error, MV_BAD_VALUE, "%s: no kernel is called '%s'; minivllm.kernels('%s') lists what exists", op,
                   name, op);
}

static const char *backend_name(mv_device_kind kind) { return kind == MV_CPU ? "the CPU" : "a GPU"; }

static mv_status find_forced(const mv_list *list, const char *op, const mv_task *task, const char *name,
                             mv_choice *choice, mv_error *error) {
    const mv_row *row = find_name(list, name);
    if (row->backend != task->device.kind)
        return mv_fail(error, MV_BAD_VALUE, "%s: kernel '%s' runs on %s, x is on %s; leave kernel= away", op, name,
                       backend_name(row->backend), backend_name(task->device.kind));
    if (row->dtype != task->dtype)
        return mv_fail(error, MV_BAD_VALUE, "%s: kernel '%s' takes %s, x is %s; leave kernel= away", op, name,
                       mv_dtype_name(row->dtype), mv_dtype_name(task->dtype));
    mv_error text;
    *choice = (mv_choice){.row = row, .forced = true};
    const char *reason = unusable(row, task->device.index, &text);
    if (!reason && task->batch_invariant && !row->batch_invariant) reason = "it is not batch invariant";
    if (!reason) reason = row->decide(task, MV_ANY_PRICE, &choice->decision);
    if (reason) return mv_fail(error, MV_BAD_VALUE, "%s: kernel '%s' cannot serve this call: %s", op, name, reason);
    return MV_OK;
}

/* A race finds the same rows twice. Of a GPU the compute capability decides besides. */
static uint64_t usable_rows(const mv_list *list, mv_device_kind backend, mv_dtype dtype) {
    uint64_t *known = &list->usable->bits[backend][dtype], found = __atomic_load_n(known, __ATOMIC_RELAXED);
    if (found) return found;
    for (int i = 0; i < list->count; i++) {
        const mv_row *row = &list->rows[i];
        if (row->backend == backend && row->dtype == dtype && (backend != MV_CPU || mv_cpu_supports(row->isa)))
            found |= (uint64_t)1 << i;
    }
    __atomic_store_n(known, found, __ATOMIC_RELAXED);
    return found;
}

static bool can_serve(const mv_row *row, const mv_task *task) {
    return (row->batch_invariant || !task->batch_invariant) && task->compute_capability >= row->oldest &&
           task->compute_capability <= row->newest;
}

mv_status mv_choose(const mv_list *list, const char *op, const mv_task *task, int64_t tokens, const char *forced,
                    mv_choice *choice, mv_error *error) {
    if (forced) return find_forced(list, op, task, forced, choice, error);
    if (task->batch_invariant) tokens = 64; /* whatever their number, the choice is the same */
    mv_task whole;
    const mv_task *priced = task;
    if (tokens != task->tokens) {
        whole = *task;
        whole.tokens = tokens;
        priced = &whole;
    }
    *choice = (mv_choice){.row = NULL, .decision.us = HUGE_VAL};
    mv_decision decision;
    for (uint64_t left = usable_rows(list, task->device.kind, task->dtype); left; left &= left - 1) {
        const mv_row *row = &list->rows[__builtin_ctzll(left)];
        if (!can_serve(row, task)) continue;
        if (row->decide(priced, choice->decision.us, &decision)) continue;
        const double us = decision.us;
        if (priced != task && row->decide(task, MV_ANY_PRICE, &decision)) continue;
        decision.us = us;
        choice->row = row;
        choice->decision = decision;
    }
    if (choice->row) return MV_OK;
    return mv_fail(error, MV_DEVICE_ERROR, "%s: no kernel fits this call; minivllm.kernels('%s') lists what exists", op,
                   op);
}

/* ---- what ran ------------------------------------------------------------------------------------------------- */

static _Thread_local struct {
    const char *op;
    const mv_row *row;
    bool forced;
    double us;
    int64_t tokens, hidden, outputs;
} last;

static bool logging(void) {
    static int wanted = -1; /* MINIVLLM_LOG as it was at the first call; a race reads the same environment twice */
    int now = __atomic_load_n(&wanted, __ATOMIC_RELAXED);
    if (now < 0) {
        const char *value = getenv("MINIVLLM_LOG");
        now = value && *value && strcmp(value, "0") != 0;
        __atomic_store_n(&wanted, now, __ATOMIC_RELAXED);
    }
    return now;
}

bool mv_last_kernel(mv_ran *ran) {
    if (!last.row) return false;
    ran->op = last.op;
    ran->name = last.row->name;
    int used =
        snprintf(ran->why, sizeof ran->why, "tokens=%lld hidden=%lld", (long long)last.tokens, (long long)last.hidden);
    if (last.outputs)
        used += snprintf(ran->why + used, sizeof ran->why - (size_t)used, " outputs=%lld", (long long)last.outputs);
    used += snprintf(ran->why + used, sizeof ran->why - (size_t)used, ": %s",
                     last.forced ? "forced by name" : "cheapest that fits");
    if (last.us < HUGE_VAL) /* a row that is never chosen has no estimate */
        snprintf(ran->why + used, sizeof ran->why - (size_t)used, ", estimated %.2f us", last.us);
    return true;
}

mv_status mv_run_row(const char *op, const mv_choice *choice, const mv_task *task, mv_error *error) {
    const mv_status status = choice->row->run(task, &choice->decision, error);
    if (status != MV_OK) return status;
    last.op = op;
    last.row = choice->row;
    last.forced = choice->forced;
    last.us = choice->decision.us;
    last.tokens = task->tokens;
    last.hidden = task->hidden;
    last.outputs = task->linear.outputs;
    if (logging()) {
        mv_ran ran;
        mv_last_kernel(&ran);
        fprintf(stderr, "minivllm: %s ran %s (%s)\n", ran.op, ran.name, ran.why);
    }
    return MV_OK;
}

/* ---- what exists ---------------------------------------------------------------------------------------------- */

static int32_t current_gpu(void) {
#ifdef MV_WITH_CUDA
    return mv_cuda_current_device();
#else
    return 0;
#endif
}

#define LIST_OF(name, args) {#name, &mv_##name##_list},

bool mv_kernel_at(int index, mv_kernel_info *info) {
    static const struct {
        const char *op;
        const mv_list *list;
    } ops[] = {MV_OPS(LIST_OF)};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; index -= ops[i].list->count, i++) {
        if (index < 0) return false;
        if (index >= ops[i].list->count) continue;
        const mv_row *row = &ops[i].list->rows[index];
        mv_error text;
        const char *reason = unusable(row, current_gpu(), &text);
        info->op = ops[i].op;
        info->name = row->name;
        info->isa = row->isa;
        info->dtype = row->dtype;
        info->usable = reason == NULL;
        snprintf(info->why_not, sizeof info->why_not, "%.190s", reason ? reason : "");
        return true;
    }
    return false;
}
