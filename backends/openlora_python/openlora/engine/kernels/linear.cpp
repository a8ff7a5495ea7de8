// A group of linears that share their input, with the adapters of the step beside them (linear.h, lora.h).

#include <omp.h>

#include "linear.h"
#include "lora.h"

namespace {

constexpr int64_t BLOCK = 120;  // rows: what is computed for them is still in the cache when the adapters come to it

// `weight` may be null: then only the adapters are added to what is there.
template <typename T>
void adapted_linear(const T* input, int64_t stride, const T* weight, const float* bias, T* output, int64_t output_stride,
                    int64_t rows, int64_t features, int64_t columns, const Segment* segments, int64_t count,
                    int64_t group, int64_t members, void* scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        auto* shrunk = (typename Shrunk<T>::type*)scratch;
        LoraShare<T> share;
        for (int64_t from = 0; from < rows; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, rows);
            if (count) {
                share.collect(input, stride, output, output_stride, features, segments, count, group, members, from, to,
                              shrunk, thread, team);
                share.shrink(stride, features);
            }
            if (weight)
                linear_share<T>(input, stride, weight, bias, output, output_stride, features, columns, from, to, thread,
                                team);
            if (count) {
#pragma omp barrier
                share.expand(output_stride);
            }
        }
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    extern "C" void adapted_linear_##NAME(                                                                           \
        const T* input, int64_t stride, const T* weight, const float* bias, T* output, int64_t output_stride,        \
        int64_t rows, int64_t features, int64_t columns, const Segment* segments, int64_t count, int64_t group,      \
        int64_t members, void* scratch, int threads) {                                                               \
        adapted_linear(input, stride, weight, bias, output, output_stride, rows, features, columns, segments, count, \
                       group, members, scratch, threads);                                                            \
    }

EXPORT(float, float)
EXPORT(bf16, bf16)
