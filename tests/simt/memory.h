// Where kernels' memory lies: one range of addresses, so that one comparison tells it from stacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

constexpr size_t kPage = 4096;
constexpr size_t kArena = size_t{1} << 36;

// The whole range; no page of it can be touched unless it was handed out.
char* arena();
inline bool in_arena(const void* at) {
  return static_cast<size_t>(static_cast<const char*>(at) - arena()) < kArena;
}

}  // namespace simt
