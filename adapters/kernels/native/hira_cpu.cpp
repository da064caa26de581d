// y[rows of s] = x[rows of s] · (W0 ⊙ (1 + B_s A_s))ᵀ + bias for all segments of one layer call, in
// bfloat16 with float32 accumulation, on x86-64 with AMX-BF16 or AVX512-BF16. The float32 kernel is in float32.h.
//
// A plain C interface for ctypes, without torch and without an OpenMP runtime of its own: the
// caller gives GOMP_parallel of the runtime that torch uses, and one scratch buffer.
//
// One call has two phases, both shared among the threads. First the activations and the A factors
// are packed into tiles. Then each thread takes groups of output features: it decodes W0 of the
// group once, into its own cache, and runs every segment against it. A segment is computed by
//   thin    W0 tile · rows, for base rows and the rows of what is expanded,
//   expand  the rows a_k ⊙ x join the thin rows, Σ_k b_k ⊙ (their outputs) is added at the end,
//   fold    a tile of B A, times W0, rounded to bfloat16 once and multiplied with all its rows,
//   kept    W0 ⊙ (1 + B A) as the caller kept it from an earlier call, in place of W0.
// Which of them is the caller's choice, segment by segment. A few rows of the bare base or of a kept
// weight are multiplied line by line instead, without tiles: most lines of a tile would be empty.
//
// A tile is 16 lines of 64 bytes. Of weights: 16 outputs x 32 inputs. Of activations: 16 pairs of
// inputs x 16 rows. Products come out as 16 outputs x 16 rows, float32.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define HIRA_X86 1
#include <cpuid.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define HIRA_API extern "C" __attribute__((visibility("default")))

namespace {

enum Level : int32_t { kAbsent = 0, kAvx512 = 1, kAmx = 2 };
using HiraFactors = FactorsOf<uint16_t>;  // bfloat16
using HiraCall = CallOf<uint16_t>;

#ifdef HIRA_X86

struct Processor {
    Level bfloat16;
    Float32Level float32;
};

Processor detect() {
    Processor none{kAbsent, kNoFloat32}, found = none;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return none;  // OSXSAVE
    const bool has_fma = c & (1u << 12);
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6) return none;  // the system saves no 256-bit registers
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return none;
    if (!has_fma || !(b & (1u << 5))) return none;  // AVX2
    found.float32 = kAvx2Float32;
    if ((low & 0xE6) != 0xE6) return found;  // nor 512-bit ones
    const unsigned wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
    if ((b & wanted) != wanted) return found;
    found.float32 = kAvx512Float32;
    const bool has_tiles = (d & (1u << 22)) && (d & (1u << 24)) && (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return found;  // AVX512-BF16
    found.bfloat16 = kAvx512;
    const long request_permission = 0x1023, tile_state = 18;
    if (has_tiles && syscall(SYS_arch_prctl, request_permission, tile_state) == 0)
        found.bfloat16 = kAmx;
    return found;
}

#else

struct Processor {
    Level bfloat16;
    Float32Level float32;
};

Processor detect() { return {kAbsent, kNoFloat32}; }

#endif

}  // namespace

// Of the structures and of what they mean: raised with every change that a caller must know of.
HIRA_API int32_t hira_interface() { return 3; }

static const Processor& processor() {
    static const Processor found = detect();
    return found;
}

HIRA_API int32_t hira_level() { return processor().bfloat16; }

HIRA_API int32_t hira_level_float32() { return processor().float32; }

// Rows of the base, or of a kept weight, up to which lines are multiplied without tiles: a tile costs
// its 16 rows, used or not.
static int64_t few_rows(int64_t level) { return level == kAmx ? 2 : 8; }

#ifdef HIRA_X86

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include <immintrin.h>

namespace {

constexpr int64_t kTile = 1024;        // bytes
constexpr int64_t kStep = 32;          // inputs of a weight tile
constexpr int64_t kStrip = 64;         // outputs that one tile of rows is multiplied with: 4 tiles
constexpr int64_t kDepth = 8;          // steps between two visits of the accumulators: 256 inputs
constexpr int64_t kChunkTiles = 16;    // row tiles whose sums live at once
constexpr int64_t kGroupBytes = 768 << 10;  // decoded weights that a thread keeps in its L2

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One row of activations before packing: x, or a ⊙ x; a null x is a row of zeros.
struct Row {
    const uint16_t* x;
    const uint16_t* a;
};

// A row of the output, and where the outputs of its expanded rows are among those of its chunk.
struct ThinRow {
    int64_t row;
    const HiraFactors* factors;
    int64_t column;  // of the first expanded row; the rank's width is a power of 2 or full tiles
};

struct Chunk {
    int64_t first_tile, tiles;  // among the packed row tiles; none of rows that are not packed
    const HiraFactors* factors; // of a fold or a kept weight, else null
    int64_t panel;              // index of its packed A, when a fold
    int64_t first_row, rows;    // with factors: rows of the output; thin: entries of `thin`
};

struct Panel {
    const HiraFactors* factors;
    int64_t offset;  // bytes
};

struct Shared {
    const HiraCall* call;
    const int64_t* bounds;
    const HiraFactors* factors;
    std::vector<Row> rows;        // 16 a tile
    std::vector<uint8_t> split;   // a tile: even inputs before odd ones, as folded weights have them
    std::vector<ThinRow> thin;
    std::vector<Chunk> chunks;
    std::vector<Panel> panels;
    int64_t tiles = 0, panel_bytes = 0, rank_steps = 0;
    int64_t steps = 0, strips = 0, group = 0, groups = 0;  // group: strips of one
    bool reads_base = false;      // whether any chunk needs W0
    uint8_t* packed = nullptr;
    uint8_t* panel_base = nullptr;
    uint8_t* own = nullptr;       // each thread's scratch
    int64_t own_bytes = 0, weight_bytes = 0, sums_bytes = 0, factor_bytes = 0;
    Level level = kAbsent;
    std::atomic<int64_t> ticket{0}, pack_next{0}, pack_done{0}, group_next{0};
};

int64_t expanded_width(int64_t rank) {
    if (rank > 8) return ceil_div(rank, 16) * 16;
    return rank > 4 ? 8 : rank > 2 ? 4 : rank;
}

// ---- registers ----------------------------------------------------------------------------------

inline __m512 even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

inline __m512 odd_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000u))));
}

inline __m512i halves_of(__m512 low, __m512 high) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

// The sum of each of 16 registers, in order.
inline __m512 sums_of(__m512 v[16]) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(v[i]);
    transpose(r);
    __m512 total[4];
    for (int i = 0; i < 4; ++i) {
        total[i] = _mm512_add_ps(
            _mm512_add_ps(_mm512_castsi512_ps(r[i]), _mm512_castsi512_ps(r[i + 4])),
            _mm512_add_ps(_mm512_castsi512_ps(r[i + 8]), _mm512_castsi512_ps(r[i + 12])));
    }
    return _mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3]));
}

inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// ---- packing ------------------------------------------------------------------------------------

inline __m512i pairs_from_split() {  // (even | odd) to natural order, for vpermw
    alignas(64) static const uint16_t order[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(order);
}

// 16 rows to `steps` activation tiles.
void pack_rows(uint8_t* to, const Row* rows, bool split, int64_t steps) {
    const __m512i order = pairs_from_split();
    for (int64_t step = 0; step < steps; ++step) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
            if (rows[i].x == nullptr) {
                r[i] = _mm512_setzero_si512();
                continue;
            }
            r[i] = _mm512_loadu_si512(rows[i].x + step * kStep);
            _mm_prefetch(reinterpret_cast<const char*>(rows[i].x + (step + 4) * kStep), _MM_HINT_T0);
            if (rows[i].a != nullptr) {
                const __m512i a = _mm512_loadu_si512(rows[i].a + step * kStep);
                r[i] = _mm512_permutexvar_epi16(
                    order, halves_of(_mm512_mul_ps(even_of(a), even_of(r[i])),
                                     _mm512_mul_ps(odd_of(a), odd_of(r[i]))));
            }
        }
        transpose(r);
        uint8_t* tile = to + step * kTile;
        if (split) {
            for (int i = 0; i < 8; ++i) {
                const __m512i p = r[2 * i], q = r[2 * i + 1];
                _mm512_store_si512(tile + 64 * i, _mm512_mask_blend_epi16(
                    0xAAAAAAAA, p, _mm512_slli_epi32(q, 16)));
                _mm512_store_si512(tile + 64 * (i + 8), _mm512_mask_blend_epi16(
                    0xAAAAAAAA, _mm512_srli_epi32(p, 16), q));
            }
        } else {
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
        }
    }
}

// A [rank, in] to tiles of 16 pairs of ranks x 16 inputs: a step's even inputs, then its odd ones.
void pack_panel(uint8_t* to, const HiraFactors& f, int64_t steps, int64_t in) {
    const int64_t rank_steps = ceil_div(f.rank, kStep);
    for (int64_t step = 0; step < steps; ++step) {
        for (int64_t pair = 0; pair < rank_steps * 16; ++pair) {
            __m512i p = _mm512_setzero_si512(), q = p;
            if (2 * pair < f.rank) p = _mm512_loadu_si512(f.a + 2 * pair * in + step * kStep);
            if (2 * pair + 1 < f.rank)
                q = _mm512_loadu_si512(f.a + (2 * pair + 1) * in + step * kStep);
            uint8_t* tile = to + (step * rank_steps + pair / 16) * 2 * kTile + pair % 16 * 64;
            _mm512_store_si512(
                tile, _mm512_mask_blend_epi16(0xAAAAAAAA, p, _mm512_slli_epi32(q, 16)));
            _mm512_store_si512(
                tile + kTile, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(p, 16), q));
        }
    }
}

// B of `outputs` rows from `first` on to tiles of 16 outputs x 32 ranks, zeros beyond its end.
void pack_factor(uint8_t* to, const HiraFactors& f, int64_t first, int64_t outputs, int64_t out) {
    const int64_t rank_steps = ceil_div(f.rank, kStep);
    for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t step = 0; step < rank_steps; ++step) {
            const int64_t left = f.rank - step * kStep;
            __mmask32 mask = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
            if (first + o >= out) mask = 0;
            _mm512_store_si512(
                to + (o / 16 * rank_steps + step) * kTile + o % 16 * 64,
                _mm512_maskz_loadu_epi16(mask, f.b + (first + o) * f.rank + step * kStep));
        }
    }
}

// The 16 levels times a scale, rounded, in both halves: bit 4 of an index is noise then.
inline __m512i scaled_levels(__m512 levels, float scale) {
    const __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(scale));
    return halves_of(scaled, scaled);
}

// W0 of `outputs` rows from `first` on to weight tiles, in natural order, zeros beyond its end.
void decode(uint8_t* to, const HiraCall& c, int64_t first, int64_t outputs, int64_t steps) {
    const __m512 levels = c.levels ? _mm512_loadu_ps(c.levels) : _mm512_setzero_ps();
    for (int64_t o = 0; o < outputs; ++o) {
        uint8_t* line = to + o / 16 * steps * kTile + o % 16 * 64;
        if (first + o >= c.out) {
            for (int64_t s = 0; s < steps; ++s)
                _mm512_store_si512(line + s * kTile, _mm512_setzero_si512());
        } else if (c.levels == nullptr) {
            const uint16_t* from = static_cast<const uint16_t*>(c.stored) + (first + o) * c.in;
            for (int64_t s = 0; s < steps; ++s)
                _mm512_store_si512(line + s * kTile, _mm512_loadu_si512(from + s * kStep));
        } else {
            const uint8_t* from = static_cast<const uint8_t*>(c.stored) + (first + o) * c.in / 2;
            // Blocks run on from row to row; a step lies in one of them.
            const float* scale = c.scales + (first + o) * c.in / c.block;
            int64_t left = c.block - (first + o) * c.in % c.block;
            __m512i table = scaled_levels(levels, *scale);
            for (int64_t s = 0; s < steps; ++s) {
                if (left == 0) {
                    table = scaled_levels(levels, *++scale);
                    left = c.block;
                }
                left -= kStep;
                const __m512i codes = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + s * 16)));
                const __m512i index =
                    _mm512_or_si512(_mm512_srli_epi32(codes, 4), _mm512_slli_epi32(codes, 16));
                _mm512_store_si512(line + s * kTile, _mm512_permutexvar_epi16(index, table));
            }
        }
    }
}

// A kept weight's `outputs` rows from `first` on and `steps` steps from `depth` on, to tiles. What
// is `ahead` of them, in weights, comes next: it is fetched while these are multiplied.
void copy_kept(uint8_t* to, const HiraFactors& f, int64_t first, int64_t outputs, int64_t depth,
               int64_t steps, int64_t ahead, const HiraCall& c) {
    for (int64_t o = 0; o < outputs; ++o) {
        uint8_t* line = to + o / 16 * kDepth * kTile + o % 16 * 64;
        const bool is_there = first + o < c.out;
        const uint16_t* from = f.kept + (is_there ? first + o : 0) * c.in + depth * kStep;
        for (int64_t s = 0; s < steps; ++s) {
            _mm_prefetch(reinterpret_cast<const char*>(from + s * kStep + ahead), _MM_HINT_T1);
            _mm512_store_si512(line + s * kTile, is_there ? _mm512_loadu_si512(from + s * kStep)
                                                          : _mm512_setzero_si512());
        }
    }
}

// ---- tile products ------------------------------------------------------------------------------

// W' = W0 + W0 ⊙ C of one weight tile; C: two tiles, of the even and of the odd inputs. The inputs
// of W' are split likewise: 16 even ones, then 16 odd ones.
inline void modulate(uint8_t* to, const uint8_t* w0, const uint8_t* product) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; ++i) {
        const __m512i w = _mm512_load_si512(w0 + 64 * i);
        const __m512 even = even_of(w), odd = odd_of(w);
        const __m512 p = _mm512_fmadd_ps(even, _mm512_load_ps(product + 64 * i), even);
        const __m512 q = _mm512_fmadd_ps(odd, _mm512_load_ps(product + kTile + 64 * i), odd);
        _mm512_store_si512(to + 64 * i, halves_of(p, q));
    }
}

// Tile arithmetic on AMX registers.
struct Amx {
    static void begin() {
        // Constant: the compiler takes only the first bytes of it for an input of the instruction.
        alignas(64) static const uint8_t config[64] = {
            1,  0,                                                           // palette, start
            0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,                 // reserved
            64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,          // bytes a line
            0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
            16, 16, 16, 16, 16, 16, 16, 16};                                 // lines
        _tile_loadconfig(config);
    }
    static void end() { _tile_release(); }

    // sums[o] (+)= Σ_s w[o][s] · x[s] for `N` tiles of outputs; `pitch` bytes from one to the next.
    template <int N>
    static void multiply(uint8_t* sums, const uint8_t* w, int64_t pitch, const uint8_t* x,
                         int64_t steps, bool fresh) {
        if (fresh) {
            _tile_zero(0);
            if (N > 1) _tile_zero(1);
            if (N > 2) _tile_zero(2);
            if (N > 3) _tile_zero(3);
        } else {
            _tile_loadd(0, sums, 64);
            if (N > 1) _tile_loadd(1, sums + kTile, 64);
            if (N > 2) _tile_loadd(2, sums + 2 * kTile, 64);
            if (N > 3) _tile_loadd(3, sums + 3 * kTile, 64);
        }
        for (int64_t s = 0; s < steps; ++s) {
            _tile_loadd(7, x + s * kTile, 64);
            _tile_loadd(4, w + s * kTile, 64);
            _tile_dpbf16ps(0, 4, 7);
            if (N > 1) {
                _tile_loadd(5, w + pitch + s * kTile, 64);
                _tile_dpbf16ps(1, 5, 7);
            }
            if (N > 2) {
                _tile_loadd(6, w + 2 * pitch + s * kTile, 64);
                _tile_dpbf16ps(2, 6, 7);
            }
            if (N > 3) {
                _tile_loadd(4, w + 3 * pitch + s * kTile, 64);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, sums, 64);
        if (N > 1) _tile_stored(1, sums + kTile, 64);
        if (N > 2) _tile_stored(2, sums + 2 * kTile, 64);
        if (N > 3) _tile_stored(3, sums + 3 * kTile, 64);
    }

    // The same for `tiles` tiles of rows: `x_pitch` and `sums_pitch` bytes from one to the next.
    static void multiply_all(int64_t outputs, uint8_t* sums, int64_t sums_pitch, const uint8_t* w,
                             int64_t pitch, const uint8_t* x, int64_t x_pitch, int64_t tiles,
                             int64_t steps, bool fresh) {
        for (int64_t tile = 0; tile < tiles; ++tile, sums += sums_pitch, x += x_pitch) {
            switch (outputs) {
                case 1: multiply<1>(sums, w, pitch, x, steps, fresh); break;
                case 2: multiply<2>(sums, w, pitch, x, steps, fresh); break;
                case 3: multiply<3>(sums, w, pitch, x, steps, fresh); break;
                default: multiply<4>(sums, w, pitch, x, steps, fresh);
            }
        }
    }

    // B A of one tile of outputs and one step of inputs, even and odd: into tiles 4, 5 or 6, 7.
    template <bool kOdd>
    static void product(const uint8_t* b, const uint8_t* a, int64_t rank_steps, bool same_a) {
        if (kOdd) {
            _tile_zero(6);
            _tile_zero(7);
        } else {
            _tile_zero(4);
            _tile_zero(5);
        }
        for (int64_t r = 0; r < rank_steps; ++r) {
            if (!same_a || rank_steps > 1) {
                _tile_loadd(2, a + 2 * r * kTile, 64);
                _tile_loadd(3, a + (2 * r + 1) * kTile, 64);
            }
            if (kOdd) {
                _tile_loadd(1, b + r * kTile, 64);
                _tile_dpbf16ps(6, 1, 2);
                _tile_dpbf16ps(7, 1, 3);
            } else {
                _tile_loadd(0, b + r * kTile, 64);
                _tile_dpbf16ps(4, 0, 2);
                _tile_dpbf16ps(5, 0, 3);
            }
        }
    }

    // folded[o][s] = W0 ⊙ (1 + B A), for `tiles` tiles of outputs and `steps` of inputs. Three tiles
    // are under way at once: one multiplied, one stored, one modulated; else they would wait for
    // each other's latency.
    static void fold(uint8_t* folded, const uint8_t* w, int64_t pitch, uint8_t* scratch,
                     const uint8_t* b, const uint8_t* a, int64_t rank, int64_t tiles,
                     int64_t steps) {
        const int64_t rank_steps = ceil_div(rank, kStep);
        const int64_t count = tiles * steps, b_pitch = rank_steps * kTile, a_pitch = 2 * b_pitch;
        int64_t o = 0, s = 0;                // of the product that starts next
        int64_t done_o = 0, done_s = 0;      // of the tile to modulate next
        const auto modulate_next = [&](const uint8_t* product) __attribute__((always_inline)) {
            modulate(folded + (done_o * kDepth + done_s) * kTile,
                     w + done_o * pitch + done_s * kTile, product);
            if (++done_o == tiles) done_o = 0, ++done_s;
        };
        const auto step = [&] __attribute__((always_inline)) {
            if (++o == tiles) o = 0, ++s;
        };
        product<false>(b, a, rank_steps, false);
        step();
        for (int64_t i = 0; i < count; i += 2) {
            if (i + 1 < count) {
                product<true>(b + o * b_pitch, a + s * a_pitch, rank_steps, o != 0);
                step();
            }
            if (i) modulate_next(scratch + 2 * kTile);
            _tile_stored(4, scratch, 64);
            _tile_stored(5, scratch + kTile, 64);
            if (i + 2 < count) {
                product<false>(b + o * b_pitch, a + s * a_pitch, rank_steps, o != 0);
                step();
            }
            modulate_next(scratch);
            if (i + 1 < count) {
                _tile_stored(6, scratch + 2 * kTile, 64);
                _tile_stored(7, scratch + 3 * kTile, 64);
            }
        }
        if (count % 2 == 0) modulate_next(scratch + 2 * kTile);
    }
};

// The same on 512-bit registers: 8 outputs x `R` lines of sums stay in them, as long as they can.
struct Avx512 {
    static void begin() {}
    static void end() {}

    // sums[m][r] (+)= Σ_s Σ_p left[m][s][p] · right[r][s][p] for 8 lines m and `R` tiles of rows.
    template <int R>
    static void block(uint8_t* sums, int64_t sums_pitch, const uint8_t* left, const uint8_t* right,
                      int64_t right_pitch, int64_t steps, bool fresh) {
        __m512 acc[8][R];
#pragma GCC unroll 8
        for (int m = 0; m < 8; ++m)
#pragma GCC unroll 3
            for (int r = 0; r < R; ++r)
                acc[m][r] = fresh ? _mm512_setzero_ps()
                                  : _mm512_load_ps(sums + r * sums_pitch + 64 * m);
        for (int64_t s = 0; s < steps; ++s, left += kTile, right += kTile) {
#pragma GCC unroll 4
            for (int p = 0; p < 16; ++p) {
                __m512bh line[R];
#pragma GCC unroll 3
                for (int r = 0; r < R; ++r)
                    line[r] = (__m512bh)_mm512_load_si512(right + r * right_pitch + 64 * p);
#pragma GCC unroll 8
                for (int m = 0; m < 8; ++m) {
                    const __m512bh pair =
                        (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(left + 64 * m + 4 * p));
#pragma GCC unroll 3
                    for (int r = 0; r < R; ++r) acc[m][r] = _mm512_dpbf16_ps(acc[m][r], pair, line[r]);
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < 8; ++m)
#pragma GCC unroll 3
            for (int r = 0; r < R; ++r) _mm512_store_ps(sums + r * sums_pitch + 64 * m, acc[m][r]);
    }

    template <int R>
    static void blocks(int64_t outputs, uint8_t* sums, int64_t sums_pitch, const uint8_t* w,
                       int64_t pitch, const uint8_t* x, int64_t x_pitch, int64_t steps, bool fresh) {
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t half = 0; half < kTile; half += kTile / 2)
                block<R>(sums + o * kTile + half, sums_pitch, w + o * pitch + half, x, x_pitch,
                         steps, fresh);
    }

    static void multiply_all(int64_t outputs, uint8_t* sums, int64_t sums_pitch, const uint8_t* w,
                             int64_t pitch, const uint8_t* x, int64_t x_pitch, int64_t tiles,
                             int64_t steps, bool fresh) {
        int64_t tile = 0;
        // Three at once need the fewest loads; a rest of four is two and two.
        for (; tiles - tile == 3 || tiles - tile > 4; tile += 3)
            blocks<3>(outputs, sums + tile * sums_pitch, sums_pitch, w, pitch, x + tile * x_pitch,
                      x_pitch, steps, fresh);
        for (; tiles - tile > 1; tile += 2)
            blocks<2>(outputs, sums + tile * sums_pitch, sums_pitch, w, pitch, x + tile * x_pitch,
                      x_pitch, steps, fresh);
        if (tile < tiles)
            blocks<1>(outputs, sums + tile * sums_pitch, sums_pitch, w, pitch, x + tile * x_pitch,
                      x_pitch, steps, fresh);
    }

    // folded[o][s] = W0 ⊙ (1 + B A): 8 outputs x 32 inputs of B A at a time, never leaving registers.
    static void fold(uint8_t* folded, const uint8_t* w, int64_t pitch, uint8_t*, const uint8_t* b,
                     const uint8_t* a, int64_t rank, int64_t tiles, int64_t steps) {
        const int64_t rank_steps = ceil_div(rank, kStep), pairs = ceil_div(rank, 2);
        for (int64_t s = 0; s < steps; ++s) {
            const uint8_t* panel = a + s * rank_steps * 2 * kTile;
            for (int64_t i = 0; i < 2 * tiles; ++i) {
                const int64_t half = i % 2 * (kTile / 2), o = i / 2;
                const uint8_t* factor = b + o * rank_steps * kTile + half;
                __m512 even[8], odd[8];
#pragma GCC unroll 8
                for (int m = 0; m < 8; ++m) even[m] = odd[m] = _mm512_setzero_ps();
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    const int64_t step = pair / 16, p = pair % 16;
                    const uint8_t* lines = panel + step * 2 * kTile + 64 * p;
                    const __m512bh q0 = (__m512bh)_mm512_load_si512(lines);
                    const __m512bh q1 = (__m512bh)_mm512_load_si512(lines + kTile);
                    const uint8_t* left = factor + step * kTile + 4 * p;
#pragma GCC unroll 8
                    for (int m = 0; m < 8; ++m) {
                        const __m512bh f = (__m512bh)_mm512_set1_epi32(
                            *reinterpret_cast<const int32_t*>(left + 64 * m));
                        even[m] = _mm512_dpbf16_ps(even[m], f, q0);
                        odd[m] = _mm512_dpbf16_ps(odd[m], f, q1);
                    }
                }
                const uint8_t* from = w + o * pitch + s * kTile + half;
                uint8_t* to = folded + (o * kDepth + s) * kTile + half;
#pragma GCC unroll 8
                for (int m = 0; m < 8; ++m) {
                    const __m512i v = _mm512_load_si512(from + 64 * m);
                    const __m512 ve = even_of(v), vo = odd_of(v);
                    _mm512_store_si512(to + 64 * m, halves_of(_mm512_fmadd_ps(ve, even[m], ve),
                                                              _mm512_fmadd_ps(vo, odd[m], vo)));
                }
            }
        }
    }
};

// ---- outputs ------------------------------------------------------------------------------------

inline __mmask16 outputs_mask(int64_t left) {
    return left >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1);
}

// `sums` of one tile plus bias to 16 outputs of up to 16 consecutive rows.
void write_rows(const HiraCall& c, const uint8_t* sums, const uint16_t* bias, int64_t row,
                int64_t rows, int64_t output) {
    const __mmask16 mask = outputs_mask(c.out - output);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + 64 * i);
    transpose(r);
    const __m512 offset =
        bias ? widen(_mm256_maskz_loadu_epi16(mask, bias + output)) : _mm512_setzero_ps();
    alignas(64) __m512i kept[16];
    for (int i = 0; i < 16; ++i) kept[i] = r[i];
    for (int64_t i = 0; i < rows; ++i) {
        const __m512 value = _mm512_add_ps(_mm512_castsi512_ps(kept[i]), offset);
        _mm256_mask_storeu_epi16(c.y + (row + i) * c.out + output, mask,
                                 (__m256i)_mm512_cvtneps_pbh(value));
    }
}

// Whether thin rows are consecutive rows of the bare base with the layer's own bias.
bool is_plain(const ThinRow* thin, int64_t rows) {
    for (int64_t t = 0; t < rows; ++t)
        if (thin[t].factors->how == kExpand || thin[t].factors->bias || thin[t].row != thin->row + t)
            return false;
    return true;
}

// Up to 16 thin rows from `first` on: their own sums, what their expanded rows contribute, the bias.
// `sums` is of the first tile of the chunk and one tile of outputs; `pitch` bytes to the next row
// tile.
void write_thin(const HiraCall& c, const uint8_t* sums, int64_t pitch, const ThinRow* thin,
                int64_t first, int64_t rows, int64_t output) {
    const __mmask16 mask = outputs_mask(c.out - output);
    const int64_t outputs = c.out - output < 16 ? c.out - output : 16;
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + first / 16 * pitch + 64 * i);
    transpose(r);
    alignas(64) __m512i kept[16];
    for (int i = 0; i < 16; ++i) kept[i] = r[i];
    for (int64_t t = first; t < first + rows; ++t) {
        const HiraFactors& f = *thin[t].factors;
        __m512 value = _mm512_castsi512_ps(kept[t % 16]);
        if (f.how == kExpand) {
            __m512 terms[16];
            for (int i = 0; i < 16; ++i) terms[i] = _mm512_setzero_ps();
            for (int64_t k = 0; k < f.rank;) {
                const int64_t column = thin[t].column + k, lane = column % 16;
                const int64_t count = f.rank - k < 16 - lane ? f.rank - k : 16 - lane;
                // Other lanes are other rows', which may not be finite: never multiplied by zero.
                const __mmask16 lanes = __mmask16(((1u << count) - 1) << lane);
                const uint8_t* tile = sums + column / 16 * pitch;
                const uint16_t* b = f.b + output * f.rank + k - lane;
                if (outputs == 16) {
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i)
                        terms[i] = _mm512_fmadd_ps(
                            widen(_mm256_maskz_loadu_epi16(lanes, b + i * f.rank)),
                            _mm512_maskz_load_ps(lanes, tile + 64 * i), terms[i]);
                } else {
                    for (int64_t i = 0; i < outputs; ++i)
                        terms[i] = _mm512_fmadd_ps(
                            widen(_mm256_maskz_loadu_epi16(lanes, b + i * f.rank)),
                            _mm512_maskz_load_ps(lanes, tile + 64 * i), terms[i]);
                }
                k += count;
            }
            value = _mm512_add_ps(value, sums_of(terms));
        }
        const uint16_t* bias = f.bias ? f.bias : c.bias;
        if (bias) value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(mask, bias + output)));
        _mm256_mask_storeu_epi16(c.y + thin[t].row * c.out + output, mask,
                                 (__m256i)_mm512_cvtneps_pbh(value));
    }
}

// ---- a few rows -----------------------------------------------------------------------------------

// Weights line by line, as tiles have them or as a matrix has: bytes from one line, and from one
// step of inputs, to the next.
struct Lines {
    const uint8_t* first;
    int64_t line, step;
};

// y of `R` consecutive rows from `row` on and of 16 / R outputs from `output` on.
template <int R>
inline void dot_lines(const HiraCall& c, const uint16_t* bias, const Lines& w, int64_t lines,
                      int64_t row, int64_t output, int64_t steps) {
    constexpr int kLines = 16 / R;
    const uint8_t* from[kLines];
#pragma GCC unroll 16
    for (int m = 0; m < kLines; ++m) from[m] = w.first + (m < lines ? m : lines - 1) * w.line;
    const uint16_t* x = c.x + row * c.in;
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s) {
        __m512bh rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = (__m512bh)_mm512_loadu_si512(x + r * c.in + s * kStep);
#pragma GCC unroll 16
        for (int m = 0; m < kLines; ++m) {
            const uint8_t* at = from[m] + s * w.step;
            // The same place of the lines that come next: such short lines end before a hardware
            // prefetcher knows them.
            _mm_prefetch(reinterpret_cast<const char*>(at + kLines * w.line), _MM_HINT_T1);
            const __m512bh weights = (__m512bh)_mm512_loadu_si512(at);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                acc[r * kLines + m] = _mm512_dpbf16_ps(acc[r * kLines + m], weights, rows[r]);
        }
    }
    alignas(64) float sums[32] = {};
    _mm512_store_ps(sums, sums_of(acc));
    const __mmask16 mask = __mmask16((1u << (lines < kLines ? lines : kLines)) - 1);
    const __m512 offset =
        bias ? widen(_mm256_maskz_loadu_epi16(mask, bias + output)) : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) {
        const __m512 value = _mm512_add_ps(_mm512_loadu_ps(sums + r * kLines), offset);
        _mm256_mask_storeu_epi16(c.y + (row + r) * c.out + output, mask,
                                 (__m256i)_mm512_cvtneps_pbh(value));
    }
}

// `rows` consecutive rows, and up to 16 outputs from `output` on, as many as `lines`.
void dot(const HiraCall& c, const uint16_t* bias, const Lines& w, int64_t lines, int64_t row,
         int64_t rows, int64_t output, int64_t steps) {
    while (rows > 0) {
        const int64_t taken = rows >= 4 ? 4 : rows >= 2 ? 2 : 1, step = 16 / taken;
        for (int64_t first = 0; first < lines; first += step) {
            const Lines here{w.first + first * w.line, w.line, w.step};
            const int64_t left = lines - first < step ? lines - first : step;
            if (taken == 4)
                dot_lines<4>(c, bias, here, left, row, output + first, steps);
            else if (taken == 2)
                dot_lines<2>(c, bias, here, left, row, output + first, steps);
            else
                dot_lines<1>(c, bias, here, left, row, output + first, steps);
        }
        row += taken;
        rows -= taken;
    }
}

// ---- the work of a thread -----------------------------------------------------------------------

void pack_all(Shared& s) {
    const HiraCall& c = *s.call;
    const int64_t jobs = s.tiles + int64_t(s.panels.size());
    for (int64_t job; (job = s.pack_next.fetch_add(1)) < jobs; s.pack_done.fetch_add(1)) {
        if (job < s.tiles) {
            pack_rows(s.packed + job * s.steps * kTile, &s.rows[job * 16], s.split[job], s.steps);
        } else {
            const Panel& panel = s.panels[job - s.tiles];
            pack_panel(s.panel_base + panel.offset, *panel.factors, s.steps, c.in);
        }
    }
    for (int64_t spins = 0; s.pack_done.load(std::memory_order_acquire) < jobs; ++spins) {
        _mm_pause();
        if (spins > 4096) sched_yield();
    }
}

// A chunk whose rows are not packed.
void run_few(const Shared& s, const Chunk& chunk, const uint8_t* weights, int64_t first,
             int64_t outputs) {
    const HiraCall& c = *s.call;
    const HiraFactors* kept = chunk.factors;
    for (int64_t o = 0; o < outputs; o += 16) {
        const int64_t output = first + o;
        const int64_t lines = c.out - output < 16 ? c.out - output : 16;
        if (kept) {
            const uint8_t* from = reinterpret_cast<const uint8_t*>(kept->kept + output * c.in);
            dot(c, kept->bias ? kept->bias : c.bias, Lines{from, c.in * 2, 64}, lines,
                chunk.first_row, chunk.rows, output, s.steps);
            continue;
        }
        const Lines tile{weights + o / 16 * s.steps * kTile, 64, kTile};
        for (int64_t t = 0; t < chunk.rows;) {
            const ThinRow* thin = &s.thin[chunk.first_row + t];
            int64_t run = 1;  // rows that are together in the output and share a bias
            while (t + run < chunk.rows && thin[run].row == thin->row + run &&
                   thin[run].factors->bias == thin->factors->bias)
                ++run;
            dot(c, thin->factors->bias ? thin->factors->bias : c.bias, tile, lines, thin->row, run,
                output, s.steps);
            t += run;
        }
    }
}

template <class Unit>
void run_group(const Shared& s, int64_t group, uint8_t* own) {
    const HiraCall& c = *s.call;
    uint8_t* const weights = own;
    uint8_t* const sums = weights + s.weight_bytes;
    uint8_t* const factor = sums + s.sums_bytes;
    uint8_t* const folded = factor + s.factor_bytes;
    uint8_t* const product = folded + kDepth * 4 * kTile;
    const int64_t first = group * s.group * kStrip;
    const int64_t strips = s.strips - group * s.group < s.group ? s.strips - group * s.group : s.group;
    const int64_t left = c.out - first;
    const int64_t outputs = ceil_div(left < strips * kStrip ? left : strips * kStrip, 16) * 16;
    const int64_t pitch = s.steps * kTile;  // from one tile of outputs to the next
    if (s.reads_base) decode(weights, c, first, outputs, s.steps);
    for (const Chunk& chunk : s.chunks) {
        const uint8_t* rows = s.packed + chunk.first_tile * pitch;
        const HiraFactors* f = chunk.factors;
        if (chunk.tiles == 0) {
            run_few(s, chunk, weights, first, outputs);
            continue;
        }
        const bool folds = f && f->how == kFold;
        const int64_t rank_steps = folds ? ceil_div(f->rank, kStep) : 0;
        if (folds) pack_factor(factor, *f, first, outputs, c.out);
        for (int64_t depth = 0; depth < s.steps; depth += kDepth) {
            const int64_t steps = s.steps - depth < kDepth ? s.steps - depth : kDepth;
            for (int64_t strip = 0; strip < strips; ++strip) {
                const int64_t tiles = (outputs - strip * kStrip) / 16 < 4 ? (outputs - strip * kStrip) / 16 : 4;
                const uint8_t* w = weights + strip * 4 * pitch + depth * kTile;
                int64_t w_pitch = pitch;
                if (f && !folds) {
                    const int64_t ahead = strip + 1 < strips
                                              ? kStrip * c.in
                                              : kDepth * kStep - strip * kStrip * c.in;
                    copy_kept(folded, *f, first + strip * kStrip, tiles * 16, depth, steps, ahead, c);
                    w = folded;
                    w_pitch = kDepth * kTile;
                } else if (folds) {
                    const uint8_t* a = s.panel_base + s.panels[chunk.panel].offset +
                                       depth * rank_steps * 2 * kTile;
                    const uint8_t* b = factor + strip * 4 * rank_steps * kTile;
                    Unit::fold(folded, w, pitch, product, b, a, f->rank, tiles, steps);
                    w = folded;
                    w_pitch = kDepth * kTile;
                }
                Unit::multiply_all(tiles, sums + strip * 4 * kTile, s.group * 4 * kTile, w, w_pitch,
                                   rows + depth * kTile, pitch, chunk.tiles, steps, depth == 0);
            }
        }
        // By rows first: the two halves of a cache line of y are written one after the other.
        const int64_t tile_pitch = s.group * 4 * kTile;
        const uint16_t* bias = f && f->bias ? f->bias : c.bias;
        for (int64_t row = 0; row < chunk.rows; row += 16) {
            const int64_t count = chunk.rows - row < 16 ? chunk.rows - row : 16;
            const ThinRow* thin = f ? nullptr : &s.thin[chunk.first_row + row];
            const bool plain = thin && is_plain(thin, count);
            for (int64_t o = 0; o < outputs / 16; ++o) {
                const uint8_t* tile = sums + row / 16 * tile_pitch + o * kTile;
                if (f)
                    write_rows(c, tile, bias, chunk.first_row + row, count, first + 16 * o);
                else if (plain)
                    write_rows(c, tile, bias, thin->row, count, first + 16 * o);
                else
                    write_thin(c, sums + o * kTile, tile_pitch, &s.thin[chunk.first_row], row,
                               count, first + 16 * o);
            }
        }
    }
}

template <class Unit>
void work(Shared& s) {
    const int64_t ticket = s.ticket.fetch_add(1);
    if (ticket >= s.call->threads) return;  // more came than there is scratch for
    uint8_t* own = s.own + ticket * s.own_bytes;
    pack_all(s);
    Unit::begin();
    for (int64_t group; (group = s.group_next.fetch_add(1)) < s.groups;)
        run_group<Unit>(s, group, own);
    Unit::end();
}

void enter(void* shared) {
    Shared& s = *static_cast<Shared*>(shared);
    s.level == kAmx ? work<Amx>(s) : work<Avx512>(s);
}

// ---- planning -----------------------------------------------------------------------------------

void plan(Shared& s) {
    const HiraCall& c = *s.call;
    const int64_t limit = kChunkTiles * 16;
    std::vector<ThinRow> thin;       // of the open chunk
    int64_t expanded = 0;            // its expanded rows
    auto add_tile_rows = [&](int64_t wanted, uint8_t split) {
        s.rows.resize(ceil_div(wanted, 16) * 16, Row{nullptr, nullptr});
        s.split.resize(s.rows.size() / 16, split);
    };
    auto close = [&] {
        if (thin.empty()) return;
        s.reads_base = true;
        if (expanded == 0 && int64_t(thin.size()) <= few_rows(s.level)) {
            s.chunks.push_back(
                Chunk{0, 0, nullptr, 0, int64_t(s.thin.size()), int64_t(thin.size())});
            s.thin.insert(s.thin.end(), thin.begin(), thin.end());
            thin.clear();
            return;
        }
        const int64_t before = int64_t(s.rows.size());
        const int64_t base = ceil_div(int64_t(thin.size()), 16) * 16;
        add_tile_rows(before + base + expanded, 0);
        for (size_t i = 0; i < thin.size(); ++i) {
            const HiraFactors& f = *thin[i].factors;
            const uint16_t* x = c.x + thin[i].row * c.in;
            s.rows[before + i] = Row{x, nullptr};
            thin[i].column += base;
            for (int64_t k = 0; f.how == kExpand && k < f.rank; ++k)
                s.rows[before + thin[i].column + k] = Row{x, f.a + k * c.in};
        }
        s.chunks.push_back(Chunk{before / 16, int64_t(s.rows.size()) / 16 - before / 16, nullptr, 0,
                                 int64_t(s.thin.size()), int64_t(thin.size())});
        s.thin.insert(s.thin.end(), thin.begin(), thin.end());
        thin.clear();
        expanded = 0;
    };
    for (int64_t i = 0; i < c.segments; ++i) {
        const HiraFactors& f = s.factors[i];
        const int64_t start = s.bounds[i], stop = s.bounds[i + 1];
        if (f.how == kBase || f.how == kExpand) {
            const int64_t width = f.how == kExpand ? expanded_width(f.rank) : 0;
            for (int64_t row = start; row < stop; ++row) {
                // No row may straddle a tile unless it fills whole ones.
                if (width) expanded = ceil_div(expanded, width < 16 ? width : 16) * (width < 16 ? width : 16);
                if (int64_t(thin.size()) + 1 + expanded + width > limit) close();
                thin.push_back(ThinRow{row, &f, expanded});
                expanded += width;
            }
            continue;
        }
        if (f.how == kKept && stop - start <= few_rows(s.level)) {
            s.chunks.push_back(Chunk{0, 0, &f, 0, start, stop - start});
            continue;
        }
        if (f.how == kFold) {
            s.reads_base = true;
            s.panels.push_back(Panel{&f, s.panel_bytes});
            const int64_t rank_steps = ceil_div(f.rank, kStep);
            s.panel_bytes += s.steps * rank_steps * 2 * kTile;
            if (rank_steps > s.rank_steps) s.rank_steps = rank_steps;
        }
        for (int64_t row = start; row < stop; row += limit) {
            const int64_t rows = stop - row < limit ? stop - row : limit;
            const int64_t before = int64_t(s.rows.size());
            add_tile_rows(before + rows, f.how == kFold);
            for (int64_t r = 0; r < rows; ++r) s.rows[before + r] = Row{c.x + (row + r) * c.in, nullptr};
            s.chunks.push_back(Chunk{before / 16, ceil_div(rows, 16), &f,
                                     int64_t(s.panels.size()) - 1, row, rows});
        }
    }
    close();
    s.tiles = int64_t(s.split.size());
}

int64_t run(const HiraCall& c, const int64_t* bounds, const HiraFactors* factors, Level level) {
    Shared s;
    s.call = &c;
    s.bounds = bounds;
    s.factors = factors;
    s.level = level;
    s.steps = c.in / kStep;
    plan(s);
    s.strips = ceil_div(c.out, kStrip);
    // Two groups a thread, so that one slow core does not hold up the call; no more than fits L2.
    s.group = ceil_div(s.strips, 2 * c.threads);
    const int64_t most = kGroupBytes / (kStrip * c.in * 2);
    if (s.group > most) s.group = most < 1 ? 1 : most;
    s.groups = ceil_div(s.strips, s.group);
    int64_t chunk_tiles = 1;
    for (const Chunk& chunk : s.chunks)
        if (chunk.tiles > chunk_tiles) chunk_tiles = chunk.tiles;
    s.weight_bytes = s.group * kStrip * c.in * 2;
    s.sums_bytes = chunk_tiles * s.group * 4 * kTile;
    s.factor_bytes = s.group * 4 * s.rank_steps * kTile;
    s.own_bytes = s.weight_bytes + s.sums_bytes + s.factor_bytes + kDepth * 4 * kTile + 4 * kTile;
    const int64_t need =
        s.tiles * s.steps * kTile + s.panel_bytes + c.threads * s.own_bytes;
    if (c.scratch_bytes < need) return need;
    s.packed = c.scratch;
    s.panel_base = s.packed + s.tiles * s.steps * kTile;
    s.own = s.panel_base + s.panel_bytes;
    if (c.parallel && c.threads > 1)
        c.parallel(enter, &s, unsigned(c.threads), 0);
    else
        enter(&s);
    return 0;
}

}  // namespace

#pragma GCC pop_options

#else

namespace {
int64_t run(const HiraCall&, const int64_t*, const HiraFactors*, Level) { return -1; }
}  // namespace

#endif

namespace {

// The level that a call asks for, where the processor has it.
int64_t chosen(int64_t best, int64_t asked) { return asked && asked < best ? asked : best; }

template <class T>
bool is_in_order(const CallOf<T>& c, const FactorsOf<T>* factors) {
    if (c.in % 32 || c.in == 0 || c.threads < 1) return false;
    if (c.levels && (c.block < 32 || c.block % 32)) return false;
    for (int64_t i = 0; i < c.segments; ++i) {
        const FactorsOf<T>& f = factors[i];
        if (f.how < kBase || f.how > kKept || (f.how == kKept && !f.kept)) return false;
        if ((f.how == kFold || f.how == kExpand) && (!f.a || !f.b || f.rank < 1)) return false;
    }
    return true;
}

}  // namespace

// Run a call. bounds: segments + 1 row numbers; factors: one a segment. Returns 0; or the bytes of
// scratch it needs, aligned to 64, and nothing is written then; or -1 where this processor, or the
// shape, is not served.
HIRA_API int64_t hira_modulated_linear(const HiraCall* call, const int64_t* bounds,
                                       const HiraFactors* factors) {
    const Level level = Level(chosen(hira_level(), call->level));
    return level == kAbsent || !is_in_order(*call, factors) ? -1 : run(*call, bounds, factors, level);
}

// The same in float32.
HIRA_API int64_t hira_modulated_linear_float32(const CallOf<float>* call, const int64_t* bounds,
                                               const FactorsOf<float>* factors) {
    const int64_t level = chosen(hira_level_float32(), call->level);
    if (level == kNoFloat32 || !is_in_order(*call, factors)) return -1;
    return level == kAvx2Float32 ? run_float32_avx2(*call, bounds, factors)
                                 : run_float32_avx512(*call, bounds, factors);
}
