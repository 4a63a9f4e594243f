// Fibers: stacks that one operating-system thread runs in turns, and what the sanitizers need to know about
// them.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// For the emulation's own functions: TSan should not watch their memory, and ASan should not guard their
// frames.
#define EMULATION_INTERNAL __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))

namespace quietstar::emulation {

// A stack, used by one fiber after another, with a guard page below it.
class Stack {
  public:
    static constexpr size_t PAGE = 4096, SIZE = 64 * PAGE;

    Stack()
        : memory_(mmap(nullptr, SIZE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (memory_ == MAP_FAILED || mprotect(memory_, PAGE, PROT_NONE)) throw std::bad_alloc();
#ifdef __SANITIZE_THREAD__
        tsan_thread = __tsan_create_fiber(0);
#endif
    }
    Stack(const Stack&) = delete;
    ~Stack() {
#ifdef __SANITIZE_THREAD__
        __tsan_destroy_fiber(tsan_thread);
#endif
        munmap(memory_, SIZE + PAGE);
    }

    char* bottom() const { return static_cast<char*>(memory_) + PAGE; }

    void* tsan_thread = nullptr;

  private:
    void* memory_;
};

#ifdef __x86_64__
// Where to continue: the registers that a function must preserve are on the stack that `top` points to.
struct Context {
    void* top = nullptr;

    EMULATION_INTERNAL void start(char* bottom, size_t size, void (*entry)()) {
        // At `entry` the stack is 8 bytes off a multiple of 16, as after a call.
        auto** words = reinterpret_cast<void**>(bottom + size) - 2;
        *words = reinterpret_cast<void*>(entry);
        std::fill(words - 6, words, nullptr);
        top = words - 6;
    }
};

__attribute__((naked, noinline)) inline void jump(Context* /*save*/, const Context* /*to*/) {
    asm volatile(
        "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}
#else  // seven times slower: two system calls each time
struct Context {
    ucontext_t state;

    void start(char* bottom, size_t size, void (*entry)()) {
        getcontext(&state);
        state.uc_stack = {bottom, 0, size};
        state.uc_link = nullptr;
        makecontext(&state, entry, 0);
    }
};

inline void jump(Context* save, const Context* to) { swapcontext(&save->state, &to->state); }
#endif

// A fiber, or the host that started them: where it continues, and its names for the sanitizers.
struct Place {
    Context context;
    const void* bottom = nullptr;
    size_t size = 0;
    void* asan_frames = nullptr;
    void* tsan_thread = nullptr;
};

// Makes a fiber start with `entry`, which never returns.
inline void begin(Place& place, const Stack& stack, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stack.bottom(), Stack::SIZE);
#endif
    place.bottom = stack.bottom();
    place.size = Stack::SIZE;
    place.tsan_thread = stack.tsan_thread;
    place.context.start(stack.bottom(), Stack::SIZE, entry);
}

EMULATION_INTERNAL inline void switch_places(Place& from, Place& to) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan_thread, 1);  // 1: the switch orders no memory
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.asan_frames, to.bottom, to.size);
#endif
    jump(&from.context, &to.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.asan_frames, nullptr, nullptr);
#endif
}

}  // namespace quietstar::emulation
