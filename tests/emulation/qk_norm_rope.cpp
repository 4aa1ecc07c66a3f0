/* qk_norm_rope.cpp: runs the CUDA kernels of qk_norm_rope on heads, rows and caches of many kinds, and holds both
 * results and what the caches hold afterwards to float64. Prints a line for each kernel; the exit status is 1 if one is
 * wrong; a kernel that reads or writes too early ends the run. */
#include "cuda_on_cpu.h"
#include "heads.h"

#include <cstring>
#include <random>

extern "C" {
#include "ops/dispatch.h"
}

namespace {

struct Case {
    int outer, inner; /* tokens in two dimensions that do not merge */
    int heads, kv_heads, dim;
    int columns = 0; /* of the rotary embedding */
    bool norm = false, interleaved = false, in_place = false, one_row = false;
    int block_rows = 0; /* of the cache; 0: there is none */
    mv_rounding rounding = MV_ROUNDING_HF;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 64},
    {1, 5, 4, 2, 128, 128, true},
    {3, 2, 16, 8, 128, 128, true, false, true, false, 4},
    {2, 3, 3, 5, 80, 80, true, true, false, true, 1},
    {2, 3, 2, 1, 33, 20, true, false, false, false, 3, MV_ROUNDING_FP32},
    {4, 1, 2, 2, 96, 24, false, true, true, false, 16},
    {1, 3, 1, 1, 1},
    {2, 2, 1, 1, 1024, 1024, true},
    {1, 4, 4, 2, 128, 128, true, false, false, false, 3, MV_ROUNDING_HF_ONCE},
};

template <typename T> int run(const mv_row &row, const Case &c) {
    cpu::guard::begin(row.name, false);
    std::mt19937 bits(static_cast<unsigned>(c.heads * 7919 + c.dim));
    std::normal_distribution<double> normal;
    const auto draw = [&] { return normal(bits); };
    const int tokens = c.outer * c.inner, gap = 5; /* of tokens between two of the outer dimension */
    const int lines = c.outer * (c.inner + gap), blocks = c.block_rows ? tokens / c.block_rows + 2 : 1;
    const auto token_rows = [&](int heads) { return Rows<T>(lines * heads, c.dim, 3, kWritten); };
    Rows<T> q = token_rows(c.heads), k = token_rows(c.kv_heads), v = k, out_q = q, out_k = k;
    Rows<T> keys(blocks * c.kv_heads * std::max(c.block_rows, 1), c.dim, 1, kWritten), values = keys;
    Rows<T> q_weight(1, c.dim, 0, kParameters), k_weight = q_weight;
    Rows<T> rotary(tokens, 2 * std::max(c.columns, 1), 0, kWritten);
    Rows<int32_t> slots(1, tokens, 0, kWritten);
    for (Rows<T> *rows : {&q, &k, &v, &q_weight, &k_weight, &rotary}) rows->fill(draw);
    for (Rows<T> *rows : {&keys, &values}) rows->fill([] { return NAN; });
    const int places = std::max(blocks * c.block_rows, 1);
    for (int t = 0; t < tokens; t++) /* skipped: negative, and outside of the cache */
        slots.at(0, t) = t == 1 ? -1 : t == 2 ? places : t == 3 ? INT32_MAX : t == 4 ? INT32_MIN : (t + 3) % places;
    Rows<T> q_before = q, k_before = k, keys_before = keys, values_before = values;

    mv_task task = {};
    task.device.kind = MV_CUDA;
    task.sm_count = 16;
    task.compute_capability = 90;
    task.smem_bytes = cpu::kSharedBytes;
    task.dtype = row.dtype;
    task.rounding = c.rounding;
    task.tokens = tokens;
    task.inner = c.inner;
    task.hidden = c.dim;
    const auto by_token = [&](Rows<T> &rows, int heads) {
        const int64_t token = static_cast<int64_t>(heads) * rows.stride;
        return mv_rows{rows.values.data(), token * (c.inner + gap), token};
    };
    mv_qk &qk = task.qk;
    task.x = by_token(q, c.heads);
    task.out = by_token(c.in_place ? q : out_q, c.heads);
    qk.heads = c.heads;
    qk.kv_heads = c.kv_heads;
    qk.k = by_token(k, c.kv_heads);
    qk.out_k = by_token(c.in_place ? k : out_k, c.kv_heads);
    qk.q_stride = qk.out_q_stride = qk.k_stride = qk.out_k_stride = qk.v_stride = q.stride;
    qk.q_norm = {c.norm ? q_weight.values.data() : nullptr, row.dtype, 1e-6f, 0.5f};
    qk.k_norm = {c.norm ? k_weight.values.data() : nullptr, row.dtype, 1e-6f, 0.5f};
    if (c.columns) {
        const int64_t step = c.one_row ? 0 : rotary.stride;
        qk.rotary.dtype = row.dtype;
        qk.rotary.columns = c.columns;
        qk.rotary.interleaved = c.interleaved;
        qk.cos = {rotary.values.data(), step * c.inner, step};
        qk.sin = {rotary.values.data() + c.columns, step * c.inner, step};
    }
    const int64_t head = static_cast<int64_t>(c.block_rows) * keys.stride; /* [blocks, kv_heads, rows, dim] */
    if (c.block_rows) {
        qk.v = by_token(v, c.kv_heads);
        qk.slots = {slots.values.data(), c.inner, 1};
        qk.keys = {keys.values.data(), head * c.kv_heads, keys.stride, head};
        qk.values = {values.values.data(), head * c.kv_heads, values.stride, head};
        qk.blocks = blocks;
        qk.block_rows = c.block_rows;
    }

    mv_error error;
    mv_decision decision;
    if (row.decide(&task, MV_ANY_PRICE, &decision)) return 1;
    if (row.run(&task, &decision, &error) != MV_OK) {
        printf("%s: %s\n", row.name, error.text);
        return 1;
    }

    int wrong = 0;
    const auto same = [](T x, T y) { return memcmp(&x, &y, sizeof x) == 0; };
    const auto line = [&](int t, int heads) { return (t / c.inner * (c.inner + gap) + t % c.inner) * heads; };
    const auto compare = [&](Rows<T> &from, Rows<T> &before, Rows<T> &to, Rows<T> &weight, int heads) {
        wrong += !to.gaps_untouched();
        int others = 0; /* not the number that the exact result rounds to: noise moves a few */
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < heads; h++) {
                const int at = line(t, heads) + h;
                const Values exact = prepared(c, before, at, weight, rotary, c.one_row ? 0 : t);
                double largest = 0;
                for (double value : exact) largest = std::max(largest, std::fabs(value));
                const double may = (c.norm || c.columns ? 8 : 0) * kUnit<T> * largest;
                for (int i = 0; i < c.dim; i++) {
                    wrong += !(std::fabs(static_cast<float>(to.at(at, i)) - exact[i]) <= may);
                    others += static_cast<float>(to.at(at, i)) != rounded<T>(exact[i]);
                    before.at(at, i) = to.at(at, i);
                    if (!c.in_place) from.at(at, i) = to.at(at, i);
                }
            }
        wrong += sizeof(T) == 2 && c.rounding != MV_ROUNDING_FP32 && others > 4 + 0.05 * tokens * heads * c.dim;
        for (int r = 0; r < from.count; r++) /* between the tokens nothing was written */
            for (int i = 0; i < c.dim; i++) wrong += !same(from.at(r, i), before.at(r, i));
    };
    compare(q, q_before, c.in_place ? q : out_q, q_weight, c.heads);
    compare(k, k_before, c.in_place ? k : out_k, k_weight, c.kv_heads);
    Rows<T> &made = c.in_place ? k : out_k;
    for (int t = 0; t < tokens && c.block_rows; t++) {
        const int slot = slots.at(0, t);
        for (int h = 0; h < c.kv_heads && slot >= 0 && slot < places; h++)
            for (int i = 0; i < c.dim; i++) {
                const int at = (slot / c.block_rows * c.kv_heads + h) * c.block_rows + slot % c.block_rows;
                keys_before.at(at, i) = made.at(line(t, c.kv_heads) + h, i);
                values_before.at(at, i) = v.at(line(t, c.kv_heads) + h, i);
            }
    }
    for (int r = 0; r < keys.count; r++)
        for (int i = 0; i < c.dim; i++)
            wrong += !same(keys.at(r, i), keys_before.at(r, i)) || !same(values.at(r, i), values_before.at(r, i));
    return wrong + !keys.gaps_untouched() + !values.gaps_untouched();
}

} // namespace

int main() {
    int all_wrong = 0;
    for (int i = 0; i < mv_qk_norm_rope_list.count; i++) {
        const mv_row &row = mv_qk_norm_rope_list.rows[i];
        if (row.backend != MV_CUDA) continue;
        int cases = 0, wrong = 0;
        for (const Case &c : kCases) {
            const int now = row.dtype == MV_F32   ? run<float>(row, c)
                            : row.dtype == MV_F16 ? run<__half>(row, c)
                                                  : run<__nv_bfloat16>(row, c);
            cases++;
            wrong += now;
            if (now) printf("WRONG: %s, case %d: %d values\n", row.name, static_cast<int>(&c - kCases), now);
        }
        printf("qk_norm_rope %s %d cases, %d wrong\n", row.name, cases, wrong);
        all_wrong += wrong;
    }
    return all_wrong != 0;
}
