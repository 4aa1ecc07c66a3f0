/* tiles.cpp: which tile the kernel for Hopper's tensor cores would take on a GPU of 132 SMs. Reads lines of tokens,
 * hidden, outputs and one of out_in, in_out and late, and writes a line for each: how the warpgroups share a tile
 * (0: its tokens, 1: its steps, 2: the tiles; 3: its tokens, where the row factor joins late), its outputs, the CTAs of
 * a cluster, whether rows are normalised meanwhile, and the waves. */
#include "cuda_on_cpu.h"

#include "cuda/wgmma_tiles.cuh"

#include <cstring>

int main() {
    int tokens, hidden, outputs;
    char what[16];
    while (scanf("%d %d %d %15s", &tokens, &hidden, &outputs, what) == 4) {
        const bool late = strcmp(what, "late") == 0;
        mv_task task = {};
        task.sm_count = 132;
        task.l2_bytes = 50 << 20;
        task.dtype = task.norm_weight_dtype = MV_BF16;
        task.packed = true;
        task.tokens = task.inner = tokens;
        task.hidden = hidden;
        task.x.inner_stride = hidden;
        task.outputs = task.block[0].outputs = outputs;
        task.block[0].col_stride = strcmp(what, "in_out") == 0 ? outputs : 1;
        const TileChoice choice = late ? choose_late_tile(&task) : choose_tile(&task);
        printf("%d %d %u %d %lld\n", late ? 3 : static_cast<int>(choice.sharing), choice.outputs, choice.cluster,
               choice.meanwhile, static_cast<long long>(waves_of(&task, choice)));
    }
}
