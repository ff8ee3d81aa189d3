// What a packed Llama forward does between its matrix products, fused: residual + RMS norm, RoPE, SwiGLU's product,
// and causal grouped-query attention over many sequences that stand in one row; and products of integers, on AMX and on
// processors without VNNI.
//
// A plain C interface over caller-owned buffers; loaded with ctypes by guard/model/kernels.py. Every output element is
// computed in float32 in an order that depends on its own row alone (attention: keys in blocks at fixed positions), so
// no result depends on what else is in the batch, nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;   // floats in a register
constexpr int kPanel = 4;    // registers of columns in a tile: 4 * 6 accumulators + 5 operands of 32 registers
#else
constexpr int kLanes = 8;
constexpr int kPanel = 2;    // 2 * 6 accumulators + 3 operands of 16 registers
#endif
constexpr int kRows = 6;     // rows in a tile
constexpr int kBlock = 64;   // keys, and query positions, in a block of attention

// Activations are rounded to -kMost..kMost. Without VNNI, two products of bytes are added in 16 bits: activations, which
// stand there as 0..2 * kMost, times two weights of one sign that come to at most kMostPair. So no sum is cut off,
// and of the weights only the largest: at 80, with those of a normal distribution, 2 pairs in 10,000.
#if defined(__AVX512F__)
constexpr int kMost = 127, kMostPair = 254;
#else
constexpr int kMost = 80, kMostPair = 32767 / (2 * kMost);
#endif

struct bf16 { uint16_t bits; };

// Whether a block of attention has its values transposed, for tiles of bfloat16, or its keys.
template <typename T>
constexpr bool kKeysInRows = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool kKeysInRows<bf16> = true;
#endif

typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline float load(float x) { return x; }
inline float load(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x for x <= 0 in plain float operations, so that loops over it vectorise; relative error below 2e-7.
// Range reduction to [-ln2/2, ln2/2] and the degree-6 Taylor polynomial.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

#if defined(__AVX512F__)

// 2^x for x <= 0, not a number counting as the least; relative error below 5e-6, a thousandth of a bf16's rounding.
// Range reduction to [-1/2, 1/2] and the degree-4 Taylor polynomial.
inline __m512 exp2_nonpositive(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(0.00961812911f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0555041087f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240226507f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693147181f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 load16(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#endif

// c[rows, P vectors] (+)= a[rows, depth] b[depth, P vectors], all float32, R rows kept in registers.
template <int R, int P>
inline void tile(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth) {
  vec sum[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = *reinterpret_cast<const vec*>(c + r * ldc + p * kLanes);
  for (int k = 0; k < depth; ++k) {
    vec col[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) col[p] = *reinterpret_cast<const vec*>(b + k * ldb + p * kLanes);
#pragma GCC unroll 8  // or the sums would live in memory
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[r][p] += a[r * lda + k] * col[p];
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) *reinterpret_cast<vec*>(c + r * ldc + p * kLanes) = sum[r][p];
}

// c[rows, cols] += a[rows, depth] b[depth, cols]; cols is a multiple of kBlock. Each element sums over depth in order.
inline void product(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int cols, int depth) {
  for (int j = 0; j < cols; j += kPanel * kLanes) {
    int i = 0;
    for (; i + kRows <= rows; i += kRows) tile<kRows, kPanel>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, depth);
    for (; i < rows; ++i) tile<1, kPanel>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, depth);
  }
}

// A row as integers of -kMost..kMost, each kMost higher, which is what processors multiply with int8 weights; returns
// what the integers are to be multiplied by. A row of zeros stays one.
inline float quantise(const float* row, uint8_t* out, int64_t cols) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < cols; ++j) largest = std::max(largest, std::fabs(row[j]));
  const float inverse = largest > 0 ? kMost / largest : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) out[j] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(row[j] * inverse)) + kMost);
  return largest / kMost;
}

template <typename T>
void quantise_rows(const T* x, uint8_t* out, float* scales, int64_t rows, int64_t cols) {
#pragma omp parallel
  {
    std::vector<float> row(cols);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) row[j] = load(x[i * cols + j]);
      scales[i] = quantise(row.data(), out + i * cols, cols);
    }
  }
}

// Where a kernel puts a row of results that it has computed in float32.
template <typename T>
struct Floats {
  T* out;
  void put(int64_t i, const float* row, int64_t cols) const {
    for (int64_t j = 0; j < cols; ++j) store(out + i * cols + j, row[j]);
  }
};
struct Integers {
  uint8_t* out;
  float* scales;
  void put(int64_t i, const float* row, int64_t cols) const { scales[i] = quantise(row, out + i * cols, cols); }
};

// Row i of `delta` counts delta_scales[i] times, where there are scales.
template <typename T, typename Out>
void add_rms_norm(float* x, const T* delta, const float* delta_scales, const float* weight, Out out, int64_t rows,
                  int64_t cols, float eps) {
#pragma omp parallel
  {
    std::vector<float> normed(cols);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      float* row = x + i * cols;
      if (delta) {
        const T* add = delta + i * cols;
        const float scale = delta_scales ? delta_scales[i] : 1.0f;
        for (int64_t j = 0; j < cols; ++j) row[j] += load(add[j]) * scale;
      }
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < cols; ++j) squares += row[j] * row[j];
      const float scale = 1.0f / std::sqrt(squares / cols + eps);
      for (int64_t j = 0; j < cols; ++j) normed[j] = row[j] * scale * weight[j];
      out.put(i, normed.data(), cols);
    }
  }
}

// silu(gate) * up, both times scale, of one row.
template <typename T>
inline void silu_mul_row(const T* gate, const T* up, float scale, float* out, int64_t cols) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    const float g = load(gate[j]) * scale;
    const float e = exp_nonpositive(g < 0 ? g : -g);  // sigmoid(g) = 1 / (1 + e) or e / (1 + e): never overflows
    out[j] = (g < 0 ? g * e : g) / (1 + e) * (load(up[j]) * scale);
  }
}

#if defined(__AVX512F__)
// The same with a shorter polynomial and a reciprocal of one Newton step: relative error below 1e-5, where what comes
// in has one of 2e-3.
inline void silu_mul_row(const bf16* gate, const bf16* up, float scale, float* out, int64_t cols) {
  const __m512 by = _mm512_set1_ps(scale), one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
  const int64_t whole = cols / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16) {
    const __m512 g = _mm512_mul_ps(load16(gate + j), by);
    const __m512 e = exp2_nonpositive(_mm512_mul_ps(_mm512_abs_ps(g), _mm512_set1_ps(-1.44269504f)));
    const __m512 d = _mm512_add_ps(one, e);
    __m512 r = _mm512_rcp14_ps(d);
    r = _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, two));
    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 silu = _mm512_mul_ps(_mm512_mask_mul_ps(g, negative, g, e), r);
    _mm512_storeu_ps(out + j, _mm512_mul_ps(silu, _mm512_mul_ps(load16(up + j), by)));
  }
  silu_mul_row<bf16>(gate + whole, up + whole, scale, out + whole, cols - whole);
}
#endif

// The Walsh-Hadamard transform of every 16th of `span` columns, orthonormal; the columns between them make it vectors.
inline void turn(float* row, int64_t cols, int64_t span) {
  for (int64_t half = 16; half < span; half *= 2) {
    const float scale = 0.70710678f;
    for (int64_t start = 0; start < cols; start += 2 * half) {
      float *low = row + start, *high = low + half;
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float a = low[j] * scale, b = high[j] * scale;
        low[j] = a + b;
        high[j] = a - b;
      }
    }
  }
}

template <typename T, typename Out>
void silu_mul(const T* gate_up, const float* scales, Out out, int64_t rows, int64_t cols, int64_t span = 0) {
#pragma omp parallel
  {
    std::vector<float> gated(cols);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const T *gate = gate_up + i * 2 * cols, *up = gate + cols;
      silu_mul_row(gate, up, scales ? scales[i] : 1.0f, gated.data(), cols);
      turn(gated.data(), cols, span);
      out.put(i, gated.data(), cols);
    }
  }
}

// Multiplies rows by their scales, if there are any, and rotates the first `heads` heads of each; cos and sin are
// [positions, dim / 2].
template <typename T>
void rope(T* qkv, const float* scales, const int32_t* positions, const float* cos, const float* sin, int64_t rows,
          int64_t stride, int64_t heads, int64_t dim) {
  const int64_t half = dim / 2;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    T* row = qkv + i * stride;
    const float *c = cos + positions[i] * half, *s = sin + positions[i] * half;
    const float scale = scales ? scales[i] : 1.0f;
    for (int64_t h = 0; h < heads; ++h) {
      T *low = row + h * dim, *high = low + half;
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float a = load(low[j]) * scale, b = load(high[j]) * scale;
        store(low + j, a * c[j] - b * s[j]);
        store(high + j, b * c[j] + a * s[j]);
      }
    }
    if (scales)
      for (int64_t j = heads * dim; j < stride; ++j) store(row + j, load(row[j]) * scale);
  }
}

// Keys and values that stay from pass to pass, in pages of kBlock tokens; a page has a block of each key head. Sequence
// s has pages[bounds[s]:bounds[s + 1]], in order. Its first held[s] tokens were read before and are no rows of this
// pass; those from written[s] on are still to be put into their pages.
template <typename T>
struct Paging {
  T* layer;        // where this layer begins in the first page
  int64_t stride;  // from page to page
  const int32_t *held, *written, *bounds, *pages;
};

// A sequence: the row of its token 0 (it may lie before the first row), how many tokens it has; the pages of its first
// blocks, how many, and where the others stand, with what stays for this pass alone.
template <typename T>
struct Sequence {
  int32_t origin, length;
  const int32_t* pages;
  int32_t paged;
  T* loose;
};

// Queries of a sequence that share a key head: the first one's position, and how many.
template <typename T>
struct Work {
  Sequence<T> sequence;
  int32_t query, queries, head;
};

// What new tokens [begin, end) of a sequence put into the block that they lie in.
template <typename T>
struct Move {
  Sequence<T> sequence;
  int32_t begin, end, head;
};

// The block of a key head, with the tokens from `begin` on: keys, then values, both [kBlock, dim], one of them
// transposed, so that products take both as they stand.
template <typename T>
T* block(const Sequence<T>& sequence, const Paging<T>& paging, int begin, int head, int kv_heads, int dim) {
  const int64_t place = begin / kBlock, size = 2 * kBlock * dim;
  T* blocks = place < sequence.paged ? paging.layer + sequence.pages[place] * paging.stride
                                     : sequence.loose + (place - sequence.paged) * kv_heads * size;
  return blocks + head * size;
}

// Where a sequence ends, values are zeros to the end of the block: what no query sees is multiplied by 0 all the same.
template <typename T>
void pack(const Move<T>& move, const T* qkv, const Paging<T>& paging, int heads, int kv_heads, int dim) {
  const int64_t stride = (heads + 2 * kv_heads) * dim;
  const int first = move.begin % kBlock, count = move.end - move.begin;
  const int zeros = move.end == move.sequence.length ? kBlock - first - count : 0;
  const T* keys = qkv + (static_cast<int64_t>(move.sequence.origin) + move.begin) * stride + (heads + move.head) * dim;
  const T* values = keys + kv_heads * dim;
  T* to = block(move.sequence, paging, move.begin, move.head, kv_heads, dim);
  T *rows = to + first * dim, *columns = to + kBlock * dim + first;  // of keys, and of values
  if (!kKeysInRows<T>) {
    std::swap(keys, values);
    rows = to + (kBlock + first) * dim, columns = to + first;
  }
  for (int k = 0; k < count; ++k) std::memcpy(rows + k * dim, keys + k * stride, dim * sizeof(T));
  std::memset(rows + count * dim, 0, zeros * dim * sizeof(T));
  for (int d = 0; d < dim; ++d) {
    for (int k = 0; k < count; ++k) columns[d * kBlock + k] = values[k * stride + d];
    std::memset(columns + d * kBlock + count, 0, zeros * sizeof(T));
  }
}

// A block in float32; `to` is for one that is not.
inline const float* widened(const float* from, float*, int) { return from; }
inline const float* widened(const bf16* from, float* to, int size) {
  for (int i = 0; i < size; ++i) to[i] = load(from[i]);
  return to;
}

// Online softmax over blocks of keys (Milakov & Gimelshein 2018; FlashAttention, Dao 2022). A block holds the query
// heads that share a key head, so that keys are read once for all of them.
template <typename T>
void attend(const Work<T>& work, const T* qkv, const Paging<T>& paging, T* out, int group, int heads, int kv_heads,
            int dim, float* scratch) {
  const int stride = (heads + 2 * kv_heads) * dim, rows = work.queries * group;
  float* q = scratch;                    // [rows, dim], scaled
  float* scores = q + rows * dim;        // [rows, kBlock]
  float* acc = scores + rows * kBlock;   // [rows, dim]
  float* top = acc + rows * dim;         // [rows], running maximum
  float* mass = top + rows;              // [rows], running sum
  float* wide = mass + rows;             // a block
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));

  for (int i = 0; i < rows; ++i) {
    const T* from = qkv + (static_cast<int64_t>(work.sequence.origin) + work.query + i / group) * stride +
                    (work.head * group + i % group) * dim;
    for (int d = 0; d < dim; ++d) q[i * dim + d] = load(from[d]) * scale;
    top[i] = -INFINITY;
    mass[i] = 0;
  }
  std::fill(acc, acc + rows * dim, 0.0f);

  const int last = work.query + work.queries;  // keys that any of these queries may see
  for (int begin = 0; begin < last; begin += kBlock) {
    const T* from = block(work.sequence, paging, begin, work.head, kv_heads, dim);
    const float* keys = widened(from, wide, 2 * kBlock * dim);  // [dim, kBlock]
    const float* values = keys + kBlock * dim;                  // [kBlock, dim]
    std::fill(scores, scores + rows * kBlock, 0.0f);
    product(q, dim, keys, kBlock, scores, kBlock, rows, kBlock, dim);
    for (int i = 0; i < rows; ++i) {
      const int visible = std::min(kBlock, work.query + i / group + 1 - begin);
      float* row = scores + i * kBlock;
      if (visible <= 0) {  // the whole block lies ahead of this query
        std::fill(row, row + kBlock, 0.0f);
        continue;
      }
      float highest = top[i];
#pragma omp simd reduction(max : highest)
      for (int k = 0; k < kBlock; ++k) highest = std::max(highest, k < visible ? row[k] : -INFINITY);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < kBlock; ++k) {
        const float p = k < visible ? exp_nonpositive(row[k] - highest) : 0.0f;
        row[k] = p;
        sum += p;
      }
      const float shrink = top[i] == -INFINITY ? 0.0f : exp_nonpositive(top[i] - highest);
      top[i] = highest;
      mass[i] = mass[i] * shrink + sum;
#pragma omp simd
      for (int d = 0; d < dim; ++d) acc[i * dim + d] *= shrink;
    }
    product(scores, kBlock, values, dim, acc, dim, rows, dim, kBlock);
  }
  for (int i = 0; i < rows; ++i) {
    T* to = out + (static_cast<int64_t>(work.sequence.origin) + work.query + i / group) * heads * dim +
            (work.head * group + i % group) * dim;
    const float inverse = 1.0f / mass[i];
    for (int d = 0; d < dim; ++d) store(to + d, acc[i * dim + d] * inverse);
  }
}

#if defined(__AMX_BF16__)

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, for the registers below
constexpr int kTile = 16;  // rows of a tile, and 32-bit columns

// The eight tile registers of this thread, all of them 16 rows of 64 bytes, as long as this lives.
struct Tiles {
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

constexpr int kDepth = 64;     // bytes in a tile's row
constexpr int kStretch = 256;  // rows that are multiplied with some columns before the next ones are fetched

inline void put(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void put(bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// Rows of x [rows, depth], each number kMost too high, times weight: tiles [cols / 16, depth / 64] of 16 quadruples of
// inputs for each of 16 columns. `excess` is what that comes to in each column; `scales` are the columns' too. Rows
// are whole tiles, columns pairs of them.
template <typename T>
void linear(const uint8_t* x, const int8_t* weight, const int32_t* excess, const float* scales, T* out, int64_t rows,
            int64_t depth, int64_t cols) {
  const int64_t bytes = kTile * kDepth, column = depth / kDepth * bytes;  // of a tile, of a column of them
  const auto finish = [&](const int32_t* sums, int64_t i, int64_t j) {
    const __m512i less = _mm512_loadu_si512(excess + j);
    const __m512 by = _mm512_loadu_ps(scales + j);
    for (int r = 0; r < kTile; ++r) {
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * kTile), less);
      put(out + (i + r) * cols + j, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by));
    }
  };
#pragma omp parallel
  {
    const Tiles tiles;
    alignas(64) int32_t sums[4][kTile * kTile];
#pragma omp for collapse(2) schedule(static)
    for (int64_t stretch = 0; stretch < rows; stretch += kStretch)
      for (int64_t j = 0; j < cols; j += 2 * kTile) {
        const int64_t end = std::min(rows, stretch + kStretch);
        const int8_t *left = weight + j / kTile * column, *right = left + column;
        for (int64_t i = stretch; i < end; i += 2 * kTile) {
          const bool two = i + kTile < end;
          const uint8_t *above = x + i * depth, *below = above + kTile * depth;
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          asm volatile("" ::: "memory");
          for (int64_t d = 0; d < depth; d += kDepth) {
            _tile_loadd(4, above + d, depth);
            _tile_loadd(6, left + d / kDepth * bytes, kDepth);
            _tile_loadd(7, right + d / kDepth * bytes, kDepth);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, below + d, depth);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
          }
          _tile_stored(0, sums[0], kDepth);
          _tile_stored(1, sums[1], kDepth);
          _tile_stored(2, sums[2], kDepth);
          _tile_stored(3, sums[3], kDepth);
          asm volatile("" ::: "memory");
          for (int part = 0; part < (two ? 4 : 2); ++part)
            finish(sums[part], i + part / 2 * kTile, j + part % 2 * kTile);
        }
      }
  }
}

// Transposes 16 x 16 words in registers.
inline void transpose(__m512i r[kTile]) {
  __m512i t[kTile];
  for (int i = 0; i < kTile; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Word k holds a[k] and, above it, b[k]: the pairs that tiles multiply.
inline __m512i pairs(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// The same on tiles of bfloat16. Scores and results stand transposed, with a query in each lane, so that the softmax
// goes down the rows; keys ahead of a query count nothing, which leaves every sum to the bit as it would be without.
void attend(const Work<bf16>& work, const bf16* qkv, const Paging<bf16>& paging, bf16* out, int group, int heads,
            int kv_heads, int dim, float* scratch) {
  const int stride = (heads + 2 * kv_heads) * dim, rows = work.queries * group;
  const int width = (rows + kTile - 1) / kTile * kTile;
  uint32_t* q = reinterpret_cast<uint32_t*>(scratch);        // [dim / 2, width], pairs of dimensions
  float* acc = scratch + dim / 2 * width;                    // [dim, width]
  float* top = acc + dim * width;                            // [width], running maximum
  float* mass = top + width;                                 // [width], running sum
  float* scores = mass + width;              // [kBlock, kTile]
  uint32_t* shares = reinterpret_cast<uint32_t*>(scores + kBlock * kTile);  // [kBlock / 2, kTile], pairs of keys
  const __m512 scale = _mm512_set1_ps(1.44269504f / std::sqrt(static_cast<float>(dim)));
  static_assert(kBlock == 4 * kTile, "blocks are two pairs of tiles");
  const auto query = [&](int i) {
    return qkv + (static_cast<int64_t>(work.sequence.origin) + work.query + i / group) * stride +
           (work.head * group + i % group) * dim;
  };

  for (int d = 0; d < dim; d += 2 * kTile)
    for (int j = 0; j < width; j += kTile) {
      __m512i block[kTile];
      for (int i = 0; i < kTile; ++i)
        block[i] = j + i < rows ? _mm512_loadu_si512(query(j + i) + d) : _mm512_setzero_si512();
      transpose(block);
      for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(q + (d / 2 + i) * width + j, block[i]);
    }
  std::fill(top, top + width, -INFINITY);
  std::fill(mass, mass + width, 0.0f);

  const int last = work.query + work.queries;  // keys that any of these queries may see
  for (int begin = 0; begin < last; begin += kBlock) {
    const int count = std::min(kBlock, last - begin);
    const int used = (count + 2 * kTile - 1) / (2 * kTile) * 2 * kTile;
    const bf16* keys = block(work.sequence, paging, begin, work.head, kv_heads, dim);  // [kBlock, dim]
    const bf16* values = keys + kBlock * dim;                                          // [dim, kBlock]

    for (int j = 0; j < width; j += kTile) {
      asm volatile("" ::: "memory");  // loads of tiles do not tell the compiler what they read
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < dim; d += 2 * kTile) {
        const bf16* key = keys + d;
        _tile_loadd(4, q + d / 2 * width + j, width * sizeof(uint32_t));
        _tile_loadd(5, key, dim * sizeof(bf16));
        _tile_loadd(6, key + kTile * dim, dim * sizeof(bf16));
        _tile_dpbf16ps(0, 5, 4);
        _tile_dpbf16ps(1, 6, 4);
        if (used < kBlock) continue;
        _tile_loadd(5, key + 2 * kTile * dim, dim * sizeof(bf16));
        _tile_loadd(6, key + 3 * kTile * dim, dim * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 4);
        _tile_dpbf16ps(3, 6, 4);
      }
      _tile_stored(0, scores, kTile * sizeof(float));
      _tile_stored(1, scores + kTile * kTile, kTile * sizeof(float));
      _tile_stored(2, scores + 2 * kTile * kTile, kTile * sizeof(float));
      _tile_stored(3, scores + 3 * kTile * kTile, kTile * sizeof(float));
      int seen[kTile];  // the keys of this block that a query sees
      for (int i = 0; i < kTile; ++i) seen[i] = work.query + (j + i) / group + 1 - begin;
      const __m512i visible = _mm512_loadu_si512(seen);
      const bool all = seen[0] >= kBlock;
      const auto see = [&](int k) { return all ? 0xffff : _mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(k)); };
      const auto score = [&](int k) { return _mm512_loadu_ps(scores + k * kTile); };
      const __m512 before = _mm512_loadu_ps(top + j);
      __m512 most[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};  // two, which wait less for each other
      for (int k = 0; k < used; k += 2)
        for (int i = 0; i < 2; ++i) most[i] = _mm512_mask_max_ps(most[i], see(k + i), most[i], score(k + i));
      const __m512 highest = _mm512_max_ps(before, _mm512_mul_ps(_mm512_max_ps(most[0], most[1]), scale));
      const auto share = [&](int k) {
        return _mm512_maskz_mov_ps(see(k), exp2_nonpositive(_mm512_fmsub_ps(score(k), scale, highest)));
      };
      __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int k = 0; k < used; k += 2) {
        const __m512 a = share(k), b = share(k + 1);
        sum[0] = _mm512_add_ps(sum[0], a);
        sum[1] = _mm512_add_ps(sum[1], b);
        const __m512i both = pairs((__m256i)_mm512_cvtneps_pbh(a), (__m256i)_mm512_cvtneps_pbh(b));
        _mm512_storeu_si512(shares + k / 2 * kTile, both);
      }
      const __m512 shrink = exp2_nonpositive(_mm512_sub_ps(before, highest));
      const bool shrinks = _mm512_cmp_ps_mask(before, highest, _CMP_NEQ_UQ);
      _mm512_storeu_ps(top + j, highest);
      _mm512_storeu_ps(mass + j, _mm512_fmadd_ps(_mm512_loadu_ps(mass + j), shrink, _mm512_add_ps(sum[0], sum[1])));
      if (begin > 0 && shrinks)
        for (int d = 0; d < dim; ++d) {
          float* row = acc + d * width + j;
          _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), shrink));
        }
      asm volatile("" ::: "memory");
      _tile_loadd(4, shares, kTile * sizeof(uint32_t));
      _tile_loadd(5, shares + kTile * kTile, kTile * sizeof(uint32_t));
      for (int d = 0; d < dim; d += 2 * kTile) {
        const bf16 *low = values + d * kBlock, *high = low + kTile * kBlock;
        float *out_low = acc + d * width + j, *out_high = out_low + kTile * width;
        _tile_zero(0);
        _tile_zero(1);
        if (begin > 0) {
          _tile_loadd(0, out_low, width * sizeof(float));
          _tile_loadd(1, out_high, width * sizeof(float));
        }
        _tile_loadd(2, low, kBlock * sizeof(bf16));
        _tile_loadd(3, high, kBlock * sizeof(bf16));
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        if (used == kBlock) {
          _tile_loadd(6, low + 2 * kTile, kBlock * sizeof(bf16));
          _tile_loadd(7, high + 2 * kTile, kBlock * sizeof(bf16));
          _tile_dpbf16ps(0, 6, 5);
          _tile_dpbf16ps(1, 7, 5);
        }
        _tile_stored(0, out_low, width * sizeof(float));
        _tile_stored(1, out_high, width * sizeof(float));
      }
    }
  }

  for (int j = 0; j < width; j += kTile) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_loadu_ps(mass + j));
    for (int d = 0; d < dim; d += kTile) {
      __m512i block[kTile];
      for (int i = 0; i < kTile; ++i)
        block[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(acc + (d + i) * width + j), inverse));
      transpose(block);
      for (int i = 0; i < std::min(kTile, rows - j); ++i) {
        bf16* to = out + (static_cast<int64_t>(work.sequence.origin) + work.query + (j + i) / group) * heads * dim +
                   (work.head * group + (j + i) % group) * dim + d;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(block[i])));
      }
    }
  }
}

#else

struct Tiles {};

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

constexpr int kColumns = 2 * kLanes;

typedef int32_t __attribute__((may_alias)) quadruple;

inline void put(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
inline void put(bf16* to, __m256 x) {  // as `store` does
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), both);
}

// R rows of x [rows, depth] times kColumns columns, into `out` [rows, cols].
template <int R, typename T>
inline void multiply(const uint8_t* x, int64_t depth, const int8_t* weight, const int32_t* excess, const float* scales,
                     T* out, int64_t cols) {
  __m256i sum[R][2] = {};
  const __m256i one = _mm256_set1_epi16(1);
  const quadruple* row = reinterpret_cast<const quadruple*>(x);
  const __m256i* column = reinterpret_cast<const __m256i*>(weight);
  for (int64_t d = 0; d < depth / 4; ++d, column += 2) {
    const __m256i left = _mm256_loadu_si256(column), right = _mm256_loadu_si256(column + 1);
#pragma GCC unroll 8  // or the sums would live in memory
    for (int r = 0; r < R; ++r) {
      const __m256i four = _mm256_set1_epi32(row[r * (depth / 4) + d]);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(four, left), one));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(four, right), one));
      // A row after the other: for all products before all sums there are too few registers.
      asm volatile("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i less = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(excess) + half);
    const __m256 by = _mm256_loadu_ps(scales + half * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      put(out + r * cols + half * kLanes, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum[r][half], less)), by));
  }
}

// The same as on tiles, for any number of rows, and columns by the 16.
template <typename T>
void linear(const uint8_t* x, const int8_t* weight, const int32_t* excess, const float* scales, T* out, int64_t rows,
            int64_t depth, int64_t cols) {
#pragma omp parallel for schedule(static)
  for (int64_t j = 0; j < cols; j += kColumns) {
    const auto some = [&](auto count, int64_t i) {
      multiply<count>(x + i * depth, depth, weight + j * depth, excess + j, scales + j, out + i * cols + j, cols);
    };
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) some(std::integral_constant<int, kRows>(), i);
    switch (rows - i) {
      case 1: some(std::integral_constant<int, 1>(), i); break;
      case 2: some(std::integral_constant<int, 2>(), i); break;
      case 3: some(std::integral_constant<int, 3>(), i); break;
      case 4: some(std::integral_constant<int, 4>(), i); break;
      case 5: some(std::integral_constant<int, 5>(), i); break;
    }
  }
}

#endif

// bounds [sequences + 1]: of sequence s, rows bounds[s]:bounds[s + 1] of qkv [rows, (heads + 2 * kv_heads) * dim] are
// the tokens to be computed; where paging.held is null, they are all that there are.
template <typename T>
void attention(const T* qkv, const int32_t* bounds, int64_t sequences, T* out, int64_t heads, int64_t kv_heads,
               int64_t dim, const Paging<T>& paging) {
  std::vector<Sequence<T>> all;
  int64_t loose = 0;  // blocks without pages
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t held = paging.held ? paging.held[s] : 0, first = paging.held ? paging.bounds[s] : 0;
    const int32_t paged = paging.held ? paging.bounds[s + 1] - first : 0;
    const int32_t length = bounds[s + 1] - bounds[s] + held;
    all.push_back({bounds[s] - held, length, paging.pages + first, paged, nullptr});
    loose += std::max(0, (length + kBlock - 1) / kBlock - paged);
  }
  const std::unique_ptr<T[]> memory(new T[loose * kv_heads * 2 * kBlock * dim]);
  T* next = memory.get();
  std::vector<Move<T>> moves;
  std::vector<Work<T>> works;
  for (int64_t s = 0; s < sequences; ++s) {
    Sequence<T>& own = all[s];
    own.loose = next;
    next += std::max(0, (own.length + kBlock - 1) / kBlock - own.paged) * kv_heads * 2 * kBlock * dim;
    const int32_t held = bounds[s] - own.origin;
    for (int32_t head = 0; head < kv_heads; ++head) {
      for (int32_t begin = own.paged ? std::max(held, paging.written[s]) : 0, end; begin < own.length; begin = end) {
        end = std::min(own.length, (begin / kBlock + 1) * kBlock);
        moves.push_back({own, begin, end, head});
      }
      for (int32_t query = held; query < own.length; query += kBlock)
        works.push_back({own, query, std::min(kBlock, own.length - query), head});
    }
  }
  // Longest first, so that threads end together.
  std::stable_sort(works.begin(), works.end(), [](const auto& a, const auto& b) { return a.query > b.query; });
  const int group = static_cast<int>(heads / kv_heads);
  const int64_t rows = kBlock * group;  // a multiple of a tile's
  const int64_t size = rows * (2 * dim + kBlock + 2) + 2 * kBlock * dim;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < static_cast<int64_t>(moves.size()); ++i)
      pack(moves[i], qkv, paging, static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(dim));
    [[maybe_unused]] const Tiles tiles;
    const std::unique_ptr<float[]> scratch(new float[size]);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(works.size()); ++i)
      attend(works[i], qkv, paging, out, group, static_cast<int>(heads), static_cast<int>(kv_heads),
             static_cast<int>(dim), scratch.get());
  }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                             \
  void guard_add_rms_norm_##SUFFIX(float* x, const T* delta, const float* weight, T* out, int64_t rows, int64_t cols, \
                                   float eps) {                                                                       \
    add_rms_norm(x, delta, nullptr, weight, Floats<T>{out}, rows, cols, eps);                                         \
  }                                                                                                                   \
  void guard_silu_mul_##SUFFIX(const T* gate_up, T* out, int64_t rows, int64_t cols) {                                \
    silu_mul(gate_up, nullptr, Floats<T>{out}, rows, cols);                                                           \
  }                                                                                                                   \
  void guard_rope_##SUFFIX(T* qkv, const int32_t* positions, const float* cos, const float* sin, int64_t rows,        \
                           int64_t stride, int64_t heads, int64_t dim) {                                              \
    rope(qkv, nullptr, positions, cos, sin, rows, stride, heads, dim);                                                \
  }                                                                                                                   \
  void guard_attention_##SUFFIX(const T* qkv, const int32_t* bounds, int64_t sequences, T* out, int64_t heads,        \
                                int64_t kv_heads, int64_t dim, T* layer, int64_t page_stride, const int32_t* held,    \
                                const int32_t* written, const int32_t* page_bounds, const int32_t* pages) {           \
    attention(qkv, bounds, sequences, out, heads, kv_heads, dim,                                                      \
              Paging<T>{layer, page_stride, held, written, page_bounds, pages});                                      \
  }

extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)

// Between products of integers: rows come with a scale for each, and go as integers with one.
void guard_add_rms_norm_i8(float* x, const float* delta, const float* delta_scales, const float* weight, uint8_t* out,
                           float* scales, int64_t rows, int64_t cols, float eps) {
  add_rms_norm(x, delta, delta_scales, weight, Integers{out, scales}, rows, cols, eps);
}
void guard_silu_mul_i8(const bf16* gate_up, const float* gate_up_scales, uint8_t* out, float* scales, int64_t rows,
                       int64_t cols, int64_t span) {
  silu_mul(gate_up, gate_up_scales, Integers{out, scales}, rows, cols, span);
}
void guard_rope_i8(bf16* qkv, const float* scales, const int32_t* positions, const float* cos, const float* sin,
                   int64_t rows, int64_t stride, int64_t heads, int64_t dim) {
  rope(qkv, scales, positions, cos, sin, rows, stride, heads, dim);
}
void guard_quantise_f32(const float* x, uint8_t* out, float* scales, int64_t rows, int64_t cols) {
  quantise_rows(x, out, scales, rows, cols);
}
void guard_quantise_bf16(const bf16* x, uint8_t* out, float* scales, int64_t rows, int64_t cols) {
  quantise_rows(x, out, scales, rows, cols);
}

#if defined(__AMX_INT8__) || !defined(__AVX512F__)
void guard_linear_f32(const uint8_t* x, const int8_t* weight, const int32_t* excess, const float* scales, float* out,
                      int64_t rows, int64_t depth, int64_t cols) {
  linear(x, weight, excess, scales, out, rows, depth, cols);
}
void guard_linear_bf16(const uint8_t* x, const int8_t* weight, const int32_t* excess, const float* scales, bf16* out,
                       int64_t rows, int64_t depth, int64_t cols) {
  linear(x, weight, excess, scales, out, rows, depth, cols);
}
#endif

int guard_most() { return kMost; }
int guard_most_pair() { return kMostPair; }

// What the rows of a product of integers come by.
int guard_tile_rows() {
#if defined(__AMX_INT8__)
  return kTile;
#else
  return 1;
#endif
}

// Whether the processor and the system let this process use what the library was built for; before anything else.
bool guard_usable() {
#if defined(__AMX_BF16__)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}
}
