// The extension's table of contents: every schema, and the empty module that import loads.
#include <Python.h>
#include <torch/library.h>

extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(fastgfn, m) {
  m.def(
      "build_tree(Tensor prompt_tokens, Tensor prompt_offsets, Tensor tokens, Tensor roles, Tensor offsets, "
      "Tensor group) -> (Tensor tokens, Tensor position, Tensor end, Tensor parent, Tensor count, "
      "Tensor group, Tensor role, Tensor leaf)");
  m.def("path_nodes(Tensor parent, Tensor leaf, Tensor num_nodes, SymInt width) -> Tensor");
  m.def("gather_nodes(Tensor values, Tensor index) -> Tensor");
  m.def("scatter_add_nodes(Tensor grad, Tensor index, SymInt num_nodes) -> Tensor");
  m.def("tree_cumsum(Tensor values, Tensor parent) -> Tensor");
  m.def("subtree_sum(Tensor values, Tensor parent) -> Tensor");
  m.def("segment_cumsum(Tensor values, Tensor offsets, bool reverse=False) -> Tensor");
  m.def(
      "decode_update_(Tensor(a!) tokens, Tensor(b!) lengths, Tensor(c!) finished, Tensor drawn, Tensor rows, "
      "int termination_token_id, int max_length) -> ()");
  m.def(
      "gumbel_draw(Tensor logits, Tensor rows, Tensor temperature, Tensor trajectory, Tensor position, "
      "int seed, int termination_token_id, Tensor forbid_stop) -> (Tensor token, Tensor log_pf, "
      "Tensor log_pterm, Tensor log_behavior)");
  m.def("philox4x32(Tensor counter, int seed) -> Tensor");
  m.def(
      "path_attention(Tensor query, Tensor keys, Tensor values, Tensor path, Tensor length, float scale, "
      "float softcap, int window, Tensor? tiles=None, Tensor? depth=None) -> Tensor");
  m.def("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor values, Tensor scale)");
  m.def(
      "head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? logit_bias, Tensor rows, "
      "Tensor columns, float scale, float softcap, bool want_grad) -> (Tensor logits, Tensor slope, Tensor peak, "
      "Tensor total, Tensor row_grad)");
  m.def(
      "subtb_padded(Tensor log_pf, Tensor log_flow, Tensor lengths, float subtb_lambda) -> (Tensor numerator, "
      "Tensor denominator)");
  m.def(
      "subtb_padded_backward(Tensor grad_numerator, Tensor log_pf, Tensor log_flow, Tensor lengths, "
      "float subtb_lambda) -> (Tensor grad_log_pf, Tensor grad_log_flow)");
  m.def(
      "subtb_tree(Tensor log_pf, Tensor log_flow, Tensor parent, Tensor valid, Tensor weight, "
      "float subtb_lambda) -> Tensor");
  m.def(
      "subtb_tree_backward(Tensor grad, Tensor log_pf, Tensor log_flow, Tensor parent, Tensor valid, "
      "Tensor weight, float subtb_lambda) -> (Tensor grad_log_pf, Tensor grad_log_flow)");
  m.def("subtb_tree_pairs(Tensor parent, Tensor valid, float subtb_lambda) -> Tensor");
}
