#include "bindings/cuda/plan.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "bindings/select_spec.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

PyObject* item(const py::list& list, size_t i) {
  return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
}

// A number on the device; null where there is none.
const float* float_at(const py::object& tensor, const char* name) {
  if (tensor.is_none()) return nullptr;
  DLTensor d;
  shared_reader().read(tensor.ptr(), &d, [&] { return std::string(name); });
  if (d.dtype.code != kDLFloat || d.dtype.bits != 32)
    throw py::type_error(std::string(name) + " is not a float32 tensor");
  return static_cast<const float*>(d.data);
}

GroupInput group_of(const py::tuple& hyper, const py::tuple& clip) {
  GroupInput group{};
  for (size_t i = 0; i < hyper.size() && i < kMaxHyper; ++i) {
    const py::handle value = PyTuple_GET_ITEM(hyper.ptr(), static_cast<Py_ssize_t>(i));
    if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
      group.hyper[i] = py::cast<double>(value);
      continue;
    }
    DLTensor d;
    shared_reader().read(value.ptr(), &d, [] { return std::string("a hyper-parameter"); });
    if (d.dtype.code != kDLFloat || (d.dtype.bits != 32 && d.dtype.bits != 64))
      throw py::type_error("a hyper-parameter on the device is neither float32 nor float64");
    group.hyper_at[i] = d.data;
    if (d.dtype.bits == 64) group.hyper_is_double |= 1u << i;
  }
  group.clip = {static_cast<ClipMode>(py::cast<int>(clip[0])), py::cast<double>(clip[1]),
                py::cast<double>(clip[2]), py::cast<double>(clip[3]), py::cast<double>(clip[4])};
  group.clip_value = py::cast<double>(clip[5]);
  group.maximize = py::cast<bool>(clip[6]) ? 1 : 0;
  return group;
}

}  // namespace

void check(int error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + what + ": " + error_name(error));
}

SingleLaunch& single_launch() {
  static SingleLaunch when = [] {
    const char* const wanted = std::getenv("PYSMOOTH_CUDA_SINGLE");
    if (wanted == nullptr || *wanted == '\0') return SingleLaunch::in_cache;
    if (std::string(wanted) == "0") return SingleLaunch::never;
    if (std::string(wanted) == "1") return SingleLaunch::always;
    throw py::value_error("PYSMOOTH_CUDA_SINGLE is 0 or 1, not " + std::string(wanted));
  }();
  return when;
}

int find_rule(const std::string& name) {
  for (int i = 0; i < kRules; ++i)
    if (name == facts(i).name) return i;
  throw py::value_error("rule '" + name + "' is not known to the cuda backend");
}

StepPlan::StepPlan(const py::list& params, const py::list& grads, const py::dict& state,
                   const py::list& state_dicts, const py::list& state_keys,
                   const std::vector<std::string>& rules, const std::vector<int>& groups,
                   std::vector<std::string> names, const std::vector<bool>& first,
                   const std::vector<int>& param_storage, const std::vector<bool>& by_rows,
                   const py::list& state_roots, int scope, int policy, double norm_type,
                   const std::vector<int>& stage_scopes, const py::object& select,
                   const std::vector<int64_t>& absorbed, const std::vector<int>& sites,
                   const std::vector<PartOf>& parts, bool joins)
    : params_(params),
      state_dicts_(state_dicts),
      state_keys_(state_keys),
      state_roots_(state_roots),
      names_(std::move(names)),
      entries_(params.size()),
      grads_(params.size()),
      addresses_(params.size()),
      active_(params.size()) {
  site_of_ = sites;
  absorbs_ = !absorbed.empty();
  const size_t n = params.size();
  if (grads.size() != n || state_dicts.size() != n || state_keys.size() != n || rules.size() != n ||
      groups.size() != n || names_.size() != n || first.size() != n || param_storage.size() != n ||
      by_rows.size() != n || sites.size() != n || (absorbs_ && absorbed.size() != n) ||
      (!parts.empty() && parts.size() != n))
    throw py::value_error("Plan: all lists must be as long as params");
  std::vector<Tensor> tensors(n);
  std::vector<int> devices;
  for (size_t t = 0; t < n; ++t) {
    Tensor& out = tensors[t];
    out.rule = find_rule(rules[t]);
    out.group = groups[t];
    out.first = first[t];
    if (absorbs_) out.absorbed = absorbed[t];
    out.storage = static_cast<ParamStorage>(param_storage[t]);
    if (out.group < 0 || (t > 0 && out.group < groups[t - 1]))
      throw py::value_error("Plan: groups must come in order");
    group_sizes_.resize(static_cast<size_t>(out.group) + 1, 0);
    ++group_sizes_.back();
    Entry& e = entries_[t];
    e.tracked = tracked_.size();
    track(t, item(params, t), label(t));
    DLTensor d;
    shared_reader().read(item(params, t), &d, [&] { return label(t); });
    if (!parts.empty()) std::tie(out.elements, out.first_element, out.counted) = parts[t];
    out.site = sites[t];
    if (out.site < 0 || out.site > static_cast<int>(devices.size()))
      throw py::value_error("Plan: sites must be numbered as they come");
    if (out.site == static_cast<int>(devices.size())) devices.push_back(d.device.device_id);
    shared_reader().read_form(item(grads, t), &d, [&] { return "gradient of " + label(t); });
    e.grad.assign(d);
    read_states(t, &out);
    read_layouts(t, by_rows[t], &out);
  }
  Settings settings;
  settings.scope = static_cast<Scope>(scope);
  settings.policy = static_cast<NonFinite>(policy);
  settings.norm_type = norm_type;
  settings.absorbs = absorbs_;
  settings.spread = !parts.empty();
  settings.joins = joins;
  for (size_t i = 0; i < stage_scopes.size() && i < kMaxStages; ++i)
    settings.stage_scope[i] = static_cast<Scope>(stage_scopes[i]);
  if (!select.is_none()) settings.select = read_select(select);
  inputs_.resize(group_sizes_.size());
  if (devices.empty()) devices.push_back(0);
  py::list expected;
  for (size_t t = 0; t < n; ++t) {
    const bool has = !absorbs_ && entries_[t].held == entries_[t].expected;
    expected.append(has ? py::object(grads[t]) : py::none());
  }
  watch_ = std::make_unique<Watch>(params, expected, state_dicts, state_keys, state, state_roots,
                                   /*aligns=*/false);
  sites_ = make_sites(tensors, static_cast<int>(group_sizes_.size()), settings, devices);
}

void StepPlan::track(size_t /*t*/, PyObject* tensor, const std::string& what) {
  DLTensor d;
  shared_reader().read(tensor, &d, [&] { return what; });
  Tracked& x = tracked_.emplace_back();
  x.tensor = tensor;
  x.impl = direct_ == nullptr ? nullptr : direct_->impl_of_plain(tensor);
  DLTensor seen;
  if (x.impl != nullptr && !direct_->read(&x.impl, &seen)) x.impl = nullptr;
  x.form.assign(x.impl != nullptr ? seen : d);
}

void StepPlan::read_states(size_t t, Tensor* out) {
  Entry& e = entries_[t];
  const RuleFacts& rule = facts(out->rule);
  const auto keys = py::reinterpret_borrow<py::tuple>(item(state_keys_, t));
  const int tensors = rule.states + (has_companion(out->storage) ? 1 : 0);
  const bool counts = rule.counts_steps || out->storage == ParamStorage::stochastic;
  e.expected = tensors + (rule.accumulates ? 1 : 0) + (rule.keeps_scale ? 1 : 0) + (counts ? 1 : 0);
  most_states_ = std::max(most_states_, e.expected);
  if (static_cast<int>(keys.size()) != e.expected)
    throw py::value_error("rule '" + std::string(rule.name) + "' has " +
                          std::to_string(e.expected) + " states, not " +
                          std::to_string(keys.size()));
  PyObject* const dict = item(state_dicts_, t);
  for (const py::handle key : keys) {
    PyObject* const state = PyDict_GetItemWithError(dict, key.ptr());
    if (state == nullptr || state == Py_None) {
      tracked_.resize(e.tracked + 1);
      e.held = 0;
      const Tensor known = *out;
      *out = Tensor{known.rule, known.group};
      out->site = known.site;
      out->elements = known.elements;
      out->first_element = known.first_element;
      out->counted = known.counted;
      out->storage = ParamStorage::plain;
      return;
    }
    track(t, state, "state '" + py::cast<std::string>(key) + "' of " + label(t));
    void* const data = tracked_.back().form.data;
    const int number = e.held++ - tensors;
    if (number < 0) {
      const RealView view = RealView::of(tracked_.back().form, label(t));
      out->state_dtype[e.held - 1] = view.dtype;
      out->state[e.held - 1] = data;
    } else if (rule.accumulates && number == 0) {
      out->norm_sq = static_cast<double*>(data);
    } else if (rule.keeps_scale && number == (rule.accumulates ? 1 : 0)) {
      out->scale = static_cast<double*>(data);
    } else {
      out->steps = static_cast<float*>(data);
    }
  }
}

// Sizes, dtypes, and how everything is walked together.
void StepPlan::read_layouts(size_t t, bool by_rows, Tensor* out) {
  const Entry& e = entries_[t];
  std::deque<RealView> views;
  const auto viewed = [&](const Signature& form) {
    return &views.emplace_back(RealView::of(form, label(t)));
  };
  const RealView* const param = viewed(tracked_[e.tracked].form);
  const RealView* const grad = viewed(e.grad);
  out->param = tracked_[e.tracked].form.data;
  out->numel = param->numel;
  out->param_dtype = param->dtype;
  out->grad_dtype = grad->dtype;
  std::vector<const int64_t*> strides{param->strides.data(), grad->strides.data()};
  const int tensors = facts(out->rule).states + (has_companion(out->storage) ? 1 : 0);
  for (int k = 1; k <= tensors && k <= e.held; ++k)
    strides.push_back(viewed(tracked_[e.tracked + static_cast<size_t>(k)].form)->strides.data());
  if (e.held > 0 && out->storage == ParamStorage::master)
    std::swap(strides.front(), strides.back());
  const auto merged = [&](const std::vector<const int64_t*>& of) -> const Layout* {
    Layout layout;
    if (!merge_layout(static_cast<int>(param->shape.size()), param->shape.data(), of, &layout))
      throw py::value_error("gradient of " + label(t) + " has more than " +
                            std::to_string(kMaxDims) + " dimensions that cannot be merged");
    return layout.linear() ? nullptr : &layouts_.emplace_back(layout);
  };
  out->layout = merged(strides);
  out->grad_layout = merged({grad->strides.data()});
  if (!by_rows) return;
  pysmooth::RowCut& cut = rows_.emplace_back();
  cut.of_param(*param, tracked_[e.tracked].form.ndim, out->param, label(t));
  cut.of_grad(*grad, strides, "gradient of " + label(t));
  out->rows = &cut.shape;
}

bool StepPlan::same_lists(const py::list& groups) const {
  if (groups.size() < group_sizes_.size()) return false;
  size_t t = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    PyObject* const list = PyDict_GetItemString(item(groups, g), "params");
    if (list == nullptr) return false;
    const size_t expected = g < group_sizes_.size() ? group_sizes_[g] : 0;
    if (!PyList_CheckExact(list) || static_cast<size_t>(PyList_GET_SIZE(list)) != expected)
      return false;
    for (size_t i = 0; i < expected; ++i, ++t)
      if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != item(params_, t)) return false;
  }
  return true;
}

// One kind of question for many tensors, then the next kind: asking all of them about one tensor
// and then about the next takes half as long again, because torch's code for each fills the caches
// of instructions and branches.
bool StepPlan::same(size_t t, int k) const {
  const Tracked& x = known(t, k);
  DLTensor d;
  if (x.impl != nullptr)
    return direct_->impl_of(x.tensor) == x.impl && direct_->read(&x.impl, &d) && x.form.same(d);
  shared_reader().read(x.tensor, &d, [&] { return (k == 0 ? "" : "a state of ") + label(t); });
  return x.form.same(d);
}

bool StepPlan::unmoved(size_t begin, size_t end) const {
  const auto asked = [&](size_t t, int k) {
    return k <= entries_[t].held && (active_[t] || entries_[t].held > 0);
  };
  for (int k = 0; k <= most_states_; ++k) {
    // A state's object is alive if its dict still holds it.
    for (size_t t = begin; t < end && k > 0; ++t) {
      if (!asked(t, k)) continue;
      PyObject* const key = PyTuple_GET_ITEM(item(state_keys_, t), k - 1);
      if (PyDict_GetItemWithError(item(state_dicts_, t), key) != known(t, k).tensor) return false;
    }
    for (size_t t = begin; t < end; ++t)
      if (asked(t, k) && !same(t, k)) return false;
  }
  return true;
}

bool StepPlan::read_gradient(size_t t) {
  DLTensor d;
  const Signature& form = entries_[t].grad;
  const int device = sites_[static_cast<size_t>(site_of_[t])].device();
  const auto fits = [&] { return form.same_form(d) && d.device.device_id == device; };
  // See the CPU module's Plan::may_be_lazy.
  const auto may_be_lazy = [&] {
    return d.dtype.code == kDLComplex || d.ndim == 0 || d.strides[d.ndim - 1] != 1 ||
           d.shape[d.ndim - 1] == 1;
  };
  const bool seen = entries_[t].given != nullptr && direct_->read(entries_[t].given, &d);
  if (!seen || !fits() || may_be_lazy()) {
    if (entries_[t].given != nullptr) grads_[t] = grad_of_(item(params_, t));
    const auto read = [&] {
      shared_reader().read(grads_[t].ptr(), &d, [&] { return "gradient of " + label(t); });
      return fits();
    };
    if (!read()) return false;
    if (may_be_lazy() && has_lazy_bits(grads_[t].ptr())) {
      grads_[t] = grads_[t].attr("resolve_conj")().attr("resolve_neg")();
      if (!read()) return false;
    }
  }
  addresses_[t] = d.data;
  return true;
}

// False: the parameter is not what it was.
bool StepPlan::find_gradient(size_t t) {
  const Tracked& param = known(t, 0);
  addresses_[t] = nullptr;
  entries_[t].given = nullptr;
  if (param.impl != nullptr) {
    if (direct_->impl_of(param.tensor) != param.impl) return false;
    entries_[t].given = direct_->grad_of(param.impl);
    active_[t] = entries_[t].given != nullptr ? 1 : 0;
  } else {
    grads_[t] = grad_of_(param.tensor);
    active_[t] = grads_[t].is_none() ? 0 : 1;
  }
  return true;
}

bool StepPlan::gather() {
  constexpr size_t kBlock = 128;  // stays in L2 from one question to the next
  bool same = written_for_.size() == entries_.size();
  for (size_t begin = 0; begin < entries_.size(); begin += kBlock) {
    const size_t end = std::min(entries_.size(), begin + kBlock);
    for (size_t t = begin; t < end; ++t) {
      if (!find_gradient(t)) return false;
      if (absorbs_) active_[t] = 0;  // who takes part is known on the device
      same = same && written_for_[t] == active_[t];
      if (active_[t] && entries_[t].held != entries_[t].expected) return false;
    }
    if (!unmoved(begin, end)) return false;
    for (size_t t = begin; t < end; ++t)
      if (active_[t] && !read_gradient(t)) return false;
  }
  if (!same) note_written();
  return true;
}

// What autograd is to be told of. States come as the roots of their views.
void StepPlan::note_written() {
  written_ = py::list();
  for (size_t t = 0; t < entries_.size(); ++t)
    if (active_[t] && known(t, 0).impl == nullptr) written_.append(py::handle(item(params_, t)));
  for (const py::handle root : state_roots_) written_.append(root);
  written_for_ = active_;
}

// The watch sees at once that all is as it was. Where it is not, or cannot be told, everything is
// asked once more, one by one, by what has words for errors.
bool StepPlan::begin(const py::list& groups, const py::dict& state) {
  found_ = watch_->look(groups, state);
  watched_ = found_ != nullptr;
  if (watched_) return true;
  found_ = addresses_.data();
  return same_lists(groups) && watch_->same_dicts(state) && gather();
}

int StepPlan::enqueue(size_t site, int phase, const py::list& hypers, const py::list& clips,
                      const py::object& grad_scale, const py::object& found_inf, uintptr_t inputs,
                      uintptr_t stream) {
  for (size_t g = 0; g < inputs_.size(); ++g)
    inputs_[g] = group_of(py::reinterpret_borrow<py::tuple>(hypers[g]),
                          py::reinterpret_borrow<py::tuple>(clips[g]));
  StepInput numbers{};
  numbers.unscale = 1.0;
  numbers.grad_scale = float_at(grad_scale, "grad_scale");
  numbers.found_inf = float_at(found_inf, "found_inf");
  const Site& here = sites_.at(site);
  check(cuda::step(here.plan(), here.memory(), reinterpret_cast<void*>(inputs), found_,
                   inputs_.data(), numbers, reinterpret_cast<void*>(stream), Part::whole, phase),
        "launch");
  const bool alone = sites_.size() == 1 && !here.plan().is_spread();
  return alone ? 1 : here.plan().phases(inputs_.data());
}

std::tuple<Meeting, bool, int> StepPlan::meeting(int phase) const {
  const Launch last = sites_.front().plan().meetings(inputs_.data()).at(static_cast<size_t>(phase));
  return {last.meets, last.largest, last.count};
}

void StepPlan::end(bool done) {
  if (watched_) {
    if (done) watch_->count_written();
    return;
  }
  for (py::object& grad : grads_) grad = py::object();
  if (!done) return;
  increment_version(written_);
  for (size_t t = 0; t < entries_.size(); ++t)
    if (active_[t] && known(t, 0).impl != nullptr) direct_->count_write(&known(t, 0).impl);
}

bool StepPlan::step(const py::list& groups, const py::dict& state, const py::list& hypers,
                    const py::list& clips, const py::object& grad_scale,
                    const py::object& found_inf, uintptr_t inputs, uintptr_t stream) {
  bool done = false;
  const auto finish = [this, &done](void*) { end(done); };
  const std::unique_ptr<void, decltype(finish)> guard(this, finish);
  if (!begin(groups, state)) return false;
  enqueue(0, 0, hypers, clips, grad_scale, found_inf, inputs, stream);
  return done = true;
}

bool StepPlan::find_one(size_t t) {
  if (t >= entries_.size()) throw py::index_error("Plan: there is no such parameter");
  return find_gradient(t) && active_[t] && entries_[t].held == entries_[t].expected &&
         unmoved(t, t + 1) && read_gradient(t);
}

bool StepPlan::holds(size_t t) {
  const bool found = find_one(t);
  grads_[t] = py::object();
  return found;
}

void StepPlan::absorb(size_t t, const py::tuple& hyper, const py::tuple& clip, uint32_t once,
                      uintptr_t stream) {
  const auto release = [this, t](void*) { grads_[t] = py::object(); };
  const std::unique_ptr<void, decltype(release)> guard(this, release);
  if (!absorbs_ || !find_one(t))
    throw std::logic_error("Plan.absorb: holds() comes first, and says so");
  const Intake gradient{addresses_[t], static_cast<int32_t>(t), once, group_of(hyper, clip)};
  const Site& here = sites_.front();
  check(cuda::absorb(here.plan(), here.memory(), gradient, reinterpret_cast<void*>(stream)),
        "launch");
}

}  // namespace pysmooth::cuda
