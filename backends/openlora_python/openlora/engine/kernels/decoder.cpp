// Computes a list of operations on the rows of a step, all layers of a decoder for example, in one parallel region: what
// lies between two operations is a barrier of spinning threads, no dispatch. `engine/decoder.py` makes the list.

#include <omp.h>

#include "attention.h"
#include "elementwise.h"
#include "int8_linear.h"
#include "linear.h"
#include "lora.h"

enum Kind : int32_t { NORM, LINEAR, HEADS, ATTENTION, GATE };

// What a field means is said at the kind that reads it. Columns of a buffer are elements of a row.
struct Operation {
    int32_t kind;
    int32_t input, output, residual;  // buffers
    const void *weight, *key_weight;
    const float *bias, *scales;
    void *keys, *values;  // of one layer in the paged cache
    int64_t features, columns;
    int64_t group;
    int64_t heads, kv_heads, head_dim, rotated, window;
    int32_t rotation, activation, parts, unused;
    float epsilon, offset, scaling, softcap;
};

struct Buffer {
    void* rows;
    int64_t stride;  // from row to row, in elements
};

struct Step {
    const Buffer* buffers;
    const Segment* segments;
    void* shrunk;     // memory for what adapters shrink
    void* quantized;  // memory for integer activations
    const int64_t* slots;  // [rows], where in the cache a token's key and value go
    const Sequence* sequences;
    const int32_t* tables;  // [sequences, table_width] of blocks
    const void *cos[2], *sin[2];  // [rows, rotated], by `rotation`
    int64_t rows, segment_count, members, sequence_count, table_width, block_size;
};

namespace {

constexpr int64_t BLOCK = 120;  // rows: what is computed for them is still in the cache when the adapters come to it
constexpr int64_t INT8_BLOCK = 480;

// One thread of a step.
template <typename T>
class Worker {
  public:
    Worker(const Step& step, Member member) : step(step), member(member) {}

    void run(const Operation* operations, int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            const Operation& operation = operations[i];
            switch (operation.kind) {
                case NORM: norm(operation); break;
                case LINEAR: linear(operation, next_linear(operations, i + 1, count)); break;
                case HEADS: heads(operation); break;
                case ATTENTION: attention(operation); break;
                case GATE: gate(operation); break;
            }
#pragma omp barrier
        }
    }

    // At most so many phases has one operation.
    static int64_t phases(int64_t rows) { return 4 * ((rows + BLOCK - 1) / BLOCK); }

  private:
    T* row(int32_t buffer, int64_t index) const {
        return (T*)step.buffers[buffer].rows + index * step.buffers[buffer].stride;
    }
    int64_t stride(int32_t buffer) const { return step.buffers[buffer].stride; }

    // [residual += input, then of the residual:] output = rms_norm(input) · weight, over `features`.
    void norm(const Operation& o) {
        Items items(member, step.rows);
        for (int64_t r; (r = items.take()) >= 0;) {
            const T* input = row(o.input, r);
            if (o.residual >= 0) {
                add_row(input, row(o.residual, r), o.features);
                input = row(o.residual, r);
            }
            rms_norm(input, (const T*)o.weight, row(o.output, r), o.features, o.epsilon, o.offset);
        }
    }

    // output = input · weightᵀ + bias and, where `group` is not negative, what the step's adapters add. `weight` is as in
    // linear.h, or with `parts` as in int8_linear.h.
    void linear(const Operation& o, const Operation* next) {
        const bool adapters = o.group >= 0 && step.segment_count;
        const int64_t block = o.parts ? INT8_BLOCK : BLOCK;
        auto* shrunk = (typename Shrunk<T>::type*)step.shrunk;
        for (int64_t from = 0; from < step.rows; from += block) {
            const int64_t to = std::min(from + block, step.rows);
            if (adapters) {
                lora.collect(row(o.input, 0), stride(o.input), row(o.output, 0), stride(o.output), o.features,
                             step.segments, step.segment_count, o.group, step.members, from, to, shrunk, member.team);
                lora.shrink(member, stride(o.input), o.features);
            }
            switch (o.parts) {
                case 0: plain(o, next, from, to); break;
                case 1: int8<1>(o, next, from, to); break;
                case 2: int8<2>(o, next, from, to); break;
            }
            if (adapters) {
#pragma omp barrier
                lora.expand(member, stride(o.output));
            }
            if (o.parts && to < step.rows) {  // before the integers are overwritten
#pragma omp barrier
            }
        }
    }

    void plain(const Operation& o, const Operation* next, int64_t from, int64_t to) {
        linear_panels<T>(Items(member, panels(o)), row(o.input, 0), stride(o.input), (const T*)o.weight, o.bias,
                         row(o.output, 0), stride(o.output), o.features, o.columns, from, to, first_panel(next),
                         next ? panel_bytes(*next) / 64 : 0);
    }

    template <int PARTS>
    void int8(const Operation& o, const Operation* next, int64_t from, int64_t to) {
        const int64_t rows = to - from;
        auto* bytes = (int8_t*)step.quantized;
        auto* starts = (int32_t*)(bytes + rows * PARTS * padded_features(o.features));
        const Quantized quantized{bytes, starts, (float*)(starts + rows * PARTS)};
        quantize_rows<T, PARTS>(Items(member, rows), row(o.input, from), stride(o.input), o.features, quantized);
#pragma omp barrier
        int8_panels<T, PARTS>(Items(member, panels(o)), quantized, (const uint8_t*)o.weight, o.scales, o.bias,
                              row(o.output, from), stride(o.output), rows, o.features, o.columns, first_panel(next),
                              next ? panel_bytes(*next) / 64 : 0);
    }

    // Of the rows `heads` of query, `kv_heads` of key and of value that lie side by side in `input`: query and key are
    // normed, where there are weights, and turned; the query stays in place, key and value go into the cache.
    void heads(const Operation& o) {
        const T *cos = (const T*)step.cos[o.rotation], *sin = (const T*)step.sin[o.rotation];
        Items items(member, step.rows);
        for (int64_t r; (r = items.take()) >= 0;) {
            T* query = row(o.input, r);
            T* key = query + o.heads * o.head_dim;
            const T* value = key + o.kv_heads * o.head_dim;
            const int64_t slot = step.slots[r] * o.kv_heads * o.head_dim;
            const T *c = cos + r * o.rotated, *s = sin + r * o.rotated;
            for (int64_t h = 0; h < o.heads; h++, query += o.head_dim) {
                if (o.weight) rms_norm(query, (const T*)o.weight, query, o.head_dim, o.epsilon, o.offset);
                rotate_head(query, c, s, query, o.rotated, o.head_dim);
            }
            for (int64_t h = 0; h < o.kv_heads; h++, key += o.head_dim) {
                if (o.key_weight) rms_norm(key, (const T*)o.key_weight, key, o.head_dim, o.epsilon, o.offset);
                rotate_head(key, c, s, (T*)o.keys + slot + h * o.head_dim, o.rotated, o.head_dim);
            }
            memcpy((T*)o.values + slot, value, o.kv_heads * o.head_dim * sizeof(T));
        }
    }

    // output = what the queries in `input` find in the cache (attention.h).
    void attention(const Operation& o) {
        const Shape shape{o.heads,  o.kv_heads, o.head_dim, step.block_size, stride(o.input), stride(o.output),
                          step.table_width, o.window, o.scaling, o.softcap};
        paged_attention<T>(member, row(o.input, 0), (const T*)o.keys, (const T*)o.values, row(o.output, 0), shape,
                           step.sequences, step.sequence_count, step.tables, scratch);
    }

    // output = activation(first half of the input's columns) · second half, each of `features`.
    void gate(const Operation& o) {
        Items items(member, step.rows);
        for (int64_t r; (r = items.take()) >= 0;) {
            const T* input = row(o.input, r);
            gate_row(input, input + o.features, row(o.output, r), o.features, Activation(o.activation));
        }
    }

    static int64_t panels(const Operation& o) { return (o.columns + PANEL - 1) / PANEL; }
    static int64_t panel_bytes(const Operation& o) {
        return PANEL * (o.parts ? padded_features(o.features) : o.features * int64_t(sizeof(T)));
    }
    static const Operation* next_linear(const Operation* operations, int64_t from, int64_t count) {
        for (int64_t i = from; i < count; i++)
            if (operations[i].kind == LINEAR) return operations + i;
        return nullptr;
    }
    // With which this thread begins.
    const char* first_panel(const Operation* o) const {
        return o ? (const char*)o->weight + panels(*o) * member.thread / member.team * panel_bytes(*o) : nullptr;
    }

    const Step& step;
    Member member;
    LoraWork<T> lora;
    AttentionScratch scratch;
};

template <typename T>
void compute(const Operation* operations, int64_t count, const Step& step, int threads) {
    if (!step.rows) return;
    std::vector<Taken> taken(count * Worker<T>::phases(step.rows) * threads);
#pragma omp parallel num_threads(threads)
    Worker<T>(step, {omp_get_thread_num(), omp_get_num_threads(), taken.data()}).run(operations, count);
}

}  // namespace

extern "C" void compute_float(const Operation* operations, int64_t count, const Step* step, int threads) {
    compute<float>(operations, count, *step, threads);
}

extern "C" void compute_bf16(const Operation* operations, int64_t count, const Step* step, int threads) {
    compute<bf16>(operations, count, *step, threads);
}
