// output = input · Wᵀ + bias for a weight in panels of 32 outputs: float [panels, in_features, 32]; bf16 [panels,
// in_features / 2, 32, 2], so that one dot instruction takes two inputs. Every sum runs over the inputs in order, however
// many rows there are, so a row's result does not depend on its neighbours.

#include <algorithm>

#include <omp.h>

#include "vector.h"

namespace {

constexpr int VECTORS = 2;  // of a panel
constexpr int WIDTH = VECTORS * LANES;
constexpr int64_t BLOCK = 120;  // rows: their inputs stay in the cache while all weights pass by
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
    floats sums[ROWS][VECTORS] = {};
    int64_t due = 0;
    for (int64_t i = 0; i < inputs; i++) {
        for (due += lines; due >= inputs; due -= inputs, next += 64) __builtin_prefetch(next, 0, 2);
        typename Packed<T>::type weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = load_packed(panel + (i * VECTORS + v) * LANES * COUNT);
        for (int r = 0; r < ROWS; r++) {
            auto value = Inputs<T>::spread(input + r * stride + i * COUNT);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = dot(sums[r][v], value, weight[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
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

template <typename T>
void linear(const T* input, int64_t stride, const T* weight, const float* bias, T* output, int64_t output_stride,
            int64_t rows, int64_t features, int64_t columns, int threads) {
    const int64_t inputs = features / Inputs<T>::COUNT, panels = (columns + WIDTH - 1) / WIDTH;
    const int64_t size = features * WIDTH;  // of a panel, in elements
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = panels * thread / team, last = panels * (thread + 1) / team;
        for (int64_t start = 0; start < rows; start += BLOCK)
            for (int64_t p = first; p < last; p++) {
                const T* panel = weight + p * size;
                const int64_t some = std::min(BLOCK, rows - start), passes = (some + MOST_ROWS - 1) / MOST_ROWS;
                // The next panel arrives from memory while this one is computed with: a share in each pass.
                const int64_t lines = p + 1 < last ? size * int64_t(sizeof(T)) / 64 : 0;
                for (int64_t pass = 0; pass < passes; pass++) {
                    const int64_t row = start + some * pass / passes, count = start + some * (pass + 1) / passes - row;
                    const int64_t from = lines * pass / passes, to = lines * (pass + 1) / passes;
                    KERNELS<T>[count](input + row * stride, stride, panel, inputs, bias ? bias + p * WIDTH : nullptr,
                                      output + row * output_stride + p * WIDTH, output_stride,
                                      std::min<int64_t>(WIDTH, columns - p * WIDTH),
                                      (const char*)(panel + size) + 64 * from, to - from);
                }
            }
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                             \
    extern "C" void linear_##NAME(const T* input, int64_t stride, const T* weight, const float* bias, T* output,    \
                                  int64_t output_stride, int64_t rows, int64_t features, int64_t columns,           \
                                  int threads) {                                                                    \
        linear(input, stride, weight, bias, output, output_stride, rows, features, columns, threads);               \
    }

EXPORT(float, float)
EXPORT(bf16, bf16)
