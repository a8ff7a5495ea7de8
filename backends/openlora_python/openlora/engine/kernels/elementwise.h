// What lies between the matrix products of a decoder layer, row by row.

#pragma once

#include <cmath>

#include "vector.h"

namespace {

// output = round(input · rsqrt(mean(input²) + epsilon)) · weight, or with `offset` input · rsqrt(…) · (offset + weight)
// rounded once (Gemma's norm, whose weight is stored less one). In place too.
template <typename T>
void rms_norm(const T* input, const T* weight, T* output, int64_t features, float epsilon, float offset) {
    floats squares = {};
    int64_t i = 0;
    for (; i + LANES <= features; i += LANES) {
        floats x = load(input + i);
        squares += x * x;
    }
    float sum = sum_lanes(squares);
    for (; i < features; i++) sum += to_float(input[i]) * to_float(input[i]);
    const float scale = 1 / std::sqrt(sum / features + epsilon);
    for (i = 0; i + LANES <= features; i += LANES) {
        floats x = load(input + i) * scale;
        if (offset != 0) {
            store(output + i, x * (load(weight + i) + offset));
        } else {
            store(output + i, x);  // rounded before the weight comes, as the model does
            store(output + i, load(output + i) * load(weight + i));
        }
    }
    for (; i < features; i++) {
        float x = to_float(input[i]) * scale;
        if (offset != 0) {
            store_one(output + i, x * (to_float(weight[i]) + offset));
        } else {
            store_one(output + i, x);
            store_one(output + i, to_float(output[i]) * to_float(weight[i]));
        }
    }
}

// to += from.
template <typename T>
void add_row(const T* from, T* to, int64_t features) {
    int64_t i = 0;
    for (; i + LANES <= features; i += LANES) store(to + i, load(to + i) + load(from + i));
    for (; i < features; i++) store_one(to + i, to_float(to[i]) + to_float(from[i]));
}

enum Activation { SILU, GELU_TANH };

// x · sigmoid(u), where u = x for silu, and 2·√(2/π)·(x + 0.044715·x³) for gelu in its tanh form.
inline floats activate(floats x, Activation activation) {
    floats u = activation == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    floats e = exp_lanes(u < 0.0f ? u : -u);  // e^−|u|
    return u < 0.0f ? x * e / (1.0f + e) : x / (1.0f + e);
}

// output = round(activation(gate)) · up.
template <typename T>
void gate_row(const T* gate, const T* up, T* output, int64_t features, Activation activation) {
    int64_t i = 0;
    for (; i + LANES <= features; i += LANES) {
        store(output + i, activate(load(gate + i), activation));
        store(output + i, load(output + i) * load(up + i));
    }
    for (; i < features; i++) {
        store_one(output + i, activate(splat(to_float(gate[i])), activation)[0]);
        store_one(output + i, to_float(output[i]) * to_float(up[i]));
    }
}

// Rotary embedding of the first `rotated` dimensions of a head, with halves x₁, x₂ of these:
//   (x₁·cos₁ − x₂·sin₁, x₂·cos₂ + x₁·sin₂), rounded once; the others as they are. In place too.
template <typename T>
void rotate_head(const T* x, const T* cos, const T* sin, T* output, int64_t rotated, int64_t head_dim) {
    const int64_t half = rotated / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        floats low = load(x + i), high = load(x + half + i);
        store(output + i, low * load(cos + i) - high * load(sin + i));
        store(output + half + i, high * load(cos + half + i) + low * load(sin + half + i));
    }
    for (; i < half; i++) {
        float low = to_float(x[i]), high = to_float(x[half + i]);
        store_one(output + i, low * to_float(cos[i]) - high * to_float(sin[i]));
        store_one(output + half + i, high * to_float(cos[half + i]) + low * to_float(sin[half + i]));
    }
    if (x != output) memcpy(output + rotated, x + rotated, (head_dim - rotated) * sizeof(T));
}

}  // namespace
