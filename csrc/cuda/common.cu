// The kernels that know no rule, or all of them.

#include "cuda/admit.cuh"
#include "cuda/board.cuh"
#include "cuda/kernels.h"
#include "cuda/prepare.cuh"
#include "cuda/put.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/scales.cuh"
#include "cuda/spread.cuh"
#include "cuda/units.cuh"

namespace pysmooth::cuda {

template <Reduction kind>
void fill_reduce(KernelTable* table) {
  table->reduce[static_cast<int>(kind)] = generic::reduce<kind>;
  table->conclude[static_cast<int>(kind)] = generic::conclude<kind>;
  table->conclude_parts[static_cast<int>(kind)] = generic::conclude_parts<kind>;
  table->total_parts[static_cast<int>(kind)] = generic::total_parts<kind>;
  table->conclude_units[static_cast<int>(kind)] = generic::conclude_units<kind>;
}

void fill_common(KernelTable* table) {
  fill_reduce<Reduction::sum_squares>(table);
  fill_reduce<Reduction::sum_abs>(table);
  fill_reduce<Reduction::max_abs>(table);
  fill_reduce<Reduction::min_abs>(table);
  fill_reduce<Reduction::count_nonzero>(table);
  fill_reduce<Reduction::sum_power>(table);
  table->row_sums = generic::row_sums;
  table->row_coefs = generic::row_coefs;
  table->prepare = generic::prepare;
  table->publish = generic::publish;
  table->conclude_pass = generic::conclude_pass;
  table->tell_parts = generic::tell_parts;
  table->tell_pass = generic::tell_pass;
  table->conclude_parts_of_pass = generic::conclude_parts_of_pass;
  table->conclude_accumulated = generic::conclude_accumulated;
  table->total_parts_of_pass = generic::total_parts_of_pass;
  table->conclude_units_of_pass = generic::conclude_units_of_pass;
  table->take_digit_of_all = generic::take_digit_of_all;
  table->admit = generic::admit;
  table->scale_blocks = generic::scale_blocks;
  table->begin_select = generic::begin_select;
  table->set_filter = generic::set_filter;
  table->put_few = generic::put<kFewWords>;
  table->put_many = generic::put<kManyWords>;
}

}  // namespace pysmooth::cuda
