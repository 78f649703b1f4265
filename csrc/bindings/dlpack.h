// The DLPack header, wherever it is found.
#pragma once

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#else
#include <ATen/dlpack.h>  // torch's copy of the same header
#endif
