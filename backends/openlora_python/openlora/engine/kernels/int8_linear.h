// A linear layer on int8 weights, one scale a channel. Its inputs are made integers here, one scale a token:
//   scale[t] = max |input[t, :]| / largest;  q[t, k] = round(input[t, k] / scale[t])
//   output[t, n] = Σ q[t, k] · weight[n, k] · scale[t] · weight_scale[n] + bias[n]
// With one part, q are bytes and largest is 127. With two parts they have 16 bits and largest is 32639: they are taken
// apart as 256 · high + low, two products of bytes, which keep what bfloat16 inputs hold.
// The sums of integers are exact, so a row's result depends on neither its neighbours nor the number of threads. A row
// with NaN or Inf in it comes out as NaN.
//
// vpdpbusd multiplies unsigned by signed bytes: weights are kept as w + 128, and every sum starts at −128 · Σ q.
// They lie in panels of 32 channels, [channels / 32, ⌈features / 4⌉, 32, 4], so that memory is read once, in order.
// `scales` and `bias` are padded to whole panels, as the weights are.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "items.h"
#include "vector.h"

#define INLINE __attribute__((always_inline)) inline

typedef int8_t bytes __attribute__((vector_size(LANES)));

namespace {

constexpr int INT8_PANEL = 2 * LANES;  // channels
constexpr int GROUP = 4;          // products that a 32-bit lane adds up
constexpr int ROWS = 8;           // rows of integers times a panel at once: 16 sums, enough to hide their latency

template <int PARTS>
constexpr float LARGEST = PARTS == 1 ? 127.0f : 32639.0f;

// sums + Σ of four products in each lane: unsigned weights by signed inputs.
INLINE void dot4(ints& sums, words weights, words inputs) {
#ifdef __AVX512VNNI__
    // GCC 12 puts copies around the intrinsic that halve the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
#else
    for (int i = 0; i < GROUP; i++)
        sums += (ints)(weights << (24 - 8 * i) >> 24) * ((ints)(inputs << (24 - 8 * i)) >> 24);
#endif
}

// To nearest even; through no sum, which the compiler would fuse with a product before it.
INLINE ints round_lanes(floats x) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtps_epi32((__m512)x);
#else
    ints whole;
    for (int lane = 0; lane < LANES; lane++) whole[lane] = (int32_t)std::nearbyint(x[lane]);
    return whole;
#endif
}

// One token as PARTS rows of `padded` bytes, and where the sums of each row start.
template <typename T, int PARTS>
void quantize(const T* input, int64_t features, int64_t padded, int8_t* rows, float* scale, int32_t* starts) {
    floats top = {}, poison = {};
    int64_t k = 0;
    for (; k + LANES <= features; k += LANES) {
        floats x = load(input + k), size = x < 0.0f ? -x : x;
        top = size > top ? size : top;
        poison += x * 0.0f;
    }
    float largest = 0, fault = sum_lanes(poison);
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, top[lane]);
    for (; k < features; k++) {
        float x = to_float(input[k]);
        largest = std::max(largest, x < 0 ? -x : x);
        fault += x * 0.0f;
    }
    *scale = std::max(largest / LARGEST<PARTS>, 1e-30f) + fault;
    const float inverse = 1.0f / *scale;
    ints sums[PARTS] = {};
    for (k = 0; k < padded; k += LANES) {
        floats x = {};
        if (k + LANES <= features)
            x = load(input + k);
        else
            for (int64_t i = k; i < features; i++) x[i - k] = to_float(input[i]);
        ints whole = round_lanes(x * inverse);
        ints parts[2] = {whole, whole};
        if (PARTS == 2) {
            parts[0] = (whole + 128) >> 8;
            parts[1] = whole - parts[0] * 256;
        }
        for (int part = 0; part < PARTS; part++) {
            sums[part] += parts[part];
            bytes narrow = __builtin_convertvector(parts[part], bytes);
            memcpy(rows + part * padded + k, &narrow, std::min<int64_t>(LANES, padded - k));
        }
    }
    for (int part = 0; part < PARTS; part++) {
        int32_t sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += sums[part][lane];
        starts[part] = -128 * sum;
    }
}

template <typename T>
struct Panel {
    const uint8_t* weight;
    int64_t padded;       // features
    const float* scales;  // [INT8_PANEL]
    const float* bias;    // [INT8_PANEL]
    T* output;            // of the first token here
    int64_t stride;
    int64_t channels;  // of the panel that exist
    const uint8_t* next;  // to fetch meanwhile, in lines of 64 bytes
    int64_t lines;
};

// 16 channels of one token as they leave.
template <typename T>
INLINE void finish(floats sums, float scale, int64_t channel, const Panel<T>& panel, T* output) {
    floats result = sums * (load(panel.scales + channel) * scale) + load(panel.bias + channel);
    if (channel + LANES <= panel.channels)
        store(output + channel, result);
    else
        for (int64_t i = channel; i < panel.channels; i++) store_one(output + i, result[i - channel]);
}

// The token whose last part is in ROW.
template <typename T, int PARTS, int ROW>
INLINE void finish(const ints (*sums)[2], const float* scales, const Panel<T>& panel) {
    if constexpr (ROW % PARTS == PARTS - 1) {
        constexpr int TOKEN = ROW / PARTS;
        floats left = __builtin_convertvector(sums[ROW][0], floats);
        floats right = __builtin_convertvector(sums[ROW][1], floats);
        if constexpr (PARTS == 2) {
            left += __builtin_convertvector(sums[ROW - 1][0], floats) * 256.0f;
            right += __builtin_convertvector(sums[ROW - 1][1], floats) * 256.0f;
        }
        T* output = panel.output + TOKEN * panel.stride;
        finish(left, scales[TOKEN], 0, panel, output);
        finish(right, scales[TOKEN], LANES, panel, output);
    }
}

INLINE words load_group(const int8_t* from) { return words{} + load_as<uint32_t>(from); }

// Some rows times one panel. Their numbers are a pack, so that every sum is a register to the compiler.
template <typename T, int PARTS, int... ROW>
void multiply(std::integer_sequence<int, ROW...>, const int8_t* rows, const float* scales, const int32_t* starts,
              const Panel<T>& panel) {
    ints sums[][2] = {{ints{} + starts[ROW], ints{} + starts[ROW]}...};
    const uint8_t *weight = panel.weight, *next = panel.next;
    const int64_t steps = panel.padded / GROUP;
    int64_t due = 0;
    for (int64_t k = 0; k < panel.padded; k += GROUP, weight += INT8_PANEL * GROUP) {
        for (due += panel.lines; due >= steps; due -= steps, next += 64) __builtin_prefetch(next, 0, 2);
        words left = load_as<words>(weight), right = load_as<words>(weight + sizeof(words));
        ((dot4(sums[ROW][0], left, load_group(rows + ROW * panel.padded + k)),
          dot4(sums[ROW][1], right, load_group(rows + ROW * panel.padded + k))), ...);
    }
    (finish<T, PARTS, ROW>(sums, scales, panel), ...);
}

template <typename T, int PARTS>
using Multiply = void (*)(const int8_t*, const float*, const int32_t*, const Panel<T>&);

template <typename T, int PARTS, int TOKENS>
void multiply_tokens(const int8_t* rows, const float* scales, const int32_t* starts, const Panel<T>& panel) {
    multiply<T, PARTS>(std::make_integer_sequence<int, TOKENS * PARTS>{}, rows, scales, starts, panel);
}

template <typename T, int PARTS, int... BEFORE>
Multiply<T, PARTS> multiply_of(std::integer_sequence<int, BEFORE...>, int64_t tokens) {
    static constexpr Multiply<T, PARTS> by_tokens[] = {multiply_tokens<T, PARTS, BEFORE + 1>...};
    return by_tokens[tokens - 1];
}

// The integers of some tokens.
struct Quantized {
    int8_t* rows;     // [tokens, parts, padded]
    int32_t* starts;  // [tokens, parts]
    float* scales;    // [tokens]
};

inline int64_t padded_features(int64_t features) { return (features + GROUP - 1) / GROUP * GROUP; }

template <typename T, int PARTS>
void quantize_rows(Items items, const T* input, int64_t stride, int64_t features, const Quantized& quantized) {
    const int64_t padded = padded_features(features);
    for (int64_t token; (token = items.take()) >= 0;)
        quantize<T, PARTS>(input + token * stride, features, padded, quantized.rows + token * PARTS * padded,
                           quantized.scales + token, quantized.starts + token * PARTS);
}

// What a thread does of the panels, for all tokens; as linear_panels.
template <typename T, int PARTS>
void int8_panels(Items items, const Quantized& quantized, const uint8_t* weight, const float* scales, const float* bias,
                 T* output, int64_t output_stride, int64_t tokens, int64_t features, int64_t channels,
                 const char* following, int64_t following_lines) {
    constexpr int TOKENS = ROWS / PARTS;
    const int64_t padded = padded_features(features);
    const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;  // of nearly equal size: 9 tokens as 4 + 5, not 8 + 1
    take_each(items, [&](int64_t item, int64_t next) {
        const int64_t channel = item * INT8_PANEL;
        // The next panel arrives from memory while this one is computed with: a share in each block.
        const uint8_t* ahead = next < 0 ? (const uint8_t*)following : weight + next * INT8_PANEL * padded;
        const int64_t lines = next < 0 ? following_lines : INT8_PANEL * padded / 64;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t token = tokens * block / blocks, end = tokens * (block + 1) / blocks;
            const int64_t from = lines * block / blocks, to = lines * (block + 1) / blocks;
            multiply_of<T, PARTS>(std::make_integer_sequence<int, TOKENS>{}, end - token)(
                quantized.rows + token * PARTS * padded, quantized.scales + token, quantized.starts + token * PARTS,
                {weight + channel * padded, padded, scales + channel, bias + channel,
                 output + token * output_stride + channel, output_stride,
                 std::min<int64_t>(INT8_PANEL, channels - channel), ahead + 64 * from, to - from});
        }
    });
}

}  // namespace
