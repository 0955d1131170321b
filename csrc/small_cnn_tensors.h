#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "small_cnn_steps.h"

namespace fastws {
namespace {

// The tensors of a call of training steps, contiguous, and those that it returns.
struct StepTensors {
  using Tensor = torch::stable::Tensor;
  Tensor weights, first, second, images, labels, batches, layers, activation, dropout, optimizer, lr, weight_decay,
      seed;
  Tensor new_weights, new_first, new_second, losses, correct;

  explicit StepTensors(const std::array<const Tensor*, 13>& given) {
    Tensor* const mine[] = {&weights,    &first,   &second,    &images, &labels,       &batches, &layers,
                            &activation, &dropout, &optimizer, &lr,     &weight_decay, &seed};
    // asking costs less than calling an operator by its name
    for (int i = 0; i < 13; ++i)
      *mine[i] = given[i]->is_contiguous() ? *given[i] : torch::stable::contiguous(*given[i]);
  }

  void make_outputs() {
    new_weights = torch::stable::empty_like(weights), new_first = torch::stable::empty_like(weights);
    new_second = torch::stable::empty_like(weights);
    losses = torch::stable::new_empty(weights, {weights.size(0), batches.size(1)});
    correct = torch::stable::new_empty(labels, {weights.size(0), batches.size(1)});
  }

  bool has_wide_batches() const { return batches.scalar_type() == torch::headeronly::ScalarType::Long; }

  template <typename real_t>
  Steps<real_t> steps(int64_t first_step) const {
    return {.images = images.const_data_ptr<real_t>(),
            .weights = weights.const_data_ptr<real_t>(),
            .first = first.const_data_ptr<real_t>(),
            .second = second.const_data_ptr<real_t>(),
            .new_weights = new_weights.mutable_data_ptr<real_t>(),
            .new_first = new_first.mutable_data_ptr<real_t>(),
            .new_second = new_second.mutable_data_ptr<real_t>(),
            .losses = losses.mutable_data_ptr<real_t>(),
            .labels = labels.const_data_ptr<int64_t>(),
            .seed = seed.const_data_ptr<int64_t>(),
            .correct = correct.mutable_data_ptr<int64_t>(),
            .activation = activation.const_data_ptr<int32_t>(),
            .optimizer = optimizer.const_data_ptr<int32_t>(),
            .dropout = dropout.const_data_ptr<double>(),
            .lr = lr.const_data_ptr<double>(),
            .weight_decay = weight_decay.const_data_ptr<double>(),
            .batches = batches.const_data_ptr(),
            .wide = has_wide_batches(),
            .networks = weights.size(0),
            .count = batches.size(1),
            .batch_size = batches.size(2),
            .first_step = first_step};
  }
};

}  // namespace
}  // namespace fastws
