// The torch side of decode.cu: checks, device guard, current stream, registration.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"

extern "C" void fastgfn_decode_update(int64_t*, int64_t, int64_t, int64_t*, int64_t, bool*, int64_t, int64_t,
                                      const int64_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t,
                                      int64_t, cudaStream_t);

namespace fastgfn {
namespace {

using at::Tensor;

void decode_update(const Tensor& tokens, const Tensor& lengths, const Tensor& finished, const Tensor& drawn,
                   const Tensor& rows, int64_t termination_token_id, int64_t max_length) {
  check_decode_update(tokens, lengths, finished, drawn, rows, max_length);
  FASTGFN_CHECK_DEVICE(lengths, tokens.device(), "decode_update_");
  FASTGFN_CHECK_DEVICE(finished, tokens.device(), "decode_update_");
  FASTGFN_CHECK_DEVICE(drawn, tokens.device(), "decode_update_");
  FASTGFN_CHECK_DEVICE(rows, tokens.device(), "decode_update_");
  const c10::cuda::CUDAGuard guard(tokens.device());
  fastgfn_decode_update(tokens.mutable_data_ptr<int64_t>(), tokens.stride(0), tokens.stride(1),
                        lengths.mutable_data_ptr<int64_t>(), lengths.stride(0),
                        finished.mutable_data_ptr<bool>(), finished.stride(0), tokens.size(0),
                        drawn.const_data_ptr<int64_t>(), drawn.stride(0), rows.const_data_ptr<int64_t>(),
                        rows.stride(0), drawn.size(0), termination_token_id, max_length,
                        c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CUDA, m) {
  m.impl("decode_update_", &decode_update);
}

}  // namespace fastgfn
