#pragma once

#include "cuda/small_cnn.h"

// Training and evaluation of small CNNs, one per block, and how much memory a block gets.

namespace fastws {
namespace {

constexpr double kMomentum = 0.9, kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
enum Optimizer { kSgd, kHeavyBall, kAdam, kAdamW };

// The formulas of torch.optim.
template <typename real_t>
struct Optimization {
  int optimizer;
  real_t lr, weight_decay;
  real_t bias = 1, root = 1;  // corrections of the moments

  // step counts from 1
  __device__ Optimization(int optimizer, double lr, double weight_decay, int64_t step)
      : optimizer(optimizer), lr(lr), weight_decay(weight_decay) {
    if (optimizer < kAdam) return;
    bias = 1 - std::pow(kBeta1, double(step)), root = std::sqrt(1 - std::pow(kBeta2, double(step)));
  }

  __device__ void update(real_t grad, real_t& weight, real_t& first, real_t& second) const {
    if (optimizer == kAdamW)
      weight *= 1 - lr * weight_decay;
    else
      grad += weight_decay * weight;
    if (optimizer >= kAdam) {
      first += real_t(1 - kBeta1) * (grad - first);
      second = real_t(kBeta2) * second + real_t(1 - kBeta2) * grad * grad;
      weight -= lr * (first / (std::sqrt(second) / root + real_t(kEpsilon)) / bias);
    } else {
      if (optimizer == kHeavyBall) first = real_t(kMomentum) * first + grad;
      weight -= lr * (optimizer == kSgd ? grad : first);
    }
  }
};

// Training steps and their arguments, which are on the device.
template <typename real_t>
struct Training {
  using number_t = real_t;
  Network network;
  const real_t *images, *weights, *first, *second;
  real_t *new_weights, *new_first, *new_second, *losses;
  const int64_t *labels, *seed;
  int64_t* correct;
  const int32_t *activation, *optimizer;
  const double *dropout, *lr, *weight_decay;
  const void* batches;
  bool wide;  // int64 batches
  int64_t count, steps, batch_size, step;
  int samples;  // of a tile

  // Makes all steps of network g. Moments stay in global memory: they are needed once a step.
  __device__ void run(int64_t g, int64_t, int64_t, char* memory) const {
    Tile<real_t> tile(network, memory, samples);
    const int64_t size = network.num_weights, begin = g * size;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      tile.weights[i] = weights[begin + i], tile.grad[i] = 0;
      new_first[begin + i] = first[begin + i], new_second[begin + i] = second[begin + i];
    }
    for (int64_t s = 0; s < steps; ++s) {
      Score score{};
      for (int64_t sample = 0; sample < batch_size; sample += samples) learn(tile, g, s, sample, score);
      if (threadIdx.x < samples) tile.scores[threadIdx.x] = score;
      const Optimization<real_t> optimization(optimizer[g], lr[g], weight_decay[g], step + s + 1);
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
        optimization.update(tile.grad[i], tile.weights[i], new_first[begin + i], new_second[begin + i]);
        tile.grad[i] = 0;
      }
      __syncthreads();
      if (threadIdx.x > 0) continue;
      for (int sample = 1; sample < samples; ++sample)
        score.loss += tile.scores[sample].loss, score.correct += tile.scores[sample].correct;
      losses[g * steps + s] = real_t(score.loss / batch_size), correct[g * steps + s] = score.correct;
    }
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) new_weights[begin + i] = tile.weights[i];
  }

 private:
  // Adds the gradients of the tile of step s that begins at sample `begin`.
  __device__ void learn(Tile<real_t>& tile, int64_t g, int64_t s, int64_t begin, Score& score) const {
    const int64_t place = (g * steps + s) * batch_size + begin;
    tile.samples = int(min(int64_t(samples), batch_size - begin));
    for (int sample = 0; sample < tile.samples; ++sample)
      tile.load(sample, images + image(place + sample) * network.image_size);
    tile.forward(activation[g], dropout[g], seed[g], step + s, begin);
    if (threadIdx.x < tile.samples) tile.classify(threadIdx.x, labels[image(place + threadIdx.x)], batch_size, score);
    tile.backward();
  }

  __device__ int64_t image(int64_t place) const {
    return wide ? static_cast<const int64_t*>(batches)[place] : static_cast<const int32_t*>(batches)[place];
  }
};

// An evaluation and its arguments.
template <typename real_t>
struct Evaluation {
  using number_t = real_t;
  Network network;
  const real_t *images, *weights;
  const int32_t* activation;
  real_t* logits;
  int64_t count, num_images;
  int samples;

  // Logits of network g for a part of the tiles of images.
  __device__ void run(int64_t g, int64_t part, int64_t parts, char* memory) const {
    const int64_t size = network.num_weights;
    const int num_classes = network.num_classes, output = network.layers[network.num_layers - 1].output;
    Tile<real_t> tile(network, memory, samples);
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) tile.weights[i] = weights[g * size + i];
    for (int64_t begin = part * samples; begin < num_images; begin += parts * samples) {
      tile.samples = int(min(int64_t(samples), num_images - begin));
      for (int sample = 0; sample < tile.samples; ++sample)
        tile.load(sample, images + (begin + sample) * network.image_size);
      tile.forward(activation[g], 0, 0, 0, begin);
      for (int i = threadIdx.x; i < tile.samples * num_classes; i += blockDim.x)
        logits[(g * num_images + begin) * num_classes + i] = tile.map(i / num_classes, output)[i % num_classes];
    }
  }
};

// How many samples a block takes at once, and how many bytes it needs for them, in shared memory or else in global.
struct Plan {
  int64_t samples, bytes;
  bool shared;
};

// Two blocks of a multiprocessor share its memory, so that one computes while the other waits. A network too large for
// that gets all of what a block can have; one too large for this is in global memory, that is in caches.
template <typename real_t>
Plan make_plan(const Network& network, int64_t batch_size, bool training, int64_t half, int64_t whole) {
  constexpr int64_t kSamplesOutside = 8;
  const int64_t fixed = Tile<real_t>::size_of(network, 0, training);
  const int64_t each = Tile<real_t>::size_of(network, 1, training) - fixed;
  const int64_t limit = fixed + each <= half ? half : whole;
  const bool shared = fixed + each <= limit;
  const int64_t most = std::min<int64_t>(shared ? (limit - fixed) / each : kSamplesOutside, kThreads);
  const int64_t tiles = (batch_size + most - 1) / most;
  const int64_t samples = (batch_size + tiles - 1) / tiles;
  return {samples, (fixed + samples * each + 15) / 16 * 16, shared};
}

}  // namespace
}  // namespace fastws
