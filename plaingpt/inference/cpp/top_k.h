// The largest numbers of rows.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>
#include "thread_pool.h"
#include "vectors.h"

constexpr int64_t STRETCH = 64;  // numbers that are looked at together at first

struct Candidate {
    float number;
    int64_t place;
};

// The largest of some numbers; NaN if one of them is.
inline float largest_of(const float* numbers, int64_t count) {
    Vector largest = Vector{} - INFINITY;
    Numbers is_nan = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vector read = load(numbers + i);
        largest = read > largest ? read : largest;
        is_nan |= read != read;
    }
    float result = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) {
        if (is_nan[lane]) return NAN;
        result = std::max(result, largest[lane]);
    }
    for (; i < count; i++) {
        if (std::isnan(numbers[i])) return NAN;
        result = std::max(result, numbers[i]);
    }
    return result;
}

// The k largest numbers of a row, the largest first, and their places; of equal ones, the first.
// The row must have k stretches. Returns false if a number is NaN, which has no order.
inline bool top_k(const float* row, int64_t size, int64_t k, float* largest, int64_t* places) {
    std::vector<float> highest;
    for (int64_t begin = 0; begin < size; begin += STRETCH) {
        highest.push_back(largest_of(row + begin, std::min(STRETCH, size - begin)));
        if (std::isnan(highest.back())) return false;
    }
    std::vector<float> in_order = highest;
    std::nth_element(in_order.begin(), in_order.begin() + (k - 1), in_order.end(),
                     [](float a, float b) { return a > b; });
    const float least = in_order[k - 1];
    // k stretches have a number of at least `least` each, so the k largest are no smaller.
    std::vector<Candidate> candidates;
    for (size_t stretch = 0; stretch < highest.size(); stretch++) {
        if (highest[stretch] < least) continue;
        const int64_t begin = stretch * STRETCH;
        for (int64_t i = begin; i < std::min(begin + STRETCH, size); i++) {
            if (row[i] >= least) candidates.push_back({row[i], i});
        }
    }
    const auto comes_first = [](const Candidate& a, const Candidate& b) {
        return a.number != b.number ? a.number > b.number : a.place < b.place;
    };
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(),
                     comes_first);
    std::sort(candidates.begin(), candidates.begin() + k, comes_first);
    for (int64_t i = 0; i < k; i++) {
        largest[i] = candidates[i].number;
        places[i] = candidates[i].place;
    }
    return true;
}

// The same for rows of so many numbers that lie `stride` numbers apart; results are (rows, k).
inline bool top_k_of_rows(const float* numbers, int64_t rows, int64_t stride, int64_t size,
                          int64_t k, float* largest, int64_t* places, int64_t threads) {
    std::atomic<bool> has_order{true};
    each_of(rows, threads, [&](int64_t row) {
        if (!top_k(numbers + row * stride, size, k, largest + row * k, places + row * k)) {
            has_order = false;
        }
    });
    return has_order;
}
