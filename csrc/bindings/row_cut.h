// How a parameter and its gradient are cut into rows.
#pragma once

#include <vector>

#include "bindings/tensor_reader.h"
#include "core/rows.h"

namespace pysmooth {

struct RowCut {
  RowShape shape;
  Layout param_layout, grad_layout;

  // `ndim` is the tensor's own: a complex one has a dimension less than its view.
  void of_param(const RealView& view, int ndim, const void* data, const std::string& name) {
    shape.rows = ndim >= 2 ? view.shape[0] : 1;
    shape.length = shape.rows > 0 ? view.numel / shape.rows : 0;
    shape.param = data;
    shape.param_dtype = view.dtype;
    shape.param_layout = lay(view, &param_layout, name);
  }
  // `strides` of all that apply walks together.
  void of_grad(const RealView& view, const std::vector<const int64_t*>& strides,
               const std::string& name) {
    shape.grad_layout = lay(view, &grad_layout, name);
    shape.run = shape.length;
    if (shape.rows <= 1) return;
    const auto order = walk_order(static_cast<int>(view.shape.size()), view.shape.data(), strides);
    shape.run = 1;
    for (size_t i = order.size(); i-- > 0 && order[i] != 0;)
      shape.run *= view.shape[static_cast<size_t>(order[i])];
  }

 private:
  const Layout* lay(const RealView& view, Layout* layout, const std::string& name) const {
    if (!merge_layout(static_cast<int>(view.shape.size()), view.shape.data(), {view.strides.data()},
                      layout, shape.rows > 1))
      throw py::value_error(name + " has more than " + std::to_string(kMaxDims) +
                            " dimensions that cannot be merged");
    return layout->linear() ? nullptr : layout;
  }
};

}  // namespace pysmooth
