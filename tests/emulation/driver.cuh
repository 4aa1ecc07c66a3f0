/* driver.cuh: the one function of the driver that kernels need on the CPU: a tensor map keeps what it was made of. */
#pragma once

#include <cudaTypedefs.h>

namespace cpu {

struct TensorMap {
    char *data;
    int64_t columns, rows, row_bytes;
    int box_columns, box_rows, swizzled_bytes; /* of a box's rows; 16: as they come */
    int value_bytes;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline CUresult encode(CUtensorMap *map, CUtensorMapDataType type, unsigned, void *data, const cuuint64_t *sizes,
                       const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const TensorMap made = {static_cast<char *>(data),
                            static_cast<int64_t>(sizes[0]),
                            static_cast<int64_t>(sizes[1]),
                            static_cast<int64_t>(strides[0]),
                            static_cast<int>(box[0]),
                            static_cast<int>(box[1]),
                            swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                                   : 16,
                            type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2};
    const bool legal = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && sizes[0] > 0 &&
                       sizes[1] > 0 && box[0] <= 256 && box[1] <= 256 && made.box_columns * made.value_bytes <= 128;
    memcpy(map, &made, sizeof made);
    return legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Where hardware keeps the byte of an address: its 16-byte pieces are mixed over so many bytes. */
inline uint32_t swizzle(uint32_t address, int bytes) {
    return address ^ (address >> 7 & (static_cast<uint32_t>(bytes) / 16 - 1)) << 4;
}

} // namespace cpu

inline void *driver_function(void **, const char *, unsigned) { return reinterpret_cast<void *>(cpu::encode); }
