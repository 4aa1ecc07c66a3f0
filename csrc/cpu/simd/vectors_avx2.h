/* vectors_avx2.h: the vocabulary over 8 lanes. vectors_portable.h says what each name means. */
enum { LANES = 8 };
typedef __m256 vf;

#define TILE_VECTORS 2 /* 12 accumulators of the 16 registers */
#define TILE_ROWS(vectors) ((vectors) == 1 ? 12 : 6)
#define DOT_ROWS 4
#define DOT_TOKENS 2

MV_INLINE vf v_set(float a) { return _mm256_set1_ps(a); }
MV_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
MV_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
MV_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

MV_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
MV_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
MV_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
MV_INLINE vf v_if_negative(vf a, vf b, vf c) { return _mm256_blendv_ps(c, b, a); }
MV_INLINE vf power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
MV_INLINE vf v_scale(vf a, vf n) { /* by two factors, since 2^n alone may be too large or too small for a float */
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

MV_INLINE float v_sum(vf a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

MV_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MV_INLINE vf v_load_f32(const element_f32 *p, int n) {
    return n == LANES ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first_lanes(n));
}
MV_INLINE void v_store_f32(element_f32 *p, vf a, int n) {
    if (n == LANES)
        _mm256_storeu_ps(p, a);
    else
        _mm256_maskstore_ps(p, first_lanes(n), a);
}
MV_INLINE vf v_round_f32(vf a) { return a; }

/* AVX2 masks no 16-bit loads: a tail goes through a small copy. */
MV_INLINE __m128i load_bits(const void *p, int n) {
    uint16_t bits[LANES] = {0};
    if (n == LANES) return _mm_loadu_si128(p);
    memcpy(bits, p, (size_t)n * sizeof *bits);
    return _mm_loadu_si128((const void *)bits);
}
MV_INLINE void store_bits(void *p, __m128i a, int n) {
    uint16_t bits[LANES];
    if (n == LANES) {
        _mm_storeu_si128(p, a);
        return;
    }
    _mm_storeu_si128((void *)bits, a);
    memcpy(p, bits, (size_t)n * sizeof *bits);
}

MV_INLINE __m128i bits_of_f16(vf a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
MV_INLINE vf v_load_f16(const element_f16 *p, int n) { return _mm256_cvtph_ps(load_bits(p, n)); }
MV_INLINE void v_store_f16(element_f16 *p, vf a, int n) { store_bits(p, bits_of_f16(a), n); }
MV_INLINE vf v_round_f16(vf a) { return _mm256_cvtph_ps(bits_of_f16(a)); }

MV_INLINE __m256i rounded_bits_bf16(vf a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(nearest, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
MV_INLINE vf v_load_bf16(const element_bf16 *p, int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p, n)), 16));
}
MV_INLINE void v_store_bf16(element_bf16 *p, vf a, int n) {
    const __m256i high = _mm256_srli_epi32(rounded_bits_bf16(a), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    store_bits(p, _mm256_castsi256_si128(packed), n);
}
MV_INLINE vf v_round_bf16(vf a) {
    return _mm256_castsi256_ps(_mm256_and_si256(rounded_bits_bf16(a), _mm256_set1_epi32((int)0xffff0000)));
}

/* Exchanges groups of 4, 2 and 1 lanes between rows as far apart. */
MV_INLINE void v_transpose(vf m[LANES]) {
    vf t[LANES];
    MV_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(m[i], m[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(m[i], m[i + 4], 0x31);
    }
    MV_UNROLL
    for (int i = 0; i < 8; i += 4) {
        m[i] = _mm256_unpacklo_ps(t[i], t[i + 2]);
        m[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 2]);
        m[i + 2] = _mm256_unpacklo_ps(t[i + 1], t[i + 3]);
        m[i + 3] = _mm256_unpackhi_ps(t[i + 1], t[i + 3]);
    }
    MV_UNROLL
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_unpacklo_ps(m[i], m[i + 2]);
        t[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 2]);
        t[i + 2] = _mm256_unpacklo_ps(m[i + 1], m[i + 3]);
        t[i + 3] = _mm256_unpackhi_ps(m[i + 1], m[i + 3]);
    }
    MV_UNROLL
    for (int i = 0; i < 8; i++) m[i] = t[i];
}
