/* features.c: which kernels may run here.
 *
 * An instruction set counts only when the CPU has it (CPUID) and the operating system saves its registers (XGETBV):
 * a hypervisor or a boot option may leave the first true and the second false. NEON is in the baseline of arm64. This
 * file is compiled for the baseline architecture, because it runs before anything is known. Asked once; the answer
 * never changes.
 */
#define _GNU_SOURCE
#include "cpu/cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* A name is what the kernels' names end in. */
static struct {
    const char *isa;
    bool usable;
} instruction_sets[] = {{"portable", true},    {"avx2", false}, {"avx512", false},
                        {"avx512bf16", false}, {"amx", false},  {"neon", false}};

enum { ISA_PORTABLE, ISA_AVX2, ISA_AVX512, ISA_AVX512BF16, ISA_AMX, ISA_NEON, ISA_COUNT };

static char feature_names[96];
static bool zen4;
static pthread_once_t asked = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux gives a process the state of the tiles when it asks: a signal's frame is then larger in the threads that use
 * them. */
static bool may_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

static void ask_cpu(void) {
    const uint64_t ymm_state = 0x06, zmm_state = 0xe6; /* XCR0: SSE and AVX; the same, mask registers and ZMM */
    const uint64_t tile_state = 0x60000;               /* the configuration of the tiles, and the tiles */
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma_f16c = (c & bit_FMA) && (c & bit_F16C);
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff); /* 0x19: Zen 3, which lacks AVX-512, and Zen 4 */
    const uint64_t saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    const bool avx2_here = fma_f16c && (b & bit_AVX2) && (saved & ymm_state) == ymm_state;
    const bool avx512_here = avx2_here && (b & avx512) == avx512 && (saved & zmm_state) == zmm_state;
    const unsigned last_subleaf = a;
    const unsigned amx = 1u << 22 | 1u << 24; /* leaf 7, EDX: products of bfloat16, and tiles */
    const bool amx_here = (d & amx) == amx && (saved & tile_state) == tile_state;
    const unsigned bit_bf16 = 1u << 5; /* leaf 7, subleaf 1, EAX */
    const bool bf16_here = last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_bf16);
    zen4 = avx512_here && family == 0x19 && __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
    instruction_sets[ISA_AVX2].usable = avx2_here;
    instruction_sets[ISA_AVX512].usable = avx512_here;
    instruction_sets[ISA_AVX512BF16].usable = avx512_here && bf16_here;
    instruction_sets[ISA_AMX].usable = avx512_here && bf16_here && amx_here && may_use_tiles();
}
#elif defined(__aarch64__)
static void ask_cpu(void) { instruction_sets[ISA_NEON].usable = true; }
#else
static void ask_cpu(void) {}
#endif

static void ask_once(void) {
    ask_cpu();
    size_t used = 0;
    for (int i = ISA_AVX2; i < ISA_COUNT; i++)
        if (instruction_sets[i].usable)
            used += (size_t)snprintf(feature_names + used, sizeof feature_names - used, "%s%s", used ? " " : "",
                                     instruction_sets[i].isa);
}

bool mv_cpu_supports(const char *isa) {
    pthread_once(&asked, ask_once);
    for (int i = 0; i < ISA_COUNT; i++)
        if (isa == instruction_sets[i].isa) return instruction_sets[i].usable; /* linkers keep one of equal literals */
    for (int i = 0; i < ISA_COUNT; i++)
        if (strcmp(isa, instruction_sets[i].isa) == 0) return instruction_sets[i].usable;
    return false;
}

bool mv_cpu_is_zen4(void) {
    pthread_once(&asked, ask_once);
    return zen4;
}

const char *mv_cpu_features(void) {
    pthread_once(&asked, ask_once);
    return feature_names;
}
