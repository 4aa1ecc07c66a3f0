/* unit_f32.h: products of float32, once per DTYPE. unit_bf16.h exports the same names.
 *
 * A unit is what one lane of a product takes at a time: here one float32, there a pair of bfloat16. Either way four
 * bytes, so that the product kernels move units and need not know what is in them.
 *
 *   UNIT                             elements of a row in a unit
 *   v_mac(a, b, c)                   c + the product of a and b, unit by unit
 *   norm_units(task, row, scale, i)  LANES units of y from column i on; zeros past the end of the row
 *   weight_is_unit(task)             the weights in memory are units already
 *   weight_units(wide, w, i, n)      LANES units of the weights from element i of w on, n of whose elements are there;
 *                                    wide: they are float32, whatever x is
 *   weight_column(wide, w, i, stride, k, n)
 *                                    a unit each of n neighbouring outputs, whose k <= UNIT elements are stride apart
 *   settle(sum, task, block, row, y, stride)
 *                                    the finished sum of one output of the block, corrected where v_mac cannot be right
 *
 * In "fp32" rounding y stays unrounded.
 */
#include "cpu/linear/epilogue.h"
#include "cpu/norm/norm_row.h"

#undef UNIT
#define UNIT 1
#define WEIGHT_ELEMENT MV_NAME(element, DTYPE)

MV_INLINE vf MV_NAME(v_mac, DTYPE)(vf a, vf b, vf c) { return v_fma(a, b, c); }

MV_INLINE vf MV_NAME(norm_part, DTYPE)(const mv_task *task, MV_NAME(row, DTYPE) row, float scale, int64_t i, int n) {
    const vf s = MV_NAME(row_load, DTYPE)(row, i, n), weight = MV_NAME(row_weight, DTYPE)(task, i, n);
    return MV_NAME(row_norm, DTYPE)(task, s, scale, weight);
}

/* Whole vectors need no masks. */
MV_INLINE vf MV_NAME(norm_units, DTYPE)(const mv_task *task, MV_NAME(row, DTYPE) row, float scale, int64_t i) {
    const int64_t left = task->hidden - i;
    if (left >= LANES) return MV_NAME(norm_part, DTYPE)(task, row, scale, i, LANES);
    return MV_NAME(norm_part, DTYPE)(task, row, scale, i, (int)left);
}

MV_INLINE bool MV_NAME(weight_is_unit, DTYPE)(const mv_task *task) { return task->linear.weight_dtype == MV_F32; }

MV_INLINE vf MV_NAME(weight_units, DTYPE)(bool wide, const void *weight, int64_t i, int n) {
    if (wide) return v_load_f32((const element_f32 *)weight + i, n);
    return MV_NAME(v_load, DTYPE)((const WEIGHT_ELEMENT *)weight + i, n);
}

MV_INLINE vf MV_NAME(weight_column, DTYPE)(bool wide, const void *weight, int64_t i, int64_t stride, int k, int n) {
    (void)stride;
    (void)k;
    return MV_NAME(weight_units, DTYPE)(wide, weight, i, n);
}

MV_INLINE float MV_NAME(settle, DTYPE)(float sum, const mv_task *task, const mv_block *block, int64_t row,
                                       const float *y, int64_t stride) {
    (void)task;
    (void)block;
    (void)row;
    (void)y;
    (void)stride;
    return sum;
}
#undef WEIGHT_ELEMENT
