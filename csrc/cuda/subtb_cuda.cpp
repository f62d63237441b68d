// The torch side of subtb.cu: checks, device guard, current stream, registration.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "../subtb.h"

#define FASTGFN_DECLARE_SUBTB(suffix, scalar_t)                                                                \
  void fastgfn_subtb_padded_fwd_##suffix(const scalar_t*, int64_t, int64_t, const scalar_t*, int64_t, int64_t, \
                                         const int64_t*, int64_t, int64_t, double, scalar_t*, scalar_t*,       \
                                         cudaStream_t);                                                        \
  void fastgfn_subtb_padded_bwd_##suffix(const scalar_t*, int64_t, int64_t, const scalar_t*, int64_t, int64_t, \
                                         const int64_t*, int64_t, int64_t, double, const double*, scalar_t*,   \
                                         scalar_t*, cudaStream_t);

extern "C" {
FASTGFN_DECLARE_SUBTB(f32, float)
FASTGFN_DECLARE_SUBTB(f64, double)
}

namespace fastgfn {

namespace {

void check_devices(const char* function, const at::Tensor& log_pf, const at::Tensor& log_flow,
                   const at::Tensor& lengths) {
  FASTGFN_CHECK_DEVICE(log_flow, log_pf.device(), function);
  FASTGFN_CHECK_DEVICE(lengths, log_pf.device(), function);
}

template <typename scalar_t, typename Launcher>
void launch_forward(Launcher launcher, const at::Tensor& log_pf, const at::Tensor& log_flow,
                    const at::Tensor& lengths, double subtb_lambda, at::Tensor& numerator,
                    at::Tensor& denominator) {
  launcher(log_pf.const_data_ptr<scalar_t>(), log_pf.stride(0), log_pf.stride(1),
           log_flow.const_data_ptr<scalar_t>(), log_flow.stride(0), log_flow.stride(1),
           lengths.const_data_ptr<int64_t>(), log_pf.size(0), log_pf.size(1), subtb_lambda,
           numerator.mutable_data_ptr<scalar_t>(), denominator.mutable_data_ptr<scalar_t>(),
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename scalar_t, typename Launcher>
void launch_backward(Launcher launcher, const at::Tensor& grad, const at::Tensor& log_pf,
                     const at::Tensor& log_flow, const at::Tensor& lengths, double subtb_lambda,
                     at::Tensor& grad_log_pf, at::Tensor& grad_log_flow) {
  launcher(log_pf.const_data_ptr<scalar_t>(), log_pf.stride(0), log_pf.stride(1),
           log_flow.const_data_ptr<scalar_t>(), log_flow.stride(0), log_flow.stride(1),
           lengths.const_data_ptr<int64_t>(), log_pf.size(0), log_pf.size(1), subtb_lambda,
           grad.const_data_ptr<double>(), grad_log_pf.mutable_data_ptr<scalar_t>(),
           grad_log_flow.mutable_data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> subtb_padded(const at::Tensor& log_pf, const at::Tensor& log_flow,
                                                const at::Tensor& lengths, double subtb_lambda) {
  check_subtb_padded("subtb_padded", log_pf, log_flow, lengths, subtb_lambda);
  check_devices("subtb_padded", log_pf, log_flow, lengths);
  const c10::cuda::CUDAGuard guard(log_pf.device());
  const at::Tensor counts = lengths.to(at::kLong).contiguous();
  at::Tensor numerator = at::empty({log_pf.size(0)}, log_pf.options());
  at::Tensor denominator = at::empty_like(numerator);
  if (log_pf.scalar_type() == at::kFloat) {
    launch_forward<float>(&fastgfn_subtb_padded_fwd_f32, log_pf, log_flow, counts, subtb_lambda, numerator,
                          denominator);
  } else {
    launch_forward<double>(&fastgfn_subtb_padded_fwd_f64, log_pf, log_flow, counts, subtb_lambda, numerator,
                           denominator);
  }
  return {numerator, denominator};
}

std::tuple<at::Tensor, at::Tensor> subtb_padded_backward(const at::Tensor& grad_numerator,
                                                         const at::Tensor& log_pf, const at::Tensor& log_flow,
                                                         const at::Tensor& lengths, double subtb_lambda) {
  check_subtb_padded("subtb_padded_backward", log_pf, log_flow, lengths, subtb_lambda);
  check_devices("subtb_padded_backward", log_pf, log_flow, lengths);
  FASTGFN_CHECK(grad_numerator.sizes() == lengths.sizes(), "subtb_padded_backward", "grad_numerator",
                lengths.sizes(), grad_numerator.sizes(), "pass one gradient per row");
  FASTGFN_CHECK_DEVICE(grad_numerator, log_pf.device(), "subtb_padded_backward");
  const c10::cuda::CUDAGuard guard(log_pf.device());
  const at::Tensor counts = lengths.to(at::kLong).contiguous();
  const at::Tensor grad = grad_numerator.to(at::kDouble).contiguous();
  at::Tensor grad_log_pf = at::empty(log_pf.sizes(), log_pf.options());
  at::Tensor grad_log_flow = at::empty(log_flow.sizes(), log_flow.options());
  if (log_pf.scalar_type() == at::kFloat) {
    launch_backward<float>(&fastgfn_subtb_padded_bwd_f32, grad, log_pf, log_flow, counts, subtb_lambda,
                           grad_log_pf, grad_log_flow);
  } else {
    launch_backward<double>(&fastgfn_subtb_padded_bwd_f64, grad, log_pf, log_flow, counts, subtb_lambda,
                            grad_log_pf, grad_log_flow);
  }
  return {grad_log_pf, grad_log_flow};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CUDA, m) {
  m.impl("subtb_padded", &subtb_padded);
  m.impl("subtb_padded_backward", &subtb_padded_backward);
}

}  // namespace fastgfn
