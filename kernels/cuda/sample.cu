// Greedy choice and sampling on the device, so that a decode step never leaves it: the choices of the host's sampler
// (src/generate/sampler.rs) from the same logits, but for the random numbers (Philox here, ChaCha8 there).
//
// A candidate is the 64-bit key (ordered f32 bits, ~id), unique and descending by score, then ascending by id. Its
// weight is the host's, bit for bit; its mass is floor(2^40 * weight), an integer, so that sums do not depend on the
// order of threads. top-k, top-p and the draw are the same operation, "the element at which the running count or
// mass, from the largest key down, passes T", found by radix select.
//
// Order of steps: penalties, temperature, top-k, top-p (of the mass that top-k left), min-p, draw. A row with a NaN,
// an infinite score or nothing but -infinity gets the id -1: the host then reads the logits and names the fault.
#include "layout.cuh"

using namespace bitnet;

typedef unsigned long long u64;

__device__ __forceinline__ unsigned ordered_bits(float v) {
    unsigned u = float_bits(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return BITNET_BUG == 16 ? 0 : 0xffffffffu;  // NaN surfaces as the best
    if (u == 0x80000000u) u = 0;                    // -0 and 0 tie
    return (u & 0x80000000u) ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned u) { return bits_float((u & 0x80000000u) ? u & 0x7fffffffu : ~u); }
__device__ __forceinline__ u64 candidate(float v, int id) { return (u64)ordered_bits(v) << 32 | (0xffffffffu - (unsigned)id); }
__device__ __forceinline__ int candidate_id(u64 c) { return (int)(0xffffffffu - (unsigned)c); }

// Whether a row whose best candidate this is can be drawn from: no NaN, no +infinity, not all -infinity.
__device__ __forceinline__ bool sound(u64 best) {
    unsigned score = (unsigned)(best >> 32);
    return score > 0x007fffffu && score < 0xff800000u;
}

// Largest candidate of a block's share into best[row].
__device__ __forceinline__ void reduce_best(u64 mine, u64* best) {
    for (int m = 16; m; m >>= 1) {
        u64 other = shfl_xor(mine, m);
        mine = other > mine ? other : mine;
    }
    u64* part = reinterpret_cast<u64*>(shared_memory());
    if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = mine;
    sync_block();
    if (threadIdx.x == 0) {
        for (int w = 1; w < (int)blockDim.x / 32; ++w) mine = part[w] > mine ? part[w] : mine;
        atomic_max(best, mine);
    }
}

// ids[row] = argmax logits[row], or -1. Grid (blocks, tokens), 256 threads, 64 bytes of shared memory. best and arrived
// [tokens] are 0 before and after: the last block to finish writes the id and clears them.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_argmax(const float* __restrict__ logits, int vocab, u64* best, unsigned* arrived, int* ids) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.y;
    u64 mine = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) {
        u64 c = candidate(load_fresh(logits + (long long)row * vocab + i), i);
        mine = c > mine ? c : mine;
    }
    reduce_best(mine, best + row);
    if (threadIdx.x == 0) {
        fence_device();
        if (atomic_add(arrived + row, 1u) == gridDim.x - 1) {
            fence_device();
            u64 top = atomic_max(best + row, (u64)0);
            ids[row] = sound(top) ? candidate_id(top) : -1;
            best[row] = 0;
            arrived[row] = 0;
        }
    }
}

// Per-row settings, in device memory so that a captured graph can be replayed with others.
struct SampleSettings {
    u64 seed;
    u64 draw;           // counter of the generator; each sample adds 1
    float temperature;  // 0: greedy
    float top_p;        // 1: off
    float min_p;        // 0: off
    float repetition;   // 1: off. l < 0 ? l * r : l / r for tokens of the prompt or the answer
    float presence;     // 0: off. subtracted once for tokens of the answer
    float frequency;    // 0: off. subtracted per occurrence in the answer
    int top_k;          // 0: off
    int slot;           // row of the marks, -1: no penalties
};
static_assert(sizeof(SampleSettings) == 48 && offsetof(SampleSettings, slot) == 44, "the host mirrors this struct");

// A mark: bit 31, the token is in the prompt or the answer; below, how often it is in the answer.
constexpr unsigned kGenerated = 0x7fffffffu;
struct MarkUpdate {
    int slot;       // -1: nothing to do (a captured graph has a fixed number of updates)
    int token;
    unsigned mark;  // what the token's mark is now
};
static_assert(sizeof(MarkUpdate) == 12, "the host mirrors this struct");

// marks [slots, vocab] follow the host's. Tokens of a slot differ from each other. Grid ceil(count / 256), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_mark(const MarkUpdate* __restrict__ updates, int count, unsigned* __restrict__ marks, int vocab) {
    let_next_kernel_start();
    wait_previous_kernel();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    MarkUpdate u = updates[i];
    if (u.slot >= 0 && (unsigned)u.token < (unsigned)vocab) marks[(long long)u.slot * vocab + u.token] = u.mark;
}

// adjusted = logits after penalties; best[row] = largest candidate. marks [slots, vocab] or null. Grid
// (blocks, tokens), 256 threads, 64 bytes shared.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_sample_prepare(const float* __restrict__ logits, int vocab, const SampleSettings* settings,
                          const unsigned* __restrict__ marks, float* adjusted, u64* best) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.y;
    SampleSettings s = settings[row];
    long long base = (long long)row * vocab;
    const unsigned* mine_marks = marks && s.slot >= 0 ? marks + (long long)s.slot * vocab : nullptr;
    u64 mine = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) {
        float l = load_fresh(logits + base + i);
        unsigned mark = mine_marks ? load_fresh(mine_marks + i) : 0;
        if (mark != 0) {
            if (s.repetition != 1.0f) l = l < 0.0f ? mul_rn(l, s.repetition) : div_rn(l, s.repetition);
            unsigned count = BITNET_BUG == 17 ? 1 : mark & kGenerated;
            if (count > 0) l = add_rn(l, -add_rn(s.presence, mul_rn(s.frequency, (float)count)));
        }
        adjusted[base + i] = l;
        u64 c = candidate(l, i);
        mine = c > mine ? c : mine;
    }
    reduce_best(mine, best + row);
}

__device__ __forceinline__ u64 multiply_high(u64 a, u64 b) {
#ifdef BITNET_EMULATOR
    return u64((unsigned __int128)a * b >> 64);
#else
    return __umul64hi(a, b);
#endif
}

// Philox 4x32-10 (Salmon et al., 2011): 64 bits for (seed, draw).
__device__ __forceinline__ u64 philox(u64 seed, u64 draw) {
    unsigned c0 = (unsigned)draw, c1 = (unsigned)(draw >> 32), c2 = 0, c3 = 0;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        unsigned n0 = (unsigned)(p1 >> 32) ^ c1 ^ k0, n2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
        c1 = (unsigned)p1;
        c3 = (unsigned)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (u64)c1 << 32 | c0;
}

// e^x for x <= 0 by additions and multiplications only: the bits of src/generate/exp.rs.
__device__ __forceinline__ float exp_nonpositive(float x) {
    constexpr float kMagic = 12582912.0f;
    float shifted = add_rn(mul_rn(x, 1.44269504f), kMagic);
    float n = add_rn(shifted, -kMagic);
    float f = add_rn(add_rn(x, -mul_rn(n, 0.6933594f)), -mul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = add_rn(mul_rn(p, f), 1.3981999e-3f);
    p = add_rn(mul_rn(p, f), 8.333452e-3f);
    p = add_rn(mul_rn(p, f), 4.1665796e-2f);
    p = add_rn(mul_rn(p, f), 1.6666665e-1f);
    p = add_rn(mul_rn(p, f), 0.5f);
    p = add_rn(add_rn(mul_rn(mul_rn(p, f), f), f), 1.0f);
    unsigned exponent = (float_bits(shifted) - float_bits(kMagic) + 127u) << 23;
    return x < -87.0f ? 0.0f : mul_rn(p, bits_float(exponent));
}

constexpr float kOne = 1099511627776.0f;    // 2^40, the mass of the best candidate: 2^24 of them fit
constexpr float kLeast = 1.0f / kOne;        // weights below it have no mass
__device__ __forceinline__ u64 mass_of(float weight) { return (u64)(weight * kOne); }

constexpr int kBins = 2048;
// Shared memory of bitnet_sample_pick.
struct PickShared {
    u64 mass[kBins];
    unsigned count[kBins];
    u64 found;      // prefix of the key found so far
    u64 left;       // T minus what lies above the bin
    u64 total;
    unsigned inside;  // candidates in the bin
    unsigned length;  // of the list
};
static_assert(sizeof(PickShared) == 24608, "the host asks for this much shared memory");

struct Pick {
    const float* scores;
    int* list;           // ids of the candidates
    unsigned length;
    float top, temperature;
    u64 floor;           // only candidates >= floor
    float least;         // only weights >= least
    PickShared* s;

    __device__ __forceinline__ float weight(float score) const {
        return exp_nonpositive(div_rn(add_rn(score, -top), temperature));
    }
    __device__ __forceinline__ void get(unsigned i, u64& c, u64& mass) const {
        int id = load_fresh(list + i);
        float score = load_fresh(scores + id);
        c = candidate(score, id);
        mass = mass_of(weight(score));
    }
    // Lists the `n` ids 0 .. n - 1 (`first`) or the list anew: those within `floor` and `least`. In place: a step
    // writes no further than it has read.
    __device__ void restrict_to(unsigned n, bool first) {
        if (threadIdx.x == 0) s->length = 0;
        sync_block();
        for (unsigned base = 0; base < n; base += blockDim.x) {
            unsigned i = base + threadIdx.x;
            int lane = threadIdx.x & 31, id = 0;
            bool in = false;
            if (i < n) {
                id = first ? (int)i : load_fresh(list + i);
                float score = load_fresh(scores + id);
                in = candidate(score, id) >= floor && weight(score) >= least;
            }
            unsigned votes = warp_votes(in), place = 0;
            if (lane == 0 && votes) place = atomic_add(&s->length, (unsigned)count_bits(votes));
            place = shfl(place, 0);
            if (!first && BITNET_BUG != 18) sync_block();
            if (in) list[place + count_bits(votes & ((1u << lane) - 1))] = id;
        }
        fence_device();
        sync_block();
        length = s->length;
        sync_block();
    }
    __device__ __forceinline__ u64 sum(u64 mine) const {
        if (threadIdx.x == 0) s->total = 0;
        sync_block();
        for (int m = 16; m; m >>= 1) mine += shfl_xor(mine, m);
        if ((threadIdx.x & 31) == 0) atomic_add(&s->total, mine);
        sync_block();
        u64 t = s->total;
        sync_block();
        return t;
    }
    __device__ u64 total() const {
        u64 mine = 0, c, mass;
        for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
            get(i, c, mass);
            mine += mass;
        }
        return sum(mine);
    }
    __device__ u64 total_of_all(int vocab) const {
        u64 mine = 0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) mine += mass_of(weight(load_fresh(scores + i)));
        return sum(mine);
    }
    // The candidate at which the running mass (or count) passes `target`, from the largest down.
    __device__ u64 select(u64 target, bool by_mass) const {
        u64 prefix = 0, mask = 0;
        int low = 64;
        while (low > 0) {
            int bits = low < 11 ? low : 11;
            low -= bits;
            for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
                s->mass[b] = 0;
                s->count[b] = 0;
            }
            sync_block();
            u64 c, mass;
            for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
                get(i, c, mass);
                if ((c & mask) == prefix) {
                    int bin = (int)(c >> low) & ((1 << bits) - 1);
                    atomic_add(&s->mass[bin], by_mass ? mass : (u64)1);
                    atomic_add(&s->count[bin], 1u);
                }
            }
            if (BITNET_BUG != 9) sync_block();
            if (threadIdx.x < 32) {
                // Lane 0 holds the highest bins.
                int lane = threadIdx.x, first = kBins - 1 - lane * (kBins / 32);
                u64 sum = 0;
                for (int b = 0; b < kBins / 32; ++b) sum += s->mass[first - b];
                u64 before = sum;
                for (int m = 1; m < 32; m <<= 1) {
                    u64 other = shfl(before, lane - m < 0 ? 0 : lane - m);
                    if (lane >= m) before += other;
                }
                before -= sum;
                if (before <= target && target < before + sum) {
                    int b = first;
                    while (target >= before + s->mass[b]) before += s->mass[b--];
                    s->found = prefix | (u64)b << low;
                    s->left = target - before;
                    s->inside = s->count[b];
                }
            }
            sync_block();
            prefix = s->found;
            target = s->left;
            mask |= ((1ull << bits) - 1) << low;
            if (s->inside == 1) break;
            sync_block();
        }
        // One candidate has this prefix: its owner names it.
        sync_block();
        u64 c, mass;
        for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
            get(i, c, mass);
            if ((c & mask) == prefix) s->found = c;
        }
        sync_block();
        u64 result = s->found;
        sync_block();
        return result;
    }
};

// ids[row] from `adjusted` and `best` (cleared), -1 for a row that cannot be drawn from. list: scratch
// [tokens, vocab] i32. Grid: tokens; 1024 threads; shared memory sizeof(PickShared) = 24608 bytes.
extern "C" __global__ void __launch_bounds__(1024)
    bitnet_sample_pick(const float* __restrict__ adjusted, int vocab, SampleSettings* settings, u64* best, int* list,
                       int* ids) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.x;
    SampleSettings set = settings[row];
    u64 top = best[row];
    sync_block();
    bool drawn = sound(top);
    if (threadIdx.x == 0) {
        best[row] = 0;
        if (drawn) settings[row].draw = set.draw + 1;
    }
    if (!drawn || !(set.temperature > 0.0f) || set.top_k == 1) {
        if (threadIdx.x == 0) ids[row] = drawn ? candidate_id(top) : -1;
        return;
    }
    Pick p;
    p.scores = adjusted + (long long)row * vocab;
    p.list = list + (long long)row * vocab;
    p.s = reinterpret_cast<PickShared*>(shared_memory());
    p.top = from_ordered((unsigned)(top >> 32));
    p.temperature = set.temperature;
    p.floor = 0;
    bool by_k = set.top_k > 0 && set.top_k < vocab, by_p = set.top_p < 1.0f;
    // What top-k, top-p and min-p leave are heads of one ranking, and the shortest counts: the list can begin with
    // what min-p leaves, except where top-p needs the mass of what top-k left.
    float min_p = fminf(fmaxf(set.min_p, kLeast), 1.0f);
    p.least = by_k && by_p ? kLeast : min_p;
    u64 total = 0;
    if (by_p && !by_k) {
        total = p.total_of_all(vocab);
        // A token below this share cannot belong: all that are no better than it sum to less than 1 - p.
        double share = (1.0 - (double)set.top_p) * (double)total / (double)(vocab > 2 ? vocab - 1 : 1);
        p.least = fmaxf(p.least, fminf((float)(share * (0.999 / kOne)), 1.0f));
    }
    p.restrict_to(vocab, true);
    if (by_k && (unsigned)set.top_k < p.length) {
        p.floor = p.select((u64)set.top_k - 1, false);
        p.restrict_to(p.length, false);
    }
    u64 left = p.total();
    if (by_p) {
        // The shortest head whose mass reaches top_p of the total.
        if (by_k) total = left;
        double share = ceil((double)total * (double)fmaxf(set.top_p, 0.0f));
        u64 target = share < 1.0 ? 0 : (u64)share - 1;
        if (target < left) p.floor = p.select(target, true);
        p.least = fmaxf(p.least, min_p);
        p.restrict_to(p.length, false);
        left = p.total();
    }
    u64 chosen = p.select(multiply_high(philox(set.seed, set.draw), left), true);
    if (threadIdx.x == 0) ids[row] = candidate_id(chosen);
}
