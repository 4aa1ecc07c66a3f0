/* guard.h: memory that a kernel must not touch before griddepcontrol.wait. Until then the kernel in front may still be
 * writing it, so a load would return what was there before, and a store could be overwritten.
 *
 * There are three kinds: what other kernels write (x, outputs, the workspace), parameters (weights, norm weights,
 * biases), which are open from the beginning where the call promises static weights, and the caches of attention, which
 * are where it promises static rows. Each lies in pages of its own, whose protection follows the thread that runs; who
 * reaches into closed pages is named on stderr, and the run ends. */
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace cpu::guard {

enum Kind { kWritten, kParameters, kCaches, kKinds };

struct Arena {
    static constexpr size_t kBytes = size_t{1} << 30, kPage = 4096;
    char *memory = nullptr;
    size_t used = 0;
    bool may_close = true;

    void *take(size_t bytes) {
        if (!memory) {
            memory = static_cast<char *>(
                mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (memory == MAP_FAILED) abort();
        }
        void *const taken = memory + used;
        used += (bytes + 255) / 256 * 256;
        if (used > kBytes) abort();
        return taken;
    }
    bool has(const void *address) const { return address >= memory && address < memory + used; }
    void protect(int protection) const {
        if (may_close && used && mprotect(memory, (used + kPage - 1) / kPage * kPage, protection) != 0) abort();
    }
};

inline Arena arenas[kKinds];
constexpr const char *kWhat[kKinds] = {"x, an output or the workspace", "weights that are not static",
                                       "rows of a cache that are not static"};
inline const char *kernel = "";
inline bool is_open = true;
inline bool aim_is_old = false; /* what is read before the wait to aim by is one less than afterwards */

inline void report(int, siginfo_t *info, void *) {
    for (int kind = 0; kind < kKinds; kind++)
        if (arenas[kind].has(info->si_addr)) {
            fprintf(stderr, "%s touches %s before it waits for the kernel in front\n", kernel, kWhat[kind]);
            _exit(3);
        }
    signal(SIGSEGV, SIG_DFL); /* some other fault: it happens again, and ends the process */
}

/* What was taken before is free again. */
inline void begin(const char *of_kernel, bool static_weights, bool static_rows = false) {
    kernel = of_kernel;
    for (Arena &arena : arenas) arena.used = 0;
    arenas[kParameters].may_close = !static_weights;
    arenas[kCaches].may_close = !static_rows;
    struct sigaction action = {};
    action.sa_sigaction = report;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
}

inline void open(bool wanted) {
    if (wanted == is_open) return;
    is_open = wanted;
    for (const Arena &arena : arenas) arena.protect(wanted ? PROT_READ | PROT_WRITE : PROT_NONE);
}

template <typename T> struct Allocator {
    using value_type = T;
    Kind kind;
    T *allocate(size_t count) { return static_cast<T *>(arenas[kind].take(count * sizeof(T))); }
    void deallocate(T *, size_t) {}
    bool operator==(const Allocator &other) const { return kind == other.kind; }
};

} // namespace cpu::guard
