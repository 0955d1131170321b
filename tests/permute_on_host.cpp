#include "cuda_on_host.h"
// the code that is tested follows
#include <cstring>

#include "cuda/permute.h"

extern "C" void random_permutations(const int64_t* starts, int32_t* permutations, int64_t total, int64_t groups,
                                    int64_t batch, uint64_t seed, uint64_t offset) {
  using namespace fastws;
  static Shuffle shared;
  for (int64_t block = 0; block < batch * groups; ++block) {
    memset(&shared, 0xFF, sizeof(shared));
    host::run_block(kThreads, [&] { shuffle_group(starts, permutations, total, groups, seed, offset, block, shared); });
  }
}
