// The token forest: building it, reading paths out of it, gathering node values.
#include "checks.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace fastgfn {
namespace {

using at::Tensor;
using Tree = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int8_t kPrompt = 0;
constexpr int8_t kLastRole = 3;
constexpr int64_t kGrain = 4096;

// Nodes in order of creation, so parents precede children and siblings stand in order of first appearance.
class Trie {
 public:
  explicit Trie(int64_t max_nodes, int64_t max_hashed) {
    size_t slots = 16;
    while (slots < 2 * static_cast<size_t>(max_hashed)) slots *= 2;
    table_.assign(slots, -1);
    for (auto* column : {&parent, &count, &group}) column->reserve(max_nodes);
    token.reserve(max_nodes);
    role.reserve(max_nodes);
  }

  int32_t append(int32_t parent_node, int64_t token_id, int8_t role_id, int32_t group_id) {
    parent.push_back(parent_node);
    token.push_back(token_id);
    role.push_back(role_id);
    group.push_back(group_id);
    count.push_back(0);
    return static_cast<int32_t>(token.size()) - 1;
  }

  int32_t child(int32_t parent_node, int64_t token_id, int8_t role_id) {
    const size_t mask = table_.size() - 1;
    size_t slot = hash(parent_node, token_id, role_id) & mask;
    for (; table_[slot] >= 0; slot = (slot + 1) & mask) {
      const int32_t node = table_[slot];
      if (parent[node] == parent_node && token[node] == token_id && role[node] == role_id) return node;
    }
    return table_[slot] = append(parent_node, token_id, role_id, group[parent_node]);
  }

  std::vector<int32_t> parent, count, group;
  std::vector<int64_t> token;
  std::vector<int8_t> role;

 private:
  static uint64_t hash(int32_t parent_node, int64_t token_id, int8_t role_id) {
    uint64_t x = (static_cast<uint64_t>(parent_node) << 2 | static_cast<uint64_t>(role_id)) *
            0x9E3779B97F4A7C15ULL ^ static_cast<uint64_t>(token_id);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ x >> 27) * 0x94D049BB133111EBULL;
    return x ^ x >> 31;
  }

  std::vector<int32_t> table_;
};

void check_offsets(const Tensor& offsets, int64_t total, const char* name) {
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  const int64_t n = offsets.size(0);
  bool ok = n >= 1 && o[0] == 0 && o[n - 1] == total;
  for (int64_t i = 1; ok && i < n; ++i) ok = o[i] >= o[i - 1];
  FASTGFN_CHECK(ok, "build_tree", name, c10::str("non-decreasing from 0 to the number of tokens, ", total),
                offsets, "pass the cumulative lengths");
}

void check_build_arguments(const Tensor& prompt_tokens, const Tensor& prompt_offsets, const Tensor& tokens,
                           const Tensor& roles, const Tensor& offsets, const Tensor& group) {
  for (const Tensor& t : {prompt_tokens, prompt_offsets, tokens, offsets, group}) {
    FASTGFN_CHECK(t.scalar_type() == at::kLong, "build_tree", "every argument but roles", "int64",
                  c10::toString(t.scalar_type()), "cast it to int64");
  }
  FASTGFN_CHECK_DTYPE(roles, at::kChar, "build_tree", "cast it to int8");
  for (const Tensor& t : {prompt_tokens, prompt_offsets, tokens, roles, offsets, group}) {
    FASTGFN_CHECK(t.dim() == 1 && t.is_contiguous(), "build_tree", "every argument",
                  "contiguous and 1-dimensional", t.sizes(), "flatten it");
  }
  FASTGFN_CHECK(roles.size(0) == tokens.size(0), "build_tree", "roles", tokens.sizes(), roles.sizes(),
                "give one role per token");
  FASTGFN_CHECK(group.size(0) + 1 == offsets.size(0), "build_tree", "offsets",
                c10::str("of length ", group.size(0) + 1), offsets.sizes(),
                "give one more offset than sequences");
  check_offsets(prompt_offsets, prompt_tokens.size(0), "prompt_offsets");
  check_offsets(offsets, tokens.size(0), "offsets");
  const int64_t total = prompt_tokens.size(0) + tokens.size(0);
  FASTGFN_CHECK(total < std::numeric_limits<int32_t>::max(), "build_tree", "the batch", "below 2^31 tokens",
                total, "split the batch");
}

// A node's place is its parent's place, plus one, plus the sizes of its elder siblings' subtrees.
Tree preorder(const Trie& trie, const std::vector<int32_t>& trie_leaf) {
  const int64_t num_nodes = trie.token.size();
  std::vector<int32_t> size(num_nodes, 1), place(num_nodes), next(num_nodes);
  for (int64_t i = num_nodes - 1; i >= 0; --i) {
    if (trie.parent[i] >= 0) size[trie.parent[i]] += size[i];
  }
  const auto options = at::TensorOptions().device(at::kCPU);
  Tensor tokens = at::empty({num_nodes}, options.dtype(at::kLong)), position = at::empty_like(tokens);
  Tensor end = at::empty({num_nodes}, options.dtype(at::kInt)), parent = at::empty_like(end);
  Tensor count = at::empty_like(end), group = at::empty_like(end);
  Tensor role = at::empty({num_nodes}, options.dtype(at::kChar));
  Tensor leaf = at::empty({static_cast<int64_t>(trie_leaf.size())}, options.dtype(at::kLong));
  int64_t* position_out = position.data_ptr<int64_t>();
  int32_t next_root = 0;
  for (int64_t i = 0; i < num_nodes; ++i) {
    const int32_t p = trie.parent[i];
    int32_t& cursor = p < 0 ? next_root : next[p];
    const int32_t j = place[i] = cursor;
    cursor += size[i];
    next[i] = j + 1;
    tokens.data_ptr<int64_t>()[j] = trie.token[i];
    position_out[j] = p < 0 ? 0 : position_out[place[p]] + 1;
    end.data_ptr<int32_t>()[j] = j + size[i];
    parent.data_ptr<int32_t>()[j] = p < 0 ? -1 : place[p];
    count.data_ptr<int32_t>()[j] = trie.count[i];
    group.data_ptr<int32_t>()[j] = trie.group[i];
    role.data_ptr<int8_t>()[j] = trie.role[i];
  }
  for (size_t n = 0; n < trie_leaf.size(); ++n) leaf.data_ptr<int64_t>()[n] = place[trie_leaf[n]];
  return {tokens, position, end, parent, count, group, role, leaf};
}

Tree build_tree(const Tensor& prompt_tokens, const Tensor& prompt_offsets, const Tensor& tokens,
                const Tensor& roles, const Tensor& offsets, const Tensor& group) {
  check_build_arguments(prompt_tokens, prompt_offsets, tokens, roles, offsets, group);
  const int64_t num_groups = prompt_offsets.size(0) - 1, num_sequences = group.size(0);
  const int64_t* prompt = prompt_tokens.const_data_ptr<int64_t>();
  const int64_t* prompt_offset = prompt_offsets.const_data_ptr<int64_t>();
  Trie trie(prompt_tokens.size(0) + tokens.size(0), tokens.size(0));
  std::vector<int32_t> last_prompt(num_groups), group_count(num_groups, 0), leaf(num_sequences);
  for (int64_t g = 0; g < num_groups; ++g) {
    FASTGFN_CHECK(prompt_offset[g] < prompt_offset[g + 1], "build_tree", "prompts", "non-empty",
                  c10::str("an empty prompt ", g), "start it with the model's begin-of-text token");
    int32_t node = -1;
    for (int64_t i = prompt_offset[g]; i < prompt_offset[g + 1]; ++i) {
      node = trie.append(node, prompt[i], kPrompt, static_cast<int32_t>(g));
    }
    last_prompt[g] = node;
  }
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int8_t* role = roles.const_data_ptr<int8_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t* sequence_group = group.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < num_sequences; ++n) {
    const int64_t g = sequence_group[n];
    FASTGFN_CHECK(g >= 0 && g < num_groups, "build_tree", "group", c10::str("in [0, ", num_groups, ")"), g,
                  "number the prompts from 0");
    ++group_count[g];
    int32_t node = last_prompt[g];
    for (int64_t i = offset[n]; i < offset[n + 1]; ++i) {
      FASTGFN_CHECK(role[i] > kPrompt && role[i] <= kLastRole, "build_tree", "roles",
                    "action (1), observation (2) or suffix (3)", static_cast<int>(role[i]),
                    "pass prompt tokens as prompts");
      node = trie.child(node, token[i], role[i]);
      ++trie.count[node];
    }
    leaf[n] = node;
  }
  for (int64_t i = 0; i < prompt_tokens.size(0); ++i) trie.count[i] = group_count[trie.group[i]];
  return preorder(trie, leaf);
}

Tensor path_nodes(const Tensor& parent, const Tensor& leaf, const Tensor& num_nodes, int64_t width) {
  check_path_nodes(parent, leaf, num_nodes, width);
  Tensor out = at::full({leaf.size(0), width}, -1, leaf.options());
  const auto parent_of = parent.accessor<int32_t, 1>();
  const auto leaf_of = leaf.accessor<int64_t, 1>();
  const auto wanted = num_nodes.accessor<int64_t, 1>();
  int64_t* rows = out.data_ptr<int64_t>();
  at::parallel_for(0, leaf.size(0), 1 + kGrain / (width + 1), [&](int64_t begin, int64_t stop) {
    for (int64_t n = begin; n < stop; ++n) {
      FASTGFN_CHECK(wanted[n] >= 0 && wanted[n] <= width, "path_nodes", "num_nodes",
                    c10::str("in [0, width = ", width, "]"), wanted[n], "widen the output");
      int64_t node = leaf_of[n];
      for (int64_t k = wanted[n] - 1; k >= 0; --k) {
        FASTGFN_CHECK(node >= 0 && node < parent.size(0), "path_nodes", "leaf and num_nodes",
                      "a node and at most its depth plus one",
                      c10::str("leaf ", leaf_of[n], ", num_nodes ", wanted[n]), "shorten num_nodes");
        rows[n * width + k] = node;
        node = parent_of[node];
      }
    }
  });
  return out;
}

void check_index(const char* function, const Tensor& index) {
  FASTGFN_CHECK_DTYPE(index, at::kLong, function, "cast it to int64");
  FASTGFN_CHECK(index.is_contiguous(), function, "index", "contiguous", index.strides(),
                "call .contiguous()");
}

void check_index_values(const char* function, const Tensor& index, int64_t num_nodes) {
  const int64_t* i = index.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < index.numel(); ++k) {
    FASTGFN_CHECK(i[k] >= -1 && i[k] < num_nodes, function, "index",
                  c10::str("-1 or in [0, ", num_nodes, ")"), i[k], "pass node numbers of this tree");
  }
}

Tensor gather_nodes(const Tensor& values, const Tensor& index) {
  check_gather_nodes(values, index);
  check_index_values("gather_nodes", index, values.size(0));
  Tensor out = at::empty(index.sizes(), values.options());
  AT_DISPATCH_ALL_TYPES_AND(at::kBool, values.scalar_type(), "gather_nodes", [&] {
    const auto source = values.accessor<scalar_t, 1>();
    const int64_t* i = index.const_data_ptr<int64_t>();
    scalar_t* target = out.data_ptr<scalar_t>();
    at::parallel_for(0, index.numel(), kGrain, [&](int64_t begin, int64_t stop) {
      for (int64_t k = begin; k < stop; ++k) target[k] = i[k] < 0 ? scalar_t(0) : source[i[k]];
    });
  });
  return out;
}

// One thread in index order: the sum of a node never depends on the number of threads.
Tensor scatter_add_nodes(const Tensor& grad, const Tensor& index, int64_t num_nodes) {
  check_scatter_add_nodes(grad, index);
  check_index_values("scatter_add_nodes", index, num_nodes);
  const Tensor values = grad.contiguous();
  Tensor out = at::empty({num_nodes}, grad.options());
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "scatter_add_nodes", [&] {
    const scalar_t* source = values.const_data_ptr<scalar_t>();
    const int64_t* i = index.const_data_ptr<int64_t>();
    std::vector<double> sum(num_nodes, 0.0);
    for (int64_t k = 0; k < index.numel(); ++k) {
      if (i[k] >= 0) sum[i[k]] += source[k];
    }
    scalar_t* target = out.data_ptr<scalar_t>();
    for (int64_t j = 0; j < num_nodes; ++j) target[j] = static_cast<scalar_t>(sum[j]);
  });
  return out;
}

}  // namespace

void check_path_nodes(const Tensor& parent, const Tensor& leaf, const Tensor& num_nodes, int64_t width) {
  FASTGFN_CHECK_DTYPE(parent, at::kInt, "path_nodes", "pass TokenTree.parent");
  FASTGFN_CHECK_DTYPE(leaf, at::kLong, "path_nodes", "pass TokenTree.leaf");
  FASTGFN_CHECK_DTYPE(num_nodes, at::kLong, "path_nodes", "cast it to int64");
  FASTGFN_CHECK_DIM(parent, 1, "path_nodes", "flatten it");
  FASTGFN_CHECK_DIM(leaf, 1, "path_nodes", "flatten it");
  FASTGFN_CHECK(num_nodes.sizes() == leaf.sizes(), "path_nodes", "num_nodes", leaf.sizes(),
                num_nodes.sizes(), "give one length per leaf");
  FASTGFN_CHECK(width >= 0, "path_nodes", "width", ">= 0", width, "pass the largest of num_nodes");
}

void check_gather_nodes(const Tensor& values, const Tensor& index) {
  FASTGFN_CHECK_DIM(values, 1, "gather_nodes", "gather one value per node");
  check_index("gather_nodes", index);
}

void check_scatter_add_nodes(const Tensor& grad, const Tensor& index) {
  FASTGFN_CHECK(grad.sizes() == index.sizes(), "scatter_add_nodes", "grad", index.sizes(), grad.sizes(),
                "give one value per index");
  check_index("scatter_add_nodes", index);
}

TORCH_LIBRARY_IMPL(fastgfn, CPU, m) {
  m.impl("build_tree", &build_tree);
  m.impl("path_nodes", &path_nodes);
  m.impl("gather_nodes", &gather_nodes);
  m.impl("scatter_add_nodes", &scatter_add_nodes);
}

}  // namespace fastgfn
