// Chooses among the ISA levels that the kernels were compiled for.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/run.h"

namespace pysmooth {
namespace {

bool supported(const std::string& isa) {
  if (isa == "baseline") return true;
#if PYSMOOTH_ISA_LEVELS > 1
  __builtin_cpu_init();
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  if (isa == "avx512")
    return supported("avx2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

KernelTable assemble(const char* isa, KernelTable reduce, KernelTable apply, KernelTable source,
                     KernelTable probe, KernelTable codec, KernelTable aggregate) {
  apply.isa = isa;
  apply.reduce = reduce.reduce;
  apply.reduce_rows = reduce.reduce_rows;
  apply.sources = source.sources;
  apply.probe = probe.probe;
  apply.codec = codec.codec;
  apply.aggregate = aggregate.aggregate;
  return apply;
}

KernelTable make(const std::string& isa) {
#define PYSMOOTH_LEVEL(name)                                                       \
  assemble(#name, name::reduce_table(), name::apply_table(), name::source_table(), \
           name::probe_table(), name::codec_table(), name::aggregate_table())
#if PYSMOOTH_ISA_LEVELS > 1
  if (isa == "avx512") return PYSMOOTH_LEVEL(avx512);
  if (isa == "avx2") return PYSMOOTH_LEVEL(avx2);
#endif
  (void)isa;
  return PYSMOOTH_LEVEL(baseline);
#undef PYSMOOTH_LEVEL
}

KernelTable& current() {
  static KernelTable table = [] {
    const char* wanted = std::getenv("PYSMOOTH_ISA");
    if (wanted != nullptr && *wanted != '\0') {
      if (!supported(wanted))
        throw std::invalid_argument(
            std::string("PYSMOOTH_ISA=") + wanted +
            ": unknown, or not supported by this CPU (levels: baseline, avx2, avx512)");
      return make(wanted);
    }
    return make(isa_levels().back());
  }();
  return table;
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> out;
  for (const char* isa : {"baseline", "avx2", "avx512"})
    if (supported(isa)) out.emplace_back(isa);
  return out;
}

const KernelTable& kernels() { return current(); }

void set_isa(const std::string& isa) {
  if (!supported(isa))
    throw std::invalid_argument("isa '" + isa +
                                "': unknown, or not supported by this CPU (levels: baseline, "
                                "avx2, avx512)");
  current() = make(isa);
}

}  // namespace pysmooth
