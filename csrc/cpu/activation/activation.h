/* activation.h: the activations of a vector over a vocabulary. Every instruction set goes the same way.
 *
 *   silu, gelu_tanh   z / (1 + exp(w)),  w = -z,  w = -2 sqrt(2 / pi) (z + 0.044715 z^3)
 *   gelu              z * Phi(z),  Phi the normal distribution: Q = Phi(-|z|), or 1 - Q where z is positive
 *
 * 0.5 (1 + tanh(v)) is 1 / (1 + exp(-2 v)), and 0.5 (1 + erf(z / sqrt(2))) is Phi(z): without the differences that lose
 * all digits of a negative z. The relative errors are a few 2^-24, and for the gelus |w| or z^2 / 2 times as much more,
 * since exp makes that of the error of its argument (tests/c/activation.h has the bounds).
 *
 * Q has the form that M. M. Shepherd and J. G. Laframboise found smooth (Chebyshev approximation of (1 + 2x) exp(x^2)
 * erfc(x), Math. Comp. 36, 1981). Its polynomial is a minimax fit of our own, whose coefficients were rounded as those
 * of exp were (exp.h). */
#ifndef MV_ACTIVATION_H
#define MV_ACTIVATION_H

#include "cpu/simd/exp.h"

/* Q(t) exp(t^2 / 2) (1 + sqrt(2) t), of s = (t - 3.5) / (t + 3.5), for t from 0 to 14.6, within 0.54 * 2^-24 of it;
 * where t is larger, exp(-t^2 / 2) is 0. */
static const float tail_coefficients[] = {0x1.43f4c4p-1f,  -0x1.f1038ep-5f, -0x1.a1ee3ep-5f, 0x1.44fa50p-4f,
                                          -0x1.9f572ap-5f, 0x1.f5c472p-7f,  0x1.077016p-10f, -0x1.147704p-9f,
                                          0x1.0d83e0p-14f, 0x1.ae614ep-13f};

MV_INLINE vf v_over_1_plus_exp(vf z, vf w) { return v_div(z, v_add(v_set(1), v_exp(w))); }

/* Q(t) of t >= 0. Written so that s is 1, and not NaN, where t is infinity. */
MV_INLINE vf normal_tail(vf t) {
    const vf s = v_add(v_set(1), v_div(v_set(-7), v_add(t, v_set(3.5f))));
    const vf scaled = v_div(POLYNOMIAL(tail_coefficients, s), v_fma(t, v_set(0x1.6a09e6p0f), v_set(1)));
    return v_mul(v_exp(v_mul(v_mul(t, t), v_set(-0.5f))), scaled);
}

MV_INLINE vf v_activation(mv_activation activation, vf z) {
    if (activation == MV_SILU) return v_over_1_plus_exp(z, v_mul(z, v_set(-1)));
    if (activation == MV_GELU_TANH) {
        const vf per_z = v_fma(v_mul(z, z), v_set(-0x1.2444f2p-4f), v_set(-0x1.988454p0f));
        return v_over_1_plus_exp(z, v_mul(z, per_z));
    }
    const vf tail = normal_tail(v_max(z, v_mul(z, v_set(-1))));
    return v_mul(z, v_if_negative(z, tail, v_add(v_set(1), v_mul(tail, v_set(-1)))));
}

#endif
