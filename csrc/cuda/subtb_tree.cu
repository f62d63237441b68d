// Sub-trajectory balance on the nodes of a forest: the walks of ../subtb_nodes.h, one thread or one warp per node.
// No atomics, no host synchronisation, fixed orders of summation, sums in double. Parents must be depth-first;
// others give undefined values but no access outside the arrays.
//
// Cost, for T nodes of mean depth d: T d steps up in the forward, T d up and T d over index ranges in the backward
// (about 14 bytes and 5 double FMAs, and 21 bytes and a power, each). T = 1200, d = 60: about 10 us per kernel,
// latency-bound. T = 80,000, d = 2000: about 1 ms and 2 ms. Composing the affine maps of the edges by pointer
// doubling takes log2(T) launches of 88 bytes a node (about 50 us) and gives the backward nothing.
#include "../subtb_nodes.h"
#include "launch.h"

namespace fastgfn {
namespace {

template <typename scalar_t>
using Nodes = SubtbNodes<scalar_t, int32_t>;

// Of every node, what its descendants and children read.
struct PathArrays {
  double* s0;
  double* s1;
  double* potential;
  int32_t* states;
};

// One thread walks up from its node; one thread per node; writes the node's term of the objective.
template <typename scalar_t>
__global__ void subtb_tree_fwd_kernel(Nodes<scalar_t> nodes, int64_t num_nodes, double* terms) {
  const int64_t j = thread_index();
  if (j >= num_nodes) return;
  const double weight = nodes.weight_or_zero(j);
  terms[j] = weight == 0 ? 0.0 : weight * nodes.walk_up(j).sums.s2;
}

// One thread walks up from its node; one thread per node; writes the path arrays.
template <typename scalar_t>
__global__ void subtb_tree_path_kernel(Nodes<scalar_t> nodes, int64_t num_nodes, PathArrays paths) {
  const int64_t j = thread_index();
  if (j >= num_nodes) return;
  const SubtbPath path = nodes.walk_up(j);
  paths.s0[j] = path.sums.s0;
  paths.s1[j] = path.sums.s1;
  paths.potential[j] = path.potential;
  paths.states[j] = path.states;
}

// One warp adds up the windows that start at its node, over [j + 1, end[j]); one warp per node; writes both
// gradients. Differences of two potentials lose what their size costs in double: 1e-13 at 1000 nats.
template <typename scalar_t>
__global__ void subtb_tree_bwd_kernel(Nodes<scalar_t> nodes, PathArrays paths, const int32_t* end,
                                      int64_t num_nodes, const double* grad, scalar_t* grad_log_pf,
                                      scalar_t* grad_log_flow) {
  const int64_t j = warp_index();
  if (j >= num_nodes) return;
  const int64_t p = nodes.parent[j];
  SubtbSums b;
  if (p >= 0 && p < j) b = nodes.from_parent(p, {paths.s0[p], paths.s1[p], 0.0});
  SubtbBelow r;
  if (b.s0 != 0 || nodes.valid[j]) {
    const int64_t stop = end[j] < num_nodes ? end[j] : num_nodes;
    for (int64_t c = j + 1 + lane_index(); c < stop; c += kWarp) {
      const double weight = nodes.weight_or_zero(c);
      if (weight == 0) continue;
      subtb_add_window(weight, nodes.lambda, paths.states[c] - paths.states[j],
                       paths.potential[c] - paths.potential[j], &r);
    }
  }
  r.r0 = warp_sum(r.r0);
  r.r1 = warp_sum(r.r1);
  if (lane_index() != 0) return;
  const double twice = 2 * *grad;
  const double pf = nodes.half_grad_log_pf(b, nodes.across_edge(j, b, r));
  const double flow = nodes.half_grad_log_flow(j, {paths.s0[j], paths.s1[j], 0.0}, r);
  grad_log_pf[j] = static_cast<scalar_t>(pf == 0 ? 0.0 : twice * pf);
  grad_log_flow[j] = static_cast<scalar_t>(nodes.valid[j] ? twice * flow : 0.0);
}

// One thread walks up from its node; one thread per node; writes pairs.
__global__ void subtb_tree_pairs_kernel(const int32_t* parent, const bool* valid, double lambda,
                                        int64_t num_nodes, double* pairs) {
  const int64_t j = thread_index();
  if (j < num_nodes) pairs[j] = valid[j] ? subtb_walk_pairs(parent, valid, lambda, j) : 0.0;
}

}  // namespace
}  // namespace fastgfn

extern "C" void fastgfn_subtb_tree_pairs(const int32_t* parent, const bool* valid, double lambda,
                                         int64_t num_nodes, double* pairs, cudaStream_t stream) {
  fastgfn::launch_threads(fastgfn::subtb_tree_pairs_kernel, num_nodes, stream, parent, valid, lambda, num_nodes,
                          pairs);
}

// Every array is contiguous, on the device and has one entry per node; the objective is the sum of `terms`.
// The backward takes scratch for 3 doubles and 2 int32 per node; `grad` is one double on the device.
#define FASTGFN_SUBTB_TREE_LAUNCHERS(suffix, scalar_t)                                                         \
  extern "C" void fastgfn_subtb_tree_fwd_##suffix(                                                             \
      const scalar_t* log_pf, const scalar_t* log_flow, const int32_t* parent, const bool* valid,              \
      const double* weight, double lambda, int64_t num_nodes, double* terms, cudaStream_t stream) {            \
    const fastgfn::Nodes<scalar_t> nodes{log_pf, log_flow, parent, valid, weight, lambda};                     \
    fastgfn::launch_threads(fastgfn::subtb_tree_fwd_kernel<scalar_t>, num_nodes, stream, nodes, num_nodes,     \
                            terms);                                                                            \
  }                                                                                                            \
  extern "C" void fastgfn_subtb_tree_bwd_##suffix(                                                             \
      const scalar_t* log_pf, const scalar_t* log_flow, const int32_t* parent, const bool* valid,              \
      const double* weight, double lambda, int64_t num_nodes, const double* grad, double* doubles,             \
      int32_t* ints, scalar_t* grad_log_pf, scalar_t* grad_log_flow, cudaStream_t stream) {                    \
    const fastgfn::Nodes<scalar_t> nodes{log_pf, log_flow, parent, valid, weight, lambda};                     \
    const fastgfn::PathArrays paths{doubles, doubles + num_nodes, doubles + 2 * num_nodes, ints};              \
    int32_t* end = ints + num_nodes;                                                                           \
    fastgfn::launch_threads(fastgfn::subtb_tree_path_kernel<scalar_t>, num_nodes, stream, nodes, num_nodes,    \
                            paths);                                                                            \
    fastgfn::launch_subtree_end(parent, num_nodes, end, stream);                                               \
    fastgfn::launch_warps(fastgfn::subtb_tree_bwd_kernel<scalar_t>, num_nodes, stream, nodes, paths, end,      \
                          num_nodes, grad, grad_log_pf, grad_log_flow);                                        \
  }

FASTGFN_SUBTB_TREE_LAUNCHERS(f32, float)
FASTGFN_SUBTB_TREE_LAUNCHERS(f64, double)
