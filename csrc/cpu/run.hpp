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

// What shares of the rows of a call add to the gradients of weights: rows of `width` floats.
struct Shares {
    int64_t count, width;
    std::unique_ptr<float[]> sums;

    void add_up(int64_t first, const Matrix& to, int64_t numbers) const {
        if (to.data) chosen().add_up(sums.get() + first, count, width, to, numbers);
    }
};

// Calls run(begin, end, sums, workspace) for shares of the rows. Their number depends on the sizes alone. A
// share of less than NUMBERS numbers is done before another thread has woken up.
template <class Parallel, class Run>
Shares for_shares(const Parallel& parallel, int64_t rows, int64_t numbers, int64_t bytes, int64_t sums_width,
                  const Run& run) {
    constexpr int64_t NUMBERS = 1 << 16, MOST_SUMS = 16;
    int64_t count = rows * numbers / NUMBERS;
    if (sums_width && count > MOST_SUMS) count = MOST_SUMS;
    count = count < 1 ? 1 : count < rows ? count : rows;
    Shares shares{count, sums_width, nullptr};
    if (sums_width) shares.sums.reset(new float[count * sums_width]());
    for_each(parallel, count, bytes, [&](int64_t i, char* memory) {
        float* const sums = sums_width ? shares.sums.get() + i * sums_width : nullptr;
        run(rows * i / count, rows * (i + 1) / count, sums, memory);
    });
    return shares;
}

template <class Parallel>
void run(const Parallel& parallel, const Norm& call) {
    for_shares(
        parallel, call.rows, call.D, 4 * padded(call.D), 0,
        [&](int64_t begin, int64_t end, float*, char* memory) { chosen().norm(call, begin, end, memory); });
}

template <class Parallel>
void run(const Parallel& parallel, const NormBackward& call) {
    const int64_t width = padded(call.D);
    for_shares(parallel, call.rows, call.D, 4 * width, call.dweight.data ? width : 0,
               [&](int64_t begin, int64_t end, float* sums, char* memory) {
                   chosen().norm_backward(call, begin, end, sums, memory);
               })
        .add_up(0, call.dweight, call.D);
}

template <class Parallel>
void run(const Parallel& parallel, const Rotary& call) {
    const int64_t width = padded(call.K);
    const bool sums = call.dweight[0].data || call.dweight[1].data;
    const Shares shares =
        for_shares(parallel, call.B * call.n, (call.H + 2 * call.G) * call.K, 6 * 4 * width,
                   sums ? 2 * width : 0, [&](int64_t begin, int64_t end, float* sums, char* memory) {
                       chosen().rotary(call, begin, end, sums, memory);
                   });
    for (int part = 0; part < 2; ++part) shares.add_up(part * width, call.dweight[part], call.K);
}

template <class Parallel>
void run(const Parallel& parallel, const Gated& call) {
    for_shares(parallel, call.rows, call.I, 1, 0,
               [&](int64_t begin, int64_t end, float*, char*) { chosen().gated(call, begin, end); });
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
