/* heads.h: what ops on attention heads require of their tensors: caches, norm weights, rows of cos and sin. */
#ifndef MV_HEADS_H
#define MV_HEADS_H

#include "checks.h"

enum { MV_MOST_HEAD_COLUMNS = 1024 };

/* q: of a dtype that ops compute in. */
mv_status mv_check_q(mv_named q, mv_error *error);
/* Of q's dtype, or with or_float32 that, on q's device. */
mv_status mv_check_kind(mv_named tensor, mv_named q, bool or_float32, mv_error *error);
/* A cache of exactly that shape, which `meaning` explains, to write to. */
mv_status mv_check_cache(mv_named cache, mv_named q, const int64_t shape[4], const char *meaning, mv_error *error);
/* The norm weight of a head, or none. */
mv_status mv_check_head_norm(mv_named weight, mv_named q, int64_t head_dim, mv_error *error);
/* cos and sin: both or none. */
mv_status mv_check_both_rotary(mv_named cosines, mv_named sines, mv_error *error);
/* Rows that are right each, of the same size and dtype. */
mv_status mv_check_rotary_pair(mv_named cosines, mv_named sines, mv_error *error);

static inline mv_head_norm mv_head_norm_of(const mv_view *weight, double eps, double weight_offset) {
    return (mv_head_norm){weight->data, weight->dtype, (float)eps, (float)weight_offset};
}

/* Where a cache has its rows and its heads, and what its dimensions are. */
static inline int mv_cache_row_dim(mv_cache_layout layout) { return layout == MV_CACHE_NHD ? 1 : 2; }
static inline int mv_cache_head_dim(mv_cache_layout layout) { return layout == MV_CACHE_NHD ? 2 : 1; }
static inline const char *mv_cache_meaning(mv_cache_layout layout) {
    return layout == MV_CACHE_NHD   ? "pages, rows, kv_heads, head_dim"
           : layout == MV_CACHE_HND ? "pages, kv_heads, rows, head_dim"
                                    : "sequences, kv_heads, rows, head_dim";
}
static inline mv_cache mv_cache_of(const mv_view *view, mv_cache_layout layout) {
    return (mv_cache){view->data, mv_stride(view, 0), mv_stride(view, mv_cache_row_dim(layout)),
                      mv_stride(view, mv_cache_head_dim(layout))};
}

#endif
