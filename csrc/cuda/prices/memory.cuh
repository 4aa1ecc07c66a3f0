/* memory.cuh: host: how fast a GPU reads, and how two things that happen at the same time add up: what the prices of
 * all rows begin with. A price is in microseconds. The figures in this folder were measured on an H100, some on an H200
 * too, whose SMs are as many and as fast. Another GPU gets the speed of its memory and the number of its SMs. */
#pragma once

#include "kernel.h"

namespace prices {

static inline double larger(double a, double b) { return a > b ? a : b; }

/* The time of two things that go on together and get in each other's way: that of the longer one alone where the other
 * is short, a quarter more where both take as long. */
static inline double together(double a, double b) {
    const double most = larger(a, b), least = a + b - most;
    return most > 0 ? most + 0.26 * least * least * least / (most * most) : 0;
}

/* Bytes per microsecond that memory delivers: 93 % of what its clock and width say, as both GPUs reach. */
static inline double memory_rate(const mv_task *t) { return 0.93e3 * (t->memory_gbs > 0 ? t->memory_gbs : 3352); }

} // namespace prices
