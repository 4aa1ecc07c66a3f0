/* sampling.cuh: host: what the rows of greedy_tokens take on a GPU, in microseconds. */
#pragma once

#include "cuda/prices/memory.cuh"

namespace prices {

/* A row goes to so many SMs, of which one takes 0.1 MB in a microsecond. On an H100 that is near the times of up to 16
 * rows. */
static inline double greedy_us(const mv_task *t, double sms_of_row) {
    const double bytes =
        static_cast<double>(t->tokens) * static_cast<double>(t->hidden) * static_cast<double>(mv_dtype_bytes(t->dtype));
    const double wanted = static_cast<double>(t->tokens) * sms_of_row, sms = static_cast<double>(t->sm_count);
    return 3 + larger(bytes / (1e5 * (wanted < sms ? wanted : sms)), bytes / memory_rate(t));
}

} // namespace prices
