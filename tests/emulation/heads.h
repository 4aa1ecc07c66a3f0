/* heads.h: what the drivers of attention heads hold them to: norm and rotary embedding in float64. */
#pragma once

#include "rows.h"

#include <cmath>

template <typename T> constexpr double kUnit = 0;
template <> constexpr double kUnit<float> = 0x1p-24;
template <> constexpr double kUnit<__half> = 0x1p-11;
template <> constexpr double kUnit<__nv_bfloat16> = 0x1p-8;

template <typename T> double rounded(double v) { return static_cast<float>(T(static_cast<float>(v))); }

using Values = std::vector<double>;

/* A head after the norm, whose weight_offset is 0.5, and the rotary embedding: what c says of them. */
template <typename T, typename Case>
Values prepared(const Case &c, Rows<T> &from, int row, Rows<T> &weight, Rows<T> &rotary, int at) {
    const auto rn = [&](double v) { return c.rounding != MV_ROUNDING_FP32 ? rounded<T>(v) : v; };
    const auto first_rn = [&](double v) { return c.rounding == MV_ROUNDING_HF ? rounded<T>(v) : v; };
    Values n(c.dim);
    double squares = 0;
    for (int i = 0; i < c.dim; i++) n[i] = static_cast<float>(from.at(row, i)), squares += n[i] * n[i];
    const double r = 1 / std::sqrt(squares / c.dim + 1e-6f);
    if (c.norm)
        for (int i = 0; i < c.dim; i++) n[i] = rn(first_rn(n[i] * r) * (0.5 + static_cast<float>(weight.at(0, i))));
    Values y = n;
    for (int i = 0; i < c.columns; i++) {
        const int half = c.columns / 2;
        const bool first = c.interleaved ? i % 2 == 0 : i < half;
        const int other = c.interleaved ? i ^ 1 : first ? i + half : i - half;
        const double cosine = static_cast<float>(rotary.at(at, i)),
                     sine = static_cast<float>(rotary.at(at, c.columns + i));
        y[i] = rn(rn(n[i] * cosine) + rn((first ? -n[other] : n[other]) * sine));
    }
    return y;
}
