#pragma once

#include "cuda/coordinate_mlp.h"

// Gradients of a narrow predictor. Rows are taken in parts: what one part needs of inputs of layers and of gradients of
// their outputs is computed and written, and then summed over the rows. Memory does not grow with the number of rows,
// and every sum has one order.

namespace fastws {
namespace {

constexpr int kPart = 8192;              // rows whose activations are in memory
constexpr int kSplits = 16;              // of a part, summed side by side
constexpr int kSplit = kPart / kSplits;  // rows
constexpr int kTile = kWarps * 4;        // rows of a sum, that is of a gradient, of one block
constexpr int kStep = 64;                // rows that a block stages
constexpr int kTargets = 7;              // gradients, in the order of the op

// Memory of a backward pass, in numbers of 4 bytes: inputs of all layers [depth + 1, kPart, side], gradients of their
// inputs before the activation and of the predictions [depth + 2, kPart, side], coordinates [3, kPart] and sums
// [kSplits, tiles, kTile, side].
struct Workspace {
  Predictor predictor;
  float* numbers;

  C10_HOST_DEVICE int64_t part() const { return int64_t(kPart) * predictor.side; }
  C10_HOST_DEVICE float* input(int layer) const { return numbers + layer * part(); }
  C10_HOST_DEVICE float* grad(int layer) const { return input(predictor.depth + 1) + layer * part(); }
  C10_HOST_DEVICE int* places() const { return reinterpret_cast<int*>(grad(predictor.depth + 2)); }
  C10_HOST_DEVICE float* sums(int split, int tile) const {
    return grad(predictor.depth + 2) + 3 * kPart + (int64_t(split) * tiles() + tile) * kTile * predictor.side;
  }
  C10_HOST_DEVICE static int tiles_of(int rows) { return (rows + kTile - 1) / kTile; }
  C10_HOST_DEVICE int tiles() const {
    int count = predictor.depth * tiles_of(predictor.width) + tiles_of(predictor.outputs) + predictor.depth + 1;
    for (int rows : predictor.indices) count += tiles_of(rows);
    return count;
  }
  C10_HOST_DEVICE int64_t size() const { return sums(kSplits, 0) - numbers; }
};

// A tile of a gradient: rows `first` to `first` + kTile of sums of left[r][row] * right[r][column] over r. Without left
// there is a one where coordinate `axis` of r is the row, and for axis -1 in row 0.
struct Job {
  const float *left, *right;
  int axis, first, rows, columns, target;
  int64_t offset;  // of the matrix in its target
};

__device__ inline Job find_job(const Workspace& w, int tile) {
  const Predictor& n = w.predictor;
  for (int layer = 0; layer <= n.depth; ++layer) {
    const bool last = layer == n.depth;
    const int count = w.tiles_of(n.outs(layer));
    if (tile < count)
      return {w.grad(layer + 1),
              w.input(layer),
              0,
              tile * kTile,
              n.outs(layer),
              n.width,
              last ? 5 : 3,
              last ? 0 : int64_t(layer) * n.width * n.width};
    tile -= count;
  }
  if (tile <= n.depth) {
    const bool last = tile == n.depth;
    return {nullptr, w.grad(tile + 1), -1, 0, 1, n.outs(tile), last ? 6 : 4, last ? 0 : int64_t(tile) * n.width};
  }
  tile -= n.depth + 1;
  int axis = 0;
  for (; tile >= w.tiles_of(n.indices[axis]); ++axis) tile -= w.tiles_of(n.indices[axis]);
  return {nullptr, w.grad(0), axis, tile * kTile, n.indices[axis], n.width, axis, 0};
}

// Inputs of layers, gradients and coordinates of the rows of a part; zeros behind its last row.
template <int kC>
struct Retrace {
  static constexpr int kResident = 2;
  Workspace w;
  const float* grad;  // of the predictions of the part

  __device__ void run(int64_t block, char* shared) const {
    const Predictor& predictor = w.predictor;
    Rows<4, kC> rows(predictor, shared);
    const int64_t begin = block * kTile;
    const auto at = [&](int row, int column) { return (begin + row) * predictor.side + column; };
    rows.run_hidden(begin, [&](int layer) {
      with_activation(predictor.activation, [&]<int kKind>() {
        rows.sums.each([&](float& sum, int row, int column) {
          w.grad(layer)[at(row, column)] = slope<kKind>(sum);
          w.input(layer)[at(row, column)] = sum = activate<kKind>(sum);
        });
      });
    });
    for (int i = threadIdx.x; i < 3 * kTile; i += kThreads)
      w.places()[i / kTile * kPart + begin + i % kTile] = rows.places[i];

    rows.sums.each([&](float& sum, int row, int column) {
      const bool inside = begin + row < predictor.count && column < predictor.outputs;
      sum = inside ? grad[(begin + row) * predictor.outputs + column] : 0;
      w.grad(predictor.depth + 1)[at(row, column)] = sum;
    });
    for (int layer = predictor.depth; layer >= 0; --layer) {
      rows.sums.store(rows.x);
      rows.sums.each([](float& sum, int, int) { sum = 0; });
      const int outs = (predictor.outs(layer) + kSlab - 1) / kSlab * kSlab;
      rows.sums.multiply(rows.x, predictor.numbers + predictor.backward(layer), predictor.side, outs, rows.slabs);
      rows.sums.each([&](float& sum, int row, int column) {
        float& of_input = w.grad(layer)[at(row, column)];  // so far the slope
        of_input = sum *= of_input;
      });
    }
  }
};

// Sums of one tile over one split of a part.
template <int kC>
struct Accumulate {
  using S = Sums<4, kC>;
  static constexpr int kResident = 2;
  static constexpr int64_t kBytes = 4 * (kStep * S::kStride + S::kSlabs);
  Workspace w;
  bool first;  // part of all

  __device__ void run(int64_t block, char* shared) const {
    const int tile = int(block % w.tiles()), split = int(block / w.tiles());
    const Job job = find_job(w, tile);
    float *x = reinterpret_cast<float*>(shared), *slabs = x + kStep * S::kStride;
    const int rows = w.tiles_of(int(w.predictor.count)) * kTile, end = int(least(rows, (split + 1) * kSplit));
    S sums;
    sums.each([](float& sum, int, int) { sum = 0; });
    for (int r = split * kSplit; r < end; r += kStep) {
      const int depth = int(least(kStep, end - r));
      if (!reaches(job, r, depth)) continue;
      for (int i = threadIdx.x; i < depth * kTile; i += kThreads)
        x[i / kTile * S::kStride + i % kTile] = left(job, r + i / kTile, job.first + i % kTile);
      sums.multiply(x, job.right + int64_t(r) * w.predictor.side, w.predictor.side, depth, slabs);
    }
    float* const to = w.sums(split, tile);
    sums.each([&](float& sum, int row, int column) {
      float& total = to[row * S::kColumns + column];
      total = first ? sum : total + sum;
    });
  }

  // Whether some of these rows are in the tile; of a table that has a row for each kernel few are.
  __device__ bool reaches(const Job& job, int r, int depth) const {
    if (job.left || job.axis < 0) return true;
    const int* const places = w.places() + job.axis * kPart + r;
    bool any = false;
    for (int i = 0; i < depth; ++i) any |= places[i] >= job.first && places[i] < job.first + kTile;
    return any;
  }

  __device__ float left(const Job& job, int r, int row) const {
    if (job.left) return job.left[int64_t(r) * w.predictor.side + row];
    return row == (job.axis < 0 ? 0 : w.places()[job.axis * kPart + r]);
  }
};

// Adds the splits of a tile and writes its part of a gradient.
template <typename scalar_t>
struct Finish {
  static constexpr int kResident = 2;
  Workspace w;
  scalar_t* targets[kTargets];

  __device__ void run(int64_t tile, char*) const {
    const Job job = find_job(w, int(tile));
    for (int i = threadIdx.x; i < kTile * w.predictor.side; i += kThreads) {
      const int row = job.first + i / w.predictor.side, column = i % w.predictor.side;
      if (row >= job.rows || column >= job.columns) continue;
      float sum = 0;
      for (int split = 0; split < kSplits; ++split) sum += w.sums(split, int(tile))[i];
      targets[job.target][job.offset + int64_t(row) * job.columns + column] = scalar_t(sum);
    }
  }
};

// Gradients of all parameters, given those of the predictions, [count, outputs].
template <typename scalar_t, typename Launch>
void differentiate(Workspace w, const float* grad, const Finish<scalar_t>& finish, const Launch& launch) {
  const int64_t count = w.predictor.count;
  const int64_t* const rows = w.predictor.rows;
  dispatch_side(w.predictor.side, [&]<int kC>() {
    for (int64_t begin = 0; begin == 0 || begin < count; begin += kPart) {
      w.predictor.rows = rows + begin, w.predictor.count = least(kPart, count - begin);
      const int blocks = w.tiles_of(int(w.predictor.count));
      launch(Retrace<kC>{w, grad + begin * w.predictor.outputs}, blocks, Rows<4, kC>::kBytes);
      launch(Accumulate<kC>{w, begin == 0}, int64_t(w.tiles()) * kSplits, Accumulate<kC>::kBytes);
    }
  });
  launch(finish, w.tiles(), 0);
}

}  // namespace
}  // namespace fastws
