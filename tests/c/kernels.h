/* kernels.h: what the checks of test_kernels.c stand on: tensors with nothing readable behind their last element, one
 * run of a plan, and the comparison with float64.
 *
 * A result may be off by the roundings of its dtype and by those of float32. The checks count both: see near(). */
#ifndef TESTS_KERNELS_H
#define TESTS_KERNELS_H

#include "values.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static mv_error error;
static int64_t compared, failures;
static double worst; /* error of the row that is tested, as a part of what it may be */

/* ---- tensors -------------------------------------------------------------------------------------------------- */

enum { MOST_TENSORS = 32 };

typedef struct {
    void *data;
    int64_t shape[4], strides[4], count;
    mv_dtype dtype;
    mv_view view;
} Tensor;

static struct {
    Tensor tensor[MOST_TENSORS];
    char *memory[MOST_TENSORS];
    size_t mapped[MOST_TENSORS];
    int count;
} tensors; /* of one call */

/* C-contiguous, its last byte in front of a page that cannot be touched. */
static Tensor *new_tensor(mv_dtype dtype, int32_t ndim, const int64_t *shape) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    Tensor *tensor = &tensors.tensor[tensors.count];
    *tensor = (Tensor){.count = 1, .dtype = dtype};
    for (int i = ndim - 1; i >= 0; i--) {
        tensor->shape[i] = shape[i];
        tensor->strides[i] = tensor->count;
        tensor->count *= shape[i];
    }
    const size_t each = dtype == MV_I64 ? 8 : dtype == MV_I32 ? 4 : dtype == MV_BOOL ? 1 : bytes_of(dtype);
    const size_t bytes = (size_t)tensor->count * each, pages = (bytes + page - 1) / page * page;
    char *memory = mmap(NULL, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (tensors.count == MOST_TENSORS || memory == MAP_FAILED || mprotect(memory + pages, page, PROT_NONE) != 0)
        exit(1);
    memset(memory, 0xff, pages); /* NaN */
    tensor->data = memory + pages - bytes;
    tensor->view = (mv_view){
        .data = tensor->data, .shape = tensor->shape, .strides = tensor->strides, .ndim = ndim, .dtype = dtype};
    tensors.memory[tensors.count] = memory;
    tensors.mapped[tensors.count++] = pages + page;
    return tensor;
}
#define NEW(dtype, ...) new_tensor(dtype, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (int64_t[]){__VA_ARGS__})

static void free_tensors(void) {
    while (tensors.count > 0) {
        tensors.count--;
        munmap(tensors.memory[tensors.count], tensors.mapped[tensors.count]);
    }
}

static double value_at(const Tensor *tensor, int64_t i) { return get(tensor->data, tensor->dtype, i); }

static Tensor *filled(Tensor *tensor, double mean, double scale) {
    for (int64_t i = 0; i < tensor->count; i++) set(tensor->data, tensor->dtype, i, mean + scale * bell());
    return tensor;
}

static Tensor *integers(Tensor *tensor, const int *values) {
    for (int64_t i = 0; i < tensor->count; i++) {
        if (tensor->dtype == MV_I64)
            ((int64_t *)tensor->data)[i] = values[i];
        else
            ((int32_t *)tensor->data)[i] = values[i];
    }
    return tensor;
}

static mv_view view_of(const Tensor *tensor) { return tensor ? tensor->view : (mv_view){0}; }

/* ---- a call --------------------------------------------------------------------------------------------------- */

static void fail(const mv_kernel_info *kernel, const char *what) {
    if (failures++ < 20) printf("FAILED: %s %s: %s\n", kernel->op, kernel->name, what);
}

/* Runs what was planned, with a workspace that holds NaN. */
static bool run(const mv_kernel_info *kernel, mv_status planned, mv_plan *plan) {
    void *workspace = NULL;
    if (planned == MV_OK && plan->workspace_bytes > 0) {
        const size_t bytes = (plan->workspace_bytes + 255) / 256 * 256;
        workspace = aligned_alloc(256, bytes);
        if (!workspace) exit(1);
        memset(workspace, 0xff, bytes);
    }
    const bool ran = planned == MV_OK && mv_run(plan, &(mv_memory){.workspace = workspace}, &error) == MV_OK;
    free(workspace);
    if (!ran) fail(kernel, error.text);
    return ran;
}

/* ---- comparison ----------------------------------------------------------------------------------------------- */

/* Half a unit in the last place of 1. */
static double unit(mv_dtype dtype) { return ldexp(1, dtype == MV_F32 ? -24 : dtype == MV_F16 ? -11 : -8); }

/* What rounding to the dtype may change at most. */
static double rounding_of(mv_dtype dtype, double value) {
    return fmax(unit(dtype) * fabs(value), dtype == MV_F16 ? ldexp(1, -25) : ldexp(1, -133));
}

static void near(const mv_kernel_info *kernel, double got, double exact, double bound, const char *what) {
    char text[192];
    compared++;
    if (isnan(exact) ? isnan(got) : fabs(got - exact) <= bound) {
        if (!isnan(exact)) worst = fmax(worst, fabs(got - exact) / bound);
        return;
    }
    snprintf(text, sizeof text, "%s: %.9g, exact %.9g, which may be off by %.2g", what, got, exact, bound);
    fail(kernel, text);
}

/* Equal but for the bits of a NaN. */
static void same(const mv_kernel_info *kernel, double got, double exact, const char *what) {
    char text[192];
    compared++;
    if (isnan(exact) ? isnan(got) : got == exact && !signbit(got) == !signbit(exact)) return;
    snprintf(text, sizeof text, "%s: %.9g, expected exactly %.9g", what, got, exact);
    fail(kernel, text);
}

#endif
