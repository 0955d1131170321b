#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

// A narrow predictor of weights from coordinates. A block takes some rows through all layers: what a layer hands on
// stays in shared memory, and the weights pass by, slab after slab, from the second-level cache. A launcher,
// launch(work, blocks, bytes), runs work.run(block, shared memory) in each thread of each block.

namespace fastws {
namespace {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kSlab = 16;       // rows of a matrix in shared memory, of two slabs that take turns
constexpr int kPadding = 64;    // of the width, with zeros, which all activations keep
constexpr int kMaxWidth = 192;  // of hidden layers and of the last

enum Activation { kRelu, kLeakyRelu, kHardswish, kGelu, kRelu6, kElu };

// NaN stays NaN.
template <int kKind>
__device__ float activate(float x) {
  if constexpr (kKind == kRelu) return x <= 0 ? 0 : x;
  if constexpr (kKind == kLeakyRelu) return x > 0 ? x : 0.01f * x;
  if constexpr (kKind == kHardswish) return x <= -3 ? 0 : x >= 3 ? x : x * (x + 3) / 6;
  if constexpr (kKind == kGelu) return x * 0.5f * (1 + std::erf(x * 0.70710678f));
  if constexpr (kKind == kRelu6) return x <= 0 ? 0 : x >= 6 ? 6 : x;
  if constexpr (kKind == kElu) return x > 0 ? x : std::expm1(x);
}

template <int kKind>
__device__ float slope(float x) {
  if constexpr (kKind == kRelu) return x > 0;
  if constexpr (kKind == kLeakyRelu) return x > 0 ? 1 : 0.01f;
  if constexpr (kKind == kHardswish) return x <= -3 ? 0 : x < 3 ? (2 * x + 3) / 6 : 1;
  if constexpr (kKind == kGelu) return 0.5f * std::erfc(x * -0.70710678f) + x * 0.39894228f * std::exp(-0.5f * x * x);
  if constexpr (kKind == kRelu6) return x > 0 && x < 6;
  if constexpr (kKind == kElu) return x > 0 ? 1 : std::exp(x);
}

// Calls body<kind>(), outside of loops that are unrolled.
template <typename Body>
__device__ void with_activation(int kind, const Body& body) {
  switch (kind) {
    case kRelu:
      return body.template operator()<kRelu>();
    case kLeakyRelu:
      return body.template operator()<kLeakyRelu>();
    case kHardswish:
      return body.template operator()<kHardswish>();
    case kGelu:
      return body.template operator()<kGelu>();
    case kRelu6:
      return body.template operator()<kRelu6>();
    case kElu:
      return body.template operator()<kElu>();
  }
}

C10_HOST_DEVICE inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A predictor. Its numbers are float32, in rows of `side`: three tables, then of all layers matrices [in, out], biases,
// and matrices [out, in]. The layer behind the hidden ones is number `depth`.
struct Predictor {
  int width, depth, outputs, side, activation, num_layers, indices[3];
  const float* numbers;
  const int64_t *grid, *ends, *rows;  // ends: of the kernels of each layer, from Ends
  int64_t count;

  C10_HOST_DEVICE int64_t matrix() const { return int64_t(side) * side; }
  C10_HOST_DEVICE int64_t table(int axis) const {
    return (int64_t(axis > 0) * indices[0] + int64_t(axis > 1) * indices[1]) * side;
  }
  C10_HOST_DEVICE int64_t forward(int layer) const { return table(2) + int64_t(indices[2]) * side + layer * matrix(); }
  C10_HOST_DEVICE int64_t bias(int layer) const { return forward(depth + 1) + layer * side; }
  C10_HOST_DEVICE int64_t backward(int layer) const { return bias(depth + 1) + layer * matrix(); }
  C10_HOST_DEVICE int64_t size() const { return backward(depth + 1); }
  C10_HOST_DEVICE int outs(int layer) const { return layer < depth ? width : outputs; }
};

template <typename scalar_t>
struct Parameters {
  const scalar_t *tables[3], *hidden_weights, *hidden_biases, *out_weight, *out_bias;
};

// Writes the numbers of a predictor, one per thread.
template <typename scalar_t>
struct Pack {
  static constexpr int kResident = 4;
  Predictor predictor;
  Parameters<scalar_t> from;
  float* to;

  __device__ scalar_t weight(int layer, int out, int in) const {
    if (in >= predictor.width || out >= predictor.outs(layer)) return scalar_t(0.f);
    const scalar_t* of_layer = from.hidden_weights + int64_t(layer) * predictor.width * predictor.width;
    return (layer < predictor.depth ? of_layer : from.out_weight)[out * predictor.width + in];
  }

  __device__ float number(int64_t row, int column) const {
    const bool inside = column < predictor.width;
    for (int axis = 0; axis < 3; row -= predictor.indices[axis++])
      if (row < predictor.indices[axis]) return inside ? float(from.tables[axis][row * predictor.width + column]) : 0;
    const int layers = predictor.depth + 1, side = predictor.side;
    if (row < layers * side) return weight(row / side, column, row % side);
    row -= layers * side;
    if (row < predictor.depth) return inside ? float(from.hidden_biases[row * predictor.width + column]) : 0;
    if (row == predictor.depth) return column < predictor.outputs ? float(from.out_bias[column]) : 0;
    row -= layers;
    return weight(row / side, row % side, column);
  }

  __device__ void run(int64_t block, char*) const {
    const int64_t i = block * kThreads + threadIdx.x;
    if (i < predictor.size()) to[i] = number(i / predictor.side, i % predictor.side);
  }
};

// Where the kernels of each layer end, by one block: each thread sums what follows each other, and then what is before.
struct Ends {
  static constexpr int kResident = 1;
  static constexpr int64_t kBytes = 8 * kThreads;
  const int64_t* grid;
  int64_t* ends;
  int64_t layers;

  __device__ int64_t kernels(int64_t layer) const { return grid[2 * layer] * grid[2 * layer + 1]; }

  __device__ void run(int64_t, char* shared) const {
    int64_t* const sums = reinterpret_cast<int64_t*>(shared);
    const int64_t share = (layers + kThreads - 1) / kThreads;
    const int64_t begin = least(layers, threadIdx.x * share), end = least(layers, begin + share);
    int64_t sum = 0;
    for (int64_t layer = begin; layer < end; ++layer) sum += kernels(layer);
    sums[threadIdx.x] = sum;
    __syncthreads();
    int64_t before = 0;
    for (unsigned thread = 0; thread < threadIdx.x; ++thread) before += sums[thread];
    for (int64_t layer = begin; layer < end; ++layer) ends[layer] = before += kernels(layer);
  }
};

// Layer, filter and channel of a kernel. There may be as many layers as kernels.
__device__ inline void find(const Predictor& predictor, int64_t kernel, int (&place)[3]) {
  int layer = 0, last = predictor.num_layers - 1;
  while (layer < last) {
    const int middle = layer + (last - layer) / 2;
    if (kernel < predictor.ends[middle])
      last = middle;
    else
      layer = middle + 1;
  }
  if (layer > 0) kernel -= predictor.ends[layer - 1];
  const int64_t channels = predictor.grid[2 * layer + 1];
  place[0] = layer, place[1] = int(kernel / channels), place[2] = int(kernel % channels);
}

struct alignas(16) Quad {
  float number[4];
};

// Sums of rows kM * warp + m and columns lane + 32 * c, in each thread of a block.
template <int kM, int kC>
struct Sums {
  static constexpr int kRows = kWarps * kM, kColumns = kLanes * kC;
  static constexpr int kStride = kRows + 4;  // of x: then lanes write to different banks
  static constexpr int kSlabs = 2 * kSlab * kColumns;

  float sum[kM][kC];

  __device__ static int row(int m) { return kM * (threadIdx.x / kLanes) + m; }
  __device__ static int column(int c) { return threadIdx.x % kLanes + kLanes * c; }

  template <typename Function>
  __device__ void each(const Function& function) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int c = 0; c < kC; ++c) function(sum[m][c], row(m), column(c));
  }

  // x[k][row] = sum of row and column k
  __device__ void store(float* x) const {
#pragma unroll
    for (int c = 0; c < kC; ++c)
#pragma unroll
      for (int m = 0; m < kM; m += 4)
        *reinterpret_cast<Quad*>(x + column(c) * kStride + row(m)) = {sum[m][c], sum[m + 1][c], sum[m + 2][c],
                                                                      sum[m + 3][c]};
  }

  // sum[row][column] += sum of x[k][row] * matrix[k][column] for k < depth, a multiple of kSlab. All threads have
  // stored x before, or store it in front of this, and may overwrite it behind.
  __device__ void multiply(const float* x, const float* matrix, int stride, int depth, float* slabs) {
    constexpr int kMine = kSlab / kWarps;  // rows of a slab that a warp copies
    const int first = threadIdx.x / kLanes * kMine;
    float next[kMine][kC];
    const auto fetch = [&](int begin) {
#pragma unroll
      for (int k = 0; k < kMine; ++k)
#pragma unroll
        for (int c = 0; c < kC; ++c) next[k][c] = matrix[(begin + first + k) * stride + column(c)];
    };
    const auto place = [&](int slab) {
#pragma unroll
      for (int k = 0; k < kMine; ++k)
#pragma unroll
        for (int c = 0; c < kC; ++c) slabs[(slab % 2 * kSlab + first + k) * kColumns + column(c)] = next[k][c];
    };
    fetch(0);
    place(0);
    __syncthreads();
    for (int slab = 0; slab < depth / kSlab; ++slab) {
      const bool more = (slab + 1) * kSlab < depth;
      if (more) fetch((slab + 1) * kSlab);
      add(x + slab * kSlab * kStride, slabs + slab % 2 * kSlab * kColumns);
      if (more) place(slab + 1);
      __syncthreads();
    }
  }

  __device__ void add(const float* x, const float* slab) {
#pragma unroll 4
    for (int k = 0; k < kSlab; ++k) {
      float left[kM], right[kC];
#pragma unroll
      for (int m = 0; m < kM; m += 4) {
        const Quad quad = *reinterpret_cast<const Quad*>(x + k * kStride + row(m));
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m + i] = quad.number[i];
      }
#pragma unroll
      for (int c = 0; c < kC; ++c) right[c] = slab[k * kColumns + column(c)];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int c = 0; c < kC; ++c) sum[m][c] += left[m] * right[c];
    }
  }
};

// Rows through a predictor, in the shared memory of a block.
template <int kM, int kC>
struct Rows {
  using S = Sums<kM, kC>;
  static constexpr int64_t kBytes = 4 * (S::kColumns * S::kStride + S::kSlabs + 3 * S::kRows);

  const Predictor& predictor;
  float *x, *slabs;
  int* places;  // [3, kRows], -1 behind the last row
  S sums;

  __device__ Rows(const Predictor& predictor, char* shared)
      : predictor(predictor),
        x(reinterpret_cast<float*>(shared)),
        slabs(x + S::kColumns * S::kStride),
        places(reinterpret_cast<int*>(slabs + S::kSlabs)) {}

  __device__ void start_with_bias(int layer) {
    const float* bias = predictor.numbers + predictor.bias(layer);
    sums.each([&](float& sum, int, int column) { sum = bias[column]; });
  }

  // Sums become the inputs of the first activation of rows begin to begin + kRows.
  __device__ void locate(int64_t begin) {
    if (threadIdx.x < S::kRows) {
      int place[3] = {-1, -1, -1};
      if (begin + threadIdx.x < predictor.count) find(predictor, predictor.rows[begin + threadIdx.x], place);
      for (int axis = 0; axis < 3; ++axis) places[axis * S::kRows + threadIdx.x] = place[axis];
    }
    __syncthreads();
    sums.each([&](float& sum, int row, int column) {
      sum = 0;
      if (places[row] < 0) return;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t at = predictor.table(axis) + int64_t(places[axis * S::kRows + row]) * predictor.side;
        sum += predictor.numbers[at + column];
      }
    });
  }

  // Runs all hidden layers; handle(layer) turns sums, the inputs of an activation, into its outputs.
  template <typename Handle>
  __device__ void run_hidden(int64_t begin, const Handle& handle) {
    locate(begin);
    for (int layer = 0;; ++layer) {
      handle(layer);
      sums.store(x);
      if (layer == predictor.depth) return;
      start_with_bias(layer);
      sums.multiply(x, predictor.numbers + predictor.forward(layer), predictor.side, predictor.side, slabs);
    }
  }
};

template <int kM, int kC>
struct Predict {
  static constexpr int kResident = 2;
  Predictor predictor;
  float* predictions;

  __device__ void run(int64_t block, char* shared) const {
    Rows<kM, kC> rows(predictor, shared);
    const int64_t begin = block * rows.sums.kRows;
    rows.run_hidden(begin, [&](int) {
      with_activation(predictor.activation,
                      [&]<int kKind>() { rows.sums.each([](float& sum, int, int) { sum = activate<kKind>(sum); }); });
    });
    const float *bias = predictor.numbers + predictor.bias(predictor.depth),
                *matrix = predictor.numbers + predictor.forward(predictor.depth);
    for (int first = 0; first < predictor.outputs; first += kLanes) {
      Sums<kM, 1> last;
      last.each([&](float& sum, int, int column) { sum = bias[first + column]; });
      last.multiply(rows.x, matrix + first, predictor.side, predictor.side, rows.slabs);
      last.each([&](float& sum, int row, int column) {
        if (begin + row < predictor.count && first + column < predictor.outputs)
          predictions[(begin + row) * predictor.outputs + first + column] = sum;
      });
    }
  }
};

// Calls body<side / 32>().
template <typename Body>
void dispatch_side(int side, const Body& body) {
  side == 64    ? body.template operator()<2>()
  : side == 128 ? body.template operator()<4>()
                : body.template operator()<6>();
}

// Writes the numbers of a predictor, and where its layers end.
template <typename scalar_t, typename Launch>
void pack(const Predictor& predictor, const Parameters<scalar_t>& from, float* numbers, int64_t* ends,
          const Launch& launch) {
  launch(Pack<scalar_t>{predictor, from, numbers}, (predictor.size() + kThreads - 1) / kThreads, 0);
  launch(Ends{predictor.grid, ends, predictor.num_layers}, 1, Ends::kBytes);
}

// Predictions of all rows. Few of them are dealt to more blocks.
template <typename Launch>
void predict(const Predictor& predictor, float* predictions, int64_t processors, const Launch& launch) {
  dispatch_side(predictor.side, [&]<int kC>() {
    const auto run = [&]<int kM>() {
      constexpr int64_t kRows = kWarps * kM;
      launch(Predict<kM, kC>{predictor, predictions}, (predictor.count + kRows - 1) / kRows, Rows<kM, kC>::kBytes);
    };
    predictor.count > processors * kWarps * 8 ? run.template operator()<8>() : run.template operator()<4>();
  });
}

}  // namespace
}  // namespace fastws
