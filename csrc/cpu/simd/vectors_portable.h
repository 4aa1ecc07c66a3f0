/* vectors_portable.h: the vocabulary over 4 lanes, in the vector extension of gcc and clang: SSE2 on x86-64, NEON on
 * aarch64, plain code elsewhere. vectors_avx2.h and vectors_avx512.h export the same names:
 *
 *   vf, LANES                        a vector of floats, and how many
 *   v_set v_add v_mul v_fma          lane by lane; v_fma(a, b, c) = a * b + c, fused where the hardware can
 *   v_div v_min v_max                lane by lane; v_min(a, b) and v_max(a, b) are b where a or b is NaN
 *   v_if_negative(a, b, c)           b where a has its sign bit set, else c
 *   v_scale(a, n)                    a * 2^n, rounded once; n: whole numbers from -252 to 252
 *   v_sum                            of all lanes, in one fixed order
 *   v_load_<dtype>(p, n)             n <= LANES elements as floats, zeros after them; touches nothing past them
 *   v_store_<dtype>(p, a, n)         rounds to nearest even (NaN stays NaN, too large becomes Inf) and stores n lanes
 *   v_round_<dtype>(a)               rounds to that dtype and back
 *   v_transpose(m)                   the LANES x LANES matrix
 *   TILE_VECTORS, TILE_ROWS(v)       register tile of the prefill product: at most TILE_VECTORS vectors of tokens, and
 *                                    the rows of weights beside v of them; divides 24
 *   DOT_ROWS, DOT_TOKENS             register tile of the decode product
 *
 * n is a constant in every inner loop, so that the choice between a whole vector and a tail costs nothing there.
 */
enum { LANES = 4 };
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));

#define TILE_VECTORS 2
#define TILE_ROWS(vectors) ((vectors) == 1 ? 8 : 4)
#define DOT_ROWS 4
#define DOT_TOKENS 2

MV_INLINE vf v_set(float a) { return (vf){a, a, a, a}; }
MV_INLINE vf v_add(vf a, vf b) { return a + b; }
MV_INLINE vf v_mul(vf a, vf b) { return a * b; }
MV_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
MV_INLINE vf v_div(vf a, vf b) { return a / b; }
MV_INLINE vf choose_lanes(vu mask, vf a, vf b) { return (vf)(((vu)a & mask) | ((vu)b & ~mask)); }
MV_INLINE vf v_min(vf a, vf b) { return choose_lanes((vu)(a < b), a, b); }
MV_INLINE vf v_max(vf a, vf b) { return choose_lanes((vu)(a > b), a, b); }
MV_INLINE vf v_if_negative(vf a, vf b, vf c) { return choose_lanes(0 - ((vu)a >> 31), b, c); }
/* The bits of 1.5 * 2^23 + n count n; by two factors, since 2^n alone may be too large or too small for a float. */
MV_INLINE vf v_scale(vf a, vf n) {
    const vu whole = (vu)(n + 0x1.8p23f) - 0x4b400000 + 252, half = whole >> 1;
    return a * (vf)((half + 1) << 23) * (vf)((whole - half + 1) << 23);
}
MV_INLINE float v_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }

/* Of any alignment; a whole vector is one instruction, a tail a call. */
MV_INLINE void copy_lanes(void *to, const void *from, int n, size_t bytes) {
    if (n == LANES)
        memcpy(to, from, LANES * bytes);
    else
        memcpy(to, from, (size_t)n * bytes);
}

MV_INLINE vf v_load_f32(const element_f32 *p, int n) {
    vf a = {0};
    copy_lanes(&a, p, n, sizeof *p);
    return a;
}
MV_INLINE void v_store_f32(element_f32 *p, vf a, int n) { copy_lanes(p, &a, n, sizeof *p); }
MV_INLINE vf v_round_f32(vf a) { return a; }

MV_INLINE vu load_bits(const void *p, int n) {
    uint16_t bits[LANES] = {0};
    copy_lanes(bits, p, n, sizeof *bits);
    return (vu){bits[0], bits[1], bits[2], bits[3]};
}
MV_INLINE void store_bits(void *p, vu a, int n) {
    const uint16_t bits[LANES] = {(uint16_t)a[0], (uint16_t)a[1], (uint16_t)a[2], (uint16_t)a[3]};
    copy_lanes(p, bits, n, sizeof *bits);
}

/* A half is a float whose exponent is biased 112 less and whose mantissa is 13 bits shorter; below 2^-14 it counts
 * multiples of 2^-24. No step here or below makes a subnormal float, so that flushing them changes nothing. */
MV_INLINE float float_of_f16(uint32_t half) {
    const uint32_t magnitude = half & 0x7fff;
    const uint32_t bits = magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : (magnitude << 13) + (112u << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (magnitude < 0x400) value = (float)magnitude * 0x1p-24f;
    return half & 0x8000 ? -value : value;
}
MV_INLINE uint32_t f16_of_float(float value) {
    const uint32_t overflow = 0x477ff000; /* 65520: halfway between the largest half and the next there would be */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
    if (magnitude >= overflow) return sign | 0x7c00;
    if (magnitude < 0x38800000) { /* below 2^-14 halves are multiples of 2^-24: so are the floats from 0.5 to 1 */
        float shifted = 0.5f + fabsf(value);
        memcpy(&bits, &shifted, sizeof bits);
        return sign | (bits - 0x3f000000);
    }
    return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
MV_INLINE vf v_load_f16(const element_f16 *p, int n) {
    const vu bits = load_bits(p, n);
    return (vf){float_of_f16(bits[0]), float_of_f16(bits[1]), float_of_f16(bits[2]), float_of_f16(bits[3])};
}
MV_INLINE vu bits_of_f16(vf a) {
    return (vu){f16_of_float(a[0]), f16_of_float(a[1]), f16_of_float(a[2]), f16_of_float(a[3])};
}
MV_INLINE void v_store_f16(element_f16 *p, vf a, int n) { store_bits(p, bits_of_f16(a), n); }
MV_INLINE vf v_round_f16(vf a) {
    const vu bits = bits_of_f16(a);
    return (vf){float_of_f16(bits[0]), float_of_f16(bits[1]), float_of_f16(bits[2]), float_of_f16(bits[3])};
}

MV_INLINE vu rounded_bits_bf16(vf a) {
    const vu bits = (vu)a;
    const vu nearest = bits + (bits >> 16 & 1) + 0x7fff, quiet = bits | 0x400000;
    const vu is_nan = (vu)(a != a);
    return (nearest & ~is_nan) | (quiet & is_nan);
}
MV_INLINE vf v_load_bf16(const element_bf16 *p, int n) { return (vf)(load_bits(p, n) << 16); }
MV_INLINE void v_store_bf16(element_bf16 *p, vf a, int n) { store_bits(p, rounded_bits_bf16(a) >> 16, n); }
MV_INLINE vf v_round_bf16(vf a) { return (vf)(rounded_bits_bf16(a) & 0xffff0000); }

MV_INLINE void v_transpose(vf m[LANES]) {
    vf t[LANES];
    for (int i = 0; i < LANES; i++) t[i] = (vf){m[0][i], m[1][i], m[2][i], m[3][i]};
    for (int i = 0; i < LANES; i++) m[i] = t[i];
}
