#pragma once

#include <cstdint>

#include "philox.h"

namespace fastws {
namespace {

constexpr int kThreads = 128;
constexpr int kDrawn = 4 * kThreads;  // words of one round, a counter per thread
constexpr int kShared = 8192;         // the largest group that is shuffled in shared memory

// Shared memory of a block.
struct Shuffle {
  int32_t shuffled[kShared], places[kDrawn];
};

// Fisher-Yates, inside out, as in fastws/ops/permute.py. One block per group and draw: all threads draw the words and
// say where each entry goes, one thread moves the entries, for each move waits for the last.
__device__ void shuffle_group(const int64_t* __restrict__ starts,  // [G + 1]
                              int32_t* __restrict__ permutations,  // [B, S]
                              int64_t total, int64_t groups, uint64_t seed, uint64_t offset, int64_t block,
                              Shuffle& shared) {
  int32_t *const shuffled = shared.shuffled, *const places = shared.places;
  const int64_t draw = block / groups, group = block % groups;
  const int64_t start = starts[group], size = starts[group + 1] - start, begin = draw * total + start;
  int32_t* const target = permutations + begin;
  int32_t* const entries = size <= kShared ? shuffled : target;
  for (int64_t first = begin / 4 * 4; first < begin + size; first += kDrawn) {
    const Words words = philox(seed, offset, first / 4 + threadIdx.x);
    for (int k = 0; k < 4; ++k) {
      const int64_t i = first + 4 * threadIdx.x + k - begin;
      places[4 * threadIdx.x + k] = int32_t(words.word[k] * uint64_t(i + 1) >> 32);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t last = first + kDrawn - begin < size ? first + kDrawn - begin : size;
      for (int64_t i = first < begin ? 0 : first - begin; i < last; ++i) {
        const int32_t place = places[i + begin - first];
        entries[i] = entries[place];
        entries[place] = int32_t(i);
      }
    }
    __syncthreads();
  }
  if (size <= kShared)
    for (int64_t i = threadIdx.x; i < size; i += kThreads) target[i] = shuffled[i];
}

}  // namespace
}  // namespace fastws
