// Runs the items of a call on threads. `parallel(n, work)` calls work() about n times at once, and has
// `threads()`: PyTorch's in bindings.cpp, that of the tests in tests/cpu_library/.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "choose.hpp"
#include "cut.hpp"

namespace quietstar {

// A thread's workspace, which it keeps for its next call.
inline char* workspace(int64_t bytes) {
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<char, Free> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!memory) throw std::bad_alloc();
        size = bytes;
    }
    return memory.get();
}

// Calls run(i, workspace) for i from 0 to count - 1. Threads take the next item when they are done with one,
// so that a thread whose core is busy with something else takes fewer.
template <class Parallel, class Run>
void for_each(const Parallel& parallel, int64_t count, int64_t bytes, const Run& run) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const int64_t threads = parallel.threads();
    parallel(count < threads ? count : threads, [&] {
        try {  // no exception may cross the stable ABI
            char* const memory = workspace(bytes);
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(i, memory);
        } catch (const std::exception&) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

template <class Parallel>
void run(const Parallel& parallel, const Forward& call) {
    const Kernels& kernels = chosen();
    const Cut cut(call.layout, call.H / call.G, call.G, call.text_rows, call.step >= 0, TILE);
    const std::vector<Piece> pieces = cut.pieces();
    for_each(parallel, (int64_t)pieces.size() * call.G, kernels.forward_bytes,
             [&](int64_t item, char* memory) {
                 kernels.forward(call, pieces[item / call.G], item % call.G, memory);
             });
}

template <class Parallel>
void run(const Parallel& parallel, Backward call) {
    const Kernels& kernels = chosen();
    const Cut cut(call.layout, call.H / call.G, call.G, call.text_rows, false, BACKWARD_TILE);
    call.units = cut.units.data(), call.first_unit = cut.first.data(), call.tile = cut.tile;
    const int64_t pairs = call.layout.B * call.G;
    // The last of a head's parts to end adds them up.
    const std::unique_ptr<std::atomic<int64_t>[]> ended(new std::atomic<int64_t>[pairs]());
    for_each(parallel, pairs * call.parts, kernels.backward_bytes, [&](int64_t item, char* memory) {
        kernels.backward(call, item, memory);
        const int64_t pair = item % pairs;
        if (ended[pair].fetch_add(1, std::memory_order_acq_rel) + 1 == call.parts) kernels.finish(call, pair);
    });
}

template <class Parallel>
void run(const Parallel& parallel, const Sample& call) {
    constexpr int64_t ROWS = 8;  // of an item
    for_each(parallel, (call.R + ROWS - 1) / ROWS, 1, [&](int64_t item, char*) {
        for (int64_t r = item * ROWS; r < call.R && r < (item + 1) * ROWS; ++r) chosen().sample(call, r);
    });
}

template <class Parallel>
void run(const Parallel& parallel, const MultiplyAdds& call) {
    for_each(parallel, call.items, 1, [&](int64_t item, char*) {
        chosen().multiply_adds(call.numbers + item * PEAK_NUMBERS, call.rounds);
    });
}

// A large share for each thread, as memcpy goes past the caches only then.
template <class Parallel>
void run(const Parallel& parallel, const Copy& call) {
    const int64_t shares = parallel.threads();
    for_each(parallel, shares, 1, [&](int64_t item, char*) {
        const int64_t begin = call.bytes * item / shares, end = call.bytes * (item + 1) / shares;
        std::memcpy(call.to + begin, call.from + begin, end - begin);
    });
}

}  // namespace quietstar
