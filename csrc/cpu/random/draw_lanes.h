#pragma once

#include <cstdint>

#include "philox.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#include <immintrin.h>
#define FASTWS_PHILOX_VERSIONS 1
#endif

// Words for networks side by side: lane l draws from a stream of its own. As in draw.h, AVX2 has a version of its own.

namespace fastws {
namespace {

constexpr int64_t kDrawLanes = 8;

#ifdef FASTWS_PHILOX_VERSIONS
#define FASTWS_TARGET(level) __attribute__((target(level)))
#else
#define FASTWS_TARGET(level)
#endif

#define FASTWS_PLAIN_DRAW                                                                 \
  for (int64_t c = 0; c < counters; ++c)                                                  \
    for (int64_t lane = 0; lane < kDrawLanes; ++lane) {                                   \
      const Words drawn = philox(seeds[lane], offset, counter + c);                       \
      for (int64_t k = 0; k < 4; ++k) words[(4 * c + k) * stride + lane] = drawn.word[k]; \
    }

// words[(4 * c + k) * stride + lane]: word k of counter + c in the stream of seeds[lane], for kDrawLanes lanes.
FASTWS_TARGET("default")
void draw_lanes(const uint64_t* seeds, uint64_t offset, uint64_t counter, int64_t counters, uint32_t* words,
                int64_t stride){FASTWS_PLAIN_DRAW}
#ifdef FASTWS_PHILOX_VERSIONS
FASTWS_TARGET("arch=x86-64-v4") void draw_lanes(const uint64_t* seeds, uint64_t offset, uint64_t counter,
                                                int64_t counters, uint32_t* words, int64_t stride){FASTWS_PLAIN_DRAW}

FASTWS_TARGET("arch=x86-64-v3") void draw_lanes(const uint64_t* seeds, uint64_t offset, uint64_t counter,
                                                int64_t counters, uint32_t* words, int64_t stride) {
  constexpr int kHalves = 2;  // four lanes each
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i keys[10][2][kHalves];  // of every round
  for (int h = 0; h < kHalves; ++h) {
    const __m256i seed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(seeds) + h);
    for (int round = 0; round < 10; ++round) {
      keys[round][0][h] = _mm256_add_epi64(seed, _mm256_set1_epi64x(round * 0x9E3779B9ull));
      keys[round][1][h] = _mm256_add_epi64(_mm256_srli_epi64(seed, 32), _mm256_set1_epi64x(round * 0xBB67AE85ull));
    }
  }
  for (int64_t c = 0; c < counters; ++c) {
    __m256i c0[kHalves], c1[kHalves], c2[kHalves], c3[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      c0[h] = _mm256_set1_epi64x(counter + c), c1[h] = _mm256_srli_epi64(c0[h], 32);
      c2[h] = _mm256_set1_epi64x(uint32_t(offset)), c3[h] = _mm256_set1_epi64x(offset >> 32);
    }
    for (int round = 0; round < 10; ++round)
      for (int h = 0; h < kHalves; ++h) {  // the upper halves of c and k are anything: products do not read them
        const __m256i p0 = _mm256_mul_epu32(m0, c0[h]), p1 = _mm256_mul_epu32(m1, c2[h]);
        c0[h] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[h], keys[round][0][h]));
        c2[h] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[h], keys[round][1][h]));
        c1[h] = p1, c3[h] = p0;
      }
    const __m256i* drawn[4] = {c0, c1, c2, c3};
    for (int k = 0; k < 4; ++k) {  // the lower halves of eight lanes
      const __m256 first = _mm256_castsi256_ps(drawn[k][0]), second = _mm256_castsi256_ps(drawn[k][1]);
      const __m256i pairs = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88));
      __m256i* to = reinterpret_cast<__m256i*>(words + (4 * c + k) * stride);
      _mm256_storeu_si256(to, _mm256_permute4x64_epi64(pairs, 0xD8));
    }
  }
}
#endif

#undef FASTWS_PLAIN_DRAW
#undef FASTWS_TARGET

}  // namespace
}  // namespace fastws
