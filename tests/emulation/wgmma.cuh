/* wgmma.cuh: the instructions of csrc/cuda/wgmma.cuh in C++. Products are done when they are asked for. */
#pragma once

#include "mma.cuh"
#include "tma.cuh"

inline uint64_t operand_descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
    return static_cast<uint64_t>(chunk_bytes) << 32 | address;
}
inline uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes; }

inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int kPending> void wgmma_wait() {}
template <int kCount> void wgmma_results(float (&)[kCount]) {}
template <int kCount> void more_registers() {}
template <int kCount> void fewer_registers() {}

namespace cpu {
template <typename T> float swizzled_value(uint32_t address) {
    T value;
    memcpy(&value, shared() + swizzle(address, 128), 2);
    return static_cast<float>(value);
}
} // namespace cpu

template <typename T, int N, bool kInOut> void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32 % 4);
    const uint32_t a_at = static_cast<uint32_t>(a), b_at = static_cast<uint32_t>(b),
                   chunk = static_cast<uint32_t>(b >> 32);
    float rows[2][16];
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 16; k++)
            rows[r][k] =
                cpu::swizzled_value<T>(a_at + static_cast<uint32_t>((warp * 16 + lane / 4 + r * 8) * 128 + k * 2));
    for (int j = 0; j < N / 8; j++)
        for (int odd = 0; odd < 2; odd++) {
            const uint32_t n = static_cast<uint32_t>(j * 8 + lane % 4 * 2 + odd);
            float dot[2] = {};
            for (uint32_t k = 0; k < 16; k++) {
                const float w = cpu::swizzled_value<T>(kInOut ? b_at + n / 64 * chunk + k * 128 + n % 64 * 2
                                                              : b_at + n * 128 + k * 2);
                for (int r = 0; r < 2; r++) dot[r] += rows[r][k] * w;
            }
            for (int r = 0; r < 2; r++) {
                float &to = sum[4 * j + 2 * r + odd];
                to = add ? to + dot[r] : dot[r];
            }
        }
}

template <int kCount> void store_matrices(uint32_t row, const uint32_t (&m)[kCount]) {
    cpu::Warp &warp = cpu::own_warp();
    const unsigned lane = threadIdx.x % 32;
    warp.a[lane][0] = row;
    warp.meet.arrive_and_wait();
    for (int i = 0; i < kCount; i++) memcpy(cpu::shared() + warp.a[8 * i + lane / 4][0] + lane % 4 * 4, &m[i], 4);
    warp.meet.arrive_and_wait();
}
inline void stmatrix_x4(uint32_t row, const uint32_t (&m)[4]) { store_matrices(row, m); }
inline void stmatrix_x2(uint32_t row, const uint32_t (&m)[2]) { store_matrices(row, m); }
