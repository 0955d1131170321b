#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "cpu/activations.h"
#include "cpu/random/draw_lanes.h"
#include "cpu/small_cnn.h"
#include "small_cnn_table.h"

// Networks as tables, and groups of networks, one per lane, with the maps of one sample.

namespace fastws {
namespace {

using torch::stable::Tensor;

// A row of the table, and where its maps lie in the memory of a group of networks, in vectors.
struct Operation {
  int64_t kind;
  Convolution shape;
  bool pooled = false;  // a convolution together with the pooling by 2 x 2 behind it
  int64_t weight, bias, unit;
  int64_t input = 0, output = 0, extra = 0;  // extra: slopes of activations, factors of dropout, winners of pooling
  int64_t in_size, out_size;
};

struct Network {
  std::vector<Operation> operations;
  int64_t num_weights, image_size, num_classes;
  int64_t units = 0;    // of dropout
  int64_t memory = 0;   // vectors of all maps
  int64_t largest = 0;  // vectors of the largest map or gradient

  Network(const Row* rows, int64_t count, int64_t num_weights) : num_weights(num_weights) {
    for (const Row* row = rows; row < rows + count; ++row) {
      Operation* before = operations.empty() ? nullptr : &operations.back();
      const bool halves = row->kind == kPooling && row->kernel_height == 2 && row->kernel_width == 2;
      if (halves && before && before->kind == kConvolution && !before->pooled) {
        before->pooled = true;
        before->shape.out_height = 2 * row->out_height(), before->shape.out_width = 2 * row->out_width();
        before->out_size = row->out_size();
      } else {
        operations.push_back(make_operation(*row));
      }
      largest = std::max(largest, row->out_size());
      if (row->kind == kDropout) units = row->first_unit + row->out_size();
    }
    image_size = memory = operations.front().in_size;
    largest = std::max(largest, image_size);
    int64_t input = 0;
    for (Operation& operation : operations) {
      operation.input = input, operation.output = memory, operation.extra = memory + operation.out_size;
      input = memory;
      memory += (operation.kind == kConvolution && !operation.pooled ? 1 : 2) * operation.out_size;
    }
    num_classes = operations.back().out_size;
  }

 private:
  static Operation make_operation(const Row& row) {
    const Convolution shape = {.in_channels = row.in_channels,
                               .in_height = row.in_height,
                               .in_width = row.in_width,
                               .out_channels = row.out_channels,
                               .out_height = row.out_height(),
                               .out_width = row.out_width(),
                               .kernel_height = row.kernel_height,
                               .kernel_width = row.kernel_width,
                               .stride_height = row.stride_height,
                               .stride_width = row.stride_width};
    return {.kind = row.kind,
            .shape = shape,
            .weight = row.weight_offset,
            .bias = row.bias_offset,
            .unit = row.first_unit,
            .in_size = row.in_size(),
            .out_size = row.out_size()};
  }
};

// What networks of one group have of their own.
template <typename real_t, int kBytes>
struct Recipes {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  static constexpr int kDrawn = std::max<int>(Lanes<real_t, kBytes>::kCount, kDrawLanes);
  I of_kind[4] = {};  // all bits set in the lanes with this activation
  int activation;     // that of all lanes, or -1
  bool drops = false, adaptive = false;
  uint32_t threshold[kDrawn];
  uint64_t seed[kDrawn];
  V scale;               // of what dropout keeps
  V lr, decay, coupled;  // decay: factor of weights in AdamW; coupled: weight decay of the others
  V old_first, new_first, old_second, new_second;  // first = old_first * first + new_first * gradient, ...
  V from_gradient;                                 // 1 where the weights follow the gradient itself
  I is_adaptive;
};

// Memory for one group of networks, aligned as vectors must be.
template <typename V>
class Memory {
 public:
  explicit Memory(int64_t count) : start_(static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(64)))) {}
  ~Memory() { ::operator delete(start_, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  V* take(int64_t count) {
    V* taken = start_ + used_;
    used_ += count;
    return taken;
  }

 private:
  V* start_;
  int64_t used_ = 0;
};

// x[i][lane] = rows[lane][i]
template <typename real_t, int kCount>
FASTWS_CLONES void interleave(const real_t* const* rows, int64_t size, real_t* x) {
  for (int64_t i = 0; i < size; ++i)
    for (int lane = 0; lane < kCount; ++lane) x[i * kCount + lane] = rows[lane][i];
}

// rows[lane][i] = x[i][lane]
template <typename real_t, int kCount>
FASTWS_CLONES void separate(const real_t* x, int64_t size, int64_t lanes, real_t* const* rows) {
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < size; ++i) rows[lane][i] = x[i * kCount + lane];
}

// y = x * factor, where factor = scale for the words from threshold on, else 0.
template <typename real_t, int kBytes>
FASTWS_CLONES void drop(const Recipes<real_t, kBytes>& recipes, const real_t* x, const uint32_t* words, int64_t size,
                        real_t* y, real_t* factor) {
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  const real_t* scale = reinterpret_cast<const real_t*>(&recipes.scale);
  for (int64_t i = 0; i < size; ++i)
    for (int lane = 0; lane < kCount; ++lane) {
      const bool kept = words[i * recipes.kDrawn + lane] >= recipes.threshold[lane];
      factor[i * kCount + lane] = kept ? scale[lane] : 0;
      y[i * kCount + lane] = x[i * kCount + lane] * factor[i * kCount + lane];
    }
}

template <typename V>
FASTWS_CLONES void multiply(const V* slope, int64_t size, V* grad) {
  for (int64_t i = 0; i < size; ++i) grad[i] *= slope[i];
}

// A group of networks, one per lane, with the maps of one sample: what layers without weights do.
template <typename real_t, int kBytes>
class Maps {
 public:
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  static constexpr int kCount = Lanes<real_t, kBytes>::kCount;

  // vectors: how many more than those of the maps are needed
  Maps(const Network& network, int64_t vectors)
      : network_(network), memory_(network.memory + vectors), maps_(memory_.take(network.memory)) {
    words_.resize((network.units / 4 + 2) * 4 * Recipes<real_t, kBytes>::kDrawn);
  }

  Recipes<real_t, kBytes> recipes;

  V* images() const { return maps_; }
  V* logits() const { return maps_ + network_.operations.back().output; }

  void load(const real_t* const* rows, int64_t size, V* vectors) const {
    interleave<real_t, kCount>(rows, size, reinterpret_cast<real_t*>(vectors));
  }

  void store(const V* vectors, int64_t size, int64_t lanes, real_t* const* rows) const {
    separate<real_t, kCount>(reinterpret_cast<const real_t*>(vectors), size, lanes, rows);
  }

 protected:
  // Draws what dropout needs for one sample of the minibatch.
  void draw_dropout(int64_t offset, int64_t sample) {
    if (!recipes.drops) return;
    const int64_t begin = sample * network_.units;
    const int64_t counters = (begin + network_.units + 3) / 4 - begin / 4;
    for (int lane = 0; lane < recipes.kDrawn; lane += kDrawLanes)
      draw_lanes(recipes.seed + lane, offset, begin / 4, counters, words_.data() + lane, recipes.kDrawn);
    shift_ = begin % 4;
  }

  // Runs a layer that is no convolution.
  void pass(const Operation& operation, bool training) {
    const V* x = maps_ + operation.input;
    V *y = maps_ + operation.output, *extra = maps_ + operation.extra;
    if (operation.kind == kPooling)
      pool<real_t, kBytes>(operation.shape, x, y, reinterpret_cast<I*>(extra));
    else if (operation.kind == kActivation)
      activate<real_t, kBytes>(x, operation.out_size, recipes.of_kind, recipes.activation, y, extra);
    else if (training && recipes.drops)
      drop<real_t, kBytes>(recipes, reinterpret_cast<const real_t*>(x), words_of(operation), operation.out_size,
                           reinterpret_cast<real_t*>(y), reinterpret_cast<real_t*>(extra));
    else
      std::copy(x, x + operation.out_size, y);
  }

  // The gradient of its input, given that of its output; may swap the two maps.
  void pass_back(const Operation& operation, V*& grad, V*& other) const {
    const V* extra = maps_ + operation.extra;
    if (operation.kind == kPooling) {
      unpool<real_t, kBytes>(operation.shape, grad, reinterpret_cast<const I*>(extra), other);
      std::swap(grad, other);
    } else if (operation.kind == kActivation || recipes.drops) {
      multiply<V>(extra, operation.out_size, grad);
    }
  }

  const Network& network_;
  Memory<V> memory_;
  V* maps_;

 private:
  const uint32_t* words_of(const Operation& operation) const {
    return words_.data() + (shift_ + operation.unit) * Recipes<real_t, kBytes>::kDrawn;
  }

  std::vector<uint32_t> words_;
  int64_t shift_ = 0;
};

}  // namespace
}  // namespace fastws
