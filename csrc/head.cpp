// The language-model head without its (R, V) logits, in bfloat16 on CPU. The vocabulary is cut into tiles; per
// tile and block of rows: logits by oneDNN's block product with float32 sums; then, of all columns but the entries,
// running maximum and sum, unnormalised probabilities, and their product with the tile of the weight. The entries
// stand apart: next to a confident token's 1 the sums would lose the rest, which is its 1 - p. Equations:
// fastgfn/reference/linear_log_probs.py.
#include "checks.h"
#include "vector_math.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;
using half_t = at::BFloat16;

constexpr const char* kName = "head_forward";
constexpr int64_t kRows = 64;   // of a block: its logits of one tile are 128 KB
constexpr int64_t kTile = 512;  // columns of a tile
// Columns of a panel, as which both copies of a tile are packed: in rows as wide as the tile, or as the model, those
// of one step of a product lie a power of two apart and fall on the same few sets of the cache
// (bench/NOTES.md has the times).
constexpr int64_t kPanel = 64;

// What turns a product into a logit, and a logit into what the softmax reads.
struct Transform {
  float scale;    // logit_scale / (temperature, or softcap)
  float softcap;  // softcap / temperature, or 0 without one
  const float* bias;        // (V,) or null: added to the scaled product
  const float* logit_bias;  // (V,) or null: added after the softcap, over temperature
};

struct Entries {
  // Of one tile, ordered by row: entry e reads column[e] of row[e] and belongs at slot[e] of the outputs.
  std::vector<int64_t> row, column, slot;
};

// A panel (depth / 2, kPanel, 2) of x @ weight^T from `rows` rows of the weight, in words of two values.
void transpose_words(const uint32_t* in, int64_t stride, int64_t rows, int64_t depth, uint32_t* out) {
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < depth; c += kBlock) {
    for (int64_t r = 0; r < kPanel; r += kBlock) {
      for (int64_t j = c; j < std::min(depth, c + kBlock); ++j) {
        for (int64_t i = r; i < r + kBlock; ++i) out[j * kPanel + i] = i < rows ? in[i * stride + j] : 0u;
      }
    }
  }
}

// Two rows side by side: out[2 i] = even[i], out[2 i + 1] = odd[i], or 0 without an odd row.
void interleave(const half_t* even, const half_t* odd, int64_t count, half_t* out) {
  for (int64_t i = 0; i < count; ++i) out[2 * i] = even[i];
  for (int64_t i = 0; i < count; ++i) out[2 * i + 1] = odd ? odd[i] : half_t(0);
}

class Head {
 public:
  Head(const Tensor& hidden, const Tensor& weight, const Transform& transform, bool want_grad)
      : hidden_(hidden), weight_(weight), transform_(transform), want_grad_(want_grad) {
    const auto floats = hidden.options().dtype(at::kFloat);
    peak = at::full({hidden.size(0)}, std::numeric_limits<float>::lowest(), floats);
    total = at::zeros({hidden.size(0)}, hidden.options().dtype(at::kDouble));
    row_grad = want_grad ? at::zeros(hidden.sizes(), floats) : at::empty({0}, floats);
    packed_ = at::empty({hidden.size(1) * kTile}, hidden.options());
    if (want_grad) pairs_ = at::empty({panels(hidden.size(1)) * kPanel * kTile}, hidden.options());
  }

  void tile(int64_t start, const Entries& entries, float* logits, float* slope) {
    const int64_t width = std::min(kTile, weight_.size(0) - start);
    pack(start, width);
    const int64_t blocks = (hidden_.size(0) + kRows - 1) / kRows;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> z(kRows * kTile), s(transform_.softcap != 0 ? kRows * kTile : 0);
      std::vector<half_t> p(want_grad_ ? kRows * kTile : 0);
      for (int64_t b = begin; b < end; ++b) block(b * kRows, start, width, entries, logits, slope, z, s, p);
      at::native::cpublas::brgemm_release();
    });
  }

  Tensor peak, total, row_grad;  // of all columns but the entries

 private:
  static int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

  // packed_: panels of the tile's columns, (depth / 2, kPanel, 2) each; pairs_: panels of the depth, (kTile / 2,
  // kPanel, 2) each.
  void pack(int64_t start, int64_t width) {
    const int64_t depth = hidden_.size(1), stride = weight_.stride(0);
    const half_t* w = weight_.const_data_ptr<half_t>() + start * stride;
    at::parallel_for(0, panels(width), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        transpose_words(reinterpret_cast<const uint32_t*>(w + p * kPanel * stride), stride / 2,
                        std::min(kPanel, width - p * kPanel), depth / 2,
                        reinterpret_cast<uint32_t*>(packed_.data_ptr<half_t>() + p * kPanel * depth));
      }
    });
    if (!pairs_.defined()) return;
    at::parallel_for(0, (width + 1) / 2, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const half_t* even = w + 2 * k * stride;
        const half_t* odd = 2 * k + 1 < width ? even + stride : nullptr;
        for (int64_t first = 0; first < depth; first += kPanel) {
          interleave(even + first, odd ? odd + first : nullptr, std::min(kPanel, depth - first),
                     pairs_.data_ptr<half_t>() + first * kTile + 2 * k * kPanel);
        }
      }
    });
  }

  void block(int64_t row, int64_t start, int64_t width, const Entries& entries, float* logits, float* slope,
             std::vector<float>& z, std::vector<float>& s, std::vector<half_t>& p) {
    const int64_t depth = hidden_.size(1), rows = std::min(kRows, hidden_.size(0) - row);
    const half_t* x = hidden_.const_data_ptr<half_t>() + row * hidden_.stride(0);
    for (int64_t first = 0; first < width; first += kPanel) {
      at::native::cpublas::brgemm(rows, kPanel, depth, hidden_.stride(0), kPanel, kTile, false, x,
                                  packed_.const_data_ptr<half_t>() + first * depth, &z[first]);
    }
    const float* bias = transform_.bias ? transform_.bias + start : nullptr;
    const float* logit_bias = transform_.logit_bias ? transform_.logit_bias + start : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      scale_logits(&z[i * kTile], width, transform_.scale, bias, logit_bias, transform_.softcap,
                   s.empty() ? nullptr : &s[i * kTile]);
    }
    const auto first = std::lower_bound(entries.row.begin(), entries.row.end(), row) - entries.row.begin();
    const auto last = std::lower_bound(entries.row.begin(), entries.row.end(), row + rows) - entries.row.begin();
    for (auto e = first; e < last; ++e) {
      const int64_t at = (entries.row[e] - row) * kTile + entries.column[e] - start;
      logits[entries.slot[e]] = z[at];
      slope[entries.slot[e]] = s.empty() ? 1.0f : s[at];
      z[at] = -std::numeric_limits<float>::infinity();
    }
    float* peaks = peak.data_ptr<float>() + row;
    double* totals = total.data_ptr<double>() + row;
    for (int64_t i = 0; i < rows; ++i) {
      const float higher = std::max(peaks[i], max_of(&z[i * kTile], width));
      const float shrink = std::exp(peaks[i] - higher);
      totals[i] = totals[i] * shrink + exp_and_sum(&z[i * kTile], width, higher);
      peaks[i] = higher;
      if (want_grad_ && shrink != 1.0f) multiply(row_grad_of(row + i), depth, shrink);
    }
    if (!want_grad_) return;
    for (int64_t i = 0; i < rows && !s.empty(); ++i) multiply_by(&z[i * kTile], &s[i * kTile], width);
    add_product(row, rows, start, width, z, p);
  }

  float* row_grad_of(int64_t row) { return row_grad.data_ptr<float>() + row * hidden_.size(1); }

  // row_grad[rows] += z @ weight[tile]
  void add_product(int64_t row, int64_t rows, int64_t start, int64_t width, const std::vector<float>& z,
                   std::vector<half_t>& p) {
    const int64_t depth = hidden_.size(1), even = (width + 1) / 2 * 2;
    for (int64_t i = 0; i < rows; ++i) {
      round_to(&z[i * kTile], width, &p[i * kTile]);
      if (even > width) p[i * kTile + width] = half_t(0);
    }
    for (int64_t first = 0; first < depth; first += kPanel) {
      at::native::cpublas::brgemm(rows, std::min(kPanel, depth - first), even, kTile, kPanel, depth, true, p.data(),
                                  pairs_.const_data_ptr<half_t>() + first * kTile, row_grad_of(row) + first);
    }
  }

  const Tensor& hidden_;
  const Tensor& weight_;
  const Transform transform_;
  const bool want_grad_;
  Tensor packed_, pairs_;
};

// The entries of every tile, by row within it; `columns` is sorted.
std::vector<Entries> entries_by_tile(const Tensor& rows, const Tensor& columns, int64_t vocab) {
  std::vector<Entries> tiles((vocab + kTile - 1) / kTile);
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* column = columns.const_data_ptr<int64_t>();
  std::vector<int64_t> order(rows.numel());
  for (size_t e = 0; e < order.size(); ++e) order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] < row[b]; });
  for (const int64_t e : order) {
    Entries& tile = tiles[column[e] / kTile];
    tile.row.push_back(row[e]), tile.column.push_back(column[e]), tile.slot.push_back(e);
  }
  return tiles;
}

void check_arguments(const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& columns) {
  FASTGFN_CHECK_DIM(hidden, 2, kName, "pass (R, D)");
  FASTGFN_CHECK_DIM(weight, 2, kName, "pass (V, D)");
  FASTGFN_CHECK_DTYPE(hidden, at::kBFloat16, kName, "cast it to bfloat16");
  FASTGFN_CHECK_DTYPE(weight, at::kBFloat16, kName, "cast it to bfloat16");
  FASTGFN_CHECK(hidden.size(1) == weight.size(1) && hidden.size(1) % 2 == 0 && weight.size(0) >= 1, kName,
                "hidden and weight", "(R, D) and (V, D) with even D and V >= 1", weight.sizes(), "pad D");
  FASTGFN_CHECK(hidden.stride(1) == 1 && weight.stride(1) == 1 && weight.stride(0) % 2 == 0, kName,
                "hidden and weight", "of contiguous rows", weight.strides(), "call .contiguous()");
  FASTGFN_CHECK_DTYPE(rows, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(columns, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK(rows.dim() == 1 && rows.sizes() == columns.sizes() && rows.is_contiguous() &&
                    columns.is_contiguous(), kName,
                "rows and columns", "contiguous (E,)", rows.sizes(), "pass the list of distinct entries");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* column = columns.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < rows.numel(); ++e) {
    FASTGFN_CHECK(row[e] >= 0 && row[e] < hidden.size(0), kName, "rows", "in [0, R)", row[e], "pass row numbers");
    FASTGFN_CHECK(column[e] >= 0 && column[e] < weight.size(0), kName, "columns", "in [0, V)", column[e],
                  "pass token ids");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_forward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& logit_bias, const Tensor& rows, const Tensor& columns, double scale,
    double softcap, bool want_grad) {
  check_arguments(hidden, weight, rows, columns);
  for (const auto& vector : {bias, logit_bias}) {
    FASTGFN_CHECK(!vector || (vector->scalar_type() == at::kFloat && vector->dim() == 1 &&
                              vector->size(0) == weight.size(0) && vector->is_contiguous()),
                  kName, "bias and logit_bias", "contiguous float32 (V,)", "another", "cast it");
  }
  const Transform transform{static_cast<float>(scale), static_cast<float>(softcap),
                            bias ? bias->const_data_ptr<float>() : nullptr,
                            logit_bias ? logit_bias->const_data_ptr<float>() : nullptr};
  const auto floats = hidden.options().dtype(at::kFloat);
  Tensor logits = at::empty(rows.sizes(), floats), slope = at::empty(rows.sizes(), floats);
  Head head(hidden, weight, transform, want_grad);
  const std::vector<Entries> tiles = entries_by_tile(rows, columns, weight.size(0));
  for (size_t t = 0; t < tiles.size(); ++t) {
    head.tile(t * kTile, tiles[t], logits.data_ptr<float>(), slope.data_ptr<float>());
  }
  return std::make_tuple(logits, slope, head.peak, head.total, head.row_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) { m.impl("head_forward", &head_forward); }

}  // namespace fastgfn
