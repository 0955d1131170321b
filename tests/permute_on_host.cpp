#include "cuda_on_host.h"
// the code that is tested follows
#include <cstring>

#include "cuda/permute.h"

// sizes: entries of a draw, groups, draws, seed, offset. pointers: starts of groups, permutations.
extern "C" void random_permutations(const int64_t* sizes, void* const* pointers) {
  using namespace fastws;
  static Shuffle shared;
  const int64_t* const starts = static_cast<const int64_t*>(pointers[0]);
  int32_t* const permutations = static_cast<int32_t*>(pointers[1]);
  for (int64_t block = 0; block < sizes[2] * sizes[1]; ++block) {
    memset(&shared, 0xFF, sizeof(shared));
    host::run_block(
        kThreads, [&] { shuffle_group(starts, permutations, sizes[0], sizes[1], sizes[3], sizes[4], block, shared); });
  }
}
