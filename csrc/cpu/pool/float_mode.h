/* float_mode.h: how the floating-point unit of a thread rounds, and whether it takes subnormal numbers as zero.
 *
 * Every thread has a mode of its own, which it inherits from the one that started it. Threads that work on one call
 * need one mode, or equal rows would differ by the thread that took them. What an exception does (a trap, a sticky
 * flag) is no part of it: it changes no result, and a trap would end a thread that handles no signals. */
#ifndef MV_FLOAT_MODE_H
#define MV_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
typedef uint32_t float_mode; /* of MXCSR: rounding control, flush to zero, denormals are zero */
#define FLOAT_MODE_BITS ((float_mode)0xe040)

static inline float_mode get_float_mode(void) { return _mm_getcsr() & FLOAT_MODE_BITS; }
static inline void set_float_mode(float_mode mode) {
    const uint32_t now = _mm_getcsr();
    if ((now & FLOAT_MODE_BITS) != mode) _mm_setcsr((now & ~FLOAT_MODE_BITS) | mode);
}

#elif defined(__aarch64__)
typedef uint64_t float_mode; /* of FPCR: all but what enables traps */
#define FLOAT_MODE_BITS (~(float_mode)0x9f00)

static inline uint64_t read_fpcr(void) {
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static inline float_mode get_float_mode(void) { return read_fpcr() & FLOAT_MODE_BITS; }
static inline void set_float_mode(float_mode mode) {
    const uint64_t now = read_fpcr();
    if ((now & FLOAT_MODE_BITS) != mode) __asm__ volatile("msr fpcr, %0" : : "r"((now & ~FLOAT_MODE_BITS) | mode));
}

#else
#include <fenv.h>
typedef int float_mode; /* the rounding; C knows no more */

static inline float_mode get_float_mode(void) { return fegetround(); }
static inline void set_float_mode(float_mode mode) { fesetround(mode); }
#endif

#endif
