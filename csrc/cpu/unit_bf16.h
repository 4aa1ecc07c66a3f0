/* unit_bf16.h: products of pairs of bfloat16 by vdpbf16ps, under the names of unit_f32.h.
 *
 * A lane multiplies two neighbouring k and adds both to its float32. y is rounded to bfloat16 in either rounding.
 * The instruction takes subnormal numbers as zero, and so does the conversion before it: below 1e-38 nothing that a
 * projection could be asked for is lost. bfloat16 weights only; float32 weights go to the plain AVX-512 kernel.
 */
#include "norm_row.h"

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
    return (vf)_mm512_cvtne2ps_pbh(y[1], y[0]);
}

MV_INLINE bool weight_is_unit_bf16(const mv_task *task) { return task->weight_dtype == MV_BF16; }

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
