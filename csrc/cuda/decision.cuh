/* decision.cuh: host: what a row keeps of its decision for its launch. */
#pragma once

#include <string.h>

#include "kernel.h"

/* How a row cuts a task: kept when it decides, read by its launch. */
template <typename Cut> void keep_cut(mv_decision *decision, const Cut &cut) {
    static_assert(sizeof(Cut) <= sizeof decision->cut);
    memcpy(decision->cut, &cut, sizeof cut);
}
template <typename Cut> Cut cut_of(const mv_decision *decision) {
    Cut cut;
    memcpy(&cut, decision->cut, sizeof cut);
    return cut;
}
