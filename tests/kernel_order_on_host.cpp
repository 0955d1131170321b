#include "cuda_on_host.h"
// the code that is tested follows
#include <cstring>

#include "cuda/kernel_order.h"

// sizes: paths, rows, entries of a row, blocks that walk a path. pointers: rows, order, taken, room for two candidates
// of each block.
extern "C" void kernel_order(const int64_t* sizes, void* const* pointers) {
  using namespace fastws;
  struct Shared {
    Candidate candidates[kWarps];
  };
  const int64_t batch = sizes[0], count = sizes[1], d = sizes[2], blocks = sizes[3];
  const float* const rows = static_cast<const float*>(pointers[0]);
  int64_t* const order = static_cast<int64_t*>(pointers[1]);
  uint8_t* const taken = static_cast<uint8_t*>(pointers[2]);
  Candidate* const found = static_cast<Candidate*>(pointers[3]);
  std::vector<Shared> shared(blocks);
  for (int64_t path = 0; path < batch; ++path) {
    memset(shared.data(), 0xFF, blocks * sizeof(Shared));
    host::run_grid(blocks, kThreads, [&] {
      walk(rows + path * count * d, order + path * count, taken + path * count, found, count, d, blockIdx.x, blocks,
           shared[blockIdx.x].candidates, host::wait_for_grid);
    });
  }
}
