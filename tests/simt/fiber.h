// Stacks of their own that hand the processor to each other.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStack = 128 << 10;

#if defined(__x86_64__)

// Some 5 ns, where swapcontext asks the system for its signal mask.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void simt_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".globl simt_switch\n"
    ".hidden simt_switch\n"
    "simt_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");

inline void start(Context* context, void* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + kStack);
  *--top = 0;  // where entry would return to; it does not. Keeps the stack aligned.
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context->stack_pointer = top;
}
inline void switch_to(Context* from, Context* to) {
  simt_switch(&from->stack_pointer, to->stack_pointer);
}

#else

struct Context {
  ucontext_t inner;
};
inline void start(Context* context, void* stack, void (*entry)()) {
  getcontext(&context->inner);
  context->inner.uc_stack.ss_sp = stack;
  context->inner.uc_stack.ss_size = kStack;
  context->inner.uc_link = nullptr;
  makecontext(&context->inner, entry, 0);
}
inline void switch_to(Context* from, Context* to) { swapcontext(&from->inner, &to->inner); }

#endif

inline void* new_stack() {
  void* const at = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) std::abort();
  return at;
}

}  // namespace simt
