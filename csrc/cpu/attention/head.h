/* head.h: the norm and the rotary embedding of one head; included once per DTYPE after norm_row.h.
 *
 *   n = x * r * (offset + weight), r = 1 / sqrt(mean(x^2) + eps), or x where there is no weight
 *   y = n * cos + turned(n) * sin in the first R columns, n in the others
 *
 * turned(n) is -n of the other half in the first half of R, n of the other half in the second one; interleaved, -n of
 * the right neighbour in even columns, n of the left one in odd ones. In "hf" and "hf_once" n is rounded as rms_norm
 * does it, and both products and their sum are; cos and sin of float32 leave only the last of these roundings. In
 * "fp32" there is none: the caller rounds what it stores. */

/* The other of each pair, with its sign, of the first `columns` columns. */
MV_INLINE void MV_NAME(turn_head, DTYPE)(const mv_rotary *rotary, const float *n, float *turned) {
    const int64_t columns = rotary->columns, half = columns / 2;
    for (int64_t i = 0; i < half; i++) {
        const int64_t first = rotary->interleaved ? 2 * i : i, second = rotary->interleaved ? first + 1 : i + half;
        turned[first] = -n[second];
        turned[second] = n[first];
    }
}

MV_INLINE vf MV_NAME(rotary_row, DTYPE)(const void *row, mv_dtype dtype, int64_t i, int n) {
    return dtype == MV_F32 ? v_load_f32((const element_f32 *)row + i, n)
                           : MV_NAME(v_load, DTYPE)((const MV_NAME(element, DTYPE) *)row + i, n);
}

/* y: round_up(dim, 16) columns, zeros from dim on; turned: as many, for its own use. Row `at` of cos and sin. */
static void MV_NAME(prepare_head, DTYPE)(const MV_NAME(element, DTYPE) * x, int64_t dim, const mv_head_norm *norm,
                                         const mv_rotary *rotary, int64_t at, mv_rounding rounding, float *y,
                                         float *turned) {
    const bool twice = mv_norm_rounds_twice(rounding), rounds = mv_rounds_each_step(rounding);
    float scale = 1;
    if (norm->weight) {
        const MV_NAME(row, DTYPE) row = {x, NULL, NULL};
        scale = MV_NAME(row_factor, DTYPE)(row, dim, norm->eps);
    }
    memset(y, 0, (size_t)round_up(dim, 16) * sizeof *y);
    for (int64_t i = 0; i < dim; i += LANES) {
        const int n = (int)least(LANES, dim - i);
        vf value = MV_NAME(v_load, DTYPE)(x + i, n);
        if (norm->weight) {
            const vf weight = MV_NAME(rotary_row, DTYPE)(norm->weight, norm->weight_dtype, i, n);
            value = v_mul(value, v_set(scale));
            if (twice) value = MV_NAME(v_round, DTYPE)(value);
            value = v_mul(value, v_add(v_set(norm->weight_offset), weight));
            if (rounds) value = MV_NAME(v_round, DTYPE)(value);
        }
        v_store_f32(y + i, value, n);
    }
    if (!rotary->columns) return;

    const int64_t bytes = rotary->dtype == MV_F32 ? (int64_t)sizeof(float) : (int64_t)sizeof *x;
    const char *cosines = (const char *)rotary->cos + at * rotary->cos_stride * bytes;
    const char *sines = (const char *)rotary->sin + at * rotary->sin_stride * bytes;
    const bool each = rounds && bytes == (int64_t)sizeof *x;
    MV_NAME(turn_head, DTYPE)(rotary, y, turned);
    for (int64_t i = 0; i < rotary->columns; i += LANES) {
        const int n = (int)least(LANES, rotary->columns - i);
        vf a = v_mul(v_load_f32(y + i, n), MV_NAME(rotary_row, DTYPE)(cosines, rotary->dtype, i, n));
        vf b = v_mul(v_load_f32(turned + i, n), MV_NAME(rotary_row, DTYPE)(sines, rotary->dtype, i, n));
        if (each) a = MV_NAME(v_round, DTYPE)(a), b = MV_NAME(v_round, DTYPE)(b);
        a = v_add(a, b);
        if (rounds) a = MV_NAME(v_round, DTYPE)(a);
        v_store_f32(y + i, a, n);
    }
}
