/* ptx.cuh: the instructions of csrc/cuda/arch/ptx.cuh in C++. Launches are in order here. */
#pragma once

inline void griddepcontrol_wait() { cpu::wait_for_kernel_in_front(); }
inline void griddepcontrol_launch() {}
inline void prefetch_l2(const void *, int64_t) {}

template <typename T> T load_to_aim(const T *p) {
    cpu::guard::open(true);
    const T value = *p;
    cpu::guard::open(cpu::current->has_waited());
    return static_cast<T>(value - cpu::guard::aim_is_old);
}

inline uint4 load_if(const void *p, bool wanted) {
    uint4 v = {};
    if (wanted) memcpy(&v, p, sizeof v);
    return v;
}
inline uint4 load_streaming(const void *p, bool wanted) { return load_if(p, wanted); }
inline uint64_t l2_policy(bool) { return 0; }
inline float reciprocal(float v) { return 1 / v; }
inline uint4 load_past_l1(const void *p, bool wanted) { return load_if(p, wanted); }
template <typename T> T load_past_l1(const T *p) { return *p; }
inline uint4 load_by_policy(const void *p, bool wanted, uint64_t) { return load_if(p, wanted); }

template <typename T> void compute_now(T &) {}

inline void add_release(uint32_t *counter, uint32_t value) { *counter += value; }
inline uint32_t add_acquire_release(uint32_t *counter, uint32_t value) {
    *counter += value;
    return *counter - value;
}
inline uint32_t load_acquire(const uint32_t *counter) { /* of who waits for others */
    cpu::yield();
    return *counter;
}
inline bool elect_lane() { return threadIdx.x % 32 == 0; }
inline uint32_t uniform(uint32_t value) { return value; }
