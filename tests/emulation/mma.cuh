/* mma.cuh: the instructions of csrc/cuda/arch/mma.cuh in C++. */
#pragma once

inline uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(static_cast<const char *>(p) - cpu::shared());
}

inline void cp_async16(uint32_t to, const void *from, bool valid) {
    if (to % 16 != 0 || to + 16 > cpu::own_block().memory.bytes ||
        (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
        fprintf(stderr, "cp.async of 16 bytes from %p to %u: misaligned or outside of shared memory\n", from, to);
        abort();
    }
    if (valid)
        memcpy(cpu::shared() + to, from, 16);
    else
        memset(cpu::shared() + to, 0, 16);
}
inline void cp_async_commit() {}
inline uint64_t l2_evict_first() { return 0; }
inline void cp_async16_once(uint32_t to, const void *from, uint64_t) { cp_async16(to, from, true); }
inline void cp_async16_of_128(uint32_t to, const void *from, bool valid) { cp_async16(to, from, valid); }
template <int kPending> void cp_async_wait() {}
inline void cp_async_wait_all_but(int) {}

/* Matrix m of four: row i at the address of lane 8 m + i. */
template <bool kTransposed> void load_matrices(uint32_t (&m)[4], uint32_t row) {
    const unsigned lane = threadIdx.x % 32;
    const auto &rows = cpu::show(row);
    for (int i = 0; i < 4; i++)
        for (unsigned half = 0; half < 2; half++) {
            const unsigned major = lane / 4, minor = lane % 4 * 2 + half;
            const uint32_t at = kTransposed ? rows[8 * i + minor][0] + major * 2 : rows[8 * i + major][0] + minor * 2;
            uint16_t value;
            memcpy(&value, cpu::shared() + at, 2);
            m[i] = half == 0 ? value : m[i] | static_cast<uint32_t>(value) << 16;
        }
}
inline void ldmatrix_x4(uint32_t (&m)[4], uint32_t row) { load_matrices<false>(m, row); }
inline void ldmatrix_x4_trans(uint32_t (&m)[4], uint32_t row) { load_matrices<true>(m, row); }

inline uint32_t transpose_matrix(uint32_t m) {
    const unsigned lane = threadIdx.x % 32;
    const auto &of = cpu::show(m);
    const auto value = [&](unsigned row, unsigned column) {
        return of[row * 4 + column / 2][0] >> (column % 2 * 16) & 0xffff;
    };
    return value(lane % 4 * 2, lane / 4) | value(lane % 4 * 2 + 1, lane / 4) << 16;
}

template <typename T> float half_of(uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
    T value;
    memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

template <typename T> void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto &of = cpu::show(a[0], a[1], a[2], a[3], b0, b1);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float dot = 0;
        for (int k = 0; k < 16; k++)
            dot += half_of<T>(of[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                   half_of<T>(of[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        sum[i] += dot;
    }
}

inline uint32_t round_tf32(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return v == v ? (bits + 0x1000u) & 0xffffe000u : 0x7fffe000u;
}
