// What every kernel of this folder uses. Launches are plain C++, no <<<>>>, so that a host compiler can build the
// same files against an emulated cuda_runtime.h (tests/cuda_on_host) and the tests can run them without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastgfn {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr unsigned int kAllLanes = 0xffffffffu;

// float32 sums in double, as on the CPU.
template <typename T>
using Accumulator = std::conditional_t<std::is_integral_v<T>, T, double>;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t num_blocks, int threads, cudaStream_t stream,
            Arguments... arguments) {
  if (num_blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(num_blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// One thread per item, or one warp per item; nothing is launched for no items.
template <typename... Parameters, typename... Arguments>
void launch_threads(void (*kernel)(Parameters...), int64_t num_items, cudaStream_t stream,
                    Arguments... arguments) {
  launch(kernel, (num_items + kThreads - 1) / kThreads, kThreads, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch_warps(void (*kernel)(Parameters...), int64_t num_items, cudaStream_t stream,
                  Arguments... arguments) {
  launch_threads(kernel, num_items * kWarp, stream, arguments...);
}

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__device__ inline int64_t warp_index() { return thread_index() / kWarp; }

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

// The sum over the lanes, in every lane: a butterfly, whose order is fixed.
template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum over this lane and those before it.
template <typename T>
__device__ T warp_scan(T value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_index() >= offset) value += before;
  }
  return value;
}

// end[j], one past the last descendant of j, from parents in depth-first order. Defined in scan.cu.
void launch_subtree_end(const int32_t* parent, int64_t num_nodes, int32_t* end, cudaStream_t stream);

}  // namespace fastgfn
