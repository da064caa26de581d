// The float32 kernel, for the registers that the including file has defined, in whose namespace
// this stands: Reg and what computes on it, kWidth, kVectors, kRows, Levels, Codes and transposes.
//
//   y[rows of s] = x[rows of s] · (W0 ⊙ (1 + B_s A_s))ᵀ + bias      for all segments s of one call
//
// A strip is kVectors registers of outputs, a panel the weights of one strip and of up to kDepth
// inputs, [input][output]: so the sums of kRows rows stay in registers, one number of a row times
// one register of weights at a time, and go to y as they are. First what all threads need is made:
// factors in the order that they are read in, and the rows a_k ⊙ x of what is expanded. Then each
// thread takes groups of strips and goes once through their part of W0, panel by panel; each is
// decoded once and every segment is run against it. A segment is computed by
//   base    the panel times its rows,
//   expand  the same, and Σ_k b_k ⊙ (the panel times the rows a_k ⊙ x),
//   fold    B A of the panel made in registers, times W0, into a second panel, times its rows,
//   kept    a second panel copied from W0 ⊙ (1 + B A) as the caller kept it.
// A few rows of the bare base or of a kept weight are multiplied line by line instead, as weights
// are stored: turning them into panels would take longer than the products.

using Call = CallOf<float>;
using Factors = FactorsOf<float>;

constexpr int64_t kStrip = kVectors * kWidth;
constexpr int64_t kDepth = 768;              // inputs of a panel: it stays in L2, y is seldom visited
constexpr int64_t kAhead = 6;                // inputs whose weights are fetched into L1
constexpr int64_t kTurn = 128;               // rows of x that stay in L2 from strip to strip
constexpr int64_t kStep = 32;                // inputs that surely share a scale
constexpr int64_t kFewRows = 4;
constexpr int64_t kExpandedRows = 4096;      // of one pass over the weight: bounds the scratch
constexpr int64_t kGroupBytes = 512 << 10;   // of panels and sums that a thread keeps in its L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t aligned(int64_t numbers) { return ceil_div(numbers, 16) * 16; }

enum class Kind { base, expanded, fold, kept, few_base, few_kept };

// Rows that are multiplied alike: consecutive ones of the output, or all expanded ones.
struct Chunk {
    Kind kind;
    const Factors* factors;  // of a fold or a kept weight
    const float* bias;       // of the whole output, or null
    int64_t row, rows;       // of the output; expanded: of the expanded ones
    int64_t packed;          // of a fold: its packed factors; few_base: its split rows
};

// A row of the output to which expanded rows are added.
struct Spread {
    const Factors* factors;
    int64_t row, first;  // first: among the expanded rows
    int64_t packed;
};

// What is made before the products: an A and a B in the order in which they are read, a_k ⊙ x, or x
// by even and odd inputs.
enum class Making { a, b, spread, split };

struct Task {
    Making making;
    const Factors* factors;
    int64_t row, to;  // to: numbers from the start of the scratch
};

struct Batch {
    const Call* call;
    std::vector<int64_t> bounds;
    std::vector<Factors> factors;
    std::vector<Chunk> chunks;
    std::vector<Spread> spreads;
    std::vector<Task> tasks;
    int64_t expanded = 0, spread_at = 0, shared = 0, own = 0;  // numbers
    int64_t strips = 0, group = 0, groups = 0;                 // group: strips of one
    bool reads_base = false;
    float* scratch = nullptr;
    std::atomic<int64_t> ticket{0}, task_next{0}, task_done{0}, group_next{0};
};

// ---- products -----------------------------------------------------------------------------------

// acc[r][v] += Σ_k x[r][k] · w[k][v]. Of x, a row is `pitch` from the next; packed, an input is
// followed by the same one of the next row.
template <int R, int N, bool kPacked>
inline __attribute__((always_inline)) void products(Reg (&acc)[R][N], const float* w,
                                                    const float* x, int64_t pitch,
                                                    int64_t depth) {
    // Two products start every cycle and take four or five: so many sums must be under way.
    constexpr int kApart = kPacked || R * N >= 8 ? 1 : R * N >= 4 ? 2 : 4;
    Reg more[kApart][R][N];
#pragma GCC unroll 4
    for (int u = 1; u < kApart; ++u)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) more[u][r][v] = zero();
    for (int64_t k = 0; k < depth; k += kApart) {
#pragma GCC unroll 4
        for (int u = 0; u < kApart; ++u) {
            Reg line[N];
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) {
                const float* at = w + ((k + u) * N + v) * kWidth;
                line[v] = load(at);
                if (!kPacked)
                    _mm_prefetch(reinterpret_cast<const char*>(at + kAhead * N * kWidth),
                                 _MM_HINT_T0);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Reg one = all(kPacked ? x[(k + u) * R + r] : x[r * pitch + k + u]);
#pragma GCC unroll 3
                for (int v = 0; v < N; ++v) {
                    Reg& to = u == 0 ? acc[r][v] : more[u][r][v];
                    to = fma(one, line[v], to);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int u = 1; u < kApart; ++u)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) acc[r][v] = add(acc[r][v], more[u][r][v]);
}

using Block = void (*)(const float* w, const float* x, int64_t pitch, int64_t depth, float* to,
                       int64_t to_pitch, const float* start);

// to[r] = start (null: what is there) + x[r] times a panel, for R rows.
template <int R, int N>
void block(const float* w, const float* x, int64_t pitch, int64_t depth, float* to,
           int64_t to_pitch, const float* start) {
    Reg acc[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v)
            acc[r][v] = load(start ? start + v * kWidth : to + r * to_pitch + v * kWidth);
    products<R, N, false>(acc, w, x, pitch, depth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) store(to + r * to_pitch + v * kWidth, acc[r][v]);
}

template <int R>
Block block_of(int64_t vectors) {
    return vectors == 1 ? block<R, 1> : vectors == 2 ? block<R, 2> : block<R, 3>;
}

Block block_of(int64_t rows, int64_t vectors) {
    switch (rows) {
        case 1: return block_of<1>(vectors);
        case 2: return block_of<2>(vectors);
        case 3: return block_of<3>(vectors);
        case 4: return block_of<4>(vectors);
#ifdef HIRA_EIGHT_ROWS
        case 5: return block_of<5>(vectors);
        case 6: return block_of<6>(vectors);
        case 7: return block_of<7>(vectors);
        case 8: return block_of<8>(vectors);
#endif
    }
    return nullptr;
}

// The same for any number of rows, in blocks that differ by one at most.
void multiply(int64_t vectors, const float* w, const float* x, int64_t pitch, int64_t depth,
              int64_t rows, float* to, int64_t to_pitch, const float* start) {
    const int64_t blocks = ceil_div(rows, kRows), each = rows / blocks, longer = rows % blocks;
    const Block one = block_of(each, vectors), another = block_of(each + 1, vectors);
    for (int64_t b = 0; b < blocks; ++b) {
        (b < longer ? another : one)(w, x, pitch, depth, to, to_pitch, start);
        const int64_t taken = each + (b < longer);
        x += taken * pitch;
        to += taken * to_pitch;
    }
}

// to = W0 + W0 ⊙ B A for one panel. a: [depth / kRows][rank][kRows], b: [rank][outputs].
template <int N>
void fold(float* to, const float* w0, const float* a, const float* b, int64_t rank,
          int64_t depth) {
    for (int64_t i = 0; i < depth; i += kRows, a += rank * kRows) {
        Reg acc[kRows][N];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) acc[r][v] = zero();
        products<kRows, N, true>(acc, b, a, 0, rank);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) {
                const int64_t at = (i + r) * N * kWidth + v * kWidth;
                const Reg w = load(w0 + at);
                store(to + at, fma(w, acc[r][v], w));
            }
    }
}

void fold(int64_t vectors, float* to, const float* w0, const float* a, const float* b,
          int64_t rank, int64_t depth) {
    if (vectors == 1) fold<1>(to, w0, a, b, rank, depth);
    if (vectors == 2) fold<2>(to, w0, a, b, rank, depth);
    if (vectors == 3) fold<3>(to, w0, a, b, rank, depth);
}

// ---- panels -------------------------------------------------------------------------------------

// to[column][line] = from[line][column]; zeros for lines from `lines` on.
void copy_panel(float* to, int64_t vectors, const float* from, int64_t pitch, int64_t lines,
                int64_t columns) {
    const int64_t to_pitch = vectors * kWidth;
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = v * kWidth;
        int64_t c = 0;
        for (; c + kWidth <= columns && first + kWidth <= lines; c += kWidth) {
            Reg square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) square[i] = load(from + (first + i) * pitch + c);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) store(to + (c + i) * to_pitch + first, square[i]);
        }
        for (; c < columns; ++c)
            for (int64_t i = first; i < first + kWidth; ++i)
                to[c * to_pitch + i] = i < lines ? from[i * pitch + c] : 0.0f;
    }
}

// W0 of the outputs from `output` on and the inputs from `input` on.
void base_panel(float* to, int64_t vectors, const Call& c, int64_t output, int64_t input,
                int64_t depth) {
    if (c.levels == nullptr) {
        const float* from = static_cast<const float*>(c.stored) + output * c.in + input;
        copy_panel(to, vectors, from, c.in, c.out - output, depth);
        return;
    }
    const Levels levels = levels_of(c.levels);
    const int64_t to_pitch = vectors * kWidth;
    alignas(64) static const uint8_t nothing[16] = {};
    for (int64_t v = 0; v < vectors; ++v, output += kWidth, to += kWidth) {
        const uint8_t* lines[kWidth];
        alignas(64) float scales[kWidth] = {};
        const int64_t there = least(c.out - output, kWidth);
        for (int64_t i = 0; i < kWidth; ++i) lines[i] = nothing;
        const bool in_rows = c.in % c.block == 0;  // else blocks run on from row to row
        for (int64_t k = input; k < input + depth; k += kStep) {
            if (!in_rows || k == input || k % c.block == 0)
                for (int64_t i = 0; i < there; ++i)
                    scales[i] = c.scales[((output + i) * c.in + k) / c.block];
            for (int64_t i = 0; i < there; ++i)
                lines[i] = static_cast<const uint8_t*>(c.stored) + ((output + i) * c.in + k) / 2;
            alignas(64) uint8_t columns[16 * kWidth];
            transpose_bytes(lines, columns);
            const Reg scale = load(scales);
            float* here = to + (k - input) * to_pitch;
            for (int64_t j = 0; j < 16; ++j) {
                const Codes codes = codes_of(columns + j * kWidth);
                store(here + 2 * j * to_pitch, mul(high_of(codes, levels), scale));
                store(here + (2 * j + 1) * to_pitch, mul(low_of(codes, levels), scale));
            }
        }
    }
}

// ---- a few rows ---------------------------------------------------------------------------------

// sums[r][m] = x[r] · the output `output` + m of W0; x by even and odd inputs, kWidth of each.
template <int R, int M>
void dot_codes(const Call& c, const float* x, int64_t output, float (&sums)[R][M]) {
    const Levels levels = levels_of(c.levels);
    Reg acc[R][M];
    Levels table[M];
    const uint8_t* from[M];
    const float* scale[M];
    int64_t left[M];
    for (int m = 0; m < M; ++m) {
        const int64_t first = least(output + m, c.out - 1) * c.in;
        from[m] = static_cast<const uint8_t*>(c.stored) + first / 2;
        scale[m] = c.scales + first / c.block;
        left[m] = c.block - first % c.block;
        table[m] = scaled(levels, all(*scale[m]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = zero();
    for (int64_t k = 0; k < c.in; k += kStep) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            if (left[m] == 0) {
                table[m] = scaled(levels, all(*++scale[m]));
                left[m] = c.block;
            }
            left[m] -= kStep;
#pragma GCC unroll 2
            for (int64_t half = 0; half < kStep; half += 2 * kWidth) {
                const Codes codes = codes_of(from[m] + (k + half) / 2);
                const Reg even = high_of(codes, table[m]), odd = low_of(codes, table[m]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const float* row = x + r * c.in + k + half;
                    acc[r][m] = fma(even, load(row), acc[r][m]);
                    acc[r][m] = fma(odd, load(row + kWidth), acc[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) sums[r][m] = sum(acc[r][m]);
}

// The same of a weight that is stored as it is.
template <int R, int M>
void dot_numbers(const Call& c, const float* weight, const float* x, int64_t output,
                 float (&sums)[R][M]) {
    Reg acc[R][M];
    const float* from[M];
    for (int m = 0; m < M; ++m) from[m] = weight + least(output + m, c.out - 1) * c.in;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = zero();
    for (int64_t k = 0; k < c.in; k += kWidth) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Reg w = load(from[m] + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][m] = fma(w, load(x + r * c.in + k), acc[r][m]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) sums[r][m] = sum(acc[r][m]);
}

// y of R rows from `row` on for the outputs from `first` up to `last`. kept: null for W0.
template <int R>
void dot_rows(const Call& c, const float* kept, const float* x, const float* bias, int64_t row,
              int64_t first, int64_t last) {
    constexpr int M = R > 2 ? 2 : 4;
    const float* weight = kept ? kept : c.levels ? nullptr : static_cast<const float*>(c.stored);
    for (int64_t output = first; output < last; output += M) {
        float sums[R][M];
        if (weight)
            dot_numbers<R, M>(c, weight, x, output, sums);
        else
            dot_codes<R, M>(c, x, output, sums);
        for (int r = 0; r < R; ++r)
            for (int64_t m = 0; m < M && output + m < last; ++m)
                c.y[(row + r) * c.out + output + m] = sums[r][m] + (bias ? bias[output + m] : 0.0f);
    }
}

// ---- the work of a thread -----------------------------------------------------------------------

void make(const Batch& b, const Task& task) {
    const Call& c = *b.call;
    float* to = b.scratch + task.to;
    if (task.making == Making::a) {
        const Factors& f = *task.factors;
        for (int64_t i = 0; i < c.in; i += kRows)
            for (int64_t k = 0; k < f.rank; ++k, to += kRows)
                memcpy(to, f.a + k * c.in + i, kRows * sizeof(float));
    } else if (task.making == Making::b) {
        const Factors& f = *task.factors;
        for (int64_t first = 0; first < c.out; first += kStrip) {
            const int64_t vectors = least(ceil_div(c.out - first, kWidth), kVectors);
            copy_panel(to + first * f.rank, vectors, f.b + first * f.rank, f.rank, c.out - first,
                       f.rank);
        }
    } else if (task.making == Making::spread) {
        const Factors& f = *task.factors;
        const float* x = c.x + task.row * c.in;
        for (int64_t k = 0; k < f.rank; ++k)
            for (int64_t i = 0; i < c.in; i += kWidth)
                store(to + k * c.in + i, mul(load(f.a + k * c.in + i), load(x + i)));
    } else {
        const float* x = c.x + task.row * c.in;
        for (int64_t i = 0; i < c.in; i += 2 * kWidth)
            for (int64_t j = 0; j < kWidth; ++j) {
                to[i + j] = x[i + 2 * j];
                to[i + kWidth + j] = x[i + 2 * j + 1];
            }
    }
}

void make_all(Batch& b) {
    const int64_t count = int64_t(b.tasks.size());
    for (int64_t i; (i = b.task_next.fetch_add(1)) < count; b.task_done.fetch_add(1))
        make(b, b.tasks[i]);
    for (int64_t spins = 0; b.task_done.load(std::memory_order_acquire) < count; ++spins) {
        _mm_pause();
        if (spins > 4096) sched_yield();
    }
}

// y of one strip += Σ_k b_k ⊙ (the sums of the expanded rows).
template <int N>
void contract(const Batch& b, const Spread& spread, const float* sums, int64_t strip, float* y) {
    const int64_t rank = spread.factors->rank;
    const float* factor = b.scratch + spread.packed + strip * kStrip * rank;
    const float* from = sums + spread.first * kStrip;
    Reg acc[2][N];
    for (int v = 0; v < N; ++v) acc[0][v] = load(y + v * kWidth), acc[1][v] = zero();
    for (int64_t k = 0; k < rank; ++k)
        for (int v = 0; v < N; ++v)
            acc[k % 2][v] = fma(load(factor + k * N * kWidth + v * kWidth),
                                load(from + k * kStrip + v * kWidth), acc[k % 2][v]);
    for (int v = 0; v < N; ++v) store(y + v * kWidth, add(acc[0][v], acc[1][v]));
}

void run_few(const Batch& b, const Chunk& chunk, int64_t first, int64_t last) {
    const Call& c = *b.call;
    const float* kept = chunk.kind == Kind::few_kept ? chunk.factors->kept : nullptr;
    const bool is_split = !kept && c.levels;
    const float* x = is_split ? b.scratch + chunk.packed : c.x + chunk.row * c.in;
    switch (chunk.rows) {
        case 1: return dot_rows<1>(c, kept, x, chunk.bias, chunk.row, first, last);
        case 2: return dot_rows<2>(c, kept, x, chunk.bias, chunk.row, first, last);
        case 3: return dot_rows<3>(c, kept, x, chunk.bias, chunk.row, first, last);
        default: return dot_rows<4>(c, kept, x, chunk.bias, chunk.row, first, last);
    }
}

void run_group(const Batch& b, int64_t group, float* own) {
    const Call& c = *b.call;
    float* const panels = own;
    float* const second = panels + b.group * kDepth * kStrip;
    float* const sums = second + kDepth * kStrip;
    float* const edge = sums + b.group * b.expanded * kStrip;
    const int64_t begin = group * b.group, end = least(begin + b.group, b.strips);
    const auto vectors_of = [&](int64_t strip) {
        return least(ceil_div(c.out - strip * kStrip, kWidth), kVectors);
    };
    const auto ends_within = [&](int64_t strip) {  // a register
        return strip * kStrip + vectors_of(strip) * kWidth > c.out;
    };
    const auto pitch_of = [&](int64_t strip) { return ends_within(strip) ? kStrip : c.out; };
    const auto output_of = [&](int64_t strip, int64_t row) {
        return ends_within(strip) ? edge + (row - b.bounds[0]) * kStrip
                                  : c.y + row * c.out + strip * kStrip;
    };
    for (int64_t input = 0; input < c.in; input += kDepth) {
        const int64_t depth = least(kDepth, c.in - input);
        const auto panel_of = [&](int64_t strip) {
            return panels + (strip - begin) * kDepth * kStrip;
        };
        for (int64_t strip = begin; b.reads_base && strip < end; ++strip)
            base_panel(panel_of(strip), vectors_of(strip), c, strip * kStrip, input, depth);
        for (const Chunk& chunk : b.chunks) {
            if (chunk.kind == Kind::few_base || chunk.kind == Kind::few_kept) continue;
            const bool is_expanded = chunk.kind == Kind::expanded;
            const bool has_own = chunk.kind == Kind::fold || chunk.kind == Kind::kept;
            const float* x = (is_expanded ? b.scratch + b.spread_at : c.x + chunk.row * c.in) + input;
            const int64_t turn = has_own ? chunk.rows : kTurn;
            for (int64_t row = 0; row < chunk.rows; row += turn) {
                for (int64_t strip = begin; strip < end; ++strip) {
                    const int64_t vectors = vectors_of(strip);
                    const float* weights = panel_of(strip);
                    if (chunk.kind == Kind::fold) {
                        const Factors& f = *chunk.factors;
                        const float* a = b.scratch + chunk.packed;
                        fold(vectors, second, weights, a + input * f.rank,
                             a + aligned(c.in * f.rank) + strip * kStrip * f.rank, f.rank, depth);
                        weights = second;
                    } else if (chunk.kind == Kind::kept) {
                        copy_panel(second, vectors,
                                   chunk.factors->kept + strip * kStrip * c.in + input, c.in,
                                   c.out - strip * kStrip, depth);
                        weights = second;
                    }
                    alignas(64) float start[kStrip] = {};
                    if (input == 0 && chunk.bias)
                        memcpy(start, chunk.bias + strip * kStrip,
                               least(kStrip, c.out - strip * kStrip) * sizeof(float));
                    float* to = is_expanded
                                    ? sums + ((strip - begin) * b.expanded + row) * kStrip
                                    : output_of(strip, chunk.row + row);
                    multiply(vectors, weights, x + row * c.in, c.in, depth,
                             least(turn, chunk.rows - row), to,
                             is_expanded ? kStrip : pitch_of(strip), input == 0 ? start : nullptr);
                }
            }
        }
    }
    for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t vectors = vectors_of(strip);
        const float* from = sums + (strip - begin) * b.expanded * kStrip;
        for (const Spread& spread : b.spreads) {
            float* y = output_of(strip, spread.row);
            if (vectors == 1) contract<1>(b, spread, from, strip, y);
            if (vectors == 2) contract<2>(b, spread, from, strip, y);
            if (vectors == 3) contract<3>(b, spread, from, strip, y);
        }
    }
    const int64_t last = least(end * kStrip, c.out);
    for (const Chunk& chunk : b.chunks) {
        if (chunk.kind == Kind::few_base || chunk.kind == Kind::few_kept)
            run_few(b, chunk, begin * kStrip, last);
        else if (ends_within(end - 1) && chunk.kind != Kind::expanded)
            for (int64_t row = chunk.row; row < chunk.row + chunk.rows; ++row)
                memcpy(c.y + row * c.out + (end - 1) * kStrip, output_of(end - 1, row),
                       (last - (end - 1) * kStrip) * sizeof(float));
    }
}

void enter(void* batch) {
    Batch& b = *static_cast<Batch*>(batch);
    const int64_t ticket = b.ticket.fetch_add(1);
    if (ticket >= b.call->threads) return;  // more came than there is scratch for
    make_all(b);
    for (int64_t group; (group = b.group_next.fetch_add(1)) < b.groups;)
        run_group(b, group, b.scratch + b.shared + ticket * b.own);
}

// ---- planning -----------------------------------------------------------------------------------

void plan(Batch& b) {
    const Call& c = *b.call;
    const int64_t count = int64_t(b.factors.size());
    int64_t thin = 0;
    bool modulates = false;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t how = b.factors[i].how;
        if (how == kBase || how == kExpand) thin += b.bounds[i + 1] - b.bounds[i];
        modulates |= how == kFold || how == kExpand;
    }
    const bool has_few = !modulates && thin <= kFewRows;
    b.reads_base = modulates || (thin && !has_few);
    const auto take = [&](int64_t numbers) {
        const int64_t at = b.shared;
        b.shared += aligned(numbers);
        return at;
    };
    for (int64_t i = 0; i < count; ++i) {
        const Factors& f = b.factors[i];
        const int64_t row = b.bounds[i], rows = b.bounds[i + 1] - row;
        const float* bias = f.bias ? f.bias : c.bias;
        if (f.how == kFold) {
            const int64_t packed = take(c.in * f.rank);
            b.tasks.push_back(Task{Making::a, &f, 0, packed});
            b.tasks.push_back(Task{Making::b, &f, 0, take(aligned(c.out) * f.rank)});
            b.chunks.push_back(Chunk{Kind::fold, &f, bias, row, rows, packed});
        } else if (f.how == kKept) {
            const Kind kind = rows <= kFewRows ? Kind::few_kept : Kind::kept;
            b.chunks.push_back(Chunk{kind, &f, bias, row, rows, 0});
        } else {
            if (f.how == kExpand) {
                const int64_t packed = take(aligned(c.out) * f.rank);
                b.tasks.push_back(Task{Making::b, &f, 0, packed});
                for (int64_t r = row; r < row + rows; ++r, b.expanded += f.rank)
                    b.spreads.push_back(Spread{&f, r, b.expanded, packed});
            }
            Chunk* before = b.chunks.empty() ? nullptr : &b.chunks.back();
            const Kind kind = has_few ? Kind::few_base : Kind::base;
            if (before && before->kind == kind && before->bias == bias &&
                before->row + before->rows == row)
                before->rows += rows;
            else
                b.chunks.push_back(Chunk{kind, nullptr, bias, row, rows, 0});
        }
    }
    if (b.expanded) {
        b.spread_at = take(b.expanded * c.in);
        for (const Spread& spread : b.spreads)
            b.tasks.push_back(Task{Making::spread, spread.factors, spread.row,
                                   b.spread_at + spread.first * c.in});
        b.chunks.push_back(Chunk{Kind::expanded, nullptr, nullptr, 0, b.expanded, 0});
    }
    for (Chunk& chunk : b.chunks) {
        if (chunk.kind != Kind::few_base || !c.levels) continue;
        chunk.packed = take(chunk.rows * c.in);
        for (int64_t r = 0; r < chunk.rows; ++r)
            b.tasks.push_back(
                Task{Making::split, nullptr, chunk.row + r, chunk.packed + r * c.in});
    }
    b.strips = ceil_div(c.out, kStrip);
    const int64_t most = kGroupBytes / (kStrip * int64_t(sizeof(float)) * (kDepth + b.expanded));
    // Two groups a thread, so that one slow core does not hold up the call; no more than fits L2.
    b.group = c.threads > 1 ? ceil_div(b.strips, 2 * c.threads) : b.strips;
    b.group = least(b.group, most < 1 ? 1 : most);
    b.groups = ceil_div(b.strips, b.group);
    const int64_t edge = c.out % kWidth ? (b.bounds[count] - b.bounds[0]) * kStrip : 0;
    b.own = aligned(b.group * kDepth * kStrip + kDepth * kStrip +
                    b.group * b.expanded * kStrip + edge);
}

// The segments, cut so that no batch expands to more rows than kExpandedRows, if it can be helped.
std::vector<Batch*> batches_of(const Call& c, const int64_t* bounds, const Factors* factors) {
    std::vector<Batch*> found;
    int64_t expanded = 0;
    const auto open = [&](int64_t row) {
        Batch* batch = new Batch;
        batch->call = &c;
        batch->bounds.push_back(row);
        found.push_back(batch);
        expanded = 0;
    };
    open(bounds[0]);
    for (int64_t i = 0; i < c.segments; ++i) {
        const Factors& f = factors[i];
        const int64_t each = f.how == kExpand ? f.rank : 0;
        for (int64_t row = bounds[i]; row < bounds[i + 1];) {
            int64_t rows = bounds[i + 1] - row;
            if (each) {
                if (expanded && expanded + each > kExpandedRows) open(row);
                const int64_t room = (kExpandedRows - expanded) / each;
                rows = least(rows, room < 1 ? 1 : room);
                expanded += rows * each;
            }
            row += rows;
            found.back()->factors.push_back(f);
            found.back()->bounds.push_back(row);
        }
    }
    return found;
}

int64_t run_call(const Call& c, const int64_t* bounds, const Factors* factors) {
    const std::vector<Batch*> batches = batches_of(c, bounds, factors);
    int64_t need = 0;
    for (Batch* b : batches) {
        plan(*b);
        const int64_t own = (b->shared + c.threads * b->own) * int64_t(sizeof(float));
        if (own > need) need = own;
    }
    if (c.scratch_bytes >= need) {
        need = 0;
        for (Batch* b : batches) {
            b->scratch = reinterpret_cast<float*>(c.scratch);
            if (c.parallel && c.threads > 1)
                c.parallel(enter, b, unsigned(c.threads), 0);
            else
                enter(b);
        }
    }
    for (Batch* b : batches) delete b;
    return need;
}
