// Running sums along the forest and along ragged rows. No atomics, no host synchronisation, fixed orders of
// summation; float32 accumulates in double. Parents must be depth-first and offsets non-decreasing: other input
// cannot be refused without a synchronisation; it gives undefined values but no access outside the arrays.
//
// Cost, for T nodes of mean depth d. Path sums are walks to the root and subtree sums are sums over [j, end[j]),
// T d steps each, in one launch. T = 1200, d = 60: 60 dependent loads from L1 or L2, about 10 us. T = 80,000,
// d = 2000: 1.6e8 steps of about 13 bytes, coalesced along chains, about 0.5 ms, beside a forward pass of 80,000
// tokens. Pointer doubling takes log2(T) launches of 3 us each (33 us and 50 us) and two scratch buffers: better
// only where neither matters. A difference of two prefix sums over the packed order is O(T) but cancels.
#include "launch.h"

namespace fastgfn {
namespace {

// One thread ends the chain of nodes whose last descendant is its node i: the path from i up to, and without, the
// parent of i + 1. One thread per node; every node is written once, so this is O(T) work in all.
__global__ void subtree_end_kernel(const int32_t* parent, int64_t num_nodes, int32_t* end) {
  const int64_t i = thread_index();
  if (i >= num_nodes) return;
  const int64_t above = i + 1 < num_nodes ? parent[i + 1] : -1;
  for (int64_t a = i; a > above && a >= 0;) {
    end[a] = static_cast<int32_t>(i + 1);
    const int64_t p = parent[a];
    if (p >= a) return;
    a = p;
  }
}

// One thread sums the path from its node to the root; one thread per node; writes out.
template <typename scalar_t>
__global__ void tree_cumsum_kernel(const scalar_t* values, int64_t stride, const int32_t* parent,
                                   int64_t num_nodes, scalar_t* out) {
  const int64_t i = thread_index();
  if (i >= num_nodes) return;
  Accumulator<scalar_t> sum = values[i * stride];
  int64_t a = i;
  for (int64_t p = parent[a]; p >= 0 && p < a; p = parent[a]) {
    a = p;
    sum += values[a * stride];
  }
  out[i] = static_cast<scalar_t>(sum);
}

// One warp sums the index range of its node's subtree; one warp per node; writes out.
template <typename scalar_t>
__global__ void subtree_sum_kernel(const scalar_t* values, int64_t stride, const int32_t* end,
                                   int64_t num_nodes, scalar_t* out) {
  const int64_t j = warp_index();
  if (j >= num_nodes) return;
  const int64_t stop = end[j] < num_nodes ? end[j] : num_nodes;
  Accumulator<scalar_t> sum = 0;
#pragma unroll 4
  for (int64_t i = j + lane_index(); i < stop; i += kWarp) sum += values[i * stride];
  sum = warp_sum(sum);
  if (lane_index() == 0) out[j] = static_cast<scalar_t>(sum);
}

// One warp scans a row, 32 entries at a time; one warp per row; writes out within the row.
template <typename scalar_t>
__global__ void segment_cumsum_kernel(const scalar_t* values, int64_t stride, int64_t num_values,
                                      const int64_t* offsets, int64_t offsets_stride, int64_t num_rows,
                                      bool reverse, scalar_t* out) {
  const int64_t n = warp_index();
  if (n >= num_rows) return;
  int64_t begin = offsets[n * offsets_stride], stop = offsets[(n + 1) * offsets_stride];
  if (begin < 0) begin = 0;
  if (stop > num_values) stop = num_values;
  Accumulator<scalar_t> carry = 0;
  for (int64_t base = 0; base < stop - begin; base += kWarp) {
    const int64_t k = base + lane_index();
    const bool inside = k < stop - begin;
    const int64_t i = reverse ? stop - 1 - k : begin + k;
    Accumulator<scalar_t> sum = 0;
    if (inside) sum = values[i * stride];
    sum = warp_scan(sum) + carry;
    if (inside) out[i] = static_cast<scalar_t>(sum);
    carry = __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

}  // namespace

void launch_subtree_end(const int32_t* parent, int64_t num_nodes, int32_t* end, cudaStream_t stream) {
  launch_threads(subtree_end_kernel, num_nodes, stream, parent, num_nodes, end);
}

}  // namespace fastgfn

// Strides count elements; every pointer is a device pointer; `end` is scratch of one entry per node.
#define FASTGFN_SCAN_LAUNCHERS(suffix, scalar_t)                                                               \
  extern "C" void fastgfn_tree_cumsum_##suffix(const scalar_t* values, int64_t stride, const int32_t* parent,  \
                                               int64_t num_nodes, scalar_t* out, cudaStream_t stream) {        \
    fastgfn::launch_threads(fastgfn::tree_cumsum_kernel<scalar_t>, num_nodes, stream, values, stride, parent,  \
                            num_nodes, out);                                                                   \
  }                                                                                                            \
  extern "C" void fastgfn_subtree_sum_##suffix(const scalar_t* values, int64_t stride, const int32_t* parent,  \
                                               int64_t num_nodes, int32_t* end, scalar_t* out,                 \
                                               cudaStream_t stream) {                                          \
    fastgfn::launch_subtree_end(parent, num_nodes, end, stream);                                               \
    fastgfn::launch_warps(fastgfn::subtree_sum_kernel<scalar_t>, num_nodes, stream, values, stride, end,       \
                          num_nodes, out);                                                                     \
  }                                                                                                            \
  extern "C" void fastgfn_segment_cumsum_##suffix(                                                             \
      const scalar_t* values, int64_t stride, int64_t num_values, const int64_t* offsets,                      \
      int64_t offsets_stride, int64_t num_rows, bool reverse, scalar_t* out, cudaStream_t stream) {            \
    fastgfn::launch_warps(fastgfn::segment_cumsum_kernel<scalar_t>, num_rows, stream, values, stride,          \
                          num_values, offsets, offsets_stride, num_rows, reverse, out);                        \
  }

FASTGFN_SCAN_LAUNCHERS(f32, float)
FASTGFN_SCAN_LAUNCHERS(f64, double)
FASTGFN_SCAN_LAUNCHERS(i64, int64_t)
