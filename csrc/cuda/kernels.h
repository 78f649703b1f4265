// The kernels, by rule and by how operands lie in registers. Filled in by the files that hold them.
#pragma once

#include "core/rules.h"
#include "core/streams.h"
#include "cuda/codec.h"
#include "cuda/plan.h"

namespace pysmooth::cuda {

template <class... R>
constexpr int count_of(generic::RuleList<R...>) {
  return sizeof...(R);
}
constexpr int kRules = count_of(generic::Rules{});

// Numbers that a kernel carries with it, to be written to device memory.
template <int kWords>
struct Payload {
  uint64_t word[kWords];
};
constexpr int kFewWords = 480, kManyWords = 4000;
template <int kWords>
using PutKernel = void (*)(uint64_t* at, int words, Payload<kWords> payload);

// The same in a launch that has more to do. `words`: 0 where there is nothing to write. With a
// kernel's other parameters it stays below the 4 KB that every driver takes.
constexpr int kCarriedWords = 384;
struct Carried {
  uint64_t* at;
  int words;
  Payload<kCarriedWords> payload;
};
static_assert(sizeof(View) + 2 * sizeof(Work) + sizeof(Carried) <= 4096);
using SingleKernel = void (*)(View plan, Work reducing, Work applying, Carried carried);

struct KernelTable {
  Kernel reduce[kReductions];
  Kernel row_sums, row_coefs;
  Kernel prepare;
  // Between devices, where tensors lie on several.
  Kernel publish, conclude[kReductions], conclude_pass;
  // Between processes, where tensors are parts of larger ones.
  Kernel tell_parts, tell_pass, conclude_parts[kReductions], conclude_parts_of_pass;
  Kernel total_parts[kReductions], conclude_units[kReductions], conclude_accumulated;
  Kernel total_parts_of_pass, conclude_units_of_pass, take_digit_of_all;
  Kernel source[kRules][kMaxStages][kAccesses];
  Kernel apply[kRules][kAccesses];
  SingleKernel single[kRules][kAccesses];  // of rules that have no pass before apply
  // Of rules that absorb: what takes a gradient in, and pass 0 where the states have it.
  AbsorbKernel admit;
  Kernel take_in[kRules][kAccesses], absorbed[kRules][kAccesses];
  // Where every block is scaled by itself: what makes the scales, and all that needs them.
  Kernel scale_blocks;
  Kernel source_blocks[kRules][kMaxStages][kAccesses];
  Kernel absorbed_blocks[kRules][kAccesses], apply_blocks[kRules][kAccesses];
  Kernel begin_select, set_filter;
  // Of the passes that are selected from.
  using Selecting = Kernel[kRules][kMaxSelections][kAccesses];
  Selecting sample, narrow, selected, select_block;
  PutKernel<kFewWords> put_few;
  PutKernel<kManyWords> put_many;
  CodecKernel codec[kCodecKernels];
};

void fill_common(KernelTable* table);
void fill_codec(KernelTable* table);
// Rules are compiled in several parts: rule r belongs to part r modulo kParts.
constexpr int kParts = 4;
void fill_part_0(KernelTable* table);
void fill_part_1(KernelTable* table);
void fill_part_2(KernelTable* table);
void fill_part_3(KernelTable* table);

inline const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable out{};
    fill_common(&out);
    fill_codec(&out);
    fill_part_0(&out);
    fill_part_1(&out);
    fill_part_2(&out);
    fill_part_3(&out);
    return out;
  }();
  return table;
}

}  // namespace pysmooth::cuda
