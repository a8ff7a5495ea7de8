// output = input · Wᵀ + bias for a weight in panels of 32 outputs: float [panels, in_features, 32]; bf16 [panels,
// in_features / 2, 32, 2], so that one dot instruction takes two inputs. Every sum runs over the inputs in order, however
// many rows there are, so a row's result does not depend on its neighbours.

#pragma once

#include <algorithm>

#include "items.h"
#include "vector.h"

namespace {

constexpr int PANEL_VECTORS = 2;  // of a panel
constexpr int PANEL = PANEL_VECTORS * LANES;
constexpr int MOST_ROWS = 12;  // 24 sums, 2 weights and 1 input fill the 32 registers

// What one lane of a weight vector holds: one input of float, two of bf16.
template <typename T>
struct Inputs;
template <>
struct Inputs<float> {
    static constexpr int COUNT = 1;
    static floats spread(const float* from) { return splat(*from); }
};
template <>
struct Inputs<bf16> {
    static constexpr int COUNT = 2;
    static words spread(const bf16* from) { return words{} + load_as<uint32_t>(from); }
};

// ROWS rows of one panel. Meanwhile `lines` cache lines of what comes next are fetched, evenly: in bursts they are slower.
template <typename T, int ROWS>
void rows_of_panel(const T* input, int64_t stride, const T* panel, int64_t inputs, const float* bias, T* output,
                   int64_t output_stride, int64_t columns, const char* next, int64_t lines) {
    constexpr int COUNT = Inputs<T>::COUNT;
    floats sums[ROWS][PANEL_VECTORS] = {};
    int64_t due = 0;
    for (int64_t i = 0; i < inputs; i++) {
        for (due += lines; due >= inputs; due -= inputs, next += 64) __builtin_prefetch(next, 0, 2);
        typename Packed<T>::type weight[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) weight[v] = load_packed(panel + (i * PANEL_VECTORS + v) * LANES * COUNT);
        for (int r = 0; r < ROWS; r++) {
            auto value = Inputs<T>::spread(input + r * stride + i * COUNT);
            for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = dot(sums[r][v], value, weight[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < PANEL_VECTORS; v++) {
            if (bias) sums[r][v] += load(bias + v * LANES);
            T* at = output + r * output_stride + v * LANES;
            if ((v + 1) * LANES <= columns)
                store(at, sums[r][v]);
            else
                for (int64_t c = v * LANES; c < columns; c++) store_one(at + c - v * LANES, sums[r][v][c - v * LANES]);
        }
}

template <typename T>
using Kernel = void (*)(const T*, int64_t, const T*, int64_t, const float*, T*, int64_t, int64_t, const char*, int64_t);

template <typename T>
constexpr Kernel<T> KERNELS[MOST_ROWS + 1] = {
    nullptr,
    rows_of_panel<T, 1>,
    rows_of_panel<T, 2>,
    rows_of_panel<T, 3>,
    rows_of_panel<T, 4>,
    rows_of_panel<T, 5>,
    rows_of_panel<T, 6>,
    rows_of_panel<T, 7>,
    rows_of_panel<T, 8>,
    rows_of_panel<T, 9>,
    rows_of_panel<T, 10>,
    rows_of_panel<T, 11>,
    rows_of_panel<T, 12>,
};

// What a thread does of the rows [from, to): panels. `following` are `following_lines` cache lines that it needs next.
template <typename T>
void linear_panels(Items items, const T* input, int64_t stride, const T* weight, const float* bias, T* output,
                   int64_t output_stride, int64_t features, int64_t columns, int64_t from, int64_t to,
                   const char* following, int64_t following_lines) {
    const int64_t inputs = features / Inputs<T>::COUNT;
    const int64_t size = features * PANEL;  // of a panel, in elements
    const int64_t rows = to - from, passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    take_each(items, [&](int64_t p, int64_t next) {
        const T* panel = weight + p * size;
        // The next panel arrives from memory while this one is computed with: a share in each pass.
        const char* ahead = next < 0 ? following : (const char*)(weight + next * size);
        const int64_t lines = next < 0 ? following_lines : size * int64_t(sizeof(T)) / 64;
        for (int64_t pass = 0; pass < passes; pass++) {
            const int64_t row = from + rows * pass / passes, count = from + rows * (pass + 1) / passes - row;
            const int64_t line = lines * pass / passes;
            KERNELS<T>[count](input + row * stride, stride, panel, inputs, bias ? bias + p * PANEL : nullptr,
                              output + row * output_stride + p * PANEL, output_stride,
                              std::min<int64_t>(PANEL, columns - p * PANEL), ahead + 64 * line,
                              lines * (pass + 1) / passes - line);
        }
    });
}

}  // namespace
