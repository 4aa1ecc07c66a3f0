/* vec.cuh: dtypes and 16-byte packets. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../kernel.h"
#include "ptx.cuh"

template <typename T> struct Dtype;
template <> struct Dtype<float> { static constexpr mv_dtype value = MV_F32; };
template <> struct Dtype<__half> { static constexpr mv_dtype value = MV_F16; };
template <> struct Dtype<__nv_bfloat16> { static constexpr mv_dtype value = MV_BF16; };

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

/* rn: to the nearest T, ties to even. */
template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

template <typename T> __device__ __forceinline__ float round_to(float v) { return to_float(from_float<T>(v)); }

/* One value of a dtype known at run time: norm weights and biases, which are x's dtype or float32. */
template <typename T> __device__ __forceinline__ float load_as(const void *p, mv_dtype dtype, int64_t i) {
    return dtype == MV_F32 ? static_cast<const float *>(p)[i] : to_float(static_cast<const T *>(p)[i]);
}

/* 16 bytes of consecutive values. */
template <typename T> struct alignas(16) Packet {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
};

template <typename T> __device__ __forceinline__ Packet<T> as_packet(uint4 bits) {
    Packet<T> p;
    *reinterpret_cast<uint4 *>(&p) = bits;
    return p;
}

template <typename T> __device__ __forceinline__ Packet<T> zero_packet() { return as_packet<T>(make_uint4(0, 0, 0, 0)); }

/* `count` values from p, zeros after them; one 16-byte load when `aligned` (p is, and count is at least a packet). */
template <typename T> __device__ __forceinline__ Packet<T> load_packet(const T *p, int64_t count, bool aligned) {
    if (aligned && count >= Packet<T>::size) return as_packet<T>(*reinterpret_cast<const uint4 *>(p));
    Packet<T> packet = zero_packet<T>();
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++)
        if (i < count) packet.v[i] = p[i];
    return packet;
}

template <typename T>
__device__ __forceinline__ void store_packet(T *p, const Packet<T> &packet, int64_t count, bool aligned) {
    if (aligned && count >= Packet<T>::size) {
        *reinterpret_cast<uint4 *>(p) = *reinterpret_cast<const uint4 *>(&packet);
        return;
    }
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++)
        if (i < count) p[i] = packet.v[i];
}

/* Host: may rows that start at data + a multiple of the strides be read 16 bytes at a time? */
static inline bool is_aligned16(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
static inline bool rows_aligned16(mv_rows rows, size_t element_bytes) {
    const int64_t per_packet = 16 / static_cast<int64_t>(element_bytes);
    return is_aligned16(rows.data) && rows.outer_stride % per_packet == 0 && rows.inner_stride % per_packet == 0;
}
