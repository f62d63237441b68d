// The SubTB recurrence over one padded trajectory, shared by the CPU and the CUDA kernels. No torch headers, so
// that nvcc can compile its users alone. The derivation is in fastgfn/reference/subtb.py.
// Sums are double for float rows too: the row is latency-bound either way, and differences of potentials of
// size 100 over windows of 500 steps keep fp32's relative accuracy only so.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTGFN_HOST_DEVICE __host__ __device__
#else
#define FASTGFN_HOST_DEVICE
#endif

namespace at {
class Tensor;
}

namespace fastgfn {

// Refuses shapes, dtypes and a lambda that subtb_padded cannot take; defined in subtb.cpp.
void check_subtb_padded(const char* function, const at::Tensor& log_pf, const at::Tensor& log_flow,
                        const at::Tensor& lengths, double subtb_lambda);

template <typename scalar_t>
struct SubtbRow {
  const scalar_t* log_pf;
  int64_t pf_stride;
  const scalar_t* log_flow;
  int64_t flow_stride;
  int64_t length;

  // U of state t + 1 minus U of state t.
  FASTGFN_HOST_DEVICE double step(int64_t t) const {
    return static_cast<double>(log_pf[t * pf_stride]) + static_cast<double>(log_flow[t * flow_stride]) -
           static_cast<double>(log_flow[(t + 1) * flow_stride]);
  }
};

// A padded batch; row strides and step strides are free.
template <typename scalar_t>
struct SubtbRows {
  const scalar_t* log_pf;
  int64_t pf_stride_n;
  int64_t pf_stride_t;
  const scalar_t* log_flow;
  int64_t flow_stride_n;
  int64_t flow_stride_t;
  const int64_t* lengths;
  double lambda;

  FASTGFN_HOST_DEVICE SubtbRow<scalar_t> row(int64_t n) const {
    return {log_pf + n * pf_stride_n, pf_stride_t, log_flow + n * flow_stride_n, flow_stride_t, lengths[n]};
  }
};

template <typename scalar_t>
FASTGFN_HOST_DEVICE void subtb_row_forward(const SubtbRow<scalar_t>& row, double lambda, scalar_t* numerator,
                                           scalar_t* denominator) {
  double s0 = 0, s1 = 0, s2 = 0, num = 0, den = 0;
  for (int64_t t = 0; t < row.length; ++t) {
    const double d = row.step(t);
    const double b0 = lambda * s0 + 1, b1 = lambda * s1;
    s2 = lambda * s2 + d * (2 * b1 + d * b0);
    s1 = b1 + d * b0;
    s0 = b0;
    num += s2;
    den += s0;
  }
  *numerator = static_cast<scalar_t>(num);
  *denominator = static_cast<scalar_t>(den);
}

// Writes the first `length` (`length + 1`) entries of the contiguous gradient rows. grad_log_flow first holds the S1
// of every state, so that no scratch is needed. The gradient of log_pf is summed over the states after it: formed
// locally it would multiply the rounding of a stored float S1 by the number of states.
template <typename scalar_t>
FASTGFN_HOST_DEVICE void subtb_row_backward(const SubtbRow<scalar_t>& row, double lambda, double grad,
                                            scalar_t* grad_log_pf, scalar_t* grad_log_flow) {
  double s0 = 0, s1 = 0;
  for (int64_t t = 0; t < row.length; ++t) {
    grad_log_flow[t] = static_cast<scalar_t>(s1);
    s0 = lambda * s0 + 1;
    s1 = lambda * s1 + row.step(t) * s0;
  }
  grad_log_flow[row.length] = static_cast<scalar_t>(-2 * grad * s1);
  double r0 = 0, r1 = 0, after = 2 * grad * s1;
  for (int64_t t = row.length - 1; t >= 0; --t) {
    r0 = lambda * r0 + 1;
    r1 = lambda * r1 + row.step(t) * r0;
    const double own = 2 * grad * (grad_log_flow[t] - r1);
    grad_log_pf[t] = static_cast<scalar_t>(after);
    grad_log_flow[t] = static_cast<scalar_t>(-own);
    after += own;
  }
}

}  // namespace fastgfn
