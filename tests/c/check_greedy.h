/* check_greedy.h: greedy_tokens, of test_kernels.c. */
#ifndef TESTS_CHECK_GREEDY_H
#define TESTS_CHECK_GREEDY_H

#include "kernels.h"

/* The first of the largest logits of a row; NaN is larger than any other. */
static int64_t largest_of_row(const Tensor *logits, int64_t row) {
    const int64_t vocabulary = logits->shape[1];
    int64_t found = 0;
    for (int64_t i = 1; i < vocabulary; i++) {
        const double now = value_at(logits, row * vocabulary + i), most = value_at(logits, row * vocabulary + found);
        if (now > most || (isnan(now) && !isnan(most))) found = i;
    }
    return found;
}

/* Rows: plain, with NaN, with equal logits, of -infinity alone, and one that is finished already. */
static void check_choice(const mv_kernel_info *kernel, int64_t vocabulary) {
    enum { ROWS = 5, LENGTH = 3 };
    static const int begun[ROWS] = {0, 2, 3, -1, 1}, pad_of_rows[1] = {0}; /* counts; 3 and -1 are no place */
    Tensor *logits = filled(NEW(kernel->dtype, ROWS, vocabulary), 0, 3);
    Tensor *finished = NEW(MV_BOOL, ROWS), *ends = NEW(MV_BOOL, vocabulary), *out = NEW(MV_I64, ROWS);
    Tensor *counts = integers(NEW(MV_I64, ROWS), begun), *positions = integers(NEW(MV_I64, ROWS), begun);
    Tensor *pad = integers(NEW(MV_I64, 1), pad_of_rows), *history = NEW(MV_I64, ROWS, LENGTH);
    set(logits->data, kernel->dtype, 1 * vocabulary + vocabulary / 2, NAN);
    set(logits->data, kernel->dtype, 1 * vocabulary + vocabulary - 1, NAN);
    set(logits->data, kernel->dtype, 2 * vocabulary + vocabulary / 3, 1000);
    set(logits->data, kernel->dtype, 2 * vocabulary + vocabulary - 1, 1000);
    for (int64_t i = 0; i < vocabulary; i++) set(logits->data, kernel->dtype, 3 * vocabulary + i, -INFINITY);
    memset(finished->data, 0, ROWS);
    ((uint8_t *)finished->data)[4] = 1;
    for (int64_t i = 0; i < vocabulary; i++) ((uint8_t *)ends->data)[i] = (uint8_t)(i % 2);
    memset(history->data, 0, ROWS * LENGTH * sizeof(int64_t));
    const mv_greedy_tokens_args args = {.call.kernel = kernel->name,
                                        .logits = logits->view,
                                        .finished = finished->view,
                                        .ends = ends->view,
                                        .pad = pad->view,
                                        .history = history->view,
                                        .counts = counts->view,
                                        .positions = positions->view,
                                        .out = out->view};
    mv_plan plan;
    const bool ran = run(kernel, mv_greedy_tokens(&args, &plan, &error), &plan);
    for (int64_t row = 0; ran && row < ROWS; row++) {
        const int64_t token = row == 4 ? pad_of_rows[0] : largest_of_row(logits, row);
        same(kernel, (double)((int64_t *)out->data)[row], (double)token, "a token");
        same(kernel, ((uint8_t *)finished->data)[row], row == 4 || token % 2, "finished");
        same(kernel, (double)((int64_t *)counts->data)[row], begun[row] + 1, "a count");
        same(kernel, (double)((int64_t *)positions->data)[row], begun[row] + 1, "a position");
        for (int64_t i = 0; i < LENGTH; i++)
            same(kernel, (double)((int64_t *)history->data)[row * LENGTH + i], (double)(i == begun[row] ? token : 0),
                 "the history");
    }
    free_tensors();
}

static void check_greedy_tokens(const mv_kernel_info *kernel) {
    static const int64_t vocabularies[] = {1, 2, 7, 16, 33, 511, 512, 513, 1024, 1500, 5000};
    for (size_t i = 0; i < sizeof vocabularies / sizeof vocabularies[0]; i++) check_choice(kernel, vocabularies[i]);
}

#endif
