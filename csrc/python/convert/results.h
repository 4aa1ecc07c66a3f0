/* results.h: outputs and workspace, allocated by the framework of x. */
#ifndef MV_RESULTS_H
#define MV_RESULTS_H

#include "../base/call.h"

/* Where the output `slot` is absent, makes it: of the shape that it is like, but with `last` sizes in place of the last
 * one. */
bool provide(call *c, const mv_output *output, mv_view *slot, int last_count, const int64_t *last);
/* Workspace for the op about to run: at least `bytes` (none: 0), 256-byte aligned, until end_call(). */
bool provide_workspace(call *c, const mv_view *x, size_t bytes, void **workspace);
/* What the user gets for an output: the very object that was given, or the new one. A new reference. */
PyObject *returned(call *c, const mv_view *slot, const mv_view *x);
/* Two of them, as a tuple. */
PyObject *returned_pair(call *c, const mv_view *first, const mv_view *second, const mv_view *x);
/* The op has written to a tensor that it was given and gives nothing back for. */
bool note_written(call *c, const mv_view *slot);
/* Before the op runs: will returned_parts() be able to cut this output, where it is given? */
bool check_splittable(call *c, const mv_view *slot);
/* (q, k, v) of the packed output. A new reference. */
PyObject *returned_parts(call *c, const mv_view *slot, const mv_view *x, const head_counts *counts);

#endif
