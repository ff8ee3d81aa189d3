// What a packed Llama forward does between its matrix products, fused: residual + RMS norm, RoPE, SwiGLU's product,
// and causal grouped-query attention over many sequences that stand in one row.
//
// A plain C interface over caller-owned buffers; loaded with ctypes by guard/model/kernels.py. Every output element is
// computed in float32 in an order that depends on its own row alone (attention: keys in blocks at fixed positions), so
// no result depends on what else is in the batch, nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

struct bf16 { uint16_t bits; };

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

// A row as integers of 1..255 that stand for -127..127, which is what VNNI multiplies with int8 weights; returns what
// -127..127 are to be multiplied by. A row of zeros stays one.
inline float quantise(const float* row, uint8_t* out, int64_t cols) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < cols; ++j) largest = std::max(largest, std::fabs(row[j]));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) out[j] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(row[j] * inverse)) + 128);
  return largest / 127.0f;
}

void quantise_rows(const float* x, uint8_t* out, float* scales, int64_t rows, int64_t cols) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) scales[i] = quantise(x + i * cols, out + i * cols, cols);
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

template <typename T, typename Out>
void silu_mul(const T* gate_up, const float* scales, Out out, int64_t rows, int64_t cols) {
#pragma omp parallel
  {
    std::vector<float> gated(cols);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const T *gate = gate_up + i * 2 * cols, *up = gate + cols;
      const float scale = scales ? scales[i] : 1.0f;
      float* row = gated.data();
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) {
        const float g = load(gate[j]) * scale;
        const float e = exp_nonpositive(g < 0 ? g : -g);  // sigmoid(g) = 1 / (1 + e) or e / (1 + e): never overflows
        row[j] = (g < 0 ? g * e : g) / (1 + e) * (load(up[j]) * scale);
      }
      out.put(i, row, cols);
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

struct Work {
  int32_t start, query, queries, head;  // first token of the sequence, first query position, how many, key head
};

// Online softmax over blocks of keys (Milakov & Gimelshein 2018; FlashAttention, Dao 2022). A block holds the query
// heads that share a key head, so that keys are read once for all of them.
template <typename T>
void attend(const Work& work, const T* qkv, T* out, int group, int heads, int kv_heads, int dim, float* scratch) {
  const int stride = (heads + 2 * kv_heads) * dim, rows = work.queries * group;
  float* q = scratch;                    // [rows, dim], scaled
  float* scores = q + rows * dim;        // [rows, kBlock]
  float* acc = scores + rows * kBlock;   // [rows, dim]
  float* keys = acc + rows * dim;        // [dim, kBlock], transposed
  float* values = keys + dim * kBlock;   // [kBlock, dim]
  float* top = values + kBlock * dim;    // [rows], running maximum
  float* mass = top + rows;              // [rows], running sum
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const T* sequence = qkv + static_cast<int64_t>(work.start) * stride;

  for (int i = 0; i < rows; ++i) {
    const T* from = sequence + static_cast<int64_t>(work.query + i / group) * stride + (work.head * group + i % group) * dim;
    for (int d = 0; d < dim; ++d) q[i * dim + d] = load(from[d]) * scale;
    top[i] = -INFINITY;
    mass[i] = 0;
  }
  std::fill(acc, acc + rows * dim, 0.0f);

  const int last = work.query + work.queries;  // keys that any of these queries may see
  for (int begin = 0; begin < last; begin += kBlock) {
    const int count = std::min(kBlock, last - begin);
    for (int k = 0; k < kBlock; ++k) {
      const T* key = sequence + static_cast<int64_t>(begin + k) * stride + (heads + work.head) * dim;
      const T* value = key + kv_heads * dim;
      for (int d = 0; d < dim; ++d) {
        keys[d * kBlock + k] = k < count ? load(key[d]) : 0.0f;
        values[k * dim + d] = k < count ? load(value[d]) : 0.0f;
      }
    }
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
    T* to = out + (static_cast<int64_t>(work.start) + work.query + i / group) * heads * dim + (work.head * group + i % group) * dim;
    const float inverse = 1.0f / mass[i];
    for (int d = 0; d < dim; ++d) store(to + d, acc[i * dim + d] * inverse);
  }
}

// bounds [sequences + 1]: sequence s is rows bounds[s]:bounds[s + 1] of qkv [rows, (heads + 2 * kv_heads) * dim].
template <typename T>
void attention(const T* qkv, const int32_t* bounds, int64_t sequences, T* out, int64_t heads, int64_t kv_heads,
               int64_t dim) {
  std::vector<Work> works;
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = bounds[s + 1] - bounds[s];
    for (int32_t query = 0; query < length; query += kBlock)
      for (int32_t head = 0; head < kv_heads; ++head)
        works.push_back({bounds[s], query, std::min(kBlock, length - query), head});
  }
  // Longest first, so that threads end together.
  std::stable_sort(works.begin(), works.end(), [](const Work& a, const Work& b) { return a.query > b.query; });
  const int group = static_cast<int>(heads / kv_heads);
  const int64_t rows = kBlock * group;
  const int64_t size = rows * (2 * dim + kBlock + 2) + 2 * kBlock * dim;
#pragma omp parallel
  {
    std::vector<float> scratch(size);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(works.size()); ++i)
      attend(works[i], qkv, out, group, static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(dim),
             scratch.data());
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
                                int64_t kv_heads, int64_t dim) {                                                      \
    attention(qkv, bounds, sequences, out, heads, kv_heads, dim);                                                     \
  }

extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)

// Between products of integers: rows come as float32 with a scale for each, and go as integers with one.
void guard_add_rms_norm_i8(float* x, const float* delta, const float* delta_scales, const float* weight, uint8_t* out,
                           float* scales, int64_t rows, int64_t cols, float eps) {
  add_rms_norm(x, delta, delta_scales, weight, Integers{out, scales}, rows, cols, eps);
}
void guard_silu_mul_i8(const float* gate_up, const float* gate_up_scales, uint8_t* out, float* scales, int64_t rows,
                       int64_t cols) {
  silu_mul(gate_up, gate_up_scales, Integers{out, scales}, rows, cols);
}
void guard_rope_i8(float* qkv, const float* scales, const int32_t* positions, const float* cos, const float* sin,
                   int64_t rows, int64_t stride, int64_t heads, int64_t dim) {
  rope(qkv, scales, positions, cos, sin, rows, stride, heads, dim);
}
void guard_quantise_i8(const float* x, uint8_t* out, float* scales, int64_t rows, int64_t cols) {
  quantise_rows(x, out, scales, rows, cols);
}
}
