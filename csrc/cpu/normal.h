#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace fastws {

// Logarithm of u in (0, 1], to a few ulps: u = 2^e * m with m between the roots of 1/2 and 2, and log m by the series
// of artanh. Plain arithmetic, so that loops over it become vectors.
inline float log_unit(float u) {
  const int32_t bits = std::bit_cast<int32_t>(u), e = (bits - 0x3F3504F3) >> 23;
  const float m = std::bit_cast<float>(bits - e * (1 << 23));
  const float s = (m - 1) / (m + 1), z = s * s;
  return e * 0.693147180559945f + 2 * s * (1 + z * (1 / 3.f + z * (1 / 5.f + z * (1 / 7.f + z * (1 / 9.f)))));
}

// Two standard normals from two words, by Box and Muller's method; fastws/philox.py has the formula.
inline void normal_pair(uint32_t word0, uint32_t word1, float& first, float& second) {
  constexpr float kUnit = 1.f / (1 << 24), kTurn = 6.283185307179586f;
  const float radius = std::sqrt(-2 * log_unit(1 - float(int32_t(word0 >> 8)) * kUnit));
  // the angle is a multiple of a quarter turn and a rest of at most an eighth, for which Taylor's series are short
  const float turns = float(int32_t(word1 >> 8)) * kUnit;
  const int32_t quarters = int32_t(4 * turns + 0.5f);
  const float rest = (turns - 0.25f * quarters) * kTurn, z = rest * rest;
  const float sine = rest * (1 + z * (-1 / 6.f + z * (1 / 120.f + z * (-1 / 5040.f + z * (1 / 362880.f)))));
  const float cosine =
      1 + z * (-1 / 2.f + z * (1 / 24.f + z * (-1 / 720.f + z * (1 / 40320.f + z * (-1 / 3628800.f)))));
  const bool swapped = quarters & 1;
  const float x = swapped ? sine : cosine, y = swapped ? cosine : sine;
  first = (quarters + 1) & 2 ? -radius * x : radius * x;
  second = quarters & 2 ? -radius * y : radius * y;
}

}  // namespace fastws
