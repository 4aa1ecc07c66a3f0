/* checks.c: see checks.h. Every message says what was got, what was expected, and where it helps, the fix. */
#include "checks.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

mv_status mv_fail(mv_error *error, mv_status status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error->text, sizeof error->text, format, values);
    va_end(values);
    return status;
}

const char *mv_dtype_name(mv_dtype dtype) {
    static const char *const names[] = {"float32", "float16", "bfloat16", "int32", "int64", "bool"};
    return names[dtype];
}

bool mv_is_empty(const mv_view *view) {
    for (int d = 0; d < view->ndim; d++)
        if (view->shape[d] == 0) return true;
    return false;
}

int64_t mv_stride(const mv_view *view, int dim) {
    if (view->shape[dim] <= 1) return 0;
    if (view->strides) return view->strides[dim];
    uint64_t stride = 1; /* of a view that is not addressable, which is refused later, it may wrap */
    for (int d = view->ndim - 1; d > dim; d--) stride *= (uint64_t)view->shape[d];
    return (int64_t)stride;
}

static int64_t least(uintptr_t a, int64_t b) { return a < (uintptr_t)b ? (int64_t)a : b; }

/* With it checked, sums and products of a few of a view's numbers do not overflow. */
bool mv_is_addressable(const mv_view *view) {
    static const int64_t most = (int64_t)1 << 60;
    const int64_t width = (int64_t)mv_dtype_bytes(view->dtype);
    const uintptr_t data = (uintptr_t)view->data;
    int64_t below = least(data, most), above = least(UINTPTR_MAX - data, most) - (width - 1); /* bytes left to reach */
    int64_t count = 1, span;
    for (int d = view->ndim - 1; d >= 0; d--) {
        const int64_t size = view->shape[d], stride = view->strides ? view->strides[d] : count;
        if (size <= 1) continue;
        if (__builtin_mul_overflow(count, size, &count) || count > most ||
            __builtin_mul_overflow((size - 1) * width, stride, &span) || span > above || span < -below)
            return mv_is_empty(view);
        if (span > 0)
            above -= span;
        else
            below += span;
    }
    return above >= 0 || mv_is_empty(view);
}

/* Of three dimensions at most, with no size and no stride past 2^19: then it is addressable, and nearly every tensor is
 * so. Strides that are NULL are products of the sizes. */
enum { SMALL_DIMS = 3, SMALL = 1 << 19 };
static bool is_small(const mv_view *view) {
    if (view->ndim > SMALL_DIMS || (uintptr_t)view->data > UINTPTR_MAX / 2) return false;
    const int64_t *strides = view->strides ? view->strides : view->shape;
    int64_t bits = 0;
    for (int d = 0; d < view->ndim; d++) bits |= view->shape[d] | strides[d];
    return (uint64_t)bits < SMALL;
}

mv_text mv_shape_text(const mv_view *view) {
    mv_text out = {"["};
    size_t used = 1;
    for (int d = 0; d < view->ndim && used < sizeof out.text - 28; d++)
        used +=
            (size_t)snprintf(out.text + used, sizeof out.text - used, d ? ", %lld" : "%lld", (long long)view->shape[d]);
    snprintf(out.text + used, sizeof out.text - used, "]");
    return out;
}

mv_text mv_device_text(mv_device device) {
    mv_text out = {"cpu"};
    if (device.kind == MV_CUDA) snprintf(out.text, sizeof out.text, "cuda:%d", (int)device.index);
    return out;
}

static bool same_device(mv_device a, mv_device b) { return a.kind == b.kind && a.index == b.index; }

static mv_status check_device_of(mv_named t, mv_named first, mv_error *error) {
    MV_REQUIRE(same_device(t.view->device, first.view->device), MV_BAD_VALUE,
               "%s: %s is on %s, expected %s (where %s is)", t.op, t.name, mv_device_text(t.view->device).text,
               mv_device_text(first.view->device).text, first.name);
    return MV_OK;
}

static mv_status check_device(mv_named t, const mv_view *x, mv_error *error) {
    return check_device_of(t, (mv_named){t.op, "x", x}, error);
}

static mv_status check_dims(mv_named t, mv_error *error) {
    MV_REQUIRE(t.view->ndim <= MV_MAX_DIMS, MV_BAD_VALUE, "%s: %s has %d dimensions, expected at most %d", t.op, t.name,
               (int)t.view->ndim, MV_MAX_DIMS);
    return MV_OK;
}

static mv_status check_extent(mv_named t, mv_error *error) {
    MV_REQUIRE(is_small(t.view) || mv_is_addressable(t.view), MV_BAD_VALUE,
               "%s: %s has a shape, %s, and strides that reach past all memory (2^60 bytes or elements)", t.op, t.name,
               mv_shape_text(t.view).text);
    return MV_OK;
}

mv_status mv_check_last_contiguous(mv_named t, mv_error *error) {
    const int last = t.view->ndim - 1;
    MV_REQUIRE(t.view->shape[last] <= 1 || mv_stride(t.view, last) == 1, MV_BAD_VALUE,
               "%s: %s must be contiguous in its last dimension, got stride %lld; pass a contiguous copy", t.op, t.name,
               (long long)mv_stride(t.view, last));
    return MV_OK;
}

mv_status mv_check_place(mv_named t, mv_named first, mv_error *error) {
    MV_TRY(check_device_of(t, first, error));
    MV_TRY(check_dims(t, error));
    return check_extent(t, error);
}

mv_status mv_check_floating(mv_named t, mv_error *error) {
    MV_REQUIRE(t.view->dtype <= MV_BF16, MV_BAD_TYPE, "%s: %s is %s, expected float32, float16 or bfloat16", t.op,
               t.name, mv_dtype_name(t.view->dtype));
    return MV_OK;
}

mv_status mv_check_x(mv_named x, mv_error *error) {
    MV_TRY(mv_check_floating(x, error));
    MV_TRY(check_dims(x, error));
    MV_REQUIRE(x.view->ndim >= 1, MV_BAD_VALUE, "%s: %s has no dimensions, expected [..., hidden]", x.op, x.name);
    MV_REQUIRE(x.view->shape[x.view->ndim - 1] >= 1, MV_BAD_VALUE, "%s: %s has shape %s, expected a hidden size >= 1",
               x.op, x.name, mv_shape_text(x.view).text);
    MV_TRY(check_extent(x, error));
    return mv_check_last_contiguous(x, error);
}

mv_status mv_check_like_x(mv_named t, const mv_view *x, mv_error *error) {
    MV_REQUIRE(t.view->dtype == x->dtype, MV_BAD_TYPE, "%s: %s is %s, expected %s (the dtype of x)", t.op, t.name,
               mv_dtype_name(t.view->dtype), mv_dtype_name(x->dtype));
    MV_TRY(check_device(t, x, error));
    MV_REQUIRE(t.view->ndim == x->ndim && memcmp(t.view->shape, x->shape, (size_t)x->ndim * sizeof x->shape[0]) == 0,
               MV_BAD_VALUE, "%s: %s has shape %s, expected %s (the shape of x)", t.op, t.name,
               mv_shape_text(t.view).text, mv_shape_text(x).text);
    MV_TRY(check_extent(t, error));
    return mv_check_last_contiguous(t, error);
}

/* Sorted by stride, each dimension must step past everything inside it. */
static bool sorted_elements_are_distinct(const mv_view *view) {
    int64_t stride[MV_MAX_DIMS], size[MV_MAX_DIMS];
    int count = 0;
    for (int d = 0; d < view->ndim; d++) {
        if (view->shape[d] <= 1) continue;
        int64_t step = mv_stride(view, d);
        if (step < 0) step = -step;
        int at = count++;
        for (; at > 0 && stride[at - 1] > step; at--) {
            stride[at] = stride[at - 1];
            size[at] = size[at - 1];
        }
        stride[at] = step;
        size[at] = view->shape[d];
    }
    int64_t reach = 0;
    for (int i = 0; i < count; i++) {
        if (stride[i] <= reach) return false;
        reach += (size[i] - 1) * stride[i];
    }
    return true;
}

/* They nearly always are sorted, the last dimension innermost. */
static bool elements_are_distinct(const mv_view *view) {
    int64_t reach = 0;
    for (int d = view->ndim - 1; d >= 0; d--) {
        if (view->shape[d] <= 1) continue;
        const int64_t step = mv_stride(view, d);
        if (step <= reach) return sorted_elements_are_distinct(view);
        reach += (view->shape[d] - 1) * step;
    }
    return true;
}

mv_status mv_check_writable(mv_named t, mv_error *error) {
    MV_REQUIRE(!t.view->read_only, MV_BAD_VALUE, "%s: %s is read-only; pass a writable array", t.op, t.name);
    MV_REQUIRE(mv_is_empty(t.view) || elements_are_distinct(t.view), MV_BAD_VALUE,
               "%s: %s has elements that share memory (strides of a broadcast or sliding view); pass a fresh array",
               t.op, t.name);
    return MV_OK;
}

/* [*x.shape[:-1], columns] */
static mv_view rows_like(const mv_view *x, int64_t columns, int64_t shape[MV_MAX_DIMS]) {
    memcpy(shape, x->shape, (size_t)x->ndim * sizeof x->shape[0]);
    shape[x->ndim - 1] = columns;
    return (mv_view){.shape = shape, .ndim = x->ndim, .dtype = x->dtype};
}

mv_status mv_check_fresh_output(mv_named out, const mv_view *x, int64_t columns, mv_error *error) {
    if (is_small(x) && columns < SMALL) return MV_OK;
    int64_t shape[MV_MAX_DIMS];
    const mv_view view = rows_like(x, columns, shape);
    return check_extent((mv_named){out.op, out.name, &view}, error);
}

static mv_status refuse_rows(mv_named t, const mv_view *x, int64_t columns, mv_error *error) {
    int64_t shape[MV_MAX_DIMS];
    const mv_view expected = rows_like(x, columns, shape);
    return mv_fail(error, MV_BAD_VALUE, "%s: %s has shape %s, expected %s", t.op, t.name, mv_shape_text(t.view).text,
                   mv_shape_text(&expected).text);
}

static bool same_sizes(const mv_view *a, const mv_view *b, int dims) {
    for (int d = 0; d < dims; d++)
        if (a->shape[d] != b->shape[d]) return false;
    return true;
}

mv_status mv_check_rows(mv_named t, const mv_view *x, int64_t columns, mv_error *error) {
    const mv_view *view = t.view;
    const int last = x->ndim - 1;
    MV_REQUIRE(view->dtype == x->dtype, MV_BAD_TYPE, "%s: %s is %s, expected %s (the dtype of x)", t.op, t.name,
               mv_dtype_name(view->dtype), mv_dtype_name(x->dtype));
    MV_TRY(check_device(t, x, error));
    if (view->ndim != x->ndim || view->shape[last] != columns || !same_sizes(view, x, last))
        return refuse_rows(t, x, columns, error);
    MV_TRY(check_extent(t, error));
    return mv_check_last_contiguous(t, error);
}

mv_status mv_check_output(mv_named out, const mv_view *x, int64_t columns, mv_error *error) {
    MV_TRY(mv_check_rows(out, x, columns, error));
    return mv_check_writable(out, error);
}

mv_status mv_check_parameter(mv_named t, const mv_view *x, mv_error *error) {
    MV_REQUIRE(t.view->dtype == x->dtype || t.view->dtype == MV_F32, MV_BAD_TYPE,
               x->dtype == MV_F32 ? "%s: %s is %s, expected %s (the dtype of x)"
                                  : "%s: %s is %s, expected %s (the dtype of x) or float32",
               t.op, t.name, mv_dtype_name(t.view->dtype), mv_dtype_name(x->dtype));
    MV_TRY(check_device(t, x, error));
    MV_TRY(check_dims(t, error));
    return check_extent(t, error);
}

mv_status mv_check_vector(mv_named t, const mv_view *x, int64_t size, const char *meaning, mv_error *error) {
    MV_TRY(mv_check_parameter(t, x, error));
    MV_REQUIRE(t.view->ndim == 1, MV_BAD_VALUE, "%s: %s has shape %s, expected [%lld] (%s)", t.op, t.name,
               mv_shape_text(t.view).text, (long long)size, meaning);
    MV_REQUIRE(t.view->shape[0] == size, MV_BAD_VALUE, "%s: %s has %lld elements, expected %lld (%s)", t.op, t.name,
               (long long)t.view->shape[0], (long long)size, meaning);
    return mv_check_last_contiguous(t, error);
}

mv_status mv_check_numbers(const char *op, double eps, double weight_offset, mv_rounding rounding, mv_error *error) {
    MV_REQUIRE(isfinite(eps) && eps >= 0, MV_BAD_VALUE, "%s: eps is %g, expected a finite number >= 0", op, eps);
    MV_REQUIRE(isfinite(weight_offset), MV_BAD_VALUE, "%s: weight_offset is %g, expected a finite number", op,
               weight_offset);
    return mv_check_rounding(op, rounding, error);
}

mv_status mv_check_rounding(const char *op, mv_rounding rounding, mv_error *error) {
    MV_REQUIRE(rounding == MV_ROUNDING_HF || rounding == MV_ROUNDING_HF_ONCE || rounding == MV_ROUNDING_FP32,
               MV_BAD_VALUE, "%s: unknown rounding, expected \"hf\", \"hf_once\" or \"fp32\"", op);
    return MV_OK;
}

/* ---- overlap --------------------------------------------------------------------------------------------------
 * Both tensors are sets of bytes base + sum(i_d * stride_d) + [0, width). Walk the strides of both from the largest
 * down. At stride S, one tensor's index minus the other's is some t; only those t matter for which what is left of
 * both can still meet, and where layouts nest those are one or two. */

typedef struct {
    int64_t stride, count_a, count_b;
} shared_dim;

typedef struct {
    shared_dim dim[2 * MV_MAX_DIMS];
    int dims;
    int budget; /* of steps, so that a tangled layout cannot take forever */
} overlap_search;

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* Can a's bytes from 0 meet b's bytes from delta, over the dimensions from d on? reach_*: the last byte of each. */
static bool meets(overlap_search *search, int d, int64_t delta, int64_t reach_a, int64_t reach_b) {
    if (delta > reach_a || delta + reach_b < 0) return false;
    if (d == search->dims || --search->budget < 0) return true;
    const shared_dim dim = search->dim[d];
    const int64_t rest_a = reach_a - (dim.count_a - 1) * dim.stride;
    const int64_t rest_b = reach_b - (dim.count_b - 1) * dim.stride;
    /* t * S + [0, rest_a] must meet delta + [0, rest_b] */
    int64_t t_low = floor_div(delta - rest_a + dim.stride - 1, dim.stride);
    int64_t t_high = floor_div(delta + rest_b, dim.stride);
    if (t_low < -(dim.count_b - 1)) t_low = -(dim.count_b - 1);
    if (t_high > dim.count_a - 1) t_high = dim.count_a - 1;
    for (int64_t t = t_low; t <= t_high; t++)
        if (meets(search, d + 1, delta - t * dim.stride, rest_a, rest_b)) return true;
    return false;
}

/* Adds a view's strides in bytes, largest first. */
static void add_dims(overlap_search *search, const mv_view *view, bool is_a) {
    const int64_t width = (int64_t)mv_dtype_bytes(view->dtype);
    for (int d = 0; d < view->ndim; d++) {
        int64_t stride = mv_stride(view, d) * width;
        if (stride == 0) continue;
        if (stride < 0) stride = -stride;
        int at = 0;
        while (at < search->dims && search->dim[at].stride > stride) at++;
        const bool exists = at < search->dims && search->dim[at].stride == stride &&
                            (is_a ? search->dim[at].count_a : search->dim[at].count_b) == 1;
        if (!exists) {
            memmove(&search->dim[at + 1], &search->dim[at], (size_t)(search->dims - at) * sizeof search->dim[0]);
            search->dim[at] = (shared_dim){stride, 1, 1};
            search->dims++;
        }
        *(is_a ? &search->dim[at].count_a : &search->dim[at].count_b) = view->shape[d];
    }
}

static bool elements_meet(const mv_view *a, const mv_view *b, int64_t delta, int64_t reach_a, int64_t reach_b) {
    overlap_search search;
    search.dims = 0;
    search.budget = 4096;
    add_dims(&search, a, true);
    add_dims(&search, b, false);
    return meets(&search, 0, delta, reach_a, reach_b);
}

/* The first and the last byte of a tensor. False: it has no elements. */
static bool find_ends(const mv_view *view, uintptr_t *first, uintptr_t *last) {
    int64_t count = 1, low = 0, high = 0;
    for (int d = view->ndim - 1; d >= 0; d--) {
        const int64_t size = view->shape[d], stride = view->strides ? view->strides[d] : count;
        if (size == 0) return false;
        if (size <= 1) continue;
        if (stride > 0)
            high += (size - 1) * stride;
        else
            low += (size - 1) * stride;
        count *= size;
    }
    const int64_t width = (int64_t)mv_dtype_bytes(view->dtype);
    *first = (uintptr_t)view->data + (uintptr_t)(low * width);
    *last = (uintptr_t)view->data + (uintptr_t)(high * width + width - 1);
    return true;
}

bool mv_overlap(const mv_view *a, const mv_view *b) {
    uintptr_t first_a, last_a, first_b, last_b;
    if (!find_ends(a, &first_a, &last_a) || !find_ends(b, &first_b, &last_b)) return false;
    if (last_a < first_b || last_b < first_a) return false;
    return elements_meet(a, b, (int64_t)(first_b - first_a), (int64_t)(last_a - first_a), (int64_t)(last_b - first_b));
}

bool mv_same_elements(const mv_view *a, const mv_view *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return false;
    for (int d = 0; d < a->ndim; d++)
        if (a->shape[d] != b->shape[d] || mv_stride(a, d) != mv_stride(b, d)) return false;
    return true;
}

mv_status mv_refuse_overlap(mv_named out, mv_named other, bool allow_same, mv_error *error) {
    if (allow_same && mv_same_elements(out.view, other.view)) return MV_OK;
    return mv_fail(error, MV_BAD_VALUE, "%s: %s overlaps %s%s; pass memory of its own", out.op, out.name, other.name,
                   allow_same ? " in part (being exactly the same tensor is fine)" : "");
}
