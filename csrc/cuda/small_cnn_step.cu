#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cuda/small_cnn_training.h"
#include "cuda/stream.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One block per network at a time.
template <typename Work, bool kShared>
__global__ void __launch_bounds__(kThreads, 2)
    small_cnn_kernel(const __grid_constant__ Work work, char* workspace, int64_t bytes) {
  extern __shared__ __align__(16) char shared[];
  char* memory = shared;
  if constexpr (!kShared) memory = workspace + blockIdx.x * bytes;
  for (int64_t g = blockIdx.x; g < work.count; g += gridDim.x) work.run(g, blockIdx.y, gridDim.y, memory);
}

int64_t attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
  return value;
}

// A table may be on any device; from a GPU it has to be waited for.
template <typename real_t>
Network read_network(const char* op, const Tensor& layers, const Tensor& weights) {
  STD_TORCH_CHECK(layers.size(0) <= kMaxLayers, op, ": layers must be at most ", kMaxLayers, " rows, got ",
                  layers.size(0), ": use torch.func or train one by one");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor table = torch::stable::contiguous(torch::stable::to(layers, cpu));
  return make_network(table.const_data_ptr<int64_t>(), table.size(0), weights.size(1), sizeof(real_t));
}

// Runs the work for all networks, `batch_size` samples for each. Samples that do not depend on each other are shared
// among blocks where networks are too few to fill the device.
template <typename Work>
void launch(Work work, int64_t batch_size, bool training, const Tensor& weights) {
  constexpr int64_t kBlocks = 8;  // for each multiprocessor
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, weights);
  const int64_t whole = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, weights);
  const int64_t half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, weights) / 2 -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock, weights);
  const Plan plan = make_plan<typename Work::number_t>(work.network, batch_size, training, half, whole);
  work.samples = int(plan.samples);
  if (plan.shared) {
    const int64_t tiles = training ? 1 : (batch_size + plan.samples - 1) / plan.samples;
    const int64_t parts = std::min(tiles, 1 + kBlocks * multiprocessors / work.count);
    const auto kernel = small_cnn_kernel<Work, true>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(whole)));
    kernel<<<dim3(work.count, parts), kThreads, plan.bytes, stream_of(weights)>>>(work, nullptr, 0);
  } else {
    const int64_t blocks = std::min(work.count, 2 * multiprocessors);
    const Tensor workspace = torch::stable::new_empty(weights, {blocks * plan.bytes}, ScalarType::Char);
    char* const memory = reinterpret_cast<char*>(workspace.mutable_data_ptr<int8_t>());
    small_cnn_kernel<Work, false><<<blocks, kThreads, 0, stream_of(weights)>>>(work, memory, plan.bytes);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Body>
void dispatch_real(const Tensor& x, const Body& body) {
  x.scalar_type() == ScalarType::Float ? body.template operator()<float>() : body.template operator()<double>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> small_cnn_step_cuda(
    const Tensor& weights_, const Tensor& first_, const Tensor& second_, const Tensor& images_, const Tensor& labels_,
    const Tensor& batches_, const Tensor& layers, const Tensor& activation_, const Tensor& dropout_,
    const Tensor& optimizer_, const Tensor& lr_, const Tensor& weight_decay_, const Tensor& seed_, int64_t step) {
  const torch::stable::accelerator::DeviceGuard guard(weights_.get_device_index());
  const Tensor weights = torch::stable::contiguous(weights_), first = torch::stable::contiguous(first_);
  const Tensor second = torch::stable::contiguous(second_), images = torch::stable::contiguous(images_);
  const Tensor labels = torch::stable::contiguous(labels_), batches = torch::stable::contiguous(batches_);
  const Tensor activation = torch::stable::contiguous(activation_), dropout = torch::stable::contiguous(dropout_);
  const Tensor optimizer = torch::stable::contiguous(optimizer_), lr = torch::stable::contiguous(lr_);
  const Tensor weight_decay = torch::stable::contiguous(weight_decay_), seed = torch::stable::contiguous(seed_);
  const int64_t count = weights.size(0), steps = batches.size(1), batch_size = batches.size(2);
  const Tensor new_weights = torch::stable::empty_like(weights), new_first = torch::stable::empty_like(weights);
  const Tensor new_second = torch::stable::empty_like(weights);
  const Tensor losses = torch::stable::new_empty(weights, {count, steps});
  const Tensor correct = torch::stable::new_empty(labels, {count, steps});
  if (count == 0) return {new_weights, new_first, new_second, losses, correct};

  dispatch_real(weights, [&]<typename real_t>() {
    const Training<real_t> training{read_network<real_t>("small_cnn_step", layers, weights),
                                    images.const_data_ptr<real_t>(),
                                    weights.const_data_ptr<real_t>(),
                                    first.const_data_ptr<real_t>(),
                                    second.const_data_ptr<real_t>(),
                                    new_weights.mutable_data_ptr<real_t>(),
                                    new_first.mutable_data_ptr<real_t>(),
                                    new_second.mutable_data_ptr<real_t>(),
                                    losses.mutable_data_ptr<real_t>(),
                                    labels.const_data_ptr<int64_t>(),
                                    seed.const_data_ptr<int64_t>(),
                                    correct.mutable_data_ptr<int64_t>(),
                                    activation.const_data_ptr<int32_t>(),
                                    optimizer.const_data_ptr<int32_t>(),
                                    dropout.const_data_ptr<double>(),
                                    lr.const_data_ptr<double>(),
                                    weight_decay.const_data_ptr<double>(),
                                    batches.const_data_ptr(),
                                    batches.scalar_type() == ScalarType::Long,
                                    count,
                                    steps,
                                    batch_size,
                                    step};
    launch(training, batch_size, true, weights);
  });
  return {new_weights, new_first, new_second, losses, correct};
}

Tensor small_cnn_logits_cuda(const Tensor& weights_, const Tensor& images_, const Tensor& layers,
                             const Tensor& activation_) {
  const torch::stable::accelerator::DeviceGuard guard(weights_.get_device_index());
  const Tensor weights = torch::stable::contiguous(weights_), images = torch::stable::contiguous(images_);
  const Tensor activation = torch::stable::contiguous(activation_);
  const int64_t count = weights.size(0), num_images = images.size(0);

  std::optional<Tensor> logits;
  dispatch_real(weights, [&]<typename real_t>() {
    const Network network = read_network<real_t>("small_cnn_logits", layers, weights);
    logits = torch::stable::new_empty(weights, {count, num_images, network.num_classes});
    if (logits->numel() == 0) return;
    const Evaluation<real_t> evaluation{network,
                                        images.const_data_ptr<real_t>(),
                                        weights.const_data_ptr<real_t>(),
                                        activation.const_data_ptr<int32_t>(),
                                        logits->mutable_data_ptr<real_t>(),
                                        count,
                                        num_images};
    launch(evaluation, num_images, false, weights);
  });
  return *logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) {
  m.impl("small_cnn_step", TORCH_BOX(&small_cnn_step_cuda));
  m.impl("small_cnn_logits", TORCH_BOX(&small_cnn_logits_cuda));
}

}  // namespace fastws
