// The torch side of tree.cu: checks, device guard, current stream, registration. build_tree stays on the host.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>

#include "../checks.h"

#define FASTGFN_DECLARE_GATHER(bytes)                                                                   \
  void fastgfn_gather_nodes_##bytes(const void*, int64_t, int64_t, const int64_t*, int64_t, uint64_t,   \
                                    void*, cudaStream_t);

#define FASTGFN_DECLARE_SUM_RUNS(suffix, scalar_t)                                                       \
  void fastgfn_sum_runs_##suffix(const scalar_t*, const int64_t*, const int64_t*, int64_t, scalar_t*,   \
                                 cudaStream_t);

extern "C" {
void fastgfn_path_nodes(const int32_t*, int64_t, const int64_t*, const int64_t*, int64_t, int64_t, int64_t*,
                        cudaStream_t);
FASTGFN_DECLARE_GATHER(1)
FASTGFN_DECLARE_GATHER(2)
FASTGFN_DECLARE_GATHER(4)
FASTGFN_DECLARE_GATHER(8)
FASTGFN_DECLARE_SUM_RUNS(f32, float)
FASTGFN_DECLARE_SUM_RUNS(f64, double)
}

namespace fastgfn {
namespace {

using at::Tensor;

Tensor path_nodes(const Tensor& parent, const Tensor& leaf, const Tensor& num_nodes, int64_t width) {
  check_path_nodes(parent, leaf, num_nodes, width);
  FASTGFN_CHECK_DEVICE(leaf, parent.device(), "path_nodes");
  FASTGFN_CHECK_DEVICE(num_nodes, parent.device(), "path_nodes");
  const c10::cuda::CUDAGuard guard(parent.device());
  const Tensor parents = parent.contiguous(), leaves = leaf.contiguous(), wanted = num_nodes.contiguous();
  Tensor out = at::empty({leaf.size(0), width}, leaf.options());
  fastgfn_path_nodes(parents.const_data_ptr<int32_t>(), parent.size(0), leaves.const_data_ptr<int64_t>(),
                     wanted.const_data_ptr<int64_t>(), leaf.size(0), width, out.mutable_data_ptr<int64_t>(),
                     c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// What a gather out of range gives: nan, or 0 where the dtype has none.
uint64_t invalid_bits(at::ScalarType type) {
  uint64_t bits = 0;
  const float narrow = std::numeric_limits<float>::quiet_NaN();
  const double wide = std::numeric_limits<double>::quiet_NaN();
  if (type == at::kFloat) std::memcpy(&bits, &narrow, sizeof narrow);
  if (type == at::kDouble) std::memcpy(&bits, &wide, sizeof wide);
  return bits;
}

Tensor gather_nodes(const Tensor& values, const Tensor& index) {
  check_gather_nodes(values, index);
  FASTGFN_CHECK_DEVICE(index, values.device(), "gather_nodes");
  const auto type = values.scalar_type();
  FASTGFN_CHECK(type == at::kFloat || type == at::kDouble || at::isIntegralType(type, true), "gather_nodes",
                "values", "float32, float64, an integer or bool", c10::toString(type), "cast it");
  const c10::cuda::CUDAGuard guard(values.device());
  Tensor out = at::empty(index.sizes(), values.options());
  const auto launcher = values.element_size() == 8   ? &fastgfn_gather_nodes_8
                        : values.element_size() == 4 ? &fastgfn_gather_nodes_4
                        : values.element_size() == 2 ? &fastgfn_gather_nodes_2
                                                     : &fastgfn_gather_nodes_1;
  launcher(values.const_data_ptr(), values.stride(0), values.size(0), index.const_data_ptr<int64_t>(),
           index.numel(), invalid_bits(type), out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// A stable sort brings the entries of a node together in index order; then every node sums its run.
Tensor scatter_add_nodes(const Tensor& grad, const Tensor& index, int64_t num_nodes) {
  check_scatter_add_nodes(grad, index);
  FASTGFN_CHECK_DEVICE(index, grad.device(), "scatter_add_nodes");
  const auto type = grad.scalar_type();
  FASTGFN_CHECK(type == at::kFloat || type == at::kDouble, "scatter_add_nodes", "grad", "float32 or float64",
                c10::toString(type), "cast it to float32");
  const c10::cuda::CUDAGuard guard(grad.device());
  if (index.numel() == 0) return at::zeros({num_nodes}, grad.options());
  const Tensor values = grad.contiguous();
  const auto [node, order] = at::sort(index.reshape({-1}), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor offsets = at::searchsorted(node, at::arange(num_nodes + 1, index.options()));
  Tensor out = at::empty({num_nodes}, grad.options());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (type == at::kFloat) {
    fastgfn_sum_runs_f32(values.const_data_ptr<float>(), order.const_data_ptr<int64_t>(),
                         offsets.const_data_ptr<int64_t>(), num_nodes, out.mutable_data_ptr<float>(), stream);
  } else {
    fastgfn_sum_runs_f64(values.const_data_ptr<double>(), order.const_data_ptr<int64_t>(),
                         offsets.const_data_ptr<int64_t>(), num_nodes, out.mutable_data_ptr<double>(), stream);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CUDA, m) {
  m.impl("path_nodes", &path_nodes);
  m.impl("gather_nodes", &gather_nodes);
  m.impl("scatter_add_nodes", &scatter_add_nodes);
}

}  // namespace fastgfn
