/* greedy_tokens.cpp: runs the CUDA kernels of greedy_tokens on rows of many lengths, aligned and not, in one block and
 * in clusters, and holds tokens, flags, history and counts to plain loops. Prints a line for each kernel; the exit
 * status is 1 if one is wrong; a kernel that reads or writes too early ends the run. */
#include "cuda_on_cpu.h"
#include "rows.h"

#include <cmath>
#include <random>

extern "C" {
#include "ops/dispatch.h"
}

namespace {

struct Case {
    int outer, inner; /* rows in two dimensions that do not merge */
    int vocabulary, pad;
    int sm_count; /* many: clusters */
    bool ends = false, counts = false, positions = false;
};

constexpr Case kCases[] = {
    {1, 1, 1, 0, 132},
    {1, 3, 7, 1, 132, true, true, true},
    {2, 2, 64, 8, 1, true},
    {2, 3, 1000, 0, 132, false, true},
    {1, 2, 1003, 5, 132, false, false, true},
    {1, 1, 8192, 0, 132, true, true, true},
    {1, 2, 20000, 0, 8, true, true, true},
    {1, 1, 33001, 3, 8, true, true, true},
    {3, 1, 40000, 8, 4, true, true, true},
};
enum Kind { kNormal, kTies, kNan, kInfinite, kZeros, kKinds };
constexpr int kLength = 4; /* of history */

template <typename T> int largest_of(Rows<T> &logits, int row) {
    int found = 0;
    for (int i = 1; i < logits.length; i++) {
        const float now = logits.at(row, i), most = logits.at(row, found);
        if (now > most || (std::isnan(now) && !std::isnan(most))) found = i;
    }
    return found;
}

template <typename T> int run(const mv_row &row, const Case &c, Kind kind) {
    cpu::guard::begin(row.name, false);
    std::mt19937 bits(static_cast<unsigned>(c.vocabulary * 7919 + kind));
    std::normal_distribution<float> normal;
    const int rows = c.outer * c.inner, gap = 2, lines = c.outer * (c.inner + gap);
    Rows<T> logits(lines, c.vocabulary, c.pad, kWritten);
    for (int r = 0; r < lines; r++)
        for (int i = 0; i < c.vocabulary; i++) {
            const bool is_rare = bits() % 400 == 0;
            const float v = kind == kTies             ? static_cast<float>(bits() % 3)
                            : kind == kInfinite       ? (r % 2 && is_rare ? -1e30f : -INFINITY)
                            : kind == kZeros          ? (bits() % 2 ? 0.0f : -0.0f)
                            : kind == kNan && is_rare ? (bits() % 2 ? NAN : INFINITY)
                                                      : 3 * normal(bits);
            logits.at(r, i) = T(v);
        }
    Rows<int64_t> out(1, lines, 0, kWritten), counts = out, positions = out, history(lines, kLength, 1, kWritten);
    Rows<uint8_t> finished(1, lines, 0, kWritten), ends(1, c.vocabulary, 0, kWritten);
    Rows<int64_t> pad(1, 1, 0, kWritten);
    for (int r = 0; r < lines; r++) {
        finished.at(0, r) = r % 3 == 2;
        counts.at(0, r) = r % 4 == 3 ? -1 : (r + kLength) % (kLength + 2); /* some are no place in the history */
        positions.at(0, r) = 100 * r;
        for (int i = 0; i < kLength; i++) history.at(r, i) = -5;
    }
    for (int i = 0; i < c.vocabulary; i++) ends.at(0, i) = i % 2;
    pad.at(0, 0) = c.outer == 2 ? c.vocabulary : c.vocabulary - 1;
    Rows<uint8_t> finished_before = finished;
    Rows<int64_t> counts_before = counts;

    mv_task task = {};
    task.device.kind = MV_CUDA;
    task.sm_count = c.sm_count;
    task.compute_capability = 90;
    task.smem_bytes = cpu::kSharedBytes;
    task.dtype = row.dtype;
    task.tokens = rows;
    task.inner = c.inner;
    task.hidden = c.vocabulary;
    const auto by_row = [&](auto &of, int64_t step) { return mv_rows{of.values.data(), (c.inner + gap) * step, step}; };
    task.x = by_row(logits, logits.stride);
    task.out = by_row(out, 1);
    if (c.ends) {
        task.greedy.finished = by_row(finished, 1);
        task.greedy.ends = reinterpret_cast<const bool *>(ends.values.data());
        task.greedy.pad = pad.values.data();
    }
    if (c.counts) {
        task.greedy.history = by_row(history, history.stride);
        task.greedy.counts = by_row(counts, 1);
        task.greedy.length = kLength;
    }
    if (c.positions) task.greedy.positions = by_row(positions, 1);

    mv_error error;
    mv_decision decision;
    if (row.decide(&task, MV_ANY_PRICE, &decision)) return 1;
    if (row.run(&task, &decision, &error) != MV_OK) {
        printf("%s: %s\n", row.name, error.text);
        return 1;
    }

    int wrong = !logits.gaps_untouched() + !history.gaps_untouched();
    for (int r = 0; r < lines; r++) {
        const bool is_row = r % (c.inner + gap) < c.inner;
        const bool was_finished = finished_before.at(0, r);
        const int64_t token = c.ends && was_finished ? pad.at(0, 0) : largest_of(logits, r);
        const bool is_finished = was_finished || (is_row && c.ends && token < c.vocabulary && token % 2);
        const int64_t count = counts_before.at(0, r);
        wrong += is_row ? out.at(0, r) != token : out.at(0, r) != static_cast<int64_t>(Rows<int64_t>::kUntouched);
        wrong += finished.at(0, r) != is_finished;
        wrong += counts.at(0, r) != count + (is_row && c.counts);
        wrong += positions.at(0, r) != 100 * r + (is_row && c.positions);
        for (int i = 0; i < kLength; i++) wrong += history.at(r, i) != (is_row && c.counts && i == count ? token : -5);
    }
    return wrong;
}

} // namespace

int main() {
    int all_wrong = 0;
    for (int i = 0; i < mv_greedy_tokens_list.count; i++) {
        const mv_row &row = mv_greedy_tokens_list.rows[i];
        if (row.backend != MV_CUDA) continue;
        int cases = 0, wrong = 0;
        for (const Case &c : kCases)
            for (int kind = 0; kind < kKinds; kind++) {
                const int now = row.dtype == MV_F32   ? run<float>(row, c, static_cast<Kind>(kind))
                                : row.dtype == MV_F16 ? run<__half>(row, c, static_cast<Kind>(kind))
                                                      : run<__nv_bfloat16>(row, c, static_cast<Kind>(kind));
                cases++;
                wrong += now;
                if (now)
                    printf("WRONG: %s, case %d, kind %d: %d values\n", row.name, static_cast<int>(&c - kCases), kind,
                           now);
            }
        printf("greedy_tokens %s %d cases, %d wrong\n", row.name, cases, wrong);
        all_wrong += wrong;
    }
    return all_wrong != 0;
}
