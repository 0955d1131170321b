#pragma once

#include <cmath>
#include <cstdint>

namespace fastws {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct Candidate {
  double similarity;
  int64_t row;
};

// The more similar; of equals the first.
__device__ Candidate better(Candidate a, Candidate b) {
  const bool first = a.similarity != b.similarity ? a.similarity > b.similarity : a.row < b.row;
  return first ? a : b;
}

// The best candidate of all threads of a block, in every thread. Shared memory: one of each warp.
__device__ Candidate best_of_block(Candidate mine, Candidate (&shared)[kWarps]) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Candidate other = {__shfl_xor_sync(~0u, mine.similarity, distance),
                             __shfl_xor_sync(~0u, (long long)mine.row, distance)};
    mine = better(mine, other);
  }
  __syncthreads();  // all have read what was found before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) mine = better(mine, shared[warp]);
  return mine;
}

// A greedy path through rows, with similarities as in fastws/ops/kernel_order.py. A team of blocks walks a path: every
// thread looks at rows of its own, so that nobody else has to know which of them are taken, and every block puts
// together what all have found. Two sets of results take turns, hence one synchronisation per step.
template <typename Wait>
__device__ void walk(const float* __restrict__ rows,  // [n, d]
                     int64_t* __restrict__ order,     // [n]
                     uint8_t* __restrict__ taken,     // [n], zeros
                     Candidate* found,                // [2, blocks], if there are several
                     int64_t count, int64_t d, int64_t block, int64_t blocks, Candidate (&shared)[kWarps],
                     const Wait& wait_for_all_blocks) {
  const Candidate none = {-INFINITY, count};
  int64_t current = 0;
  for (int64_t position = 0; position < count; ++position) {
    if (block == 0 && threadIdx.x == 0) order[position] = current;
    const float* const query = rows + current * d;
    Candidate mine = none;
    for (int64_t row = block * kThreads + threadIdx.x; row < count; row += blocks * kThreads) {
      if (row == current) taken[row] = 1;
      if (taken[row]) continue;
      double similarity = 0;  // products are exact, fused or not
      for (int64_t k = 0; k < d; ++k) similarity += double(rows[row * d + k]) * double(query[k]);
      mine = better({similarity, row}, mine);
    }
    mine = best_of_block(mine, shared);
    if (blocks > 1) {
      Candidate* const results = found + position % 2 * blocks;
      if (threadIdx.x == 0) results[block] = mine;
      wait_for_all_blocks();
      mine = none;
      for (int64_t other = threadIdx.x; other < blocks; other += kThreads) mine = better(results[other], mine);
      mine = best_of_block(mine, shared);
    }
    current = mine.row;
  }
}

}  // namespace
}  // namespace fastws
