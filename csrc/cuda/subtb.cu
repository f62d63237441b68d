// Padded sub-trajectory balance on CUDA: one thread per trajectory, no scratch, no atomics, no host synchronisation.
// A length outside [0, width] cannot be refused without a synchronisation; its row becomes NaN instead.
#include <math_constants.h>

#include "../subtb.h"
#include "launch.h"

namespace {

constexpr int kThreads = 64;  // small blocks spread a batch of a few hundred rows over the multiprocessors

int64_t blocks_for(int64_t num_rows) { return (num_rows + kThreads - 1) / kThreads; }

// One thread sums one row; grid of ceil(num_rows / kThreads) blocks; writes numerator and denominator.
template <typename scalar_t>
__global__ void subtb_padded_fwd_kernel(fastgfn::SubtbRows<scalar_t> rows, int64_t num_rows, int64_t width,
                                        scalar_t* numerator, scalar_t* denominator) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= num_rows) return;
  const fastgfn::SubtbRow<scalar_t> row = rows.row(n);
  if (row.length < 0 || row.length > width) {
    numerator[n] = denominator[n] = static_cast<scalar_t>(CUDART_NAN);
    return;
  }
  fastgfn::subtb_row_forward(row, rows.lambda, numerator + n, denominator + n);
}

// Same grid; writes the whole contiguous gradient rows, zeros on the padding included.
template <typename scalar_t>
__global__ void subtb_padded_bwd_kernel(fastgfn::SubtbRows<scalar_t> rows, int64_t num_rows, int64_t width,
                                        const double* grad_numerator, scalar_t* grad_log_pf,
                                        scalar_t* grad_log_flow) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= num_rows) return;
  const fastgfn::SubtbRow<scalar_t> row = rows.row(n);
  scalar_t* pf = grad_log_pf + n * width;
  scalar_t* flow = grad_log_flow + n * (width + 1);
  const bool readable = row.length >= 0 && row.length <= width;
  const scalar_t fill = static_cast<scalar_t>(readable ? 0.0 : CUDART_NAN);
  for (int64_t t = readable ? row.length : 0; t < width; ++t) {
    pf[t] = fill;
    flow[t + 1] = fill;
  }
  if (readable) {
    fastgfn::subtb_row_backward(row, rows.lambda, grad_numerator[n], pf, flow);
  } else {
    flow[0] = fill;
  }
}

}  // namespace

// Strides count elements; gradients are contiguous; every pointer is a device pointer. Launches nothing for 0 rows.
#define FASTGFN_SUBTB_LAUNCHERS(suffix, scalar_t)                                                              \
  extern "C" void fastgfn_subtb_padded_fwd_##suffix(                                                           \
      const scalar_t* log_pf, int64_t pf_stride_n, int64_t pf_stride_t, const scalar_t* log_flow,              \
      int64_t flow_stride_n, int64_t flow_stride_t, const int64_t* lengths, int64_t num_rows, int64_t width,   \
      double lambda, scalar_t* numerator, scalar_t* denominator, cudaStream_t stream) {                        \
    const fastgfn::SubtbRows<scalar_t> rows{log_pf,        pf_stride_n,   pf_stride_t, log_flow,               \
                                            flow_stride_n, flow_stride_t, lengths,     lambda};                \
    fastgfn::launch(subtb_padded_fwd_kernel<scalar_t>, blocks_for(num_rows), kThreads, stream, rows, num_rows, \
                    width, numerator, denominator);                                                            \
  }                                                                                                            \
  extern "C" void fastgfn_subtb_padded_bwd_##suffix(                                                           \
      const scalar_t* log_pf, int64_t pf_stride_n, int64_t pf_stride_t, const scalar_t* log_flow,              \
      int64_t flow_stride_n, int64_t flow_stride_t, const int64_t* lengths, int64_t num_rows, int64_t width,   \
      double lambda, const double* grad_numerator, scalar_t* grad_log_pf, scalar_t* grad_log_flow,             \
      cudaStream_t stream) {                                                                                   \
    const fastgfn::SubtbRows<scalar_t> rows{log_pf,        pf_stride_n,   pf_stride_t, log_flow,               \
                                            flow_stride_n, flow_stride_t, lengths,     lambda};                \
    fastgfn::launch(subtb_padded_bwd_kernel<scalar_t>, blocks_for(num_rows), kThreads, stream, rows, num_rows, \
                    width, grad_numerator, grad_log_pf, grad_log_flow);                                        \
  }

FASTGFN_SUBTB_LAUNCHERS(f32, float)
FASTGFN_SUBTB_LAUNCHERS(f64, double)
