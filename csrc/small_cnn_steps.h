#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace fastws {
namespace {

constexpr double kMomentum = 0.9, kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;

// Training steps of small CNNs, as fastws/ops/small_cnn_step.py has their arguments and what they return.
template <typename real_t>
struct Steps {
  const real_t *images, *weights, *first, *second;
  real_t *new_weights, *new_first, *new_second, *losses;
  const int64_t *labels, *seed;
  int64_t* correct;
  const int32_t *activation, *optimizer;
  const double *dropout, *lr, *weight_decay;
  const void* batches;
  bool wide;  // int64 batches
  int64_t networks, count, batch_size, first_step;

  // the image of a place in the batches [G, S, B]
  C10_HOST_DEVICE int64_t image(int64_t place) const {
    return wide ? static_cast<const int64_t*>(batches)[place] : static_cast<const int32_t*>(batches)[place];
  }
};

}  // namespace
}  // namespace fastws
