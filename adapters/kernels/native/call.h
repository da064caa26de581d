// What the caller gives, and what a processor can do. Every field of the structures is eight bytes.

#pragma once

#include <cstdint>

enum How : int64_t { kBase = 0, kFold = 1, kExpand = 2, kKept = 3 };

// What one segment brings, in numbers of `T`. a: [rank, in], b: [out, rank], both read by fold and
// expand only. bias: [out], instead of the layer's own, or null. how: one of How. kept: [out, in],
// or null.
template <class T>
struct FactorsOf {
    const T* a;
    const T* b;
    const T* bias;
    int64_t rank;
    int64_t how;
    const T* kept;
};

// A layer call. Matrices are row by row without gaps, in numbers of `T` unless said.
template <class T>
struct CallOf {
    T* y;                        // [rows, out]
    const T* x;                  // [rows, in]
    const void* stored;          // 4-bit: [out, in / 2] bytes, first weight in the high half; else [out, in]
    const float* scales;         // one a block of 4-bit weights
    const float* levels;         // 16 values of the 4-bit codes; null: stored is of T
    const T* bias;               // [out] or null
    int64_t segments;
    int64_t out, in;             // in: a multiple of 32
    int64_t block;               // weights a scale: a multiple of 32
    int64_t threads;
    uint8_t* scratch;
    int64_t scratch_bytes;
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, or null
    int64_t level;               // at most what hira_level says of T; 0 means that
};

// The levels of float32; those of bfloat16 are in hira_cpu.cpp.
enum Float32Level : int32_t { kNoFloat32 = 0, kAvx2Float32 = 1, kAvx512Float32 = 2 };

// A call that was found in order. 0, or the bytes of scratch it needs; nothing is written then.
int64_t run_float32_avx2(const CallOf<float>&, const int64_t* bounds, const FactorsOf<float>*);
int64_t run_float32_avx512(const CallOf<float>&, const int64_t* bounds, const FactorsOf<float>*);
