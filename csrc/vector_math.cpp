#include "vector_math.h"

#include <algorithm>
#include <limits>

namespace fastgfn {

namespace {
constexpr int64_t kLanes = 32;  // independent sums, in a fixed order whatever the vector width
}

FASTGFN_CLONES void scale_logits(float* z, int64_t count, float scale, const float* bias, const float* logit_bias,
                                 float softcap, float* slope) {
  if (bias) {
    for (int64_t i = 0; i < count; ++i) z[i] = z[i] * scale + bias[i];
  } else if (scale != 1.0f) {
    for (int64_t i = 0; i < count; ++i) z[i] *= scale;
  }
  if (slope) {
    for (int64_t i = 0; i < count; ++i) {
      const float t = std::tanh(z[i]);
      slope[i] = 1.0f - t * t;
      z[i] = t * softcap;
    }
  }
  if (logit_bias) {
    for (int64_t i = 0; i < count; ++i) z[i] += logit_bias[i];
  }
}

FASTGFN_CLONES float max_of(const float* z, int64_t count) {
  float lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = lanes[j] > z[i + j] ? lanes[j] : z[i + j];
  }
  for (; i < count; ++i) lanes[i % kLanes] = std::max(lanes[i % kLanes], z[i]);
  float best = lanes[0];
  for (int64_t j = 1; j < kLanes; ++j) best = std::max(best, lanes[j]);
  return best;
}

// Two inner loops: in one, the bound is a branch around the polynomial to GCC 11, which vectorises neither.
FASTGFN_CLONES double exp_and_sum(float* z, int64_t count, float peak) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) z[i + j] = bounded(z[i + j] - peak);
    for (int64_t j = 0; j < kLanes; ++j) {
      z[i + j] = exp_bounded(z[i + j]);
      lanes[j] += z[i + j];
    }
  }
  for (; i < count; ++i) lanes[i % kLanes] += z[i] = exp_bounded(bounded(z[i] - peak));
  double sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

FASTGFN_CLONES void multiply(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

FASTGFN_CLONES void multiply_by(float* x, const float* factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor[i];
}

// To the nearest, ties to even; the values are finite.
FASTGFN_CLONES void round_to(const float* x, int64_t count, c10::BFloat16* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const uint16_t top = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    std::memcpy(out + i, &top, sizeof(top));
  }
}

}  // namespace fastgfn
