// Greedy choice and sampling on the device, so that a decode step never leaves it.
//
// Everything after the logits is integer arithmetic in an order that does not matter: a candidate is the 64-bit
// key (ordered f32 bits, ~id), unique and descending by value, then ascending by id; its mass is
// floor(2^32 * exp(l - max)). top-k, top-p and the draw are the same operation, "the element at which the running
// count or mass, from the largest key down, passes T", found by radix select. Ties go to the lowest id.
//
// Order of steps: penalties, temperature, top-k, top-p (of the mass that top-k left), min-p, draw.
#include "layout.cuh"

using namespace bitnet;

typedef unsigned long long u64;

__device__ __forceinline__ unsigned ordered_bits(float v) {
    unsigned u = float_bits(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0;  // NaN never wins
    if (u == 0x80000000u) u = 0;                    // -0 and 0 tie
    return (u & 0x80000000u) ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned u) { return bits_float((u & 0x80000000u) ? u & 0x7fffffffu : ~u); }
__device__ __forceinline__ u64 candidate(float v, int id) { return (u64)ordered_bits(v) << 32 | (0xffffffffu - (unsigned)id); }
__device__ __forceinline__ int candidate_id(u64 c) { return (int)(0xffffffffu - (unsigned)c); }

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

// ids[row] = argmax logits[row]. Grid (blocks, tokens), 256 threads, 64 bytes of shared memory. best and arrived
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
            ids[row] = candidate_id(atomic_max(best + row, (u64)0));
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
    float repetition;   // 1: off. l > 0 ? l / r : l * r for tokens seen
    float presence;     // 0: off. subtracted once for tokens seen
    float frequency;    // 0: off. subtracted per occurrence
    int top_k;          // 0: off
    int unused;
};
static_assert(sizeof(SampleSettings) == 48, "the host mirrors this struct");

// adjusted = logits after penalties and temperature; best[row] = largest candidate. counts [tokens, vocab]: how
// often each token occurs in the penalty window, or null. Grid (blocks, tokens), 256 threads, 64 bytes shared.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_sample_prepare(const float* __restrict__ logits, int vocab, const SampleSettings* settings,
                          const int* __restrict__ counts, float* adjusted, u64* best) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.y;
    SampleSettings s = settings[row];
    long long base = (long long)row * vocab;
    u64 mine = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) {
        float l = load_fresh(logits + base + i);
        int seen = counts ? load_fresh(counts + base + i) : 0;
        if (seen > 0) {
            if (s.repetition != 1.0f) l = l > 0.0f ? div_rn(l, s.repetition) : mul_rn(l, s.repetition);
            l = add_rn(l, -add_rn(s.presence, mul_rn(s.frequency, (float)seen)));
        }
        if (s.temperature > 0.0f) l = div_rn(l, s.temperature);
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

__device__ __forceinline__ u64 mass_of(float l, float top) { return (u64)(expf(l - top) * 4294967296.0f); }

struct Pick {
    const float* values;
    const int* list;     // ids of the candidates whose mass is not 0
    unsigned length;
    float top;
    u64 floor;           // only candidates >= floor
    u64 least;           // only mass >= least
    PickShared* s;

    __device__ __forceinline__ bool get(unsigned i, u64& c, u64& mass) const {
        int id = load_fresh(list + i);
        float l = load_fresh(values + id);
        c = candidate(l, id);
        mass = mass_of(l, top);
        return c >= floor && mass >= least;
    }
    __device__ __forceinline__ u64 total() const {
        if (threadIdx.x == 0) s->total = 0;
        sync_block();
        u64 mine = 0, c, mass;
        for (unsigned i = threadIdx.x; i < length; i += blockDim.x)
            if (get(i, c, mass)) mine += mass;
        for (int m = 16; m; m >>= 1) mine += shfl_xor(mine, m);
        if ((threadIdx.x & 31) == 0) atomic_add(&s->total, mine);
        sync_block();
        u64 t = s->total;
        sync_block();
        return t;
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
            for (unsigned i = threadIdx.x; i < length; i += blockDim.x)
                if (get(i, c, mass) && (c & mask) == prefix) {
                    int bin = (int)(c >> low) & ((1 << bits) - 1);
                    atomic_add(&s->mass[bin], by_mass ? mass : (u64)1);
                    atomic_add(&s->count[bin], 1u);
                }
#if BITNET_BUG != 9
            sync_block();
#endif
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
        for (unsigned i = threadIdx.x; i < length; i += blockDim.x)
            if (get(i, c, mass) && (c & mask) == prefix) s->found = c;
        sync_block();
        u64 result = s->found;
        sync_block();
        return result;
    }
};

// ids[row] from `adjusted` and `best` (cleared). list: scratch [tokens, vocab] i32. Grid: tokens; 1024 threads;
// shared memory sizeof(PickShared) = 24608 bytes.
extern "C" __global__ void __launch_bounds__(1024)
    bitnet_sample_pick(const float* __restrict__ adjusted, int vocab, SampleSettings* settings, u64* best, int* list,
                       int* ids) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.x;
    PickShared* s = reinterpret_cast<PickShared*>(shared_memory());
    SampleSettings set = settings[row];
    u64 top = best[row];
    if (threadIdx.x == 0) s->length = 0;
    sync_block();
    Pick p;
    p.values = adjusted + (long long)row * vocab;
    p.top = from_ordered((unsigned)(top >> 32));
    if (threadIdx.x == 0) {
        best[row] = 0;
        settings[row].draw = set.draw + 1;
    }
    if (!(set.temperature > 0.0f) || set.top_k == 1 || (unsigned)(top >> 32) == 0) {
        if (threadIdx.x == 0) ids[row] = candidate_id(top);
        return;
    }
    int* mine = list + (long long)row * vocab;
    for (int base = 0; base < vocab; base += blockDim.x) {
        int i = base + threadIdx.x, lane = threadIdx.x & 31;
        bool in = i < vocab && mass_of(load_fresh(p.values + i), p.top) > 0;
        unsigned votes = warp_votes(in), place = 0;
        if (lane == 0 && votes) place = atomic_add(&s->length, (unsigned)count_bits(votes));
        place = shfl(place, 0);
        if (in) mine[place + count_bits(votes & ((1u << lane) - 1))] = i;
    }
    fence_device();
    sync_block();
    p.list = mine;
    p.length = s->length;
    p.floor = 0;
    p.least = 1;
    p.s = s;
    if (set.top_k > 0 && (unsigned)set.top_k < p.length) p.floor = p.select((u64)set.top_k - 1, false);
    if (set.top_p < 1.0f) {
        u64 total = p.total();
        // Smallest prefix whose mass reaches top_p of the total.
        u64 target = (u64)((double)total * (double)fmaxf(set.top_p, 0.0f));
        if (target > 0) target -= 1;
        if (target >= total) target = total - 1;
        p.floor = p.select(target, true);
    }
    if (set.min_p > 0.0f) {
        u64 least = (u64)(fminf(set.min_p, 1.0f) * 4294967296.0f);
        p.least = least > 1 ? least : 1;
    }
    u64 total = p.total();
    u64 chosen = p.select(multiply_high(philox(set.seed, set.draw), total), true);
    if (threadIdx.x == 0) ids[row] = candidate_id(chosen);
}

// Adds ids[row] to the penalty window: ring [tokens, window] (-1: empty), cursor [tokens], counts [tokens, vocab].
// Grid: tokens; 32 threads.
extern "C" __global__ void bitnet_note_token(const int* ids, int* ring, int* cursor, int window, int* counts, int vocab) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.x;
    if (threadIdx.x != 0 || window <= 0) return;
    int at = cursor[row] % window, id = load_fresh(ids + row), old = ring[(long long)row * window + at];
    if (old >= 0 && old < vocab) counts[(long long)row * vocab + old] -= 1;
    if (id >= 0 && id < vocab) counts[(long long)row * vocab + id] += 1;
    ring[(long long)row * window + at] = id;
    cursor[row] = cursor[row] + 1;
}

// positions[row] += 1: the step's last kernel, so that a replayed graph moves on by itself. One block.
extern "C" __global__ void bitnet_advance(int* positions, int tokens) {
    let_next_kernel_start();
    wait_previous_kernel();
    if ((int)threadIdx.x < tokens) positions[threadIdx.x] += 1;
}
