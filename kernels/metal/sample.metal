// Greedy choice and sampling on the device: the choices of the host's sampler (src/generate/sampler.rs) from the same logits,
// but for the random numbers (Philox here, ChaCha8 there).
//
// A candidate is the 64-bit key (ordered f32 bits, ~id), unique, descending by score, then ascending by id. A row with a NaN,
// an infinite score or nothing but -infinity gets the id -1: the host then reads the logits and names the fault.

struct ChoiceParams {
    int vocab, groups, has_marks;
};
static_assert(sizeof(ChoiceParams) == 12, "the host mirrors this struct");

inline uint ordered_bits(float v) {
    uint u = as_type<uint>(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return BITNET_BUG == 16 ? 0u : 0xffffffffu;  // NaN surfaces as the best
    if (u == 0x80000000u) u = 0;                                                      // -0 and 0 tie
    return (u & 0x80000000u) ? ~u : u | 0x80000000u;
}
inline float from_ordered(uint u) { return as_type<float>((u & 0x80000000u) ? u & 0x7fffffffu : ~u); }
inline ulong candidate(float v, int id) { return ulong(ordered_bits(v)) << 32 | ulong(0xffffffffu - uint(id)); }
inline int candidate_id(ulong c) { return int(0xffffffffu - uint(c)); }

// Whether a row whose best candidate this is can be drawn from: no NaN, no +infinity, not all -infinity.
inline bool sound(ulong best) {
    uint score = uint(best >> 32);
    return score > 0x007fffffu && score < 0xff800000u;
}

inline ulong shuffle_xor_64(ulong v, uint mask) {
    return ulong(simd_shuffle_xor(uint(v >> 32), ushort(mask))) << 32 | ulong(simd_shuffle_xor(uint(v), ushort(mask)));
}

// The largest of a threadgroup's candidates, for every thread. `part`: one per simdgroup, not used since the last barrier.
inline ulong best_of(ulong mine, threadgroup ulong* part, thread const Position& at) {
    for (uint m = at.width / 2; m; m >>= 1) {
        ulong other = shuffle_xor_64(mine, m);
        mine = other > mine ? other : mine;
    }
    if (at.lane == 0) part[at.simd] = mine;
    if (BITNET_BUG != 19) sync_threads();
    for (uint s = 0; s < at.threads / at.width; ++s) mine = part[s] > mine ? part[s] : mine;
    return mine;
}

// best[token][group] = largest candidate of columns group * 256 + tid + n * groups * 256. Position (groups, tokens), 256 threads.
// Bytes: 4 vocab per token. Simdgroups of any width.
BITNET_KERNEL(256)
bitnet_argmax(device const float* logits [[buffer(0)]], device ulong* best [[buffer(1)]], constant ChoiceParams& p [[buffer(2)]],
              BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    device const float* row = logits + ulong(at.group.y) * ulong(p.vocab);
    ulong mine = 0;
    for (int i = int(at.group.x * at.threads + at.tid); i < p.vocab; i += int(at.groups.x * at.threads)) {
        ulong c = candidate(row[i], i);
        mine = c > mine ? c : mine;
    }
    mine = best_of(mine, (threadgroup ulong*)shared, at);
    if (at.tid == 0) best[ulong(at.group.y) * ulong(p.groups) + ulong(at.group.x)] = mine;
}

// ids[token] = the largest of best[token], or -1. Position tokens, 256 threads.
BITNET_KERNEL(256)
bitnet_argmax_pick(device const ulong* best [[buffer(0)]], device int* ids [[buffer(1)]], constant ChoiceParams& p [[buffer(2)]],
                   BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    ulong mine = 0;
    for (int i = int(at.tid); i < p.groups; i += int(at.threads)) {
        ulong c = best[ulong(at.group.x) * ulong(p.groups) + ulong(i)];
        mine = c > mine ? c : mine;
    }
    mine = best_of(mine, (threadgroup ulong*)shared, at);
    if (at.tid == 0) ids[at.group.x] = sound(mine) ? candidate_id(mine) : -1;
}

// Per-row settings, in device memory: those of CUDA (../cuda/sample.cu).
struct SampleSettings {
    ulong seed;
    ulong draw;         // counter of the generator; each sample adds 1
    float temperature;  // 0: greedy
    float top_p;        // 1: off
    float min_p;        // 0: off
    float repetition;   // 1: off. l < 0 ? l * r : l / r for tokens of the prompt or the answer
    float presence;     // 0: off. subtracted once for tokens of the answer
    float frequency;    // 0: off. subtracted per occurrence in the answer
    int top_k;          // 0: off
    int slot;           // row of the marks, -1: no penalties
};
static_assert(sizeof(SampleSettings) == 48, "the host mirrors this struct");

// A mark: bit 31, the token is in the prompt or the answer; below, how often it is in the answer.
constant constexpr uint kGenerated = 0x7fffffffu;
struct MarkUpdate {
    int slot;   // -1: nothing to do
    int token;
    uint mark;  // what the token's mark is now
};
static_assert(sizeof(MarkUpdate) == 12, "the host mirrors this struct");
struct MarkParams {
    int count, vocab;
};
static_assert(sizeof(MarkParams) == 8, "the host mirrors this struct");

// marks [slots, vocab] follow the host's: update group * 256 + tid. Tokens of a slot differ from each other.
BITNET_KERNEL(256)
bitnet_mark(device const MarkUpdate* updates [[buffer(0)]], device uint* marks [[buffer(1)]], constant MarkParams& p [[buffer(2)]],
            BITNET_GRID) {
    Position at = BITNET_AT;
    int i = int(at.group.x * at.threads + at.tid);
    if (i >= p.count) return;
    int slot = updates[i].slot;
    uint token = uint(updates[i].token);
    if (slot >= 0 && token < uint(p.vocab)) marks[ulong(slot) * ulong(p.vocab) + ulong(token)] = updates[i].mark;
}

// adjusted = logits after penalties; best[token][group] as bitnet_argmax. Grid (groups, tokens), 256 threads. Simdgroups of any
// width. Bytes: 8 vocab per token, 4 more with marks.
BITNET_KERNEL(256)
bitnet_sample_prepare(device const float* logits [[buffer(0)]], device const SampleSettings* settings [[buffer(1)]],
                      device const uint* marks [[buffer(2)]], device float* adjusted [[buffer(3)]],
                      device ulong* best [[buffer(4)]], constant ChoiceParams& p [[buffer(5)]], BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    ulong row = ulong(at.group.y), base = row * ulong(p.vocab);
    int slot = settings[row].slot;
    float repetition = settings[row].repetition, presence = settings[row].presence, frequency = settings[row].frequency;
    bool marked = p.has_marks != 0 && slot >= 0;
    device const uint* mine_marks = marks + (marked ? ulong(slot) * ulong(p.vocab) : 0);
    ulong mine = 0;
    for (int i = int(at.group.x * at.threads + at.tid); i < p.vocab; i += int(at.groups.x * at.threads)) {
        float l = logits[base + ulong(i)];
        uint mark = marked ? mine_marks[i] : 0;
        if (mark != 0) {
            if (repetition != 1.0f) l = l < 0.0f ? mul_rn(l, repetition) : div_rn(l, repetition);
            uint count = BITNET_BUG == 17 ? 1 : mark & kGenerated;
            if (count > 0) l = add_rn(l, -add_rn(presence, mul_rn(frequency, float(count))));
        }
        adjusted[base + ulong(i)] = l;
        ulong c = candidate(l, i);
        mine = c > mine ? c : mine;
    }
    mine = best_of(mine, (threadgroup ulong*)shared, at);
    if (at.tid == 0) best[row * ulong(p.groups) + ulong(at.group.x)] = mine;
}

inline ulong shuffle_64(ulong v, uint lane) {
    return ulong(simd_shuffle(uint(v >> 32), ushort(lane))) << 32 | ulong(simd_shuffle(uint(v), ushort(lane)));
}

// High 64 bits of a product (mulhi takes no 64-bit integers before Metal 3).
inline ulong multiply_high(ulong a, ulong b) {
    ulong a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
    ulong middle = a1 * b0 + (a0 * b0 >> 32), low = a0 * b1 + (middle & 0xffffffffu);
    return a1 * b1 + (middle >> 32) + (low >> 32);
}

// ceil(total * p) for 0 <= p < 1, exactly: p = m 2^-s. Metal has no f64.
inline ulong share_of(ulong total, float p) {
    uint bits = as_type<uint>(p), exponent = bits >> 23;
    if (exponent == 0) return p > 0.0f && total > 0 ? 1 : 0;  // a denormal share of less than 2^64
    ulong m = ulong(bits & 0x7fffffu) | 0x800000u, high = multiply_high(total, m), low = total * m;
    uint s = 150 - exponent;  // 24 and more, since p < 1
    if (s >= 128) return total > 0 ? 1 : 0;
    ulong whole = s < 64 ? high << (64 - s) | low >> s : high >> (s - 64);
    ulong rest = s < 64 ? low << (64 - s) : low | (s > 64 ? high << (128 - s) : 0);
    return whole + (rest != 0 ? 1 : 0);
}

// Philox 4x32-10 (Salmon et al., 2011): 64 bits for (seed, draw).
inline ulong philox(ulong seed, ulong draw) {
    uint c0 = uint(draw), c1 = uint(draw >> 32), c2 = 0, c3 = 0, k0 = uint(seed), k1 = uint(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        ulong p0 = ulong(0xD2511F53u) * c0, p1 = ulong(0xCD9E8D57u) * c2;
        uint n0 = uint(p1 >> 32) ^ c1 ^ k0, n2 = uint(p0 >> 32) ^ c3 ^ k1;
        c1 = uint(p1);
        c3 = uint(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return ulong(c1) << 32 | c0;
}

// e^x for x <= 0 by additions and multiplications only: the bits of src/generate/exp.rs.
inline float exp_nonpositive(float x) {
    const float magic = 12582912.0f;
    float shifted = add_rn(mul_rn(x, 1.44269504f), magic);
    float n = add_rn(shifted, -magic);
    float f = add_rn(add_rn(x, -mul_rn(n, 0.6933594f)), -mul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = add_rn(mul_rn(p, f), 1.3981999e-3f);
    p = add_rn(mul_rn(p, f), 8.333452e-3f);
    p = add_rn(mul_rn(p, f), 4.1665796e-2f);
    p = add_rn(mul_rn(p, f), 1.6666665e-1f);
    p = add_rn(mul_rn(p, f), 0.5f);
    p = add_rn(add_rn(mul_rn(mul_rn(p, f), f), f), 1.0f);
    uint exponent = (as_type<uint>(shifted) - as_type<uint>(magic) + 127u) << 23;
    return x < -87.0f ? 0.0f : mul_rn(p, as_type<float>(exponent));
}

constant constexpr float kOne = 1099511627776.0f;    // 2^40, the mass of the best candidate: 2^24 of them fit
constant constexpr float kLeast = 1.0f / 1099511627776.0f;  // weights below it have no mass
constant constexpr float kColdest = 1.17549435e-38f;  // the least normal number: a GPU may flush what is below
inline ulong mass_of(float weight) { return ulong(mul_rn(weight, kOne)); }

constant constexpr int kBins = 2048;
// Threadgroup memory of bitnet_sample_pick. 64-bit sums are two words: there is no 64-bit atomic addition.
struct PickShared {
    uint low[kBins], high[kBins], count[kBins];
    ulong found;  // prefix of the key found so far
    ulong left;   // T minus what lies above the bin
    uint total[2];
    uint inside;  // candidates in the bin
    uint length;  // of the list
};
static_assert(sizeof(PickShared) == 24608, "the host asks for this much threadgroup memory");

inline uint add_to(threadgroup uint* to, uint v) {
    return atomic_fetch_add_explicit((threadgroup atomic_uint*)to, v, memory_order_relaxed);
}
inline void add_64(threadgroup uint* low, threadgroup uint* high, ulong v) {
    uint old = add_to(low, uint(v));
    uint carried = uint(v >> 32) + (BITNET_BUG != 21 && old + uint(v) < old ? 1u : 0u);
    if (carried != 0) add_to(high, carried);
}
inline ulong word_pair(uint low, uint high) { return ulong(high) << 32 | ulong(low); }
inline void sync_all() { threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); }

// A candidate's mass is floor(2^40 * weight), an integer, so that sums do not depend on the order of threads. top-k, top-p
// and the draw are the same operation, "the element at which the running count or mass, from the largest key down, passes T".
struct Pick {
    device const float* scores;
    device int* list;  // ids of the candidates
    threadgroup PickShared* s;
    uint length;
    float top, temperature;
    ulong floor;       // only candidates >= floor
    float least;       // only weights >= least
};
inline float weight_of(thread const Pick& p, float score) {
    return exp_nonpositive(div_rn(add_rn(score, -p.top), p.temperature));
}
inline void candidate_at(thread const Pick& p, uint i, thread ulong& c, thread ulong& mass) {
    int id = p.list[i];
    float score = p.scores[id];
    c = candidate(score, id);
    mass = mass_of(weight_of(p, score));
}
// Lists the `n` ids 0 .. n - 1 (`first`) or the list anew: those within `floor` and `least`. In place: a step writes no
// further than it has read.
inline void restrict_to(thread Pick& p, uint n, bool first, thread const Position& at) {
    if (at.tid == 0) p.s->length = 0;
    sync_threads();
    for (uint base = 0; base < n; base += at.threads) {
        uint i = base + at.tid;
        int id = 0;
        bool in = false;
        if (i < n) {
            id = first ? int(i) : p.list[i];
            float score = p.scores[id];
            in = candidate(score, id) >= p.floor && weight_of(p, score) >= p.least;
        }
        uint before = simd_prefix_exclusive_sum(in ? 1u : 0u), all = simd_sum(in ? 1u : 0u), place = 0;
        if (at.lane == 0 && all != 0) place = add_to(&p.s->length, all);
        place = simd_broadcast_first(place);
        if (!first && BITNET_BUG != 18) sync_all();
        if (in) p.list[place + before] = id;
    }
    sync_all();
    p.length = p.s->length;
    sync_threads();
}
inline ulong sum_of(thread const Pick& p, ulong mine, thread const Position& at) {
    if (at.tid == 0) p.s->total[0] = p.s->total[1] = 0;
    sync_threads();
    for (uint m = at.width / 2; m; m >>= 1) mine += shuffle_xor_64(mine, m);
    if (at.lane == 0) add_64(&p.s->total[0], &p.s->total[1], mine);
    sync_threads();
    ulong t = word_pair(p.s->total[0], p.s->total[1]);
    sync_threads();
    return t;
}
inline ulong total_of_list(thread const Pick& p, thread const Position& at) {
    ulong mine = 0, c, mass;
    for (uint i = at.tid; i < p.length; i += at.threads) {
        candidate_at(p, i, c, mass);
        mine += mass;
    }
    return sum_of(p, mine, at);
}
// The candidate at which the running mass (or count) passes `target`, from the largest down: radix select, 11 bits at a time.
inline ulong select_passing(thread const Pick& p, ulong target, bool by_mass, thread const Position& at) {
    ulong prefix = 0, mask = 0, c, mass;
    int low = 64;
    while (low > 0) {
        int bits = low < 11 ? low : 11;
        low -= bits;
        for (int b = int(at.tid); b < kBins; b += int(at.threads)) p.s->low[b] = p.s->high[b] = p.s->count[b] = 0;
        sync_threads();
        for (uint i = at.tid; i < p.length; i += at.threads) {
            candidate_at(p, i, c, mass);
            if ((c & mask) == prefix) {
                int bin = int(c >> low) & ((1 << bits) - 1);
                add_64(&p.s->low[bin], &p.s->high[bin], by_mass ? mass : ulong(1));
                add_to(&p.s->count[bin], 1u);
            }
        }
        if (BITNET_BUG != 9) sync_threads();
        if (at.simd == 0) {
            // Lane 0 holds the highest bins.
            int share = kBins / int(at.width), first = kBins - 1 - int(at.lane) * share;
            ulong sum = 0;
            for (int b = 0; b < share; ++b) sum += word_pair(p.s->low[first - b], p.s->high[first - b]);
            ulong before = sum;
            for (uint m = 1; m < at.width; m <<= 1) {
                ulong other = shuffle_64(before, at.lane < m ? 0 : at.lane - m);
                if (at.lane >= m) before += other;
            }
            before -= sum;
            if (before <= target && target < before + sum) {
                int b = first;
                ulong here = word_pair(p.s->low[b], p.s->high[b]);
                while (target >= before + here) {
                    before += here;
                    --b;
                    here = word_pair(p.s->low[b], p.s->high[b]);
                }
                p.s->found = prefix | ulong(b) << low;
                p.s->left = target - before;
                p.s->inside = p.s->count[b];
            }
        }
        sync_threads();
        prefix = p.s->found;
        target = p.s->left;
        mask |= ((ulong(1) << bits) - 1) << low;
        bool alone = p.s->inside == 1;
        sync_threads();
        if (alone) break;
    }
    // One candidate has this prefix: its owner names it.
    for (uint i = at.tid; i < p.length; i += at.threads) {
        candidate_at(p, i, c, mass);
        if ((c & mask) == prefix) p.s->found = c;
    }
    sync_threads();
    ulong result = p.s->found;
    sync_threads();
    return result;
}

// ids[token] from `adjusted` and `best` [token][groups], -1 for a row that cannot be drawn from. Order of steps: top-k, top-p (of
// the mass that top-k left), min-p, draw. list: scratch [tokens, vocab]. Grid tokens, 512 threads; simdgroups of any width.
// Bytes per token: 4 vocab a pass over all, one pass or two; then passes over the list.
BITNET_KERNEL(512)
bitnet_sample_pick(device const float* adjusted [[buffer(0)]], device SampleSettings* settings [[buffer(1)]],
                   device const ulong* best [[buffer(2)]], device int* list [[buffer(3)]], device int* ids [[buffer(4)]],
                   constant ChoiceParams& p [[buffer(5)]], BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    ulong row = ulong(at.group.x);
    ulong mine = 0;
    for (int i = int(at.tid); i < p.groups; i += int(at.threads)) {
        ulong c = best[row * ulong(p.groups) + ulong(i)];
        mine = c > mine ? c : mine;
    }
    ulong top = best_of(mine, (threadgroup ulong*)shared, at);
    ulong seed = settings[row].seed, draw = settings[row].draw;
    float temperature = settings[row].temperature, top_p = settings[row].top_p, set_min_p = settings[row].min_p;
    int top_k = settings[row].top_k;
    sync_all();
    bool drawn = sound(top);
    if (at.tid == 0 && drawn) settings[row].draw = draw + 1;
    if (!drawn || !(temperature > 0.0f) || top_k == 1) {
        if (at.tid == 0) ids[row] = drawn ? candidate_id(top) : -1;
        return;
    }
    Pick pick;
    pick.scores = adjusted + row * ulong(p.vocab);
    pick.list = list + row * ulong(p.vocab);
    pick.s = (threadgroup PickShared*)shared;
    pick.length = 0;
    pick.top = from_ordered(uint(top >> 32));
    pick.temperature = fmax(temperature, kColdest);
    pick.floor = 0;
    bool by_k = top_k > 0 && top_k < p.vocab, by_p = top_p < 1.0f;
    // What top-k, top-p and min-p leave are heads of one ranking, and the shortest counts: the list can begin with what min-p
    // leaves, except where top-p needs the mass of what top-k left.
    float min_p = fmin(fmax(set_min_p, kLeast), 1.0f);
    pick.least = by_k && by_p ? kLeast : min_p;
    ulong total = 0;
    if (by_p && !by_k) {
        for (int i = int(at.tid); i < p.vocab; i += int(at.threads)) total += mass_of(weight_of(pick, pick.scores[i]));
        total = sum_of(pick, total, at);
        // A token below this share cannot belong: all that are no better than it sum to less than 1 - p. (f32, so a little lower.)
        float share = (1.0f - top_p) * (float(total) * kLeast) / float(p.vocab > 2 ? p.vocab - 1 : 1) * 0.99f;
        pick.least = fmax(pick.least, fmin(share, 1.0f));
    }
    restrict_to(pick, uint(p.vocab), true, at);
    if (by_k && uint(top_k) < pick.length) {
        pick.floor = select_passing(pick, ulong(top_k) - 1, false, at);
        restrict_to(pick, pick.length, false, at);
    }
    ulong left = total_of_list(pick, at);
    if (by_p) {
        // The shortest head whose mass reaches top_p of the total.
        if (by_k) total = left;
        ulong share = share_of(total, fmax(top_p, 0.0f)), target = share == 0 ? 0 : share - 1;
        if (target < left) pick.floor = select_passing(pick, target, true, at);
        pick.least = fmax(pick.least, min_p);
        restrict_to(pick, pick.length, false, at);
        left = total_of_list(pick, at);
    }
    ulong chosen = select_passing(pick, multiply_high(philox(seed, draw), left), true, at);
    if (at.tid == 0) ids[row] = candidate_id(chosen);
}
