/* rows.h: the tensors of the drivers: rows with gaps between them, in guarded memory. */
#pragma once

#include "guard.h"
#include "kernel.h"

#include <vector>

using cpu::guard::kCaches, cpu::guard::kParameters, cpu::guard::kWritten;

template <typename T> struct Rows {
    int count, length, stride;
    std::vector<T, cpu::guard::Allocator<T>> values;
    static constexpr float kUntouched = 7;
    Rows(int count, int length, int pad, cpu::guard::Kind kind)
        : count(count), length(length), stride(length + pad),
          values(static_cast<size_t>(count) * stride, T(kUntouched), cpu::guard::Allocator<T>{kind}) {}
    template <typename Draw> void fill(Draw draw) {
        for (int r = 0; r < count; r++)
            for (int i = 0; i < length; i++) at(r, i) = T(static_cast<float>(draw()));
    }
    T &at(int r, int i) { return values[static_cast<size_t>(r) * stride + i]; }
    mv_rows view() { return {values.data(), static_cast<int64_t>(count) * stride, stride}; }
    bool gaps_untouched() {
        for (int r = 0; r < count; r++)
            for (int i = length; i < stride; i++)
                if (static_cast<float>(at(r, i)) != kUntouched) return false;
        return true;
    }
};
