/* tiles.cpp: which tile the kernels for Hopper's tensor cores would take on a GPU of 132 SMs. Reads lines of tokens,
 * hidden, outputs and one of out_in, in_out, gated, late, tf32 and tf32_allowed, and writes a line for each. Of 16
 * bits: how the warpgroups share a tile (0: its tokens, 1: its steps, 2: the tiles; 3: its tokens, where the row factor
 * joins late), its outputs, the CTAs of a cluster, whether rows are normalised meanwhile, and the waves. tf32: a tile's
 * tokens, how many tiles are whole, how many are split, and among how many CTAs. */
#include "cuda_on_cpu.h"

#include "cuda/linear/tf32_tiles.cuh"
#include "cuda/linear/wgmma_tiles.cuh"

#include <cstring>

int main() {
    int tokens, hidden, outputs;
    char what[16];
    while (scanf("%d %d %d %15s", &tokens, &hidden, &outputs, what) == 4) {
        const bool late = strcmp(what, "late") == 0;
        mv_task task = {};
        task.sm_count = 132;
        task.l2_bytes = 50 << 20;
        task.dtype = task.norm.weight_dtype = MV_BF16;
        task.linear.gated = strcmp(what, "gated") == 0;
        task.linear.packed = !task.linear.gated;
        task.tokens = task.inner = tokens;
        task.hidden = hidden;
        task.x.inner_stride = hidden;
        task.linear.outputs = task.linear.block[0].outputs = outputs;
        task.linear.block[0].col_stride = strcmp(what, "in_out") == 0 ? outputs : 1;
        if (strncmp(what, "tf32", 4) == 0) {
            task.linear.allow_tf32 = strcmp(what, "tf32_allowed") == 0;
            const Tf32TileChoice choice = choose_tf32_tile(&task);
            printf("%d %lld %lld %lld\n", choice.tokens, static_cast<long long>(choice.whole_tiles),
                   static_cast<long long>(choice.split_tiles), static_cast<long long>(choice.sharers));
            continue;
        }
        const WgmmaTileChoice choice = late ? choose_late_tile(&task) : choose_wgmma_tile(&task);
        printf("%d %d %u %d %lld\n", late ? 3 : static_cast<int>(choice.sharing), choice.outputs, choice.cluster,
               choice.meanwhile, static_cast<long long>(waves_of(&task, choice)));
    }
}
