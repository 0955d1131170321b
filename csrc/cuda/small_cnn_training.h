#pragma once

#include "cuda/small_cnn.h"
#include "small_cnn_steps.h"

// Training and evaluation of small CNNs, one per block, and how much memory a block gets.

namespace fastws {
namespace {

constexpr double kK1 = 0.63576, kK2 = 1.8732, kK3 = 1.48695;  // of the divergence
constexpr double kConvolutionBound = 8, kDenseBound = 10;     // of log alpha

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

// Variational dropout of one weight: log alpha in its bounds, and whether it is not at one of them.
template <typename real_t>
struct LogAlpha {
  real_t value;
  bool inside;

  __device__ LogAlpha(real_t theta, real_t log_sigma, real_t bound) {
    const real_t free = log_sigma - 2 * std::log(std::abs(theta) + real_t(kTiny));
    inside = std::abs(free) <= bound;
    value = free < -bound ? -bound : free > bound ? bound : free;
  }
};

// Training steps of which the arguments are on the device. Noisy networks have two parameters per weight: theta, then
// log sigma^2.
template <typename real_t, bool kNoisy>
struct Training {
  using tile_t = Tile<real_t, kNoisy>;
  static constexpr bool kTraining = true;
  Network network;
  Steps<real_t> steps;
  real_t* divergences;  // of noisy networks, whose share in the loss is kl_weight
  double kl_weight;
  int samples;  // of a tile

  C10_HOST_DEVICE int64_t count() const { return steps.networks; }

  // Makes all steps of network g. What is needed once a step stays in global memory: moments and log sigma^2.
  __device__ void run(int64_t g, int64_t, int64_t, char* memory) const {
    tile_t tile(network, memory, samples);
    const int64_t size = network.num_weights, begin = g * size * tile_t::kSets;
    real_t *const weights = steps.new_weights + begin, *const log_sigma = weights + size;
    real_t *const first = steps.new_first + begin, *const second = steps.new_second + begin;
    for (int64_t i = threadIdx.x; i < size * tile_t::kSets; i += blockDim.x) {
      weights[i] = steps.weights[begin + i], tile.grad[i] = 0;
      first[i] = steps.first[begin + i], second[i] = steps.second[begin + i];
      tile.weights[i] = i < size ? weights[i] : real_t(0);
    }
    __syncthreads();
    for (int64_t s = 0; s < steps.count; ++s) {
      Score score{};
      if constexpr (kNoisy) find_variances(tile, log_sigma);
      for (int64_t sample = 0; sample < steps.batch_size; sample += samples) learn(tile, g, s, sample, score);
      if constexpr (kNoisy) complete_gradient(tile, log_sigma, score);
      if (threadIdx.x < tile_t::num_scores(samples)) tile.scores[threadIdx.x] = score;
      __syncthreads();
      const Optimization<real_t> optimization(steps.optimizer[g], steps.lr[g], steps.weight_decay[g],
                                              steps.first_step + s + 1);
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
        optimization.update(tile.grad[i], tile.weights[i], first[i], second[i]);
        tile.grad[i] = 0;
      }
      if constexpr (kNoisy)
        for_variances([&](int i, real_t) {
          optimization.update(tile.grad[size + i], log_sigma[i], first[size + i], second[size + i]);
          tile.grad[size + i] = 0;
        });
      if (threadIdx.x == 0) record(tile, g * steps.count + s);
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) weights[i] = tile.weights[i];
  }

 private:
  // Adds the gradients of the tile of step s that begins at sample `begin`.
  __device__ void learn(tile_t& tile, int64_t g, int64_t s, int64_t begin, Score& score) const {
    const int64_t place = (g * steps.count + s) * steps.batch_size + begin, step = steps.first_step + s;
    tile.samples = int(min(int64_t(samples), steps.batch_size - begin));
    for (int sample = 0; sample < tile.samples; ++sample)
      tile.load(sample, steps.images + steps.image(place + sample) * network.image_size);
    const uint64_t offset = kNoisy ? 2 * step : step;
    tile.forward({steps.activation[g], steps.dropout[g], uint64_t(steps.seed[g]), offset, begin});
    if (threadIdx.x < tile.samples)
      tile.classify(threadIdx.x, steps.labels[steps.image(place + threadIdx.x)], steps.batch_size, score);
    tile.backward();
  }

  __device__ void record(const tile_t& tile, int64_t place) const {
    Score sum{};
    for (int thread = 0; thread < tile_t::num_scores(samples); ++thread) {
      const Score& score = tile.scores[thread];
      sum.loss += score.loss, sum.correct += score.correct, sum.divergence += score.divergence;
    }
    steps.losses[place] = real_t(sum.loss / steps.batch_size), steps.correct[place] = sum.correct;
    if constexpr (kNoisy) divergences[place] = real_t(sum.divergence);
  }

  // Calls body(i, bound of log alpha) for all weights that have a variance: not for biases of dense layers.
  template <typename Body>
  __device__ void for_variances(const Body& body) const {
    for (int l = 0; l < network.num_operations; ++l) {
      const Operation& operation = network.operations[l];
      if (operation.kind != kConvolution) continue;
      const real_t bound = operation.is_dense() ? kDenseBound : kConvolutionBound;
      for (int i = threadIdx.x; i < operation.out_channels * operation.fan_in(); i += blockDim.x)
        body(operation.weight + i, bound);
      if (operation.bias < 0 || operation.is_dense()) continue;
      for (int i = threadIdx.x; i < operation.out_channels; i += blockDim.x) body(operation.bias + i, bound);
    }
  }

  __device__ void find_variances(tile_t& tile, const real_t* log_sigma) const {
    for_variances([&](int i, real_t bound) {
      const real_t theta = tile.weights[i];
      const LogAlpha<real_t> alpha(theta, log_sigma[i], bound);
      tile.weights[network.num_weights + i] = std::exp(alpha.value) * theta * theta;
    });
  }

  // From the gradients of means and variances to those of theta and log sigma^2.
  __device__ void complete_gradient(tile_t& tile, const real_t* log_sigma, Score& score) const {
    for_variances([&](int i, real_t bound) {
      const real_t theta = tile.weights[i];
      const LogAlpha<real_t> alpha(theta, log_sigma[i], bound);
      real_t& of_variance = tile.grad[network.num_weights + i];
      const real_t share = 1 / (1 + std::exp(-(real_t(kK2) + real_t(kK3) * alpha.value)));
      score.divergence += real_t(kK1) - real_t(kK1) * share + real_t(0.5) * std::log1p(std::exp(-alpha.value));
      if (alpha.inside) {  // there alpha * theta^2 is sigma^2 and does not depend on theta
        const real_t slope = -real_t(kK1 * kK3) * share * (1 - share) - real_t(0.5) / (1 + std::exp(alpha.value));
        const real_t sign = real_t(theta > 0) - real_t(theta < 0);
        tile.grad[i] -= real_t(kl_weight) * slope * 2 * sign / (std::abs(theta) + real_t(kTiny));
        of_variance = tile.weights[network.num_weights + i] * of_variance + real_t(kl_weight) * slope;
      } else {
        tile.grad[i] += 2 * std::exp(alpha.value) * theta * of_variance;
        of_variance = 0;
      }
    });
  }
};

// An evaluation and its arguments.
template <typename real_t>
struct Evaluation {
  using tile_t = Tile<real_t>;
  static constexpr bool kTraining = false;
  Network network;
  const real_t *images, *weights;
  const int32_t* activation;
  real_t* logits;
  int64_t networks, num_images;
  int samples;

  C10_HOST_DEVICE int64_t count() const { return networks; }

  // Logits of network g for a part of the tiles of images.
  __device__ void run(int64_t g, int64_t part, int64_t parts, char* memory) const {
    const int64_t size = network.num_weights;
    const int num_classes = network.num_classes, output = network.operations[network.num_operations - 1].output;
    tile_t tile(network, memory, samples);
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) tile.weights[i] = weights[g * size + i];
    for (int64_t begin = part * samples; begin < num_images; begin += parts * samples) {
      tile.samples = int(min(int64_t(samples), num_images - begin));
      for (int sample = 0; sample < tile.samples; ++sample)
        tile.load(sample, images + (begin + sample) * network.image_size);
      tile.forward({activation[g], 0, 0, 0, begin});
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
template <typename Work>
Plan make_plan(const Network& network, int64_t batch_size, int64_t half, int64_t whole) {
  constexpr int64_t kSamplesOutside = 8;
  const int64_t fixed = Work::tile_t::size_of(network, 0, Work::kTraining);
  const int64_t each = Work::tile_t::size_of(network, 1, Work::kTraining) - fixed;
  const int64_t limit = fixed + each <= half ? half : whole;
  const bool shared = fixed + each <= limit;
  const int64_t most = std::min<int64_t>(shared ? (limit - fixed) / each : kSamplesOutside, kThreads);
  const int64_t tiles = (batch_size + most - 1) / most;
  const int64_t samples = (batch_size + tiles - 1) / tiles;
  return {samples, (fixed + samples * each + 15) / 16 * 16, shared};
}

}  // namespace
}  // namespace fastws
