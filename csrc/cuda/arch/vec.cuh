/* vec.cuh: dtypes and 16-byte packets. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch/ptx.cuh"
#include "kernel.h"

template <typename T> struct Dtype;
template <> struct Dtype<float> { static constexpr mv_dtype value = MV_F32; };
template <> struct Dtype<__half> { static constexpr mv_dtype value = MV_F16; };
template <> struct Dtype<__nv_bfloat16> { static constexpr mv_dtype value = MV_BF16; };

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

/* rn: to the nearest T, ties to even. bfloat16 as one of a pair: Hopper converts a pair where it adds, but a single
 * value in the unit for exp and reciprocals, which is slower. */
template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __low2bfloat16(__floats2bfloat162_rn(v, 0.0f));
}

template <typename T> __device__ __forceinline__ float round_to(float v) { return to_float(from_float<T>(v)); }

/* One value of a dtype known at run time: norm weights and biases, which are x's dtype or float32. */
template <typename T> __device__ __forceinline__ float load_as(const void *p, mv_dtype dtype, int64_t i) {
    return dtype == MV_F32 ? static_cast<const float *>(p)[i] : to_float(static_cast<const T *>(p)[i]);
}

/* The same past L1: for what may be read before the wait for the previous kernel. */
template <typename T> __device__ __forceinline__ float load_as_past_l1(const void *p, mv_dtype dtype, int64_t i) {
    return dtype == MV_F32 ? load_past_l1(static_cast<const float *>(p) + i)
                           : to_float(load_past_l1(static_cast<const T *>(p) + i));
}

/* 16 bytes of consecutive values, kept as they come from memory: taking a packet apart is left to where a value is
 * used, because it would make the thread wait for the load. */
template <typename T> struct alignas(16) Packet {
    static constexpr int size = 16 / sizeof(T);
    static constexpr int per_word = 4 / sizeof(T);
    uint32_t word[4];

    __device__ __forceinline__ float get(int i) const;
};

template <> __device__ __forceinline__ float Packet<float>::get(int i) const { return __uint_as_float(word[i]); }
template <> __device__ __forceinline__ float Packet<__half>::get(int i) const {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))));
}
template <> __device__ __forceinline__ float Packet<__nv_bfloat16>::get(int i) const {
    return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}

/* Two values of 16 bits. */
template <typename T> struct PairOf;
template <> struct PairOf<__half> { using type = __half2; };
template <> struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };

/* Two values, rounded, in one word; for float32 one value. */
template <typename T> __device__ __forceinline__ uint32_t pack_word(const float *v);
template <> __device__ __forceinline__ uint32_t pack_word<float>(const float *v) { return __float_as_uint(v[0]); }
template <> __device__ __forceinline__ uint32_t pack_word<__half>(const float *v) {
    const __half2 pair = __floats2half2_rn(v[0], v[1]);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t pack_word<__nv_bfloat16>(const float *v) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* Two products of two values each, rounded, in words of 16 bits a value. */
template <typename T> __device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
    using Pair = typename PairOf<T>::type;
    const Pair product = __hmul2(*reinterpret_cast<const Pair *>(&a), *reinterpret_cast<const Pair *>(&b));
    return *reinterpret_cast<const uint32_t *>(&product);
}

template <typename T> __device__ __forceinline__ Packet<T> pack(const float (&v)[Packet<T>::size]) {
    Packet<T> packet;
#pragma unroll
    for (int w = 0; w < 4; w++) packet.word[w] = pack_word<T>(v + w * Packet<T>::per_word);
    return packet;
}

template <typename T> __device__ __forceinline__ Packet<T> as_packet(uint4 bits) {
    return {{bits.x, bits.y, bits.z, bits.w}};
}

/* Through L1, or past it: for what may be read before the wait for the previous kernel. */
enum class Through { kL1, kL2 };
template <Through kThrough, typename T> __device__ __forceinline__ T load_through(const T *p) {
    if constexpr (kThrough == Through::kL2) return load_past_l1(p);
    return *p;
}

/* `count` values from p, zeros after them; one 16-byte load when `aligned` (p is, and count is at least a packet). */
template <typename T, Through kThrough = Through::kL1>
__device__ __forceinline__ Packet<T> load_packet(const T *p, int64_t count, bool aligned) {
    if (aligned && count >= Packet<T>::size)
        return as_packet<T>(load_through<kThrough>(reinterpret_cast<const uint4 *>(p)));
    Packet<T> packet = {};
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) packet.word[i] = __float_as_uint(load_through<kThrough>(p + i));
    } else {
        const uint16_t *halves = reinterpret_cast<const uint16_t *>(p);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count)
                packet.word[i / 2] |= static_cast<uint32_t>(load_through<kThrough>(halves + i)) << (i % 2 * 16);
    }
    return packet;
}

template <typename T>
__device__ __forceinline__ void store_packet(T *p, const Packet<T> &packet, int64_t count, bool aligned) {
    if (aligned && count >= Packet<T>::size) {
        *reinterpret_cast<uint4 *>(p) = make_uint4(packet.word[0], packet.word[1], packet.word[2], packet.word[3]);
        return;
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) p[i] = __uint_as_float(packet.word[i]);
    } else {
        uint16_t *halves = reinterpret_cast<uint16_t *>(p);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) halves[i] = static_cast<uint16_t>(packet.word[i / 2] >> (i % 2 * 16));
    }
}

/* The address of row r of a matrix. Most matrices have one stride: then inner is the number of rows, and no division
 * is made. */
template <typename T> __device__ __forceinline__ T *row_address(mv_rows rows, int64_t inner, int64_t r) {
    T *data = static_cast<T *>(rows.data);
    if (r < inner) return data + r * rows.inner_stride;
    return data + (r / inner) * rows.outer_stride + (r % inner) * rows.inner_stride;
}

/* Host: may rows that start at data + a multiple of the strides be read 16 bytes at a time? */
static inline bool is_aligned16(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
static inline bool rows_aligned16(mv_rows rows, size_t element_bytes) {
    const int64_t per_packet = 16 / static_cast<int64_t>(element_bytes);
    return is_aligned16(rows.data) && rows.outer_stride % per_packet == 0 && rows.inner_stride % per_packet == 0;
}
