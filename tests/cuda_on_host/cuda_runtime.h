// The part of CUDA that csrc/cuda uses, on the host: a host compiler with this folder first on its include path
// builds the .cu files as plain C++, and their launchers then work on host memory. Blocks and warps run one after
// the other; the lanes of a warp are coroutines that wait for each other at every shuffle, as on a device. A lane
// that left its kernel, or stands at another shuffle, ends the program: on a device that is undefined.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x_in = 1, unsigned int y_in = 1, unsigned int z_in = 1) : x(x_in), y(y_in), z(z_in) {}
};

using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 blockIdx, threadIdx;

namespace cuda_on_host {

constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::array<char, 1 << 16> stack;
  bool running;
  int shuffles;
  int kind;
  uint64_t slots[2];
};

inline std::array<Lane, kLanes> lanes;
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "cuda_on_host: %s in block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void run_lane() {
  body();
  lanes[current].running = false;
}

// Every pass takes each lane to its next shuffle or to its end.
inline void run_warp(unsigned int first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, run_lane, 0);
    lane.running = true;
    lane.shuffles = 0;
  }
  for (int running = kLanes; running > 0;) {
    int left = 0;
    for (current = 0; current < kLanes; ++current) {
      if (!lanes[current].running) continue;
      threadIdx.x = first_thread + static_cast<unsigned int>(current);
      swapcontext(&scheduler, &lanes[current].context);
      left += lanes[current].running;
    }
    require(left == 0 || left == kLanes, "a lane misses a shuffle");
    for (const Lane& lane : lanes) require(left == 0 || lane.kind == lanes[0].kind, "lanes at different shuffles");
    running = left;
  }
}

// Two slots per lane: the next shuffle may be entered before the last lane has read this one.
template <typename T>
T exchange(unsigned int mask, T value, int source, int kind) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  require(mask == 0xffffffffu, "a partial mask");
  const int lane = current, slot = lanes[lane].shuffles++ & 1;
  std::memcpy(&lanes[lane].slots[slot], &value, sizeof value);
  lanes[lane].kind = kind;
  swapcontext(&lanes[lane].context, &scheduler);
  std::memcpy(&value, &lanes[source].slots[slot], sizeof value);
  return value;
}

}  // namespace cuda_on_host

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source) {
  return cuda_on_host::exchange(mask, value, source, 1000 + source);
}

template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta) {
  const int source = cuda_on_host::current - static_cast<int>(delta);
  return cuda_on_host::exchange(mask, value, source < 0 ? cuda_on_host::current : source, 2000 + static_cast<int>(delta));
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask) {
  return cuda_on_host::exchange(mask, value, cuda_on_host::current ^ lane_mask, 3000 + lane_mask);
}

template <typename... Parameters, typename... Arguments>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  cuda_on_host::require(config->blockDim.x % cuda_on_host::kLanes == 0, "a block of partial warps");
  cuda_on_host::body = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    for (unsigned int first = 0; first < config->blockDim.x; first += cuda_on_host::kLanes) {
      cuda_on_host::run_warp(first);
    }
  }
}
