// One error form for every op: "<function>: <arg> must be <want>, got <have>; <fix>".
#pragma once

#include <ATen/ATen.h>

#define FASTGFN_CHECK(condition, function, arg, want, have, fix) \
  TORCH_CHECK_VALUE(condition, function, ": ", arg, " must be ", want, ", got ", have, "; ", fix)

#define FASTGFN_CHECK_DTYPE(tensor, dtype, function, fix)                                      \
  FASTGFN_CHECK((tensor).scalar_type() == (dtype), function, #tensor, c10::toString(dtype),    \
                c10::toString((tensor).scalar_type()), fix)

#define FASTGFN_CHECK_DIM(tensor, ndim, function, fix) \
  FASTGFN_CHECK((tensor).dim() == (ndim), function, #tensor, #ndim "-dimensional", (tensor).sizes(), fix)

// A CUDA op names the first argument that is elsewhere.
#define FASTGFN_CHECK_DEVICE(tensor, want, function)                                           \
  FASTGFN_CHECK((tensor).device() == (want), function, #tensor, c10::str("on ", (want)),       \
                (tensor).device(), "move every argument to one device")

// Dtypes and shapes, refused alike on every device; each is defined beside its CPU op, which also refuses values.
namespace fastgfn {

void check_tree_scan(const char* function, const at::Tensor& values, const at::Tensor& parent);
void check_segment_scan(const at::Tensor& values, const at::Tensor& offsets);
void check_path_nodes(const at::Tensor& parent, const at::Tensor& leaf, const at::Tensor& num_nodes,
                      int64_t width);
void check_gather_nodes(const at::Tensor& values, const at::Tensor& index);
void check_scatter_add_nodes(const at::Tensor& grad, const at::Tensor& index);
void check_decode_update(const at::Tensor& tokens, const at::Tensor& lengths, const at::Tensor& finished,
                         const at::Tensor& drawn, const at::Tensor& rows, int64_t max_length);
void check_subtb_nodes(const char* function, const at::Tensor& parent, const at::Tensor& valid,
                       double subtb_lambda);
void check_subtb_tree(const char* function, const at::Tensor& log_pf, const at::Tensor& log_flow,
                      const at::Tensor& parent, const at::Tensor& valid, const at::Tensor& weight,
                      double subtb_lambda);

}  // namespace fastgfn
