#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/small_cnn_launch.h"

namespace fastws {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> small_cnn_step_cuda(
    const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& images, const Tensor& labels,
    const Tensor& batches, const Tensor& layers, const Tensor& activation, const Tensor& dropout,
    const Tensor& optimizer, const Tensor& lr, const Tensor& weight_decay, const Tensor& seed, int64_t step) {
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  StepTensors tensors({&weights, &first, &second, &images, &labels, &batches, &layers, &activation, &dropout,
                       &optimizer, &lr, &weight_decay, &seed});
  tensors.make_outputs();
  train<false>("small_cnn_step", tensors, step, std::nullopt, 0);
  return {tensors.new_weights, tensors.new_first, tensors.new_second, tensors.losses, tensors.correct};
}

Tensor small_cnn_logits_cuda(const Tensor& weights_, const Tensor& images_, const Tensor& layers,
                             const Tensor& activation_) {
  const torch::stable::accelerator::DeviceGuard guard(weights_.get_device_index());
  const Tensor weights = torch::stable::contiguous(weights_), images = torch::stable::contiguous(images_);
  const Tensor activation = torch::stable::contiguous(activation_);
  const int64_t count = weights.size(0), num_images = images.size(0);

  std::optional<Tensor> logits;
  dispatch_real(weights, [&]<typename real_t>() {
    const Network network = read_network<real_t>("small_cnn_logits", layers, weights, images, false);
    logits = torch::stable::new_empty(weights, {count, num_images, network.num_classes});
    if (logits->numel() == 0) return;
    const Evaluation<real_t> evaluation{.network = network,
                                        .images = images.const_data_ptr<real_t>(),
                                        .weights = weights.const_data_ptr<real_t>(),
                                        .activation = activation.const_data_ptr<int32_t>(),
                                        .logits = logits->mutable_data_ptr<real_t>(),
                                        .networks = count,
                                        .num_images = num_images};
    launch(evaluation, num_images, weights);
  });
  return *logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) {
  m.impl("small_cnn_step", TORCH_BOX(&small_cnn_step_cuda));
  m.impl("small_cnn_logits", TORCH_BOX(&small_cnn_logits_cuda));
}

}  // namespace fastws
