// Memory that Python named by its address.
#pragma once

#include <cstdint>

namespace pysmooth {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

}  // namespace pysmooth
