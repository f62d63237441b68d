// The torch side of scan.cu: checks, device guard, current stream, registration.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"

#define FASTGFN_DECLARE_SCANS(suffix, scalar_t)                                                               \
  void fastgfn_tree_cumsum_##suffix(const scalar_t*, int64_t, const int32_t*, int64_t, scalar_t*,             \
                                    cudaStream_t);                                                            \
  void fastgfn_subtree_sum_##suffix(const scalar_t*, int64_t, const int32_t*, int64_t, int32_t*, scalar_t*,   \
                                    cudaStream_t);                                                            \
  void fastgfn_segment_cumsum_##suffix(const scalar_t*, int64_t, int64_t, const int64_t*, int64_t, int64_t,   \
                                       bool, scalar_t*, cudaStream_t);

extern "C" {
FASTGFN_DECLARE_SCANS(f32, float)
FASTGFN_DECLARE_SCANS(f64, double)
FASTGFN_DECLARE_SCANS(i64, int64_t)
}

namespace fastgfn {
namespace {

using at::Tensor;

// Calls run<T>(launcher for T) for the dtype of values, which the checks have limited to these three.
#define FASTGFN_BY_DTYPE(values, run, launcher)                \
  if ((values).scalar_type() == at::kFloat) {                  \
    run(float{}, &fastgfn_##launcher##_f32);                   \
  } else if ((values).scalar_type() == at::kDouble) {          \
    run(double{}, &fastgfn_##launcher##_f64);                  \
  } else {                                                     \
    run(int64_t{}, &fastgfn_##launcher##_i64);                 \
  }                                                            \
  C10_CUDA_KERNEL_LAUNCH_CHECK()

Tensor tree_cumsum(const Tensor& values, const Tensor& parent) {
  check_tree_scan("tree_cumsum", values, parent);
  FASTGFN_CHECK_DEVICE(parent, values.device(), "tree_cumsum");
  const c10::cuda::CUDAGuard guard(values.device());
  const Tensor parents = parent.contiguous();
  Tensor out = at::empty(values.sizes(), values.options());
  const auto run = [&](auto zero, auto launcher) {
    using scalar_t = decltype(zero);
    launcher(values.const_data_ptr<scalar_t>(), values.stride(0), parents.const_data_ptr<int32_t>(),
             values.size(0), out.mutable_data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream());
  };
  FASTGFN_BY_DTYPE(values, run, tree_cumsum);
  return out;
}

Tensor subtree_sum(const Tensor& values, const Tensor& parent) {
  check_tree_scan("subtree_sum", values, parent);
  FASTGFN_CHECK_DEVICE(parent, values.device(), "subtree_sum");
  const c10::cuda::CUDAGuard guard(values.device());
  const Tensor parents = parent.contiguous();
  Tensor end = at::empty_like(parents);
  Tensor out = at::empty(values.sizes(), values.options());
  const auto run = [&](auto zero, auto launcher) {
    using scalar_t = decltype(zero);
    launcher(values.const_data_ptr<scalar_t>(), values.stride(0), parents.const_data_ptr<int32_t>(),
             values.size(0), end.mutable_data_ptr<int32_t>(), out.mutable_data_ptr<scalar_t>(),
             c10::cuda::getCurrentCUDAStream());
  };
  FASTGFN_BY_DTYPE(values, run, subtree_sum);
  return out;
}

Tensor segment_cumsum(const Tensor& values, const Tensor& offsets, bool reverse) {
  check_segment_scan(values, offsets);
  FASTGFN_CHECK_DEVICE(offsets, values.device(), "segment_cumsum");
  FASTGFN_CHECK(offsets.size(0) >= 1, "segment_cumsum", "offsets",
                c10::str("non-decreasing from 0 to ", values.size(0)), "no entry", "pass the cumulative lengths");
  const c10::cuda::CUDAGuard guard(values.device());
  Tensor out = at::empty(values.sizes(), values.options());
  const auto run = [&](auto zero, auto launcher) {
    using scalar_t = decltype(zero);
    launcher(values.const_data_ptr<scalar_t>(), values.stride(0), values.size(0),
             offsets.const_data_ptr<int64_t>(), offsets.stride(0), offsets.size(0) - 1, reverse,
             out.mutable_data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream());
  };
  FASTGFN_BY_DTYPE(values, run, segment_cumsum);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CUDA, m) {
  m.impl("tree_cumsum", &tree_cumsum);
  m.impl("subtree_sum", &subtree_sum);
  m.impl("segment_cumsum", &segment_cumsum);
}

}  // namespace fastgfn
