// Vectors of floats, as wide as the CPU's registers, and what is computed with them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int32_t Numbers __attribute__((vector_size(LANES * sizeof(int32_t))));

constexpr int GROUP = 32;               // numbers of an output that share a scale
constexpr int VECTORS = GROUP / LANES;  // of a group

inline Vector load(const float* numbers) {
    Vector result;
    memcpy(&result, numbers, sizeof result);
    return result;
}

inline void store(float* numbers, Vector vector) {
    memcpy(numbers, &vector, sizeof vector);
}

inline float sum(Vector vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)vector);
#else
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) vector[lane] += vector[lane + half];
    }
    return vector[0];
#endif
}

// e to the power of x, for x <= 0, off by 2e-7 at most.
inline Vector exp(Vector x) {
    // 2 to the power of a whole number is the exponent of a float. A polynomial does the rest, which
    // lies between -0.5 and 0.5.
    const Vector lowest = Vector{} - 87.0f;
    x = x > lowest ? x : lowest;
    Vector power = x * 1.44269504f;
    Numbers whole = __builtin_convertvector(power - 0.5f, Numbers);  // rounds towards 0
    Vector rest = power - __builtin_convertvector(whole, Vector);
    Vector result = Vector{} + 1.54035304e-4f;
    for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f,
                         6.93147181e-1f, 1.0f}) {
        result = result * rest + factor;
    }
    return (Vector)((Numbers)result + (whole << 23));
}

// GCC converts small integers to floats one by one, unless it is told the instructions.

inline Vector from_int8s(const int8_t* numbers) {
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i*)numbers);
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)numbers);
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    Vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = numbers[lane];
    return result;
#endif
}

// The 4 bits of each word from `shift` on, minus 8, times scale, plus zero.
inline Vector from_nibbles(const uint32_t* words, int shift, Vector scale, Vector zero) {
#if defined(__AVX512F__)
    // The instruction that looks numbers up in a table of 16 reads no more than the last 4 bits.
    const Vector numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __m512i places = _mm512_srli_epi32(_mm512_loadu_si512(words), shift);
    return (Vector)_mm512_permutexvar_ps(places, (__m512)(numbers * scale + zero));
#elif defined(__AVX2__)
    __m256i numbers = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)words), shift);
    numbers = _mm256_and_si256(numbers, _mm256_set1_epi32(15));
    return (Vector)_mm256_cvtepi32_ps(numbers) * scale + (zero - 8 * scale);
#else
    Vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = float((words[lane] >> shift) & 15) - 8;
    return result * scale + zero;
#endif
}

inline Vector sigmoid(Vector x) {
    const Vector power = exp(x > 0 ? -x : x);  // at most 1
    return (x > 0 ? Vector{} + 1 : power) / (power + 1);
}

// y = function(x), for any number of floats; y may be x.
template <class Function>
inline void each_vector(const float* x, float* y, int64_t size, const Function& function) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, function(load(x + i)));
    if (i < size) {
        float rest[LANES] = {};
        memcpy(rest, x + i, (size - i) * sizeof(float));
        store(rest, function(load(rest)));
        memcpy(y + i, rest, (size - i) * sizeof(float));
    }
}
