// Elementwise loops over one row of logits, compiled for several instruction sets and chosen at load time.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FASTGFN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // GCC 11 chooses by the name of one instruction set, not by a level
#define FASTGFN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FASTGFN_CLONES
#endif

namespace fastgfn {

// x, or -88 below that, where exp_bounded is 0. The comparison is false for nan, which must come through.
inline float bounded(float x) { return x < -88.0f ? -88.0f : x; }

// exp for -88 <= x <= 0 to 2 ulp: 2^n times a polynomial of degree 6 on |r| <= log(2) / 2 (Cody and Waite 1980).
// Below -87.7 it is 0: there n = -127, whose bits are those of 0.
inline float exp_bounded(float x) {
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

void scale_logits(float* z, int64_t count, float scale, const float* bias, const float* logit_bias, float softcap,
                  float* slope);
float max_of(const float* z, int64_t count);
// z = exp(z - peak), and the sum.
double exp_and_sum(float* z, int64_t count, float peak);
void multiply(float* x, int64_t count, float factor);
void multiply_by(float* x, const float* factor, int64_t count);
void round_to(const float* x, int64_t count, c10::BFloat16* out);

}  // namespace fastgfn
