#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/small_cnn.h"

// Numbers of any floating type as lanes of vectors. Compilers do not see what a class for half precision does with its
// bits, and convert one number at a time.

namespace fastws {
namespace {

// Rounds to nearest, ties to even, in the low half of each lane. NaN stays NaN.
template <typename V>
FASTWS_INLINE auto round_to_bf16(V x) {
  using I = decltype(x == x);
  const I bits = (I)x;
  const I rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & 0xFFFF;
  return x == x ? rounded : I{} + 0x7FC0;
}

template <typename V, typename scalar_t>
FASTWS_INLINE V load(const scalar_t* from) {
  using real_t = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int kCount = sizeof(V) / sizeof(real_t);
  V x;
  if constexpr (std::is_same_v<scalar_t, real_t>) {
    std::memcpy(&x, from, sizeof(V));
  } else if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16> && std::is_same_v<real_t, float>) {
    typedef uint16_t Bits __attribute__((vector_size(sizeof(V) / 2)));
    Bits bits;
    std::memcpy(&bits, from, sizeof(Bits));
    x = (V)(__builtin_convertvector(bits, decltype(x == x)) << 16);
  } else {
    for (int lane = 0; lane < kCount; ++lane) x[lane] = real_t(from[lane]);
  }
  return x;
}

template <typename V, typename scalar_t>
FASTWS_INLINE void store(V x, scalar_t* to) {
  using real_t = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int kCount = sizeof(V) / sizeof(real_t);
  if constexpr (std::is_same_v<scalar_t, real_t>) {
    std::memcpy(to, &x, sizeof(V));
  } else if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16> && std::is_same_v<real_t, float>) {
    typedef uint16_t Bits __attribute__((vector_size(sizeof(V) / 2)));
    const Bits bits = __builtin_convertvector(round_to_bf16(x), Bits);
    std::memcpy(static_cast<void*>(to), &bits, sizeof(Bits));
  } else {
    for (int lane = 0; lane < kCount; ++lane) to[lane] = scalar_t(x[lane]);
  }
}

}  // namespace
}  // namespace fastws
