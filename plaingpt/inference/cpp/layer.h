// A linear layer with all that a block computes before and after it.
#pragma once
#include <vector>
#include "linear.h"
#include "quantized.h"

// y = activation(norm(x) times the transposed weights, plus bias) + residual, for each row. All
// numbers of inputs are multiples of GROUP. decoding_kernels.py has the same fields.
struct Layer {
    // These change from call to call.
    const float* x;         // (rows, inputs)
    const float* residual;  // (rows, outputs), or nullptr
    float* y;               // (rows, outputs); with SwiGLU (rows, outputs / 2)
    int64_t rows;
    int64_t threads;
    // These do not.
    const void* weights;       // nullptr: y = norm(x)
    int64_t bits;              // of a weight: 32 or 16 (bfloat16), or quantised to 8 or 4
    int64_t inputs;
    int64_t outputs;
    const float* bias;         // (outputs), or nullptr
    int64_t norm;
    const float* norm_weight;  // (inputs)
    const float* norm_bias;    // (inputs), or nullptr
    double norm_eps;
    int64_t activation;
};

enum Norm { NO_NORM, LAYER_NORM, RMS_NORM };
enum Activation { NO_ACTIVATION, GELU_TANH, GELU_EXACT, SQUARED_RELU, SWIGLU };

// ---- norms ----

inline float mean_of(const float* x, int64_t size) {
    Vector total = {};
    for (int64_t i = 0; i < size; i += LANES) total += load(x + i);
    return sum(total) / size;
}

inline float mean_square_from(const float* x, float center, int64_t size) {
    Vector total = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Vector distances = load(x + i) - center;
        total += distances * distances;
    }
    return sum(total) / size;
}

// Layer norm or RMSNorm of a row.
inline void normalise(const Layer& layer, const float* x, float* y) {
    const int64_t size = layer.inputs;
    const float center = layer.norm == LAYER_NORM ? mean_of(x, size) : 0.0f;
    const float variance = mean_square_from(x, center, size);
    const float factor = 1 / std::sqrt(variance + float(layer.norm_eps));
    for (int64_t i = 0; i < size; i += LANES) {
        Vector numbers = (load(x + i) - center) * factor * load(layer.norm_weight + i);
        if (layer.norm_bias) numbers += load(layer.norm_bias + i);
        store(y + i, numbers);
    }
}

// ---- activations ----

// tanh(x) is 2 sigmoid(2 x) - 1, so GELU's x (1 + tanh) / 2 is x sigmoid(2 …).
inline Vector gelu_tanh(Vector x) {
    const float factor = 0.7978845608f;  // sqrt(2 / pi)
    return x * sigmoid(2 * factor * (x + 0.044715f * x * x * x));
}

inline Vector gelu_exact(Vector x) {
    for (int lane = 0; lane < LANES; lane++) {
        x[lane] *= 0.5f * (1 + std::erf(x[lane] * 0.7071067812f));
    }
    return x;
}

inline Vector squared_relu(Vector x) {
    x = x > 0 ? x : Vector{};
    return x * x;
}

inline Vector silu(Vector x) {
    return x * sigmoid(x);
}

// Applies the activation to a row; SwiGLU halves it, and the gates come first.
inline void activate(const Layer& layer, const float* row, float* y) {
    const int64_t size = layer.outputs;
    switch (layer.activation) {
        case GELU_TANH: each_vector(row, y, size, gelu_tanh); break;
        case GELU_EXACT: each_vector(row, y, size, gelu_exact); break;
        case SQUARED_RELU: each_vector(row, y, size, squared_relu); break;
        case SWIGLU:
            each_vector(row, y, size / 2, silu);
            for (int64_t i = 0; i < size / 2; i++) y[i] *= row[size / 2 + i];
    }
}

// ---- all of it ----

// The product and the bias.
inline void multiply(const Layer& layer, const float* x, float* y) {
    const int64_t rows = layer.rows;
    const int64_t inputs = layer.inputs;
    const int64_t outputs = layer.outputs;
    const auto plain = [&](const auto& weights) {
        linear(weights, x, layer.bias, y, rows, layer.threads);
    };
    const auto quantized = [&](const auto& weights) {
        quantized_linear(weights, x, layer.bias, y, rows, outputs, layer.threads);
    };
    switch (layer.bits) {
        case 32: plain(Float32{(const float*)layer.weights, inputs, outputs}); break;
        case 16: plain(BFloat16{(const uint16_t*)layer.weights, inputs, outputs}); break;
        case 8: quantized(Int8{(const uint8_t*)layer.weights, inputs / GROUP}); break;
        case 4: quantized(Int4{(const uint8_t*)layer.weights, inputs / GROUP}); break;
    }
}

inline void run(const Layer& layer) {
    const float* x = layer.x;
    if (!layer.weights) {  // the norm alone
        each_of(layer.rows, layer.threads, [&](int64_t row) {
            normalise(layer, x + row * layer.inputs, layer.y + row * layer.inputs);
        });
        return;
    }
    std::vector<float> normalised;
    if (layer.norm != NO_NORM) {
        normalised.resize(layer.rows * layer.inputs);
        each_of(layer.rows, layer.threads, [&](int64_t row) {
            normalise(layer, x + row * layer.inputs, &normalised[row * layer.inputs]);
        });
        x = normalised.data();
    }

    float* y = layer.y;
    std::vector<float> wide;
    if (layer.activation == SWIGLU) {
        wide.resize(layer.rows * layer.outputs);
        y = wide.data();
    }
    multiply(layer, x, y);

    const int64_t width = layer.activation == SWIGLU ? layer.outputs / 2 : layer.outputs;
    if (layer.activation != NO_ACTIVATION) {
        each_of(layer.rows, layer.threads, [&](int64_t row) {
            activate(layer, y + row * layer.outputs, layer.y + row * width);
        });
    }
    if (layer.residual) {
        for (int64_t i = 0; i < layer.rows * width; i++) layer.y[i] += layer.residual[i];
    }
}
