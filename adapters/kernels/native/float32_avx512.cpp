// The float32 kernel on 512-bit registers: AVX512 F, BW, DQ and VL, as every processor with AVX512
// since Skylake has them; no BF16.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <sched.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include <immintrin.h>

namespace {

using Reg = __m512;
constexpr int64_t kWidth = 16;   // numbers of a register
constexpr int kVectors = 3;      // registers of a strip of outputs
constexpr int kRows = 8;         // rows whose sums stay in registers: 24 of 32

inline Reg load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Reg value) { _mm512_storeu_ps(to, value); }
inline Reg all(float value) { return _mm512_set1_ps(value); }
inline Reg zero() { return _mm512_setzero_ps(); }
inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
inline float sum(Reg value) { return _mm512_reduce_add_ps(value); }

// The 16 levels of the codes, and what a register of bytes stands for.
struct Levels {
    Reg every;
};

inline Levels levels_of(const float* levels) { return Levels{load(levels)}; }
inline Levels scaled(Levels levels, Reg scale) { return Levels{mul(levels.every, scale)}; }

using Codes = __m512i;  // a byte in every 32 bits: two codes

inline Codes codes_of(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Reg high_of(Codes codes, Levels levels) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), levels.every);
}
// Only the four lowest bits of an index count.
inline Reg low_of(Codes codes, Levels levels) { return _mm512_permutexvar_ps(codes, levels.every); }

// 16 lines of 16 bytes to 16 columns of 16: four rounds of interleaving line i with line i + 8.
inline void transpose_bytes(const uint8_t* const lines[kWidth], uint8_t* columns) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i)
        a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[i]));
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
    for (int i = 0; i < 16; ++i)
        _mm_store_si128(reinterpret_cast<__m128i*>(columns + 16 * i), a[i]);
}

inline void transpose(Reg lines[kWidth]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(lines[i], lines[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        lines[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        lines[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        lines[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        lines[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(lines[i], lines[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(lines[i], lines[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4(lines[i + 8], lines[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(lines[i + 8], lines[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        lines[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        lines[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
        lines[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        lines[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

#define HIRA_EIGHT_ROWS 1
#include "float32.h"

}  // namespace

int64_t run_float32_avx512(const CallOf<float>& call, const int64_t* bounds,
                           const FactorsOf<float>* factors) {
    return run_call(call, bounds, factors);
}

#pragma GCC pop_options

#else

int64_t run_float32_avx512(const CallOf<float>&, const int64_t*, const FactorsOf<float>*) {
    return -1;
}

#endif
