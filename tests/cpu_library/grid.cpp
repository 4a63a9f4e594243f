// Runs csrc/cpu/ without PyTorch on random cases, on one thread and on three, for sanitizers to watch. Every
// tensor has a memory of its own with exactly its size. Prints a hash of all results, which must not depend
// on the number of threads, and the sums of the sizes of those in fp32 and of those in bf16, which hardly
// depend on the instructions.
//
//     grid THREADS CASES
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "run.hpp"

using namespace quietstar;

struct Threads {
    int64_t count;
    int64_t threads() const { return count; }

    template <class Work>
    void operator()(int64_t n, const Work& work) const {
        std::vector<std::thread> running;
        for (int64_t i = 0; i < n; ++i) running.emplace_back([&] { work(); });
        for (std::thread& thread : running) thread.join();
    }
};

struct Random {
    std::mt19937 engine;
    int64_t below(int64_t n) { return (int64_t)(engine() % (uint64_t)n); }
    float normal() { return std::normal_distribution<float>()(engine); }
    template <class T>
    T pick(std::initializer_list<T> choices) {
        return choices.begin()[below((int64_t)choices.size())];
    }
};

struct Memory {
    std::unique_ptr<char[]> data;
    size_t size;
    explicit Memory(size_t bytes) : data(new char[bytes]), size(bytes) {
        memset(data.get(), 0xff, bytes);
    }  // NaN
    char* get() const { return data.get(); }
};

uint64_t hash = 14695981039346656037u;

void add_to_hash(const Memory& memory) {
    for (size_t i = 0; i < memory.size; ++i) hash = (hash ^ (unsigned char)memory.get()[i]) * 1099511628211u;
}

double sizes[2] = {0, 0};

void add_to_sizes(const Memory& memory, Dtype dtype) {
    if (dtype == Dtype::HALF) return;
    const size_t bytes = dtype == Dtype::FLOAT ? 4 : 2;
    for (size_t i = 0; i < memory.size; i += bytes) {
        char number[4] = {};
        memcpy(number + 4 - bytes, memory.get() + i, bytes);
        float x;
        memcpy(&x, number, 4);
        if (std::isfinite(x)) sizes[dtype == Dtype::BFLOAT16] += std::fabs(x);
    }
}

// [B,heads,rows,width], or [B,heads,rows,own,width], contiguous or with the heads inside the rows.
struct Made {
    Memory memory;
    Rows rows;
    Made(Random& random, Dtype dtype, int64_t B, int64_t heads, int64_t count, int64_t own, int64_t width,
         bool fill)
        : memory((size_t)(B * heads * count * own * width) * (dtype == Dtype::FLOAT ? 4 : 2)) {
        const bool inside = own == 1 && random.below(2);
        rows = {memory.get(), heads * count * own * width, inside ? width : count * own * width,
                inside ? heads * width : own * width, own > 1 ? width : 0};
        for (int64_t i = 0; fill && i < B * heads * count * own * width; ++i) {
            const float x = random.normal();
            uint32_t bits;
            memcpy(&bits, &x, 4);
            if (dtype == Dtype::FLOAT)
                memcpy(memory.get() + 4 * i, &x, 4);
            else  // some bf16, or some fp16 below 1
                ((uint16_t*)memory.get())[i] = dtype == Dtype::BFLOAT16
                                                   ? (uint16_t)(bits >> 16)
                                                   : (uint16_t)(bits % 0x3c00 | (bits >> 16 & 0x8000));
        }
    }
};

void check_written(const char* what, const Made& made, Dtype dtype, int seed) {
    const size_t size = dtype == Dtype::FLOAT ? 4 : 2;
    for (size_t i = 0; i < made.memory.size; i += size)
        if (memcmp(made.memory.get() + i, "\xff\xff\xff\xff", size) == 0) {
            fprintf(stderr, "case %d: %s is not written at %zu\n", seed, what, i / size);
            exit(1);
        }
}

void attention(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const int64_t B = 1 + random.below(2), L = random.pick({0, 1, 9, 40, 40, 150}), C = random.below(14);
    const int64_t S = random.pick({1, 2, 5, 14, 20, 140, 300}), G = 1 + random.below(2),
                  heads = random.pick({1, 2, 4});
    const bool packed = random.below(2), full = random.below(3) == 0;
    const int64_t K = random.pick({1, 16, 40, 64, 256}), E = random.pick({1, 16, 24, 64, 256}), H = G * heads;
    const Dtype dtype = random.pick({Dtype::FLOAT, Dtype::FLOAT, Dtype::BFLOAT16, Dtype::HALF});
    const int64_t text_rows = random.below(3) ? L : 0, R = C * S + random.below(2) * random.below(300);
    const int64_t rows = text_rows + R, keys = L + R;

    // Branches may be cut, empty or unused; if packed, no rows are between them, and they may hang on each
    // other.
    const bool trees = packed && random.below(2);
    std::unique_ptr<Node[]> nodes(new Node[B * C]);
    std::unique_ptr<Branch[]> table(new Branch[B * C]);
    std::unique_ptr<int32_t[]> lo(new int32_t[B * L]), of_row(new int32_t[B * R]);
    for (int64_t b = 0; b < B; ++b) {
        const int64_t start = L ? random.below(L) : 0;
        for (int64_t t = 0; t < L; ++t) lo[b * L + t] = (int32_t)(t < start ? 0 : start);
        for (int64_t r = 0; r < R; ++r) of_row[b * R + r] = -1;
        int64_t t = 0, row = 0;
        std::vector<int64_t> path;
        for (int64_t c = 0; c < C; ++c) {
            while (!path.empty() && random.below(2)) path.pop_back();
            if (path.empty()) t += L ? random.below(L / C + 2) : 0;
            const int64_t length = t >= L ? 0 : random.below(3) ? S : random.below(S + 1);
            table[b * C + c] = {t < L ? (int32_t)t : -1, (int32_t)row, (int32_t)length};
            for (int64_t s = 0; s < length; ++s) of_row[b * R + row + s] = (int32_t)c;
            row += packed ? length : S;
            Node& node = nodes[b * C + c] = {0, (int32_t)row, 1, path.empty() ? -1 : (int32_t)path.back()};
            for (int64_t above : path) {
                nodes[b * C + above].end = (int32_t)row;
                node.depth += table[b * C + above].length;
            }
            if (!path.empty()) nodes[b * C + path.back()].leaf = 0;
            if (trees) path.push_back(c);
        }
    }
    std::unique_ptr<float[]> sinks(new float[H]);
    for (int64_t h = 0; h < H; ++h) sinks[h] = random.normal();
    const Layout layout = {
        lo.get(), table.get(), of_row.get(), B, L, C, R, full, trees ? nodes.get() : nullptr};
    const Options options = {0.3f, random.pick<int64_t>({0, 0, 3, 60}), random.pick({0.0f, 0.0f, 2.0f}),
                             random.below(2) ? sinks.get() : nullptr};

    Made q(random, dtype, B, H, rows, 1, K, true), k(random, dtype, B, G, keys, 1, K, true);
    Made v(random, dtype, B, G, keys, 1, E, true), grad(random, dtype, B, H, rows, 1, E, true);
    Made out(random, dtype, B, H, rows, 1, E, false), dq(random, dtype, B, H, rows, 1, K, false);
    Made dk(random, dtype, B, G, keys, 1, K, false), dv(random, dtype, B, G, keys, 1, E, false);
    Memory lse((size_t)(4 * B * H * rows));
    if (random.below(4) == 0 && k.memory.size)
        memset(k.memory.get(), 0xff, dtype == Dtype::FLOAT ? 4 : 2);  // a NaN
    const Threads parallel{threads};

    Forward forward{};
    forward.q = q.rows, forward.k = k.rows, forward.v = v.rows, forward.out = out.rows;
    forward.lse = (float*)lse.get();
    forward.layout = layout, forward.options = options;
    forward.H = H, forward.G = G, forward.K = K, forward.E = E;
    forward.text_rows = text_rows, forward.step = -1, forward.dtype = dtype;
    run(parallel, forward);
    check_written("out", out, dtype, seed);

    Backward backward{};
    const int64_t parts = 1 + random.below(4);
    const bool in_place = parts == 1 && dtype == Dtype::FLOAT && K % 16 == 0 && E % 16 == 0;
    const int64_t own_sums = dtype == Dtype::FLOAT && K % 16 == 0 && E % 16 == 0 ? 0 : trees ? C * S : S;
    Memory sums(
        (size_t)(4 * B * G * parts * (own_sums + (in_place ? 0 : L)) * ((K + 15) / 16 + (E + 15) / 16) * 16));
    Memory dsinks((size_t)(8 * B * G * parts * heads));
    backward.grad_out = grad.rows, backward.q = q.rows, backward.k = k.rows, backward.v = v.rows;
    backward.out = out.rows, backward.dq = dq.rows, backward.dk = dk.rows, backward.dv = dv.rows;
    backward.lse = (float*)lse.get(), backward.sums = (float*)sums.get();
    backward.dsinks = options.sinks ? (double*)dsinks.get() : nullptr;
    backward.layout = layout, backward.options = options;
    backward.H = H, backward.G = G, backward.K = K, backward.E = E;
    backward.text_rows = text_rows, backward.parts = parts, backward.own_sums = own_sums;
    backward.in_place = in_place, backward.dtype = dtype;
    run(parallel, backward);
    check_written("dq", dq, dtype, seed);
    check_written("dk", dk, dtype, seed);
    check_written("dv", dv, dtype, seed);
    for (const Memory* memory : {&out.memory, &lse, &dq.memory, &dk.memory, &dv.memory}) add_to_hash(*memory);
    if (options.sinks) add_to_hash(dsinks);
    for (const Made* made : {&out, &dq, &dk, &dv}) add_to_sizes(made->memory, dtype);

    Made row(random, dtype, B, H, C, 1, K, true), result(random, dtype, B, H, C, 1, E, false);
    Made k_text(random, dtype, B, G, L, 1, K, true), v_text(random, dtype, B, G, L, 1, E, true);
    Made k_own(random, dtype, B, G, C, S, K, true), v_own(random, dtype, B, G, C, S, E, true);
    Forward decode = forward;
    decode.q = row.rows, decode.k = k_text.rows, decode.v = v_text.rows, decode.out = result.rows;
    decode.k_own = k_own.rows, decode.v_own = v_own.rows;
    decode.lse = nullptr, decode.text_rows = 0, decode.step = random.below(S);
    run(parallel, decode);
    check_written("a decode's out", result, dtype, seed);
    add_to_hash(result.memory);
}

void sampling(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const int64_t R = random.pick({0, 1, 30}), V = random.pick({1, 127, 128, 1000});
    Memory logits((size_t)(4 * R * V)), bias((size_t)(4 * V)), counters((size_t)(16 * R));
    Memory ids((size_t)(8 * R)), logprob((size_t)(4 * R));
    for (int64_t i = 0; i < R * V; ++i) ((float*)logits.get())[i] = random.normal();
    for (int64_t i = 0; i < V; ++i) ((float*)bias.get())[i] = random.normal();
    for (int64_t i = 0; i < 4 * R; ++i) ((int32_t*)counters.get())[i] = (int32_t)random.below(1 << 16);
    std::unique_ptr<int64_t[]> banned(new int64_t[1]{V / 2});
    Sample call{};
    call.logits = (float*)logits.get(), call.counters = (int32_t*)counters.get();
    call.bias = random.below(2) ? (float*)bias.get() : nullptr;
    call.banned = banned.get(), call.bans = V > 1 ? random.below(2) : 0;
    call.ids = (int64_t*)ids.get(), call.logprob = (float*)logprob.get();
    call.logits_stride = V, call.counters_stride = 4, call.R = R, call.V = V, call.seed = random.engine();
    call.scale = 0.7f, call.softcap = random.pick({0.0f, 2.0f}),
    call.temperature = random.pick({0.0f, 0.7f, 1.0f});
    run(Threads{threads}, call);
    for (int64_t r = 0; r < R; ++r)
        if (((int64_t*)ids.get())[r] < 0 || ((int64_t*)ids.get())[r] >= V) exit(2);
    add_to_hash(ids);
    add_to_hash(logprob);
}

// Rows of one matrix.
struct Table {
    Made made;
    Matrix matrix;
    Table(Random& random, Dtype dtype, int64_t rows, int64_t width, bool fill)
        : made(random, dtype, 1, 1, rows, 1, width, fill), matrix{made.memory.get(), width, dtype} {}

    void check(const char* what, int seed) const {
        check_written(what, made, matrix.dtype, seed);
        add_to_hash(made.memory);
        add_to_sizes(made.memory, matrix.dtype);
    }
};

void norms(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const auto any = [&] { return random.pick({Dtype::FLOAT, Dtype::BFLOAT16, Dtype::HALF}); };
    const bool same = random.below(2);
    const Dtype dtype = any(), other = same ? dtype : any(), of_out = same ? dtype : any();
    const int64_t rows = random.pick({0, 1, 5, 300}), D = random.pick({1, 7, 64, 100, 1030});
    const Table x(random, dtype, rows, D, true), delta(random, other, rows, D, true);
    const Table weight(random, any(), 1, D, true), grad(random, of_out, rows, D, true);
    const Table total(random, dtype, rows, D, false), out(random, of_out, rows, D, false);
    const Table dx(random, dtype, rows, D, false), ddelta(random, other, rows, D, false);
    const Table dweight(random, weight.matrix.dtype, 1, D, false), rstd(random, Dtype::FLOAT, rows, 1, false);
    float* const stds = (float*)rstd.matrix.data;
    run(Threads{threads},
        Norm{x.matrix, delta.matrix, weight.matrix, total.matrix, out.matrix, stds, rows, D, 1e-3f, 1.0f});
    run(Threads{threads},
        NormBackward{grad.matrix, random.below(2) ? x.matrix : Matrix{}, total.matrix, weight.matrix,
                     dx.matrix, ddelta.matrix, dweight.matrix, stds, rows, D, 1.0f});
    for (const Table* table : {&total, &out, &rstd, &dx, &ddelta, &dweight}) table->check("a norm", seed);
}

void rotations(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const auto any = [&] { return random.pick({Dtype::FLOAT, Dtype::BFLOAT16, Dtype::HALF}); };
    const Dtype dtype = any(), of_cos = any(), of_sin = any();
    const int64_t B = 1 + random.below(2), n = random.pick({0, 1, 5, 400}), S = random.pick({1, 3});
    const int64_t H = random.pick({1, 4}), G = random.pick({1, 2}), K = random.pick({1, 6, 7, 12, 64});
    const Made q(random, dtype, B, H, n, 1, K, true), k(random, dtype, B, G, n, 1, K, true);
    const Made q_out(random, dtype, B, H, n, 1, K, false), dq(random, dtype, B, H, n, 1, K, false);
    const Made k_out(random, dtype, B, G, n, S, K, false), v_out(random, dtype, B, G, n, S, K, false);
    const Made dk(random, dtype, B, G, n, 1, K, false), dv(random, dtype, B, G, n, 1, K, false);
    const Made cos(random, of_cos, B, 1, n, 1, K, true), sin(random, of_sin, B, 1, n, 1, K, true);
    const Table weight(random, any(), 1, K, true), dweight(random, any(), 1, K, false);
    Rotary call{};
    call.from[0] = q.rows, call.from[1] = call.from[2] = k.rows;
    call.to[0] = q_out.rows, call.to[1] = k_out.rows, call.to[2] = v_out.rows;
    call.cos = cos.rows, call.sin = sin.rows;
    call.weight[random.below(2)] = weight.matrix;
    call.B = B, call.n = n, call.H = H, call.G = G, call.K = K, call.step = S - 1;
    call.eps = 1e-3f, call.offset = 1, call.dtype = dtype, call.cos_dtype = of_cos, call.sin_dtype = of_sin;
    run(Threads{threads}, call);
    call.x[0] = q.rows, call.x[1] = k.rows;
    call.to[0] = dq.rows, call.to[1] = dk.rows, call.to[2] = dv.rows;
    call.dweight[call.weight[0].data ? 0 : 1] = dweight.matrix;
    call.step = 0, call.back = true;
    run(Threads{threads}, call);
    for (const Made* made : {&q_out, &dq, &dk, &dv}) check_written("a rotation", *made, dtype, seed);
    for (const Made* made : {&q_out, &k_out, &v_out, &dq, &dk, &dv}) {
        add_to_hash(made->memory);
        add_to_sizes(made->memory, dtype);
    }
    dweight.check("a head norm's gradient", seed);
}

void gates(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const Dtype dtype = random.pick({Dtype::FLOAT, Dtype::BFLOAT16, Dtype::HALF});
    const int64_t rows = random.pick({0, 1, 5, 300}), I = random.pick({1, 7, 64, 1000});
    const Table both(random, dtype, rows, 2 * I, true), grad(random, dtype, rows, I, true);
    const Table out(random, dtype, rows, I, false), d(random, dtype, rows, 2 * I, false);
    const auto second = [&](Matrix x) {
        return Matrix{x.data + I * (dtype == Dtype::FLOAT ? 4 : 2), x.stride, dtype};
    };
    const bool gelu = random.below(2);
    run(Threads{threads}, Gated{both.matrix, second(both.matrix), {}, out.matrix, {}, rows, I, gelu});
    run(Threads{threads},
        Gated{both.matrix, second(both.matrix), grad.matrix, d.matrix, second(d.matrix), rows, I, gelu});
    out.check("an activation", seed);
    d.check("an activation's gradient", seed);
}

void peaks(int seed, int64_t threads) {
    Random random{std::mt19937((uint32_t)seed)};
    const int64_t items = random.below(4), numbers = items * PEAK_NUMBERS, bytes = random.below(1 << 14);
    Memory sums((size_t)(4 * numbers)), from((size_t)bytes), to((size_t)bytes);
    for (int64_t i = 0; i < numbers; ++i) ((float*)sums.get())[i] = random.normal();
    for (int64_t i = 0; i < bytes; ++i) from.get()[i] = (char)random.below(256);
    run(Threads{threads}, MultiplyAdds{(float*)sums.get(), items, random.below(20)});
    run(Threads{threads}, Copy{to.get(), from.get(), bytes});
    if (memcmp(to.get(), from.get(), (size_t)bytes) != 0) exit(3);
    add_to_hash(sums);
    add_to_sizes(sums, Dtype::FLOAT);
}

int main(int, char** words) {
    const int64_t threads = atoll(words[1]);
    for (int seed = 0; seed < atoi(words[2]); ++seed) {
        attention(seed, threads);
        sampling(seed, threads);
        norms(seed, threads);
        rotations(seed, threads);
        gates(seed, threads);
        peaks(seed, threads);
    }
    printf("%s %016llx %.9g %.9g\n", chosen().name, (unsigned long long)hash, sizes[0], sizes[1]);
}
