#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/clones.h"

// Layers of several small CNNs side by side, one network per lane of a vector, so that every loop is full width
// whatever the sizes of a layer are. Maps are [channels][height][width] of such vectors, weights as in PyTorch.

// vectors are passed between functions of one file only, all of them inlined
#pragma GCC diagnostic ignored "-Wpsabi"
#define FASTWS_INLINE __attribute__((always_inline)) inline

namespace fastws {
namespace {

// kBytes of numbers, one per network.
template <typename real_t, int kBytes>
struct Lanes {
  static constexpr int kCount = kBytes / sizeof(real_t);
  using integer_t = std::conditional_t<sizeof(real_t) == 8, int64_t, int32_t>;
  typedef real_t V __attribute__((vector_size(kBytes)));
  typedef integer_t I __attribute__((vector_size(kBytes)));  // also what comparing two V gives
};

// A convolution without padding. A dense layer is one of a map of 1 x 1.
struct Convolution {
  int64_t in_channels, in_height, in_width, out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width;

  int64_t fan_in() const { return in_channels * kernel_height * kernel_width; }
  int64_t out_size() const { return out_height * out_width; }
};

// sums[m][r * COLUMNS + q] += what channel m of the block of ROWS x COLUMNS outputs at x, the first input of the block,
// is. The sums fill most registers: each weight serves ROWS * COLUMNS of them, each input CHANNELS.
template <int CHANNELS, int ROWS, int COLUMNS, typename V>
FASTWS_INLINE void convolve_block(const Convolution& c, const V* x, const V* weight,
                                  V (&sums)[CHANNELS][ROWS * COLUMNS]) {
  const int64_t fan_in = c.fan_in(), down = c.stride_height * c.in_width, right = c.stride_width;
  for (int64_t channel = 0; channel < c.in_channels; ++channel)
    for (int64_t i = 0; i < c.kernel_height; ++i) {
      const V* input = x + (channel * c.in_height + i) * c.in_width;
#pragma GCC unroll 1  // unrolled, the loop would load its operands several times
      for (int64_t j = 0; j < c.kernel_width; ++j, ++input, ++weight) {
        V inputs[ROWS * COLUMNS];
#pragma GCC unroll 8
        for (int p = 0; p < ROWS * COLUMNS; ++p) inputs[p] = input[p / COLUMNS * down + p % COLUMNS * right];
#pragma GCC unroll 8
        for (int m = 0; m < CHANNELS; ++m) {
          const V factor = weight[m * fan_in];
#pragma GCC unroll 8
          for (int p = 0; p < ROWS * COLUMNS; ++p) sums[m][p] += factor * inputs[p];
        }
      }
    }
}

// y[first + m] for m < CHANNELS, in blocks of 2 x 2, at the edges of fewer.
template <int CHANNELS, int ROWS, int COLUMNS, typename V>
FASTWS_INLINE void convolve_at(const Convolution& c, const V* x, const V* weight, const V* bias, int64_t row,
                               int64_t column, V* y) {
  V sums[CHANNELS][ROWS * COLUMNS];
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < ROWS * COLUMNS; ++p) sums[m][p] = bias ? bias[m] : V{};
  convolve_block<CHANNELS, ROWS, COLUMNS>(c, x + row * c.stride_height * c.in_width + column * c.stride_width, weight,
                                          sums);
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < ROWS * COLUMNS; ++p)
      y[m * c.out_size() + (row + p / COLUMNS) * c.out_width + column + p % COLUMNS] = sums[m][p];
}

template <int CHANNELS, typename V>
FASTWS_INLINE void convolve_channels(const Convolution& c, const V* x, const V* weight, const V* bias, V* y) {
  int64_t row = 0;
  for (; row + 2 <= c.out_height; row += 2) {
    int64_t column = 0;
    for (; column + 2 <= c.out_width; column += 2) convolve_at<CHANNELS, 2, 2>(c, x, weight, bias, row, column, y);
    if (column < c.out_width) convolve_at<CHANNELS, 2, 1>(c, x, weight, bias, row, column, y);
  }
  if (row < c.out_height) {
    int64_t column = 0;
    for (; column + 2 <= c.out_width; column += 2) convolve_at<CHANNELS, 1, 2>(c, x, weight, bias, row, column, y);
    if (column < c.out_width) convolve_at<CHANNELS, 1, 1>(c, x, weight, bias, row, column, y);
  }
}

// Calls body<n>(first) for consecutive runs of n <= 3 channels, as equal as possible: two or three wherever that is
// possible, because one channel alone would not fill the registers.
template <typename Body>
FASTWS_INLINE void for_channels(int64_t channels, const Body& body) {
  const int64_t runs = (channels + 2) / 3;
  for (int64_t run = 0, first = 0; run < runs; ++run) {
    const int64_t count = (channels - first + runs - run - 1) / (runs - run);
    if (count == 3)
      body.template operator()<3>(first);
    else if (count == 2)
      body.template operator()<2>(first);
    else
      body.template operator()<1>(first);
    first += count;
  }
}

// As for_channels in runs of 8, 4, 2 and 1, for dense layers.
template <typename Body>
FASTWS_INLINE void for_units(int64_t units, const Body& body) {
  int64_t first = 0;
  for (; first + 8 <= units; first += 8) body.template operator()<8>(first);
  if (units & 4) body.template operator()<4>(first), first += 4;
  if (units & 2) body.template operator()<2>(first), first += 2;
  if (units & 1) body.template operator()<1>(first);
}

// y = convolution of x; bias may be null.
template <typename real_t, int kBytes>
FASTWS_CLONES void convolve(const Convolution& c, const typename Lanes<real_t, kBytes>::V* x,
                            const typename Lanes<real_t, kBytes>::V* weight,
                            const typename Lanes<real_t, kBytes>::V* bias, typename Lanes<real_t, kBytes>::V* y) {
  if (c.out_size() == 1)
    for_units(c.out_channels, [&]<int n>(int64_t first) __attribute__((always_inline)) {
      convolve_at<n, 1, 1>(c, x, weight + first * c.fan_in(), bias ? bias + first : nullptr, 0, 0, y + first);
    });
  else
    for_channels(c.out_channels, [&]<int n>(int64_t first) __attribute__((always_inline)) {
      convolve_channels<n>(c, x, weight + first * c.fan_in(), bias ? bias + first : nullptr, y + first * c.out_size());
    });
}

// y = largest of each 2 x 2 outputs of the convolution, whose out_height and out_width are even; winner = which it is.
template <typename real_t, int kBytes>
FASTWS_CLONES void convolve_and_pool(const Convolution& c, const typename Lanes<real_t, kBytes>::V* x,
                                     const typename Lanes<real_t, kBytes>::V* weight,
                                     const typename Lanes<real_t, kBytes>::V* bias,
                                     typename Lanes<real_t, kBytes>::V* y, typename Lanes<real_t, kBytes>::I* winner) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  const int64_t height = c.out_height / 2, width = c.out_width / 2;
  for_channels(c.out_channels, [&]<int n>(int64_t first) __attribute__((always_inline)) {
    for (int64_t row = 0; row < height; ++row)
      for (int64_t column = 0; column < width; ++column) {
        V sums[n][4];
#pragma GCC unroll 8
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 8
          for (int p = 0; p < 4; ++p) sums[m][p] = bias ? bias[first + m] : V{};
        const V* corner = x + 2 * row * c.stride_height * c.in_width + 2 * column * c.stride_width;
        convolve_block<n, 2, 2>(c, corner, weight + first * c.fan_in(), sums);
#pragma GCC unroll 8
        for (int m = 0; m < n; ++m) {
          V largest = sums[m][0];
          I place = {};
#pragma GCC unroll 8
          for (int p = 1; p < 4; ++p) {
            const I larger = sums[m][p] > largest;
            largest = larger ? sums[m][p] : largest;
            place = larger ? I{} + p : place;
          }
          const int64_t to = ((first + m) * height + row) * width + column;
          y[to] = largest;
          winner[to] = place;
        }
      }
  });
}

// grad[2 i + p / 2, 2 j + p % 2] = grad_y[i, j] for the winner p of the block, else 0.
template <typename real_t, int kBytes>
FASTWS_CLONES void spread(const typename Lanes<real_t, kBytes>::V* grad_y,
                          const typename Lanes<real_t, kBytes>::I* winner, int64_t rows, int64_t width,
                          typename Lanes<real_t, kBytes>::V* grad) {
  using V = typename Lanes<real_t, kBytes>::V;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; ++column, ++grad_y, ++winner)
#pragma GCC unroll 8
      for (int p = 0; p < 4; ++p)
        grad[(2 * row + p / 2) * 2 * width + 2 * column + p % 2] = *winner == p ? *grad_y : V{};
}

// y = largest of each block of a map, row by row of blocks; winner = its number in the block, the first of equals. What
// fills no block is left out.
template <typename real_t, int kBytes>
FASTWS_CLONES void pool(const Convolution& c, const typename Lanes<real_t, kBytes>::V* x,
                        typename Lanes<real_t, kBytes>::V* y, typename Lanes<real_t, kBytes>::I* winner) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  for (int64_t channel = 0; channel < c.in_channels; ++channel)
    for (int64_t row = 0; row < c.out_height; ++row)
      for (int64_t column = 0; column < c.out_width; ++column) {
        const V* corner = x + (channel * c.in_height + row * c.kernel_height) * c.in_width + column * c.kernel_width;
        V largest = *corner;
        I place = {};
        for (int p = 1; p < c.kernel_height * c.kernel_width; ++p) {
          const V entry = corner[p / c.kernel_width * c.in_width + p % c.kernel_width];
          place = entry > largest ? I{} + p : place;
          largest = entry > largest ? entry : largest;
        }
        *y++ = largest, *winner++ = place;
      }
}

// grad_x = grad_y at the winners, else 0.
template <typename real_t, int kBytes>
FASTWS_CLONES void unpool(const Convolution& c, const typename Lanes<real_t, kBytes>::V* grad_y,
                          const typename Lanes<real_t, kBytes>::I* winner, typename Lanes<real_t, kBytes>::V* grad_x) {
  using V = typename Lanes<real_t, kBytes>::V;
  std::fill(grad_x, grad_x + c.in_channels * c.in_height * c.in_width, V{});
  for (int64_t channel = 0; channel < c.in_channels; ++channel)
    for (int64_t row = 0; row < c.out_height; ++row)
      for (int64_t column = 0; column < c.out_width; ++column, ++grad_y, ++winner) {
        V* corner = grad_x + (channel * c.in_height + row * c.kernel_height) * c.in_width + column * c.kernel_width;
        for (int p = 0; p < c.kernel_height * c.kernel_width; ++p)
          corner[p / c.kernel_width * c.in_width + p % c.kernel_width] = *winner == p ? *grad_y : V{};
      }
}

// grad_weight[first + m, channel, i, j0 + j] += sum over outputs of grad * input, m < CHANNELS, j < TAPS. The sums stay
// in registers over the whole map.
template <int CHANNELS, int TAPS, typename V>
FASTWS_INLINE void add_taps(const Convolution& c, const V* x, const V* grad, V* grad_weight) {
  V sums[CHANNELS][TAPS] = {};
  const int64_t fan_in = c.fan_in(), size = c.out_size();
  for (int64_t row = 0; row < c.out_height; ++row) {
    const V* inputs = x + row * c.stride_height * c.in_width;
    for (int64_t column = 0; column < c.out_width; ++column, ++grad, inputs += c.stride_width) {
      V factors[CHANNELS];
#pragma GCC unroll 8
      for (int m = 0; m < CHANNELS; ++m) factors[m] = grad[m * size];
#pragma GCC unroll 8
      for (int j = 0; j < TAPS; ++j) {
        const V input = inputs[j];
#pragma GCC unroll 8
        for (int m = 0; m < CHANNELS; ++m) sums[m][j] += factors[m] * input;
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < TAPS; ++j) grad_weight[m * fan_in + j] += sums[m][j];
}

// The taps of one row of kernels, five at most at a time.
template <int CHANNELS, typename V>
FASTWS_INLINE void add_row_of_taps(const Convolution& c, const V* x, const V* grad, V* grad_weight) {
  int64_t j = 0;
  for (; c.kernel_width - j >= 5; j += 5) add_taps<CHANNELS, 5>(c, x + j, grad, grad_weight + j);
  switch (c.kernel_width - j) {
    case 4:
      return add_taps<CHANNELS, 4>(c, x + j, grad, grad_weight + j);
    case 3:
      return add_taps<CHANNELS, 3>(c, x + j, grad, grad_weight + j);
    case 2:
      return add_taps<CHANNELS, 2>(c, x + j, grad, grad_weight + j);
    case 1:
      return add_taps<CHANNELS, 1>(c, x + j, grad, grad_weight + j);
  }
}

// grad_weight += gradient of the weights, given that of the outputs.
template <typename real_t, int kBytes>
FASTWS_CLONES void add_weight_gradient(const Convolution& c, const typename Lanes<real_t, kBytes>::V* x,
                                       const typename Lanes<real_t, kBytes>::V* grad,
                                       typename Lanes<real_t, kBytes>::V* grad_weight) {
  using V = typename Lanes<real_t, kBytes>::V;
  if (c.out_size() == 1 && c.in_height == 1 && c.in_width == 1) {
    for (int64_t unit = 0; unit < c.out_channels; ++unit)
      for (int64_t channel = 0; channel < c.in_channels; ++channel) *grad_weight++ += grad[unit] * x[channel];
    return;
  }
  const int64_t fan_in = c.fan_in();
  const auto add = [&]<int n>(int64_t first) __attribute__((always_inline)) {
    for (int64_t channel = 0; channel < c.in_channels; ++channel)
      for (int64_t i = 0; i < c.kernel_height; ++i) {
        const V* inputs = x + (channel * c.in_height + i) * c.in_width;
        V* to = grad_weight + first * fan_in + (channel * c.kernel_height + i) * c.kernel_width;
        add_row_of_taps<n>(c, inputs, grad + first * c.out_size(), to);
      }
  };
  if (c.kernel_width > 3)  // 2 x 5 sums; 3 x 5 would not leave registers for their factors
    for (int64_t first = 0; first < c.out_channels; first += 2)
      first + 1 < c.out_channels ? add.template operator()<2>(first) : add.template operator()<1>(first);
  else
    for_channels(c.out_channels, add);
}

// grad_bias[channel] += sum over the map of grad.
template <typename real_t, int kBytes>
FASTWS_CLONES void add_bias_gradient(int64_t channels, int64_t size, const typename Lanes<real_t, kBytes>::V* grad,
                                     typename Lanes<real_t, kBytes>::V* grad_bias) {
  using V = typename Lanes<real_t, kBytes>::V;
  for (int64_t channel = 0; channel < channels; ++channel, grad += size) {
    V sums[4] = {};  // four chains hide the latency of additions
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
#pragma GCC unroll 8
      for (int k = 0; k < 4; ++k) sums[k] += grad[i + k];
    for (; i < size; ++i) sums[0] += grad[i];
    grad_bias[channel] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// grad_x[channel + m, row, from + ...] += what COLUMNS outputs from `column` on give back through TAPS taps from j0 on.
// With a stride COLUMNS must be 1.
template <int CHANNELS, int COLUMNS, int TAPS, typename V>
FASTWS_INLINE void give_back(const Convolution& c, const V* weight, const V* grad, int64_t row, int64_t column,
                             V* grad_x) {
  constexpr int kSpan = COLUMNS + TAPS - 1;
  const int64_t fan_in = c.fan_in(), taps = c.kernel_height * c.kernel_width, map = c.in_height * c.in_width;
  V* to = grad_x + row * c.in_width + column * c.stride_width;
  V sums[CHANNELS][kSpan];
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
    for (int s = 0; s < kSpan; ++s) sums[m][s] = to[m * map + s];
  const int64_t past = std::max<int64_t>(row / c.stride_height - c.out_height + 1, 0);  // outputs below the map
  const int64_t begin = row % c.stride_height + past * c.stride_height, end = std::min(row + 1, c.kernel_height);
  grad += (row / c.stride_height - past) * c.out_width + column;
  for (int64_t i = begin; i < end; i += c.stride_height, grad -= c.out_width) {
    const V* g = grad;
    const V* w = weight + i * c.kernel_width;
    for (int64_t channel = 0; channel < c.out_channels; ++channel, g += c.out_size(), w += fan_in) {
      V factors[COLUMNS];
#pragma GCC unroll 8
      for (int q = 0; q < COLUMNS; ++q) factors[q] = g[q];
#pragma GCC unroll 8
      for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < TAPS; ++j) {
          const V tap = w[m * taps + j];
#pragma GCC unroll 8
          for (int q = 0; q < COLUMNS; ++q) sums[m][q + j] += tap * factors[q];
        }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m)
#pragma GCC unroll 8
    for (int s = 0; s < kSpan; ++s) to[m * map + s] = sums[m][s];
}

template <int CHANNELS, int TAPS, typename V>
FASTWS_INLINE void give_back_taps(const Convolution& c, const V* weight, const V* grad, V* grad_x) {
  for (int64_t row = 0; row < c.in_height; ++row) {
    int64_t column = 0;
    if (c.stride_width == 1) {
      for (; column + 4 <= c.out_width; column += 4) give_back<CHANNELS, 4, TAPS>(c, weight, grad, row, column, grad_x);
      for (; column + 2 <= c.out_width; column += 2) give_back<CHANNELS, 2, TAPS>(c, weight, grad, row, column, grad_x);
    }
    for (; column < c.out_width; ++column) give_back<CHANNELS, 1, TAPS>(c, weight, grad, row, column, grad_x);
  }
}

template <int CHANNELS, typename V>
FASTWS_INLINE void give_back_channels(const Convolution& c, const V* weight, const V* grad, V* grad_x) {
  int64_t j = 0;
  for (; c.kernel_width - j >= 5; j += 5) give_back_taps<CHANNELS, 5>(c, weight + j, grad, grad_x + j);
  switch (c.kernel_width - j) {
    case 4:
      return give_back_taps<CHANNELS, 4>(c, weight + j, grad, grad_x + j);
    case 3:
      return give_back_taps<CHANNELS, 3>(c, weight + j, grad, grad_x + j);
    case 2:
      return give_back_taps<CHANNELS, 2>(c, weight + j, grad, grad_x + j);
    case 1:
      return give_back_taps<CHANNELS, 1>(c, weight + j, grad, grad_x + j);
  }
}

// grad_x = gradient of the inputs, given that of the outputs.
template <typename real_t, int kBytes>
FASTWS_CLONES void input_gradient(const Convolution& c, const typename Lanes<real_t, kBytes>::V* weight,
                                  const typename Lanes<real_t, kBytes>::V* grad,
                                  typename Lanes<real_t, kBytes>::V* grad_x) {
  using V = typename Lanes<real_t, kBytes>::V;
  const int64_t map = c.in_height * c.in_width, taps = c.kernel_height * c.kernel_width;
  if (map == 1) {
    for_units(c.in_channels, [&]<int n>(int64_t first) __attribute__((always_inline)) {
      V sums[n] = {};
      for (int64_t unit = 0; unit < c.out_channels; ++unit) {
        const V factor = grad[unit];
#pragma GCC unroll 8
        for (int m = 0; m < n; ++m) sums[m] += weight[unit * c.in_channels + first + m] * factor;
      }
#pragma GCC unroll 8
      for (int m = 0; m < n; ++m) grad_x[first + m] = sums[m];
    });
    return;
  }
  std::fill(grad_x, grad_x + c.in_channels * map, V{});
  int64_t channel = 0;
  for (; channel + 2 <= c.in_channels; channel += 2)
    give_back_channels<2>(c, weight + channel * taps, grad, grad_x + channel * map);
  if (channel < c.in_channels) give_back_channels<1>(c, weight + channel * taps, grad, grad_x + channel * map);
}

}  // namespace
}  // namespace fastws
