// A block of CUDA threads as fibers that take turns on the caller's thread: one runs until it waits at a
// barrier that others have not reached; then the next one that can continue runs. If none can, the launch
// ends with an error.
//
// Undefined behaviour becomes visible: shared memory starts as NaN and has its exact size, and with
// QUIETSTAR_SCAN=backward blocks and threads run in the opposite order. For TSan each fiber is a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.hpp"

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace quietstar::emulation {

struct Barrier {
    int members = 0, arrived = 0;
    int first = 0;  // of its threads, in the order in which they run
    unsigned generation = 0;
    char tags[2] = {};  // TSan's, by the parity of the generation
};

enum Operation { SYNC, SHUFFLE, BALLOT, LDMATRIX, MMA };

// What the lanes exchange. There are two slots, since a lane may already deposit for the next operation.
struct Warp {
    static constexpr int WORDS = 12;

    Barrier barrier;
    Operation operation = SYNC;  // of the lane that came first
    uint32_t slots[2][WARP][WORDS];
};

using Deposits = const uint32_t (*)[Warp::WORDS];  // [lane][word]

struct Copy {
    unsigned char* to;
    const void* from;
    bool on;
    int group;
};

struct Fiber {
    Place place;
    const Barrier* waits_at = nullptr;  // null: it can run
    unsigned generation = 0;
    bool ended = false;
    std::vector<Copy> copies;  // that were started and not yet waited for
    int groups = 0;            // of copies, committed so far
};

struct Block {
    dim3 grid, index;
    int threads, running = 0, ended = 0;
    int next = 1;  // in the order in which threads run: those before it all wait, have ended, or run
    bool backward;
    Fiber* fibers = nullptr;
    Warp* warps = nullptr;
    Barrier barrier;
    unsigned char* shared = nullptr;
    std::function<void()> kernel;
    const char* error = nullptr;
    Place host;
    char start = 0, end = 0;  // TSan's tags

    ~Block() { std::free(shared); }
};

inline thread_local Block* block = nullptr;

struct ThreadIndex {
    unsigned x;
};

EMULATION_INTERNAL inline ThreadIndex thread_index() { return {static_cast<unsigned>(block->running)}; }
EMULATION_INTERNAL inline dim3 block_index() { return block->index; }
EMULATION_INTERNAL inline dim3 block_size() { return block->threads; }
EMULATION_INTERNAL inline dim3 grid_size() { return block->grid; }
EMULATION_INTERNAL inline Barrier& block_barrier() { return block->barrier; }
EMULATION_INTERNAL inline Fiber* me() { return block->fibers + block->running; }

// Ends the launch with an error.
EMULATION_INTERNAL inline void fail(const char* text) {
    block->error = text;
    switch_places(me()->place, block->host);
}

// Continues with the first thread that can run, so that one warp gets as far ahead of the others as possible,
// or with the host when all have ended.
EMULATION_INTERNAL inline void run_another() {
    Block& b = *block;
    Fiber* from = me();
    if (b.ended == b.threads) return switch_places(from->place, b.host);
    while (b.next < b.threads) {
        b.running = b.backward ? b.threads - 1 - b.next : b.next;
        ++b.next;
        Fiber* to = me();
        if (!to->ended && (!to->waits_at || to->waits_at->generation != to->generation)) {
            return switch_places(from->place, to->place);
        }
    }
    switch_places(from->place, b.host);
}

EMULATION_INTERNAL inline void wait(Barrier& barrier, [[maybe_unused]] bool orders_memory) {
    const unsigned generation = barrier.generation;
#ifdef __SANITIZE_THREAD__
    if (orders_memory) __tsan_release(&barrier.tags[generation % 2]);
#endif
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
        if (barrier.first < block->next) block->next = barrier.first;
    } else {
        Fiber* fiber = me();
        fiber->waits_at = &barrier;
        fiber->generation = generation;
        run_another();
        fiber->waits_at = nullptr;
    }
#ifdef __SANITIZE_THREAD__
    if (orders_memory) __tsan_acquire(&barrier.tags[generation % 2]);
#endif
}

// All lanes of a warp meet in one operation, and see what each deposits.
EMULATION_INTERNAL inline Deposits meet(Operation operation, const uint32_t* words = nullptr, int count = 0) {
    Warp& warp = block->warps[block->running / WARP];
    if (warp.barrier.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of one warp meet in different operations");
    auto* slot = warp.slots[warp.barrier.generation % 2];
    for (int i = 0; i < count; ++i) slot[block->running % WARP][i] = words[i];
    wait(warp.barrier, operation == SYNC);
    return slot;
}

// What a fiber does.
EMULATION_INTERNAL inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
    Place& host = block->host;
    const bool first = host.bottom == nullptr;
    __sanitizer_finish_switch_fiber(nullptr, first ? &host.bottom : nullptr, first ? &host.size : nullptr);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(&block->start);
#endif
    block->kernel();
    if (!me()->copies.empty()) fail("a thread ends before its copies do");
#ifdef __SANITIZE_THREAD__
    __tsan_release(&block->end);
#endif
    me()->ended = true;
    ++block->ended;
    run_another();
}

inline void run_block(Block& b, std::vector<std::unique_ptr<Stack>>& stacks, size_t shared_bytes) {
    if (posix_memalign(reinterpret_cast<void**>(&b.shared), 1024, shared_bytes)) throw std::bad_alloc();
    std::memset(b.shared, 0xff, shared_bytes);
    const auto fibers = std::make_unique<Fiber[]>(b.threads);
    const auto warps = std::make_unique<Warp[]>(b.threads / WARP);
    b.fibers = fibers.get();
    b.warps = warps.get();
    b.barrier.members = b.threads;
    b.running = b.backward ? b.threads - 1 : 0;
    block = &b;
    for (int i = 0; i < b.threads / WARP; ++i) {
        b.warps[i].barrier.members = WARP;
        b.warps[i].barrier.first = b.backward ? b.threads - WARP * (i + 1) : WARP * i;
    }
    for (int i = 0; i < b.threads; ++i) begin(b.fibers[i].place, *stacks[i], run_thread);
#ifdef __SANITIZE_THREAD__
    b.host.tsan_thread = __tsan_get_current_fiber();
    __tsan_release(&b.start);
#endif
    switch_places(b.host, me()->place);
    block = nullptr;
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(&b.end);
#endif
    if (b.ended < b.threads && !b.error) b.error = "deadlock: a barrier that not all threads reach";
    if (b.error) {
        stacks.clear();  // their fibers are in the middle of a kernel
        throw std::runtime_error(b.error);
    }
}

// Runs `kernel` in every thread of every block. Throws std::runtime_error if it breaks a rule.
inline void run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    static thread_local std::vector<std::unique_ptr<Stack>> stacks;
    if (threads % WARP) throw std::runtime_error("a block is made of whole warps");
    while (static_cast<int>(stacks.size()) < threads) stacks.push_back(std::make_unique<Stack>());
    const char* scan = std::getenv("QUIETSTAR_SCAN");
    const bool backward = scan != nullptr && std::string(scan) == "backward";
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned j = backward ? blocks - 1 - i : i;
        const auto b = std::make_unique<Block>();  // on the heap, since TSan would report races on this stack
        b->grid = grid;
        b->index = {j % grid.x, j / grid.x % grid.y, j / grid.x / grid.y};
        b->threads = threads;
        b->backward = backward;
        b->kernel = kernel;
        run_block(*b, stacks, shared_bytes);
    }
}

}  // namespace quietstar::emulation
