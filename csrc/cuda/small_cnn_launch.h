#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cuda/small_cnn_training.h"
#include "cuda/stream.h"
#include "small_cnn_tensors.h"

// From tensors to kernels.

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
  for (int64_t g = blockIdx.x; g < work.count(); g += gridDim.x) work.run(g, blockIdx.y, gridDim.y, memory);
}

int64_t attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
  return value;
}

// A table may be on any device; from a GPU it has to be waited for.
template <typename real_t>
Network read_network(const char* op, const Tensor& layers, const Tensor& weights, const Tensor& images, bool noisy) {
  STD_TORCH_CHECK(layers.size(0) <= kMaxOperations, op, ": layers must be at most ", kMaxOperations, " rows, got ",
                  layers.size(0), ": use torch.func or train one by one");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor table = torch::stable::contiguous(torch::stable::to(layers, cpu));
  const Row* rows = reinterpret_cast<const Row*>(table.const_data_ptr<int64_t>());
  const int64_t num_weights = weights.size(weights.dim() - 1);
  check_rows(op, rows, table.size(0), images.size(1), images.size(2), images.size(3), num_weights);
  return make_network(rows, table.size(0), num_weights, sizeof(real_t), noisy);
}

// Runs the work for all networks, `batch_size` samples for each. Samples that do not depend on each other are shared
// among blocks where networks are too few to fill the device.
template <typename Work>
void launch(Work work, int64_t batch_size, const Tensor& weights) {
  constexpr int64_t kBlocks = 8;  // for each multiprocessor
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, weights);
  const int64_t whole = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, weights);
  const int64_t half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, weights) / 2 -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock, weights);
  const Plan plan = make_plan<Work>(work.network, batch_size, half, whole);
  work.samples = int(plan.samples);
  if (plan.shared) {
    const int64_t tiles = Work::kTraining ? 1 : (batch_size + plan.samples - 1) / plan.samples;
    const int64_t parts = std::min(tiles, 1 + kBlocks * multiprocessors / work.count());
    const auto kernel = small_cnn_kernel<Work, true>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(whole)));
    kernel<<<dim3(work.count(), parts), kThreads, plan.bytes, stream_of(weights)>>>(work, nullptr, 0);
  } else {
    const int64_t blocks = std::min(work.count(), 2 * multiprocessors);
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

// divergences and kl_weight: of noisy networks
template <bool kNoisy>
void train(const char* op, const StepTensors& tensors, int64_t step, const std::optional<Tensor>& divergences,
           double kl_weight) {
  if (tensors.weights.size(0) == 0) return;
  dispatch_real(tensors.weights, [&]<typename real_t>() {
    const Training<real_t, kNoisy> training{
        .network = read_network<real_t>(op, tensors.layers, tensors.weights, tensors.images, kNoisy),
        .steps = tensors.steps<real_t>(step),
        .divergences = divergences ? divergences->mutable_data_ptr<real_t>() : nullptr,
        .kl_weight = kl_weight};
    launch(training, tensors.batches.size(2), tensors.weights);
  });
}

}  // namespace
}  // namespace fastws
