// Attention of one new position of each row to the key-value cache.
#pragma once
#include <algorithm>
#include <vector>
#include "thread_pool.h"
#include "vectors.h"

inline float dot(const float* a, const float* b, int64_t length) {
    Vector total = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) total = multiply_add(load(a + i), load(b + i), total);
    float result = sum(total);
    for (; i < length; i++) result += a[i] * b[i];
    return result;
}

// total += weight * numbers
inline void add_scaled(float* total, float weight, const float* numbers, int64_t length) {
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        store(total + i, multiply_add(load(numbers + i), Vector{} + weight, load(total + i)));
    }
    for (; i < length; i++) total[i] += weight * numbers[i];
}

// Turns the first `count` scores into the weights of a softmax. There is room for whole vectors.
inline void softmax(float* scores, int64_t count) {
    const float highest = *std::max_element(scores, scores + count);
    const int64_t room = round_up(count);
    std::fill(scores + count, scores + room, -INFINITY);
    Vector total = {};
    for (int64_t i = 0; i < room; i += LANES) {
        Vector weights = exp(load(scores + i) - highest);
        store(scores + i, weights);
        total += weights;
    }
    const float factor = 1 / sum(total);
    for (int64_t i = 0; i < room; i += LANES) store(scores + i, load(scores + i) * factor);
}

// What attention reads and writes.
struct Attention {
    const float* q;        // (rows, heads, size): heads lie together,
    int64_t q_stride;      // and rows so many floats apart
    const float* k;        // (rows, kv_heads, size), of the new position
    int64_t k_stride;
    const float* v;        // the same
    int64_t v_stride;
    float* keys;           // the cache, (slots, room, kv_heads, size)
    float* values;
    const int64_t* slots;  // of each row
    const int64_t* positions;  // of each row, where the new key and value are stored
    const float* slopes;   // ALiBi's, of each head, or nullptr
    float* y;              // (rows, heads, size)
    int64_t rows;
    int64_t heads;
    int64_t kv_heads;
    int64_t size;          // of a head
    int64_t room;          // positions of a slot
    int64_t threads;
};

// Attention of the heads of keys from first to last - 1 of a row.
//
// Position by position, since the cache has all heads of a position side by side.
inline void attend_heads(const Attention& a, int64_t row, int64_t first, int64_t last) {
    const int64_t shared_by = a.heads / a.kv_heads;  // queries of a head of keys
    const int64_t stride = a.kv_heads * a.size;      // from position to position
    const int64_t position = a.positions[row];
    const int64_t count = position + 1;
    float* keys = a.keys + a.slots[row] * a.room * stride + first * a.size;
    float* values = a.values + a.slots[row] * a.room * stride + first * a.size;
    const int64_t bytes = (last - first) * a.size * sizeof(float);
    memcpy(keys + position * stride, a.k + row * a.k_stride + first * a.size, bytes);
    memcpy(values + position * stride, a.v + row * a.v_stride + first * a.size, bytes);

    const int64_t queries = (last - first) * shared_by;
    const int64_t first_query = first * shared_by;
    const float* q = a.q + row * a.q_stride + first_query * a.size;
    float* y = a.y + (row * a.heads + first_query) * a.size;
    const float scale = 1 / std::sqrt(float(a.size));
    const int64_t room = round_up(count);
    std::vector<float> scores(queries * room);
    std::vector<int64_t> head_of(queries);  // of keys
    for (int64_t i = 0; i < queries; i++) head_of[i] = i / shared_by;
    const int64_t ahead = AHEAD_BYTES / bytes + 1;  // positions
    for (int64_t t = 0; t < count; t++) {
        fetch(keys + (t + ahead) * stride, bytes);
        for (int64_t i = 0; i < queries; i++) {
            const float* key = keys + t * stride + head_of[i] * a.size;
            float& score = scores[i * room + t];
            score = dot(q + i * a.size, key, a.size) * scale;
            if (a.slopes) score -= a.slopes[first_query + i] * float(position - t);
        }
    }
    for (int64_t t = 0; t < ahead; t++) fetch(values + t * stride, bytes);
    for (int64_t i = 0; i < queries; i++) softmax(&scores[i * room], count);
    std::fill(y, y + queries * a.size, 0.0f);
    for (int64_t t = 0; t < count; t++) {
        fetch(values + (t + ahead) * stride, bytes);
        for (int64_t i = 0; i < queries; i++) {
            const float* value = values + t * stride + head_of[i] * a.size;
            add_scaled(y + i * a.size, scores[i * room + t], value, a.size);
        }
    }
}

inline void attend_all(const Attention& a) {
    // Few rows are shared out by their heads.
    int64_t parts = a.rows >= 2 * a.threads ? 1 : std::min(a.threads, a.kv_heads);
    each_of(a.rows * parts, a.threads, [&](int64_t task) {
        const int64_t row = task / parts;
        const int64_t part = task % parts;
        attend_heads(a, row, a.kv_heads * part / parts, a.kv_heads * (part + 1) / parts);
    });
}
