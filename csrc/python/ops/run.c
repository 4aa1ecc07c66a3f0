/* run.c: see run.h. */
#include "run.h"

#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/buffers.h"
#include "../convert/results.h"

bool run_plan(call *c, mv_plan *plan, const mv_view *x, mv_view *const *slots, int last_count, const int64_t *last) {
    mv_memory memory = {0};
    mv_error error;
    mv_status status;
    for (int i = 0; i < plan->outputs; i++) {
        const mv_output *output = &plan->output[i];
        const bool several = i == 0 && last_count > 0;
        if (!provide(c, output, slots[i], several ? last_count : output->columns > 0,
                     several ? last : &output->columns))
            return false;
        memory.output[i] = slots[i]->data;
    }
    if (!provide_workspace(c, x, plan->workspace_bytes, &memory.workspace)) return false;
    end_step(c, STEP_ALLOCATE);
    if (plan->is_long) {
        const framework *const of = c->tensors[0].kind.framework;
        mv_use_team(of->team ? of->team() : NULL);
        Py_BEGIN_ALLOW_THREADS status = mv_run(plan, &memory, &error);
        Py_END_ALLOW_THREADS mv_use_team(NULL);
    } else {
        status = mv_run(plan, &memory, &error);
    }
    end_step(c, STEP_RUN);
    return check_status(status, &error) && settle(c);
}
