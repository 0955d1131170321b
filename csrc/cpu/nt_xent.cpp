#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/trust.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTile = 64;   // rows and columns of a tile of similarities, which stays in the first-level cache
constexpr int64_t kLanes = 16;  // columns that one strip of a product keeps in registers
constexpr int64_t kStrip = 4;   // rows that it keeps in registers
constexpr double kSmallestNorm = 1e-8;
constexpr double kMasked = -1e30;  // similarity of pairs that do not count; finite, so that differences are numbers

// One row of a tile, where vectors do not straddle cache lines.
template <typename real_t>
struct alignas(64) TileRow {
  real_t lane[kTile];
};

// What half precision is computed in.
template <typename scalar_t>
using real_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// e^x to 2 ulps, in arithmetic that the compiler turns into vectors; 0 below -87. For x up to 87.
__attribute__((always_inline)) inline float exponential(float x) {
  constexpr float kShift = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which then fills the low bits
  const float shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln(2), ln(2) in two parts
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1;
  p = p * r + 1;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);  // 2^n
  return x < -87 ? 0 : p * power;
}

__attribute__((always_inline)) inline double exponential(double x) { return std::exp(x); }

// std::max, which returns a reference, is not vectorised.
template <typename real_t>
__attribute__((always_inline)) inline real_t larger(real_t a, real_t b) {
  return a < b ? b : a;
}

// c[r, l] = sum over p of a[p * along + r * across] * b[p, l], for r < rows and l < kTile; adds to c with kAdd. rows is
// a multiple of kStrip; b and c have kTile columns.
template <bool kAdd, typename real_t>
FASTWS_CLONES void multiply(const real_t* a, int64_t along, int64_t across, int64_t depth, const real_t* b, real_t* c,
                            int64_t rows) {
  for (int64_t first = 0; first < rows; first += kStrip)
    for (int64_t column = 0; column < kTile; column += kLanes) {
      real_t sums[kStrip][kLanes] = {};
      for (int64_t p = 0; p < depth; ++p)
        for (int64_t r = 0; r < kStrip; ++r) {
          const real_t factor = a[p * along + (first + r) * across];
#pragma GCC unroll 1  // unrolled before it is vectorised, the loop would be neither in registers nor in vectors
          for (int64_t lane = 0; lane < kLanes; ++lane) sums[r][lane] += factor * b[p * kTile + column + lane];
        }
      for (int64_t r = 0; r < kStrip; ++r)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          real_t& out = c[(first + r) * kTile + column + lane];
          out = kAdd ? out + sums[r][lane] : sums[r][lane];
        }
    }
}

// The rows of both views divided by their norms, padded with zeros to whole tiles.
template <typename real_t>
struct UnitRows {
  int64_t batch, size, width, blocks;    // B, E, E rounded up to whole strips, tiles side by side
  std::vector<real_t> rows;              // [blocks * kTile, width]
  std::vector<TileRow<real_t>> columns;  // [blocks, width], the same transposed
  std::vector<real_t> norms;             // [blocks * kTile]

  template <typename scalar_t>
  UnitRows(const scalar_t* z_i, const scalar_t* z_j, int64_t batch, int64_t size)
      : batch(batch),
        size(size),
        width((size + kStrip - 1) / kStrip * kStrip),
        blocks((2 * batch + kTile - 1) / kTile),
        rows(blocks * kTile * width),
        columns(blocks * width),
        norms(blocks * kTile) {
    for (int64_t k = 0; k < 2 * batch; ++k) {
      const scalar_t* z = k < batch ? z_i + k * size : z_j + (k - batch) * size;
      double square = 0;
      for (int64_t e = 0; e < size; ++e) square += double(z[e]) * double(z[e]);
      norms[k] = std::sqrt(square);
      const double inverse = 1 / std::max(std::sqrt(square), kSmallestNorm);
      for (int64_t e = 0; e < size; ++e) {
        rows[k * width + e] = double(z[e]) * inverse;
        columns[k / kTile * width + e].lane[k % kTile] = rows[k * width + e];
      }
    }
  }

  int64_t other(int64_t k) const { return k < batch ? k + batch : k - batch; }

  // tile[r, l] = cosine of row first_block * kTile + r and row second_block * kTile + l
  void cosines(int64_t first_block, int64_t second_block, real_t* tile) const {
    multiply<false>(rows.data() + first_block * kTile * width, 1, width, size, columns[second_block * width].lane, tile,
                    kTile);
  }
};

// Sums of exponentials, one per row of a tile, relative to the largest exponent: sum over l of exp(s[k, l] - largest).
template <typename real_t>
struct Partial {
  real_t largest, sum;
};

// Scales a tile of cosines to similarities; the pairs that do not count are of a row with itself or with padding.
template <typename real_t>
FASTWS_CLONES void scale_and_mask(real_t* tile, real_t scale, int64_t first, int64_t second, int64_t count) {
  for (int64_t i = 0; i < kTile * kTile; ++i) tile[i] *= scale;
  if (first != second && std::max(first, second) + kTile <= count) return;
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t l = 0; l < kTile; ++l)
      if (first + r == second + l || first + r >= count || second + l >= count) tile[r * kTile + l] = kMasked;
}

// Partial sums of the rows and of the columns of a tile of similarities.
template <typename real_t>
FASTWS_CLONES void sum_exponentials(const real_t* tile, Partial<real_t>* of_rows, Partial<real_t>* of_columns) {
  real_t largest[kTile], sums[kTile] = {};
  std::fill(largest, largest + kTile, real_t(kMasked));
  for (int64_t r = 0; r < kTile; ++r) {
    const real_t* s = tile + r * kTile;
    real_t lanes[kLanes], lane_sums[kLanes] = {};
    std::fill(lanes, lanes + kLanes, real_t(kMasked));
    for (int64_t column = 0; column < kTile; column += kLanes)
#pragma GCC unroll 1
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], s[column + lane]);
    for (int64_t l = 0; l < kTile; ++l) largest[l] = larger(largest[l], s[l]);
    const real_t row_largest = *std::max_element(lanes, lanes + kLanes);
    for (int64_t column = 0; column < kTile; column += kLanes)
#pragma GCC unroll 1
      for (int64_t lane = 0; lane < kLanes; ++lane) lane_sums[lane] += exponential(s[column + lane] - row_largest);
    real_t sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lane_sums[lane];
    of_rows[r] = {row_largest, sum};
  }
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t l = 0; l < kTile; ++l) sums[l] += exponential(tile[r * kTile + l] - largest[l]);
  for (int64_t l = 0; l < kTile; ++l) of_columns[l] = {largest[l], sums[l]};
}

// tile[r, l] = exp(s - row[r]) + exp(s - column[l]), where s is the similarity tile[r, l].
template <typename real_t>
FASTWS_CLONES void weigh(real_t* tile, const real_t* row, const real_t* column) {
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t l = 0; l < kTile; ++l) {
      const real_t s = tile[r * kTile + l];
      tile[r * kTile + l] = exponential(s - row[r]) + exponential(s - column[l]);
    }
}

// log(sum over l != k of exp(s[k, l])) of the 2B rows, and their similarities with their other views. A similarity
// serves two rows, so only the tiles on and above the diagonal are computed; each leaves its own partial sums, which
// are added in order: the result does not depend on the threads.
template <typename real_t>
std::pair<std::vector<real_t>, std::vector<real_t>> sum_rows(const UnitRows<real_t>& u, double temperature) {
  const int64_t count = 2 * u.batch, padded = u.blocks * kTile;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t first = 0; first < u.blocks; ++first)
    for (int64_t second = first; second < u.blocks; ++second) tiles.emplace_back(first, second);

  std::vector<Partial<real_t>> partials(u.blocks * padded);  // [blocks, rows]
  std::vector<real_t> positives(count);
  torch::stable::parallel_for(0, tiles.size(), 4, [&](int64_t begin, int64_t end) {
    alignas(64) real_t tile[kTile * kTile];
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, second] = tiles[i];
      u.cosines(first, second, tile);
      scale_and_mask<real_t>(tile, real_t(1 / temperature), first * kTile, second * kTile, count);
      for (int64_t k = first * kTile; k < std::min((first + 1) * kTile, u.batch); ++k)
        if (u.other(k) / kTile == second)
          positives[k] = positives[u.other(k)] = tile[k % kTile * kTile + u.other(k) % kTile];
      // on the diagonal both are the same sums
      sum_exponentials<real_t>(tile, &partials[second * padded + first * kTile],
                               &partials[first * padded + second * kTile]);
    }
  });

  std::vector<real_t> logsumexp(padded);
  for (int64_t k = 0; k < count; ++k) {
    real_t largest = kMasked;
    for (int64_t block = 0; block < u.blocks; ++block)
      largest = std::max(largest, partials[block * padded + k].largest);
    double sum = 0;
    for (int64_t block = 0; block < u.blocks; ++block) {
      const Partial<real_t>& partial = partials[block * padded + k];
      sum += double(partial.sum) * std::exp(double(partial.largest) - double(largest));
    }
    logsumexp[k] = largest + std::log(sum);
  }
  return {logsumexp, positives};
}

// Gradients of the rows of one block, before the norm: grad[e, l] = sum over j of w[j, l] * u[j, e], where
// w[j, l] = p[j, l] + p[l, j] - 2 * (j is the other view of l), p = exp(s - logsumexp).
template <typename real_t>
void grad_unit_rows(const UnitRows<real_t>& u, const real_t* logsumexp, double temperature, int64_t block,
                    real_t* grad) {
  const int64_t count = 2 * u.batch, first = block * kTile, last = std::min(first + kTile, count);
  alignas(64) real_t weights[kTile * kTile];
  std::fill(grad, grad + u.width * kTile, real_t(0));
  for (int64_t other_block = 0; other_block < u.blocks; ++other_block) {
    u.cosines(other_block, block, weights);
    scale_and_mask<real_t>(weights, real_t(1 / temperature), other_block * kTile, first, count);
    weigh<real_t>(weights, logsumexp + other_block * kTile, logsumexp + first);
    for (int64_t k = first; k < last; ++k) {
      const int64_t other = u.other(k);
      if (other / kTile == other_block) weights[other % kTile * kTile + k - first] -= 2;
    }
    multiply<true>(u.rows.data() + other_block * kTile * u.width, u.width, 1, kTile, weights, grad, u.width);
  }
}

// grad_z = (g - dot(g, u) * u) / norm for row k and g = scale * grad[:, lane]; rows that are not normalised keep g.
template <typename scalar_t, typename real_t>
void through_the_norm(const UnitRows<real_t>& u, const real_t* grad, double scale, int64_t k, scalar_t* grad_z) {
  const real_t* row = u.rows.data() + k * u.width;
  const int64_t lane = k % kTile;
  double along = 0;
  if (double(u.norms[k]) > kSmallestNorm)
    for (int64_t e = 0; e < u.size; ++e) along += double(grad[e * kTile + lane]) * double(row[e]);
  scale /= std::max(double(u.norms[k]), kSmallestNorm);
  for (int64_t e = 0; e < u.size; ++e)
    grad_z[e] = scalar_t(real_t(scale * (double(grad[e * kTile + lane]) - along * double(row[e]))));
}

void check_views(const char* op, const Tensor& z_i, const Tensor& z_j) {
  check_tensor(op, "z_i", z_i, z_i.scalar_type(), {kAny, kAny});
  check_like(op, "z_j", z_j, z_i);
}

std::tuple<Tensor, Tensor> nt_xent_cpu(const Tensor& z_i_, const Tensor& z_j_, double temperature) {
  const Tensor z_i = as_contiguous(z_i_), z_j = as_contiguous(z_j_);
  check_views("nt_xent", z_i, z_j);
  const int64_t count = 2 * z_i.size(0);
  const Tensor loss = torch::stable::new_empty(z_i, {});
  const Tensor logsumexp = torch::stable::new_empty(z_i, {count}, sum_dtype(z_i.scalar_type()));

  dispatch_floating(z_i.scalar_type(), "nt_xent", [&]<typename scalar_t>() {
    using real_t = real_type<scalar_t>;
    const UnitRows<real_t> u(z_i.const_data_ptr<scalar_t>(), z_j.const_data_ptr<scalar_t>(), z_i.size(0), z_i.size(1));
    const auto [sums, positives] = sum_rows(u, temperature);
    double total = 0;
    for (int64_t k = 0; k < count; ++k) total += double(sums[k]) - double(positives[k]);
    std::copy(sums.begin(), sums.begin() + count, logsumexp.mutable_data_ptr<real_t>());
    *loss.mutable_data_ptr<scalar_t>() = scalar_t(real_t(total / count));
  });
  return {loss, logsumexp};
}

std::tuple<Tensor, Tensor> nt_xent_backward_cpu(const Tensor& grad, const Tensor& z_i_, const Tensor& z_j_,
                                                const Tensor& logsumexp_, double temperature) {
  const Tensor z_i = as_contiguous(z_i_), z_j = as_contiguous(z_j_);
  const Tensor logsumexp = as_contiguous(logsumexp_);
  check_views("nt_xent_backward", z_i, z_j);
  const int64_t batch = z_i.size(0), size = z_i.size(1);
  check_tensor("nt_xent_backward", "grad", grad, z_i.scalar_type(), {});
  check_tensor("nt_xent_backward", "logsumexp", logsumexp, sum_dtype(z_i.scalar_type()), {2 * batch});
  const Tensor grad_i = torch::stable::empty_like(z_i), grad_j = torch::stable::empty_like(z_j);

  dispatch_floating(z_i.scalar_type(), "nt_xent_backward", [&]<typename scalar_t>() {
    using real_t = real_type<scalar_t>;
    const UnitRows<real_t> u(z_i.const_data_ptr<scalar_t>(), z_j.const_data_ptr<scalar_t>(), batch, size);
    std::vector<real_t> sums(u.blocks * kTile);
    std::copy_n(logsumexp.const_data_ptr<real_t>(), 2 * batch, sums.begin());
    const double scale = double(*grad.const_data_ptr<scalar_t>()) / (2 * batch * temperature);
    scalar_t* out_i = grad_i.mutable_data_ptr<scalar_t>();
    scalar_t* out_j = grad_j.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, u.blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<TileRow<real_t>> grad_u(u.width);
      for (int64_t block = begin; block < end; ++block) {
        grad_unit_rows<real_t>(u, sums.data(), temperature, block, grad_u[0].lane);
        const int64_t last = std::min((block + 1) * kTile, 2 * batch);
        for (int64_t k = block * kTile; k < last; ++k) {
          scalar_t* grad_z = k < batch ? out_i + k * size : out_j + (k - batch) * size;
          through_the_norm<scalar_t, real_t>(u, grad_u[0].lane, scale, k, grad_z);
        }
      }
    });
  });
  return {grad_i, grad_j};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&nt_xent_cpu));
  m.impl("nt_xent_backward", TORCH_BOX(&nt_xent_backward_cpu));
}

}  // namespace fastws
