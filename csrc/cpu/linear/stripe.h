/* stripe.h: what the prefill product works in: stripes of outputs, groups of tokens, blocks of units. tile.h and
 * tile_amx.h multiply one block of a stripe with one group. */
#ifndef MV_STRIPE_H
#define MV_STRIPE_H

#ifndef GROUP_VECTORS
#define GROUP_VECTORS TILE_VECTORS
#endif
#ifndef TILE_OUTPUTS
#define TILE_OUTPUTS 24 /* a multiple of every TILE_ROWS */
#endif

enum {
    GROUP_TOKENS = GROUP_VECTORS * LANES,
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
    float gates[STRIPE * CHUNK_TOKENS];  /* [token][output]: of a gated layer, while up is multiplied */
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

#endif
