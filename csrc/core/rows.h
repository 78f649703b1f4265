// How a tensor is cut into rows, those of its first dimension. A vector, or a number, is one row.
#pragma once

#include "core/dtype.h"
#include "core/layout.h"

namespace pysmooth {

// How a tensor that is clipped by rows lies in memory.
struct RowShape {
  int64_t rows = 1;
  int64_t length = 0;           // elements of a row
  int64_t run = 1;              // so many in a row, in the order that apply walks in
  const void* param = nullptr;  // what the gradient's rows are compared with
  DType param_dtype = DType::f32;
  const Layout* param_layout = nullptr;  // row after row; null: linear
  const Layout* grad_layout = nullptr;
};

}  // namespace pysmooth
