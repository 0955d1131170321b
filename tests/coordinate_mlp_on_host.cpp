#include "cuda_on_host.h"
// the code that is tested follows
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "cuda/coordinate_mlp.h"
#include "cuda/coordinate_mlp_gradients.h"
#include "cuda/coordinate_mlp_halves.h"

namespace fastws {
namespace {

struct Lane {
  uint32_t rows[4], matrix[2];
};

template <typename scalar_t>
float half_of(uint32_t word, int half) {
  scalar_t x;
  x.x = uint16_t(word >> (16 * half));
  return float(x);
}

// The fragments of mma.m16n8k16, as the manual of PTX has them.
template <typename scalar_t>
void multiply_tile(float (&sum)[4], const uint32_t (&rows)[4], uint32_t matrix0, uint32_t matrix1) {
  static Lane lanes[kThreads];
  Lane* const warp = lanes + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  warp[lane] = {{rows[0], rows[1], rows[2], rows[3]}, {matrix0, matrix1}};
  host::wait_for_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = member * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = warp[row % 8 * 4 + k % 8 / 2].rows[row / 8 + k / 8 * 2];
      const uint32_t b = warp[column * 4 + k % 8 / 2].matrix[k / 8];
      sum[i] += half_of<scalar_t>(a, k % 2) * half_of<scalar_t>(b, k % 2);
    }
  }
  host::wait_for_warp();
}

struct Launch {
  template <typename Work>
  void operator()(const Work& work, int64_t blocks, int64_t bytes) const {
    std::vector<Quad> shared(bytes / sizeof(Quad) + 1);
    for (int64_t block = 0; block < blocks; ++block) {
      memset(shared.data(), 0xFF, shared.size() * sizeof(Quad));
      host::run_block(kThreads, [&] { work.run(block, reinterpret_cast<char*>(shared.data())); });
    }
  }
};

template <typename scalar_t>
void run(Predictor predictor, void* const* pointers, int64_t processors, int64_t shared, bool backward) {
  const auto at = [&](int i) { return static_cast<scalar_t*>(pointers[i]); };
  const Parameters<scalar_t> from{{at(0), at(1), at(2)}, at(3), at(4), at(5), at(6)};
  std::vector<float> numbers(predictor.size(), NAN);
  predictor.numbers = numbers.data();
  std::vector<int64_t> ends(predictor.num_layers, -1);
  predictor.ends = ends.data();
  pack(predictor, from, numbers.data(), ends.data(), Launch{});
  if (!backward) {
    if constexpr (sizeof(scalar_t) == 4) {
      predict(predictor, at(7), processors, Launch{});
    } else {
      std::vector<Words> matrices(words_of(predictor, predictor.depth + 1));
      predict_halves<scalar_t>(predictor, {predictor, from, nullptr}, matrices.data(), at(7), processors, shared,
                               Launch{});
    }
    return;
  }
  Workspace workspace{predictor, nullptr};
  std::vector<float> memory(workspace.size(), NAN);
  workspace.numbers = memory.data();
  Finish<scalar_t> finish{workspace};
  for (int i = 0; i < kTargets; ++i) finish.targets[i] = at(9 + i);
  differentiate(workspace, static_cast<const float*>(pointers[8]), finish, Launch{});
}

}  // namespace
}  // namespace fastws

// sizes: bytes of a number (-2: bfloat16), width, depth, outputs, activation, layers, three counts of indices, rows,
// multiprocessors, shared memory, and whether gradients are wanted instead of predictions. pointers: parameters,
// predictions, their gradient in float32, gradients of the parameters, grid, rows.
extern "C" void coordinate_mlp(const int64_t* sizes, void* const* pointers) {
  using namespace fastws;
  Predictor predictor{int(sizes[1]), int(sizes[2]), int(sizes[3])};
  predictor.side = (int(std::max(sizes[1], sizes[3])) + kPadding - 1) / kPadding * kPadding;
  predictor.activation = int(sizes[4]), predictor.num_layers = int(sizes[5]);
  for (int axis = 0; axis < 3; ++axis) predictor.indices[axis] = int(sizes[6 + axis]);
  predictor.grid = static_cast<const int64_t*>(pointers[9 + kTargets]);
  predictor.rows = static_cast<const int64_t*>(pointers[10 + kTargets]), predictor.count = sizes[9];
  const auto function = sizes[0] == 4   ? run<float>
                        : sizes[0] == 2 ? run<torch::headeronly::Half>
                                        : run<torch::headeronly::BFloat16>;
  function(predictor, pointers, sizes[10], sizes[11], sizes[12]);
}
