// The float32 kernel on 256-bit registers: AVX2 and FMA, as most processors since Haswell and Zen
// have them.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <sched.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>

namespace {

using Reg = __m256;
constexpr int64_t kWidth = 8;    // numbers of a register
constexpr int kVectors = 3;      // registers of a strip of outputs
constexpr int kRows = 4;         // rows whose sums stay in registers: 12 of 16

inline Reg load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Reg value) { _mm256_storeu_ps(to, value); }
inline Reg all(float value) { return _mm256_set1_ps(value); }
inline Reg zero() { return _mm256_setzero_ps(); }
inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
inline float sum(Reg value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The 16 levels of the codes, and what a register of bytes stands for.
struct Levels {
    Reg lower, upper;
};

inline Levels levels_of(const float* levels) { return Levels{load(levels), load(levels + 8)}; }
inline Levels scaled(Levels levels, Reg scale) {
    return Levels{mul(levels.lower, scale), mul(levels.upper, scale)};
}

using Codes = __m256i;  // a byte in every 32 bits: two codes

inline Codes codes_of(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
// A permutation heeds three bits of an index; the fourth, moved to the sign, chooses the half.
inline Reg high_of(Codes codes, Levels levels) {
    const __m256i index = _mm256_srli_epi32(codes, 4);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.lower, index),
                            _mm256_permutevar8x32_ps(levels.upper, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 24)));
}
inline Reg low_of(Codes codes, Levels levels) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.lower, codes),
                            _mm256_permutevar8x32_ps(levels.upper, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

// 8 lines of 16 bytes to 16 columns of 8: three rounds of interleaving line i with line i + 4.
inline void transpose_bytes(const uint8_t* const lines[kWidth], uint8_t* columns) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[i]));
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i)
        _mm_store_si128(reinterpret_cast<__m128i*>(columns + 16 * i), b[i]);
}

inline void transpose(Reg lines[kWidth]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(lines[i], lines[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        lines[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        lines[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

#include "float32.h"

}  // namespace

int64_t run_float32_avx2(const CallOf<float>& call, const int64_t* bounds,
                         const FactorsOf<float>* factors) {
    return run_call(call, bounds, factors);
}

#pragma GCC pop_options

#else

int64_t run_float32_avx2(const CallOf<float>&, const int64_t*, const FactorsOf<float>*) {
    return -1;
}

#endif
