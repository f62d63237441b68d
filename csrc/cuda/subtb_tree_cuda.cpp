// The torch side of subtb_tree.cu: checks, device guard, current stream, registration.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../checks.h"

#define FASTGFN_DECLARE_SUBTB_TREE(suffix, scalar_t)                                                         \
  void fastgfn_subtb_tree_fwd_##suffix(const scalar_t*, const scalar_t*, const int32_t*, const bool*,        \
                                       const double*, double, int64_t, double*, cudaStream_t);               \
  void fastgfn_subtb_tree_bwd_##suffix(const scalar_t*, const scalar_t*, const int32_t*, const bool*,        \
                                       const double*, double, int64_t, const double*, double*, int32_t*,     \
                                       scalar_t*, scalar_t*, cudaStream_t);

extern "C" {
FASTGFN_DECLARE_SUBTB_TREE(f32, float)
FASTGFN_DECLARE_SUBTB_TREE(f64, double)
void fastgfn_subtb_tree_pairs(const int32_t*, const bool*, double, int64_t, double*, cudaStream_t);
}

namespace fastgfn {
namespace {

using at::Tensor;

// Parents as contiguous int32, which the number of nodes allows.
Tensor narrow_parents(const char* function, const Tensor& parent) {
  FASTGFN_CHECK(parent.size(0) < std::numeric_limits<int32_t>::max(), function, "parent", "below 2^31 nodes",
                parent.size(0), "split the batch");
  return parent.to(at::kInt).contiguous();
}

// The arrays of a forest as the kernels read them.
struct Arrays {
  Tensor log_pf, log_flow, parent, valid, weight;

  Arrays(const char* function, const Tensor& log_pf_in, const Tensor& log_flow_in, const Tensor& parent_in,
         const Tensor& valid_in, const Tensor& weight_in)
      : log_pf(log_pf_in.contiguous()),
        log_flow(log_flow_in.contiguous()),
        parent(narrow_parents(function, parent_in)),
        valid(valid_in.contiguous()),
        weight(weight_in.to(at::kDouble).contiguous()) {}
};

void check_devices(const char* function, const Tensor& log_pf, const Tensor& log_flow, const Tensor& parent,
                   const Tensor& valid, const Tensor& weight) {
  FASTGFN_CHECK_DEVICE(log_flow, log_pf.device(), function);
  FASTGFN_CHECK_DEVICE(parent, log_pf.device(), function);
  FASTGFN_CHECK_DEVICE(valid, log_pf.device(), function);
  FASTGFN_CHECK_DEVICE(weight, log_pf.device(), function);
}

Tensor subtb_tree(const Tensor& log_pf, const Tensor& log_flow, const Tensor& parent, const Tensor& valid,
                  const Tensor& weight, double subtb_lambda) {
  check_subtb_tree("subtb_tree", log_pf, log_flow, parent, valid, weight, subtb_lambda);
  check_devices("subtb_tree", log_pf, log_flow, parent, valid, weight);
  const c10::cuda::CUDAGuard guard(log_pf.device());
  const Arrays arrays("subtb_tree", log_pf, log_flow, parent, valid, weight);
  Tensor terms = at::empty_like(arrays.weight);
  const auto run = [&](auto zero, auto launcher) {
    using scalar_t = decltype(zero);
    launcher(arrays.log_pf.const_data_ptr<scalar_t>(), arrays.log_flow.const_data_ptr<scalar_t>(),
             arrays.parent.const_data_ptr<int32_t>(), arrays.valid.const_data_ptr<bool>(),
             arrays.weight.const_data_ptr<double>(), subtb_lambda, log_pf.size(0),
             terms.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
  };
  if (log_pf.scalar_type() == at::kFloat) {
    run(float{}, &fastgfn_subtb_tree_fwd_f32);
  } else {
    run(double{}, &fastgfn_subtb_tree_fwd_f64);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  // torch's own sum repeats its bits: blocks add their parts in a fixed order.
  return terms.sum().to(log_pf.scalar_type());
}

std::tuple<Tensor, Tensor> subtb_tree_backward(const Tensor& grad, const Tensor& log_pf, const Tensor& log_flow,
                                               const Tensor& parent, const Tensor& valid, const Tensor& weight,
                                               double subtb_lambda) {
  check_subtb_tree("subtb_tree_backward", log_pf, log_flow, parent, valid, weight, subtb_lambda);
  FASTGFN_CHECK_DIM(grad, 0, "subtb_tree_backward", "pass the gradient of the scalar value");
  FASTGFN_CHECK_DEVICE(grad, log_pf.device(), "subtb_tree_backward");
  check_devices("subtb_tree_backward", log_pf, log_flow, parent, valid, weight);
  const c10::cuda::CUDAGuard guard(log_pf.device());
  const Arrays arrays("subtb_tree_backward", log_pf, log_flow, parent, valid, weight);
  const Tensor upstream = grad.to(at::kDouble);
  Tensor doubles = at::empty({3, log_pf.size(0)}, arrays.weight.options());
  Tensor ints = at::empty({2, log_pf.size(0)}, arrays.parent.options());
  Tensor grad_log_pf = at::empty(log_pf.sizes(), log_pf.options());
  Tensor grad_log_flow = at::empty(log_flow.sizes(), log_flow.options());
  const auto run = [&](auto zero, auto launcher) {
    using scalar_t = decltype(zero);
    launcher(arrays.log_pf.const_data_ptr<scalar_t>(), arrays.log_flow.const_data_ptr<scalar_t>(),
             arrays.parent.const_data_ptr<int32_t>(), arrays.valid.const_data_ptr<bool>(),
             arrays.weight.const_data_ptr<double>(), subtb_lambda, log_pf.size(0),
             upstream.const_data_ptr<double>(), doubles.mutable_data_ptr<double>(),
             ints.mutable_data_ptr<int32_t>(), grad_log_pf.mutable_data_ptr<scalar_t>(),
             grad_log_flow.mutable_data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream());
  };
  if (log_pf.scalar_type() == at::kFloat) {
    run(float{}, &fastgfn_subtb_tree_bwd_f32);
  } else {
    run(double{}, &fastgfn_subtb_tree_bwd_f64);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_log_pf, grad_log_flow};
}

Tensor subtb_tree_pairs(const Tensor& parent, const Tensor& valid, double subtb_lambda) {
  check_subtb_nodes("subtb_tree_pairs", parent, valid, subtb_lambda);
  FASTGFN_CHECK_DEVICE(valid, parent.device(), "subtb_tree_pairs");
  const c10::cuda::CUDAGuard guard(parent.device());
  const Tensor parents = narrow_parents("subtb_tree_pairs", parent), mask = valid.contiguous();
  Tensor pairs = at::empty(parent.sizes(), parent.options().dtype(at::kDouble));
  fastgfn_subtb_tree_pairs(parents.const_data_ptr<int32_t>(), mask.const_data_ptr<bool>(), subtb_lambda,
                           parent.size(0), pairs.mutable_data_ptr<double>(),
                           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return pairs;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CUDA, m) {
  m.impl("subtb_tree", &subtb_tree);
  m.impl("subtb_tree_backward", &subtb_tree_backward);
  m.impl("subtb_tree_pairs", &subtb_tree_pairs);
}

}  // namespace fastgfn
