/* tensor_map.cuh: host: describes a matrix to the copy engine. */
#pragma once

#include "cuda/arch/driver.cuh"
#include "kernel.h"

/* A matrix whose row r begins r * stride elements past data, and the box that one copy moves. The rows of a box are 16,
 * 32, 64 or 128 bytes, and lie in shared memory with their 16-byte pieces swizzled over as many bytes. */
struct BoxedMatrix {
    const void *data;
    mv_dtype dtype;
    int64_t rows, columns, stride;
    int box_rows, box_columns;
};

static inline mv_status encode_map(CUtensorMap *map, const BoxedMatrix &m, mv_error *error) {
    static void *found;
    const auto encode =
        reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function(&found, "cuTensorMapEncodeTiled", 12000));
    if (!encode) return mv_fail(error, MV_DEVICE_ERROR, "the NVIDIA driver has no cuTensorMapEncodeTiled: update it");
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.stride) * mv_dtype_bytes(m.dtype)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(m.box_columns), static_cast<cuuint32_t>(m.box_rows)};
    const cuuint32_t steps[] = {1, 1};
    const size_t row_bytes = static_cast<size_t>(m.box_columns) * mv_dtype_bytes(m.dtype);
    const CUtensorMapSwizzle swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUtensorMapDataType type = m.dtype == MV_F32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : m.dtype == MV_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult result =
        encode(map, type, 2, const_cast<void *>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return MV_OK;
    return mv_fail(error, MV_DEVICE_ERROR,
                   "cuTensorMapEncodeTiled: error %d for a matrix of %lld x %lld, %lld elements from row to row",
                   static_cast<int>(result), static_cast<long long>(m.rows), static_cast<long long>(m.columns),
                   static_cast<long long>(m.stride));
}

/* What a tensor map can describe of 16-bit values: 16-byte pieces, and coordinates of 32 bits. */
static inline bool fits_map(const void *data, int64_t stride, int64_t rows) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && stride > 0 &&
           stride < (int64_t{1} << 38) && rows <= INT32_MAX - 256;
}
