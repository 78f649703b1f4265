// The plan-less entry points: clip_grad_norm_ and its parts, state memory, bandwidth probes.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings/aliasing.h"
#include "bindings/plan.h"
#include "bindings/run_released.h"

namespace pysmooth {
namespace {

std::string name_of(size_t index) { return "gradient " + std::to_string(index); }

RealView view_of(const DLTensor& d, const std::string& what) {
  Signature form;
  form.assign(d);
  return RealView::of(form, what);
}

// One gradient: its Python object, or, where nobody has made one, what is behind it.
struct Gradient {
  py::object object;
  const void* impl = nullptr;
  Handle held = nullptr;

  void read(DLTensor* out, const std::string& what) const {
    if (object)
      shared_reader().read(object.ptr(), out, [&] { return what; });
    else
      Direct::get()->read(&impl, out);
  }
};

// Gradients of one call. Kept between calls, so that its buffers are allocated once per thread.
struct GradList {
  Pipeline pipeline;
  std::deque<Layout> layouts;
  std::deque<RowCut> rows;
  std::vector<Gradient> grads;

  // Not the chunks: they hint at how much work the next call will have.
  void clear() {
    pipeline.slots.clear();
    layouts.clear();
    rows.clear();
    for (const Gradient& grad : grads)
      if (grad.held != nullptr) Direct::get()->release(grad.held);
    grads.clear();
  }
  // Other threads may replace gradients once they get the GIL.
  void hold() {
    for (Gradient& grad : grads)
      if (grad.impl != nullptr && grad.held == nullptr) grad.held = Direct::get()->hold(&grad.impl);
  }
};

void add(GradList* list, Gradient grad, const DLTensor& d) {
  static const int scale_rule = find_rule("scale");
  const auto what = [&] { return name_of(list->grads.size()); };
  Slot slot;
  slot.param = d.data;
  slot.grad = d.data;
  slot.rule = scale_rule;
  slot.active = true;
  bool contiguous = d.dtype.code == kDLFloat && d.dtype.bits == 32;
  int64_t numel = 1;
  for (int k = d.ndim - 1; contiguous && k >= 0; --k) {
    contiguous = d.shape[k] == 1 || d.strides[k] == numel;
    numel *= d.shape[k];
  }
  slot.numel = numel;
  if (!contiguous) {
    const RealView view = view_of(d, what());
    Layout layout;
    if (!merge_layout(static_cast<int>(view.shape.size()), view.shape.data(), {view.strides.data()},
                      &layout))
      throw py::value_error(what() + " has more than " + std::to_string(kMaxDims) +
                            " dimensions that cannot be merged");
    slot.numel = view.numel;
    slot.param_dtype = slot.grad_dtype = view.dtype;
    if (!layout.linear()) {
      list->layouts.push_back(layout);
      slot.layout = slot.grad_layout = &list->layouts.back();
    }
  }
  list->grads.push_back(std::move(grad));
  if (slot.numel == 0) slot.active = false;
  list->pipeline.slots.push_back(slot);
}

// The gradient that was added last is to be clipped by the rows of its parameter. Signs do not
// matter: neither do lazy ones.
void cut_last(GradList* list, py::handle param) {
  const size_t index = list->grads.size() - 1;
  Slot& slot = list->pipeline.slots[index];
  const std::string name = name_of(index), param_name = "the parameter of " + name;
  DLTensor d;
  list->grads[index].read(&d, name);
  const RealView grad = view_of(d, name);
  shared_reader().read(param.ptr(), &d, [&] { return param_name; });
  const RealView view = view_of(d, param_name);
  if (view.shape != grad.shape)
    throw py::value_error(name + " does not have its parameter's shape");
  RowCut& cut = list->rows.emplace_back();
  cut.of_param(view, d.ndim, d.data, param_name);
  cut.of_grad(grad, {grad.strides.data()}, name);
  slot.rows = &cut.shape;
}

void check_writable(const GradList& list) {
  check_scalable(
      list.grads.size(),
      [&](size_t t) {
        const Slot& slot = list.pipeline.slots[t];
        return Scaled{slot.param, slot.numel, slot.param_dtype, slot.layout == nullptr};
      },
      [&](size_t t) {
        DLTensor d;
        list.grads[t].read(&d, "gradient");
        return view_of(d, "gradient");
      });
}

struct NormResult {
  double norm;
  bool has_f64;
};

class Call {
 public:
  Call() : list_(shared()) { list_.clear(); }
  ~Call() { list_.clear(); }  // drop the references to the gradients
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  GradList& list() { return list_; }

  // Takes the norms of the gradients that `each` takes.
  template <class Each>
  void reduce(double norm_type, int threads, Each each) {
    Pipeline& p = list_.pipeline;
    p.norm_type = norm_type;
    p.always_norm = true;
    p.skip_unit_coef = true;  // no clip: every coefficient is 1, so apply does nothing
    set_coef(1.0);
    Collecting gather(this, each);
    run_released(&p, threads, &gather);
  }

  // Takes the gradients that `each` takes.
  template <class Each>
  void collect(Each each) {
    each();
    list_.pipeline.cut_chunks();
    if (!keeps_gil(list_.pipeline)) list_.hold();
  }

  void take(py::object grad) {
    DLTensor d;
    Gradient out;
    out.object = std::move(grad);
    out.read(&d, name_of(list_.grads.size()));
    add(&list_, std::move(out), d);
  }

  // The gradient of a parameter; false: it has none.
  bool take_of(py::handle param) {
    if (const void* const impl = direct_ == nullptr ? nullptr : direct_->impl_if_exact(param.ptr());
        impl != nullptr) {
      const Handle grad = direct_->grad_of(impl);
      if (grad == nullptr) return false;
      Gradient out;
      out.impl = *grad;
      DLTensor d;
      if (direct_->read(&out.impl, &d)) {
        add(&list_, std::move(out), d);
        return true;
      }
    }
    py::object grad = grad_of_(param.ptr());
    if (grad.is_none()) return false;
    take(std::move(grad));
    return true;
  }

  // Scales by `coef`; NaN and infinities included, as torch does.
  void scale(double coef, int threads) {
    check_writable(list_);
    Pipeline& p = list_.pipeline;
    p.always_norm = false;
    p.skip_unit_coef = false;
    set_coef(coef);
    run_collected(threads);
    note_written([&](size_t t) { return p.slots[t].active; });
  }

  void clip_rows(double factor, double eps, int threads) {
    check_writable(list_);
    Pipeline& p = list_.pipeline;
    p.norm_type = 2.0;
    p.always_norm = p.skip_unit_coef = true;
    set_coef(1.0);
    p.groups[0].clip.mode = ClipMode::agc;
    p.groups[0].clip.max_norm = factor;
    p.groups[0].clip.eps = eps;
    run_collected(threads);
    p.groups[0].clip = {};
    note_written([&](size_t t) { return p.slots[t].active && p.coefs[t] != 1.0; });
  }

  NormResult result() const {
    NormResult out{list_.pipeline.norms[0], false};
    for (const Slot& slot : list_.pipeline.slots)
      out.has_f64 = out.has_f64 || slot.grad_dtype == DType::f64;
    return out;
  }

 private:
  template <class Each>
  class Collecting final : public Gather {
   public:
    Collecting(Call* call, Each each) : call_(call), each_(each) {}
    bool begin() override {
      call_->collect(each_);
      return true;
    }

   private:
    Call* const call_;
    Each each_;
  };
  // With the gradients that are there already.
  void run_collected(int threads) {
    Collecting gather(this, [] {});
    run_released(&list_.pipeline, threads, &gather);
  }
  template <class Of>
  void note_written(Of was) {
    py::list written;
    for (size_t t = 0; t < list_.grads.size(); ++t) {
      const Gradient& grad = list_.grads[t];
      if (!was(t)) continue;
      if (grad.object)
        written.append(grad.object);
      else
        direct_->count_write(&grad.impl);
    }
    increment_version(written);
  }
  static GradList& shared() {
    thread_local auto* const list = new GradList();  // leaked: it may hold Python objects
    return *list;
  }
  void set_coef(double coef) {
    list_.pipeline.groups.resize(1);
    list_.pipeline.groups[0].hyper[0] = coef;
  }
  GradList& list_;
  const Direct* const direct_ = Direct::get();
  AttributeGetter grad_of_{"grad"};
};

auto each_of(Call* call, const py::list& tensors) {
  return [call, &tensors] {
    for (const py::handle t : tensors) call->take(py::reinterpret_borrow<py::object>(t));
  };
}

py::tuple grad_norm(const py::list& tensors, double norm_type, int threads) {
  Call call;
  call.reduce(norm_type, threads, each_of(&call, tensors));
  const NormResult out = call.result();
  return py::make_tuple(out.norm, out.has_f64);
}

// Returns (norm, any gradient is float64, any gradient at all).
py::tuple clip_grad_norm(const py::list& params, double max_norm, double norm_type,
                         bool error_if_nonfinite, int threads) {
  Call call;
  call.reduce(norm_type, threads, [&] {
    for (const py::handle p : params) call.take_of(p);
  });
  if (call.list().grads.empty()) return py::make_tuple(0.0, false, false);
  const NormResult out = call.result();
  // On a non-finite norm with error_if_nonfinite the caller raises; gradients stay as they are.
  const bool finite = out.has_f64 ? std::isfinite(out.norm)  // as it will be returned
                                  : std::isfinite(static_cast<float>(out.norm));
  if (finite || !error_if_nonfinite) {
    Clip clip;
    clip.mode = ClipMode::hard;
    clip.max_norm = max_norm;
    clip.eps = 1e-6;  // torch's
    const double coef = clip_coefficient(clip, out.norm);
    // A coefficient that rounds to 1 in the gradients' arithmetic changes nothing.
    const bool unchanged = out.has_f64 ? coef == 1.0 : static_cast<float>(coef) == 1.0f;
    if (!unchanged) call.scale(coef, threads);
  }
  return py::make_tuple(out.norm, out.has_f64, true);
}

// Scales each row of the gradients by its own coefficient.
void agc(const py::list& params, double factor, double eps, int threads) {
  Call call;
  for (const py::handle p : params)
    if (call.take_of(p)) cut_last(&call.list(), p);
  call.clip_rows(factor, eps, threads);
}

void scale(const py::list& tensors, double coef, int threads) {
  Call call;
  call.collect(each_of(&call, tensors));
  call.scale(coef, threads);
}

// Zeroes freshly allocated dense tensors: huge pages where the system grants them on request, and a
// first touch by all threads, since faulting pages in is what makes large allocations slow.
void fill_zero(const py::list& tensors, int threads) {
  std::vector<std::pair<char*, int64_t>> spans;
  for (const py::handle t : tensors) {
    DLTensor d;
    shared_reader().read(t.ptr(), &d, [] { return std::string("state"); });
    Signature form;
    form.assign(d);
    const RealView view = RealView::of(form, "state");
    if (view.numel > 0)  // an empty one has no address
      spans.emplace_back(static_cast<char*>(d.data), view.numel * itemsize(view.dtype));
  }
  py::gil_scoped_release nogil;
  for (const auto& [data, bytes] : spans) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const auto end =
        (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    parallel_ranges(
        bytes, int64_t{4} << 20, threads,
        [](void* base, int64_t from, int64_t to) {
          std::memset(static_cast<char*>(base) + from, 0, static_cast<size_t>(to - from));
        },
        data);
  }
}

float* probe_data(py::handle tensor, int64_t* numel) {
  DLTensor d;
  shared_reader().read(tensor.ptr(), &d, [] { return std::string("probe tensor"); });
  if (d.dtype.code != kDLFloat || d.dtype.bits != 32 || d.ndim != 1 || d.strides[0] != 1)
    throw py::value_error("probe tensors must be contiguous, one-dimensional, float32");
  if (*numel >= 0 && *numel != d.shape[0])
    throw py::value_error("probe tensors must be of one size");
  *numel = d.shape[0];
  return static_cast<float*>(d.data);
}

void probe_mix(const py::list& rw, const py::list& r, int threads) {
  if (rw.size() > 3 || r.size() > 2 || rw.size() + r.size() == 0)
    throw py::value_error("probe: at most 3 tensors in rw, 2 in r, and at least one in all");
  struct Context {
    ProbeArgs args;
    ProbeFn fn;
  } context{};
  int64_t numel = -1;
  for (size_t i = 0; i < rw.size(); ++i) context.args.rw[i] = probe_data(rw[i], &numel);
  for (size_t i = 0; i < r.size(); ++i) context.args.r[i] = probe_data(r[i], &numel);
  context.fn = kernels().probe[rw.size()][r.size()];
  py::gil_scoped_release nogil;
  parallel_ranges(
      numel, kChunk * 4, threads,
      [](void* p, int64_t begin, int64_t end) {
        auto* const c = static_cast<Context*>(p);
        ProbeArgs args = c->args;
        args.begin = begin;
        args.length = end - begin;
        volatile double sink = c->fn(args);
        (void)sink;
      },
      &context);
}

void probe_copy(py::handle dst, py::handle src, int threads) {
  int64_t numel = -1;
  std::pair<float*, float*> pair;
  pair.first = probe_data(dst, &numel);
  pair.second = probe_data(src, &numel);
  py::gil_scoped_release nogil;
  parallel_ranges(
      numel, kChunk * 4, threads,
      [](void* p, int64_t begin, int64_t end) {
        const auto* const c = static_cast<std::pair<float*, float*>*>(p);
        std::memcpy(c->first + begin, c->second + begin, static_cast<size_t>(end - begin) * 4);
      },
      &pair);
}

}  // namespace

void bind_functional(py::module_& m) {
  m.def("grad_norm", &grad_norm, py::arg("tensors"), py::arg("norm_type"), py::arg("threads"));
  m.def("clip_grad_norm", &clip_grad_norm, py::arg("params"), py::arg("max_norm"),
        py::arg("norm_type"), py::arg("error_if_nonfinite"), py::arg("threads"));
  m.def("agc", &agc, py::arg("params"), py::arg("factor"), py::arg("eps"), py::arg("threads"));
  m.def("scale", &scale, py::arg("tensors"), py::arg("coef"), py::arg("threads"));
  m.def("fill_zero", &fill_zero, py::arg("tensors"), py::arg("threads"));
  m.def("probe_mix", &probe_mix, py::arg("rw"), py::arg("r"), py::arg("threads"));
  m.def("probe_copy", &probe_copy, py::arg("dst"), py::arg("src"), py::arg("threads"));
}

}  // namespace pysmooth
