/* vectors_avx512.h: the vocabulary over 16 lanes. vectors_portable.h says what each name means. */
enum { LANES = 16 };
typedef __m512 vf;

#define TILE_VECTORS 4 /* 24 accumulators of the 32 registers */
#define TILE_ROWS(vectors) ((vectors) <= 2 ? 12 : (vectors) == 3 ? 8 : 6)
#define DOT_ROWS 8
#define DOT_TOKENS 2

MV_INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }

MV_INLINE vf v_set(float a) { return _mm512_set1_ps(a); }
MV_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
MV_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MV_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

MV_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
MV_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
MV_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
MV_INLINE vf v_if_negative(vf a, vf b, vf c) {
    return _mm512_mask_mov_ps(c, _mm512_movepi32_mask(_mm512_castps_si512(a)), b);
}
MV_INLINE vf v_scale(vf a, vf n) { return _mm512_scalef_ps(a, n); }

/* By halves, so that the order is ours and not the compiler's. */
MV_INLINE float v_sum(vf a) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

MV_INLINE vf v_load_f32(const element_f32 *p, int n) {
    return n == LANES ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(n), p);
}
MV_INLINE void v_store_f32(element_f32 *p, vf a, int n) {
    if (n == LANES)
        _mm512_storeu_ps(p, a);
    else
        _mm512_mask_storeu_ps(p, first_lanes(n), a);
}
MV_INLINE vf v_round_f32(vf a) { return a; }

MV_INLINE __m256i load_bits(const void *p, int n) {
    return n == LANES ? _mm256_loadu_si256(p) : _mm256_maskz_loadu_epi16(first_lanes(n), p);
}
MV_INLINE void store_bits(void *p, __m256i a, int n) {
    if (n == LANES)
        _mm256_storeu_si256(p, a);
    else
        _mm256_mask_storeu_epi16(p, first_lanes(n), a);
}

MV_INLINE __m256i bits_of_f16(vf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MV_INLINE vf v_load_f16(const element_f16 *p, int n) { return _mm512_cvtph_ps(load_bits(p, n)); }
MV_INLINE void v_store_f16(element_f16 *p, vf a, int n) { store_bits(p, bits_of_f16(a), n); }
MV_INLINE vf v_round_f16(vf a) { return _mm512_cvtph_ps(bits_of_f16(a)); }

/* Not vcvtneps2bf16, which flushes subnormal numbers to zero. */
MV_INLINE __m512i rounded_bits_bf16(vf a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
}
MV_INLINE vf v_load_bf16(const element_bf16 *p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p, n)), 16));
}
MV_INLINE void v_store_bf16(element_bf16 *p, vf a, int n) {
    store_bits(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits_bf16(a), 16)), n);
}
MV_INLINE vf v_round_bf16(vf a) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits_bf16(a), _mm512_set1_epi32((int)0xffff0000)));
}

/* Quarters first: after that, t[4b + i] holds quarter b of rows i, 4 + i, 8 + i and 12 + i. Then 4 x 4 within each. */
MV_INLINE void v_transpose(vf m[LANES]) {
    vf t[LANES];
    MV_UNROLL
    for (int i = 0; i < 4; i++) {
        const vf top_low = _mm512_shuffle_f32x4(m[i], m[i + 4], 0x44);
        const vf top_high = _mm512_shuffle_f32x4(m[i], m[i + 4], 0xee);
        const vf bottom_low = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0x44);
        const vf bottom_high = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0xee);
        t[i] = _mm512_shuffle_f32x4(top_low, bottom_low, 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(top_low, bottom_low, 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(top_high, bottom_high, 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(top_high, bottom_high, 0xdd);
    }
    MV_UNROLL
    for (int i = 0; i < 16; i += 4) {
        m[i] = _mm512_unpacklo_ps(t[i], t[i + 2]);
        m[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 2]);
        m[i + 2] = _mm512_unpacklo_ps(t[i + 1], t[i + 3]);
        m[i + 3] = _mm512_unpackhi_ps(t[i + 1], t[i + 3]);
    }
    MV_UNROLL
    for (int i = 0; i < 16; i += 4) {
        t[i] = _mm512_unpacklo_ps(m[i], m[i + 2]);
        t[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 2]);
        t[i + 2] = _mm512_unpacklo_ps(m[i + 1], m[i + 3]);
        t[i + 3] = _mm512_unpackhi_ps(m[i + 1], m[i + 3]);
    }
    MV_UNROLL
    for (int i = 0; i < 16; i++) m[i] = t[i];
}
