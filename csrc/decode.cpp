// Bookkeeping of one decoding step: append the drawn tokens, mark the rows that stop.
#include "checks.h"

#include <torch/library.h>

#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;

constexpr const char* kName = "decode_update_";

// All rows are checked before the first write, so a refusal leaves the state as it was.
void decode_update(const Tensor& tokens, const Tensor& lengths, const Tensor& finished, const Tensor& drawn,
                   const Tensor& rows, int64_t termination_token_id, int64_t max_length) {
  check_decode_update(tokens, lengths, finished, drawn, rows, max_length);
  auto token = tokens.accessor<int64_t, 2>();
  auto length = lengths.accessor<int64_t, 1>();
  auto done = finished.accessor<bool, 1>();
  const auto draw = drawn.accessor<int64_t, 1>();
  const auto row = rows.accessor<int64_t, 1>();
  std::vector<bool> seen(tokens.size(0), false);
  for (int64_t a = 0; a < draw.size(0); ++a) {
    const int64_t i = row[a];
    FASTGFN_CHECK(i >= 0 && i < tokens.size(0) && !seen[i], kName, "rows",
                  c10::str("distinct and in [0, ", tokens.size(0), ")"), i, "pass each active row once");
    FASTGFN_CHECK(!done[i], kName, "rows", "unfinished", c10::str("finished row ", i), "drop finished rows");
    FASTGFN_CHECK(length[i] >= 0 && length[i] < max_length, kName, "lengths",
                  c10::str("in [0, ", max_length, ")"), length[i], "mark full rows as finished");
    seen[i] = true;
  }
  for (int64_t a = 0; a < draw.size(0); ++a) {
    const int64_t i = row[a];
    if (draw[a] == termination_token_id) {
      done[i] = true;
    } else {
      token[i][length[i]] = draw[a];
      done[i] = ++length[i] == max_length;
    }
  }
}

}  // namespace

void check_decode_update(const Tensor& tokens, const Tensor& lengths, const Tensor& finished,
                         const Tensor& drawn, const Tensor& rows, int64_t max_length) {
  FASTGFN_CHECK_DTYPE(tokens, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(lengths, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(finished, at::kBool, kName, "cast it to bool");
  FASTGFN_CHECK_DTYPE(drawn, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(rows, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DIM(tokens, 2, kName, "pass (N, max_length)");
  for (const Tensor& t : {lengths, finished}) {
    FASTGFN_CHECK(t.dim() == 1 && t.size(0) == tokens.size(0), kName, "lengths and finished",
                  c10::str("(", tokens.size(0), ",)"), t.sizes(), "give one value per row of tokens");
  }
  FASTGFN_CHECK(drawn.dim() == 1 && rows.sizes() == drawn.sizes(), kName, "rows", drawn.sizes(), rows.sizes(),
                "give one row per drawn token");
  FASTGFN_CHECK(max_length >= 1 && max_length <= tokens.size(1), kName, "max_length",
                c10::str("in [1, ", tokens.size(1), "]"), max_length, "widen tokens");
}

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("decode_update_", &decode_update);
}

}  // namespace fastgfn
