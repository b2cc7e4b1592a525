// Attention of one new position of each row to the key-value cache.
#pragma once
#include <vector>
#include "thread_pool.h"
#include "vectors.h"

// Rows of a head lie so far apart that the CPU does not foresee the next one.
constexpr int64_t AHEAD = 8;  // rows

// Begins to fetch the 64 floats from here on.
inline void prefetch(const float* numbers) {
    for (int i = 0; i < 64; i += 16) __builtin_prefetch(numbers + i);
}

inline float dot(const float* a, const float* b, int64_t length) {
    Vector total = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < length; i++) result += a[i] * b[i];
    return result;
}

// The sum of `count` rows of values, which are `stride` floats apart, each times its weight.
inline void weighted_sum(const float* weights, const float* values, int64_t count, int64_t stride,
                         float* result, int64_t size) {
    constexpr int AT_ONCE = 64 / LANES;  // vectors
    int64_t i = 0;
    for (; i + AT_ONCE * LANES <= size; i += AT_ONCE * LANES) {
        Vector totals[AT_ONCE] = {};
        for (int64_t t = 0; t < count; t++) {
            const float* row = values + t * stride + i;
            prefetch(row + AHEAD * stride);
            for (int v = 0; v < AT_ONCE; v++) totals[v] += weights[t] * load(row + v * LANES);
        }
        for (int v = 0; v < AT_ONCE; v++) store(result + i + v * LANES, totals[v]);
    }
    for (; i < size; i++) {
        result[i] = 0;
        for (int64_t t = 0; t < count; t++) result[i] += weights[t] * values[t * stride + i];
    }
}

// Turns the first `count` scores into the weights of a softmax. There is room for whole vectors.
inline void softmax(std::vector<float>& scores, int64_t count) {
    const float highest = *std::max_element(scores.begin(), scores.begin() + count);
    std::fill(scores.begin() + count, scores.end(), -INFINITY);
    Vector total = {};
    for (size_t i = 0; i < scores.size(); i += LANES) {
        Vector weights = exp(load(&scores[i]) - highest);
        store(&scores[i], weights);
        total += weights;
    }
    const float factor = 1 / sum(total);
    for (size_t i = 0; i < scores.size(); i += LANES) {
        store(&scores[i], load(&scores[i]) * factor);
    }
}

// Attention of one new position of each row to its own cache, which first gets its key and value.
//
// q (rows, heads, size), k and v (rows, kv_heads, size): heads lie together, rows are
// q_stride, k_stride and v_stride floats apart.
// keys, values: (slots, room, kv_heads, size). slots, positions: of each row.
// slopes: ALiBi's, of each head, or nullptr. y: (rows, heads, size).
inline void decode_attention(const float* q, int64_t q_stride, const float* k, int64_t k_stride,
                             const float* v, int64_t v_stride, float* keys, float* values,
                             const int64_t* slots, const int64_t* positions, const float* slopes,
                             float* y, int64_t rows, int64_t heads, int64_t kv_heads, int64_t size,
                             int64_t room, int64_t threads) {
    const int64_t shared_by = heads / kv_heads;  // queries of a head of keys
    const float scale = 1 / std::sqrt(float(size));
    const int64_t position_stride = kv_heads * size;
    each_of(rows * kv_heads, threads, [&](int64_t task) {
        const int64_t row = task / kv_heads;
        const int64_t kv_head = task % kv_heads;
        const int64_t position = positions[row];
        const int64_t begin = slots[row] * room * position_stride + kv_head * size;
        float* row_keys = keys + begin;
        float* row_values = values + begin;
        memcpy(row_keys + position * position_stride, k + row * k_stride + kv_head * size,
               size * sizeof(float));
        memcpy(row_values + position * position_stride, v + row * v_stride + kv_head * size,
               size * sizeof(float));

        const int64_t count = position + 1;
        std::vector<float> scores((count + LANES - 1) / LANES * LANES);
        for (int64_t head = kv_head * shared_by; head < (kv_head + 1) * shared_by; head++) {
            const float* query = q + row * q_stride + head * size;
            for (int64_t t = 0; t < count; t++) {
                prefetch(row_keys + (t + AHEAD) * position_stride);
                scores[t] = dot(query, row_keys + t * position_stride, size) * scale;
                if (slopes) scores[t] -= slopes[head] * float(position - t);
            }
            softmax(scores, count);
            weighted_sum(scores.data(), row_values, count, position_stride,
                         y + (row * heads + head) * size, size);
        }
    });
}
