/* run.c: see run.h. */
#include "run.h"

#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/buffers.h"
#include "../convert/results.h"

bool run_plan(call *c, mv_plan *plan, const mv_view *x, const mv_view *out, const mv_view *residual_out) {
    mv_memory memory = {.out = out->data, .residual_out = residual_out->data};
    mv_error error;
    mv_status status;
    if (!provide_workspace(c, x, plan->workspace_bytes, &memory.workspace)) return false;
    end_step(c, STEP_ALLOCATE);
    if (plan->is_long) {
        Py_BEGIN_ALLOW_THREADS status = mv_run(plan, &memory, &error);
        Py_END_ALLOW_THREADS
    } else {
        status = mv_run(plan, &memory, &error);
    }
    end_step(c, STEP_RUN);
    return check_status(status, &error) && settle(c);
}
