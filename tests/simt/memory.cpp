#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {
namespace {

struct Block {
  char* pages;  // between them and the neighbours' lies a page that cannot be touched
  size_t length;
  size_t bytes;
};
constexpr unsigned char kCanary = 0xA5;

std::map<void*, Block>& blocks() {
  static std::map<void*, Block> all;
  return all;
}
std::map<size_t, std::vector<char*>>& spare() {
  static std::map<size_t, std::vector<char*>> all;
  return all;
}

char* pages_of(size_t length) {
  static size_t used = kPage;
  std::vector<char*>& same = spare()[length];
  if (!same.empty()) {
    char* const out = same.back();
    same.pop_back();
    return out;
  }
  char* const out = arena() + used;
  used += length + kPage;
  if (used > kArena || mprotect(out, length, PROT_READ | PROT_WRITE) != 0) std::abort();
  return out;
}

}  // namespace

char* arena() {
  static char* const base = [] {
    void* const at =
        mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::abort();
    return static_cast<char*>(at);
  }();
  return base;
}

void* allocate(size_t bytes, size_t offset, int fill) {
  const size_t length = (bytes + 32 + kPage - 1) / kPage * kPage;
  char* const pages = pages_of(length);
  std::memset(pages, kCanary, length);
  size_t at = length - bytes;
  while (at % 16 != offset % 16) --at;
  std::memset(pages + at, fill, bytes);
  blocks()[pages + at] = {pages, length, bytes};
  return pages + at;
}

std::string check_surroundings(void* block) {
  const Block& b = blocks().at(block);
  const char* const begin = static_cast<char*>(block);
  for (const char* p = b.pages; p < b.pages + b.length; ++p) {
    if (p == begin) p += b.bytes;
    if (p < b.pages + b.length && static_cast<unsigned char>(*p) != kCanary)
      return "written " + (p < begin ? std::to_string(begin - p) + " bytes before a buffer"
                                     : std::to_string(p - begin - static_cast<long>(b.bytes)) +
                                           " bytes behind a buffer");
  }
  return "";
}

void shut(void* block, bool shut) {
  const Block& b = blocks().at(block);
  if (mprotect(b.pages, b.length, shut ? PROT_NONE : PROT_READ | PROT_WRITE) != 0) std::abort();
}

void release(void* block) {
  const Block b = blocks().at(block);
  blocks().erase(block);
  spare()[b.length].push_back(b.pages);
}

}  // namespace simt
