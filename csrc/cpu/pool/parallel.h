/* parallel.h: the only place that knows threads. */
#ifndef MV_PARALLEL_H
#define MV_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* Calls fn(context, begin, end) until every index of [0, count) has been in exactly one range, and returns when all
 * calls have. Each range but the last is a multiple of `grain` long; grain >= 1 is the least work worth handing to
 * another thread, and a count of one grain or less never leaves the calling thread. Ranges run on several threads in
 * no order, so a result must not depend on how the indices were split. May be called from any thread, from several at
 * once and from inside fn. */
void mv_parallel_for(int64_t count, int64_t grain, void (*fn)(void *context, int64_t begin, int64_t end),
                     void *context);

/* At least so many bytes for the calling thread, 64-byte aligned, or NULL; valid until it asks again or ends. A thread
 * keeps the memory: what a job needs at every call is not given back and asked for each time. */
void *mv_thread_scratch(size_t bytes);

#endif
