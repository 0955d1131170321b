#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace fastws {

// Negative logarithm of (k + 1/2) / 2^16 for k in [0, 2^16), to a few ulps: 2^e * m with m between the roots of 1/2 and
// 2, and log m by the series of artanh. Plain arithmetic, so that loops over it become vectors.
inline float minus_log(uint32_t k) {
  const float u = float(int32_t(k)) * (1.f / 65536) + (0.5f / 65536);
  const int32_t bits = std::bit_cast<int32_t>(u), e = (bits - 0x3F3504F3) >> 23;
  const float m = std::bit_cast<float>(bits - e * (1 << 23));
  const float s = (1 - m) / (1 + m), z = s * s;
  return s * (2 + z * (2 / 3.f + z * (2 / 5.f + z * (2 / 7.f + z * (2 / 9.f))))) - e * 0.693147180559945f;
}

// Two standard normals from one word, by Box and Muller's method; fastws/random/philox.py has the formula.
inline void normal_pair(uint32_t word, float& first, float& second) {
  const float radius = std::sqrt(minus_log(word & 0xFFFF));
  // the angle in its quarter, counted from the middle: at most an eighth turn, for which Taylor's series are short
  constexpr float kStep = 1.5707963267948966f / 16384;
  const float t = float(int32_t(word << 2 >> 18)) * kStep - 8191.5f * kStep, z = t * t;
  const float sine = t * (1 + z * (-1 / 6.f + z * (1 / 120.f + z * (-1 / 5040.f + z * (1 / 362880.f)))));
  const float cosine = 1 + z * (-1 / 2.f + z * (1 / 24.f + z * (-1 / 720.f + z * (1 / 40320.f))));
  first = std::bit_cast<float>(std::bit_cast<uint32_t>(radius * (cosine - sine)) ^ (word & 0x80000000));
  second = std::bit_cast<float>(std::bit_cast<uint32_t>(radius * (cosine + sine)) ^ (word << 1 & 0x80000000));
}

}  // namespace fastws
