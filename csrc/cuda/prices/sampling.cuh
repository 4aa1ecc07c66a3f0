/* sampling.cuh: host: what the rows of greedy_tokens take on a GPU, in microseconds. */
#pragma once

#include "cuda/prices/memory.cuh"

namespace prices {

/* A row goes to so many SMs, of which one takes 0.1 MB in a microsecond; without clusters half as much of float32. The
 * kernel with clusters is the slower one where there are about as many rows as SMs, and of many rows of float32.
 * Measured on an H100 (benchmarks/results/log/regret_3_h100.json). */
static inline double greedy_us(const mv_task *t, double sms_of_row, bool clusters) {
    const double rows = static_cast<double>(t->tokens), sms = static_cast<double>(t->sm_count);
    const double bytes = rows * static_cast<double>(t->hidden) * static_cast<double>(mv_dtype_bytes(t->dtype));
    const bool wide = t->dtype == MV_F32;
    const double busy = rows * sms_of_row < sms ? rows * sms_of_row : sms, rate = wide && !clusters ? 5e4 : 1e5;
    const bool slower = clusters && (wide ? 2.5 * rows > sms : 2 * rows > sms && rows <= sms);
    return (slower ? 1.25 : 1) * (3 + larger(bytes / (rate * busy), bytes / memory_rate(t)));
}

} // namespace prices
