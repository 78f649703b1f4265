// The kernels of messages.

#include "cuda/codec_sparse.cuh"
#include "cuda/kernels.h"

namespace pysmooth::cuda {

void fill_codec(KernelTable* table) {
  CodecKernel* const to = table->codec;
  to[kCodeSigns] = generic::code_signs;
  to[kAddUp] = generic::add_up;
  to[kSubtractSigns] = generic::subtract_signs;
  to[kSumSigns] = generic::sum_signs;
  to[kVote] = generic::vote;
  to[kCodeNatural] = generic::code_natural;
  to[kSumNatural] = generic::sum_natural;
  to[kSumSquares] = generic::sum_squares;
  to[kAddUnits] = generic::add_units;
  to[kCodeLevels] = generic::code_levels;
  to[kSumLevels] = generic::sum_levels;
  to[kWeigh] = generic::weigh;
  to[kNarrowDown] = generic::narrow_down;
  to[kCountChosen] = generic::count_chosen;
  to[kEmit] = generic::emit;
  to[kPackNumbers] = generic::pack_numbers;
  to[kScatter] = generic::scatter;
  to[kCountMarks] = generic::count_marks;
  to[kSpread] = generic::spread;
  to[kCombine] = generic::combine;
  to[kPickDrawn] = generic::pick_drawn;
  to[kDropDrawn] = generic::drop_drawn;
}

}  // namespace pysmooth::cuda
