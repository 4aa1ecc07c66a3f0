/* tile.h: the register tile of the prefill product, once per DTYPE after its units. */
#ifndef MV_TILE_H
#define MV_TILE_H

enum {
    GROUP_TOKENS = TILE_VECTORS * LANES,
    TILE_OUTPUTS = 24, /* a multiple of every TILE_ROWS */
    STRIPE = 2 * TILE_OUTPUTS,
    BLOCK_UNITS = 256,           /* a multiple of LANES; 64 KiB of panel: 128 and 512 are within 3 % */
    RUN_UNITS = 64 * BLOCK_UNITS /* whose sums are float32; longer ones go on in double */
};

/* The tokens that one register tile spans: a part of the panel. */
typedef struct {
    float *panel; /* [units][width] */
    int64_t width;
} token_group;

/* The group of the token t of a chunk, all of which is `padded` tokens wide. */
MV_INLINE token_group group_of(int64_t t, int64_t padded, int64_t units, float *panel) {
    const int64_t first = t / GROUP_TOKENS * GROUP_TOKENS;
    return (token_group){panel + first * units, least(GROUP_TOKENS, padded - first)};
}

/* What a thread works in: too much for the stack of a thread that may have been given a small one. */
typedef struct {
    _Alignas(64) float sum[STRIPE * CHUNK_TOKENS]; /* [output][token] */
    float stage[STRIPE * BLOCK_UNITS];
    double total[STRIPE * CHUNK_TOKENS]; /* of the runs before, where there are more than one */
} stripe_scratch;

/* The sums of a run join the totals; after the last run the totals are the sums. */
static void finish_run(stripe_scratch *scratch, int64_t rows, int64_t tokens, bool first, bool last) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * CHUNK_TOKENS; i < r * CHUNK_TOKENS + tokens; i++) {
            const double total = (first ? 0 : scratch->total[i]) + (double)scratch->sum[i];
            scratch->total[i] = total;
            scratch->sum[i] = last ? (float)total : 0;
        }
}

/* Unit u of output r is at corner + r * row_bytes + u * unit_bytes. */
typedef struct {
    const char *corner;
    int64_t row_bytes, unit_bytes;
} tile_weights;

/* The same bits in every lane; of any alignment. */
MV_INLINE vf broadcast_unit(const char *p) {
    float unit;
    memcpy(&unit, p, sizeof unit);
    return v_set(unit);
}
#endif

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
