// The functions that gcc calls before every access of code compiled with -fsanitize=thread. The
// sanitizer's own library is not linked: it knows nothing of fibers, warps and barriers.

#include <cstddef>
#include <cstring>

namespace simt {
void on_access(const void* at, size_t bytes, bool writes);
}

#define SIMT_ACCESS(bytes)                                                           \
  void __tsan_read##bytes(void* at) { simt::on_access(at, bytes, false); }           \
  void __tsan_write##bytes(void* at) { simt::on_access(at, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { simt::on_access(at, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { simt::on_access(at, bytes, true); }

extern "C" {
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) { simt::on_access(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { simt::on_access(at, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
