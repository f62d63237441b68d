// Reading paths out of the forest, gathering node values and summing them back. No atomics, no host
// synchronisation. What the CPU refuses by value is the caller's contract here; nothing outside the arrays is
// touched: a path past its root reads -1, a gather out of range gives `invalid`.
#include "launch.h"

namespace fastgfn {
namespace {

// One thread walks from a leaf and fills its row from the right; one thread per row; writes the whole row.
__global__ void path_nodes_kernel(const int32_t* parent, int64_t num_nodes, const int64_t* leaf,
                                  const int64_t* wanted, int64_t num_rows, int64_t width, int64_t* out) {
  const int64_t n = thread_index();
  if (n >= num_rows) return;
  int64_t* row = out + n * width;
  int64_t length = wanted[n];
  if (length > width) length = width;
  if (length < 0) length = 0;
  for (int64_t k = length; k < width; ++k) row[k] = -1;
  int64_t node = leaf[n] < num_nodes ? leaf[n] : -1;
  for (int64_t k = length - 1; k >= 0; --k) {
    row[k] = node < 0 ? -1 : node;
    if (node >= 0) node = parent[node] < node ? parent[node] : -1;
  }
}

// One thread copies one entry; one thread per entry; bits_t is any type of the values' size.
template <typename bits_t>
__global__ void gather_nodes_kernel(const bits_t* values, int64_t stride, int64_t num_values,
                                    const int64_t* index, int64_t num_entries, bits_t invalid, bits_t* out) {
  const int64_t k = thread_index();
  if (k >= num_entries) return;
  const int64_t j = index[k];
  if (j == -1) {
    out[k] = 0;
  } else {
    out[k] = j >= 0 && j < num_values ? values[j * stride] : invalid;
  }
}

// One warp sums grad over one node's run of `order`, which lists the entries by node; one warp per node.
template <typename scalar_t>
__global__ void sum_runs_kernel(const scalar_t* grad, const int64_t* order, const int64_t* offsets,
                                int64_t num_nodes, scalar_t* out) {
  const int64_t j = warp_index();
  if (j >= num_nodes) return;
  double sum = 0;
  for (int64_t k = offsets[j] + lane_index(); k < offsets[j + 1]; k += kWarp) sum += grad[order[k]];
  sum = warp_sum(sum);
  if (lane_index() == 0) out[j] = static_cast<scalar_t>(sum);
}

}  // namespace
}  // namespace fastgfn

extern "C" void fastgfn_path_nodes(const int32_t* parent, int64_t num_nodes, const int64_t* leaf,
                                   const int64_t* wanted, int64_t num_rows, int64_t width, int64_t* out,
                                   cudaStream_t stream) {
  fastgfn::launch_threads(fastgfn::path_nodes_kernel, num_rows, stream, parent, num_nodes, leaf, wanted,
                          num_rows, width, out);
}

#define FASTGFN_GATHER_LAUNCHER(bytes, bits_t)                                                                 \
  extern "C" void fastgfn_gather_nodes_##bytes(const void* values, int64_t stride, int64_t num_values,         \
                                               const int64_t* index, int64_t num_entries, uint64_t invalid,    \
                                               void* out, cudaStream_t stream) {                               \
    fastgfn::launch_threads(fastgfn::gather_nodes_kernel<bits_t>, num_entries, stream,                         \
                            static_cast<const bits_t*>(values), stride, num_values, index, num_entries,        \
                            static_cast<bits_t>(invalid), static_cast<bits_t*>(out));                          \
  }

FASTGFN_GATHER_LAUNCHER(1, uint8_t)
FASTGFN_GATHER_LAUNCHER(2, uint16_t)
FASTGFN_GATHER_LAUNCHER(4, uint32_t)
FASTGFN_GATHER_LAUNCHER(8, uint64_t)

// `order` sorts the entries by node, stably; node j has the run [offsets[j], offsets[j + 1]) of it.
#define FASTGFN_SUM_RUNS_LAUNCHER(suffix, scalar_t)                                                            \
  extern "C" void fastgfn_sum_runs_##suffix(const scalar_t* grad, const int64_t* order,                        \
                                            const int64_t* offsets, int64_t num_nodes, scalar_t* out,          \
                                            cudaStream_t stream) {                                             \
    fastgfn::launch_warps(fastgfn::sum_runs_kernel<scalar_t>, num_nodes, stream, grad, order, offsets,         \
                          num_nodes, out);                                                                     \
  }

FASTGFN_SUM_RUNS_LAUNCHER(f32, float)
FASTGFN_SUM_RUNS_LAUNCHER(f64, double)
