// Bookkeeping of one decoding step. No host synchronisation, static shapes: a graph may pass every row each step,
// because a row that is finished, full or out of range is left as it is (the CPU refuses it). Rows must be
// distinct.
#include "launch.h"

namespace fastgfn {
namespace {

// One thread handles one drawn token; one thread per token; writes tokens, lengths and finished of its row.
__global__ void decode_update_kernel(int64_t* tokens, int64_t tokens_stride_n, int64_t tokens_stride_t,
                                     int64_t* lengths, int64_t lengths_stride, bool* finished,
                                     int64_t finished_stride, int64_t num_rows, const int64_t* drawn,
                                     int64_t drawn_stride, const int64_t* rows, int64_t rows_stride,
                                     int64_t num_drawn, int64_t stop, int64_t max_length) {
  const int64_t a = thread_index();
  if (a >= num_drawn) return;
  const int64_t i = rows[a * rows_stride], token = drawn[a * drawn_stride];
  if (i < 0 || i >= num_rows) return;
  bool& done = finished[i * finished_stride];
  int64_t& length = lengths[i * lengths_stride];
  if (done || length < 0 || length >= max_length) return;
  if (token == stop) {
    done = true;
    return;
  }
  tokens[i * tokens_stride_n + length * tokens_stride_t] = token;
  length += 1;
  done = length == max_length;
}

}  // namespace
}  // namespace fastgfn

// Strides count elements; max_length is at most the width of tokens.
extern "C" void fastgfn_decode_update(int64_t* tokens, int64_t tokens_stride_n, int64_t tokens_stride_t,
                                      int64_t* lengths, int64_t lengths_stride, bool* finished,
                                      int64_t finished_stride, int64_t num_rows, const int64_t* drawn,
                                      int64_t drawn_stride, const int64_t* rows, int64_t rows_stride,
                                      int64_t num_drawn, int64_t stop, int64_t max_length,
                                      cudaStream_t stream) {
  fastgfn::launch_threads(fastgfn::decode_update_kernel, num_drawn, stream, tokens, tokens_stride_n,
                          tokens_stride_t, lengths, lengths_stride, finished, finished_stride, num_rows, drawn,
                          drawn_stride, rows, rows_stride, num_drawn, stop, max_length);
}
