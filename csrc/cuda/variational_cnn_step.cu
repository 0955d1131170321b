#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/small_cnn_launch.h"

namespace fastws {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> variational_cnn_step_cuda(
    const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& images, const Tensor& labels,
    const Tensor& batches, const Tensor& layers, const Tensor& activation, const Tensor& dropout,
    const Tensor& optimizer, const Tensor& lr, const Tensor& weight_decay, const Tensor& seed, double kl_weight,
    int64_t step) {
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  StepTensors tensors({&weights, &first, &second, &images, &labels, &batches, &layers, &activation, &dropout,
                       &optimizer, &lr, &weight_decay, &seed});
  tensors.make_outputs();
  const Tensor divergences = torch::stable::empty_like(tensors.losses);
  train<true>("variational_cnn_step", tensors, step, divergences, kl_weight);
  return {tensors.new_weights, tensors.new_first, tensors.new_second, tensors.losses, tensors.correct, divergences};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) { m.impl("variational_cnn_step", TORCH_BOX(&variational_cnn_step_cuda)); }

}  // namespace fastws
