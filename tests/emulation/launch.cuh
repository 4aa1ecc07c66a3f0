/* launch.cuh: a launch on the CPU. */
#pragma once

#include "kernel.h"

struct Grid {
    unsigned blocks;
    unsigned threads;
    size_t smem_bytes;
    unsigned cluster;
};

template <auto kernel, typename... Args>
static mv_status launch(const mv_task *, Grid grid, mv_error *error, Args... args) {
    const unsigned ctas = grid.cluster > 1 ? grid.cluster : 1;
    if (grid.smem_bytes > cpu::kSharedBytes || grid.blocks % ctas != 0)
        return mv_fail(error, MV_DEVICE_ERROR, "no GPU takes this launch");
    cpu::run(grid.blocks, grid.threads, ctas, grid.smem_bytes, [=] { kernel(args...); });
    return MV_OK;
}
