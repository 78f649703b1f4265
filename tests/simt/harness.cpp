// Steps of the CUDA backend, emulated: what tests/cuda_kernels.py calls.
//
// Every operand is copied to memory of its own, at an address as awkward as asked for, with pages
// around it that cannot be touched; after the step it is copied back.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/row_cut.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "simt.h"

namespace {

using namespace pysmooth;
using namespace pysmooth::cuda;

// Memory of the caller's, and where in it the operand's first element is. Null: there is none.
struct Memory {
  void* data;
  int64_t bytes, first, misplaced;
};

struct Operand {
  Memory memory;
  int32_t dtype, ndim;
  int64_t stride[8];
};

struct Parameter {
  int32_t rule, group, first, ndim, storage, by_rows;
  int64_t shape[8];
  Operand operand[kMaxOperands];  // parameter, gradient, states
  float* steps;
  double* norm_sq;
  double* scale;
  int64_t absorbed;
  int64_t site;                              // or the process that it belongs to
  int64_t elements, first_element, counted;  // of a part: as in cuda/device_plan.h
};

// What becomes of gradients that states absorb: taken in one by one, and then the step.
enum Absorbing : int32_t { kNone = 0, kAll = 1, kTaken = 2 };

struct Config {
  int32_t groups, scope, stage_scope[kMaxStages], policy, always_norm, skip_unit_coef;
  int32_t order, resident, races, multiprocessors;
  double norm_type;
  uint64_t seed;
  int32_t selector, select_scope, scaled;
  double ratio;
  int64_t k, block;
  uint64_t select_seed;
  int32_t absorbs;
  uint32_t once;
  int32_t sites;
  int32_t processes, stages;  // 0: tensors are whole
  int32_t single;  // blocks of the one launch that a step is, where it can be; 0: it is several
};

// Device memory that mirrors memory of the host.
class Mirror {
 public:
  Mirror(void* host, size_t bytes, size_t misplaced)
      : host_(host), bytes_(bytes), at_(simt::allocate(bytes, misplaced, 0)) {
    if (bytes > 0) std::memcpy(at_, host, bytes);
  }
  ~Mirror() { simt::release(at_); }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  char* at() const { return static_cast<char*>(at_); }
  std::string copy_back() const {
    if (bytes_ > 0) std::memcpy(host_, at_, bytes_);
    return simt::check_surroundings(at_);
  }

 private:
  void* host_;
  size_t bytes_;
  void* at_;
};

class Device {
 public:
  char* mirror(void* host, size_t bytes, size_t misplaced = 0) {
    if (host == nullptr) return nullptr;
    return all_.emplace_back(host, bytes, misplaced).at();
  }
  char* mirror(const Memory& m) {
    char* const at = mirror(m.data, static_cast<size_t>(m.bytes), static_cast<size_t>(m.misplaced));
    return at == nullptr ? nullptr : at + m.first;
  }
  std::string copy_back() const {
    std::string wrong;
    for (const Mirror& m : all_) {
      const std::string one = m.copy_back();
      if (wrong.empty()) wrong = one;
    }
    return wrong;
  }
  void shut(bool shut) const {
    for (const Mirror& m : all_) simt::shut(m.at(), shut);
  }

 private:
  std::deque<Mirror> all_;
};

RealView view_of(const Parameter& p, int operand) {
  const Operand& x = p.operand[operand];
  RealView out;
  out.dtype = static_cast<DType>(x.dtype);
  out.shape.assign(p.shape, p.shape + p.ndim);
  out.strides.assign(x.stride, x.stride + p.ndim);
  for (const int64_t size : out.shape) out.numel *= size;
  return out;
}

Tensor describe(const Parameter& p, Device* device, std::deque<Layout>* layouts,
                std::deque<pysmooth::RowCut>* rows, const void** grad) {
  Tensor out;
  out.rule = p.rule;
  out.group = p.group;
  out.first = p.first != 0;
  out.absorbed = p.absorbed;
  out.site = static_cast<int>(p.site);
  out.elements = p.elements;
  out.first_element = p.first_element;
  out.counted = p.counted != 0;
  out.numel = 1;
  for (int d = 0; d < p.ndim; ++d) out.numel *= p.shape[d];
  const RuleFacts& rule = facts(p.rule);
  char* at[kMaxOperands];
  const bool same = p.operand[0].memory.data == p.operand[1].memory.data;
  for (int k = 0; k < kMaxOperands; ++k)
    at[k] = k == 1 && same ? at[0] : device->mirror(p.operand[k].memory);
  out.param = at[0];
  *grad = at[1];
  out.param_dtype = static_cast<DType>(p.operand[0].dtype);
  out.grad_dtype = static_cast<DType>(p.operand[1].dtype);
  std::vector<const int64_t*> strides{p.operand[0].stride, p.operand[1].stride};
  out.storage = static_cast<ParamStorage>(p.storage);
  for (int k = 0; k < rule.states + (has_companion(out.storage) ? 1 : 0); ++k) {
    out.state[k] = at[2 + k];
    out.state_dtype[k] = static_cast<DType>(p.operand[2 + k].dtype);
    strides.push_back(p.operand[2 + k].stride);
  }
  if (out.storage == ParamStorage::master) std::swap(strides.front(), strides.back());
  const auto merged = [&](const std::vector<const int64_t*>& of) -> const Layout* {
    Layout layout;
    if (!merge_layout(p.ndim, p.shape, of, &layout) || layout.linear()) return nullptr;
    layouts->push_back(layout);
    return &layouts->back();
  };
  out.layout = merged(strides);
  out.grad_layout = merged({strides[1]});
  if (p.by_rows != 0) {
    pysmooth::RowCut& cut = rows->emplace_back();
    cut.of_param(view_of(p, 0), p.ndim, at[0], "parameter");
    cut.of_grad(view_of(p, 1), strides, "gradient");
    out.rows = &cut.shape;
  }
  out.steps = reinterpret_cast<float*>(device->mirror(p.steps, sizeof(float)));
  out.norm_sq = reinterpret_cast<double*>(device->mirror(p.norm_sq, sizeof(double)));
  out.scale = reinterpret_cast<double*>(device->mirror(p.scale, sizeof(double)));
  return out;
}

Settings settings_of(const Config& config) {
  Settings settings;
  settings.scope = static_cast<Scope>(config.scope);
  for (int i = 0; i < kMaxStages; ++i)
    settings.stage_scope[i] = static_cast<Scope>(config.stage_scope[i]);
  settings.policy = static_cast<NonFinite>(config.policy);
  settings.norm_type = config.norm_type;
  settings.always_norm = config.always_norm != 0;
  settings.skip_unit_coef = config.skip_unit_coef != 0;
  settings.multiprocessors = config.multiprocessors;
  settings.select.kind = static_cast<Selector>(config.selector);
  settings.select.scope = static_cast<SelectScope>(config.select_scope);
  settings.select.ratio = config.ratio;
  settings.select.k = config.k;
  settings.select.block = config.block;
  settings.select.scaled = config.scaled != 0;
  settings.select.seed = config.select_seed;
  settings.absorbs = config.absorbs != kNone;
  settings.sites = config.sites;
  settings.spread = config.processes > 0;
  settings.joins = config.stages > 1;
  return settings;
}

// A device with its plan; what is handed to a step lies there.
class Site {
 public:
  Site(Device* device, const std::vector<Tensor>& tensors, const Settings& settings,
       const GroupInput* groups_in, int count, const StepInput& step, int single)
      : plan(tensors, count, settings),
        memory(simt::allocate(plan.bytes(), 0, 0xFF)),
        groups(groups_in, groups_in + count),
        numbers(step),
        device_(device),
        inputs_(simt::allocate((plan.input_bytes() + 7) / 8 * 8, 0, 0xFF)) {
    for (GroupInput& group : groups)
      for (int i = 0; i < kMaxHyper; ++i) {
        const size_t size = (group.hyper_is_double >> i & 1u) != 0 ? 8 : 4;
        group.hyper_at[i] = device->mirror(const_cast<void*>(group.hyper_at[i]), size);
      }
    const auto number = [device](const float* at) {
      return reinterpret_cast<const float*>(device->mirror(const_cast<float*>(at), sizeof(float)));
    };
    numbers.grad_scale = number(step.grad_scale);
    numbers.found_inf = number(step.found_inf);
    if (plan.single_kernel() != nullptr) plan.run_single(single);
  }
  ~Site() {
    simt::release(memory);
    simt::release(inputs_);
  }
  Site(const Site&) = delete;
  Site& operator=(const Site&) = delete;

  bool run(const std::vector<const void*>& grads, int phase) const {
    return cuda::step(plan, memory, inputs_, grads.data(), groups.data(), numbers, nullptr,
                      Part::whole, phase) == 0;
  }
  // Nobody can touch what is here, or all can.
  void shut(bool shut) const {
    device_->shut(shut);
    simt::shut(memory, shut);
    simt::shut(inputs_, shut);
  }
  std::string check() const {
    const std::string wrong = simt::check_surroundings(memory);
    return wrong.empty() ? simt::check_surroundings(inputs_) : wrong;
  }
  char* row(int site) const {
    return static_cast<char*>(memory) + plan.board_at() +
           static_cast<size_t>(site) * plan.board_row_bytes();
  }
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
  }
  template <class T>
  std::vector<T> read(size_t at, size_t count) const {
    std::vector<T> out(count);
    if (count > 0) std::memcpy(out.data(), static_cast<char*>(memory) + at, count * sizeof(T));
    return out;
  }

  DevicePlan plan;
  void* const memory;
  std::vector<GroupInput> groups;
  StepInput numbers;

 private:
  Device* device_;
  void* inputs_;
};

// Numbers of several processes, added up or the largest of each, to all of them.
template <class T>
void reduce_all(const std::vector<T*>& each, size_t count, bool largest) {
  for (size_t i = 0; i < count; ++i) {
    T total = each.front()[i];
    for (size_t s = 1; s < each.size(); ++s)
      total = largest ? std::max(total, each[s][i]) : total + each[s][i];
    for (T* const one : each) one[i] = total;
  }
}

// What processes add up: parts in each stage, units over the stages.
void exchange(const std::deque<Site>& sites, const Launch& meeting, int stages) {
  const auto count = static_cast<size_t>(stages), each = sites.size() / count;
  const bool units = meeting.meets == Meeting::units;
  for (size_t g = 0; g < (units ? each : count); ++g) {
    std::vector<double*> numbers;
    std::vector<uint64_t*> histograms;
    size_t n = static_cast<size_t>(meeting.count);
    for (size_t i = 0; i < (units ? count : each); ++i) {
      const Site& site = sites[units ? i * each + g : g * each + i];
      const DevicePlan& plan = site.plan;
      if (meeting.meets == Meeting::histograms) {
        n = plan.selecting_tensors().size() * kDigits;
        histograms.push_back(site.at<uint64_t>(plan.histograms_at()));
        continue;
      }
      if (!units) n = plan.tensors() * sizeof(PartSum) / sizeof(double);
      numbers.push_back(site.at<double>(units ? plan.joined_at() : plan.parts_at()));
    }
    if (!numbers.empty()) reduce_all(numbers, n, meeting.largest);
    if (!histograms.empty()) reduce_all(histograms, n, false);
  }
}

// All sites, phase by phase; each can touch its own memory alone. They are devices, whose plans
// know all tensors, or processes of so many stages, which have tensors of their own.
bool run_all(const std::deque<Site>& sites, const std::vector<std::vector<const void*>>& grads,
             int stages) {
  const std::vector<Launch> meetings = sites.front().plan.meetings(sites.front().groups.data());
  const auto phases = static_cast<int>(meetings.size()) + 1;
  for (int phase = 0; phase < phases; ++phase) {
    for (size_t i = 0; i < sites.size(); ++i) {
      const Site& one = sites[i];
      for (const Site& other : sites) other.shut(&other != &one);
      const bool ran = one.run(grads[i], phase);
      for (const Site& other : sites) other.shut(false);
      if (!ran) return false;
    }
    if (phase + 1 == phases) break;
    const Launch& meeting = meetings[static_cast<size_t>(phase)];
    if (meeting.meets != Meeting::devices) exchange(sites, meeting, stages);
    for (size_t s = 0; s < sites.size() && meeting.meets == Meeting::devices; ++s)
      for (const Site& other : sites)
        if (&other != &sites[s])
          std::memcpy(other.row(static_cast<int>(s)), sites[s].row(static_cast<int>(s)),
                      other.plan.board_row_bytes());
  }
  return true;
}

}  // namespace

extern "C" {

int rule_count() { return kRules; }
const char* rule_name(int rule) { return facts(rule).name; }
int rule_hypers(int rule) { return facts(rule).hypers; }
const char* rule_hyper(int rule, int i) { return facts(rule).hyper[i]; }
// states, stages, low_states, reads_grad, counts_steps, accumulates, keeps_scale, selects, marks,
// absorbs, scales
void rule_facts(int rule, int* out) {
  const RuleFacts& f = facts(rule);
  const int all[] = {f.states,      f.stages,       static_cast<int>(f.low_states),
                     f.reads_grad,  f.counts_steps, f.accumulates,
                     f.keeps_scale, f.selects,      f.marks,
                     f.absorbs,     f.scales};
  std::copy(std::begin(all), std::end(all), out);
}

// One step. `norms` and `coefs` take as many numbers as there are scope units and parameters,
// `status` four: whether it was skipped, whether a gradient was not finite, how many were kept
// out, which tensor took part in some processes only; `nonfinite` one per parameter. `first` and
// `absorbed` of the parameters are brought up to date. `error`: what was refused, or went wrong.
void emulated_step(const Config* config, Parameter* parameters, int count, GroupInput* groups,
                   StepInput* step, double* norms, double* coefs, int* status, unsigned* nonfinite,
                   char* error) try {
  simt::options() = {static_cast<simt::Order>(config->order), config->seed, config->resident,
                     config->races != 0};
  const bool apart = config->processes > 0;
  std::deque<Device> devices(static_cast<size_t>(apart ? config->processes : config->sites));
  std::deque<Layout> layouts;
  std::deque<pysmooth::RowCut> rows;
  std::vector<Tensor> tensors;
  std::vector<const void*> grads(static_cast<size_t>(count));
  for (int t = 0; t < count; ++t)
    tensors.push_back(describe(parameters[t], &devices[static_cast<size_t>(parameters[t].site)],
                               &layouts, &rows, &grads[static_cast<size_t>(t)]));
  Settings settings = settings_of(*config);
  std::deque<Site> sites;
  std::vector<std::vector<int>> members(devices.size());  // parameters, by process
  for (int t = 0; t < count && apart; ++t)
    members[static_cast<size_t>(parameters[t].site)].push_back(t);
  for (size_t s = 0; s < devices.size(); ++s) {
    std::vector<Tensor> own = tensors;
    if (apart) {
      own.clear();
      for (const int t : members[s]) own.emplace_back(tensors[static_cast<size_t>(t)]).site = 0;
    }
    settings.site = apart ? 0 : static_cast<int>(s);
    sites.emplace_back(&devices[s], own, settings, groups, config->groups, *step, config->single);
  }
  const Site& first = sites.front();
  std::string wrong;
  const auto take_in = [&](int t) {
    const void*& grad = grads[static_cast<size_t>(t)];
    if (grad == nullptr || tensors[static_cast<size_t>(t)].numel == 0) return true;
    const Intake gradient{std::exchange(grad, nullptr), t, config->once,
                          first.groups[static_cast<size_t>(parameters[t].group)]};
    return absorb(first.plan, first.memory, gradient, nullptr) == 0;
  };
  const auto run = [&] {
    for (const Site& site : sites)
      if (upload(site.plan, site.memory, nullptr) != 0) return false;
    for (int t = 0; t < count && settings.absorbs; ++t)
      if (!take_in(t)) return false;
    std::vector<std::vector<const void*>> given(sites.size(), grads);
    for (size_t s = 0; s < sites.size() && apart; ++s) {
      given[s].clear();
      for (const int t : members[s]) given[s].push_back(grads[static_cast<size_t>(t)]);
    }
    return config->absorbs == kTaken || run_all(sites, given, std::max(1, config->stages));
  };
  if (!run()) wrong = error_name(0);
  for (const Site& site : sites)
    if (wrong.empty()) wrong = site.check();
  for (const Device& device : devices) {
    const std::string back = device.copy_back();
    if (wrong.empty()) wrong = back;
  }

  const auto n = static_cast<size_t>(count);
  const auto outcomes = [](const Site& site) {
    const size_t tensors_here = site.plan.tensors();
    const auto numbers = site.read<double>(site.plan.norms_at(), site.plan.units());
    const auto coefs_here = site.read<double>(site.plan.coefs_at(), tensors_here);
    return std::make_tuple(site.read<Status>(site.plan.status_at(), 1), numbers, coefs_here,
                           site.read<unsigned>(site.plan.nonfinite_at(), tensors_here),
                           site.read<int32_t>(site.plan.started_at(), tensors_here));
  };
  auto [told, units, each, bad, started] = outcomes(first);
  const auto same = [](const auto& a, const auto& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  // Of processes, those of one stage know of the same tensors.
  const size_t agree = sites.size() / static_cast<size_t>(std::max(1, config->stages));
  for (size_t s = 0; s < sites.size(); ++s) {
    const auto [its_status, its_units, its_coefs, its_bad, its_started] = outcomes(sites[s]);
    const auto [as_status, as_units, as_coefs, as_bad, as_started] =
        outcomes(sites[s / agree * agree]);
    const bool torn = as_status[0].torn_tensor != 0;  // then they did not begin with the same
    if (wrong.empty() && !torn &&
        !(same(as_status, its_status) && same(as_units, its_units) && same(as_coefs, its_coefs) &&
          same(as_bad, its_bad) && same(as_started, its_started)))
      wrong = apart ? "processes came to different results" : "devices came to different results";
  }
  status[3] = static_cast<int>(told[0].torn_tensor);
  if (apart) {  // parameter by parameter
    each.resize(n), bad.resize(n), started.resize(n);
    for (size_t s = 0; s < sites.size(); ++s) {
      const auto [its_status, its_units, its_coefs, its_bad, its_started] = outcomes(sites[s]);
      for (size_t i = 0; i < members[s].size(); ++i) {
        const auto t = static_cast<size_t>(members[s][i]);
        each[t] = its_coefs[i], bad[t] = its_bad[i], started[t] = its_started[i];
      }
    }
  }
  status[0] = told[0].skip;
  status[1] = told[0].nonfinite;
  status[2] = static_cast<int>(told[0].skipped);
  std::copy(units.begin(), units.end(), norms);
  std::copy(each.begin(), each.end(), coefs);
  std::copy(bad.begin(), bad.end(), nonfinite);
  for (size_t t = 0; t < n; ++t) parameters[t].first = started[t] == 0 ? 1 : 0;
  std::vector<int64_t> taken(n);
  if (settings.absorbs) taken = first.read<int64_t>(first.plan.taken_at(), n);
  for (size_t t = 0; t < n; ++t) parameters[t].absorbed = taken[t];
  std::snprintf(error, 256, "%s", wrong.c_str());
} catch (const std::exception& refusal) {
  std::snprintf(error, 256, "%s", refusal.what());
}
}
