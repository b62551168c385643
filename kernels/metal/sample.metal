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
inline ulong best_of(ulong mine, threadgroup ulong* part, Position at) {
    for (uint m = at.width / 2; m; m >>= 1) {
        ulong other = shuffle_xor_64(mine, m);
        mine = other > mine ? other : mine;
    }
    if (at.lane == 0) part[at.simd] = mine;
#if BITNET_BUG != 19
    sync_threads();
#endif
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
