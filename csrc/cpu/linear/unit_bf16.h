/* unit_bf16.h: products of pairs of bfloat16 by vdpbf16ps, under the names of unit_f32.h.
 *
 * A lane multiplies two neighbouring k and adds both to its float32. y is rounded to bfloat16 in either rounding.
 * The instruction takes subnormal numbers as zero: below 1e-38 nothing that a projection could be asked for is lost,
 * unless an infinity meets one, whose product is infinite and not NaN. So y keeps its subnormal numbers, and a sum that
 * comes out NaN is computed once more, in float32. bfloat16 weights only; float32 weights go to the plain AVX-512
 * kernel.
 */
#include "cpu/linear/epilogue.h"
#include "cpu/norm/norm_row.h"

#undef UNIT
#define UNIT 2

MV_INLINE vf v_mac_bf16(vf a, vf b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

MV_INLINE vf norm_units_bf16(const mv_task *task, row_bf16 row, float scale, int64_t i) {
    vf y[2];
    for (int half = 0; half < 2; half++, i += LANES) {
        const int n = (int)least(LANES, task->hidden - i);
        y[half] = v_set(0);
        if (n > 0) y[half] = row_norm_bf16(task, row_load_bf16(row, i, n), scale, row_weight_bf16(task, i, n));
    }
    /* not vcvtne2ps2bf16, which flushes subnormal numbers to zero */
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits_bf16(y[0]), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits_bf16(y[1]), 16));
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

MV_INLINE bool v_any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }

/* The sum of the products of one output, again in float32 and in the order of k, where it is NaN. Unit u of y is at
 * y + u * stride. */
MV_INLINE float settle_bf16(float sum, const mv_task *task, const mv_block *block, int64_t row, const float *y,
                            int64_t stride) {
    if (sum == sum) return sum;
    const element_bf16 *weight = (const element_bf16 *)block->weight + row * block->row_stride;
    sum = 0;
    for (int64_t k = 0; k < task->hidden; k++) {
        element_bf16 pair[2];
        memcpy(pair, y + k / 2 * stride, sizeof pair);
        const uint32_t bits[2] = {(uint32_t)pair[k % 2] << 16, (uint32_t)weight[k * block->col_stride] << 16};
        float factor[2];
        memcpy(factor, bits, sizeof factor);
        sum += factor[0] * factor[1];
    }
    return sum;
}

MV_INLINE bool weight_is_unit_bf16(const mv_task *task) { return task->linear.weight_dtype == MV_BF16; }

MV_INLINE vf weight_units_bf16(bool wide, const void *weight, int64_t i, int n) {
    (void)wide;
    const element_bf16 *p = (const element_bf16 *)weight + i;
    if (n == 2 * LANES) return _mm512_loadu_ps(p);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

MV_INLINE vf weight_column_bf16(bool wide, const void *weight, int64_t i, int64_t stride, int k, int n) {
    (void)wide;
    const element_bf16 *even = (const element_bf16 *)weight + i;
    const __m512i low = _mm512_cvtepu16_epi32(load_bits(even, n));
    if (k < 2) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(even + stride, n)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
}
