/* views.c: see views.h. */
#include "views.h"

#include "../base/refusals.h"

const char *const dtype_names[] = {"float32", "float16", "bfloat16", "int32", "int64", "bool"};
const dl_dtype dl_dtypes[] = {
    [MV_F32] = {DL_FLOAT, 32, 1}, [MV_F16] = {DL_FLOAT, 16, 1}, [MV_BF16] = {DL_BFLOAT, 16, 1},
    [MV_I32] = {DL_INT, 32, 1},   [MV_I64] = {DL_INT, 64, 1},   [MV_BOOL] = {DL_BOOL, 8, 1}};

static int itemsize_log2(mv_dtype dtype) {
    static const unsigned char powers[] = {
        [MV_F32] = 2, [MV_F16] = 1, [MV_BF16] = 1, [MV_I32] = 2, [MV_I64] = 3, [MV_BOOL] = 0};
    return powers[dtype];
}

static bool has_elements(const tensor *t) {
    for (int d = 0; d < t->view.ndim; d++)
        if (t->shape[d] == 0) return false;
    return true;
}

bool check_view(call *c, tensor *t) {
    int64_t least = 1;
    for (int d = 0; d < t->view.ndim; d++)
        if (t->shape[d] < least) least = t->shape[d];
    if (least < 0) return refuse(c, t, PyExc_BufferError, "was exported with a negative size");
    if (least == 0) { /* nothing to step over, and NumPy's strides may be zero then */
        t->view.strides = NULL;
        return true;
    }
    if (!t->view.data)
        return refuse(c, t, PyExc_BufferError, "has no data: its exporter gave a null pointer for its elements");
    const int itemsize = 1 << itemsize_log2(t->view.dtype);
    if (((uintptr_t)t->view.data & (uintptr_t)(itemsize - 1)) != 0)
        return refuse(c, t, PyExc_ValueError,
                      "starts at an address that is no multiple of its %d-byte elements; pass "
                      "a copy",
                      itemsize);
    return true;
}

/* Shifts: a division takes as long as ten other instructions. */
bool strides_from_bytes(call *c, tensor *t) {
    const int log2 = itemsize_log2(t->view.dtype);
    const int64_t rest = ((int64_t)1 << log2) - 1;
    for (int d = 0; d < t->view.ndim; d++) {
        if ((t->strides[d] & rest) != 0 && t->shape[d] > 1 && has_elements(t))
            return refuse(c, t, PyExc_ValueError,
                          "has a stride of %lld bytes in dimension %d, expected a multiple of "
                          "its %d-byte elements; pass a contiguous copy",
                          (long long)t->strides[d], d, 1 << log2);
        t->strides[d] >>= log2;
    }
    return true;
}

static const char *dl_dtype_text(dl_dtype dtype, char *text, size_t size) {
    static const char *const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    const bool small = dtype.code >= sizeof kinds / sizeof kinds[0]; /* the many floats of 8, 6 and 4 bits */
    PyOS_snprintf(text, size, dtype.lanes == 1 ? "dtype %s%d" : "dtype %s%d in vectors of %d",
                  small ? "float" : kinds[dtype.code], (int)dtype.bits, (int)dtype.lanes);
    return text;
}

static bool refuse_dl_dtype(call *c, tensor *t, dl_dtype dtype) {
    char text[64];
    return refuse_dtype(c, t, dl_dtype_text(dtype, text, sizeof text));
}

static bool find_dtype(dl_dtype dtype, mv_dtype *found) {
    for (int i = 0; i < DTYPES; i++) {
        *found = (mv_dtype)i;
        if (dtype.code == dl_dtypes[i].code && dtype.bits == dl_dtypes[i].bits && dtype.lanes == 1) return true;
    }
    return false;
}

bool view_of_dl_tensor(call *c, tensor *t, const dl_tensor *source) {
    mv_view *view = &t->view;
    switch (source->device.type) {
    case DL_CPU:
    case DL_CUDA_HOST: /* pinned */ view->device = (mv_device){MV_CPU, 0}; break;
    case DL_CUDA:
    case DL_CUDA_MANAGED: view->device = (mv_device){MV_CUDA, source->device.id}; break;
    default:
        return refuse(c, t, PyExc_ValueError, "is on a device of DLPack type %d, expected the CPU or a CUDA device",
                      (int)source->device.type);
    }
    if (!find_dtype(source->dtype, &view->dtype) || !is_wanted(t, view->dtype))
        return refuse_dl_dtype(c, t, source->dtype);
    if (source->ndim > 0 && !source->shape) return refuse(c, t, PyExc_BufferError, "was exported without a shape");
    if (source->ndim < 0 || source->ndim > MAX_DIMS)
        return refuse(c, t, PyExc_ValueError, "has %d dimensions, expected at most %d", (int)source->ndim, MAX_DIMS);
    view->ndim = source->ndim;
    for (int d = 0; d < source->ndim; d++) {
        t->shape[d] = source->shape[d];
        if (source->strides) t->strides[d] = source->strides[d];
    }
    view->strides = source->strides ? t->strides : NULL;
    view->data = source->data ? (void *)((uintptr_t)source->data + source->byte_offset) : NULL;
    return check_view(c, t);
}
