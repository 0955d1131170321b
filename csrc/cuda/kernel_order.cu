#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cuda/kernel_order.h"
#include "cuda/stream.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowsPerBlock = 4096;  // of a path that one block walks; longer ones are walked by the whole grid

template <bool whole_grid>
__global__ void __launch_bounds__(kThreads) kernel_order_kernel(const float* __restrict__ rows,  // [B, n, d]
                                                                int64_t* __restrict__ order,     // [B, n]
                                                                uint8_t* __restrict__ taken,     // [B, n], zeros
                                                                Candidate* found, int64_t count, int64_t d) {
  __shared__ Candidate shared[kWarps];
  const int64_t path = whole_grid ? 0 : blockIdx.x, block = whole_grid ? blockIdx.x : 0;
  walk(rows + path * count * d, order + path * count, taken + path * count, found, count, d, block,
       whole_grid ? gridDim.x : 1, shared, [] {
         if constexpr (whole_grid) cooperative_groups::this_grid().sync();
       });
}

// As many blocks as run at once, which a grid that synchronises must not exceed.
int64_t resident_blocks() {
  int device = 0, processors = 0, per_processor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel_order_kernel<true>, kThreads, 0));
  return int64_t(processors) * per_processor;
}

Tensor kernel_order_cuda(const Tensor& rows_, bool improve) {
  STD_TORCH_CHECK(!improve, "kernel_order: improve must be false on a GPU, got true; move the rows to the CPU");
  const torch::stable::accelerator::DeviceGuard guard(rows_.get_device_index());
  const Tensor rows = torch::stable::contiguous(rows_);
  const int64_t batch = rows.size(0);
  int64_t count = rows.size(1), d = rows.size(2);
  using torch::headeronly::ScalarType;
  const Tensor order = torch::stable::new_empty(rows, {batch, count}, ScalarType::Long);
  if (order.numel() == 0) return order;

  const Tensor taken = torch::stable::new_zeros(rows, {batch, count}, ScalarType::Byte);
  const float* first = rows.const_data_ptr<float>();
  int64_t* orders = order.mutable_data_ptr<int64_t>();
  uint8_t* flags = taken.mutable_data_ptr<uint8_t>();
  if (count <= kRowsPerBlock) {
    kernel_order_kernel<false><<<batch, kThreads, 0, stream_of(rows)>>>(first, orders, flags, nullptr, count, d);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return order;
  }
  const int64_t blocks = std::min(resident_blocks(), (count + kThreads - 1) / kThreads);
  const Tensor results = torch::stable::new_empty(rows, {2 * blocks * int64_t(sizeof(Candidate))}, ScalarType::Byte);
  auto* found = reinterpret_cast<Candidate*>(results.mutable_data_ptr<uint8_t>());
  for (int64_t path = 0; path < batch; ++path) {
    void* arguments[] = {&first, &orders, &flags, &found, &count, &d};
    STD_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel_order_kernel<true>, dim3(unsigned(blocks)), dim3(kThreads),
                                               arguments, 0, stream_of(rows)));
    first += count * d;
    orders += count;
    flags += count;
  }
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) { m.impl("kernel_order", TORCH_BOX(&kernel_order_cuda)); }

}  // namespace fastws
