/* tile_amx.h: the prefill product in AMX tiles, under the names of tile.h, for pairs of bfloat16.
 *
 * A tile is 16 rows of 64 bytes. One of weights holds 16 outputs by 16 pairs of k, as they lie in memory; one of y 16
 * pairs by 16 tokens, as they lie in the panel; their product adds to 16 outputs by 16 tokens in float32. Two tiles of
 * weights and two of y at a time make four products of four loads. Weights are read where they lie: staged side by side
 * for more than 32 tokens they took a quarter longer (4096 -> 6144, 8 threads, 128 tokens: 2.4 ms in place, 3.0 ms
 * staged). */
#include "cpu/linear/stripe.h"

enum { AMX_ROWS = 16, READ_UNITS = 16 };

MV_INLINE void begin_tiles_bf16(void) {
    struct {
        uint8_t palette, first_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = AMX_ROWS;
    }
    _tile_loadconfig(&config);
}
MV_INLINE void end_tiles_bf16(void) { _tile_release(); }

/* sum[r][t] += the tile of that number, which must be written out. */
#define ADD_TILE(number, sum)                                                                                          \
    do {                                                                                                               \
        _Alignas(64) float tile[AMX_ROWS * LANES];                                                                     \
        _tile_stored(number, tile, 64);                                                                                \
        add_rows(sum, tile);                                                                                           \
    } while (0)
static __attribute__((noinline)) void add_rows(float *sum, const float *tile) {
    for (int r = 0; r < AMX_ROWS; r++) {
        float *to = sum + r * CHUNK_TOKENS;
        v_store_f32(to, v_add(v_load_f32(to, LANES), v_load_f32(tile + r * LANES, LANES)), LANES);
    }
}

/* sum[r][t] += the products of 32 outputs with 16 tokens, and with 16 more, if y[1] is not NULL. */
MV_INLINE void multiply_tiles(const float *const y[2], tile_weights weights, int64_t units, float *sum) {
    const char *above = weights.corner, *below = above + AMX_ROWS * weights.row_bytes;
    const size_t row_bytes = (size_t)weights.row_bytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t u = 0; u < units; u += READ_UNITS) {
        _tile_loadd(6, y[0] + u * LANES, 64);
        _tile_loadd(4, above + u * (int64_t)sizeof(float), row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, below + u * (int64_t)sizeof(float), row_bytes);
        _tile_dpbf16ps(1, 5, 6);
        if (!y[1]) continue;
        _tile_loadd(7, y[1] + u * LANES, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    ADD_TILE(0, sum);
    ADD_TILE(1, sum + AMX_ROWS * CHUNK_TOKENS);
    if (!y[1]) return;
    ADD_TILE(2, sum + LANES);
    ADD_TILE(3, sum + AMX_ROWS * CHUNK_TOKENS + LANES);
}

/* sum[r][t] += the product of `rows` outputs with `tokens` tokens, over `units` units of y from the unit `from` on. */
static void multiply_block_bf16(float *panel, int64_t panel_units, int64_t from, int64_t tokens, tile_weights weights,
                                int64_t units, float *sum, int64_t rows) {
    for (int64_t r = 0; r < rows; r += 2 * AMX_ROWS) {
        const tile_weights two = {weights.corner + r * weights.row_bytes, weights.row_bytes, weights.unit_bytes};
        for (int64_t t = 0; t < tokens; t += 2 * LANES) {
            const float *first = group_of(t, tokens, panel_units, panel).panel + from * LANES;
            const float *const y[2] = {first, first + panel_units * LANES}, *const last[2] = {first, NULL};
            float *to = sum + r * CHUNK_TOKENS + t;
            if (t + LANES < tokens)
                multiply_tiles(y, two, units, to);
            else
                multiply_tiles(last, two, units, to);
        }
    }
}
