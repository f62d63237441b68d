// SubTB on the nodes of a token forest, shared by the CPU and the CUDA kernels. No torch headers. Derivation and
// names (S, R, B, E) are in fastgfn/reference/subtb.py.
// The CPU passes each tree once down and once up, O(T), one node after the other. CUDA gives every node its own
// thread, which walks its ancestors for S, and its own warp, which adds up its descendants for R: O(T x depth)
// work in all, but one launch each, and fixed orders of summation. Both are built of the functions below.
#pragma once

#include "subtb.h"

namespace fastgfn {

// S_k, or B_k, of one node.
struct SubtbSums {
  double s0 = 0, s1 = 0, s2 = 0;
};

// R_k, or E_k, of one node.
struct SubtbBelow {
  double r0 = 0, r1 = 0;
};

// What a walk over the ancestors of a node yields.
struct SubtbPath {
  SubtbSums sums;
  double potential = 0;  // U of the node, measured from the first state of its path
  int32_t states = 0;    // on the path, the node included
};

template <typename scalar_t, typename index_t>
struct SubtbNodes {
  const scalar_t* log_pf;
  const scalar_t* log_flow;
  const index_t* parent;
  const bool* valid;
  const double* weight;
  double lambda;

  FASTGFN_HOST_DEVICE double flow_or_zero(int64_t j) const {
    return valid[j] ? static_cast<double>(log_flow[j]) : 0.0;
  }

  FASTGFN_HOST_DEVICE double weight_or_zero(int64_t j) const { return valid[j] ? weight[j] : 0.0; }

  // U of the node minus U of its parent. Only for nodes that have a parent.
  FASTGFN_HOST_DEVICE double step(int64_t j) const {
    return static_cast<double>(log_pf[j]) - flow_or_zero(j) + flow_or_zero(parent[j]);
  }

  // B of a node, from S of its parent p.
  FASTGFN_HOST_DEVICE SubtbSums from_parent(int64_t p, const SubtbSums& of_parent) const {
    if (!valid[p]) return of_parent;
    return {lambda * of_parent.s0 + 1, lambda * of_parent.s1, lambda * of_parent.s2};
  }

  // S of a node, from its B. Where no window reaches the node its step may be anything and is not read.
  FASTGFN_HOST_DEVICE SubtbSums at_node(int64_t j, const SubtbSums& b) const {
    if (b.s0 == 0) return {};
    const double d = step(j);
    return {b.s0, b.s1 + d * b.s0, b.s2 + d * (2 * b.s1 + d * b.s0)};
  }

  // E of a node, from its B and R; zero, and its step not read, where no window crosses the edge into it.
  FASTGFN_HOST_DEVICE SubtbBelow across_edge(int64_t j, const SubtbSums& b, const SubtbBelow& r) const {
    const double factor = valid[j] ? lambda : 1.0;
    const double e0 = weight_or_zero(j) + factor * r.r0;
    if (b.s0 == 0 || e0 == 0) return {};
    return {e0, factor * r.r1 + step(j) * e0};
  }

  // Gradients, of half the objective.
  FASTGFN_HOST_DEVICE double half_grad_log_pf(const SubtbSums& b, const SubtbBelow& e) const {
    return e.r0 == 0 ? 0.0 : b.s0 * e.r1 + b.s1 * e.r0;
  }

  FASTGFN_HOST_DEVICE double half_grad_log_flow(int64_t j, const SubtbSums& s, const SubtbBelow& r) const {
    return valid[j] ? r.r1 - weight[j] * s.s1 : 0.0;
  }

  // S of a node from its ancestors, nearest first. `parent[a] < a` bounds the walk whatever the array holds.
  FASTGFN_HOST_DEVICE SubtbPath walk_up(int64_t j) const {
    SubtbPath path;
    double log_prob = 0, share = 1;
    const double own = flow_or_zero(j);
    path.states = valid[j] ? 1 : 0;
    int64_t a = j;
    for (int64_t p = parent[a]; p >= 0 && p < a; p = parent[a]) {
      log_prob += static_cast<double>(log_pf[a]);
      a = p;
      if (!valid[a]) continue;
      const double distance = log_prob + (static_cast<double>(log_flow[a]) - own);
      path.sums.s0 += share;
      path.sums.s1 += share * distance;
      path.sums.s2 += share * distance * distance;
      path.potential = distance;
      share *= lambda;
      ++path.states;
    }
    return path;
  }
};

// S_0 alone, which needs no values.
template <typename index_t>
FASTGFN_HOST_DEVICE double subtb_walk_pairs(const index_t* parent, const bool* valid, double lambda, int64_t j) {
  double sum = 0, share = 1;
  int64_t a = j;
  for (int64_t p = parent[a]; p >= 0 && p < a && share > 0; p = parent[a]) {
    a = p;
    if (!valid[a]) continue;
    sum += share;
    share *= lambda;
  }
  return sum;
}

// base^exponent by squaring; 0^0 = 1.
FASTGFN_HOST_DEVICE inline double subtb_power(double base, int32_t exponent) {
  double power = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) power *= base;
  }
  return power;
}

// Adds to R of a node the window that starts there and ends at its descendant c, which is a state of this weight.
// `states` and `distance` are those of c minus those of the node.
FASTGFN_HOST_DEVICE inline void subtb_add_window(double weight, double lambda, int32_t states, double distance,
                                                 SubtbBelow* r) {
  const double share = weight * subtb_power(lambda, states - 1);
  r->r0 += share;
  r->r1 += share * distance;
}

}  // namespace fastgfn
