#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "cpu/activations.h"
#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/trust.h"
#include "dispatch.h"

// Attention of all tokens of a short window to all. With few entries per head the products are thin and exponentials
// are most of the work, so a block of rows goes through all of it while it is in cache: similarities with all tokens,
// softmax, and the sum of values. The way back computes them again from the logarithm of each row's sum.

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int kNarrow = 32;     // bytes of a vector
constexpr int64_t kRows = 32;   // of a block, whose similarities stay in the second-level cache
constexpr int64_t kStep = 16;   // tokens are padded to a multiple of it
constexpr int64_t kApart = 32;  // longer rows get some more, or rows of 2^n entries would share a few places of a cache

template <typename scalar_t>
using real_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// c[r, n] = sum over p of a[r * down + p * along] * b[p, n], for kStrip rows and kColumns vectors; added to c with
// kAdd.
template <bool kAdd, int kStrip, int kColumns, typename V, typename real_t>
FASTWS_INLINE void multiply_block(const real_t* a, int64_t down, int64_t along, int64_t depth, const real_t* b,
                                  int64_t b_row, real_t* c, int64_t c_row) {
  constexpr int kCount = sizeof(V) / sizeof(real_t);
  V sums[kStrip][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < kColumns; ++n) sums[r][n] = kAdd ? load<V>(c + r * c_row + n * kCount) : V{};
#pragma GCC unroll 1  // unrolled, the sums would leave their registers
  for (int64_t p = 0; p < depth; ++p) {
    V factors[kColumns];
#pragma GCC unroll 2
    for (int n = 0; n < kColumns; ++n) factors[n] = load<V>(b + p * b_row + n * kCount);
#pragma GCC unroll 8
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kColumns; ++n) sums[r][n] += a[r * down + p * along] * factors[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < kColumns; ++n) store(sums[r][n], c + r * c_row + n * kCount);
}

// The same for rows, a multiple of 8, and columns, a multiple of the entries of a vector.
template <bool kAdd, typename real_t, int kBytes>
FASTWS_CLONES void multiply(const real_t* a, int64_t down, int64_t along, int64_t depth, const real_t* b, int64_t b_row,
                            real_t* c, int64_t c_row, int64_t rows, int64_t columns) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int64_t kCount = Lanes<real_t, kBytes>::kCount;
  constexpr int kStrip = kBytes == 64 ? 8 : 4;  // two vectors of it are half of 32 or 16 registers
  int64_t n = 0;
  for (; n + 2 * kCount <= columns; n += 2 * kCount)
    for (int64_t r = 0; r < rows; r += kStrip)
      multiply_block<kAdd, kStrip, 2, V>(a + r * down, down, along, depth, b + n, b_row, c + r * c_row + n, c_row);
  for (; n < columns; n += kCount)
    for (int64_t r = 0; r < rows; r += 8)
      multiply_block<kAdd, 8, 1, V>(a + r * down, down, along, depth, b + n, b_row, c + r * c_row + n, c_row);
}

template <typename V>
FASTWS_INLINE auto sum_of(V x) {
  auto sum = x[0];
  for (size_t lane = 1; lane < sizeof(V) / sizeof(sum); ++lane) sum += x[lane];
  return sum;
}

// Turns a row of similarities into exponentials relative to the largest; returns the largest and their sum.
template <typename real_t, int kBytes>
FASTWS_CLONES void exponentials(real_t* row, int64_t count, int64_t padded, real_t* largest, real_t* sum) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int64_t kCount = Lanes<real_t, kBytes>::kCount;
  std::fill(row + count, row + padded, -std::numeric_limits<real_t>::infinity());
  V most = load<V>(row), total = {};
  for (int64_t j = kCount; j < padded; j += kCount) {
    const V x = load<V>(row + j);
    most = x > most ? x : most;
  }
  real_t top = most[0];
  for (int lane = 1; lane < kCount; ++lane) top = std::max(top, most[lane]);
  for (int64_t j = 0; j < padded; j += kCount) {
    const V power = Functions<real_t, kBytes>::exponential(load<V>(row + j) - top);
    store(power, row + j);
    total += power;
  }
  for (int64_t j = count; j < padded; ++j) row[j] = 0;  // exponentials of floats end at e^-87
  *largest = top, *sum = sum_of(total);
}

// Similarities become probabilities, and gradients of probabilities those of similarities.
template <typename real_t, int kBytes>
FASTWS_CLONES void through_softmax(real_t* row, real_t* grad, int64_t count, int64_t padded, real_t logsumexp) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int64_t kCount = Lanes<real_t, kBytes>::kCount;
  V total = {};
  for (int64_t j = 0; j < padded; j += kCount) {
    const V share = Functions<real_t, kBytes>::exponential(load<V>(row + j) - logsumexp);
    store(share, row + j);
    total += share * load<V>(grad + j);  // padded gradients are 0
  }
  std::fill(row + count, row + padded, real_t(0));
  const real_t mean = sum_of(total);
  for (int64_t j = 0; j < padded; j += kCount) store(load<V>(row + j) * (load<V>(grad + j) - mean), grad + j);
}

// Sizes of a head in [B, W, 3 * H * d], and those of its copies: [tokens, row] with padded_size columns in use, and
// their transposes and similarities, [.., column] with padded_tokens in use.
struct Heads {
  int64_t heads, tokens, size, padded_tokens, padded_size, row, column;

  Heads(const Tensor& qkv, int64_t heads, int64_t step)
      : heads(heads),
        tokens(qkv.size(1)),
        size(qkv.size(2) / (3 * heads)),
        padded_tokens(round_up(tokens, kStep)),
        padded_size(round_up(size, step)),
        row(padded_size + (padded_size < kApart ? 0 : kStep)),
        column(padded_tokens + (padded_tokens < kApart ? 0 : kStep)) {}

  int64_t entries() const { return std::max(padded_tokens * row, padded_size * column); }
  int64_t width() const { return heads * size; }
};

// Rows of a head with zeros for padding, which is zero before and stays so.
template <typename scalar_t, typename real_t>
void take(const Heads& h, const scalar_t* from, int64_t stride, real_t scale, real_t* rows) {
  for (int64_t i = 0; i < h.tokens; ++i)
    for (int64_t k = 0; k < h.size; ++k) rows[i * h.row + k] = real_t(from[i * stride + k]) * scale;
}

template <typename real_t>
void transpose_rows(const Heads& h, const real_t* rows, real_t* columns) {
  for (int64_t k = 0; k < h.size; ++k)
    for (int64_t i = 0; i < h.tokens; ++i) columns[k * h.column + i] = rows[i * h.row + k];
}

template <typename scalar_t, typename real_t>
void give(const Heads& h, const real_t* rows, int64_t count, const real_t* factors, scalar_t* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < h.size; ++k)
      to[i * stride + k] = scalar_t(rows[i * h.row + k] * (factors ? factors[i] : real_t(1)));
}

// One head at a time, in memory that is reused.
template <typename scalar_t, typename real_t, int kBytes>
struct Worker {
  static constexpr int kHead = kNarrow;  // bytes of vectors along a head, which has few entries
  const Heads& h;
  Vectors<typename Lanes<real_t, 64>::V> memory;
  real_t *query, *key, *value, *grad, *key_columns, *value_columns, *grad_key, *grad_value, *scores, *grads, *rows;

  explicit Worker(const Heads& h)
      : h(h), memory((8 * h.entries() + 2 * kRows * h.column + kRows * h.row) * sizeof(real_t) / 64) {
    real_t* start = reinterpret_cast<real_t*>(memory.data());
    for (real_t** part : {&query, &key, &value, &grad, &key_columns, &value_columns, &grad_key, &grad_value})
      *part = start, start += h.entries();
    scores = start, grads = scores + kRows * h.column, rows = grads + kRows * h.column;
  }

  real_t scale() const { return 1 / std::sqrt(real_t(h.size)); }

  void load_head(const scalar_t* qkv) {
    take(h, qkv, 3 * h.width(), scale(), query);
    take(h, qkv + h.width(), 3 * h.width(), real_t(1), key);
    take(h, qkv + 2 * h.width(), 3 * h.width(), real_t(1), value);
    transpose_rows(h, key, key_columns);
  }

  // to[i, j] = sum over k of from[i, k] * columns[k, j], of all tokens j
  void compare(const real_t* from, const real_t* columns, int64_t padded, real_t* to) {
    multiply<false, real_t, kBytes>(from, h.row, 1, h.padded_size, columns, h.column, to, h.column, padded,
                                    h.padded_tokens);
  }

  // rows[i] = sum over all tokens j of weights[i, j] * from[j]
  void gather(const real_t* weights, const real_t* from, int64_t padded) {
    multiply<false, real_t, kHead>(weights, h.column, 1, h.padded_tokens, from, h.row, rows, h.row, padded,
                                   h.padded_size);
  }

  // to[j] += sum over the first rows i of weights[i, j] * from[i]
  void scatter(const real_t* weights, int64_t count, const real_t* from, real_t* to) {
    multiply<true, real_t, kHead>(weights, 1, h.column, count, from, h.row, to, h.row, h.padded_tokens, h.padded_size);
  }

  void forward(const scalar_t* qkv, scalar_t* out, real_t* logsumexp) {
    load_head(qkv);
    for (int64_t first = 0; first < h.tokens; first += kRows) {
      const int64_t count = std::min(kRows, h.tokens - first), padded = round_up(count, kStep);
      compare(query + first * h.row, key_columns, padded, scores);
      real_t inverse[kRows];
      for (int64_t i = 0; i < count; ++i) {
        real_t largest, sum;
        exponentials<real_t, kBytes>(scores + i * h.column, h.tokens, h.padded_tokens, &largest, &sum);
        inverse[i] = 1 / sum, logsumexp[first + i] = largest + std::log(sum);
      }
      gather(scores, value, padded);
      give(h, rows, count, inverse, out + first * h.width(), h.width());
    }
  }

  void backward(const scalar_t* qkv, const scalar_t* grad_out, const real_t* logsumexp, scalar_t* grad_qkv) {
    load_head(qkv);
    take(h, grad_out, h.width(), real_t(1), grad);
    transpose_rows(h, value, value_columns);
    std::fill(grad_key, grad_key + 2 * h.entries(), real_t(0));
    real_t scales[kRows];
    std::fill(scales, scales + kRows, scale());
    for (int64_t first = 0; first < h.tokens; first += kRows) {
      const int64_t count = std::min(kRows, h.tokens - first), padded = round_up(count, kStep);
      compare(query + first * h.row, key_columns, padded, scores);
      compare(grad + first * h.row, value_columns, padded, grads);
      for (int64_t i = 0; i < count; ++i)
        through_softmax<real_t, kBytes>(scores + i * h.column, grads + i * h.column, h.tokens, h.padded_tokens,
                                        logsumexp[first + i]);
      scatter(scores, count, grad + first * h.row, grad_value);
      scatter(grads, count, query + first * h.row, grad_key);
      gather(grads, key, padded);
      give(h, rows, count, scales, grad_qkv + first * 3 * h.width(), 3 * h.width());
    }
    give(h, grad_key, h.tokens, static_cast<real_t*>(nullptr), grad_qkv + h.width(), 3 * h.width());
    give(h, grad_value, h.tokens, static_cast<real_t*>(nullptr), grad_qkv + 2 * h.width(), 3 * h.width());
  }
};

// Calls body(worker, window, head) for all heads.
template <typename scalar_t, typename Body>
void each_head(const Tensor& qkv, int64_t heads, const Body& body) {
  using real_t = real_type<scalar_t>;
  const Heads h(qkv, heads, kNarrow / int64_t(sizeof(real_t)));
  torch::stable::parallel_for(0, qkv.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    const auto work = [&](auto worker) {
      for (int64_t i = begin; i < end; ++i) body(worker, i / heads, i % heads);
    };
    if (has_wide_vectors())
      work(Worker<scalar_t, real_t, 2 * kNarrow>(h));
    else
      work(Worker<scalar_t, real_t, kNarrow>(h));
  });
}

void check_attention(const char* op, const Tensor& qkv, int64_t heads) {
  check_tensor(op, "qkv", qkv, qkv.scalar_type(), {kAny, kAny, kAny});
  const int64_t entries = qkv.size(2);
  const bool fits = 0 < heads && heads <= entries && entries % (3 * heads) == 0;
  STD_TORCH_CHECK(fits, op, ": qkv must hold query, key and value of ", heads, " heads, got ", shape_of(qkv.sizes()));
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& qkv_, int64_t heads) {
  const Tensor qkv = as_contiguous(qkv_);
  check_attention("attention", qkv, heads);
  const int64_t windows = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2) / 3, size = width / heads;
  const Tensor out = new_empty(qkv, {windows, tokens, width});
  const Tensor logsumexp = new_empty(qkv, {windows, heads, tokens}, sum_dtype(qkv.scalar_type()));
  dispatch_floating(qkv.scalar_type(), "attention", [&]<typename scalar_t>() {
    const scalar_t* from = qkv.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    auto* sums = logsumexp.mutable_data_ptr<real_type<scalar_t>>();
    each_head<scalar_t>(qkv, heads, [&](auto& worker, int64_t window, int64_t head) {
      worker.forward(from + window * tokens * 3 * width + head * size, to + window * tokens * width + head * size,
                     sums + (window * heads + head) * tokens);
    });
  });
  return {out, logsumexp};
}

Tensor attention_backward_cpu(const Tensor& grad_, const Tensor& qkv_, const Tensor& logsumexp_, int64_t heads) {
  const Tensor grad = as_contiguous(grad_), qkv = as_contiguous(qkv_), logsumexp = as_contiguous(logsumexp_);
  check_attention("attention_backward", qkv, heads);
  const int64_t windows = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2) / 3, size = width / heads;
  check_tensor("attention_backward", "grad", grad, qkv.scalar_type(), {windows, tokens, width});
  check_tensor("attention_backward", "logsumexp", logsumexp, sum_dtype(qkv.scalar_type()), {windows, heads, tokens});
  const Tensor grad_qkv = new_empty(qkv, {windows, tokens, 3 * width});
  dispatch_floating(qkv.scalar_type(), "attention_backward", [&]<typename scalar_t>() {
    const scalar_t *from = qkv.const_data_ptr<scalar_t>(), *of_out = grad.const_data_ptr<scalar_t>();
    scalar_t* to = grad_qkv.mutable_data_ptr<scalar_t>();
    const auto* sums = logsumexp.const_data_ptr<real_type<scalar_t>>();
    each_head<scalar_t>(qkv, heads, [&](auto& worker, int64_t window, int64_t head) {
      const int64_t place = window * tokens * 3 * width + head * size;
      worker.backward(from + place, of_out + window * tokens * width + head * size,
                      sums + (window * heads + head) * tokens, to + place);
    });
  });
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace fastws
