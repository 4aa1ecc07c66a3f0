/* epyc9004.c: the rates of an EPYC 9004 (Zen 4), whose units are 256 bits wide, so that AVX2 computes as fast as
 * AVX-512, and faster with 9 to 16 tokens of float32. From decode to prefill float16 crosses between 24 and 32 tokens,
 * float32 between 8 and 12. AVX512-BF16, which multiplies twice as many numbers in an instruction, was not measured
 * beside them, and is given the rates of Zen 5. */
#include "cpu/machines/rates.h"

const mv_machine mv_epyc9004 = {
    .avx512bf16 = {4e4, 4.5e5, 8.5e3, 8.5e3, 1e6},
    .avx512 = {3e4, 1.95e5, 1e4, 1e4, 2.36e5},
    .avx2 = {2.9e4, 1.5e5, 1.4e4, 1e4, 2.13e5},
    .portable = {3e4, 1e4, 3.75e3, 3.75e3, 2e4},
};
