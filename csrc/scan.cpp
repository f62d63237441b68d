// Running sums along the forest and along ragged rows; float32 accumulates in double.
#include "checks.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <type_traits>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;

template <typename T>
using Accumulator = std::conditional_t<std::is_integral_v<T>, T, double>;

#define FASTGFN_DISPATCH_SCAN(type, name, ...)                        \
  AT_DISPATCH_SWITCH(type, name,                                      \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)        \
                     AT_DISPATCH_CASE(at::kDouble, __VA_ARGS__)       \
                     AT_DISPATCH_CASE(at::kLong, __VA_ARGS__))

void check_values(const char* function, const Tensor& values) {
  const auto type = values.scalar_type();
  FASTGFN_CHECK(type == at::kFloat || type == at::kDouble || type == at::kLong, function, "values",
                "float32, float64 or int64", c10::toString(type), "cast it");
  FASTGFN_CHECK_DIM(values, 1, function, "flatten it");
}

// The nodes of a depth-first order.
void check_parents(const char* function, const Tensor& parent) {
  const auto p = parent.accessor<int32_t, 1>();
  for (int64_t i = 0; i < p.size(0); ++i) {
    FASTGFN_CHECK(p[i] >= -1 && p[i] < i, function, "parent", "-1 or an earlier node",
                  c10::str(p[i], " at node ", i), "pass the nodes in depth-first order");
  }
}

Tensor tree_cumsum(const Tensor& values, const Tensor& parent) {
  check_tree_scan("tree_cumsum", values, parent);
  check_parents("tree_cumsum", parent);
  Tensor out = at::empty(values.sizes(), values.options());
  FASTGFN_DISPATCH_SCAN(values.scalar_type(), "tree_cumsum", [&] {
    const auto v = values.accessor<scalar_t, 1>();
    const auto p = parent.accessor<int32_t, 1>();
    scalar_t* target = out.data_ptr<scalar_t>();
    std::vector<Accumulator<scalar_t>> sum(v.size(0));
    for (int64_t i = 0; i < v.size(0); ++i) {
      sum[i] = p[i] < 0 ? v[i] : v[i] + sum[p[i]];
      target[i] = static_cast<scalar_t>(sum[i]);
    }
  });
  return out;
}

Tensor subtree_sum(const Tensor& values, const Tensor& parent) {
  check_tree_scan("subtree_sum", values, parent);
  check_parents("subtree_sum", parent);
  Tensor out = at::empty(values.sizes(), values.options());
  FASTGFN_DISPATCH_SCAN(values.scalar_type(), "subtree_sum", [&] {
    const auto v = values.accessor<scalar_t, 1>();
    const auto p = parent.accessor<int32_t, 1>();
    scalar_t* target = out.data_ptr<scalar_t>();
    std::vector<Accumulator<scalar_t>> sum(v.size(0), 0);
    for (int64_t i = v.size(0) - 1; i >= 0; --i) {
      sum[i] += v[i];
      if (p[i] >= 0) sum[p[i]] += sum[i];
      target[i] = static_cast<scalar_t>(sum[i]);
    }
  });
  return out;
}

Tensor segment_cumsum(const Tensor& values, const Tensor& offsets, bool reverse) {
  check_segment_scan(values, offsets);
  const auto o = offsets.accessor<int64_t, 1>();
  const int64_t num_rows = o.size(0) - 1;
  bool ok = num_rows >= 0 && o[0] == 0 && o[num_rows] == values.size(0);
  for (int64_t n = 0; ok && n < num_rows; ++n) ok = o[n] <= o[n + 1];
  FASTGFN_CHECK(ok, "segment_cumsum", "offsets", c10::str("non-decreasing from 0 to ", values.size(0)),
                offsets, "pass the cumulative lengths");
  Tensor out = at::empty(values.sizes(), values.options());
  FASTGFN_DISPATCH_SCAN(values.scalar_type(), "segment_cumsum", [&] {
    const auto v = values.accessor<scalar_t, 1>();
    scalar_t* target = out.data_ptr<scalar_t>();
    at::parallel_for(0, num_rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Accumulator<scalar_t> sum = 0;
        for (int64_t k = 0; k < o[n + 1] - o[n]; ++k) {
          const int64_t i = reverse ? o[n + 1] - 1 - k : o[n] + k;
          sum += v[i];
          target[i] = static_cast<scalar_t>(sum);
        }
      }
    });
  });
  return out;
}

}  // namespace

void check_tree_scan(const char* function, const Tensor& values, const Tensor& parent) {
  check_values(function, values);
  FASTGFN_CHECK_DTYPE(parent, at::kInt, function, "pass TokenTree.parent");
  FASTGFN_CHECK(parent.sizes() == values.sizes(), function, "parent", values.sizes(), parent.sizes(),
                "give one parent per value");
}

void check_segment_scan(const Tensor& values, const Tensor& offsets) {
  check_values("segment_cumsum", values);
  FASTGFN_CHECK_DTYPE(offsets, at::kLong, "segment_cumsum", "cast it to int64");
  FASTGFN_CHECK_DIM(offsets, 1, "segment_cumsum", "flatten it");
}

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("tree_cumsum", &tree_cumsum);
  m.impl("subtree_sum", &subtree_sum);
  m.impl("segment_cumsum", &segment_cumsum);
}

}  // namespace fastgfn
