// The DLPack header, wherever it is found, and whose tensors this module takes.
#pragma once

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#else
#include <ATen/dlpack.h>  // torch's copy of the same header
#endif

// pysmooth._cuda is compiled with values of its own (setup.py).
#ifndef PYSMOOTH_BACKEND
#define PYSMOOTH_BACKEND "cpu"
#define PYSMOOTH_DEVICE kDLCPU
#endif
