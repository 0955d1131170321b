#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>
#include <type_traits>

#include "cuda/coordinate_mlp.h"
#include "cuda/coordinate_mlp_gradients.h"
#include "cuda/coordinate_mlp_halves.h"
#include "cuda/stream.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename scalar_t>
__device__ void multiply_tile(float (&sum)[4], const uint32_t (&rows)[4], uint32_t matrix0, uint32_t matrix1) {
  if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(matrix0), "r"(matrix1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(matrix0), "r"(matrix1));
}

template <typename Work>
__global__ void __launch_bounds__(kThreads, Work::kResident)
    coordinate_mlp_narrow_kernel(const __grid_constant__ Work work) {
  extern __shared__ __align__(16) char shared[];
  work.run(blockIdx.x, shared);
}

struct Launch {
  cudaStream_t stream;

  template <typename Work>
  void operator()(const Work& work, int64_t blocks, int64_t bytes) const {
    if (blocks == 0) return;
    const auto kernel = coordinate_mlp_narrow_kernel<Work>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    kernel<<<blocks, kThreads, bytes, stream>>>(work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

int64_t attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
  return value;
}

// Parameters as the op takes them, contiguous, and their predictor.
struct Arguments {
  std::array<Tensor, kTargets> parameters;
  Tensor grid, rows, numbers, ends;
  Predictor predictor;

  Arguments(const std::array<const Tensor*, kTargets>& given, const Tensor& grid_, const Tensor& rows_,
            int64_t activation)
      : grid(torch::stable::contiguous(grid_)), rows(torch::stable::contiguous(rows_)) {
    for (int i = 0; i < kTargets; ++i) parameters[i] = torch::stable::contiguous(*given[i]);
    predictor = {int(parameters[0].size(1)), int(parameters[3].size(0)), int(parameters[5].size(0))};
    STD_TORCH_CHECK(predictor.width <= kMaxWidth && predictor.outputs <= kMaxWidth,
                    "coordinate_mlp_narrow: layers must be at most ", kMaxWidth, " wide, got ", predictor.width,
                    " and ", predictor.outputs);
    predictor.side = (std::max(predictor.width, predictor.outputs) + kPadding - 1) / kPadding * kPadding;
    predictor.activation = int(activation), predictor.num_layers = int(grid.size(0));
    for (int axis = 0; axis < 3; ++axis) predictor.indices[axis] = int(parameters[axis].size(0));
    predictor.grid = grid.const_data_ptr<int64_t>(), predictor.rows = rows.const_data_ptr<int64_t>();
    predictor.count = rows.size(0);
    numbers = torch::stable::new_empty(rows, {predictor.size()}, ScalarType::Float);
    predictor.numbers = numbers.const_data_ptr<float>();
    ends = torch::stable::new_empty(rows, {predictor.num_layers});
    predictor.ends = ends.const_data_ptr<int64_t>();
  }

  template <typename scalar_t>
  Parameters<scalar_t> pointers() const {
    const auto at = [&](int i) { return parameters[i].const_data_ptr<scalar_t>(); };
    return {{at(0), at(1), at(2)}, at(3), at(4), at(5), at(6)};
  }

  Launch launch() const { return {stream_of(rows)}; }
};

// Calls body<T>() for what matrix units or float32 units compute.
template <typename Body>
void dispatch(const Tensor& x, const Body& body) {
  dispatch_floating(x.scalar_type(), "coordinate_mlp_narrow", [&]<typename scalar_t>() {
    STD_TORCH_CHECK(sizeof(scalar_t) < 8, "coordinate_mlp_narrow: dtype must be float32, bfloat16 or float16, got ",
                    torch::headeronly::toString(x.scalar_type()));
    if constexpr (sizeof(scalar_t) < 8) body.template operator()<scalar_t>();
  });
}

std::tuple<Tensor, Tensor> coordinate_mlp_narrow_cuda(const Tensor& layer_table, const Tensor& filter_table,
                                                      const Tensor& channel_table, const Tensor& grid,
                                                      const Tensor& rows, const Tensor& hidden_weights,
                                                      const Tensor& hidden_biases, const Tensor& out_weight,
                                                      const Tensor& out_bias, int64_t activation, bool) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Arguments a(
      {&layer_table, &filter_table, &channel_table, &hidden_weights, &hidden_biases, &out_weight, &out_bias}, grid,
      rows, activation);
  const Predictor& predictor = a.predictor;
  const Tensor predictions = torch::stable::new_empty(layer_table, {predictor.count, predictor.outputs});
  const Tensor kept = torch::stable::new_empty(layer_table, {0}, ScalarType::Float);
  if (predictions.numel() == 0) return {predictions, kept};

  dispatch(layer_table, [&]<typename scalar_t>() {
    const auto from = a.pointers<scalar_t>();
    float* const numbers = a.numbers.mutable_data_ptr<float>();
    scalar_t* const to = predictions.mutable_data_ptr<scalar_t>();
    const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, rows);
    pack(predictor, from, numbers, a.ends.mutable_data_ptr<int64_t>(), a.launch());
    if constexpr (sizeof(scalar_t) == 4) {
      predict(predictor, to, processors, a.launch());
    } else {
      const int64_t words = words_of(predictor, predictor.depth + 1) * int64_t(sizeof(Words) / sizeof(int32_t));
      const Tensor matrices = torch::stable::new_empty(rows, {words}, ScalarType::Int);
      predict_halves<scalar_t>(predictor, {predictor, from, numbers},
                               reinterpret_cast<Words*>(matrices.mutable_data_ptr<int32_t>()), to, processors,
                               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, rows), a.launch());
    }
  });
  return {predictions, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients coordinate_mlp_narrow_backward_cuda(const Tensor& grad_, const Tensor&, const Tensor& layer_table,
                                              const Tensor& filter_table, const Tensor& channel_table,
                                              const Tensor& grid, const Tensor& rows, const Tensor& hidden_weights,
                                              const Tensor& hidden_biases, const Tensor& out_weight,
                                              const Tensor& out_bias, int64_t activation) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Arguments a(
      {&layer_table, &filter_table, &channel_table, &hidden_weights, &hidden_biases, &out_weight, &out_bias}, grid,
      rows, activation);
  const Tensor grad = torch::stable::contiguous(torch::stable::to(grad_, ScalarType::Float));
  std::array<Tensor, kTargets> targets;
  for (int i = 0; i < kTargets; ++i) targets[i] = torch::stable::empty_like(a.parameters[i]);
  Workspace workspace{a.predictor, nullptr};
  const Tensor memory = torch::stable::new_empty(grad, {workspace.size()});
  workspace.numbers = memory.mutable_data_ptr<float>();

  dispatch(layer_table, [&]<typename scalar_t>() {
    Finish<scalar_t> finish{workspace};
    for (int i = 0; i < kTargets; ++i) finish.targets[i] = targets[i].template mutable_data_ptr<scalar_t>();
    pack(a.predictor, a.pointers<scalar_t>(), a.numbers.mutable_data_ptr<float>(), a.ends.mutable_data_ptr<int64_t>(),
         a.launch());
    differentiate(workspace, grad.const_data_ptr<float>(), finish, a.launch());
  });
  return {targets[0], targets[1], targets[2], targets[3], targets[4], targets[5], targets[6]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CUDA, m) {
  m.impl("coordinate_mlp_narrow", TORCH_BOX(&coordinate_mlp_narrow_cuda));
  m.impl("coordinate_mlp_narrow_backward", TORCH_BOX(&coordinate_mlp_narrow_backward_cuda));
}

}  // namespace fastws
