/* act_and_mul.cpp: runs the CUDA kernels of silu_and_mul and gelu_and_mul on rows of many lengths, aligned and not,
 * with gaps, and holds every result to what it may be (tests/c/activation.h). Prints a line for each kernel; the exit
 * status is 1 if a result is wrong; a kernel that reads or writes too early ends the run. */
#include "cuda_on_cpu.h"
#include "rows.h"

#include <random>

#include "../c/activation.h"

extern "C" {
#include "ops/dispatch.h"
}

namespace {

struct Case {
    int tokens, hidden;
    int x_pad, out_pad; /* elements between rows */
    int inner;          /* of two leading dimensions, the outer of which runs backwards in x; 0: there is one */
    int sm_count;       /* few: two packets a thread */
};

constexpr Case kCases[] = {
    {1, 1, 0, 0, 0, 132},  {3, 8, 0, 0, 0, 132},   {300, 8, 0, 8, 0, 2},   {5, 33, 1, 3, 0, 132},
    {7, 64, 8, 0, 0, 1},   {6, 768, 0, 0, 3, 2},   {64, 24, 16, 8, 16, 1}, {2, 4864, 0, 0, 0, 132},
    {9, 4864, 8, 8, 3, 1}, {3, 14336, 0, 0, 0, 1}, {2, 4099, 3, 1, 0, 1},  {4, 1000, 1, 0, 0, 132},
    {1, 9000, 0, 5, 0, 1}, {17, 1028, 0, 0, 0, 2}, {3, 4, 8, 4, 0, 132},   {40, 96, 0, 1, 8, 1},
};
constexpr float kSpecial[] = {0.0f,  -0.0f,  INFINITY, -INFINITY, NAN,   1e4f,
                              -1e4f, -88.0f, -89.5f,   -104.5f,   6e-8f, -12.0f};

/* The number of wrong results and of gaps that were written to. */
template <typename T> int run(const mv_row &row, const Case &c, mv_activation activation, mv_rounding rounding) {
    cpu::guard::begin(row.name, false);
    std::mt19937 bits(static_cast<unsigned>(c.tokens * 7919 + c.hidden));
    std::normal_distribution<float> normal;
    Rows<T> x(c.tokens, 2 * c.hidden, c.x_pad, kWritten), out(c.tokens, c.hidden, c.out_pad, kWritten);
    x.fill([&] { return bits() % 16 ? 3 * normal(bits) : kSpecial[bits() % std::size(kSpecial)]; });
    mv_task task = {};
    task.device.kind = MV_CUDA;
    task.sm_count = c.sm_count;
    task.compute_capability = 90;
    task.smem_bytes = cpu::kSharedBytes;
    task.dtype = row.dtype;
    task.tokens = c.tokens;
    task.inner = c.inner ? c.inner : c.tokens;
    task.hidden = c.hidden;
    task.activation = activation;
    task.rounding = rounding;
    task.out = out.view();
    const int inner = static_cast<int>(task.inner), last = c.tokens - inner;
    task.x = {&x.at(last, 0), -static_cast<int64_t>(inner) * x.stride, x.stride};
    task.out.outer_stride = static_cast<int64_t>(inner) * out.stride;
    mv_error error;
    mv_decision decision;
    if (row.decide(&task, MV_ANY_PRICE, &decision) || row.run(&task, &decision, &error) != MV_OK) {
        printf("%s: %s\n", row.name, error.text);
        return 1;
    }
    int wrong = !out.gaps_untouched();
    for (int t = 0; t < c.tokens; t++)
        for (int i = 0, from = last - t / inner * inner + t % inner; i < c.hidden; i++) {
            const float gate = x.at(from, i), up = x.at(from, c.hidden + i), got = out.at(t, i);
            wrong += !act_and_mul_is_right(activation, rounding, row.dtype, gate, up, got);
        }
    return wrong;
}

} // namespace

int main() {
    int all_wrong = 0;
    for (int i = 0; i < mv_act_and_mul_list.count; i++) {
        const mv_row &row = mv_act_and_mul_list.rows[i];
        if (row.backend != MV_CUDA) continue;
        int cases = 0, wrong = 0;
        for (const Case &c : kCases)
            for (mv_activation activation : {MV_SILU, MV_GELU_TANH, MV_GELU})
                for (mv_rounding rounding : {MV_ROUNDING_HF, MV_ROUNDING_HF_ONCE, MV_ROUNDING_FP32}) {
                    const int now = row.dtype == MV_F32   ? run<float>(row, c, activation, rounding)
                                    : row.dtype == MV_F16 ? run<__half>(row, c, activation, rounding)
                                                          : run<__nv_bfloat16>(row, c, activation, rounding);
                    cases++;
                    wrong += now;
                    if (now)
                        printf("WRONG: %s with %d tokens, hidden %d, activation %d, rounding %d: %d results\n",
                               row.name, c.tokens, c.hidden, activation, rounding, now);
                }
        printf("act_and_mul %s %d cases, %d wrong results\n", row.name, cases, wrong);
        all_wrong += wrong;
    }
    return all_wrong != 0;
}
