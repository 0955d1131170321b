#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/trust.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kStatistics = 7;
constexpr int64_t kPercents[] = {1, 25, 50, 75, 99};
constexpr int64_t kQuantiles = std::size(kPercents), kRanks = 2 * kQuantiles;  // an order statistic on both sides
constexpr int64_t kLanes = 16;   // partial results side by side: they do not depend on the vector length
constexpr int64_t kBlock = 512;  // weights that are gone over several times, in cache
constexpr int64_t kSmall = 64;   // weights that are sorted rather than selected from
constexpr int64_t kMinBins = 64, kMaxBins = 4096;  // 16 KiB of counts stay in the first cache

// What weights are compared in: half precision has no vector instructions.
template <typename scalar_t>
using real_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename real>
struct Moments {
  double mean = 0, squares = 0;  // sum of squared deviations from the mean
  real low = std::numeric_limits<real>::infinity(), high = -std::numeric_limits<real>::infinity();
  bool finite = true;
};

// Combines lanes, half with half, which takes few steps that wait for one another.
template <int64_t size, typename number, typename Combine>
[[gnu::always_inline]] inline number fold(const number (&lanes)[size], Combine combine) {
  if constexpr (size == 1) {
    return lanes[0];
  } else {
    number halves[size / 2];
    for (int64_t lane = 0; lane < size / 2; ++lane) halves[lane] = combine(lanes[lane], lanes[lane + size / 2]);
    return fold(halves, combine);
  }
}

// Sum, extremes and whether all are finite, of the weights of one block.
template <typename real>
FASTWS_CLONES void block_extremes(const real* x, int64_t size, double* sum, Moments<real>* moments) {
  double sums[kLanes] = {};
  real lows[kLanes], highs[kLanes];
  int32_t bad[kLanes] = {};
  std::fill(lows, lows + kLanes, moments->low);
  std::fill(highs, highs + kLanes, moments->high);
  const auto add = [&](real value, int64_t lane) __attribute__((always_inline)) {
    sums[lane] += value;
    lows[lane] = value < lows[lane] ? value : lows[lane];
    highs[lane] = value > highs[lane] ? value : highs[lane];
    bad[lane] |= !(std::abs(value) <= std::numeric_limits<real>::max());
  };
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) add(x[i + lane], lane);
  for (int64_t i = whole; i < size; ++i) add(x[i], i - whole);
  *sum = fold(sums, [](double a, double b) { return a + b; });
  moments->low = fold(lows, [](real a, real b) { return a < b ? a : b; });
  moments->high = fold(highs, [](real a, real b) { return a > b ? a : b; });
  moments->finite = moments->finite && !fold(bad, [](int32_t a, int32_t b) { return a | b; });
}

template <typename real>
FASTWS_CLONES double squared_deviations(const real* x, int64_t size, double mean) {
  double sums[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += (x[i + lane] - mean) * (x[i + lane] - mean);
  for (int64_t i = whole; i < size; ++i) sums[i - whole] += (x[i] - mean) * (x[i] - mean);
  return fold(sums, [](double a, double b) { return a + b; });
}

// Block by block, each about its own mean, put together as by Chan et al. (1979): one read, and no loss far from zero.
template <typename real>
Moments<real> compute_moments(const real* x, int64_t size) {
  Moments<real> moments;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = std::min(kBlock, size - first);
    double sum;
    block_extremes(x + first, count, &sum, &moments);
    const double mean = sum / count, delta = mean - moments.mean, share = double(count) / (first + count);
    moments.squares += squared_deviations(x + first, count, mean) + delta * delta * first * share;
    moments.mean += delta * share;
  }
  return moments;
}

// Sorts at most kSmall numbers: the place of a number is how many are smaller, or equal and before it. More comparisons
// than other ways, but side by side and without branches that nobody can predict.
template <typename real>
FASTWS_CLONES void sort_small(real* x, int64_t size) {
  using integer = std::conditional_t<sizeof(real) == 8, int64_t, int32_t>;
  constexpr integer kSide = 8;
  typedef real Reals __attribute__((vector_size(kSide * sizeof(real))));
  typedef integer Integers __attribute__((vector_size(kSide * sizeof(real))));
  constexpr Integers kSides = {0, 1, 2, 3, 4, 5, 6, 7};
  real unsorted[kSmall];
  std::fill(std::copy(x, x + size, unsorted), std::end(unsorted), real(0));
  for (int64_t first = 0; first < size; first += kSide) {
    Reals mine;
    std::memcpy(&mine, unsorted + first, sizeof(mine));
    const int64_t here = std::min<int64_t>(kSide, size - first);
    Integers places = {};  // a comparison that holds is -1
    for (int64_t i = 0; i < first; ++i) places -= unsorted[i] <= mine;
    for (integer i = 0; i < here; ++i)
      places -= (unsorted[first + i] < mine) | ((unsorted[first + i] == mine) & (i < kSides));
    for (int64_t i = first + here; i < size; ++i) places -= unsorted[i] < mine;
    for (int64_t side = 0; side < here; ++side) x[places[side]] = mine[side];
  }
}

// A histogram whose bins have equal width: (x - low) * scale never decreases with x, so bins keep the order of weights.
template <typename real>
struct Bins {
  real low, scale;
  int32_t last;
};

template <typename real>
Bins<real> make_bins(const Moments<real>& moments, int64_t count) {
  constexpr real kMax = std::numeric_limits<real>::max();
  const real range = moments.high - moments.low, last = count - 1;
  if (range > kMax) return {0, 0, int32_t(last)};  // all into the first
  return {moments.low, std::min(count / range, kMax), int32_t(last)};
}

template <typename real>
FASTWS_CLONES void find_bins(const real* x, int64_t size, Bins<real> bins, int16_t* found) {
  for (int64_t i = 0; i < size; ++i) {
    const int32_t bin = int32_t((x[i] - bins.low) * bins.scale);
    found[i] = int16_t(bin < bins.last ? bin : bins.last);
  }
}

template <typename real>
void count_bins(const real* x, int64_t size, Bins<real> bins, int32_t* counts) {
  int16_t found[kBlock];
  std::fill(counts, counts + bins.last + 1, 0);
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = std::min(kBlock, size - first);
    find_bins(x + first, count, bins, found);
    for (int64_t i = 0; i < count; ++i) ++counts[found[i]];
  }
}

// hits[i] = whether found[i] is one of the wanted bins.
FASTWS_CLONES void find_hits(const int16_t* found, int64_t size, const int16_t* wanted, uint8_t* hits) {
  for (int64_t i = 0; i < size; ++i) {
    bool hit = false;
    for (int64_t k = 0; k < kRanks; ++k) hit |= found[i] == wanted[k];
    hits[i] = hit;
  }
}

// Copies the weights of the wanted bins; returns how many.
template <typename real>
int64_t gather_bins(const real* x, int64_t size, Bins<real> bins, const int16_t* wanted, real* gathered) {
  constexpr int64_t kBits = 64;
  constexpr uint64_t kCollect =
      0x0102040810204080;  // times eight bytes that are 0 or 1: these bits in the highest byte
  int16_t found[kBlock];
  uint8_t hits[kBlock];
  real* next = gathered;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = std::min(kBlock, size - first);
    find_bins(x + first, count, bins, found);
    const int64_t padded = (count + kBits - 1) / kBits * kBits;
    std::fill(found + count, found + padded, int16_t(-1));
    find_hits(found, padded, wanted, hits);
    for (int64_t i = 0; i < count; i += kBits) {
      uint64_t bits = 0, eight;
      for (int64_t k = 0; k < 8; ++k) {
        std::memcpy(&eight, hits + i + 8 * k, 8);
        bits |= eight * kCollect >> 56 << 8 * k;
      }
      for (; bits; bits &= bits - 1) *next++ = x[first + i + std::countr_zero(bits)];
    }
  }
  return next - gathered;
}

// Where kRanks order statistics are, of which one is not before the other.
struct Ranks {
  int64_t rank[kRanks];

  explicit Ranks(int64_t size) {
    for (int64_t q = 0; q < kQuantiles; ++q) {
      rank[2 * q] = kPercents[q] * (size - 1) / 100;
      rank[2 * q + 1] = std::min(rank[2 * q] + 1, size - 1);
    }
  }
};

// Finds order statistics by counting in which bins they are, and selecting from the weights of those bins. Where all
// weights are in few bins this is a selection from all of them.
template <typename real>
class Selector {
 public:
  explicit Selector(int64_t longest) : gathered_(new real[longest]) {}

  void select(const real* x, int64_t size, const Moments<real>& moments, const int64_t* ranks, real* values) {
    int64_t places[kRanks], count = size;
    std::copy(ranks, ranks + kRanks, places);
    if (size <= kSmall) {
      std::copy(x, x + size, gathered_.get());
    } else {
      int64_t bins = kMinBins;
      while (bins < kMaxBins && 4 * bins < size) bins *= 2;
      const Bins<real> grid = make_bins(moments, bins);
      count_bins(x, size, grid, counts_);
      int16_t wanted[kRanks];
      choose_bins(places, wanted);
      count = gather_bins(x, size, grid, wanted, gathered_.get());
    }
    if (count <= kSmall)
      sort_small(gathered_.get(), count);
    else
      select_gathered(places, count);
    for (int64_t k = 0; k < kRanks; ++k) values[k] = gathered_[places[k]];
  }

 private:
  // Finds the bins that hold ranks, and turns ranks among all weights into ranks among those of these bins.
  void choose_bins(int64_t* ranks, int16_t* wanted) {
    int64_t bin = 0, below = 0, unwanted = 0, last = -1;
    for (int64_t k = 0; k < kRanks; ++k) {
      for (; below + counts_[bin] <= ranks[k]; ++bin) {
        below += counts_[bin];
        unwanted += bin == last ? 0 : counts_[bin];
      }
      wanted[k] = int16_t(last = bin);
      ranks[k] -= unwanted;
    }
  }

  void select_gathered(const int64_t* ranks, int64_t count) {
    int64_t done = 0;  // what stands before is not larger than what follows
    for (int64_t k = 0; k < kRanks; ++k) {
      if (ranks[k] < done) continue;
      std::nth_element(gathered_.get() + done, gathered_.get() + ranks[k], gathered_.get() + count);
      done = ranks[k] + 1;
    }
  }

  std::unique_ptr<real[]> gathered_;
  int32_t counts_[kMaxBins];
};

template <typename real>
void describe(const real* x, int64_t size, Selector<real>& selector, double* statistics) {
  const Moments<real> moments = compute_moments(x, size);
  if (size == 0 || !moments.finite) {
    std::fill(statistics, statistics + kStatistics, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  const Ranks ranks(size);
  real values[kRanks];
  selector.select(x, size, moments, ranks.rank, values);
  statistics[0] = moments.mean;
  statistics[1] = moments.squares / size;
  for (int64_t q = 0; q < kQuantiles; ++q) {
    const double below = values[2 * q], above = values[2 * q + 1], rest = kPercents[q] * (size - 1) % 100 / 100.0;
    statistics[2 + q] = below + (above - below) * rest;
  }
}

// Row after row, its longest segments first: threads take the next segment when they are done with one.
template <typename scalar_t>
void describe_all(const scalar_t* flat, int64_t batch, int64_t num_weights, const int64_t* offsets, int64_t segments,
                  double* statistics) {
  using real = real_type<scalar_t>;
  std::vector<int64_t> order(segments);
  std::iota(order.begin(), order.end(), 0);
  const auto length = [=](int64_t segment) { return offsets[2 * segment + 1] - offsets[2 * segment]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t longest = segments ? length(order[0]) : 0;
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    Selector<real> selector(longest);
    const std::unique_ptr<real[]> converted(std::is_same_v<real, scalar_t> ? nullptr : new real[longest]);
    for (int64_t task = next++; task < batch * segments; task = next++) {
      const int64_t row = task / segments, segment = order[task % segments], size = length(segment);
      const scalar_t* x = flat + row * num_weights + offsets[2 * segment];
      double* out = statistics + (row * segments + segment) * kStatistics;
      if constexpr (std::is_same_v<real, scalar_t>) {
        describe<real>(x, size, selector, out);
      } else {
        std::copy(x, x + size, converted.get());
        describe<real>(converted.get(), size, selector, out);
      }
    }
  });
}

void check_segments(const int64_t* offsets, int64_t segments, int64_t num_weights) {
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t begin = offsets[2 * segment], end = offsets[2 * segment + 1];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= num_weights, "layer_statistics: offsets[", segment,
                    "] must have 0 <= begin <= end <= ", num_weights, ", got [", begin, ", ", end, "]");
  }
}

Tensor layer_statistics_cpu(const Tensor& flat_, const Tensor& offsets_) {
  const Tensor flat = as_contiguous(flat_), offsets = as_contiguous(offsets_);
  check_tensor("layer_statistics", "flat", flat, flat.scalar_type(), {kAny, kAny});
  check_tensor("layer_statistics", "offsets", offsets, torch::headeronly::ScalarType::Long, {kAny, 2});
  const int64_t batch = flat.size(0), segments = offsets.size(0);
  check_segments(offsets.const_data_ptr<int64_t>(), segments, flat.size(1));
  const Tensor statistics =
      torch::stable::new_empty(flat, {batch, segments, kStatistics}, torch::headeronly::ScalarType::Double);

  dispatch_floating(flat.scalar_type(), "layer_statistics", [&]<typename scalar_t>() {
    describe_all(flat.const_data_ptr<scalar_t>(), batch, flat.size(1), offsets.const_data_ptr<int64_t>(), segments,
                 statistics.mutable_data_ptr<double>());
  });
  return statistics;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("layer_statistics", TORCH_BOX(&layer_statistics_cpu)); }

}  // namespace fastws
