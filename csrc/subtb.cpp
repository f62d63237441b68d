// Sub-trajectory balance on the CPU: padded rows and token trees, linear in the number of states.
#include "subtb.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "subtb_nodes.h"

namespace fastgfn {

namespace {

// Below about this many states per thread, starting a thread costs more than it saves.
constexpr int64_t kStatesPerTask = 32768;

void check_lambda(const char* function, double subtb_lambda) {
  FASTGFN_CHECK(subtb_lambda >= 0 && subtb_lambda <= 1, function, "subtb_lambda", "in [0, 1]", subtb_lambda,
                "1 weights every window equally, 0 keeps windows of one step");
}

void check_lengths(const char* function, const at::Tensor& lengths, int64_t width) {
  const int64_t* data = lengths.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < lengths.size(0); ++n) {
    FASTGFN_CHECK(data[n] >= 0 && data[n] <= width, function, "lengths[" + std::to_string(n) + "]",
                  "in [0, T] = [0, " + std::to_string(width) + "]", data[n],
                  "pass the number of transitions of each row");
  }
}

int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, kStatesPerTask / (width + 1));
}

template <typename scalar_t>
SubtbRows<scalar_t> rows_of(const at::Tensor& log_pf, const at::Tensor& log_flow, const at::Tensor& lengths,
                            double subtb_lambda) {
  return {log_pf.const_data_ptr<scalar_t>(),   log_pf.stride(0),   log_pf.stride(1),
          log_flow.const_data_ptr<scalar_t>(), log_flow.stride(0), log_flow.stride(1),
          lengths.const_data_ptr<int64_t>(),   subtb_lambda};
}

std::tuple<at::Tensor, at::Tensor> subtb_padded(const at::Tensor& log_pf, const at::Tensor& log_flow,
                                                const at::Tensor& lengths, double subtb_lambda) {
  check_subtb_padded("subtb_padded", log_pf, log_flow, lengths, subtb_lambda);
  const at::Tensor counts = lengths.to(at::kLong).contiguous();
  check_lengths("subtb_padded", counts, log_pf.size(1));
  at::Tensor numerator = at::empty({log_pf.size(0)}, log_pf.options());
  at::Tensor denominator = at::empty_like(numerator);
  AT_DISPATCH_FLOATING_TYPES(log_pf.scalar_type(), "subtb_padded", [&] {
    const auto rows = rows_of<scalar_t>(log_pf, log_flow, counts, subtb_lambda);
    scalar_t* num = numerator.mutable_data_ptr<scalar_t>();
    scalar_t* den = denominator.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, log_pf.size(0), rows_per_task(log_pf.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) subtb_row_forward(rows.row(n), subtb_lambda, num + n, den + n);
    });
  });
  return {numerator, denominator};
}

std::tuple<at::Tensor, at::Tensor> subtb_padded_backward(const at::Tensor& grad_numerator,
                                                         const at::Tensor& log_pf, const at::Tensor& log_flow,
                                                         const at::Tensor& lengths, double subtb_lambda) {
  check_subtb_padded("subtb_padded_backward", log_pf, log_flow, lengths, subtb_lambda);
  FASTGFN_CHECK(grad_numerator.sizes() == lengths.sizes(), "subtb_padded_backward", "grad_numerator",
                lengths.sizes(), grad_numerator.sizes(), "pass one gradient per row");
  const at::Tensor counts = lengths.to(at::kLong).contiguous();
  const int64_t width = log_pf.size(1);
  check_lengths("subtb_padded_backward", counts, width);
  const at::Tensor grad = grad_numerator.to(at::kDouble).contiguous();
  at::Tensor grad_log_pf = at::empty(log_pf.sizes(), log_pf.options());
  at::Tensor grad_log_flow = at::empty(log_flow.sizes(), log_flow.options());
  AT_DISPATCH_FLOATING_TYPES(log_pf.scalar_type(), "subtb_padded_backward", [&] {
    const auto rows = rows_of<scalar_t>(log_pf, log_flow, counts, subtb_lambda);
    const double* g = grad.const_data_ptr<double>();
    scalar_t* pf = grad_log_pf.mutable_data_ptr<scalar_t>();
    scalar_t* flow = grad_log_flow.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, log_pf.size(0), rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        scalar_t *pf_row = pf + n * width, *flow_row = flow + n * (width + 1);
        const auto row = rows.row(n);
        subtb_row_backward(row, subtb_lambda, g[n], pf_row, flow_row);
        std::fill(pf_row + row.length, pf_row + width, scalar_t(0));
        std::fill(flow_row + row.length + 1, flow_row + width + 1, scalar_t(0));
      }
    });
  });
  return {grad_log_pf, grad_log_flow};
}

// Contiguous copies of a forest's arrays, and where each tree begins (the last entry is the number of nodes).
struct Forest {
  at::Tensor parent_, valid_, log_pf_, log_flow_, weight_;
  SubtbNodes<double, int64_t> nodes{};
  std::vector<int64_t> starts;

  Forest(const char* function, const at::Tensor& parent_in, const at::Tensor& valid_in, double subtb_lambda)
      : parent_(parent_in.to(at::kLong).contiguous()), valid_(valid_in.contiguous()) {
    const int64_t* parent = nodes.parent = parent_.const_data_ptr<int64_t>();
    nodes.valid = valid_.const_data_ptr<bool>();
    nodes.lambda = subtb_lambda;
    for (int64_t j = 0; j < parent_.size(0); ++j) {
      if (parent[j] < 0) starts.push_back(j);
      FASTGFN_CHECK(parent[j] < 0 || (!starts.empty() && parent[j] >= starts.back() && parent[j] < j), function,
                    "parent[" + std::to_string(j) + "]", "-1 or an earlier node of the same tree", parent[j],
                    "pass the nodes in depth-first order");
    }
    starts.push_back(parent_.size(0));
  }

  void set_values(const char* function, const at::Tensor& pf, const at::Tensor& flow, const at::Tensor& w) {
    log_pf_ = pf.to(at::kDouble).contiguous();
    log_flow_ = flow.to(at::kDouble).contiguous();
    weight_ = w.to(at::kDouble).contiguous();
    nodes.log_pf = log_pf_.const_data_ptr<double>();
    nodes.log_flow = log_flow_.const_data_ptr<double>();
    nodes.weight = weight_.const_data_ptr<double>();
    for (int64_t j = 0; j < size(); ++j) {
      FASTGFN_CHECK(!nodes.valid[j] || nodes.weight[j] >= 0, function, "weight[" + std::to_string(j) + "]",
                    ">= 0", nodes.weight[j], "pass a non-negative coefficient at every valid node");
    }
  }

  int64_t size() const {
    return starts.back();
  }

  int64_t trees() const {
    return static_cast<int64_t>(starts.size()) - 1;
  }

  // B of a node.
  SubtbSums before(int64_t j, const std::vector<SubtbSums>& sums) const {
    const int64_t p = nodes.parent[j];
    return p < 0 ? SubtbSums{} : nodes.from_parent(p, sums[p]);
  }

  // S of every node of one tree.
  void scan(int64_t tree, std::vector<SubtbSums>& sums) const {
    for (int64_t j = starts[tree]; j < starts[tree + 1]; ++j) sums[j] = nodes.at_node(j, before(j, sums));
  }

  template <typename F>
  void for_each_tree(const F& f) const {
    const int64_t nodes_per_tree = std::max<int64_t>(1, size() / std::max<int64_t>(1, trees()));
    const int64_t grain = std::max<int64_t>(1, kStatesPerTask / nodes_per_tree);
    at::parallel_for(0, trees(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t tree = begin; tree < end; ++tree) f(tree);
    });
  }
};

at::Tensor subtb_tree(const at::Tensor& log_pf, const at::Tensor& log_flow, const at::Tensor& parent,
                      const at::Tensor& valid, const at::Tensor& weight, double subtb_lambda) {
  check_subtb_tree("subtb_tree", log_pf, log_flow, parent, valid, weight, subtb_lambda);
  Forest forest("subtb_tree", parent, valid, subtb_lambda);
  forest.set_values("subtb_tree", log_pf, log_flow, weight);
  std::vector<SubtbSums> sums(forest.size());
  std::vector<double> partial(forest.trees(), 0.0);
  forest.for_each_tree([&](int64_t tree) {
    forest.scan(tree, sums);
    for (int64_t j = forest.starts[tree]; j < forest.starts[tree + 1]; ++j) {
      const double weight = forest.nodes.weight_or_zero(j);
      if (weight != 0) partial[tree] += weight * sums[j].s2;
    }
  });
  double total = 0;
  for (const double p : partial) total += p;
  return at::scalar_tensor(total, log_pf.options());
}

std::tuple<at::Tensor, at::Tensor> subtb_tree_backward(const at::Tensor& grad, const at::Tensor& log_pf,
                                                       const at::Tensor& log_flow, const at::Tensor& parent,
                                                       const at::Tensor& valid, const at::Tensor& weight,
                                                       double subtb_lambda) {
  check_subtb_tree("subtb_tree_backward", log_pf, log_flow, parent, valid, weight, subtb_lambda);
  FASTGFN_CHECK_DIM(grad, 0, "subtb_tree_backward", "pass the gradient of the scalar value");
  Forest forest("subtb_tree_backward", parent, valid, subtb_lambda);
  forest.set_values("subtb_tree_backward", log_pf, log_flow, weight);
  const double twice = 2 * grad.item<double>();
  at::Tensor grad_log_pf = at::zeros({forest.size()}, log_pf.options().dtype(at::kDouble));
  at::Tensor grad_log_flow = at::zeros_like(grad_log_pf);
  double* grad_pf = grad_log_pf.mutable_data_ptr<double>();
  double* grad_flow = grad_log_flow.mutable_data_ptr<double>();
  std::vector<SubtbSums> sums(forest.size());
  std::vector<SubtbBelow> below(forest.size());
  forest.for_each_tree([&](int64_t tree) {
    forest.scan(tree, sums);
    for (int64_t j = forest.starts[tree + 1] - 1; j >= forest.starts[tree]; --j) {
      const SubtbSums b = forest.before(j, sums);
      const SubtbBelow e = forest.nodes.across_edge(j, b, below[j]);
      if (forest.nodes.valid[j]) grad_flow[j] = twice * forest.nodes.half_grad_log_flow(j, sums[j], below[j]);
      if (e.r0 == 0) continue;
      grad_pf[j] = twice * forest.nodes.half_grad_log_pf(b, e);
      below[forest.nodes.parent[j]].r0 += e.r0;
      below[forest.nodes.parent[j]].r1 += e.r1;
    }
  });
  return {grad_log_pf.to(log_pf.scalar_type()), grad_log_flow.to(log_flow.scalar_type())};
}

at::Tensor subtb_tree_pairs(const at::Tensor& parent, const at::Tensor& valid, double subtb_lambda) {
  check_subtb_nodes("subtb_tree_pairs", parent, valid, subtb_lambda);
  const Forest forest("subtb_tree_pairs", parent, valid, subtb_lambda);
  at::Tensor pairs = at::zeros({forest.size()}, parent.options().dtype(at::kDouble));
  double* out = pairs.mutable_data_ptr<double>();
  std::vector<SubtbSums> sums(forest.size());
  for (int64_t j = 0; j < forest.size(); ++j) {
    sums[j].s0 = forest.before(j, sums).s0;
    if (forest.nodes.valid[j]) out[j] = sums[j].s0;
  }
  return pairs;
}

}  // namespace

void check_subtb_padded(const char* function, const at::Tensor& log_pf, const at::Tensor& log_flow,
                        const at::Tensor& lengths, double subtb_lambda) {
  check_lambda(function, subtb_lambda);
  FASTGFN_CHECK_DIM(log_pf, 2, function, "pass one row per trajectory");
  FASTGFN_CHECK(log_pf.scalar_type() == at::kFloat || log_pf.scalar_type() == at::kDouble, function, "log_pf",
                "float32 or float64", log_pf.scalar_type(), "cast it to float32");
  FASTGFN_CHECK(log_flow.scalar_type() == log_pf.scalar_type(), function, "log_flow", log_pf.scalar_type(),
                log_flow.scalar_type(), "cast it to the dtype of log_pf");
  const int64_t n = log_pf.size(0), states = log_pf.size(1) + 1;
  FASTGFN_CHECK(log_flow.sizes() == at::IntArrayRef({n, states}), function, "log_flow",
                at::IntArrayRef({n, states}), log_flow.sizes(), "pass one column per state, one more than log_pf");
  FASTGFN_CHECK(lengths.sizes() == at::IntArrayRef({n}), function, "lengths", at::IntArrayRef({n}),
                lengths.sizes(), "pass one length per row");
  FASTGFN_CHECK(at::isIntegralType(lengths.scalar_type(), false), function, "lengths", "int32 or int64",
                lengths.scalar_type(), "cast it to int64");
}

void check_subtb_nodes(const char* function, const at::Tensor& parent, const at::Tensor& valid,
                       double subtb_lambda) {
  check_lambda(function, subtb_lambda);
  FASTGFN_CHECK_DIM(parent, 1, function, "pass one entry per node");
  FASTGFN_CHECK(at::isIntegralType(parent.scalar_type(), false), function, "parent", "int32 or int64",
                parent.scalar_type(), "cast it to int32");
  FASTGFN_CHECK(valid.sizes() == parent.sizes(), function, "valid", parent.sizes(), valid.sizes(),
                "pass one entry per node");
  FASTGFN_CHECK_DTYPE(valid, at::kBool, function, "pass a mask");
}

void check_subtb_tree(const char* function, const at::Tensor& log_pf, const at::Tensor& log_flow,
                      const at::Tensor& parent, const at::Tensor& valid, const at::Tensor& weight,
                      double subtb_lambda) {
  check_subtb_nodes(function, parent, valid, subtb_lambda);
  FASTGFN_CHECK(log_pf.scalar_type() == at::kFloat || log_pf.scalar_type() == at::kDouble, function, "log_pf",
                "float32 or float64", log_pf.scalar_type(), "cast it to float32");
  FASTGFN_CHECK(log_flow.scalar_type() == log_pf.scalar_type(), function, "log_flow", log_pf.scalar_type(),
                log_flow.scalar_type(), "cast it to the dtype of log_pf");
  FASTGFN_CHECK(log_pf.sizes() == parent.sizes(), function, "log_pf", parent.sizes(), log_pf.sizes(),
                "pass one entry per node");
  FASTGFN_CHECK(log_flow.sizes() == parent.sizes(), function, "log_flow", parent.sizes(), log_flow.sizes(),
                "pass one entry per node");
  FASTGFN_CHECK(weight.sizes() == parent.sizes(), function, "weight", parent.sizes(), weight.sizes(),
                "pass one entry per node");
}

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("subtb_padded", &subtb_padded);
  m.impl("subtb_padded_backward", &subtb_padded_backward);
  m.impl("subtb_tree", &subtb_tree);
  m.impl("subtb_tree_backward", &subtb_tree_backward);
  m.impl("subtb_tree_pairs", &subtb_tree_pairs);
}

}  // namespace fastgfn
