// Rows in 8 bits, each with a scale of its own, so that no row depends on the others; those of integers are rotated
// first. Equations: fastgfn/reference/quantized.py.
#include "checks.h"
#include "vector_math.h"

#include <ATen/Parallel.h>
#include <c10/util/Float8_e4m3fn.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;

constexpr const char* kName = "quantize_rows";
constexpr int64_t kRotated = 64;     // values that a rotation mixes
constexpr float kLeast = 0x1p-100f;  // a row below it counts as zeros: its reciprocal might overflow
constexpr int64_t kGrain = 16384;    // elements that repay a thread

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// max |x|; nan if there is one, for as integers its bits are the largest.
FASTGFN_CLONES float largest_of(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_of(x[i]) & 0x7FFFFFFF);
  float largest;
  std::memcpy(&largest, &most, sizeof(largest));
  return largest;
}

// A Hadamard matrix of entries +-1 times every `size` values that are count / size apart; returns size. The first
// stage adds the halves of the row, so that loops are long; two stages share a pass.
FASTGFN_CLONES int64_t rotate(float* x, int64_t count) {
  int64_t size = 1;
  for (; 2 * size < kRotated && count % (4 * size) == 0; size *= 4) {
    const int64_t quarter = count / (4 * size);
    for (int64_t i = 0; i < count; i += 4 * quarter) {
      float* __restrict a = x + i;
      float* __restrict b = a + quarter;
      float* __restrict c = b + quarter;
      float* __restrict d = c + quarter;
      for (int64_t j = 0; j < quarter; ++j) {
        const float ac = a[j] + c[j], a_c = a[j] - c[j], bd = b[j] + d[j], b_d = b[j] - d[j];
        a[j] = ac + bd;
        b[j] = ac - bd;
        c[j] = a_c + b_d;
        d[j] = a_c - b_d;
      }
    }
  }
  for (; size < kRotated && count % (2 * size) == 0; size *= 2) {
    const int64_t half = count / (2 * size);
    for (int64_t i = 0; i < count; i += 2 * half) {
      float* __restrict a = x + i;
      float* __restrict b = x + i + half;
      for (int64_t j = 0; j < half; ++j) {
        const float sum = a[j] + b[j];
        b[j] = a[j] - b[j];
        a[j] = sum;
      }
    }
  }
  return size;
}

// 128 + round(factor x), ties to even: the last byte of a sum whose unit is 1.
FASTGFN_CLONES void to_bytes(const float* x, int64_t count, float factor, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<uint8_t>(bits_of(x[i] * factor + (12582912.0f + 128.0f)));
  }
}

FASTGFN_CLONES void widen(const c10::BFloat16* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].x) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

inline void widen(const float* x, int64_t count, float* out) { std::copy(x, x + count, out); }

inline void quantize(float* x, int64_t count, uint8_t* out, float& scale) {
  const float size = static_cast<float>(rotate(x, count));
  const float largest = largest_of(x, count);
  const bool is_finite = std::isfinite(largest);
  to_bytes(x, count, is_finite && largest >= kLeast ? 127.0f / largest : 0.0f, out);
  scale = largest >= kLeast ? largest / (127.0f * std::sqrt(size)) : 0.0f;
  if (!is_finite) scale = std::numeric_limits<float>::quiet_NaN();
}

inline void quantize(float* x, int64_t count, c10::Float8_e4m3fn* out, float& scale) {
  const float largest = largest_of(x, count);
  const float factor = largest < kLeast ? 0.0f : 448.0f / largest;
  for (int64_t i = 0; i < count; ++i) out[i] = c10::Float8_e4m3fn(x[i] * factor);
  scale = largest < kLeast ? 0.0f : largest / 448.0f;
}

template <typename in_t, typename out_t>
void run(const Tensor& x, const Tensor& values, const Tensor& scale) {
  const int64_t width = x.size(1), stride = x.stride(0);
  const in_t* in = x.const_data_ptr<in_t>();
  out_t* out = values.mutable_data_ptr<out_t>();
  float* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<float> row(width);
                     for (int64_t i = begin; i < end; ++i) {
                       widen(in + i * stride, width, row.data());
                       quantize(row.data(), width, out + i * width, scales[i]);
                     }
                   });
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, at::ScalarType dtype) {
  FASTGFN_CHECK_DIM(x, 2, kName, "pass (T, K)");
  FASTGFN_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, kName, "x",
                "float32 or bfloat16", c10::toString(x.scalar_type()), "cast it to float32");
  FASTGFN_CHECK(dtype == at::kByte || dtype == at::kFloat8_e4m3fn, kName, "dtype", "uint8 or float8_e4m3fn",
                c10::toString(dtype), "choose one");
  const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const Tensor values = at::empty(x.sizes(), x.options().dtype(dtype));
  const Tensor scale = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const bool is_byte = dtype == at::kByte;
  if (x.scalar_type() == at::kFloat) {
    is_byte ? run<float, uint8_t>(rows, values, scale) : run<float, c10::Float8_e4m3fn>(rows, values, scale);
  } else {
    is_byte ? run<c10::BFloat16, uint8_t>(rows, values, scale)
            : run<c10::BFloat16, c10::Float8_e4m3fn>(rows, values, scale);
  }
  return {values, scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("quantize_rows", &quantize_rows);
}

}  // namespace fastgfn
