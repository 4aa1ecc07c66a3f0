/* choice.cpp: what each row that can serve a call would take by its own estimate, on a GPU that need not be there.
 * Reads lines of the GPU's SMs and GB/s of memory, the op, the dtype (f32, f16 or bf16) and five sizes; writes a line
 * of names and microseconds for each, and of infinite prices none. The sizes: tokens, hidden, outputs, 0, 0; of
 * decode_attention sequences, columns of a head, keys, query heads and heads of keys. */
#include "cuda_on_cpu.h"

#include <cstring>

extern "C" {
#include "ops/dispatch.h"
}

namespace {

struct Sizes {
    long long of[5];
};

/* Something at an address that is aligned for all; nobody reads it. */
void *const kSomewhere = reinterpret_cast<void *>(4096);

mv_rows rows_of(int64_t inner, int64_t columns) { return {kSomewhere, inner * columns, columns}; }

void ask_linear(mv_task &task, const char *op, const Sizes &sizes) {
    const auto [tokens, hidden, outputs, unused, neither] = sizes.of;
    mv_linear_layer &layer = task.linear;
    task.tokens = task.inner = tokens;
    task.hidden = hidden;
    layer.plain_x = strncmp(op, "linear", 6) == 0;
    layer.gated = strcmp(op, "rms_norm_gate_up") == 0;
    layer.packed = !layer.gated;
    layer.outputs = outputs;
    layer.weight_dtype = task.norm.weight_dtype = task.dtype;
    const int blocks = layer.gated ? 2 : 1;
    for (int i = 0; i < blocks; i++) layer.block[i] = {kSomewhere, nullptr, outputs / blocks, hidden, 1, task.dtype};
    if (strcmp(op, "linear_add") == 0) layer.addend = rows_of(tokens, outputs), layer.scale = 1;
    if (!layer.plain_x) task.norm.weight = kSomewhere;
    task.x = rows_of(tokens, hidden);
    task.out = rows_of(tokens, outputs / blocks);
}

void ask_attention(mv_task &task, const Sizes &sizes) {
    const auto [sequences, dim, keys, heads, kv_heads] = sizes.of;
    mv_attention &a = task.attention;
    task.tokens = sequences * heads;
    task.inner = heads;
    task.hidden = dim;
    task.x = task.out = rows_of(heads, dim);
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.k = a.v = rows_of(kv_heads, dim);
    a.q_norm = a.k_norm = {kSomewhere, task.dtype, 1e-6f, 0};
    a.rotary = {kSomewhere, kSomewhere, task.dtype, dim, dim, dim, false};
    a.keys = a.values = {kSomewhere, keys * kv_heads * dim, dim, keys * dim};
    a.rows = a.block_rows = keys;
    a.blocks = sequences;
    a.static_rows = true;
    a.positions = {kSomewhere, 1, true};
    a.window = INT64_MAX;
}

} // namespace

int main() {
    int sm_count, memory_gbs;
    char op[32], dtype[8];
    Sizes sizes;
    long long *of = sizes.of;
    while (scanf("%d %d %31s %7s %lld %lld %lld %lld %lld", &sm_count, &memory_gbs, op, dtype, of, of + 1, of + 2,
                 of + 3, of + 4) == 9) {
        const bool attends = strcmp(op, "decode_attention") == 0;
        mv_task task = {};
        task.op = op;
        task.device.kind = MV_CUDA;
        task.compute_capability = 90;
        task.sm_count = sm_count;
        task.memory_gbs = memory_gbs;
        task.l2_bytes = 50 << 20;
        task.smem_bytes = 227 << 10;
        task.programmatic_launch = task.static_weights = true;
        task.dtype = strcmp(dtype, "f32") == 0 ? MV_F32 : strcmp(dtype, "f16") == 0 ? MV_F16 : MV_BF16;
        attends ? ask_attention(task, sizes) : ask_linear(task, op, sizes);
        const mv_list &list = attends ? mv_decode_attention_list : mv_rms_norm_qkv_list;
        for (int i = 0; i < list.count; i++) {
            const mv_row &row = list.rows[i];
            mv_decision decision;
            if (row.backend != MV_CUDA || row.dtype != task.dtype || !row.decide) continue;
            if (row.decide(&task, MV_ANY_PRICE, &decision) || decision.us == HUGE_VAL) continue;
            printf("%s %.3f ", row.name, decision.us);
        }
        printf("\n");
    }
}
