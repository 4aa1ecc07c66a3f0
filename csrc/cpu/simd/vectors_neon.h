/* vectors_neon.h: the vocabulary over the 4 lanes of NEON, which every processor of the arm64 ABI has.
 * vectors_portable.h says what each name means. Here the multiply-add is fused, and float16 is converted by
 * instructions: to nearest even
 * while the thread's mode is that, as it is unless its owner changes it.
 *
 * Not bfdot and bfmmla, which some of these processors have: they take subnormal numbers as zero, and round the sum of
 * a pair to odd. */
enum { LANES = 4 };
typedef float32x4_t vf;

#define TILE_VECTORS 4 /* 24 accumulators of the 32 registers */
#define TILE_ROWS(vectors) ((vectors) <= 2 ? 12 : (vectors) == 3 ? 8 : 6)
#define DOT_ROWS 4
#define DOT_TOKENS 4 /* 16 accumulators: as many as four multiply-adds a cycle keep under way */

MV_INLINE vf v_set(float a) { return vdupq_n_f32(a); }
MV_INLINE vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
MV_INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
MV_INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }

MV_INLINE vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
MV_INLINE vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
MV_INLINE vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
MV_INLINE vf v_if_negative(vf a, vf b, vf c) { return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(a)), b, c); }
MV_INLINE vf power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
MV_INLINE vf v_scale(vf a, vf n) { /* by two factors, since 2^n alone may be too large or too small for a float */
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}

MV_INLINE float v_sum(vf a) {
    const float32x2_t sum = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(vpadd_f32(sum, sum), 0);
}

/* A tail goes through a small copy. */
MV_INLINE vf v_load_f32(const element_f32 *p, int n) {
    float lanes[LANES] = {0};
    if (n == LANES) return vld1q_f32(p);
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vld1q_f32(lanes);
}
MV_INLINE void v_store_f32(element_f32 *p, vf a, int n) {
    float lanes[LANES];
    if (n == LANES) {
        vst1q_f32(p, a);
        return;
    }
    vst1q_f32(lanes, a);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
MV_INLINE vf v_round_f32(vf a) { return a; }

MV_INLINE uint16x4_t load_bits(const uint16_t *p, int n) {
    uint16_t bits[LANES] = {0};
    if (n == LANES) return vld1_u16(p);
    memcpy(bits, p, (size_t)n * sizeof *p);
    return vld1_u16(bits);
}
MV_INLINE void store_bits(uint16_t *p, uint16x4_t a, int n) {
    uint16_t bits[LANES];
    if (n == LANES) {
        vst1_u16(p, a);
        return;
    }
    vst1_u16(bits, a);
    memcpy(p, bits, (size_t)n * sizeof *p);
}

MV_INLINE vf v_load_f16(const element_f16 *p, int n) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits(p, n))); }
MV_INLINE void v_store_f16(element_f16 *p, vf a, int n) { store_bits(p, vreinterpret_u16_f16(vcvt_f16_f32(a)), n); }
MV_INLINE vf v_round_f16(vf a) { return vcvt_f32_f16(vcvt_f16_f32(a)); }

MV_INLINE uint32x4_t rounded_bits_bf16(vf a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vbslq_u32(vceqq_f32(a, a), nearest, quiet); /* only NaN is not equal to itself */
}
MV_INLINE vf v_load_bf16(const element_bf16 *p, int n) {
    return vreinterpretq_f32_u32(vshll_n_u16(load_bits(p, n), 16));
}
MV_INLINE void v_store_bf16(element_bf16 *p, vf a, int n) { store_bits(p, vshrn_n_u32(rounded_bits_bf16(a), 16), n); }
MV_INLINE vf v_round_bf16(vf a) {
    return vreinterpretq_f32_u32(vandq_u32(rounded_bits_bf16(a), vdupq_n_u32(0xffff0000)));
}

/* Pairs of rows first, then pairs of those. */
MV_INLINE void v_transpose(vf m[LANES]) {
    const float64x2_t even_top = vreinterpretq_f64_f32(vtrn1q_f32(m[0], m[1]));
    const float64x2_t odd_top = vreinterpretq_f64_f32(vtrn2q_f32(m[0], m[1]));
    const float64x2_t even_bottom = vreinterpretq_f64_f32(vtrn1q_f32(m[2], m[3]));
    const float64x2_t odd_bottom = vreinterpretq_f64_f32(vtrn2q_f32(m[2], m[3]));
    m[0] = vreinterpretq_f32_f64(vtrn1q_f64(even_top, even_bottom));
    m[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd_top, odd_bottom));
    m[2] = vreinterpretq_f32_f64(vtrn2q_f64(even_top, even_bottom));
    m[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd_top, odd_bottom));
}
