/* test_act_and_mul.c: mv_silu_and_mul and mv_gelu_and_mul from plain C, without Python.
 *
 * Every kernel that can run here, on the CPU and on GPU 0 where there is one, in every dtype, activation and rounding,
 * against float64 (activation.h): normal values, all 16-bit gates, values at which something overflows, vanishes or is
 * not a number, rows of every short length, from every alignment and with gaps, and offsets past 2^31 elements. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include "values.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static mv_error error;
static int failures, tests;

static void expect(bool holds, const char *what) {
    tests++;
    if (holds) return;
    printf("FAILED: %s (%s)\n", what, error.text);
    failures++;
}

static void require(mv_status status, const char *what) {
    if (status == MV_OK) return;
    fprintf(stderr, "%s: %s\n", what, error.text);
    exit(1);
}

/* ---- one call ------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *isa; /* of the rows: f32_<isa> and so on */
    bool cuda;
    mv_dtype dtype;
    mv_activation activation;
    mv_rounding rounding;
} Kernel;

static const char *name_of(const Kernel *kernel) {
    static char name[64];
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    snprintf(name, sizeof name, "%s_%s", dtypes[kernel->dtype], kernel->isa);
    return name;
}

/* Two leading dimensions; what no row covers is a gap. */
typedef struct {
    int64_t outer, inner, hidden;
    int64_t x_offset, x_outer, x_inner, out_offset, out_outer, out_inner; /* in elements */
    int64_t x_count, out_count;                                           /* of the memory */
} Layout;

static Layout contiguous(int64_t tokens, int64_t hidden) {
    return (Layout){.outer = 1,
                    .inner = tokens,
                    .hidden = hidden,
                    .x_inner = 2 * hidden,
                    .out_inner = hidden,
                    .x_count = tokens * 2 * hidden,
                    .out_count = tokens * hidden};
}

static void call(const Kernel *kernel, const Layout *at, void *x, void *out) {
    const mv_device device = {.kind = kernel->cuda ? MV_CUDA : MV_CPU};
    const int64_t x_shape[] = {at->outer, at->inner, 2 * at->hidden}, x_strides[] = {at->x_outer, at->x_inner, 1};
    const int64_t out_shape[] = {at->outer, at->inner, at->hidden}, out_strides[] = {at->out_outer, at->out_inner, 1};
    const ptrdiff_t bytes = (ptrdiff_t)bytes_of(kernel->dtype);
    const mv_act_and_mul_args args = {
        .call.kernel = name_of(kernel),
        .x = {(char *)x + at->x_offset * bytes, x_shape, x_strides, 3, kernel->dtype, device, true},
        .out = {(char *)out + at->out_offset * bytes, out_shape, out_strides, 3, kernel->dtype, device, false},
        .approximate = kernel->activation == MV_GELU ? MV_APPROXIMATE_NONE : MV_APPROXIMATE_TANH,
        .rounding = kernel->rounding};
    mv_plan plan;
    require((kernel->activation == MV_SILU ? mv_silu_and_mul : mv_gelu_and_mul)(&args, &plan, &error),
            args.call.kernel);
    require(mv_run(&plan, NULL, &error), args.call.kernel);
}

/* The number of wrong results and of gaps that were written to. x: of at->x_count elements, on the host. */
static int64_t count_wrong(const Kernel *kernel, const Layout *at, void *x) {
    const mv_dtype dtype = kernel->dtype;
    const size_t x_bytes = (size_t)at->x_count * bytes_of(dtype), out_bytes = (size_t)at->out_count * bytes_of(dtype);
    unsigned char *out = malloc(out_bytes), *expected = malloc(out_bytes);
    void *device_x = x, *device_out = out;
    if (!out || !expected) exit(1);
    memset(out, 0xaa, out_bytes);
    if (kernel->cuda) {
        require(mv_cuda_malloc(0, x_bytes, &device_x, &error), "mv_cuda_malloc");
        require(mv_cuda_malloc(0, out_bytes, &device_out, &error), "mv_cuda_malloc");
        require(mv_cuda_copy(0, device_x, x, x_bytes, NULL, &error), "mv_cuda_copy");
        require(mv_cuda_copy(0, device_out, out, out_bytes, NULL, &error), "mv_cuda_copy");
    }
    call(kernel, at, device_x, device_out);
    if (kernel->cuda) {
        require(mv_cuda_copy(0, out, device_out, out_bytes, NULL, &error), "mv_cuda_copy");
        require(mv_cuda_free(0, device_x, &error), "mv_cuda_free");
        require(mv_cuda_free(0, device_out, &error), "mv_cuda_free");
    }
    int64_t wrong = 0;
    memset(expected, 0xaa, out_bytes); /* the gaps, when every result has been taken over */
    for (int64_t row = 0; row < at->outer * at->inner; row++) {
        const int64_t outer = row / at->inner, inner = row % at->inner;
        const int64_t from = at->x_offset + outer * at->x_outer + inner * at->x_inner;
        const int64_t to = at->out_offset + outer * at->out_outer + inner * at->out_inner;
        for (int64_t i = 0; i < at->hidden; i++) {
            const double gate = get(x, dtype, from + i), up = get(x, dtype, from + at->hidden + i);
            const double got = get(out, dtype, to + i);
            if (act_and_mul_is_right(kernel->activation, kernel->rounding, dtype, gate, up, got)) continue;
            const double exact = activation_of(kernel->activation, gate) * up;
            if (wrong++ < 3)
                printf("%s: gate %.9g, up %.9g gives %.9g, exact %.9g\n", name_of(kernel), gate, up, got, exact);
        }
        memcpy(expected + (size_t)to * bytes_of(dtype), out + (size_t)to * bytes_of(dtype),
               (size_t)at->hidden * bytes_of(dtype));
    }
    wrong += memcmp(out, expected, out_bytes) != 0;
    free(out);
    free(expected);
    return wrong;
}

/* ---- the tests of a kernel ------------------------------------------------------------------------------------ */

static void *memory_for(const Kernel *kernel, int64_t count) {
    void *data = malloc((size_t)count * bytes_of(kernel->dtype));
    if (!data) exit(1);
    return data;
}

static void test_normal_values(const Kernel *kernel) {
    static const double scales[] = {1, 4, 1e-6, 1e4};
    const Layout at = contiguous(40, 1000);
    void *x = memory_for(kernel, at.x_count);
    for (int s = 0; s < 4; s++) {
        for (int64_t i = 0; i < at.x_count; i++) set(x, kernel->dtype, i, scales[s] * bell());
        expect(count_wrong(kernel, &at, x) == 0, "normal values");
    }
    free(x);
}

/* Every gate of a list beside every up of another. */
static void test_pairs(const Kernel *kernel, const double *gates, int64_t gate_count, const char *what) {
    static const double ups[] = {1, -2.5, 0, -0.0, INFINITY, -INFINITY, NAN, 1e-45, -6e-8, 1e4, -6e4, 3e38};
    const int64_t up_count = sizeof ups / sizeof ups[0];
    const Layout at = contiguous(up_count, gate_count);
    void *x = memory_for(kernel, at.x_count);
    for (int64_t row = 0; row < up_count; row++)
        for (int64_t i = 0; i < gate_count; i++) {
            set(x, kernel->dtype, row * 2 * gate_count + i, gates[i]);
            set(x, kernel->dtype, (row * 2 + 1) * gate_count + i, ups[row]);
        }
    expect(count_wrong(kernel, &at, x) == 0, what);
    free(x);
}

static void test_extreme_values(const Kernel *kernel) {
    static const double special[] = {0,      -0.0, INFINITY, -INFINITY, NAN,    1e4,    -1e4,   1e19,  -1e19, 2e19,
                                     -2e19,  3e38, -3e38,    1e-45,     -1e-45, 1e-40,  -1e-40, 6e-8,  -6e-8, 65504,
                                     -65504, 6e-5, -6e-5,    1.2e-38,   -88.75, -88.72, -103.9, -104.1};
    enum { SPECIAL = sizeof special / sizeof special[0], STEPS = 1200 };
    double gates[SPECIAL + 6 * STEPS];
    memcpy(gates, special, sizeof special);
    double *next = gates + SPECIAL;
    for (int i = 0; i < STEPS; i++) {
        *next++ = -87.5 - 2.0 * i / STEPS; /* where exp(-z) leaves float32 */
        *next++ = 87.5 + 2.0 * i / STEPS;
        *next++ = -9.0 - 6.0 * i / STEPS; /* where the gelus vanish */
        *next++ = 9.0 + 6.0 * i / STEPS;
        *next++ = -110 + 220.0 * i / STEPS;
        *next++ = 1e-3 * bell();
    }
    test_pairs(kernel, gates, SPECIAL + 6 * STEPS, "extreme values");
}

static void test_all_gates_of_16_bits(const Kernel *kernel) {
    static double gates[65536];
    if (kernel->dtype == MV_F32) return;
    for (int64_t i = 0; i < 65536; i++) {
        const uint16_t bits = (uint16_t)i;
        gates[i] = get(&bits, kernel->dtype, 0);
    }
    test_pairs(kernel, gates, 65536, "all gates of 16 bits");
}

static void test_layouts(const Kernel *kernel) {
    for (int64_t hidden = 1; hidden <= 67; hidden++) {
        const int64_t x_pad = hidden % 3, out_pad = hidden % 5, outer = 1 + hidden % 2, inner = 3;
        const int64_t x_row = 2 * hidden + x_pad, out_row = hidden + out_pad;
        const Layout at = {.outer = outer,
                           .inner = inner,
                           .hidden = hidden,
                           .x_offset = hidden % 9,
                           .x_inner = x_row,
                           .x_outer = inner * x_row + 8 * x_pad,
                           .out_offset = hidden % 7,
                           .out_inner = out_row,
                           .out_outer = inner * out_row + out_pad,
                           .x_count = outer * (inner * x_row + 8 * x_pad) + hidden % 9,
                           .out_count = outer * (inner * out_row + out_pad) + hidden % 7};
        void *x = memory_for(kernel, at.x_count);
        for (int64_t i = 0; i < at.x_count; i++) set(x, kernel->dtype, i, 2 * bell());
        expect(count_wrong(kernel, &at, x) == 0, "short rows with gaps");
        free(x);
    }
    static const int64_t sizes[] = {192, 608, 1000, 4096, 4100, 12289};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        const Layout at = contiguous(sizes[s] == 192 ? 300 : 5, sizes[s]);
        void *x = memory_for(kernel, at.x_count);
        for (int64_t i = 0; i < at.x_count; i++) set(x, kernel->dtype, i, 2 * bell());
        expect(count_wrong(kernel, &at, x) == 0, "rows of many lengths");
        free(x);
    }
}

/* The last row of each tensor lies more than 2^31 elements behind the first; only their pages are ever touched. */
static void test_far_rows(const Kernel *kernel) {
    const int64_t hidden = 24, far = ((int64_t)1 << 31) + 40;
    const size_t bytes = (size_t)(far + 2 * hidden) * bytes_of(kernel->dtype);
    if (kernel->cuda) return; /* a GPU has no memory that is not there */
    char *memory[2];
    for (int i = 0; i < 2; i++) {
        memory[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory[i] == MAP_FAILED) exit(1);
    }
    const Layout at = {.outer = 1, .inner = 2, .hidden = hidden, .x_inner = far, .out_inner = far};
    for (int64_t i = 0; i < 4 * hidden; i++)
        set(memory[0], kernel->dtype, i < 2 * hidden ? i : far + i - 2 * hidden, bell());
    call(kernel, &at, memory[0], memory[1]);
    bool right = true;
    for (int64_t i = 0; i < 2 * hidden; i++) {
        const int64_t place = i < hidden ? i : far + i - hidden;
        right = right && act_and_mul_is_right(
                             kernel->activation, kernel->rounding, kernel->dtype, get(memory[0], kernel->dtype, place),
                             get(memory[0], kernel->dtype, place + hidden), get(memory[1], kernel->dtype, place));
    }
    expect(right, "rows past 2^31 elements");
    for (int i = 0; i < 2; i++) munmap(memory[i], bytes);
}

/* ---- the tests of an isa -------------------------------------------------------------------------------------- */

static void test_isa(const char *isa, bool cuda) {
    const int failures_before = failures, tests_before = tests;
    for (int dtype = MV_F32; dtype <= MV_BF16; dtype++)
        for (int activation = MV_SILU; activation <= MV_GELU; activation++)
            for (int rounding = MV_ROUNDING_HF; rounding <= MV_ROUNDING_FP32; rounding++) {
                const Kernel kernel = {isa, cuda, (mv_dtype)dtype, (mv_activation)activation, (mv_rounding)rounding};
                test_normal_values(&kernel);
                test_extreme_values(&kernel);
                test_all_gates_of_16_bits(&kernel);
                test_layouts(&kernel);
                test_far_rows(&kernel);
            }
    printf("%-9s %5d tests, %d failures\n", isa, tests - tests_before, failures - failures_before);
}

int main(void) {
    int32_t gpus = 0;
    mv_cuda_info gpu;
    mv_kernel_info kernel;
    for (int k = 0; mv_kernel_at(k, &kernel); k++) {
        if (strcmp(kernel.op, "silu_and_mul") != 0 || kernel.dtype != MV_F32 || strncmp(kernel.isa, "sm", 2) == 0)
            continue;
        if (kernel.usable)
            test_isa(kernel.isa, false);
        else
            printf("skipped %s: %s\n", kernel.isa, kernel.why_not);
    }
    if (mv_cuda_device_count(&gpus, &error) != MV_OK || gpus == 0)
        printf("skipped CUDA: %s\n", gpus == 0 && error.text[0] ? error.text : "no GPU");
    else if (mv_cuda_device_info(0, &gpu, &error) != MV_OK || !gpu.usable)
        printf("skipped CUDA: this build has no kernels for %s\n", gpu.name);
    else
        test_isa("sm80", true);
    printf("silu_and_mul, gelu_and_mul: %d tests, %d failures\n", tests, failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
