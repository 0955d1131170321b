#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/random/draw.h"

namespace fastws {
namespace {

constexpr int64_t kDraws = 256;  // 64-bit numbers that are drawn at once
constexpr int64_t kFractionBits = 62;

// A random integer below a bound, and what it leaves; fastws/random/integers.py says how.
struct Draw {
  int64_t integer, fraction;
};

inline Draw draw_below(uint64_t x, uint64_t bound) {
  const unsigned __int128 product = static_cast<unsigned __int128>(x) * bound;
  return {int64_t(product >> 64), int64_t(uint64_t(product) >> (64 - kFractionBits))};
}

// The draws from first on, at most kDraws and not beyond end, as 64-bit numbers; returns how many.
inline int64_t draw_numbers(uint64_t seed, uint64_t offset, int64_t first, int64_t end, uint64_t* numbers) {
  uint32_t words[2 * kDraws + kPhiloxWords];
  const int64_t skipped = first % 2;  // a counter holds two draws
  const int64_t count = std::min(end - first, kDraws - skipped);
  const int64_t counters = (skipped + count + 1) / 2;
  draw_words(seed, offset, first / 2, (counters + kPhiloxCounters - 1) / kPhiloxCounters * kPhiloxCounters, words);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* word = words + 2 * (skipped + i);
    numbers[i] = word[0] | uint64_t(word[1]) << 32;
  }
  return count;
}

}  // namespace
}  // namespace fastws
