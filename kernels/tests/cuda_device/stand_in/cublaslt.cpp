// A stand-in for libcublasLt.so.13, for tests: plain products by the descriptors that are set, in the stream's order.
// The algorithm is an opaque number, as in the library; a product by one that was not given for its shape is refused.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, EXECUTION_FAILED = 13 };
enum Type { R_32F = 0, R_16F = 2, R_16BF = 14 };

struct Desc {
    int compute, scale;
    int32_t trans_a = 0, trans_b = 0;
};
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};
struct Preference {
    uint64_t workspace_bytes = 0;
    uint32_t reduction_mask = ~0u;
};
struct Algo {
    uint64_t data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

size_t type_bytes(int type) { return type == R_32F ? 4 : 2; }

double half_value(uint16_t bits) {
    int sign = bits >> 15, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    double value = exponent == 0    ? std::ldexp(mantissa, -24)
                   : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                    : std::ldexp(1024 + mantissa, exponent - 25);
    return sign ? -value : value;
}

double read(int type, const void* at, uint64_t index) {
    if (type == R_32F) return static_cast<const float*>(at)[index];
    uint16_t bits = static_cast<const uint16_t*>(at)[index];
    if (type == R_16F) return half_value(bits);
    uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

void write(int type, void* at, uint64_t index, float value) {
    if (type == R_32F) {
        static_cast<float*>(at)[index] = value;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == R_16BF) {
        uint32_t rounded = std::isnan(value) ? 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
        static_cast<uint16_t*>(at)[index] = static_cast<uint16_t>(rounded >> 16);
        return;
    }
    // To the nearest even half, by what two candidates are worth.
    double magnitude = std::fabs(static_cast<double>(value));
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000), half = 0;
    if (std::isnan(value)) {
        half = 0x7e00;
    } else if (magnitude >= 65520.0) {
        half = 0x7c00;
    } else if (magnitude > 0) {
        int exponent = std::max(std::ilogb(magnitude), -14);
        double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
        half = static_cast<uint16_t>((static_cast<uint64_t>(exponent + 14) << 10) + static_cast<uint64_t>(steps));
    }
    static_cast<uint16_t*>(at)[index] = sign | half;
}

struct Product {
    Desc desc;
    Layout a_layout, b_layout, d_layout;
    const void *a, *b;
    void* d;
    float alpha;
};

// An algorithm is good for a weight and any number of rows.
uint64_t shape_key(const Layout& a) { return a.rows * 1000003 + a.cols * 16 + static_cast<uint64_t>(a.type); }

void run(void* argument) {
    auto* product = static_cast<Product*>(argument);
    const auto& [desc, a, b, d, a_data, b_data, d_data, alpha] = *product;
    uint64_t n_inner = desc.trans_a ? a.rows : a.cols;
    // Both operands as rows of the inner dimension.
    std::vector<float> left(d.rows * n_inner), right(d.cols * n_inner);
    for (uint64_t i = 0; i < d.rows; i++)
        for (uint64_t k = 0; k < n_inner; k++)
            left[i * n_inner + k] = static_cast<float>(
                read(a.type, a_data, desc.trans_a ? i * static_cast<uint64_t>(a.ld) + k : k * static_cast<uint64_t>(a.ld) + i));
    for (uint64_t j = 0; j < d.cols; j++)
        for (uint64_t k = 0; k < n_inner; k++)
            right[j * n_inner + k] = static_cast<float>(
                read(b.type, b_data, desc.trans_b ? k * static_cast<uint64_t>(b.ld) + j : j * static_cast<uint64_t>(b.ld) + k));
    for (uint64_t j = 0; j < d.cols; j++)
        for (uint64_t i = 0; i < d.rows; i++) {
            float sum = 0;
            for (uint64_t k = 0; k < n_inner; k++) sum += left[i * n_inner + k] * right[j * n_inner + k];
            write(d.type, d_data, j * static_cast<uint64_t>(d.ld) + i, alpha * sum);
        }
}

bool fits(const Layout& layout, const void* data) {
    using IsDevice = int (*)(uint64_t, size_t);
    static auto is_device = reinterpret_cast<IsDevice>(dlsym(RTLD_DEFAULT, "stand_in_is_device"));
    uint64_t n = (layout.cols - 1) * static_cast<uint64_t>(layout.ld) + layout.rows;
    return is_device(reinterpret_cast<uint64_t>(data), n * type_bytes(layout.type));
}

}  // namespace

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT const char* cublasLtGetStatusName(int) { return "CUBLAS_STATUS_OF_THE_STAND_IN"; }
EXPORT const char* cublasLtGetStatusString(int) { return "a status of the stand-in"; }
EXPORT int cublasLtCreate(void** handle) {
    *handle = new int(0);
    return SUCCESS;
}
EXPORT int cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescCreate(Desc** out, int compute, int scale) {
    *out = new Desc{compute, scale};
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescDestroy(Desc* desc) {
    delete desc;
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t n) {
    if (n != 4) return INVALID_VALUE;
    if (attribute == 3) std::memcpy(&desc->trans_a, value, 4);
    else if (attribute == 4) std::memcpy(&desc->trans_b, value, 4);
    else return NOT_SUPPORTED;
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (type != R_32F && type != R_16F && type != R_16BF) return NOT_SUPPORTED;
    if (rows == 0 || cols == 0 || ld < static_cast<int64_t>(rows)) return INVALID_VALUE;
    *out = new Layout{type, rows, cols, ld};
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceCreate(Preference** out) {
    *out = new Preference;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t n) {
    if (attribute == 1 && n == 8) std::memcpy(&preference->workspace_bytes, value, 8);
    else if (attribute == 3 && n == 4) std::memcpy(&preference->reduction_mask, value, 4);
    else return NOT_SUPPORTED;
    return SUCCESS;
}
// Two algorithms for every shape, the second with a workspace.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Desc*, Layout* a, Layout*, Layout*, Layout*, Preference* preference,
                                          int n_wanted, Heuristic* out, int* n) {
    *n = 0;
    for (int i = 0; i < 2 && i < n_wanted; i++) {
        size_t workspace = i == 0 ? 0 : 1 << 20;
        if (workspace > preference->workspace_bytes) continue;
        out[*n] = Heuristic{};
        out[*n].algo.data[0] = shape_key(*a);
        out[*n].algo.data[1] = static_cast<uint64_t>(i);
        out[*n].workspace = workspace;
        out[*n].waves = 1.0f;
        ++*n;
    }
    return SUCCESS;
}
EXPORT int cublasLtMatmulAlgoCheck(void*, Desc*, Layout* a, Layout*, Layout*, Layout*, const Algo* algo, Heuristic* out) {
    *out = Heuristic{};
    out->algo = *algo;
    out->workspace = algo->data[1] == 1 ? 1 << 20 : 0;
    return algo->data[0] == shape_key(*a) ? SUCCESS : NOT_SUPPORTED;
}
EXPORT int cublasLtMatmul(void*, Desc* desc, const float* alpha, const void* a, Layout* a_layout, const void* b,
                          Layout* b_layout, const float* beta, const void*, Layout*, void* d, Layout* d_layout,
                          const Algo* algo, void*, size_t workspace_bytes, void* stream) {
    if (!algo || algo->data[0] != shape_key(*a_layout) || *beta != 0.0f) return INVALID_VALUE;
    if (algo->data[1] == 1 && workspace_bytes < 1 << 20) return INVALID_VALUE;
    uint64_t a_inner = desc->trans_a ? a_layout->rows : a_layout->cols, a_outer = desc->trans_a ? a_layout->cols : a_layout->rows;
    uint64_t b_inner = desc->trans_b ? b_layout->cols : b_layout->rows, b_outer = desc->trans_b ? b_layout->rows : b_layout->cols;
    if (a_inner != b_inner || a_outer != d_layout->rows || b_outer != d_layout->cols) return INVALID_VALUE;
    if (!fits(*a_layout, a) || !fits(*b_layout, b) || !fits(*d_layout, d)) return EXECUTION_FAILED;
    using Enqueue = int (*)(void*, void (*)(void*), void*);
    static auto enqueue = reinterpret_cast<Enqueue>(dlsym(RTLD_DEFAULT, "stand_in_enqueue"));
    // Kept for good: a captured product runs as often as its graph is launched.
    auto* product = new Product{*desc, *a_layout, *b_layout, *d_layout, a, b, d, *alpha};
    return enqueue(stream, run, product) == 0 ? SUCCESS : EXECUTION_FAILED;
}
