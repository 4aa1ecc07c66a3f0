/* values.h: numbers of a dtype in memory, and random ones. */
#ifndef TESTS_VALUES_H
#define TESTS_VALUES_H

#include "activation.h"

#include <stdint.h>
#include <string.h>

static inline size_t bytes_of(mv_dtype dtype) { return dtype == MV_F32 ? 4 : 2; } /* a number that is not whole */

static inline double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? ldexp(fraction, -24)
                                             : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static inline uint16_t half_bits(double v) { /* of a value that is one */
    int exponent;
    const double magnitude = fabs(v);
    frexp(magnitude, &exponent);
    const int sign = signbit(v) ? 0x8000 : 0;
    if (isnan(v)) return (uint16_t)(sign | 0x7e00);
    if (isinf(v)) return (uint16_t)(sign | 0x7c00);
    if (magnitude < ldexp(1, -14)) return (uint16_t)(sign | (int)ldexp(magnitude, 24));
    return (uint16_t)(sign | ((exponent + 13) << 10) | ((int)ldexp(magnitude, 11 - exponent) - 1024));
}

static inline double get(const void *data, mv_dtype dtype, int64_t i) {
    uint16_t bits;
    float value;
    memcpy(&bits, (const char *)data + (size_t)i * bytes_of(dtype), sizeof bits);
    if (dtype == MV_F16) return half_value(bits);
    const uint32_t wide = (uint32_t)bits << 16;
    memcpy(&value, dtype == MV_F32 ? (const char *)data + (size_t)i * 4 : (const char *)&wide, sizeof value);
    return value;
}

/* Rounds to the dtype. */
static inline void set(void *data, mv_dtype dtype, int64_t i, double v) {
    const double rounded = round_to(v, dtype);
    const float value = (float)rounded;
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    const uint16_t bits = dtype == MV_F16 ? half_bits(rounded) : (uint16_t)(wide >> 16);
    memcpy((char *)data + (size_t)i * bytes_of(dtype), dtype == MV_F32 ? (const void *)&value : &bits, bytes_of(dtype));
}

/* From 0 to 1, the same sequence in every run. */
static inline double uniform(void) {
    static uint64_t state = 0x9E3779B97F4A7C15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) * 0x1p-53;
}

/* Of mean 0 and variance 1. */
static inline double bell(void) { return sqrt(3.0) * (uniform() + uniform() + uniform() + uniform() - 2); }

#endif
