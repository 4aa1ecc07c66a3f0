/* test_plan.c: what a plan promises: sizes before there is memory, memory that comes later, and refusals of what is no
 * such memory. On the CPU, in float32. */
#include "mv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 3, HIDDEN = 64, HEADS = 2, KV_HEADS = 1, HEAD_DIM = 8, QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM };

static float x[TOKENS * HIDDEN], residual[TOKENS * HIDDEN], weight[HIDDEN], matrix[QKV * HIDDEN];
static _Alignas(256) float given[TOKENS * QKV], later[TOKENS * QKV + 4], sums[TOKENS * HIDDEN];
static _Alignas(256) char workspace[1 << 16];
static const int64_t x_shape[] = {TOKENS, HIDDEN}, weight_shape[] = {HIDDEN}, matrix_shape[] = {QKV, HIDDEN},
                     out_shape[] = {TOKENS, QKV};
static mv_plan plan;
static mv_error error;
static int failures;

#define VIEW(array, sizes)                                                                                             \
    { .data = array, .shape = sizes, .ndim = sizeof sizes / sizeof sizes[0], .dtype = MV_F32 }

static void expect(bool holds, const char *what) {
    if (holds) return;
    printf("FAILED: %s (%s)\n", what, error.text);
    failures++;
}

static void expect_refused(const mv_memory *memory, const char *said, const char *what) {
    error.text[0] = '\0';
    expect(mv_run(&plan, memory, &error) == MV_BAD_VALUE && strstr(error.text, said), what);
}

static void test_memory_that_comes_later(void) {
    mv_rms_norm_qkv_args args = {.x = VIEW(x, x_shape),
                                 .residual = VIEW(residual, x_shape),
                                 .norm_weight = VIEW(weight, weight_shape),
                                 .qkv_weight = {VIEW(matrix, matrix_shape)},
                                 .out = VIEW(given, out_shape),
                                 .num_heads = HEADS,
                                 .num_kv_heads = KV_HEADS,
                                 .eps = 1e-6};
    expect(mv_rms_norm_qkv(&args, &plan, &error) == MV_OK, "a plan with its output");
    expect(plan.outputs == 2 && plan.output[0].columns == QKV && plan.output[1].columns == HIDDEN && !plan.is_long,
           "the sizes that a plan tells");
    expect(plan.workspace_bytes > 0 && plan.workspace_bytes <= sizeof workspace, "the workspace that a plan tells");
    expect_refused(NULL, "memory.workspace", "no workspace");
    expect_refused(&(mv_memory){.workspace = workspace + 16}, "memory.workspace", "a misaligned workspace");
    expect(mv_run(&plan, &(mv_memory){.workspace = workspace}, &error) == MV_OK, "a run into the output of the args");

    args.out = (mv_view){0};
    expect(mv_rms_norm_qkv(&args, &plan, &error) == MV_OK && plan.output[0].columns == QKV,
           "a plan without its output");
    mv_memory memory = {.workspace = workspace};
    expect_refused(&memory, "memory.output[0]", "no output");
    memory.output[0] = later + 1;
    expect_refused(&memory, "memory.output[0]", "a misaligned output");
    for (int twice = 0; twice < 2; twice++) {
        memory.output[0] = later + 4 * twice;
        memset(later, 0xff, sizeof later);
        expect(mv_run(&plan, &memory, &error) == MV_OK, "a run into memory that came later");
        expect(memcmp(memory.output[0], given, sizeof given) == 0, "the same bits there");
    }

    memory.output[1] = sums + 1;
    expect_refused(&memory, "memory.output[1]", "a misaligned sum");
    memory.output[1] = sums;
    expect(mv_run(&plan, &memory, &error) == MV_OK && sums[5] == x[5] + residual[5], "the sum, where it is wanted");
}

static void test_no_tokens(void) {
    const int64_t no_rows[] = {0, HIDDEN};
    const mv_rms_norm_args args = {.x = VIEW(NULL, no_rows), .weight = VIEW(weight, weight_shape), .eps = 1e-6};
    expect(mv_rms_norm(&args, &plan, &error) == MV_OK && mv_run(&plan, NULL, &error) == MV_OK, "no tokens, no memory");
}

/* Rows that take no memory, but whose output, which is to come later, would reach past all memory. */
static void test_an_output_past_all_memory(void) {
    const int64_t shape[] = {(int64_t)1 << 59, 1}, strides[] = {0, 1}, one[] = {1}, wide[] = {64, 1};
    mv_rms_norm_qkv_args args = {
        .x = VIEW(x, shape), .norm_weight = VIEW(weight, one), .num_heads = 2, .num_kv_heads = 1, .eps = 1e-6};
    args.x.strides = strides;
    args.qkv_weight[0] = (mv_view)VIEW(matrix, wide);
    error.text[0] = '\0';
    expect(mv_rms_norm_qkv(&args, &plan, &error) == MV_BAD_VALUE && strstr(error.text, "out has a shape"),
           "an output past all memory");
}

int main(void) {
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        x[i] = (float)(i % 7 - 3);
        residual[i] = (float)(i % 5);
    }
    for (int i = 0; i < HIDDEN; i++) weight[i] = 1.0f;
    for (int i = 0; i < QKV * HIDDEN; i++) matrix[i] = (float)(i % 11) / 64;
    test_memory_that_comes_later();
    test_no_tokens();
    test_an_output_past_all_memory();
    printf("plans: %d failures\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
