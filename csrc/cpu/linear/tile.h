/* tile.h: the register tile of the prefill product, once per DTYPE after its units. */
#include "cpu/linear/stripe.h"

#ifndef MV_TILE_H
#define MV_TILE_H

#define READ_UNITS 1 /* of a row are read at a time: where they are not all there, the weights are staged */

/* The same bits in every lane; of any alignment. */
MV_INLINE vf broadcast_unit(const char *p) {
    float unit;
    memcpy(&unit, p, sizeof unit);
    return v_set(unit);
}
#endif

MV_INLINE void MV_NAME(begin_tiles, DTYPE)(void) {}
MV_INLINE void MV_NAME(end_tiles, DTYPE)(void) {}

/* sum[r][t] += the product of output r with token t, for TILE_ROWS(vectors) outputs and `vectors` vectors of tokens: in
 * registers over `piece` units, then those sums in their order. */
MV_INLINE void MV_NAME(multiply_tile, DTYPE)(const float *panel, tile_weights weights, int64_t units, float *sum,
                                             int vectors) {
    const int rows = TILE_ROWS(vectors);
    const int64_t piece = least(units, SUM_UNITS(MV_NAME(element, DTYPE)));
    for (int64_t from = 0; from < units; from += piece) {
        vf tile[12][TILE_VECTORS];
        MV_UNROLL
        for (int r = 0; r < rows; r++) {
            MV_UNROLL
            for (int v = 0; v < vectors; v++) tile[r][v] = v_set(0);
        }
        for (int64_t u = from; u < least(from + piece, units); u++) {
            const char *column = weights.corner + u * weights.unit_bytes;
            vf y[TILE_VECTORS];
            MV_UNROLL
            for (int v = 0; v < vectors; v++) y[v] = v_load_f32(panel + (u * vectors + v) * LANES, LANES);
            MV_UNROLL
            for (int r = 0; r < rows; r++) {
                const vf w = broadcast_unit(column + r * weights.row_bytes);
                MV_UNROLL
                for (int v = 0; v < vectors; v++) tile[r][v] = MV_NAME(v_mac, DTYPE)(w, y[v], tile[r][v]);
            }
        }
        MV_UNROLL
        for (int r = 0; r < rows; r++) {
            MV_UNROLL
            for (int v = 0; v < vectors; v++) {
                float *to = sum + r * CHUNK_TOKENS + v * LANES;
                v_store_f32(to, v_add(v_load_f32(to, LANES), tile[r][v]), LANES);
            }
        }
    }
}

static void MV_NAME(multiply_group, DTYPE)(const float *panel, int vectors, tile_weights weights, int64_t units,
                                           float *sum, int64_t rows) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS(vectors)) {
        const tile_weights below = {weights.corner + r * weights.row_bytes, weights.row_bytes, weights.unit_bytes};
        float *to = sum + r * CHUNK_TOKENS;
        switch (vectors) {
        case 1: MV_NAME(multiply_tile, DTYPE)(panel, below, units, to, 1); break;
        case 2: MV_NAME(multiply_tile, DTYPE)(panel, below, units, to, 2); break;
#if TILE_VECTORS > 2
        case 3: MV_NAME(multiply_tile, DTYPE)(panel, below, units, to, 3); break;
        case 4: MV_NAME(multiply_tile, DTYPE)(panel, below, units, to, 4); break;
#endif
        }
    }
}

/* sum[r][t] += the product of `rows` outputs with `tokens` tokens, over `units` units of y from the unit `from` on. */
static void MV_NAME(multiply_block, DTYPE)(float *panel, int64_t panel_units, int64_t from, int64_t tokens,
                                           tile_weights weights, int64_t units, float *sum, int64_t rows) {
    for (int64_t t = 0; t < tokens; t += GROUP_TOKENS) {
        const token_group group = group_of(t, tokens, panel_units, panel);
        MV_NAME(multiply_group, DTYPE)
        (group.panel + from * group.width, (int)(group.width / LANES), weights, units, sum + t, rows);
    }
}
