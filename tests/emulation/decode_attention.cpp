/* decode_attention.cpp: runs the CUDA kernels of decode_attention on sequences, heads and caches of many kinds, and
 * holds every result, and what the caches hold afterwards, to float64. Prints a line for each kernel; the exit status
 * is 1 if one is wrong; a kernel that reads or writes too early ends the run. */
#include "cuda_on_cpu.h"
#include "heads.h"

#include <cstring>
#include <random>

extern "C" {
#include "ops/dispatch.h"
}

namespace {

enum Cache { kStatic, kRing, kPaged };

struct Case {
    int positions[4]; /* of the sequences; kNone: there are no more */
    int heads, kv_heads, dim;
    Cache cache = kStatic;
    int rows = 0;   /* of a sequence, of a page; 0: one more than needed */
    int window = 0; /* 0: all */
    float soft_cap = 0;
    int start = 0;   /* of all sequences */
    int pad = 0;     /* elements between the rows of the caches */
    int columns = 0; /* of the rotary embedding */
    bool norm = false, interleaved = false, batch_invariant = false;
    mv_rounding rounding = MV_ROUNDING_HF;
};

constexpr int kNone = INT32_MIN;
constexpr Case kCases[] = {
    {{0, kNone}, 2, 2, 64},
    {{5, 63, 64, 300}, 2, 1, 64},
    {{200, -1, 130, 3}, 4, 2, 128, kStatic, 1000, 0, 0, 0, 0, 128, true},
    {{70, 3, kNone}, 8, 2, 80, kStatic, 0, 0, 0, 0, 0, 40, true, true},
    {{70, 90, kNone}, 8, 1, 96, kStatic, 91, 17, 30, 0, 8, 96, false, false, true},
    {{140, kNone}, 12, 1, 64, kStatic, 400, 0, 0, 9, 0, 0},
    {{33, kNone}, 40, 1, 64},
    {{65, 2, kNone}, 2, 2, 256, kStatic, 0, 0, 0, 0, 0, 256, true, false, false, MV_ROUNDING_FP32},
    {{20, 2, kNone}, 2, 2, 128, kStatic, 0, 0, 0, 0, 0, 128, true, false, false, MV_ROUNDING_HF_ONCE},
    {{90, 2, kNone}, 2, 2, 256, kStatic, 0, 0, 0, 0, 0, 256, true},
    {{260, 2, kNone}, 20, 1, 64, kStatic, 1000, 70, 0, 3, 8, 64},
    {{40, 41, kNone}, 3, 1, 72, kStatic, 0, 0, 0, 0, 1, 24, true},
    {{40, 7, kNone}, 3, 1, 33, kStatic, 0, 0, 0, 0, 0, 32},
    {{20, kNone}, 2, 1, 600},
    {{40, 65, 66, 131}, 2, 1, 64, kRing, 66, 66},
    {{40, 65, 166, 1131}, 2, 1, 32, kRing, 166, 100, 5},
    {{40, 65, 0, 131}, 4, 2, 64, kPaged, 16},
    {{140, 33, 2, 200}, 4, 1, 128, kPaged, 32, 70, 0, 20, 0, 128, true},
    {{700, 31, kNone}, 4, 1, 64, kStatic, 20000, 0, 0, 0, 8, 64, true}, /* more pieces than a cluster has blocks */
    {{500, kNone}, 3, 1, 128, kPaged, 16, 0, 0, 0, 0, 128, false, false, true},
    {{300, 17, kNone}, 9, 1, 96, kStatic, 2000, 0, 20, 3, 0, 96, true, false, false, MV_ROUNDING_FP32},
    {{260, 2, kNone}, 20, 1, 256, kStatic, 1000, 0, 0, 0, 0, 128, true, true},
    {{10, 1000, 5, 4}, 4, 1, 128, kStatic, 1000, 0, 0, 5}, /* out of the cache, and before the start */
    {{10, 99, 5, 4}, 2, 1, 64, kStatic, 60, 0, 0, 5},      /* the same, in fewer pieces */
};

/* Tensor cores take whole packets of 16 bytes, up to 256 columns of them, and queries rounded to float16; another row
 * takes everything. */
constexpr int kRefused = -1;
bool may_refuse(const mv_row &row, const Case &c) {
    return strstr(row.name, "_mma_") &&
           (c.dim % 8 != 0 || c.dim > 256 || c.pad % 8 != 0 || (row.name[0] == 'f' && c.rounding == MV_ROUNDING_FP32));
}

/* What the caller promises of the caches, and whether the positions are those that the kernel sees before its wait. */
enum Promise { kAnyRows, kStaticRows, kStaticRowsMoved };

template <typename T> int run(const mv_row &row, const Case &c, int sm_count, Promise promise) {
    cpu::guard::begin(row.name, false, promise != kAnyRows);
    cpu::guard::aim_is_old = promise == kStaticRowsMoved;
    std::mt19937 bits(static_cast<unsigned>(c.heads * 7919 + c.dim));
    std::normal_distribution<double> normal;
    const auto draw = [&] { return normal(bits); };
    int sequences = 0, longest = 0;
    while (sequences < 4 && c.positions[sequences] != kNone) longest = std::max(longest, c.positions[sequences++]);
    const int block_rows = c.rows ? c.rows : longest + 2;
    const int pages = c.cache == kPaged ? longest / block_rows + 2 : 1, blocks = sequences * pages;
    const auto token_rows = [&](int heads) { return Rows<T>(sequences * heads, c.dim, 8, kWritten); };
    Rows<T> q = token_rows(c.heads), k = token_rows(c.kv_heads), v = k, out = q;
    Rows<T> keys(blocks * c.kv_heads * block_rows, c.dim, c.pad, kCaches), values = keys;
    Rows<T> q_weight(1, c.dim, 0, kParameters), k_weight = q_weight;
    Rows<T> rotary(sequences, 2 * std::max(c.columns, 1), 0, kWritten);
    Rows<int32_t> positions(1, 4, 0, kWritten), starts = positions, table(sequences, pages, 1, kWritten);
    for (Rows<T> *rows : {&q, &k, &v, &q_weight, &k_weight, &rotary}) rows->fill(draw);
    for (Rows<T> *rows : {&keys, &values}) rows->fill([] { return NAN; });
    for (int s = 0; s < sequences; s++) {
        positions.at(0, s) = c.positions[s];
        starts.at(0, s) = c.start;
        for (int p = 0; p < pages; p++) table.at(s, p) = -1;
    }

    mv_task task = {};
    task.device.kind = MV_CUDA;
    task.sm_count = sm_count;
    task.compute_capability = 90;
    task.programmatic_launch = true;
    task.smem_bytes = cpu::kSharedBytes;
    task.dtype = row.dtype;
    task.rounding = c.rounding;
    task.batch_invariant = c.batch_invariant;
    task.tokens = sequences * c.heads;
    task.inner = c.heads;
    task.hidden = c.dim;
    const auto by_head = [](Rows<T> &rows, int heads) {
        return mv_rows{rows.values.data(), static_cast<int64_t>(heads) * rows.stride, rows.stride};
    };
    task.x = by_head(q, c.heads);
    task.out = by_head(out, c.heads);
    mv_attention &a = task.attention;
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.k = by_head(k, c.kv_heads);
    a.v = by_head(v, c.kv_heads);
    a.q_norm = {c.norm ? q_weight.values.data() : nullptr, row.dtype, 1e-6f, 0.5f};
    a.k_norm = {c.norm ? k_weight.values.data() : nullptr, row.dtype, 1e-6f, 0.5f};
    a.rotary = {
        rotary.values.data(), rotary.values.data() + c.columns, row.dtype, rotary.stride, rotary.stride, c.columns,
        c.interleaved};
    const auto cache = [&](Rows<T> &rows) { /* [blocks, kv_heads, rows, dim] */
                                            const int64_t head = static_cast<int64_t>(block_rows) * rows.stride;
                                            return mv_cache{rows.values.data(), head * c.kv_heads, rows.stride, head};
    };
    a.keys = cache(keys);
    a.values = cache(values);
    a.rows = static_cast<int64_t>(block_rows) * pages;
    a.block_rows = block_rows;
    a.blocks = blocks;
    a.block_table = c.cache == kPaged ? table.values.data() : nullptr;
    a.table_stride = table.stride;
    a.ring = c.cache == kRing;
    a.static_rows = promise != kAnyRows;
    a.positions = {positions.values.data(), 1, false};
    if (c.start) a.starts = {starts.values.data(), 1, false};
    a.window = c.window ? c.window : INT64_MAX;
    a.scale = 0.11f;
    a.soft_cap = c.soft_cap;

    const auto is_served = [&](int p) { return p >= c.start && (a.ring || p < a.rows); };
    const auto slot = [&](int s, int p, int head) { /* the row of `keys` */
                                                    const int at = a.ring ? p % block_rows : p,
                                                              block =
                                                                  c.cache == kPaged ? table.at(s, at / block_rows) : s;
                                                    return (block * c.kv_heads + head) * block_rows + at % block_rows;
    };
    const auto first_of = [&](int p) { return std::max({0, c.start, c.window ? p - c.window + 1 : 0}); };
    for (int s = 0; s < sequences; s++)
        for (int p = first_of(c.positions[s]); is_served(c.positions[s]) && p <= c.positions[s]; p++) {
            if (c.cache == kPaged) table.at(s, p / block_rows) = (p / block_rows * 7 + s) % pages * sequences + s;
            for (int h = 0; h < c.kv_heads && p < c.positions[s]; h++)
                for (int i = 0; i < c.dim; i++) {
                    keys.at(slot(s, p, h), i) = T(static_cast<float>(draw()));
                    values.at(slot(s, p, h), i) = T(static_cast<float>(draw()));
                }
        }
    Rows<T> keys_before = keys, values_before = values;

    mv_error error;
    mv_decision decision;
    if (row.decide(&task, MV_ANY_PRICE, &decision)) return may_refuse(row, c) ? kRefused : 1;
    std::vector<uint4, cpu::guard::Allocator<uint4>> workspace(decision.workspace / 16 + 1,
                                                               cpu::guard::Allocator<uint4>{kWritten});
    memset(workspace.data(), 0xff, workspace.size() * sizeof workspace[0]);
    task.workspace = workspace.data();
    if (row.run(&task, &decision, &error) != MV_OK) {
        printf("%s: %s\n", row.name, error.text);
        return 1;
    }

    int wrong = !out.gaps_untouched() || !keys.gaps_untouched() || !values.gaps_untouched();
    const auto same = [](T x, T y) { return memcmp(&x, &y, sizeof x) == 0; };
    for (int s = 0; s < sequences; s++) {
        const int position = c.positions[s];
        const bool skipped = position < 0, served = !skipped && is_served(position);
        for (int h = 0; h < c.heads; h++) {
            const int kv_head = h * c.kv_heads / c.heads;
            if (!served) {
                for (int i = 0; i < c.dim; i++) {
                    const float got = out.at(s * c.heads + h, i);
                    wrong += skipped ? got != 0 : !std::isnan(got);
                }
                continue;
            }
            const Values query = prepared(c, q, s * c.heads + h, q_weight, rotary, s);
            Values key = prepared(c, k, s * c.kv_heads + kv_head, k_weight, rotary, s);
            const int mine = slot(s, position, kv_head);
            double far = 0, largest = 0; /* of the key that was written */
            for (double value : key) largest = std::max(largest, std::fabs(value));
            for (int i = 0; i < c.dim; i++) {
                const double got = static_cast<float>(keys.at(mine, i));
                far = std::max(far, std::fabs(got - key[i]) / (kUnit<T> * largest));
                wrong += !same(values.at(mine, i), v.at(s * c.kv_heads + kv_head, i));
                key[i] = got;
                keys_before.at(mine, i) = keys.at(mine, i);
                values_before.at(mine, i) = values.at(mine, i);
            }
            wrong +=
                !(far <= (c.norm || c.columns ? 8 : 0)); /* roundings that go the other way, before and after the sum */
            const int first = first_of(position), count = position - first + 1;
            Values p(count);
            double most = -INFINITY, sum = 0, noise = 0;
            for (int j = 0; j < count; j++) {
                double score = 0, squares = 0;
                for (int i = 0; i < c.dim; i++) {
                    const double of =
                        j == count - 1 ? key[i] : static_cast<float>(keys.at(slot(s, first + j, kv_head), i));
                    score += query[i] * of;
                    squares += query[i] * query[i] * of * of;
                }
                p[j] = a.scale * score;
                if (c.soft_cap) p[j] = c.soft_cap * std::tanh(p[j] / c.soft_cap);
                most = std::max(most, p[j]);
                const double roundings = c.norm || c.columns ? 4 * kUnit<T> : 0; /* few go the other way, but all may */
                noise = std::max(noise, a.scale * std::sqrt(squares) * (5 * std::sqrt(c.dim) * 0x1p-24 + roundings));
            }
            for (double &weight : p) sum += weight = std::exp(weight - most);
            for (int i = 0; i < c.dim; i++) {
                double exact = 0, squares = 0;
                for (int j = 0; j < count; j++) {
                    const double term = p[j] / sum * static_cast<float>(values.at(slot(s, first + j, kv_head), i));
                    exact += term;
                    squares += term * term;
                }
                const double may = kUnit<T> * std::fabs(exact) * 1.01 + 1e-30 +
                                   5 * std::sqrt(squares) * (std::sqrt(count) * 0x1p-24 + 2 * noise + 0x1p-21);
                wrong += !(std::fabs(static_cast<float>(out.at(s * c.heads + h, i)) - exact) <= may);
            }
        }
    }
    for (int r = 0; r < keys.count; r++) /* nothing else was written */
        for (int i = 0; i < c.dim; i++)
            wrong += !same(keys.at(r, i), keys_before.at(r, i)) || !same(values.at(r, i), values_before.at(r, i));
    return wrong;
}

} // namespace

int main() {
    int all_wrong = 0;
    for (int i = 0; i < mv_decode_attention_list.count; i++) {
        const mv_row &row = mv_decode_attention_list.rows[i];
        if (row.backend != MV_CUDA) continue;
        int cases = 0, wrong = 0;
        for (const Case &c : kCases)
            for (int sm_count : {1, 16, 132})
                for (Promise promise : {kAnyRows, kStaticRows, kStaticRowsMoved}) {
                    if (promise != kAnyRows && sm_count != 16) continue;
                    const int now = row.dtype == MV_F32   ? run<float>(row, c, sm_count, promise)
                                    : row.dtype == MV_F16 ? run<__half>(row, c, sm_count, promise)
                                                          : run<__nv_bfloat16>(row, c, sm_count, promise);
                    if (now == kRefused) continue;
                    cases++;
                    wrong += now;
                    if (now)
                        printf("WRONG: %s, case %d with %d SMs, promise %d: %d values\n", row.name,
                               static_cast<int>(&c - kCases), sm_count, static_cast<int>(promise), now);
                }
        printf("decode_attention %s %d cases, %d wrong\n", row.name, cases, wrong);
        all_wrong += wrong;
    }
    return all_wrong != 0;
}
