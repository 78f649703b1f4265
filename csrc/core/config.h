// Macros shared by everything in csrc.
//
// PYSMOOTH_ISA names the instruction-set level that a kernel translation unit is compiled for.
// Every inline function that a kernel uses lives in a namespace of that name: the linker merges
// inline functions of equal name, and without this it could hand AVX-512 code to a CPU that has
// none.
#pragma once

#if defined(__CUDACC__)
#define PYSMOOTH_HD __host__ __device__ __forceinline__
#else
#define PYSMOOTH_HD inline __attribute__((always_inline))
#endif

#ifndef PYSMOOTH_ISA
#define PYSMOOTH_ISA generic
#endif

#define PYSMOOTH_KERNELS_BEGIN \
  namespace pysmooth {         \
  namespace PYSMOOTH_ISA {
#define PYSMOOTH_KERNELS_END \
  }                          \
  }
