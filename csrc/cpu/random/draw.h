#pragma once

#include <cstdint>

#include "philox.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#include <immintrin.h>
#define FASTWS_PHILOX_VERSIONS 1
#endif

// Many words at once. Compilers vectorise the plain loop well for AVX-512 but badly for AVX2, where they pack and
// unpack 32-bit words around every 64-bit product; there each word stays in a lane of 64 bits, of which products read
// the lower half: a third of the time. The loader picks the version.

namespace fastws {
namespace {

constexpr int64_t kPhiloxCounters = 8;                 // counters drawn side by side
constexpr int64_t kPhiloxWords = 4 * kPhiloxCounters;  // words of one draw

#ifdef FASTWS_PHILOX_VERSIONS
#define FASTWS_TARGET(level) __attribute__((target(level)))
#else
#define FASTWS_TARGET(level)
#endif

#define FASTWS_PLAIN_DRAW                                                \
  for (int64_t lane = 0; lane < counters; ++lane) {                      \
    const Words drawn = philox(seed, offset, counter + lane);            \
    for (int64_t k = 0; k < 4; ++k) words[4 * lane + k] = drawn.word[k]; \
  }

// Words of the counters from counter on; how many must be a multiple of kPhiloxCounters.
FASTWS_TARGET("default")
void draw_words(uint64_t seed, uint64_t offset, uint64_t counter, int64_t counters, uint32_t* words){FASTWS_PLAIN_DRAW}
#ifdef FASTWS_PHILOX_VERSIONS
FASTWS_TARGET("arch=x86-64-v4") void draw_words(uint64_t seed, uint64_t offset, uint64_t counter, int64_t counters,
                                                uint32_t* words){FASTWS_PLAIN_DRAW}

FASTWS_TARGET("arch=x86-64-v3") void draw_words(uint64_t seed, uint64_t offset, uint64_t counter, int64_t counters,
                                                uint32_t* words) {
  constexpr int kHalves = 2;  // independent chains, to hide the latency of products
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i keys[10][2];  // of every round
  for (int round = 0; round < 10; ++round) {
    keys[round][0] = _mm256_set1_epi64x(uint32_t(seed) + round * 0x9E3779B9u);
    keys[round][1] = _mm256_set1_epi64x(uint32_t(seed >> 32) + round * 0xBB67AE85u);
  }
  for (int64_t lane = 0; lane < counters; lane += 4 * kHalves) {
    __m256i c0[kHalves], c1[kHalves], c2[kHalves], c3[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      c0[h] = _mm256_add_epi64(_mm256_set1_epi64x(counter + lane + 4 * h), _mm256_set_epi64x(3, 2, 1, 0));
      c1[h] = _mm256_srli_epi64(c0[h], 32);
      c2[h] = _mm256_set1_epi64x(uint32_t(offset)), c3[h] = _mm256_set1_epi64x(offset >> 32);
    }
    for (int round = 0; round < 10; ++round)
      for (int h = 0; h < kHalves; ++h) {
        const __m256i p0 = _mm256_mul_epu32(m0, c0[h]), p1 = _mm256_mul_epu32(m1, c2[h]);
        c0[h] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[h], keys[round][0]));
        c2[h] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[h], keys[round][1]));
        c1[h] = p1, c3[h] = p0;
      }
    for (int h = 0; h < kHalves; ++h) {  // four lanes of four words, in the order of the counters
      const __m256i c01 = _mm256_blend_epi32(c0[h], _mm256_slli_epi64(c1[h], 32), 0xAA);
      const __m256i c23 = _mm256_blend_epi32(c2[h], _mm256_slli_epi64(c3[h], 32), 0xAA);
      const __m256i even = _mm256_unpacklo_epi64(c01, c23), odd = _mm256_unpackhi_epi64(c01, c23);
      __m256i* to = reinterpret_cast<__m256i*>(words + 4 * lane + 16 * h);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}
#endif

#undef FASTWS_PLAIN_DRAW
#undef FASTWS_TARGET

}  // namespace
}  // namespace fastws
