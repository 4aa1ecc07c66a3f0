/* isa.h: one file, one instruction set, no compiler flags.
 *
 * Everything between MV_TARGET_BEGIN("avx2,fma") and MV_TARGET_END may use those instructions; the file itself is
 * compiled for the baseline. System headers go before the region, or their inline functions would be compiled into it.
 */
#ifndef MV_ISA_H
#define MV_ISA_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/cpu.h"
#include "cpu/pool/parallel.h"
#include "kernel.h"

#define MV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MV_TARGET_BEGIN(isa) MV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define MV_TARGET_END MV_PRAGMA(clang attribute pop)
#define MV_UNROLL MV_PRAGMA(clang loop unroll(full))
#else
#define MV_TARGET_BEGIN(isa) MV_PRAGMA(GCC push_options) MV_PRAGMA(GCC target(isa))
#define MV_TARGET_END MV_PRAGMA(GCC pop_options)
#define MV_UNROLL MV_PRAGMA(GCC unroll 32)
#endif

/* For functions whose arguments must become constants: the number of lanes, of rows in a tile, a dtype. */
#define MV_INLINE static inline __attribute__((always_inline, unused))

/* MV_NAME(load, bf16) is load_bf16, its arguments expanded first. */
#define MV_NAME(a, b) MV_NAME_AS_WRITTEN(a, b)
#define MV_NAME_AS_WRITTEN(a, b) a##_##b

typedef float element_f32;
typedef uint16_t element_f16;
typedef uint16_t element_bf16;

/* Work worth handing to another thread, some ten microseconds: elements to normalise, elements to activate, products to
 * sum. */
enum { PARALLEL_ELEMENTS = 65536, PARALLEL_ACTIVATIONS = 16384, PARALLEL_PRODUCTS = 131072 };

/* The longest row whose squares are one float32 sum: a multiple of four vectors of any width. */
enum { RUN_COLUMNS = 16384 };

MV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MV_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#endif
