/* wgmma.cuh: the instructions of csrc/cuda/arch/wgmma.cuh in C++. Products are done when they are asked for. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/tma.cuh"

#include <vector>

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
/* Every 16-bit value as a float. */
template <typename T> const float *widened() {
    static const std::vector<float> values = [] {
        std::vector<float> all(1 << 16);
        for (unsigned bits = 0; bits < all.size(); bits++) {
            const uint16_t narrow = static_cast<uint16_t>(bits);
            T value;
            memcpy(&value, &narrow, 2);
            all[bits] = static_cast<float>(value);
        }
        return all;
    }();
    return values.data();
}
/* 16 values from an operand, `apart` bytes apart; where that is 2, 8 of them are one piece of the swizzle. */
template <typename T> void read_operand(float (&to)[16], uint32_t address, uint32_t apart) {
    const float *const wide = widened<T>();
    const char *piece = nullptr;
    for (uint32_t k = 0; k < 16; k++) {
        if (apart != 2 || k % 8 == 0) piece = shared() + swizzle(address + k * apart, 128);
        uint16_t bits;
        memcpy(&bits, apart == 2 ? piece + k % 8 * 2 : piece, 2);
        to[k] = wide[bits];
    }
}
} // namespace cpu

namespace cpu {
/* sum (+)= a lane's two rows of 16 k * the operand w_at(n) bytes into shared memory, its k `apart` bytes apart. */
template <typename T, int N, typename At>
void multiply_rows(float (&sum)[N / 2], const float (&rows)[2][16], At w_at, uint32_t apart, bool add) {
    float w[16];
    for (int j = 0; j < N / 8; j++)
        for (int odd = 0; odd < 2; odd++) {
            read_operand<T>(w, w_at(static_cast<uint32_t>(j * 8 + static_cast<int>(threadIdx.x % 4) * 2 + odd)), apart);
            for (int r = 0; r < 2; r++) {
                float dot = 0;
                for (int k = 0; k < 16; k++) dot += rows[r][k] * w[k];
                float &to = sum[4 * j + 2 * r + odd];
                to = add ? to + dot : dot;
            }
        }
}
} // namespace cpu

template <typename T, int N, bool kInOut> void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32 % 4);
    const uint32_t a_at = static_cast<uint32_t>(a), b_at = static_cast<uint32_t>(b),
                   chunk = static_cast<uint32_t>(b >> 32);
    float rows[2][16];
    for (int r = 0; r < 2; r++)
        cpu::read_operand<T>(rows[r], a_at + static_cast<uint32_t>((warp * 16 + lane / 4 + r * 8) * 128), 2);
    const auto w_at = [&](uint32_t n) { return kInOut ? b_at + n / 64 * chunk + n % 64 * 2 : b_at + n * 128; };
    cpu::multiply_rows<T, N>(sum, rows, w_at, kInOut ? 128 : 2, add);
}

template <typename T, int N> void wgmma(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    const unsigned lane = threadIdx.x % 32;
    const auto &of = cpu::show(a[0], a[1], a[2], a[3]);
    float rows[2][16];
    for (unsigned r = 0; r < 2; r++)
        for (unsigned k = 0; k < 16; k++)
            rows[r][k] = half_of<T>(of[lane / 4 * 4 + k % 8 / 2][r + k / 8 * 2], static_cast<int>(k % 2));
    cpu::multiply_rows<T, N>(
        sum, rows, [&](uint32_t n) { return static_cast<uint32_t>(b) + n * 128; }, 2, add);
}

template <int N> void wgmma_tf32(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    constexpr uint32_t kSeen = 0xffffe000u; /* of the bits of a float */
    const unsigned lane = threadIdx.x % 32;
    const auto &of = cpu::show(a[0], a[1], a[2], a[3]);
    float rows[2][8];
    for (unsigned r = 0; r < 2; r++)
        for (unsigned k = 0; k < 8; k++) rows[r][k] = __uint_as_float(of[lane / 4 * 4 + k % 4][r + k / 4 * 2] & kSeen);
    for (int i = 0; i < N / 2; i++) {
        const uint32_t n = static_cast<uint32_t>(i) / 4 * 8 + lane % 4 * 2 + static_cast<uint32_t>(i) % 2;
        float dot = 0;
        for (uint32_t k = 0; k < 8; k++) {
            uint32_t bits;
            memcpy(&bits, cpu::shared() + cpu::swizzle(static_cast<uint32_t>(b) + n * 128 + k * 4, 128), 4);
            dot += rows[i % 4 / 2][k] * __uint_as_float(bits & kSeen);
        }
        sum[i] = add ? sum[i] + dot : dot;
    }
}

inline void stmatrix_x4(uint32_t row, const uint32_t (&m)[4]) {
    const unsigned lane = threadIdx.x % 32;
    const auto &rows = cpu::show(row);
    for (int i = 0; i < 4; i++) memcpy(cpu::shared() + rows[8 * i + lane / 4][0] + lane % 4 * 4, &m[i], 4);
}
