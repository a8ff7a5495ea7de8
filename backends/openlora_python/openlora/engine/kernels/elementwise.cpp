// What lies between the matrix products of a decoder layer, one pass over memory each.

#include <algorithm>
#include <cmath>

#include <omp.h>

#include "vector.h"

namespace {

constexpr int64_t PARALLEL_ELEMENTS = 1 << 16;  // below, a second thread costs more than it saves

// output = round(input · rsqrt(mean(input²) + epsilon)) · weight, or with `offset` input · rsqrt(…) · (offset + weight)
// rounded once (Gemma's norm, whose weight is stored less one).
template <typename T>
void rms_norm(const T* input, int64_t stride, const T* weight, T* output, int64_t rows, int64_t features, float epsilon,
              float offset, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * features >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = input + row * stride;
        T* to = output + row * features;
        floats squares = {};
        int64_t i = 0;
        for (; i + LANES <= features; i += LANES) {
            floats x = load(from + i);
            squares += x * x;
        }
        float sum = sum_lanes(squares);
        for (; i < features; i++) sum += to_float(from[i]) * to_float(from[i]);
        const float scale = 1 / std::sqrt(sum / features + epsilon);
        for (i = 0; i + LANES <= features; i += LANES) {
            floats x = load(from + i) * scale;
            if (offset != 0) {
                store(to + i, x * (load(weight + i) + offset));
            } else {
                store(to + i, x);  // rounded before the weight comes, as the model does
                store(to + i, load(to + i) * load(weight + i));
            }
        }
        for (; i < features; i++) {
            float x = to_float(from[i]) * scale;
            if (offset != 0) {
                store_one(to + i, x * (to_float(weight[i]) + offset));
            } else {
                store_one(to + i, x);
                store_one(to + i, to_float(to[i]) * to_float(weight[i]));
            }
        }
    }
}

inline floats silu(floats x) {
    floats e = exp_lanes(x < 0.0f ? x : -x);  // e^−|x|
    return x < 0.0f ? x * e / (1.0f + e) : x / (1.0f + e);
}

// output = round(silu(gate)) · up.
template <typename T>
void silu_multiply(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* output, int64_t rows,
                   int64_t features, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * features >= PARALLEL_ELEMENTS / 4)
    for (int64_t row = 0; row < rows; row++) {
        const T *g = gate + row * gate_stride, *u = up + row * up_stride;
        T* to = output + row * features;
        int64_t i = 0;
        for (; i + LANES <= features; i += LANES) {
            store(to + i, silu(load(g + i)));
            store(to + i, load(to + i) * load(u + i));
        }
        for (; i < features; i++) {
            const float x = to_float(g[i]);
            store_one(to + i, x / (1 + std::exp(-x)));
            store_one(to + i, to_float(to[i]) * to_float(u[i]));
        }
    }
}

// Rotary embedding of one tensor [tokens, heads, head_dim] into a dense one: with halves x₁, x₂ of a head,
//   (x₁·cos₁ − x₂·sin₁, x₂·cos₂ + x₁·sin₂), rounded once.
template <typename T>
void rotate(const T* input, int64_t token_stride, int64_t head_stride, const T* cos, const T* sin, T* output,
            int64_t tokens, int64_t heads, int64_t head_dim, int threads) {
    const int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * head_dim >= PARALLEL_ELEMENTS)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const T* x = input + token * token_stride + head * head_stride;
            const T *c = cos + token * head_dim, *s = sin + token * head_dim;
            T* to = output + (token * heads + head) * head_dim;
            int64_t i = 0;
            for (; i + LANES <= half; i += LANES) {
                floats low = load(x + i), high = load(x + half + i);
                store(to + i, low * load(c + i) - high * load(s + i));
                store(to + half + i, high * load(c + half + i) + low * load(s + half + i));
            }
            for (; i < half; i++) {
                float low = to_float(x[i]), high = to_float(x[half + i]);
                store_one(to + i, low * to_float(c[i]) - high * to_float(s[i]));
                store_one(to + half + i, high * to_float(c[half + i]) + low * to_float(s[half + i]));
            }
        }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
    extern "C" void rms_norm_##NAME(const T* input, int64_t stride, const T* weight, T* output, int64_t rows,         \
                                    int64_t features, float epsilon, float offset, int threads) {                     \
        rms_norm(input, stride, weight, output, rows, features, epsilon, offset, threads);                            \
    }                                                                                                                 \
    extern "C" void silu_multiply_##NAME(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,          \
                                         T* output, int64_t rows, int64_t features, int threads) {                    \
        silu_multiply(gate, gate_stride, up, up_stride, output, rows, features, threads);                             \
    }                                                                                                                 \
    extern "C" void rotate_##NAME(const T* input, int64_t token_stride, int64_t head_stride, const T* cos,            \
                                  const T* sin, T* output, int64_t tokens, int64_t heads, int64_t head_dim,           \
                                  int threads) {                                                                      \
        rotate(input, token_stride, head_stride, cos, sin, output, tokens, heads, head_dim, threads);                 \
    }

EXPORT(float, float)
EXPORT(bf16, bf16)
