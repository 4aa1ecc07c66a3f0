/* driver.cpp: runs every CUDA kernel of the lists that is linked here on cases with odd sizes, strides and options, and
 * compares with float64. Every second case promises static weights. Prints a line for each kernel; the exit status is 1
 * if a result is wrong or a kernel took none of the cases; a kernel that reads or writes too early ends the run. */
#include "cuda_on_cpu.h"
#include "rows.h"

#include <cstring>
#include <random>

extern "C" {
#include "ops/dispatch.h"
}

namespace {

struct Case {
    int tokens, hidden, outputs;
    mv_rounding rounding;
    bool residual, bias, wide_norm_weight, in_out, tuple;
    float weight_offset;
    int pad; /* elements between rows of x, residual and outputs */
    bool allow_tf32 = false, no_norm_weight = false;
    bool behind = false;  /* norm_add: the residual is added to what the norm gives */
    bool plain_x = false; /* a linear layer without a norm */
    float scale = 0;      /* of what an addend joins; 0: there is none. In place where the tokens are odd. */
    bool gated = false;   /* half of the outputs are the gate's */
    mv_activation activation = MV_SILU;
};

constexpr mv_rounding kHf = MV_ROUNDING_HF, kOnce = MV_ROUNDING_HF_ONCE, kFp32 = MV_ROUNDING_FP32;
constexpr Case kProjections[] = {
    {1, 256, 37, kHf, false, false, false, false, false, 0, 0},
    {1, 1024, 3, kFp32, true, false, false, false, false, 0.5f, 8},
    {2, 512, 50, kFp32, true, true, false, false, false, 0, 8},
    {12, 1024, 60, kFp32, false, true, false, false, true, 0, 0},
    {3, 512, 100, kHf, true, true, true, false, true, 0, 8},
    {4, 96, 20, kFp32, false, true, false, false, false, 1, 0},
    {5, 1027, 33, kHf, false, true, false, false, false, 0, 3},
    {8, 768, 68, kFp32, true, false, true, false, false, 1, 0},
    {16, 512, 132, kHf, true, true, false, false, true, 0, 16},
    {9, 3136, 100, kHf, true, true, false, false, false, 0, 3},
    {17, 640, 72, kHf, false, false, false, true, false, 0, 0},
    {33, 264, 136, kFp32, true, true, false, true, false, 0, 8},
    {34, 200, 600, kHf, true, false, true, false, false, 0, 1},
    {40, 72, 200, kFp32, false, true, false, false, false, 0, 8},
    {64, 64, 104, kHf, false, true, false, false, false, 0, 8},
    {70, 40, 24, kHf, false, true, false, false, false, 0, 1},
    {130, 320, 200, kHf, true, false, false, false, true, 0, 0},
    {129, 2056, 4, kFp32, false, false, true, false, false, 0, 0},
    {250, 96, 250, kHf, false, true, false, false, false, 0, 4},
    /* whole heads of 128 outputs: a launch for each of them, and clusters of 8 and of 4 blocks */
    {2, 320, 384, kFp32, true, true, false, false, false, 0, 8},
    {3, 128, 512, kHf, true, true, true, false, true, 0, 8},
    {1, 64, 2304, kHf, false, true, false, false, false, 0, 0},
    /* where "fp32" leaves y as it is, and "hf" rounds two at a time */
    {1, 256, 70, kOnce, false, false, false, false, false, 0, 0},
    {2, 512, 384, kOnce, true, true, false, false, true, 0, 8},
    {4, 512, 80, kOnce, false, true, true, false, false, 1, 0},
    {20, 264, 136, kOnce, true, true, false, true, false, 0, 8},
    {130, 320, 200, kOnce, false, true, false, false, false, 0, 0},
};
/* Where each warpgroup of the kernel for Hopper's tensor cores has tiles of its own, of one step and of several; then
 * in clusters, with rows normalised meanwhile: too slow for the others. */
constexpr Case kLargeProjections[] = {
    {390, 64, 192, kHf, true, true, false, false, false, 0, 0},
    {258, 328, 400, kFp32, false, true, false, false, true, 0, 8},
    {260, 128, 192, kOnce, false, true, false, false, false, 0, 8},
    {5130, 1024, 192, kHf, true, true, false, false, false, 0, 8},
};
/* Without a norm; x where it is, and, where there are gaps or the alignment is wrong, copied. */
constexpr Case linear(int tokens, int hidden, int outputs, mv_rounding rounding, float scale, bool bias, int pad = 0,
                      bool in_out = false, bool allow_tf32 = false) {
    Case c = {tokens, hidden, outputs, rounding, false, bias, false, in_out, false, 0, pad, allow_tf32};
    c.plain_x = true;
    c.scale = scale;
    return c;
}
constexpr Case kLinears[] = {
    linear(1, 256, 37, kHf, 0, true),
    linear(1, 1024, 300, kHf, 1, true),
    linear(2, 512, 50, kHf, 0.22f, true, 8),
    linear(3, 320, 700, kFp32, 0.22f, false),
    linear(4, 96, 20, kHf, 1, true),
    linear(5, 1027, 33, kHf, 1, true, 3),
    linear(7, 128, 513, kOnce, 0.22f, true),
    linear(8, 768, 68, kFp32, 1, false, 8),
    linear(13, 512, 132, kHf, 1, true, 16),
    linear(16, 3136, 100, kHf, 0.22f, true, 8),
    linear(17, 640, 72, kHf, 1, false, 0, true),
    linear(19, 264, 136, kHf, 0.22f, true),
    linear(33, 264, 136, kFp32, 0.22f, true, 8, true),
    linear(34, 200, 600, kHf, 1, false, 1),
    linear(41, 72, 200, kHf, 1, true),
    linear(64, 64, 104, kHf, 0, true),
    linear(63, 64, 203, kHf, 1, true),
    linear(70, 40, 24, kHf, 1, true, 1),
    linear(131, 320, 200, kHf, 0.22f, true),
    linear(129, 2056, 4, kFp32, 1, false),
    linear(251, 96, 250, kHf, 1, true, 4),
    linear(130, 128, 120, kHf, 0, false),
};
constexpr Case kLargeLinears[] = {
    linear(391, 64, 200, kHf, 1, true),
    linear(259, 328, 400, kHf, 0.22f, true),
    linear(260, 136, 300, kFp32, 1, true, 8, true),
    linear(5131, 1024, 192, kHf, 1, true),
};
constexpr Case kTf32Linears[] = {linear(45, 456, 300, kHf, 1, true, 8, false, true),
                                 linear(150, 96, 130, kFp32, 0, false, 0, false, true)};
/* Gate and up: the outputs of both. */
constexpr Case gated(int tokens, int hidden, int outputs, mv_rounding rounding, mv_activation activation, bool bias,
                     int pad = 0, bool in_out = false) {
    Case c = {tokens, hidden, outputs, rounding, tokens % 3 == 0, bias, false, in_out, false, 0, pad};
    c.gated = true;
    c.activation = activation;
    return c;
}
/* Of two matrices, up in front of the gate, with gaps between them and between rows. */
constexpr Case apart(Case c) {
    c.tuple = true;
    return c;
}
constexpr Case kGated[] = {
    gated(1, 256, 38, kHf, MV_SILU, true),
    gated(1, 1024, 300, kFp32, MV_SILU, false),
    gated(2, 512, 50, kHf, MV_GELU, true, 8),
    gated(3, 320, 700, kFp32, MV_GELU_TANH, false),
    gated(4, 96, 20, kHf, MV_SILU, true),
    gated(4, 256, 80, kOnce, MV_SILU, true),
    gated(5, 1027, 34, kHf, MV_SILU, true, 3),
    gated(8, 768, 68, kFp32, MV_GELU, false, 8),
    gated(13, 512, 1026, kHf, MV_SILU, true, 16),
    gated(17, 640, 72, kHf, MV_SILU, false, 0, true),
    gated(34, 200, 602, kHf, MV_GELU_TANH, false, 1),
    gated(64, 64, 104, kFp32, MV_SILU, true),
    gated(131, 320, 202, kHf, MV_GELU, true),
    gated(250, 96, 250, kHf, MV_SILU, true, 4),
    apart(gated(3, 264, 258, kHf, MV_SILU, true)),
    apart(gated(19, 136, 514, kFp32, MV_GELU_TANH, true, 8)),
    apart(gated(132, 72, 262, kHf, MV_SILU, true)),
};
/* Every tile of the kernel for Hopper's tensor cores: of 64 tokens, 32, 64 and 96 outputs; of 128 tokens, 64 to 256
 * outputs, several of these in clusters, too; those that one warpgroup has for itself. */
constexpr Case kGatedTiles[] = {
    gated(33, 200, 202, kHf, MV_SILU, true),
    apart(gated(23, 2632, 70, kFp32, MV_SILU, true)),
    gated(64, 136, 128, kHf, MV_GELU, true),
    apart(gated(50, 136, 126, kHf, MV_SILU, true)),
    gated(48, 264, 192, kFp32, MV_SILU, true, 8),
    apart(gated(40, 72, 566, kHf, MV_GELU_TANH, true)),
    gated(100, 72, 128, kHf, MV_SILU, true),
    apart(gated(66, 72, 192, kHf, MV_SILU, true, 1)),
    gated(120, 136, 256, kFp32, MV_SILU, true),
    apart(gated(90, 72, 320, kHf, MV_GELU, true)),
    gated(96, 72, 384, kHf, MV_SILU, true, 8),
    apart(gated(122, 136, 442, kHf, MV_SILU, true)),
    gated(128, 72, 512, kHf, MV_GELU_TANH, true),
    apart(gated(390, 64, 192, kHf, MV_SILU, true)),
    gated(258, 328, 400, kFp32, MV_SILU, true, 8),
    gated(1030, 2048, 256, kHf, MV_SILU, true),
    apart(gated(5130, 1024, 192, kHf, MV_SILU, true, 8)),
};
/* Where float32 may become TF32. */
constexpr Case kTf32Projections[] = {
    {45, 456, 300, kHf, false, true, false, false, true, 0, 8, true},
    {150, 96, 130, kFp32, true, false, false, false, false, 0, 0, true},
};
constexpr Case kNorms[] = {
    {1, 1, 0, kHf, false, false, false, false, false, 0, 0},
    {7, 33, 0, kFp32, true, false, false, false, false, 1, 0},
    {37, 128, 0, kHf, false, false, true, false, false, 0, 0},
    {5, 256, 0, kHf, true, false, false, false, false, 0, 8},
    {600, 1000, 0, kHf, true, false, false, false, false, 0, 0},
    {3, 1027, 0, kFp32, true, false, true, false, false, 0.5f, 1},
    {3, 4096, 0, kHf, true, false, false, false, false, 0, 0},
    {2, 8200, 0, kFp32, true, false, false, false, false, 0, 0},
    {2, 16392, 0, kHf, true, false, false, false, false, 0, 8},
    {3, 8200, 0, kHf, false, false, false, false, false, 0, 0},
    {2, 16384, 0, kFp32, false, false, true, false, false, 0, 0},
    {2, 40000, 0, kHf, false, false, false, false, false, 0, 0},
    {100, 1000, 0, kHf, true, false, false, false, false, 0, 0},
    {100, 500, 0, kHf, true, false, false, false, false, 0, 0},
    {5, 1024, 0, kHf, true, false, false, false, false, 0, 0, false, true},
    {3, 1027, 0, kFp32, false, false, false, false, false, 0.5f, 1, false, true},
    {2, 40000, 0, kHf, true, false, false, false, false, 0, 0, false, true},
    {7, 33, 0, kFp32, true, false, false, false, false, 1, 0, false, false, true},
    {5, 256, 0, kHf, true, false, false, false, false, 0, 8, false, false, true},
    {100, 1000, 0, kHf, true, false, false, false, false, 0, 0, false, false, true},
    {600, 1000, 0, kFp32, true, false, false, false, false, 0, 0, false, false, true},
    {3, 1027, 0, kHf, true, false, true, false, false, 0.5f, 1, false, false, true},
    {2, 8200, 0, kFp32, true, false, false, false, false, 0, 0, false, true, true},
    {2, 16392, 0, kHf, true, false, false, false, false, 0, 8, false, false, true},
    {2, 40000, 0, kFp32, true, false, false, false, false, 0, 0, false, false, true},
    {5, 1024, 0, kOnce, true, false, false, false, false, 0, 0},
    {3, 1027, 0, kOnce, false, false, true, false, false, 0.5f, 1},
    {2, 40000, 0, kOnce, false, false, false, false, false, 0, 0},
    {100, 1000, 0, kOnce, true, false, false, false, false, 0, 0, false, false, true},
    {3, 1027, 0, kOnce, true, false, true, false, false, 0.5f, 1, false, false, true},
    {2, 40000, 0, kOnce, true, false, false, false, false, 0, 0, false, false, true},
};

/* Of rounding to T: half the distance of 1 and the next number. */
template <typename T> constexpr double kUnit = 0;
template <> constexpr double kUnit<float> = 0x1p-24;
template <> constexpr double kUnit<__half> = 0x1p-11;
template <> constexpr double kUnit<__nv_bfloat16> = 0x1p-8;

double activated(mv_activation activation, double z) {
    if (activation == MV_SILU) return z / (1 + std::exp(-z));
    if (activation == MV_GELU) return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    return z / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z)));
}

/* How far the results are, in units of what they may be: over 1 is wrong; infinity: an error, or writes where none
 * belong. */
template <typename T> double run(const mv_row &row, const Case &c, bool static_weights, bool *took) {
    cpu::guard::begin(row.name, static_weights);
    std::mt19937 bits(static_cast<unsigned>(c.tokens * 7919 + c.hidden));
    std::normal_distribution<double> normal;
    const auto draw = [&] { return normal(bits); };
    const bool projects = c.outputs > 0;
    const int width = !projects ? c.hidden : c.gated ? c.outputs / 2 : c.outputs;
    Rows<T> x(c.tokens, c.hidden, c.pad, kWritten), residual = x, sum = x, out(c.tokens, width, c.pad, kWritten);
    Rows<T> matrix(projects ? c.outputs : 0, c.hidden, 0, kParameters), narrow(1, c.hidden, 0, kParameters),
        bias(1, projects ? c.outputs : width, 0, kParameters);
    Rows<float> wide(1, c.hidden, 0, kParameters);
    x.fill(draw);
    residual.fill(draw);
    matrix.fill([&] { return 0.05 * draw(); });
    wide.fill([&] { return c.no_norm_weight ? 1 : 1 + 0.2 * draw(); });
    bias.fill(draw);
    for (int k = 0; k < c.hidden; k++) {
        narrow.at(0, k) = T(wide.at(0, k));
        if (!c.wide_norm_weight) wide.at(0, k) = static_cast<float>(narrow.at(0, k));
    }
    Rows<T> turned(c.hidden, projects ? c.outputs : 0, 0, kParameters);
    for (int n = 0; n < matrix.count; n++)
        for (int k = 0; k < c.hidden; k++) turned.at(k, n) = matrix.at(n, k);

    Rows<T> halves(matrix.count, c.hidden, 8, kParameters);
    for (int n = 0; n < matrix.count; n++)
        for (int k = 0; k < c.hidden; k++) halves.at((n + width) % matrix.count, k) = matrix.at(n, k);

    mv_task task = {};
    task.device.kind = MV_CUDA;
    task.sm_count = c.tokens % 2 ? 132 : 2; /* few SMs: large tiles */
    task.compute_capability = 90;
    task.programmatic_launch = true;
    task.l2_bytes = 3700000; /* less than the last of the large ones asks of it */
    task.smem_bytes = cpu::kSharedBytes;
    task.dtype = task.linear.weight_dtype = row.dtype;
    task.tokens = task.inner = c.tokens;
    task.hidden = c.hidden;
    task.norm.eps = 1e-6f;
    task.rounding = c.rounding;
    task.norm.weight_offset = c.weight_offset;
    task.linear.allow_tf32 = c.allow_tf32;
    task.static_weights = static_weights;
    task.x = x.view();
    task.out = out.view();
    const bool before = c.residual && !c.behind;
    if (before) task.norm.residual = residual.view(), task.norm.residual_out = sum.view();
    if (c.behind) task.norm.added = residual.view();
    task.norm.weight = c.wide_norm_weight ? static_cast<void *>(wide.values.data()) : narrow.values.data();
    if (c.no_norm_weight || c.plain_x) task.norm.weight = nullptr;
    Rows<T> addend(c.tokens, width, c.pad, kWritten);
    addend.fill(draw);
    if (c.scale != 0) {
        if (c.tokens % 2) out.values = addend.values;
        task.linear.addend = c.tokens % 2 ? out.view() : addend.view();
    }
    task.linear.plain_x = c.plain_x;
    task.linear.scale = c.scale;
    task.op = "driver";
    task.norm.weight_dtype = c.wide_norm_weight ? MV_F32 : row.dtype;
    task.linear.outputs = c.outputs;
    task.linear.packed = projects && !c.tuple && !c.gated;
    task.linear.gated = c.gated;
    task.activation = c.activation;
    for (int i = 0, first = 0; i < 3 && projects; i++) {
        const int end = task.linear.packed ? c.outputs : c.gated ? c.outputs * (i + 1) / 2 : c.outputs * (i + 2) / 4;
        mv_block &block = task.linear.block[i];
        block.outputs = end - first;
        block.weight = c.in_out ? &turned.at(0, first) : &matrix.at(first, 0);
        block.row_stride = c.in_out ? 1 : c.hidden;
        block.col_stride = c.in_out ? c.outputs : 1;
        block.bias = c.bias ? &bias.at(0, first) : nullptr;
        block.bias_dtype = row.dtype;
        if (c.gated && c.tuple) block.weight = &halves.at(width - first, 0), block.row_stride = halves.stride;
        first = end;
        if (end == c.outputs) break;
    }
    mv_decision decision;
    *took = !row.decide(&task, MV_ANY_PRICE, &decision);
    if (!*took) return 0;
    std::vector<uint4, cpu::guard::Allocator<uint4>> workspace(decision.workspace / 16 + 1,
                                                               cpu::guard::Allocator<uint4>{kWritten});
    task.workspace = workspace.data();
    mv_error error;
    if (row.run(&task, &decision, &error) != MV_OK) {
        printf("%s: %s\n", row.name, error.text);
        return INFINITY;
    }

    const bool rounds = c.rounding != kFp32;
    const auto rounded = [](double v) { return static_cast<double>(static_cast<float>(T(static_cast<float>(v)))); };
    std::vector<double> y(c.hidden), weights(matrix.values.size());
    for (size_t i = 0; i < weights.size(); i++) weights[i] = static_cast<float>(matrix.values[i]);
    double worst = 0;
    int64_t others = 0; /* not the number that the exact result rounds to */
    for (int t = 0; t < c.tokens; t++) {
        double squares = 0;
        for (int k = 0; k < c.hidden; k++) {
            y[k] = static_cast<float>(x.at(t, k));
            if (before) {
                y[k] = rounded(y[k] + static_cast<float>(residual.at(t, k)));
                if (static_cast<float>(sum.at(t, k)) != y[k]) return INFINITY;
            }
            squares += y[k] * y[k];
        }
        const double r = 1 / std::sqrt(squares / c.hidden + 1e-6);
        for (int k = 0; k < c.hidden; k++) {
            const double normalised = c.rounding == kHf ? rounded(y[k] * r) : y[k] * r;
            if (c.plain_x) continue;
            y[k] = normalised * (c.weight_offset + wide.at(0, k));
            if (rounds && (projects || c.behind)) y[k] = rounded(y[k]);
        }
        const auto rounded_at_any_side = [&](double *exact, double *before) {
            if (!rounds) return;
            *exact = rounded(*exact);
            *before += 2 * kUnit<T> * (std::fabs(*exact) + *before); /* a spacing, or less, between two roundings */
        };
        /* The sum of an output with its bias, and how far a kernel's may be from it: the float32 sum, whose roundings
         * are random: five standard deviations where partial sums are as large as the root of the squares of their
         * terms, which leaves no room for TF32; the roundings of y, which are random: in "fp32" those of all terms,
         * 0.41 units each, five standard deviations of their sum; else of the few that go the other way; and of
         * TF32, both factors' of every term. */
        const auto sum_of = [&](int n, double *exact) {
            double terms = 0, term_squares = 0;
            *exact = 0;
            for (int k = 0; k < c.hidden; k++) {
                const double term = y[k] * weights[static_cast<size_t>(n) * c.hidden + k];
                *exact += term;
                terms += std::fabs(term);
                term_squares += term * term;
            }
            if (c.bias) *exact += static_cast<float>(bias.at(0, n));
            const double of_y = c.plain_x ? 0 : rounds ? terms / 8 : 5 * 0.41 * std::sqrt(term_squares);
            const double of_tf32 = c.allow_tf32 && row.dtype == MV_F32 ? 5 * 0.58 * std::sqrt(term_squares) : 0;
            return 5 * 0x1p-24 * std::sqrt(c.hidden * term_squares) + kUnit<T> * of_y + 0x1p-11 * of_tf32;
        };
        for (int n = 0; n < width; n++) {
            double exact = projects ? 0 : y[n], before = projects ? sum_of(n, &exact) : 0;
            const double of_norm = std::fabs(exact); /* where a residual joins it, both are rounded */
            if (c.behind) exact += static_cast<float>(residual.at(t, n));
            before += 0x1p-20 * (std::fabs(exact) + of_norm) + 1e-30;
            if (c.scale != 0) {
                rounded_at_any_side(&exact, &before);
                exact *= static_cast<double>(c.scale);
                before = std::fabs(c.scale) * before + 0x1p-23 * std::fabs(exact);
                if (c.scale != 1) rounded_at_any_side(&exact, &before);
                exact += static_cast<float>(addend.at(t, n));
                before += 0x1p-23 * std::fabs(exact);
            }
            if (c.gated) { /* no activation is steeper than 1.13; their own errors are below 2^-19 */
                double up, of_up = sum_of(width + n, &up);
                of_up += 0x1p-20 * std::fabs(up);
                rounded_at_any_side(&exact, &before);
                rounded_at_any_side(&up, &of_up);
                double active = activated(c.activation, exact);
                before = 1.13 * before + 0x1p-19 * std::fabs(active);
                rounded_at_any_side(&active, &before);
                exact = active * up;
                before = before * (std::fabs(up) + of_up) + std::fabs(active) * of_up + 1e-30;
            }
            /* The last rounding; of a norm, each of its roundings may go the other way, where r is a unit off. */
            const double roundings = projects ? 0 : c.behind ? 3 : 2;
            const double may = before + kUnit<T> * (std::fabs(exact) + roundings * of_norm);
            const double far = std::fabs(static_cast<float>(out.at(t, n)) - exact) / may;
            if (std::isnan(far)) return INFINITY;
            worst = std::max(worst, far);
            others += static_cast<float>(out.at(t, n)) != rounded(exact);
        }
    }
    /* All roundings are those of the reference, so only noise moves a result; another rounding of y moves a quarter of
     * them. */
    if (sizeof(T) == 2 && rounds && others > 4 + 0.08 * c.tokens * width) {
        printf("%s: %d of %d results are others\n", row.name, static_cast<int>(others), c.tokens * width);
        return INFINITY;
    }
    return out.gaps_untouched() && (!before || sum.gaps_untouched()) ? worst : INFINITY;
}

/* Those whose products have no pairs. */
bool has_no_pairs(const mv_row &row) {
    return strstr(row.name, "heads") || !strcmp(row.name, "bf16_wgmma_sm90a") || strstr(row.name, "few") ||
           strstr(row.name, "3xtf32") || (strstr(row.name, "_ffma_sm80") && !strstr(row.name, "norm"));
}

/* Those whose tasks always have a norm. */
bool needs_norm(const mv_row &row) {
    return strstr(row.name, "heads") || !strcmp(row.name, "bf16_wgmma_sm90a") ||
           (strstr(row.name, "_ffma_sm80") && !strstr(row.name, "norm"));
}

/* The number of wrong results of the rows that have `part` in their names. */
template <size_t kCount> int run_all(const mv_list &list, const Case (&cases)[kCount], const char *part = "") {
    int wrong = 0;
    for (int i = 0; i < list.count; i++) {
        const mv_row &row = list.rows[i];
        if (row.backend != MV_CUDA || !strstr(row.name, part)) continue;
        if (!row.run) {
            printf("%s %s is not linked here\n", list.op, row.name);
            continue;
        }
        int took = 0;
        double worst = 0;
        for (const Case &c : cases) {
            bool ran;
            const bool static_weights = took % 2 == 0;
            const double far = row.dtype == MV_F32   ? run<float>(row, c, static_weights, &ran)
                               : row.dtype == MV_F16 ? run<__half>(row, c, static_weights, &ran)
                                                     : run<__nv_bfloat16>(row, c, static_weights, &ran);
            took += ran;
            worst = std::max(worst, far);
            if (!(far <= 1)) {
                printf("WRONG: %s with %d tokens, hidden %d, %d outputs: %g\n", row.name, c.tokens, c.hidden, c.outputs,
                       far);
                wrong++;
            }
        }
        printf("%s %s %d cases, at most %.2f of what is allowed\n", list.op, row.name, took, worst);
        const bool refuses = (cases[0].plain_x && needs_norm(row)) || (cases[0].gated && has_no_pairs(row));
        wrong += refuses ? took != 0 : took == 0;
    }
    return wrong;
}

} // namespace

/* With an argument: only the norms. */
int main(int count, char **) {
    int wrong = run_all(mv_rms_norm_list, kNorms);
    if (count == 1)
        wrong += run_all(mv_rms_norm_qkv_list, kProjections) +
                 run_all(mv_rms_norm_qkv_list, kLargeProjections, "wgmma") +
                 run_all(mv_rms_norm_qkv_list, kTf32Projections, "3xtf32") + run_all(mv_rms_norm_qkv_list, kLinears) +
                 run_all(mv_rms_norm_qkv_list, kGated) + run_all(mv_rms_norm_qkv_list, kGatedTiles, "norm_wgmma") +
                 run_all(mv_rms_norm_qkv_list, kLargeLinears, "wgmma") +
                 run_all(mv_rms_norm_qkv_list, kTf32Linears, "3xtf32");
    return wrong != 0;
}
