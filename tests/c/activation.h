/* activation.h: what silu_and_mul and gelu_and_mul may give, from float64. Valid C11 and C++17.
 *
 * With u = 2^-24 the activation of a gate z, computed in float32, lies within
 *
 *     |a - activation(z)| <= E u |activation(z)| + 2^-149 (|z| + 1)
 *     E = 6 of silu;  12 + min(z, 0)^2 / 2 of gelu;
 *     6 + 5 max(w, 0.4), w = -2 sqrt(2 / pi) (z + 0.044715 z^3), of gelu_tanh
 *
 * 6 are for exp and a reciprocal (one unit in the last place, or 2 u), a sum and a product; 12 also for what the
 * normal distribution adds. exp turns the relative error of its argument into as many more as the argument is large: w
 * has five roundings, z^2 / 2 has one; of positive z that is small beside 1, |w| exp(w) < 0.4. The last term is for
 * numbers that are subnormal on the way. Where exp(w) exceeds float32, the activation is zero. All that follows is
 * monotonic, so that the ends of this interval, through the roundings of the contract, are the ends of what a result
 * may be. Its sign is that of gate times up. */
#ifndef TESTS_ACTIVATION_H
#define TESTS_ACTIVATION_H

#include "mv.h"

#include <float.h>
#include <math.h>

typedef struct {
    double low, high;
} Interval;

/* To nearest, ties to even, as numbers of so many bits and exponents; what is too large becomes infinity. */
static inline double round_to(double v, mv_dtype dtype) {
    const int bits = dtype == MV_F32 ? 24 : dtype == MV_F16 ? 11 : 8, lowest = dtype == MV_F16 ? -14 : -126;
    const int highest = dtype == MV_F16 ? 15 : 127;
    int exponent;
    if (v == 0 || !isfinite(v)) return v;
    frexp(v, &exponent);
    exponent = (exponent - 1 > lowest ? exponent - 1 : lowest) - (bits - 1);
    const double rounded = ldexp(nearbyint(ldexp(v, -exponent)), exponent);
    return fabs(rounded) >= ldexp(1, highest + 1) ? copysign(INFINITY, rounded) : rounded;
}

/* The activation, in float64. */
static inline double activation_of(mv_activation activation, double z) {
    const double v = sqrt(2 / acos(-1.0)) * (z + 0.044715 * z * z * z);
    if (activation == MV_GELU) return z * (0.5 * erfc(-z / sqrt(2)));
    return z / (1 + exp(activation == MV_SILU ? -z : -2 * v));
}

/* Where float32 may put it. */
static inline Interval activation_interval(mv_activation activation, double z) {
    const double u = ldexp(1, -24), a = activation_of(activation, z);
    const double w = activation == MV_SILU ? -z : -2 * sqrt(2 / acos(-1.0)) * (z + 0.044715 * z * z * z);
    if (!isfinite(z)) return (Interval){a, a};
    const double below = fmin(z, 0);
    const double units = activation == MV_SILU   ? 6
                         : activation == MV_GELU ? 12 + below * below / 2
                                                 : 6 + 5 * fmax(w, 0.4);
    const double error = fabs(a) * units * u + (fabs(z) + 1) * ldexp(1, -149);
    Interval found = {a - error, a + error};
    if (activation != MV_GELU) {
        const double most = log(FLT_MAX), off = (4 + 5 * fabs(w)) * u;
        if (w > most + off) return (Interval){copysign(0, z), copysign(0, z)};
        if (w > most - off) found.high = copysign(0, z); /* z is negative */
    }
    if (found.low < 0 && found.high > 0) *(z < 0 ? &found.high : &found.low) = copysign(0, z);
    return found;
}

/* Is `got` what the op may give for one gate and up? All are values of the dtype. */
static inline bool act_and_mul_is_right(mv_activation activation, mv_rounding rounding, mv_dtype dtype, double gate,
                                        double up, double got) {
    Interval a = activation_interval(activation, gate);
    if (rounding != MV_ROUNDING_FP32) a = (Interval){round_to(a.low, dtype), round_to(a.high, dtype)};
    const double ends[2] = {a.low * up, a.high * up};
    if (isnan(ends[0]) && isnan(ends[1])) return isnan(got);
    if (isnan(got)) return isnan(ends[0]) || isnan(ends[1]); /* of an infinite up: the activation may be zero */
    /* The product is rounded to float32 first. Of 16-bit numbers it is exact there, but for those below 2^-149. */
    const double u = rounding == MV_ROUNDING_FP32 ? ldexp(1, -24) : 0;
    double least = fmin(ends[0], ends[1]), most = fmax(ends[0], ends[1]);
    if (dtype != MV_F32 && isfinite(least)) least -= fabs(least) * u + ldexp(1, -150);
    if (dtype != MV_F32 && isfinite(most)) most += fabs(most) * u + ldexp(1, -150);
    return got >= round_to(least, dtype) && got <= round_to(most, dtype) &&
           !signbit(got) == (!signbit(gate) == !signbit(up));
}

#endif
