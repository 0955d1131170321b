#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "philox.h"
#include "small_cnn_table.h"

// Small CNNs, one per block, whose threads run a tile of samples through it layer by layer. Each sample has its maps in
// one stretch of memory, [channels][height][width] of every layer. What is no longer needed makes room: where the input
// of an activation was are its slopes, and on the way back the gradient of a map takes the place of the map.

namespace fastws {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxOperations = 40;  // tables travel as arguments of kernels, which have room for 4 KB
constexpr int kChannels = 4;        // outputs or inputs of a convolution that one thread computes at a place
constexpr int kTaps = 5;            // weights of which one thread sums the gradients
constexpr int kAlignment = 8;       // normals of one counter
constexpr double kTiny = 1e-15;     // keeps logarithms and roots of zero away

// A row of the table or several in one: a convolution with the pooling behind it, an activation with its
// dropout. A dense layer is a convolution of a map of 1 x 1.
struct Operation {
  int64_t kind;  // kDropout where there is no activation before it
  int in_channels, in_height, in_width, out_channels, out_height, out_width;  // out: behind the pooling
  int kernel_height, kernel_width, stride_height, stride_width;
  int pool_height, pool_width;  // 1 x 1 without pooling
  int weight, bias, unit;       // the first of each, or -1
  int input, output, extra;     // where the maps of a sample begin; extra: which entries of pooling blocks are largest
  int slope, normal;            // of a noisy layer: map of the slopes of its noise, number of its first normal

  C10_HOST_DEVICE bool elementwise() const { return kind == kActivation || kind == kDropout; }
  C10_HOST_DEVICE int in_area() const { return in_height * in_width; }
  C10_HOST_DEVICE int out_area() const { return out_height * out_width; }
  C10_HOST_DEVICE int in_size() const { return in_channels * in_area(); }
  C10_HOST_DEVICE int out_size() const { return out_channels * out_area(); }
  // a convolution without its pooling
  C10_HOST_DEVICE int full_height() const { return (in_height - kernel_height) / stride_height + 1; }
  C10_HOST_DEVICE int full_width() const { return (in_width - kernel_width) / stride_width + 1; }
  C10_HOST_DEVICE int full_size() const { return out_channels * full_height() * full_width(); }
  C10_HOST_DEVICE int fan_in() const { return in_channels * kernel_height * kernel_width; }
  C10_HOST_DEVICE bool is_dense() const { return in_area() == 1; }
  C10_HOST_DEVICE bool pooled() const { return pool_height * pool_width > 1; }
};

struct Network {
  Operation operations[kMaxOperations];
  int num_operations, first_convolution, num_weights, image_size, num_classes;
  int units;    // of all dropout layers
  int normals;  // that a noisy network needs for a sample
  int numbers;  // of all maps of a sample, odd: then the same place of several samples is in different banks
};

// What one thread found: cross-entropies and hits of samples, divergences of weights.
struct Score {
  double loss;
  int64_t correct;
  double divergence;
};

// What one way through a network needs: dropout is draw `offset` of the seed, noise the one after it; the tile begins
// at sample `begin`.
struct Pass {
  int activation;
  double dropout;
  uint64_t seed, offset;
  int64_t begin;
};

// Puts a row behind the operations before it, or into the last of them.
inline void add_row(const Row& row, Network& network) {
  constexpr int64_t kSpan = 256;  // of a pooling block, whose places are stored in 16 bits
  Operation* before = network.num_operations ? &network.operations[network.num_operations - 1] : nullptr;
  if (row.kind == kDropout) network.units = int(row.first_unit + row.out_size());
  if (row.kind == kPooling && before && before->kind == kConvolution && !before->pooled() &&
      row.kernel_height * before->stride_height <= kSpan && row.kernel_width * before->stride_width <= kSpan) {
    before->pool_height = int(row.kernel_height), before->pool_width = int(row.kernel_width);
    before->out_height = int(row.out_height()), before->out_width = int(row.out_width());
  } else if (row.kind == kDropout && before && before->elementwise() && before->unit < 0) {
    before->unit = int(row.first_unit);
  } else {
    network.operations[network.num_operations++] = {.kind = row.kind,
                                                    .in_channels = int(row.in_channels),
                                                    .in_height = int(row.in_height),
                                                    .in_width = int(row.in_width),
                                                    .out_channels = int(row.out_channels),
                                                    .out_height = int(row.out_height()),
                                                    .out_width = int(row.out_width()),
                                                    .kernel_height = int(row.kernel_height),
                                                    .kernel_width = int(row.kernel_width),
                                                    .stride_height = int(row.stride_height),
                                                    .stride_width = int(row.stride_width),
                                                    .pool_height = 1,
                                                    .pool_width = 1,
                                                    .weight = int(row.weight_offset),
                                                    .bias = int(row.bias_offset),
                                                    .unit = row.kind == kDropout ? int(row.first_unit) : -1};
  }
}

// Reads a table; maps are counted in numbers of so many bytes.
inline Network make_network(const Row* rows, int64_t count, int64_t num_weights, int number_size, bool noisy) {
  Network network{};
  network.num_weights = int(num_weights);
  for (int64_t r = 0; r < count; ++r) add_row(rows[r], network);
  int first = 0;
  while (network.operations[first].kind != kConvolution) ++first;
  network.first_convolution = first;
  network.image_size = network.numbers = network.operations[0].in_size();
  int input = 0;
  for (int l = 0; l < network.num_operations; ++l) {
    Operation& operation = network.operations[l];
    const int place_size = operation.kind == kPooling ? sizeof(int32_t) : operation.pooled() ? sizeof(uint16_t) : 0;
    operation.input = input, operation.output = input = network.numbers;
    operation.extra = network.numbers += operation.out_size();
    network.numbers += (operation.out_size() * place_size + number_size - 1) / number_size;
    if (!noisy || operation.kind != kConvolution) continue;
    operation.slope = network.numbers, operation.normal = network.normals;
    network.numbers += operation.out_size();
    network.normals += (operation.full_size() + kAlignment - 1) / kAlignment * kAlignment;
  }
  network.num_classes = network.operations[network.num_operations - 1].out_size();
  network.numbers |= 1;
  return network;
}

template <typename real_t>
__device__ void activate(int activation, real_t x, real_t& y, real_t& slope) {
  constexpr real_t kSqrtHalf = 0.70710678118654752, kInverseSqrtTau = 0.39894228040143268;
  if (activation == kTanh) {
    y = std::tanh(x), slope = 1 - y * y;
  } else if (activation == kRelu) {
    y = x < 0 ? real_t(0) : x, slope = x > 0;
  } else if (activation == kSigmoid) {
    y = 1 / (1 + std::exp(-x)), slope = y * (1 - y);
  } else {
    const real_t share = real_t(0.5) * (1 + std::erf(x * kSqrtHalf));
    y = x * share, slope = share + x * kInverseSqrtTau * std::exp(real_t(-0.5) * x * x);
  }
}

// Normals by Box and Muller's method; fastws/random/philox.py has the formula.
template <typename real_t>
__device__ real_t normal_of(const Words& words, int number) {
  const uint32_t word = words.word[number / 2];
  const real_t radius = std::sqrt(-std::log((real_t(word & 0xFFFF) + real_t(0.5)) * real_t(0x1p-16)));
  real_t sine, cosine;
  sincospi((real_t(word >> 16 & 0x3FFF) - real_t(8191.5)) * real_t(0x1p-15), &sine, &cosine);
  const real_t factor = number % 2 ? cosine + sine : cosine - sine;
  return word >> (31 - number % 2) & 1 ? -radius * factor : radius * factor;
}

// Memory of one block: weights, the maps of samples, gradients of the weights, and sums of parts of them. In a noisy
// network weights are normal variables: variances stand behind the weights, their gradients behind those of the
// weights.
template <typename real_t, bool kNoisy = false>
struct Tile {
  static constexpr int kSets = kNoisy ? 2 : 1;

  const Network& network;
  Score* scores;  // of the threads that have one
  real_t *weights, *maps, *grad, *sums;
  int samples;  // at hand

  C10_HOST_DEVICE static int64_t num_scores(int64_t samples) { return kNoisy ? kThreads : samples; }

  static int64_t size_of(const Network& network, int64_t samples, bool training) {
    const int64_t values = kSets * network.num_weights, numbers = values + samples * network.numbers;
    return num_scores(samples) * sizeof(Score) + sizeof(real_t) * (numbers + training * (values + kThreads * kTaps));
  }

  __device__ Tile(const Network& network, char* memory, int samples)
      : network(network),
        scores(reinterpret_cast<Score*>(memory)),
        weights(reinterpret_cast<real_t*>(scores + num_scores(samples))),
        maps(weights + kSets * network.num_weights),
        grad(maps + int64_t(samples) * network.numbers),
        sums(grad + kSets * network.num_weights),
        samples(samples) {}

  __device__ real_t* map(int sample, int place) const { return maps + int64_t(sample) * network.numbers + place; }

  template <typename T>
  __device__ T* extra(int sample, const Operation& operation) const {
    return reinterpret_cast<T*>(map(sample, operation.extra));
  }

  __device__ void load(int sample, const real_t* image) {
    for (int i = threadIdx.x; i < network.image_size; i += blockDim.x) map(sample, 0)[i] = image[i];
  }

  // From images to logits.
  __device__ void forward(const Pass& pass) {
    for (int l = 0; l < network.num_operations; ++l) {
      const Operation& operation = network.operations[l];
      __syncthreads();
      if (operation.kind == kPooling) {
        pool(operation);
      } else if (operation.elementwise()) {
        apply(operation, pass.activation);
        if (operation.unit < 0 || pass.dropout == 0) continue;
        __syncthreads();
        drop(operation, pass);
      } else if (operation.pool_height == 2 && operation.pool_width == 2) {
        convolve<2>(operation, pass);
      } else {
        convolve<1>(operation, pass);
      }
    }
    __syncthreads();
  }

  // Adds the gradients of the weights, given those of the logits in their place.
  __device__ void backward() {
    for (int l = network.num_operations - 1; l >= network.first_convolution; --l) {
      const Operation& operation = network.operations[l];
      __syncthreads();
      if (operation.kind == kPooling) {
        pool_back(operation);
      } else if (operation.elementwise()) {
        for (int sample = 0; sample < samples; ++sample)
          for (int i = threadIdx.x; i < operation.out_size(); i += blockDim.x)
            map(sample, operation.input)[i] *= map(sample, operation.output)[i];
      } else {
        add_weight_gradient<false>(operation);
        if constexpr (kNoisy) add_weight_gradient<true>(operation);
        if (l == network.first_convolution) break;
        __syncthreads();
        input_gradient(operation);
      }
    }
    __syncthreads();
  }

  // Makes the logits of a sample the gradient of its share of the mean cross-entropy.
  __device__ void classify(int sample, int64_t label, int64_t batch_size, Score& score) {
    real_t* const logits = map(sample, network.operations[network.num_operations - 1].output);
    int best = 0;
    for (int k = 1; k < network.num_classes; ++k)
      if (logits[k] > logits[best]) best = k;
    const real_t largest = logits[best], of_label = logits[label] - largest;
    real_t sum = 0;
    for (int k = 0; k < network.num_classes; ++k) {
      logits[k] = std::exp(logits[k] - largest);
      sum += logits[k];
    }
    for (int k = 0; k < network.num_classes; ++k)
      logits[k] = (logits[k] / sum - real_t(k == label)) / real_t(batch_size);
    score.loss += std::log(double(sum)) - double(of_label);
    score.correct += best == label;
  }

 private:
  // Each output, or the largest of each block of them and where in its block it is, in steps of the input.
  template <int kSide>
  __device__ void convolve(const Operation& operation, const Pass& pass) {
    const int groups = (operation.out_channels + kChannels - 1) / kChannels, area = operation.out_area();
    for (int item = threadIdx.x; item < samples * area * groups; item += blockDim.x) {
      const int sample = item % samples, place = item / samples % area, group = item / samples / area;
      const int top = place / operation.out_width * operation.pool_height * operation.stride_height;
      const int left = place % operation.out_width * operation.pool_width * operation.stride_width;
      const real_t* const x = map(sample, operation.input) + top * operation.in_width + left;
      real_t largest[kChannels], slope[kChannels] = {};
      int winner[kChannels];
      for (int a = 0; a < operation.pool_height; a += kSide)
        for (int b = 0; b < operation.pool_width; b += kSide) {
          real_t sums[kChannels][kSide * kSide], slopes[kChannels][kSide * kSide] = {};
          const int down = a * operation.stride_height, right = b * operation.stride_width;
          convolve_block<kSide>(operation, x + down * operation.in_width + right, group, groups, sums, slopes);
          if constexpr (kNoisy) {
            const int64_t first = (pass.begin + sample) * network.normals + operation.normal;
            const int row = place / operation.out_width * operation.pool_height + a;
            const int column = place % operation.out_width * operation.pool_width + b;
            add_noise<kSide>(operation, pass, first + row * operation.full_width() + column, group, groups, sums,
                             slopes);
          }
          for (int m = 0; m < kChannels; ++m)
            for (int p = 0; p < kSide * kSide; ++p)
              if (a + b + p == 0 || sums[m][p] > largest[m]) {
                largest[m] = sums[m][p], slope[m] = slopes[m][p];
                winner[m] =
                    (down + p / kSide * operation.stride_height) << 8 | (right + p % kSide * operation.stride_width);
              }
        }
      for (int m = 0; m < kChannels && group + m * groups < operation.out_channels; ++m) {
        const int to = (group + m * groups) * area + place;
        map(sample, operation.output)[to] = largest[m];
        if (operation.pooled()) extra<uint16_t>(sample, operation)[to] = uint16_t(winner[m]);
        if constexpr (kNoisy) map(sample, operation.slope)[to] = slope[m];
      }
    }
  }

  // Outputs of channels group, group + groups, ... at a square of places. Each weight serves all places, each input all
  // channels; where there are fewer channels the last one is computed again.
  template <int kSide>
  __device__ void convolve_block(const Operation& operation, const real_t* x, int group, int groups,
                                 real_t (&sums)[kChannels][kSide * kSide],
                                 real_t (&variances)[kChannels][kSide * kSide]) {
    const real_t* weight[kChannels];
    for (int m = 0; m < kChannels; ++m) {
      const int channel = min(group + m * groups, operation.out_channels - 1);
      weight[m] = weights + operation.weight + channel * operation.fan_in();
      const real_t bias = operation.bias < 0 ? real_t(0) : weights[operation.bias + channel];
      for (int p = 0; p < kSide * kSide; ++p) sums[m][p] = bias;
      if constexpr (kNoisy) {
        const real_t variance =
            operation.bias < 0 ? real_t(0) : weights[network.num_weights + operation.bias + channel];
        for (int p = 0; p < kSide * kSide; ++p) variances[m][p] = variance;
      }
    }
    const int down = operation.stride_height * operation.in_width, right = operation.stride_width;
    int tap = 0;
    for (int channel = 0; channel < operation.in_channels; ++channel, x += operation.in_area())
      for (int i = 0; i < operation.kernel_height; ++i)
        for (int j = 0; j < operation.kernel_width; ++j, ++tap) {
          real_t inputs[kSide * kSide];
          for (int p = 0; p < kSide * kSide; ++p)
            inputs[p] = x[i * operation.in_width + j + p / kSide * down + p % kSide * right];
          for (int m = 0; m < kChannels; ++m) {
            const real_t factor = weight[m][tap];
            for (int p = 0; p < kSide * kSide; ++p) sums[m][p] += factor * inputs[p];
            if constexpr (kNoisy) {
              const real_t variance = weight[m][tap + network.num_weights];
              for (int p = 0; p < kSide * kSide; ++p) variances[m][p] += variance * (inputs[p] * inputs[p]);
            }
          }
        }
  }

  // Adds noise to sums; slopes = its derivatives by the variances, which they replace. `first` is the number of the
  // normal of the corner in channel 0.
  template <int kSide>
  __device__ void add_noise(const Operation& operation, const Pass& pass, int64_t first, int group, int groups,
                            real_t (&sums)[kChannels][kSide * kSide], real_t (&slopes)[kChannels][kSide * kSide]) {
    Words words{};
    int64_t counter = -1;
    for (int m = 0; m < kChannels; ++m)
      for (int p = 0; p < kSide * kSide; ++p) {
        const int row = (group + m * groups) * operation.full_height() + p / kSide;
        const int64_t number = first + row * operation.full_width() + p % kSide;
        if (number / kAlignment != counter) {
          counter = number / kAlignment;
          words = philox(pass.seed, pass.offset + 1, counter);
        }
        const real_t normal = normal_of<real_t>(words, number % kAlignment);
        const real_t deviation = std::sqrt(slopes[m][p] + real_t(kTiny));
        sums[m][p] += deviation * normal;
        slopes[m][p] = real_t(0.5) * normal / deviation;
      }
  }

  // Adds sums over samples and places of the map, of which each row has `width`, to grad[target], ... A thread computes
  // kTaps of a row at once, in a part of the places if there are more threads than rows.
  template <typename Body>
  __device__ void add_sums(int rows, int width, int area, int target, const Body& body) {
    const int chunks = (width + kTaps - 1) / kTaps, items = rows * chunks;
    const int parts = max(1, min(int(blockDim.x) / items, area));
    for (int item = threadIdx.x; item < items * parts; item += blockDim.x) {
      const int row = item / parts / chunks, first = item / parts % chunks * kTaps;
      real_t found[kTaps] = {};
      body(row, first, item % parts, parts, found);
      for (int tap = 0; tap < kTaps; ++tap)
        if (parts > 1)
          sums[item * kTaps + tap] = found[tap];
        else if (first + tap < width)
          grad[target + row * width + first + tap] += found[tap];
    }
    if (parts == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
      const real_t* const of_parts = sums + (i / width * chunks + i % width / kTaps) * parts * kTaps;
      real_t sum = 0;
      for (int part = 0; part < parts; ++part) sum += of_parts[part * kTaps + i % width % kTaps];
      grad[target + i] += sum;
    }
    __syncthreads();
  }

  // Of the weights, or of their variances.
  template <bool kVariance>
  __device__ void add_weight_gradient(const Operation& operation) {
    const int set = kVariance ? network.num_weights : 0;
    const int area = operation.out_area(), height = operation.kernel_height, width = operation.kernel_width;
    const int down = operation.pool_height * operation.stride_height,
              right = operation.pool_width * operation.stride_width;
    add_sums(
        operation.out_channels * operation.in_channels * height, width, area, operation.weight + set,
        [&](int row, int first, int part, int parts, real_t(&found)[kTaps]) {
          const int channel = row / height % operation.in_channels, out = row / height / operation.in_channels * area;
          const int offset =
              operation.input + channel * operation.in_area() + row % height * operation.in_width + first;
          for (int sample = 0; sample < samples; ++sample) {
            const real_t* const grad_y = map(sample, operation.output) + out;
            const uint16_t* const winner = extra<uint16_t>(sample, operation) + out;
            const real_t* const x = map(sample, offset);
            int y = part / operation.out_width, z = part % operation.out_width;
            for (int place = part; place < area; place += parts, z += parts) {
              for (; z >= operation.out_width; z -= operation.out_width) ++y;
              const int at = operation.pooled() ? winner[place] : 0;
              const real_t* const inputs = x + (y * down + (at >> 8)) * operation.in_width + z * right + (at & 255);
              const real_t grad = kVariance ? grad_y[place] * map(sample, operation.slope)[out + place] : grad_y[place];
              for (int tap = 0; tap < kTaps; ++tap)
                if (first + tap < width) found[tap] += grad * (kVariance ? inputs[tap] * inputs[tap] : inputs[tap]);
            }
          }
        });
    if (operation.bias < 0) return;
    add_sums(operation.out_channels, 1, area, operation.bias + set,
             [&](int channel, int, int part, int parts, real_t(&found)[kTaps]) {
               for (int sample = 0; sample < samples; ++sample)
                 for (int place = part; place < area; place += parts)
                   found[0] += map(sample, operation.output)[channel * area + place] *
                               (kVariance ? map(sample, operation.slope)[channel * area + place] : real_t(1));
             });
  }

  // Each thread looks for the outputs that have seen its inputs, one place in kChannels channels.
  __device__ void input_gradient(const Operation& operation) {
    const int groups = (operation.in_channels + kChannels - 1) / kChannels, area = operation.in_area();
    const int down = operation.pool_height * operation.stride_height,
              right = operation.pool_width * operation.stride_width;
    const int taps = operation.kernel_height * operation.kernel_width;
    for (int item = threadIdx.x; item < samples * area * groups; item += blockDim.x) {
      const int sample = item % samples, place = item / samples % area, group = item / samples / area;
      const int row = place / operation.in_width, column = place % operation.in_width;
      // what an output sees begins in rows top * down, ..., top * down + down - stride
      const int first_top = max(0, row - operation.kernel_height + operation.stride_height) / down;
      const int first_left = max(0, column - operation.kernel_width + operation.stride_width) / right;
      const int last_top = min(operation.out_height - 1, row / down);
      const int last_left = min(operation.out_width - 1, column / right);
      real_t found[kChannels] = {}, of_squares[kChannels] = {};
      for (int channel = 0; channel < operation.out_channels; ++channel)
        for (int top = first_top; top <= last_top; ++top)
          for (int left = first_left; left <= last_left; ++left) {
            const int output = (channel * operation.out_height + top) * operation.out_width + left;
            const int at = operation.pooled() ? extra<uint16_t>(sample, operation)[output] : 0;
            const int i = row - top * down - (at >> 8), j = column - left * right - (at & 255);
            if (i < 0 || j < 0 || i >= operation.kernel_height || j >= operation.kernel_width) continue;
            const real_t grad_y = map(sample, operation.output)[output];
            const real_t* const weight =
                weights + operation.weight + channel * operation.fan_in() + i * operation.kernel_width + j;
            for (int m = 0; m < kChannels; ++m)
              found[m] += grad_y * weight[min(group + m * groups, operation.in_channels - 1) * taps];
            if constexpr (kNoisy) {
              const real_t of_variance = grad_y * map(sample, operation.slope)[output];
              const real_t* const variance = weight + network.num_weights;
              for (int m = 0; m < kChannels; ++m)
                of_squares[m] += of_variance * variance[min(group + m * groups, operation.in_channels - 1) * taps];
            }
          }
      for (int m = 0; m < kChannels && group + m * groups < operation.in_channels; ++m) {
        real_t& x = map(sample, operation.input)[(group + m * groups) * area + place];
        x = kNoisy ? found[m] + 2 * x * of_squares[m] : found[m];
      }
    }
  }

  __device__ void pool(const Operation& operation) {
    for (int item = threadIdx.x; item < samples * operation.out_size(); item += blockDim.x) {
      const int sample = item / operation.out_size(), output = item % operation.out_size();
      const int row = output / operation.out_width,
                column = output % operation.out_width;  // the row counts through channels
      const int channel = row / operation.out_height, top = row % operation.out_height * operation.kernel_height;
      const real_t* const x = map(sample, operation.input);
      const int corner = (channel * operation.in_height + top) * operation.in_width + column * operation.kernel_width;
      int winner = corner;
      for (int i = 0; i < operation.kernel_height; ++i)
        for (int j = 0; j < operation.kernel_width; ++j)
          if (x[corner + i * operation.in_width + j] > x[winner]) winner = corner + i * operation.in_width + j;
      map(sample, operation.output)[output] = x[winner];
      extra<int32_t>(sample, operation)[output] = winner;
    }
  }

  __device__ void pool_back(const Operation& operation) {
    for (int sample = 0; sample < samples; ++sample)
      for (int i = threadIdx.x; i < operation.in_size(); i += blockDim.x) map(sample, operation.input)[i] = 0;
    __syncthreads();
    for (int sample = 0; sample < samples; ++sample)
      for (int i = threadIdx.x; i < operation.out_size(); i += blockDim.x)
        map(sample, operation.input)[extra<int32_t>(sample, operation)[i]] = map(sample, operation.output)[i];
  }

  // y = activation of x, if there is one, and the slopes in the place of x.
  __device__ void apply(const Operation& operation, int activation) {
    for (int sample = 0; sample < samples; ++sample)
      for (int i = threadIdx.x; i < operation.out_size(); i += blockDim.x) {
        real_t& x = map(sample, operation.input)[i];
        real_t y = x, slope = 1;
        if (operation.kind == kActivation) activate(activation, x, y, slope);
        map(sample, operation.output)[i] = y, x = slope;
      }
  }

  // Multiplies what a layer puts out and its slopes by the factors of dropout; a thread draws four words.
  __device__ void drop(const Operation& operation, const Pass& pass) {
    const uint64_t threshold = std::rint(pass.dropout * 0x1p32);
    const real_t scale = 1 / (1 - pass.dropout);
    const int size = operation.out_size(), quads = size / 4 + 2;
    for (int item = threadIdx.x; item < samples * quads; item += blockDim.x) {
      const int sample = item / quads;
      const int64_t first = (pass.begin + sample) * network.units + operation.unit, quad = first / 4 + item % quads;
      const Words words = philox(pass.seed, pass.offset, quad);
      for (int k = 0; k < 4; ++k) {
        const int64_t i = 4 * quad + k - first;
        if (i < 0 || i >= size) continue;
        const real_t factor = words.word[k] >= threshold ? scale : real_t(0);
        map(sample, operation.output)[i] *= factor;
        map(sample, operation.input)[i] *= factor;
      }
    }
  }
};

}  // namespace
}  // namespace fastws
