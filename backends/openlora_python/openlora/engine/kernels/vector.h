// Sixteen float lanes, whatever the CPU: GCC vector types, with AVX-512 BF16 where the compiler may use it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

static inline float to_float(bf16 value) {
    uint32_t word = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}
static inline float to_float(float value) { return value; }

// Round to nearest even; NaN stays NaN.
static inline bf16 round_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return {uint16_t((word >> 16) | 0x40)};
    return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}
static inline void store_one(bf16* at, float value) { *at = round_bf16(value); }
static inline void store_one(float* at, float value) { *at = value; }

static inline floats splat(float value) { return floats{} + value; }

template <typename V, typename T>
static inline V load_as(const T* from) {
    V value;
    memcpy(&value, from, sizeof(V));
    return value;
}

// 16 elements as floats.
static inline floats load(const float* from) { return load_as<floats>(from); }
static inline floats load(const bf16* from) {
#ifdef __AVX512F__
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return (floats)_mm512_slli_epi32(wide, 16);
#else
    words wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = uint32_t(from[lane].bits) << 16;
    return (floats)wide;
#endif
}
static inline void store(float* to, floats value) { memcpy(to, &value, sizeof(value)); }
static inline void store(bf16* to, floats value) {
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &narrow, sizeof(narrow));
#else
    for (int lane = 0; lane < LANES; lane++) to[lane] = round_bf16(value[lane]);
#endif
}

// A vector of `STEP` elements, as the dot product below takes them.
template <typename T>
struct Packed;
template <>
struct Packed<float> {
    using type = floats;
    static constexpr int STEP = 16;
};
template <>
struct Packed<bf16> {
    using type = words;  // two elements in a lane
    static constexpr int STEP = 32;
};

template <typename T>
static inline typename Packed<T>::type load_packed(const T* from) {
    return load_as<typename Packed<T>::type>(from);
}

// As load_packed, of `count` < STEP elements with zeros behind them.
template <typename T>
static inline typename Packed<T>::type load_tail(const T* from, int64_t count) {
    typename Packed<T>::type value = {};
    memcpy(&value, from, size_t(count) * sizeof(T));
    return value;
}

// sum + a·b, lane by lane; a lane of bf16 holds two products.
static inline floats dot(floats sum, floats a, floats b) { return sum + a * b; }
static inline floats dot(floats sum, words a, words b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const words high = words{} + 0xffff0000u;
    return sum + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & high) * (floats)(b & high);
#endif
}

static inline float sum_lanes(floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)value);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
#endif
}

// The sums of 16 vectors, lane i that of value[i].
static inline floats sum_each(const floats value[16]) {
#ifdef __AVX512F__
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)value[i], b = (__m512)value[i + 8];
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; i++) {
        __m512 a = eight[i], b = eight[i + 4];
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(four[i], four[i + 2]), _mm512_unpackhi_ps(four[i], four[i + 2]));
    __m512 sums = _mm512_add_ps(_mm512_unpacklo_ps(two[0], two[1]), _mm512_unpackhi_ps(two[0], two[1]));
    return (floats)_mm512_shuffle_f32x4(sums, sums, 0xd8);
#else
    floats sums;
    for (int i = 0; i < 16; i++) sums[i] = sum_lanes(value[i]);
    return sums;
#endif
}

// eˣ to about 2 ulp for x ≤ 0: 2ⁿ·p(f) with n = round(x·log2 e) and |f| ≤ ln 2 / 2 (Cephes' polynomial).
static inline floats exp_lanes(floats x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    const floats magic = splat(12582912.0f);  // 1.5·2²³: adding it rounds to an integer
    floats n = (x * 1.44269504f + magic) - magic;
    floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return p * (floats)power;
}
