#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/activations.h"
#include "cpu/clones.h"

// Linear layers on panels. A panel is kRows rows of a matrix side by side, [columns][kRows], two vectors per column: so
// the result of one layer is what the next one reads, nothing is padded but the last panel, and a tile of kOuts columns
// of the result stays in registers while weights are broadcast.

namespace fastws {
namespace {

template <typename real_t, int kBytes>
struct Panels {
  using V = typename Lanes<real_t, kBytes>::V;
  static constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  static constexpr int kRows = 2 * kCount;
  static constexpr int kOuts = kBytes == 64 ? 12 : 6;  // with twice as many sums, most of 32 or 16 registers
};

// Zeros, aligned as vectors must be; a std::vector of them is not.
template <typename V>
class Vectors {
 public:
  explicit Vectors(int64_t size = 0) : size_(size) {
    if (size == 0) return;
    start_.reset(static_cast<V*>(::operator new(size * sizeof(V), std::align_val_t(64))));
    std::memset(static_cast<void*>(start_.get()), 0, size * sizeof(V));
  }
  int64_t size() const { return size_; }
  V* data() { return start_.get(); }
  const V* data() const { return start_.get(); }

 private:
  struct Delete {
    void operator()(V* start) const { ::operator delete(start, std::align_val_t(64)); }
  };
  std::unique_ptr<V, Delete> start_;
  int64_t size_;
};

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// What is done to the result of a layer: nothing, times a slope, stored or that of an activation where this says it, or
// an activation in the order of fastws/ops/coordinate_mlp.py.
enum class Finish {
  kNothing = -5,
  kSlopeOfRelu,
  kSlopeOfLeakyRelu,
  kSlopeOfRelu6,
  kSlope,
  kRelu,
  kLeakyRelu,
  kHardswish,
  kGelu,
  kRelu6,
  kElu
};

// What is done to a gradient on its way back through an activation.
inline Finish slope_of(Finish activation) {
  switch (activation) {
    case Finish::kRelu:
      return Finish::kSlopeOfRelu;
    case Finish::kLeakyRelu:
      return Finish::kSlopeOfLeakyRelu;
    case Finish::kRelu6:
      return Finish::kSlopeOfRelu6;
    default:
      return Finish::kSlope;
  }
}

// y = activation(x), slope = its derivative. NaN stays NaN.
template <Finish KIND, typename real_t, int kBytes>
FASTWS_INLINE void activate_as(typename Lanes<real_t, kBytes>::V x, typename Lanes<real_t, kBytes>::V& y,
                               typename Lanes<real_t, kBytes>::V& slope) {
  using V = typename Lanes<real_t, kBytes>::V;
  using Function = Functions<real_t, kBytes>;
  const V zero = {}, one = zero + 1;
  if constexpr (KIND == Finish::kRelu) {
    y = x <= 0 ? zero : x, slope = x > 0 ? one : zero;
  } else if constexpr (KIND == Finish::kLeakyRelu) {
    slope = x > 0 ? one : zero + real_t(0.01), y = x * slope;
  } else if constexpr (KIND == Finish::kHardswish) {
    y = x <= -3 ? zero : x >= 3 ? x : x * (x + 3) * real_t(1.0 / 6);
    slope = x <= -3 ? zero : x >= 3 ? one : (x + x + 3) * real_t(1.0 / 6);
  } else if constexpr (KIND == Finish::kGelu) {
    const V gauss = Function::exponential(x * x * real_t(-0.5)), share = Function::normal_cdf(x, gauss);
    y = x * share, slope = share + x * gauss * real_t(0.3989422804014327);
  } else if constexpr (KIND == Finish::kRelu6) {
    y = x <= 0 ? zero : x >= 6 ? zero + 6 : x, slope = x <= 0 ? zero : x >= 6 ? zero : one;
  } else if constexpr (KIND == Finish::kElu) {
    const V power = Function::exponential(x > 0 ? zero : x);
    y = x > 0 ? x : power - 1, slope = power;
  }
}

template <Finish KIND, typename real_t, int kBytes>
FASTWS_INLINE void finish_as(int64_t size, typename Lanes<real_t, kBytes>::V* y,
                             typename Lanes<real_t, kBytes>::V* slope) {
  using V = typename Lanes<real_t, kBytes>::V;
  const V zero = {};
  V unused;
  for (int64_t i = 0; i < size; ++i)
    if constexpr (KIND == Finish::kSlope)
      y[i] *= slope[i];
    else if constexpr (KIND == Finish::kSlopeOfRelu)
      y[i] = slope[i] > 0 ? y[i] : y[i] * zero;
    else if constexpr (KIND == Finish::kSlopeOfLeakyRelu)
      y[i] = slope[i] > 0 ? y[i] : y[i] * real_t(0.01);
    else if constexpr (KIND == Finish::kSlopeOfRelu6)
      y[i] = slope[i] <= 0 ? y[i] * zero : slope[i] >= 6 ? y[i] * zero : y[i];
    else
      activate_as<KIND, real_t, kBytes>(y[i], y[i], slope ? slope[i] : unused);
}

// In place. slope is read by kSlope, is an activation to its like, and is written by activations unless it is null.
template <typename real_t, int kBytes>
FASTWS_INLINE void finish(Finish kind, int64_t size, typename Lanes<real_t, kBytes>::V* y,
                          typename Lanes<real_t, kBytes>::V* slope) {
  switch (kind) {
    case Finish::kNothing:
      return;
    case Finish::kSlopeOfRelu:
      return finish_as<Finish::kSlopeOfRelu, real_t, kBytes>(size, y, slope);
    case Finish::kSlopeOfLeakyRelu:
      return finish_as<Finish::kSlopeOfLeakyRelu, real_t, kBytes>(size, y, slope);
    case Finish::kSlopeOfRelu6:
      return finish_as<Finish::kSlopeOfRelu6, real_t, kBytes>(size, y, slope);
    case Finish::kSlope:
      return finish_as<Finish::kSlope, real_t, kBytes>(size, y, slope);
    case Finish::kRelu:
      return finish_as<Finish::kRelu, real_t, kBytes>(size, y, slope);
    case Finish::kLeakyRelu:
      return finish_as<Finish::kLeakyRelu, real_t, kBytes>(size, y, slope);
    case Finish::kHardswish:
      return finish_as<Finish::kHardswish, real_t, kBytes>(size, y, slope);
    case Finish::kGelu:
      return finish_as<Finish::kGelu, real_t, kBytes>(size, y, slope);
    case Finish::kRelu6:
      return finish_as<Finish::kRelu6, real_t, kBytes>(size, y, slope);
    case Finish::kElu:
      return finish_as<Finish::kElu, real_t, kBytes>(size, y, slope);
  }
}

// sums[m][v] += sum over p of scalars[m * across + p * along] * vectors[2 * p + v].
template <int kOuts, typename V, typename real_t>
FASTWS_INLINE void multiply(const V* vectors, const real_t* scalars, int64_t across, int64_t along, int64_t depth,
                            V (&sums)[kOuts][2]) {
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; ++p) {
    const V left = vectors[2 * p], right = vectors[2 * p + 1];
#pragma GCC unroll 12
    for (int m = 0; m < kOuts; ++m) {
      const V scalar = scalars[m * across + p * along] - V{};
      sums[m][0] += scalar * left;
      sums[m][1] += scalar * right;
    }
  }
}

// A layer: weights in tiles, [tiles][depth][kOuts], padded with zeros, and biases, padded likewise, or none.
template <typename real_t>
struct Linear {
  const real_t *weights, *bias;
  int64_t tiles, depth;
};

constexpr int64_t kDepth = 320;        // entries that are summed one after the other; a panel of them stays in L1
constexpr int64_t kChunk = 64 * 1024;  // bytes of weights that stay in the second-level cache while panels pass

// y = finish(layer(x)) for several panels; a panel of x has x_stride vectors, one of y and slope y_stride.
template <typename real_t, int kBytes>
FASTWS_CLONES void apply(const Linear<real_t>& layer, Finish kind, const typename Lanes<real_t, kBytes>::V* x,
                         int64_t x_stride, int64_t panels, typename Lanes<real_t, kBytes>::V* y, int64_t y_stride,
                         typename Lanes<real_t, kBytes>::V* slope) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int kOuts = Panels<real_t, kBytes>::kOuts;
  const int64_t parts = (layer.depth + kDepth - 1) / kDepth;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = layer.depth * part / parts, depth = layer.depth * (part + 1) / parts - begin;
    const int64_t chunk = std::max<int64_t>(1, kChunk / (kOuts * depth * int64_t(sizeof(real_t))));
    for (int64_t first = 0; first < layer.tiles; first += chunk)
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t tile = first; tile < std::min(first + chunk, layer.tiles); ++tile) {
          const int64_t place = panel * y_stride + tile * kOuts * 2;
          V sums[kOuts][2] = {};
          multiply(x + panel * x_stride + 2 * begin, layer.weights + (tile * layer.depth + begin) * kOuts, 1, kOuts,
                   depth, sums);
          for (int m = 0; m < kOuts; ++m)
            for (int v = 0; v < 2; ++v) {
              V& to = y[place + 2 * m + v];
              to = sums[m][v] + (part > 0 ? to : V{} + layer.bias[tile * kOuts + m]);
            }
          if (part + 1 == parts) finish<real_t, kBytes>(kind, 2 * kOuts, y + place, slope ? slope + place : nullptr);
        }
  }
}

// Transposes a square of vectors: log2 rounds of interleaving its halves.
template <typename real_t, int kBytes>
FASTWS_INLINE void transpose(typename Lanes<real_t, kBytes>::V (&rows)[Lanes<real_t, kBytes>::kCount]) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  typename Lanes<real_t, kBytes>::I low, high;
  for (int lane = 0; lane < kCount; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kCount;
    high[lane] = low[lane] + kCount / 2;
  }
#pragma GCC unroll 4
  for (int half = 1; half < kCount; half *= 2) {
    V mixed[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kCount / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kCount / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) rows[i] = mixed[i];
  }
}

// to[r] = row r of the transposed square, where from and to are kRows rows of two vectors each.
template <typename real_t, int kBytes>
FASTWS_INLINE void transpose_square(const typename Lanes<real_t, kBytes>::V* from,
                                    typename Lanes<real_t, kBytes>::V* to) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  for (int across = 0; across < 2; ++across)
    for (int down = 0; down < 2; ++down) {
      V block[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) block[i] = from[2 * (down * kCount + i) + across];
      transpose<real_t, kBytes>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) to[2 * (across * kCount + i) + down] = block[i];
    }
}

// A panel of sums of three rows each, and its activation.
template <typename real_t, int kBytes>
FASTWS_CLONES void add_rows(const std::array<const typename Lanes<real_t, kBytes>::V*, 3>* rows, int64_t squares,
                            Finish kind, typename Lanes<real_t, kBytes>::V* panel,
                            typename Lanes<real_t, kBytes>::V* slope) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int kRows = Panels<real_t, kBytes>::kRows;
  for (int64_t square = 0; square < squares; ++square) {
    V sums[2 * kRows];
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < 2; ++v) {
        const int64_t i = 2 * square + v;
        sums[2 * row + v] = rows[row][0][i] + rows[row][1][i] + rows[row][2][i];
      }
    transpose_square<real_t, kBytes>(sums, panel + square * 2 * kRows);
  }
  finish<real_t, kBytes>(kind, squares * 2 * kRows, panel, slope);
}

// strips[square][panel * kRows + row] = kRows columns of a row, two vectors, of each panel of stride vectors.
template <typename real_t, int kBytes>
FASTWS_CLONES void transpose_panels(const typename Lanes<real_t, kBytes>::V* x, int64_t stride, int64_t panels,
                                    int64_t squares, typename Lanes<real_t, kBytes>::V* strips) {
  constexpr int kRows = Panels<real_t, kBytes>::kRows;
  for (int64_t square = 0; square < squares; ++square)
    for (int64_t panel = 0; panel < panels; ++panel)
      transpose_square<real_t, kBytes>(x + panel * stride + square * 2 * kRows,
                                       strips + (square * panels + panel) * 2 * kRows);
}

// sums[square][out] += sum over rows of grad[out, row] * strips[square][row], and bias[out] += its rows, lane by lane.
template <typename real_t, int kBytes>
FASTWS_CLONES void add_products(const typename Lanes<real_t, kBytes>::V* strips, int64_t squares,
                                const typename Lanes<real_t, kBytes>::V* grad, int64_t stride, int64_t panels,
                                int64_t tiles, typename Lanes<real_t, kBytes>::V* total,
                                typename Lanes<real_t, kBytes>::V* bias) {
  using V = typename Lanes<real_t, kBytes>::V;
  constexpr int kOuts = Panels<real_t, kBytes>::kOuts, kRows = Panels<real_t, kBytes>::kRows;
  for (int64_t square = 0; square < squares; ++square)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      V sums[kOuts][2] = {};
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply(strips + (square * panels + panel) * 2 * kRows,
                 reinterpret_cast<const real_t*>(grad + panel * stride + tile * kOuts * 2), kRows, 1, kRows, sums);
      V* const to = total + (square * tiles + tile) * kOuts * 2;
      for (int m = 0; m < kOuts; ++m)
        for (int v = 0; v < 2; ++v) to[2 * m + v] += sums[m][v];
    }
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t out = 0; out < tiles * kOuts; ++out) {
      const V* const entries = grad + panel * stride + 2 * out;
      bias[out] += entries[0] + entries[1];
    }
}

// Adds each row of strips, as transpose_panels makes them, to three rows of the sums.
template <typename real_t, int kBytes>
FASTWS_CLONES void add_to_rows(const typename Lanes<real_t, kBytes>::V* strips, int64_t squares, int64_t rows,
                               int64_t padded_rows, const std::array<typename Lanes<real_t, kBytes>::V*, 3>* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (auto* sums : to[row])
      for (int64_t square = 0; square < squares; ++square)
        for (int v = 0; v < 2; ++v) sums[2 * square + v] += strips[2 * (square * padded_rows + row) + v];
}

template <typename real_t, int kBytes>
FASTWS_CLONES void add(const typename Lanes<real_t, kBytes>::V* x, int64_t size,
                       typename Lanes<real_t, kBytes>::V* sums) {
  for (int64_t i = 0; i < size; ++i) sums[i] += x[i];
}

}  // namespace
}  // namespace fastws
