/* heads.c: see heads.h. */
#include "heads.h"

mv_status mv_check_q(mv_named q, mv_error *error) {
    MV_TRY(mv_check_floating(q, error));
    return mv_check_place(q, q, error);
}

mv_status mv_check_kind(mv_named t, mv_named q, bool or_float32, mv_error *error) {
    const mv_dtype dtype = q.view->dtype;
    MV_REQUIRE(t.view->dtype == dtype || (or_float32 && t.view->dtype == MV_F32), MV_BAD_TYPE,
               "%s: %s is %s, expected %s (the dtype of %s)%s", t.op, t.name, mv_dtype_name(t.view->dtype),
               mv_dtype_name(dtype), q.name, or_float32 && dtype != MV_F32 ? " or float32" : "");
    return mv_check_place(t, q, error);
}

mv_status mv_check_cache(mv_named t, mv_named q, const int64_t shape[4], const char *meaning, mv_error *error) {
    const mv_view *view = t.view, like = {.shape = shape, .ndim = 4};
    MV_TRY(mv_check_kind(t, q, false, error));
    bool fits = view->ndim == 4;
    for (int d = 0; fits && d < 4; d++) fits = view->shape[d] == shape[d];
    MV_REQUIRE(fits, MV_BAD_VALUE, "%s: %s has shape %s, expected %s (%s)", t.op, t.name, mv_shape_text(view).text,
               mv_shape_text(&like).text, meaning);
    MV_TRY(mv_check_last_contiguous(t, error));
    return mv_check_writable(t, error);
}

mv_status mv_check_head_norm(mv_named t, mv_named q, int64_t head_dim, mv_error *error) {
    if (!mv_present(t.view)) return MV_OK;
    MV_TRY(mv_check_kind(t, q, true, error));
    return mv_check_vector(t, q.view, head_dim, "= head_dim", error);
}

mv_status mv_check_both_rotary(mv_named cosines, mv_named sines, mv_error *error) {
    const bool has_cosines = mv_present(cosines.view);
    MV_REQUIRE(has_cosines == mv_present(sines.view), MV_BAD_VALUE, "%s: %s was given without %s", cosines.op,
               has_cosines ? cosines.name : sines.name, has_cosines ? sines.name : cosines.name);
    return MV_OK;
}

mv_status mv_check_rotary_pair(mv_named cosines, mv_named sines, mv_error *error) {
    const mv_view *a = cosines.view, *b = sines.view;
    const int64_t columns = a->shape[a->ndim - 1], others = b->shape[b->ndim - 1];
    MV_REQUIRE(columns == others && a->dtype == b->dtype, MV_BAD_VALUE,
               "%s: %s has rows of %lld in %s, expected %lld in %s (as %s)", sines.op, sines.name, (long long)others,
               mv_dtype_name(b->dtype), (long long)columns, mv_dtype_name(a->dtype), cosines.name);
    return MV_OK;
}
