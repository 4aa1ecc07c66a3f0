/* checks.h: what the ops require of their tensors, each rule in one place. */
#ifndef MV_CHECKS_H
#define MV_CHECKS_H

#include "../kernel.h"

#define MV_MAX_DIMS 64

/* Leaves the function with a refusal. */
#define MV_TRY(call)                                                                                                   \
    do {                                                                                                               \
        const mv_status try_status = (call);                                                                           \
        if (try_status != MV_OK) return try_status;                                                                    \
    } while (0)
#define MV_REQUIRE(condition, status, ...)                                                                             \
    do {                                                                                                               \
        if (!(condition)) return mv_fail(error, status, __VA_ARGS__);                                                  \
    } while (0)

/* A tensor and the name that its user knows it by. */
typedef struct {
    const char *op, *name;
    const mv_view *view;
} mv_named;

static inline bool mv_present(const mv_view *view) { return view->ndim > 0 || view->data != NULL; }

const char *mv_dtype_name(mv_dtype dtype);
bool mv_is_empty(const mv_view *view);
int64_t mv_stride(const mv_view *view, int dim); /* also for NULL strides; 0 where the size is 1 or less */

typedef struct {
    char text[128];
} mv_text;
mv_text mv_shape_text(const mv_view *view); /* "[2, 1024]" */
mv_text mv_device_text(mv_device device);   /* "cuda:0"    */

mv_status mv_check_floating(mv_named t, mv_error *error); /* its dtype is no integer's */
/* x: at least one dimension, a hidden size of at least 1, contiguous along it. */
mv_status mv_check_x(mv_named x, mv_error *error);
/* A tensor of x's shape, dtype and device, contiguous along the last dimension. */
mv_status mv_check_like_x(mv_named tensor, const mv_view *x, mv_error *error);
/* A tensor of x's dtype and device, of shape [*x.shape[:-1], columns], contiguous along the last dimension. */
mv_status mv_check_rows(mv_named tensor, const mv_view *x, int64_t columns, mv_error *error);
/* An output of that shape, writable, whose elements do not overlap each other. */
mv_status mv_check_output(mv_named out, const mv_view *x, int64_t columns, mv_error *error);
/* The same of an output that is still to be made: is there room for it? */
mv_status mv_check_fresh_output(mv_named out, const mv_view *x, int64_t columns, mv_error *error);
/* A vector of `size` elements on x's device, in x's dtype or float32. `meaning` says where the size comes from. */
mv_status mv_check_vector(mv_named vector, const mv_view *x, int64_t size, const char *meaning, mv_error *error);
/* eps and weight_offset: finite, and eps >= 0. */
mv_status mv_check_numbers(const char *op, double eps, double weight_offset, mv_rounding rounding, mv_error *error);
mv_status mv_check_rounding(const char *op, mv_rounding rounding, mv_error *error);
/* Dtype and device of any weight or bias: x's dtype or float32, on x's device. */
mv_status mv_check_parameter(mv_named tensor, const mv_view *x, mv_error *error);

/* On the device of the first tensor, of not too many dimensions, and addressable. */
mv_status mv_check_place(mv_named tensor, mv_named first, mv_error *error);
mv_status mv_check_last_contiguous(mv_named tensor, mv_error *error);
/* Not read-only, and without elements that overlap each other. */
mv_status mv_check_writable(mv_named tensor, mv_error *error);

/* Do two tensors, both addressable, share a byte? Exact for every layout that nests; a layout too tangled to decide
 * counts as sharing. */
bool mv_overlap(const mv_view *a, const mv_view *b);
/* Are they the same elements at the same places: pointer, shape and strides? */
bool mv_same_elements(const mv_view *a, const mv_view *b);
mv_status mv_refuse_overlap(mv_named out, mv_named other, bool allow_same, mv_error *error);
/* Refuses `out` where it overlaps `other`; with `allow_same`, being exactly `other` is fine. Absent tensors pass. */
static inline mv_status mv_check_apart(mv_named out, mv_named other, bool allow_same, mv_error *error) {
    if (!mv_present(out.view) || !mv_present(other.view) || !mv_overlap(out.view, other.view)) return MV_OK;
    return mv_refuse_overlap(out, other, allow_same, error);
}

#endif
