/* test_act_and_mul_calls.c: mv_silu_and_mul and mv_gelu_and_mul: their plans, memory that comes later, and what they
 * refuse. test_act_and_mul.c looks at what they compute. */
#include "mv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float in[2 * 12], given[2 * 6];
static _Alignas(16) float later[2 * 6];
static mv_error error;
static int failures;
static const int64_t in_shape[] = {2, 12}, out_shape[] = {2, 6};

static void expect(bool holds, const char *what) {
    if (holds) return;
    printf("FAILED: %s (%s)\n", what, error.text);
    failures++;
}

static mv_act_and_mul_args usual(void) {
    return (mv_act_and_mul_args){.x = {.data = in, .shape = in_shape, .ndim = 2},
                                 .out = {.data = given, .shape = out_shape, .ndim = 2}};
}

static void expect_refused(const mv_act_and_mul_args *args, mv_status status, const char *said) {
    mv_plan plan;
    error.text[0] = '\0';
    expect(mv_silu_and_mul(args, &plan, &error) == status && strstr(error.text, said), said);
}

static void test_plans(void) {
    for (int i = 0; i < 24; i++) in[i] = (float)(i % 7 - 3);
    mv_act_and_mul_args args = usual();
    mv_plan plan;
    mv_ran ran;
    expect(mv_silu_and_mul(&args, &plan, &error) == MV_OK && mv_run(&plan, NULL, &error) == MV_OK, "a call");
    expect(mv_last_kernel(&ran) && strcmp(ran.op, "silu_and_mul") == 0 && strstr(ran.why, "tokens=2 hidden=6"),
           "what ran");
    args.out = (mv_view){0};
    expect(mv_silu_and_mul(&args, &plan, &error) == MV_OK && plan.workspace_bytes == 0, "a plan without its output");
    expect(mv_run(&plan, NULL, &error) == MV_BAD_VALUE && strstr(error.text, "memory.output[0]"), "no output");
    const mv_memory memory = {.output = {later}};
    expect(mv_run(&plan, &memory, &error) == MV_OK && memcmp(later, given, sizeof given) == 0,
           "memory that comes later");
    expect(mv_gelu_and_mul(&args, &plan, &error) == MV_OK, "gelu");
    const int64_t no_rows[] = {0, 12};
    args.x = (mv_view){.shape = no_rows, .ndim = 2};
    expect(mv_gelu_and_mul(&args, &plan, &error) == MV_OK && mv_run(&plan, NULL, &error) == MV_OK, "no tokens");
}

static void test_refusals(void) {
    const int64_t odd[] = {2, 11}, none[] = {2, 0}, wide[] = {2, 12}, twice[] = {24, 2}, still[] = {0, 1};
    mv_plan plan;
    mv_act_and_mul_args args = usual();
    args.x.shape = odd;
    expect_refused(&args, MV_BAD_VALUE, "silu_and_mul: x has shape [2, 11], expected an even last dimension");
    args.x.shape = none;
    expect_refused(&args, MV_BAD_VALUE, "x has shape [2, 0]");
    args = usual();
    args.x.strides = twice;
    expect_refused(&args, MV_BAD_VALUE, "x must be contiguous in its last dimension");
    args = usual();
    args.x.ndim = 0;
    expect_refused(&args, MV_BAD_VALUE, "x has no dimensions");
    args = usual();
    args.out.shape = wide;
    expect_refused(&args, MV_BAD_VALUE, "out has shape [2, 12], expected [2, 6]");
    args = usual();
    args.out.dtype = MV_F16;
    expect_refused(&args, MV_BAD_TYPE, "out is float16, expected float32");
    args = usual();
    args.out.read_only = true;
    expect_refused(&args, MV_BAD_VALUE, "out is read-only");
    args = usual();
    args.out.strides = still;
    expect_refused(&args, MV_BAD_VALUE, "out has elements that share memory");
    args = usual();
    args.out.data = in;
    args.out.strides = (const int64_t[]){12, 1}; /* exactly the gate */
    expect_refused(&args, MV_BAD_VALUE, "out overlaps x; pass memory of its own");
    args = usual();
    args.rounding = (mv_rounding)7;
    expect_refused(&args, MV_BAD_VALUE, "unknown rounding");
    args = usual();
    args.call.kernel = "f32_abacus";
    expect_refused(&args, MV_BAD_VALUE, "no kernel is called 'f32_abacus'");
    args = usual();
    args.approximate = (mv_approximate)2;
    expect(mv_gelu_and_mul(&args, &plan, &error) == MV_BAD_VALUE &&
               strstr(error.text, "gelu_and_mul: unknown approximate, expected \"tanh\" or \"none\""),
           "unknown approximate");
}

int main(void) {
    test_plans();
    test_refusals();
    printf("calls of silu_and_mul and gelu_and_mul: %d failures\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
