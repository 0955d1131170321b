#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/permute.h"
#include "cuda/stream.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

__global__ void random_permutations_kernel(const int64_t* __restrict__ starts, int32_t* __restrict__ permutations,
                                           int64_t total, int64_t groups, uint64_t seed, uint64_t offset) {
  __shared__ Shuffle shared;
  shuffle_group(starts, permutations, total, groups, seed, offset, blockIdx.x, shared);
}

Tensor random_permutations_cuda(const Tensor& starts_, int64_t total, int64_t batch, int64_t seed, int64_t offset) {
  const torch::stable::accelerator::DeviceGuard guard(starts_.get_device_index());
  const Tensor starts = torch::stable::contiguous(starts_);
  const Tensor permutations = torch::stable::new_empty(starts, {batch, total}, torch::headeronly::ScalarType::Int);
  const int64_t groups = starts.size(0) - 1;
  if (permutations.numel() == 0) return permutations;

  random_permutations_kernel<<<batch * groups, kThreads, 0, stream_of(starts)>>>(
      starts.const_data_ptr<int64_t>(), permutations.mutable_data_ptr<int32_t>(), total, groups, seed, offset);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return permutations;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) { m.impl("random_permutations", TORCH_BOX(&random_permutations_cuda)); }

}  // namespace fastws
