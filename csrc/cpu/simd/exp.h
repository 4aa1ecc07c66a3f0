/* exp.h: exp of a vector over a vocabulary. Every instruction set goes the same way.
 *
 * It is reduced to |r| <= ln(2) / 2 as W. J. Cody and W. Waite do it (Software Manual for the Elementary Functions,
 * 1980): n ln(2) is subtracted in two parts, of which the first is so short that it makes no error. The polynomial is a
 * minimax fit of our own; its coefficients were rounded to float32 one after the other, each time fitting the rest
 * again. */
#ifndef MV_EXP_H
#define MV_EXP_H

/* Of exp(r) = 1 + r + r^2 q(r), relative to it within 2^-28. */
static const float exp_coefficients[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558aap-5f, 0x1.12396ep-7f,
                                         0x1.6a524ep-10f};

#define POLYNOMIAL(coefficients, x) polynomial(coefficients, (int)(sizeof(coefficients) / sizeof(float)), x)
MV_INLINE vf polynomial(const float *coefficients, int count, vf x) {
    vf sum = v_set(coefficients[count - 1]);
    MV_UNROLL
    for (int i = count - 2; i >= 0; i--) sum = v_fma(sum, x, v_set(coefficients[i]));
    return sum;
}

/* Beyond these bounds exp is infinity, or 0; NaN passes them. */
MV_INLINE vf v_exp(vf x) {
    x = v_max(v_set(-104), v_min(v_set(89), x));
    const vf n = v_add(v_add(v_mul(x, v_set(0x1.715476p0f)), v_set(0x1.8p23f)), v_set(-0x1.8p23f)); /* x / ln(2) */
    const vf r = v_fma(n, v_set(0x1.bd0106p-13f), v_fma(n, v_set(-0x1.63p-1f), x));
    const vf small = v_fma(v_mul(r, r), POLYNOMIAL(exp_coefficients, r), r);
    return v_scale(v_add(v_set(1), small), n);
}

#endif
