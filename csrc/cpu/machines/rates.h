/* rates.h: how fast the kernels of the CPU are: data of machines that were measured, one file each, of which prices.c
 * makes microseconds. All are of two cores, in a microsecond. */
#ifndef MV_RATES_H
#define MV_RATES_H

typedef struct {
    double bytes;      /* of weights or keys that a kernel for few tokens reads */
    double few_flops;  /* operations of that kernel */
    double read;       /* weights that a kernel for many tokens reads in the dtype that it multiplies */
    double converted;  /* weights that it converts to that dtype first */
    double many_flops; /* operations of that kernel */
} mv_rates;

/* By instruction set. */
typedef struct {
    mv_rates avx512bf16, avx512, avx2, neon, portable;
} mv_machine;

extern const mv_machine mv_epyc9004, mv_epyc9005;

#endif
