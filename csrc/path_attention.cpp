// Attention of decoded tokens over their paths in a pool of keys and values, on the CPU. A row's score with every
// node of its path is a dot product of float32 (float64 for such pools); 16-bit keys are widened once per node and
// serve all heads of their group. Equation: fastgfn/reference/attention.py.
#include "checks.h"
#include "vector_math.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;

constexpr const char* kName = "path_attention";
constexpr int64_t kNodes = 128;  // of a block, whose keys or values of one head are widened at a time

// 16 numbers in a register, or in several smaller ones.
typedef float lanes_t __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16;

FASTGFN_CLONES void widen(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

// out[n] = q . keys[n] for `count` keys of `width`.
FASTGFN_CLONES void dots(const float* q, const float* keys, int64_t count, int64_t width, float* out) {
  for (int64_t n = 0; n < count; ++n, keys += width) {
    lanes_t sums = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      sums += *reinterpret_cast<const lanes_t*>(q + i) * *reinterpret_cast<const lanes_t*>(keys + i);
    }
    float rest = 0;
    for (; i < width; ++i) rest += q[i] * keys[i];
    float lane[kLanes];
    std::memcpy(lane, &sums, sizeof(lane));
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    out[n] = lane[0] + rest;
  }
}

void dots(const double* q, const double* keys, int64_t count, int64_t width, double* out) {
  for (int64_t n = 0; n < count; ++n) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += q[i] * keys[n * width + i];
    out[n] = sum;
  }
}

// out += sum of weight[n] * values[n] over `count` values of `width`.
FASTGFN_CLONES void add_scaled(const float* weight, const float* values, int64_t count, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    lanes_t* at = reinterpret_cast<lanes_t*>(out + i);
    lanes_t low = at[0], high = at[1];
    for (int64_t n = 0; n < count; ++n) {
      const lanes_t* value = reinterpret_cast<const lanes_t*>(values + n * width + i);
      low += weight[n] * value[0];
      high += weight[n] * value[1];
    }
    at[0] = low, at[1] = high;
  }
  for (; i < width; ++i) {
    for (int64_t n = 0; n < count; ++n) out[i] += weight[n] * values[n * width + i];
  }
}

void add_scaled(const double* weight, const double* values, int64_t count, int64_t width, double* out) {
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t i = 0; i < width; ++i) out[i] += weight[n] * values[n * width + i];
  }
}

// exp(scores - peak) over their sum.
void softmax(float* scores, int64_t count) {
  const double sum = exp_and_sum(scores, count, max_of(scores, count));
  multiply(scores, count, static_cast<float>(1 / sum));
}

void softmax(double* scores, int64_t count) {
  const double peak = *std::max_element(scores, scores + count);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - peak);
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
struct Rows {
  const scalar_t *query, *keys, *values;  // contiguous
  const int32_t* path;
  const int64_t* length;
  int64_t path_stride, heads, kv_heads, width;
  compute_t<scalar_t> scale, softcap;  // softcap 0: none
  int64_t window;
  scalar_t* out;
};

// Rows `nodes` of one key head of a pool, in the compute type.
template <typename scalar_t, typename real>
void gather(const scalar_t* pool, const int32_t* nodes, int64_t count, int64_t stride, int64_t width, real* out) {
  for (int64_t n = 0; n < count; ++n) {
    const scalar_t* at = pool + nodes[n] * stride;
    if constexpr (std::is_same_v<scalar_t, real>) {
      std::memcpy(out + n * width, at, width * sizeof(real));
    } else if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      widen(reinterpret_cast<const uint16_t*>(at), width, out + n * width);
    } else {
      for (int64_t i = 0; i < width; ++i) out[n * width + i] = static_cast<real>(at[i]);
    }
  }
}

template <typename scalar_t>
void attend(const Rows<scalar_t>& rows, int64_t begin, int64_t end) {
  using real = compute_t<scalar_t>;
  const int64_t repeat = rows.heads / rows.kv_heads, width = rows.width, stride = rows.kv_heads * width;
  std::vector<real> q(repeat * width), out(repeat * width), block(kNodes * width), scores;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = std::max<int64_t>(0, rows.length[r] - rows.window), count = rows.length[r] - first;
    const int32_t* nodes = rows.path + r * rows.path_stride + first;
    scores.resize(repeat * count);
    for (int64_t g = 0; g < rows.kv_heads; ++g) {
      const int64_t at_row = (r * rows.heads + g * repeat) * width;
      for (int64_t i = 0; i < repeat * width; ++i) q[i] = static_cast<real>(rows.query[at_row + i]) * rows.scale;
      for (int64_t n = 0; n < count; n += kNodes) {
        const int64_t some = std::min(kNodes, count - n);
        gather(rows.keys + g * width, nodes + n, some, stride, width, block.data());
        for (int64_t j = 0; j < repeat; ++j) dots(&q[j * width], block.data(), some, width, &scores[j * count + n]);
      }
      if (rows.softcap != 0) {
        for (real& s : scores) s = rows.softcap * std::tanh(s / rows.softcap);
      }
      for (int64_t j = 0; j < repeat; ++j) softmax(&scores[j * count], count);
      std::fill(out.begin(), out.end(), real(0));
      for (int64_t n = 0; n < count; n += kNodes) {
        const int64_t some = std::min(kNodes, count - n);
        gather(rows.values + g * width, nodes + n, some, stride, width, block.data());
        for (int64_t j = 0; j < repeat; ++j) {
          add_scaled(&scores[j * count + n], block.data(), some, width, &out[j * width]);
        }
      }
      for (int64_t i = 0; i < repeat * width; ++i) rows.out[at_row + i] = static_cast<scalar_t>(out[i]);
    }
  }
}

void check_arguments(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& path,
                     const Tensor& length, const std::optional<Tensor>& tiles, const std::optional<Tensor>& depth) {
  FASTGFN_CHECK_DIM(query, 3, kName, "pass (n, H, d)");
  FASTGFN_CHECK_DIM(keys, 3, kName, "pass (C, Hkv, d)");
  FASTGFN_CHECK_DIM(path, 2, kName, "pass (n, W)");
  FASTGFN_CHECK(keys.sizes() == values.sizes() && keys.size(2) == query.size(2) && keys.size(1) > 0 &&
                    query.size(1) % keys.size(1) == 0, kName,
                "keys and values", "(C, Hkv, d) with Hkv dividing H", keys.sizes(), "pass one layer's pool");
  FASTGFN_CHECK(keys.is_contiguous() && values.is_contiguous(), kName, "keys and values", "contiguous",
                keys.strides(), "pass the pool as it was allocated");
  FASTGFN_CHECK(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(), kName,
                "keys and values", query.scalar_type(), keys.scalar_type(), "cast one of them");
  FASTGFN_CHECK_DTYPE(path, at::kInt, kName, "cast it to int32");
  FASTGFN_CHECK_DTYPE(length, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK(path.size(0) == query.size(0) && length.dim() == 1 && length.size(0) == query.size(0), kName,
                "path and length", "one row per query", path.sizes(), "pass (n, W) and (n,)");
  FASTGFN_CHECK(tiles.has_value() == depth.has_value(), kName, "tiles and depth", "both or neither", "one",
                "pass SharedPrompts");
  if (!tiles) return;
  FASTGFN_CHECK(tiles->scalar_type() == at::kInt && tiles->dim() == 2, kName, "tiles", "(T, R) int32",
                tiles->sizes(), "pass SharedPrompts");
  FASTGFN_CHECK(depth->scalar_type() == at::kLong && depth->sizes() == length.sizes(), kName, "depth", "(n,) int64",
                depth->sizes(), "pass SharedPrompts");
}

// Tiles (T, R): rows that begin with the same nodes, as many as `depth` (n,) says, then -1. They tell a GPU what to
// read once; a row reads it from a cache here.
void check_tiles(const Tensor& tiles_in, const Tensor& depth_in, const Tensor& path, const Tensor& length) {
  const Tensor tiles = tiles_in.contiguous(), depth = depth_in.contiguous();
  const int64_t n = path.size(0), width = path.size(1), columns = tiles.size(1);
  const int64_t *depths = depth.const_data_ptr<int64_t>(), *lengths = length.const_data_ptr<int64_t>();
  const int32_t *rows = tiles.const_data_ptr<int32_t>(), *nodes = path.const_data_ptr<int32_t>();
  std::vector<bool> is_in_tile(n);
  for (int64_t t = 0; t < tiles.size(0); ++t) {
    const int64_t first = columns > 0 ? rows[t * columns] : -1;
    bool is_over = false;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t row = rows[t * columns + c];
      is_over = is_over || row == -1;
      FASTGFN_CHECK(is_over ? row == -1 : row >= 0 && row < n && !is_in_tile[row], kName, "tiles",
                    "rows, each once, then -1", row, "list every row in one tile at most");
      if (is_over) continue;
      is_in_tile[row] = true;
      FASTGFN_CHECK(depths[row] >= 1 && depths[row] <= lengths[row] && depths[row] == depths[first], kName, "depth",
                    "in [1, length], one number for the rows of a tile", depths[row], "count the shared nodes");
      FASTGFN_CHECK(std::equal(nodes + row * width, nodes + row * width + depths[row], nodes + first * width), kName,
                    "tiles", "rows whose first depth nodes are the same", row, "give other prompts other tiles");
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    FASTGFN_CHECK(is_in_tile[r] || depths[r] == 0, kName, "depth", "0 for a row of no tile", depths[r],
                  "list the row in a tile");
  }
}

// (n, H, d) from queries (n, H, d), pools (C, Hkv, d), path (n, W) and length (n,) in [1, W].
Tensor path_attention(const Tensor& query_in, const Tensor& keys, const Tensor& values, const Tensor& path_in,
                      const Tensor& length_in, double scale, double softcap, int64_t window,
                      const std::optional<Tensor>& tiles, const std::optional<Tensor>& depth) {
  check_arguments(query_in, keys, values, path_in, length_in, tiles, depth);
  const Tensor query = query_in.contiguous(), path = path_in.contiguous(), length = length_in.contiguous();
  const int64_t n = query.size(0), capacity = keys.size(0);
  const int32_t* nodes = path.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < n; ++r) {
    const int64_t count = length.const_data_ptr<int64_t>()[r];
    FASTGFN_CHECK(count >= 1 && count <= path.size(1), kName, "length", "in [1, W]", count, "count the row's nodes");
    for (int64_t i = 0; i < count; ++i) {
      const int32_t node = nodes[r * path.size(1) + i];
      FASTGFN_CHECK(node >= 0 && node < capacity, kName, "path", "nodes of the pool", node, "pass their numbers");
    }
  }
  if (tiles) check_tiles(*tiles, *depth, path, length);
  Tensor out = at::empty_like(query);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), kName, [&] {
    const Rows<scalar_t> rows{query.const_data_ptr<scalar_t>(), keys.const_data_ptr<scalar_t>(),
                              values.const_data_ptr<scalar_t>(), nodes, length.const_data_ptr<int64_t>(),
                              path.size(1), query.size(1), keys.size(1), query.size(2),
                              static_cast<compute_t<scalar_t>>(scale), static_cast<compute_t<scalar_t>>(softcap),
                              window > 0 ? window : path.size(1), out.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { attend(rows, begin, end); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) { m.impl("path_attention", &path_attention); }

}  // namespace fastgfn
