// Vectors of floats, as wide as the CPU's registers, and what is computed with them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vectors of 512 bits pay where they have an instruction for products of bytes.
#if defined(__AVX512VNNI__)
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

// The next multiple of LANES.
inline int64_t round_up(int64_t number) {
    return (number + LANES - 1) / LANES * LANES;
}

// While the CPU multiplies, it foresees too little of what it reads next. With this distance, a
// token of int4 takes 3.5 ms instead of 4.4.
constexpr int64_t AHEAD_BYTES = 8192;

// Begins to fetch so many bytes into the second of the CPU's caches.
inline void fetch(const void* bytes, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch((const char*)bytes + i, 0, 2);
}

inline Vector load(const float* numbers) {
    Vector result;
    memcpy(&result, numbers, sizeof result);
    return result;
}

inline void store(float* numbers, Vector vector) {
    memcpy(numbers, &vector, sizeof vector);
}

// a times b plus sum, rounded once where the CPU can. The compiler may not choose that: it does so for
// some numbers of rows and not for others, and a row would depend on its neighbours.
inline Vector multiply_add(Vector a, Vector b, Vector sum) {
#if defined(__AVX512VNNI__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < LANES; lane++) sum[lane] = std::fma(a[lane], b[lane], sum[lane]);
    return sum;
#else
    return a * b + sum;
#endif
}

inline float sum(Vector vector) {
#if defined(__AVX512VNNI__)
    return _mm512_reduce_add_ps((__m512)vector);
#else
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) vector[lane] += vector[lane + half];
    }
    return vector[0];
#endif
}

// GCC converts words of 16 bits one by one, unless it is told the instructions.
inline Vector from_bfloat16s(const uint16_t* numbers) {
#if defined(__AVX512VNNI__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)numbers));
    return (Vector)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)numbers));
    return (Vector)_mm256_slli_epi32(wide, 16);
#else
    Words wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = uint32_t(numbers[lane]) << 16;
    return (Vector)wide;
#endif
}

// To the nearest whole number, the even one of two.
inline Numbers round(Vector numbers) {
#if defined(__AVX512VNNI__)
    return (Numbers)_mm512_cvtps_epi32((__m512)numbers);
#elif defined(__AVX2__)
    return (Numbers)_mm256_cvtps_epi32((__m256)numbers);
#else
    Numbers result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = int32_t(std::nearbyint(numbers[lane]));
    return result;
#endif
}

inline int32_t largest(Numbers numbers) {
#if defined(__AVX512VNNI__)
    return _mm512_reduce_max_epi32((__m512i)numbers);
#else
    int32_t result = numbers[0];
    for (int lane = 1; lane < LANES; lane++) result = std::max(result, numbers[lane]);
    return result;
#endif
}

// ---- groups ----

// A kind of arithmetic knows the GROUP numbers of an input or of an output's weights, and how to
// add their products to a sum.

struct FloatMath {
    typedef float Input;
    struct Group {
        Vector vectors[VECTORS];
    };
    static constexpr int MOST_ROWS = LANES == 16 ? 12 : 4;  // that are multiplied together
    static constexpr int MOST_SUMS = LANES == 16 ? 24 : 8;

    static Group to_group(const Vector* floats) {
        Group group;
        for (int v = 0; v < VECTORS; v++) group.vectors[v] = floats[v];
        return group;
    }

    static Group load_group(const float* numbers) {
        Group group;
        for (int v = 0; v < VECTORS; v++) group.vectors[v] = load(numbers + v * LANES);
        return group;
    }

    static Vector add_products(Vector sum, const Group& a, const Group& b) {
        for (int v = 0; v < VECTORS; v++) sum = multiply_add(a.vectors[v], b.vectors[v], sum);
        return sum;
    }

    static Group load_weights(const float* numbers) {
        return load_group(numbers);
    }

    static Group load_weights(const uint16_t* numbers) {
        Group group;
        for (int v = 0; v < VECTORS; v++) {
            group.vectors[v] = from_bfloat16s(numbers + v * LANES);
        }
        return group;
    }
};

#if defined(__AVX512BF16__)

// One instruction multiplies two groups in bfloat16, and adds in float.
struct BFloat16Math {
    typedef uint16_t Input;
    typedef __m512bh Group;
    static constexpr int MOST_ROWS = 12;
    static constexpr int MOST_SUMS = 24;  // of 32 registers

    static Group to_group(const Vector* floats) {
        return _mm512_cvtne2ps_pbh((__m512)floats[1], (__m512)floats[0]);
    }

    static Group load_group(const uint16_t* numbers) {
        return (Group)_mm512_loadu_si512(numbers);
    }

    static Vector add_products(Vector sum, Group a, Group b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b);
    }

    static Group load_weights(const uint16_t* numbers) {
        return load_group(numbers);
    }
};

typedef BFloat16Math FastMath;

#else

typedef FloatMath FastMath;

#endif

// ---- functions ----

// e to the power of x, for x <= 0, off by 2e-7 at most.
inline Vector exp(Vector x) {
    // 2 to the power of a whole number is the exponent of a float. A polynomial does the rest,
    // which lies between -0.5 and 0.5.
    const Vector lowest = Vector{} - 87.0f;
    x = x > lowest ? x : lowest;
    Vector power = x * 1.44269504f;
    Numbers whole = __builtin_convertvector(power - 0.5f, Numbers);  // rounds towards 0
    Vector rest = power - __builtin_convertvector(whole, Vector);
    Vector result = Vector{} + 1.54035304e-4f;
    for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f,
                         6.93147181e-1f, 1.0f}) {
        result = multiply_add(result, rest, Vector{} + factor);
    }
    return (Vector)((Numbers)result + (whole << 23));
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
