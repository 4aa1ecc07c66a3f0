/* epyc9005.c: the rates of an EPYC 9005 (Zen 5), and of every CPU that was not measured. What counts is where the
 * prices of two kernels cross: measured between 8 and 16 tokens in float32, between 16 and 32 with AVX512-BF16;
 * with AVX2, on a Zen 4, at about 10 in float32 and 16 in float16.
 *
 * NEON was measured nowhere: it is given the memory of AVX2, whose vectors are twice as long, and half its products. */
#include "cpu/machines/rates.h"

const mv_machine mv_epyc9005 = {
    .avx512bf16 = {4e4, 4.5e5, 8.5e3, 8.5e3, 1e6},
    .avx512 = {3.8e4, 2.4e5, 6e3, 6e3, 5e5},
    .avx2 = {3.5e4, 1.2e5, 6.9e3, 5e3, 2.5e5},
    .neon = {3.5e4, 6e4, 5e3, 5e3, 1.25e5},
    .portable = {3e4, 1e4, 3.75e3, 3.75e3, 2e4},
};
