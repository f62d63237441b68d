// One error form for every op: "<function>: <arg> must be <want>, got <have>; <fix>".
#pragma once

#include <ATen/ATen.h>

#define FASTGFN_CHECK(condition, function, arg, want, have, fix) \
  TORCH_CHECK_VALUE(condition, function, ": ", arg, " must be ", want, ", got ", have, "; ", fix)

#define FASTGFN_CHECK_DTYPE(tensor, dtype, function, fix)                                      \
  FASTGFN_CHECK((tensor).scalar_type() == (dtype), function, #tensor, c10::toString(dtype),    \
                c10::toString((tensor).scalar_type()), fix)

#define FASTGFN_CHECK_DIM(tensor, ndim, function, fix) \
  FASTGFN_CHECK((tensor).dim() == (ndim), function, #tensor, #ndim "-dimensional", (tensor).sizes(), fix)
