#pragma once

#include "cuda/coordinate_mlp.h"

// Predictions in bfloat16 or float16, by matrix units that sum in float32. A warp takes 16 rows through all layers in
// its registers: what it has of a sum is what it needs of the next layer's input. The weights stay in shared memory, as
// many layers of them as fit; the others are read from the second-level cache.

namespace fastws {
namespace {

// sum [16, 8] += rows [16, 16] @ matrix [16, 8]. Lane 4 * i + j has of rows the columns 2j, 2j + 1 of rows i and i + 8
// and columns 2j + 8, 2j + 9 of both, of the matrix rows 2j, 2j + 1 and 2j + 8, 2j + 9 of column i, and of the sum
// columns 2j, 2j + 1 of rows i and i + 8; the lower of two in the lower half of a word.
template <typename scalar_t>
__device__ void multiply_tile(float (&sum)[4], const uint32_t (&rows)[4], uint32_t matrix0, uint32_t matrix1);

template <typename scalar_t>
__device__ uint32_t pair(float low, float high) {
  return uint32_t(scalar_t(low).x) | uint32_t(scalar_t(high).x) << 16;
}

struct alignas(16) Words {
  uint32_t word[4];
};

struct alignas(8) Two {
  float number[2];
};

__device__ inline Two load_two(const float* from) { return *reinterpret_cast<const Two*>(from); }

// Matrices as lanes want them: 16 x 16 tiles of 32 words of four, layer by layer, 16 inputs by 16 inputs.
C10_HOST_DEVICE inline int tiles_of(const Predictor& predictor, int layer) {
  return (layer < predictor.depth ? predictor.side : predictor.outputs + 15) / 16;
}

C10_HOST_DEVICE inline int64_t words_of(const Predictor& predictor, int layers) {
  const int64_t hidden = least(layers, predictor.depth) * predictor.matrix() / 8;
  return hidden +
         (layers > predictor.depth ? int64_t(predictor.side / 16) * tiles_of(predictor, predictor.depth) * kLanes : 0);
}

template <typename scalar_t>
struct PackHalves {
  static constexpr int kResident = 4;
  Predictor predictor;
  Pack<scalar_t> weights;
  Words* to;

  __device__ void run(int64_t block, char*) const {
    const int64_t i = block * kThreads + threadIdx.x;
    if (i >= words_of(predictor, predictor.depth + 1)) return;
    const int layer = int(least(predictor.depth, i / (predictor.matrix() / 8)));
    const int64_t tile = (i - words_of(predictor, layer)) / kLanes;
    const int lane = int(i % kLanes), in = int(tile / tiles_of(predictor, layer)) * 16 + lane % 4 * 2;
    const int out = int(tile % tiles_of(predictor, layer)) * 16 + lane / 4;
    for (int word = 0; word < 4; ++word) {
      const int o = out + word / 2 * 8, k = in + word % 2 * 8;
      to[i].word[word] = pair<scalar_t>(weights.weight(layer, o, k), weights.weight(layer, o, k + 1));
    }
  }
};

template <typename scalar_t, int kC>
struct PredictHalves {
  static constexpr int kResident = 1;
  static constexpr int kSteps = 2 * kC;  // of 16 columns
  Predictor predictor;
  const Words* matrices;
  scalar_t* predictions;
  int layers;      // in shared memory
  int64_t blocks;  // that share the rows

  __device__ void run(int64_t block, char* shared) const {
    Words* const mine = reinterpret_cast<Words*>(shared);
    const int64_t resident = words_of(predictor, layers);
    for (int64_t i = threadIdx.x; i < resident; i += kThreads) mine[i] = matrices[i];
    __syncthreads();
    const int64_t warp = threadIdx.x / kLanes * blocks + block, step = blocks * kWarps * 16;
    for (int64_t begin = warp * 16; begin < predictor.count; begin += step) predict(begin, mine);
  }

  // Calls body(matrix of a layer); twice in the code, so that the compiler knows which memory it reads.
  template <typename Body>
  __device__ void with_matrix(int layer, const Words* mine, const Body& body) const {
    const int64_t at = words_of(predictor, layer) + threadIdx.x % kLanes;
    layer < layers ? body(mine + at) : body(matrices + at);
  }

  __device__ void predict(int64_t begin, const Words* mine) const {
    const int row = threadIdx.x % kLanes / 4, column = threadIdx.x % 4 * 2;
    uint32_t rows[kSteps][4];
    first_layer(begin + row, column, rows);
    for (int layer = 0; layer < predictor.depth; ++layer) {
      float sums[2 * kSteps][4];
      const float* const bias = predictor.numbers + predictor.bias(layer) + column;
#pragma unroll
      for (int tile = 0; tile < 2 * kSteps; ++tile) {
        const Two two = load_two(bias + tile * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] = two.number[i % 2];
      }
      with_matrix(layer, mine, [&](const Words* words) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
          for (int n = 0; n < kSteps; ++n) {
            const Words w = words[(k * kSteps + n) * kLanes];
            multiply_tile<scalar_t>(sums[2 * n], rows[k], w.word[0], w.word[1]);
            multiply_tile<scalar_t>(sums[2 * n + 1], rows[k], w.word[2], w.word[3]);
          }
      });
      hand_on(sums, rows);
    }
    with_matrix(predictor.depth, mine, [&](const Words* words) { last_layer(begin + row, column, rows, words); });
  }

  // Two tiles of sums, activated, are 16 columns of the next input.
  __device__ void hand_on(const float (&sums)[2 * kSteps][4], uint32_t (&rows)[kSteps][4]) const {
    with_activation(predictor.activation, [&]<int kKind>() {
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const two = &sums[2 * k + i / 2][i % 2 * 2];
          rows[k][i] = pair<scalar_t>(activate<kKind>(two[0]), activate<kKind>(two[1]));
        }
    });
  }

  __device__ void first_layer(int64_t row, int column, uint32_t (&rows)[kSteps][4]) const {
    const float* from[2][3];
    for (int half = 0; half < 2; ++half) {
      int place[3];
      find(predictor, predictor.rows[least(row + 8 * half, predictor.count - 1)], place);
      for (int axis = 0; axis < 3; ++axis)
        from[half][axis] = predictor.numbers + predictor.table(axis) + int64_t(place[axis]) * predictor.side + column;
    }
    float sums[2 * kSteps][4];
#pragma unroll
    for (int tile = 0; tile < 2 * kSteps; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Two l = load_two(from[half][0] + tile * 8), f = load_two(from[half][1] + tile * 8);
        const Two c = load_two(from[half][2] + tile * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[tile][2 * half + i] = l.number[i] + f.number[i] + c.number[i];
      }
    hand_on(sums, rows);
  }

  __device__ void last_layer(int64_t row, int column, const uint32_t (&rows)[kSteps][4], const Words* words) const {
    const float* const bias = predictor.numbers + predictor.bias(predictor.depth);
    const int tiles = tiles_of(predictor, predictor.depth);
    for (int n = 0; n < tiles; ++n) {
      float sums[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = bias[n * 16 + i / 4 * 8 + column + i % 2];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const Words w = words[(k * tiles + n) * kLanes];
        multiply_tile<scalar_t>(sums[0], rows[k], w.word[0], w.word[1]);
        multiply_tile<scalar_t>(sums[1], rows[k], w.word[2], w.word[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t r = row + i % 4 / 2 * 8;
        const int out = n * 16 + i / 4 * 8 + column + i % 2;
        if (r < predictor.count && out < predictor.outputs)
          predictions[r * predictor.outputs + out] = scalar_t(sums[i / 4][i % 4]);
      }
    }
  }
};

// Predictions of all rows, on a device of so many multiprocessors with so many bytes of shared memory each.
template <typename scalar_t, typename Launch>
void predict_halves(const Predictor& predictor, const Pack<scalar_t>& weights, Words* matrices, scalar_t* predictions,
                    int64_t processors, int64_t bytes, const Launch& launch) {
  const int64_t words = words_of(predictor, predictor.depth + 1);
  launch(PackHalves<scalar_t>{predictor, weights, matrices}, (words + kThreads - 1) / kThreads, 0);
  int layers = predictor.depth + 1;
  while (words_of(predictor, layers) * int64_t(sizeof(Words)) > bytes) --layers;
  const int64_t blocks = least(processors, (predictor.count + 15) / 16);
  dispatch_side(predictor.side, [&]<int kC>() {
    launch(PredictHalves<scalar_t, kC>{predictor, matrices, predictions, layers, blocks}, blocks,
           words_of(predictor, layers) * int64_t(sizeof(Words)));
  });
}

}  // namespace
}  // namespace fastws
