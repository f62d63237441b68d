// Exact categorical draws by the Gumbel trick with counter-based noise, keyed by (seed, trajectory, position,
// token): a draw does not depend on the batch it is computed in, on row order or on threads.
#include "checks.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;

constexpr const char* kName = "gumbel_draw";
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kTile = 256;

struct Noise {
  uint32_t key_low, key_high, position, trajectory_low, trajectory_high;
};

Noise noise_for(int64_t seed, int64_t trajectory, int64_t position) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  return {low(seed), low(seed >> 32), low(position), low(trajectory), low(trajectory >> 32)};
}

// Philox4x32-10 (Salmon et al. 2011) at counter (token / 4, position, trajectory), token = 4 * block + word.
inline void philox(const Noise& noise, uint32_t block, uint32_t* words) {
  uint32_t c0 = block, c1 = noise.position, c2 = noise.trajectory_low, c3 = noise.trajectory_high;
  uint32_t k0 = noise.key_low, k1 = noise.key_high;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// log1p keeps the small exponentials apart, which are the ones that win.
inline double exponential(uint32_t word) { return -std::log1p(-(word + 0.5) * 0x1p-32); }

// One row at one temperature: everything that all draws from it share. The stop token stands apart.
struct Softmax {
  double max = -kInfinity;  // over the other tokens, of logit / temperature
  double stop = -kInfinity;
  double sum = 0;  // sum of exp(logit / temperature - max) over the other tokens
  int64_t argmax = -1;

  double log_normalizer(bool forbid_stop) const {
    const double others = max + std::log(sum);
    if (forbid_stop || stop == -kInfinity) return others;
    if (argmax < 0) return stop;
    return std::max(others, stop) + std::log1p(std::exp(-std::abs(others - stop)));
  }
};

// weights (V,) receives exp(logit / temperature - max), 0 at the stop token; may be null.
template <typename scalar_t>
Softmax softmax_of_row(const scalar_t* logits, int64_t vocab, int64_t stop, double temperature,
                       float* weights) {
  Softmax out;
  scalar_t best = -std::numeric_limits<scalar_t>::infinity();
  for (int64_t v = 0; v < vocab; ++v) {
    if (logits[v] > best && v != stop) best = logits[v], out.argmax = v;
  }
  out.max = best / temperature;
  if (stop >= 0) out.stop = logits[stop] / temperature;
  const scalar_t inverse = static_cast<scalar_t>(1.0 / temperature);
  const scalar_t shift = out.argmax < 0 ? scalar_t(0) : best;
  for (int64_t v = 0; v < vocab; ++v) {
    const scalar_t weight = v == stop ? scalar_t(0) : std::exp((logits[v] - shift) * inverse);
    out.sum += weight;
    if (weights) weights[v] = static_cast<float>(weight);
  }
  return out;
}

// argmax over v of logits[v] / temperature + gumbel(v). In units of the best other token, v wins only if
// uniform(v) <= exponential(v) < ratio * weight(v), where ratio belongs to the best candidate so far. The
// logs are taken for the few tokens that pass this test, which has a margin for its float32 rounding.
template <typename scalar_t>
int64_t draw(const scalar_t* logits, const float* weights, int64_t vocab, int64_t stop, const Softmax& row,
             double temperature, const Noise& noise, bool forbid_stop) {
  int64_t winner = -1;
  double best = -kInfinity;
  float threshold = 0;  // of word / 2 per unit of weight
  const auto consider = [&](int64_t v, uint32_t word) {
    const double score = logits[v] / temperature - std::log(exponential(word));
    if (score > best || (score == best && v < winner)) {
      winner = v;
      best = score;
      threshold = static_cast<float>(std::exp(row.max - best) * 0x1p31 * 1.001);
    }
  };
  std::array<uint32_t, kTile> words;
  const auto consider_alone = [&](int64_t v) {
    philox(noise, static_cast<uint32_t>(v / 4), words.data());
    consider(v, words[v % 4]);
  };
  if (stop >= 0 && !forbid_stop && row.stop > -kInfinity) consider_alone(stop);
  if (row.argmax < 0) return winner;
  consider_alone(row.argmax);
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t count = std::min(kTile, vocab - start);
    for (int64_t b = 0; b < (count + 3) / 4; ++b) {
      philox(noise, static_cast<uint32_t>(start / 4 + b), &words[4 * b]);
    }
    const float* weight = weights + start;
    int hits = 0;
    for (int64_t i = 0; i < count; ++i) {
      hits += static_cast<float>(static_cast<int32_t>(words[i] >> 1)) < threshold * weight[i];
    }
    for (int64_t i = 0; hits > 0 && i < count; ++i) {
      if (static_cast<float>(static_cast<int32_t>(words[i] >> 1)) < threshold * weight[i]) {
        consider(start + i, words[i]);
      }
    }
  }
  return winner;
}

void check_arguments(const Tensor& logits, const Tensor& rows, const Tensor& temperature,
                     const Tensor& trajectory, const Tensor& position, int64_t stop,
                     const Tensor& forbid_stop) {
  FASTGFN_CHECK_DIM(logits, 2, kName, "pass (R, V)");
  FASTGFN_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble, kName, "logits",
                "float32 or float64", c10::toString(logits.scalar_type()), "cast it to float32");
  FASTGFN_CHECK(logits.size(1) >= 1 && logits.stride(1) == 1, kName, "logits",
                "(R, V) with V >= 1 and contiguous rows", logits.strides(), "call .contiguous()");
  FASTGFN_CHECK_DTYPE(rows, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(temperature, at::kFloat, kName, "cast it to float32");
  FASTGFN_CHECK_DTYPE(trajectory, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(position, at::kLong, kName, "cast it to int64");
  FASTGFN_CHECK_DTYPE(forbid_stop, at::kBool, kName, "cast it to bool");
  for (const Tensor& t : {rows, temperature, trajectory, position, forbid_stop}) {
    FASTGFN_CHECK(t.dim() == 1 && t.sizes() == rows.sizes(), kName, "every per-draw argument",
                  c10::str("(", rows.numel(), ",)"), t.sizes(), "give one value per draw");
  }
  FASTGFN_CHECK(stop >= -1 && stop < logits.size(1), kName, "termination_token_id",
                c10::str("-1 or in [0, ", logits.size(1), ")"), stop, "pass an id of the vocabulary");
  const auto row = rows.accessor<int64_t, 1>();
  const auto tau = temperature.accessor<float, 1>();
  const auto pos = position.accessor<int64_t, 1>();
  for (int64_t k = 0; k < row.size(0); ++k) {
    FASTGFN_CHECK(row[k] >= 0 && row[k] < logits.size(0), kName, "rows",
                  c10::str("in [0, ", logits.size(0), ")"), row[k], "pass row numbers of logits");
    FASTGFN_CHECK(tau[k] > 0 && std::isfinite(tau[k]), kName, "temperature", "finite and > 0", tau[k],
                  "use argmax for greedy decoding");
    FASTGFN_CHECK(pos[k] >= 0 && pos[k] <= std::numeric_limits<uint32_t>::max(), kName, "position",
                  "in [0, 2^32)", pos[k], "count positions from 0");
  }
}

// Which softmaxes K draws need: each distinct (row, temperature), and each row at temperature 1.
struct Plan {
  std::vector<std::pair<int64_t, float>> keys;
  std::vector<int64_t> drawn, scored, buffer;
  int64_t num_buffers = 0;

  Plan(const Tensor& rows, const Tensor& temperature) {
    const auto row = rows.accessor<int64_t, 1>();
    const auto tau = temperature.accessor<float, 1>();
    std::map<std::pair<int64_t, float>, int64_t> index;
    const auto add = [&](int64_t r, float t) {
      const auto [entry, is_new] = index.try_emplace({r, t}, keys.size());
      if (is_new) keys.emplace_back(r, t), buffer.push_back(-1);
      return entry->second;
    };
    for (int64_t k = 0; k < row.size(0); ++k) {
      drawn.push_back(add(row[k], tau[k]));
      scored.push_back(add(row[k], 1.0f));
      if (buffer[drawn.back()] < 0) buffer[drawn.back()] = num_buffers++;
    }
  }
};

template <typename scalar_t>
struct Sampler {
  const Tensor& logits;
  int64_t stop;
  Plan plan;
  Tensor weights;
  std::vector<Softmax> softmax;

  Sampler(const Tensor& logits_in, const Tensor& rows, const Tensor& temperature, int64_t stop_token)
      : logits(logits_in), stop(stop_token), plan(rows, temperature), softmax(plan.keys.size()) {
    weights = at::empty({plan.num_buffers, logits.size(1)}, logits.options().dtype(at::kFloat));
    at::parallel_for(0, softmax.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        softmax[p] = softmax_of_row(row(plan.keys[p].first), logits.size(1), stop, plan.keys[p].second,
                                    plan.buffer[p] < 0 ? nullptr : buffer(p));
      }
    });
    for (size_t p = 0; p < softmax.size(); ++p) {
      const double z = softmax[p].log_normalizer(false);
      FASTGFN_CHECK(std::isfinite(z), kName, "logits", "free of nan and inf, with a token above -inf per row",
                    c10::str("log-normalizer ", z, " in row ", plan.keys[p].first),
                    "check the model's output");
    }
  }

  const scalar_t* row(int64_t r) const { return logits.const_data_ptr<scalar_t>() + r * logits.stride(0); }
  float* buffer(int64_t p) const { return weights.data_ptr<float>() + plan.buffer[p] * logits.size(1); }

  int64_t draw_one(int64_t k, const Noise& noise, bool forbid_stop) const {
    const int64_t p = plan.drawn[k];
    FASTGFN_CHECK(!forbid_stop || softmax[p].argmax >= 0, kName, "forbid_stop",
                  "false where only stop is left", c10::str("true at draw ", k),
                  "allow the stop token or widen the vocabulary mask");
    const auto [r, tau] = plan.keys[p];
    return draw(row(r), buffer(p), logits.size(1), stop, softmax[p], tau, noise, forbid_stop);
  }

  // Log-probability of `token` in the softmax p; of the forbidden or absent stop token: -inf.
  double log_prob(int64_t p, int64_t token, bool forbid_stop) const {
    if (token < 0 || (forbid_stop && token == stop)) return -kInfinity;
    const auto [r, tau] = plan.keys[p];
    return row(r)[token] / static_cast<double>(tau) - softmax[p].log_normalizer(forbid_stop);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_draw(const Tensor& logits, const Tensor& rows,
                                                       const Tensor& temperature, const Tensor& trajectory,
                                                       const Tensor& position, int64_t seed,
                                                       int64_t termination_token_id,
                                                       const Tensor& forbid_stop) {
  check_arguments(logits, rows, temperature, trajectory, position, termination_token_id, forbid_stop);
  const int64_t num_draws = rows.size(0);
  Tensor token = at::empty({num_draws}, rows.options());
  Tensor log_pf = at::empty({num_draws}, logits.options()), log_pterm = at::empty_like(log_pf);
  Tensor log_behavior = at::empty_like(log_pf);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), kName, [&] {
    const Sampler<scalar_t> sampler(logits, rows, temperature, termination_token_id);
    const auto traj = trajectory.accessor<int64_t, 1>();
    const auto pos = position.accessor<int64_t, 1>();
    const auto forbid = forbid_stop.accessor<bool, 1>();
    at::parallel_for(0, num_draws, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t v = sampler.draw_one(k, noise_for(seed, traj[k], pos[k]), forbid[k]);
        const auto log_prob = [&](int64_t p, int64_t t) {
          return static_cast<scalar_t>(sampler.log_prob(p, t, forbid[k]));
        };
        token.data_ptr<int64_t>()[k] = v;
        log_pf.data_ptr<scalar_t>()[k] = log_prob(sampler.plan.scored[k], v);
        log_pterm.data_ptr<scalar_t>()[k] = log_prob(sampler.plan.scored[k], termination_token_id);
        log_behavior.data_ptr<scalar_t>()[k] = log_prob(sampler.plan.drawn[k], v);
      }
    });
  });
  return {token, log_pf, log_pterm, log_behavior};
}

// The noise alone, so that tests can hold it against the published vectors.
Tensor philox4x32(const Tensor& counter, int64_t seed) {
  FASTGFN_CHECK_DTYPE(counter, at::kLong, "philox4x32", "cast it to int64");
  FASTGFN_CHECK(counter.dim() == 2 && counter.size(1) == 4, "philox4x32", "counter", "(K, 4)",
                counter.sizes(), "give four 32-bit words per block");
  Tensor out = at::empty(counter.sizes(), counter.options());
  const auto c = counter.accessor<int64_t, 2>();
  for (int64_t k = 0; k < counter.size(0); ++k) {
    uint32_t words[4];
    philox(noise_for(seed, c[k][2] | c[k][3] << 32, c[k][1]), static_cast<uint32_t>(c[k][0]), words);
    for (int i = 0; i < 4; ++i) out.data_ptr<int64_t>()[4 * k + i] = words[i];
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("gumbel_draw", &gumbel_draw);
  m.impl("philox4x32", &philox4x32);
}

}  // namespace fastgfn
