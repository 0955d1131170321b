#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/panels.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#include <immintrin.h>
#define FASTWS_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#endif

// Linear layers on panels of bfloat16 for processors with AVX512-BF16, whose products of pairs do twice the work of an
// instruction for floats. A vector holds two neighbouring columns of 16 rows; sums are floats.

#if defined(FASTWS_BF16)

namespace fastws {
namespace {

using Wide = Panels<float, 64>;
using Floats = Wide::V;
using Pairs = Lanes<float, 64>::I;  // the first column of a row in the low half of a lane, the second in the high half

inline bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"); }

// Weights as pairs of inputs, [tiles][pairs][kOuts], and biases.
struct PairLinear {
  const int32_t* weights;
  const float* bias;
  int64_t tiles, pairs;
};

FASTWS_BF16 FASTWS_INLINE Floats add_pair_products(Floats sums, Pairs x, int32_t weights) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)_mm512_set1_epi32(weights));
}

FASTWS_INLINE void write_pairs(const Floats* columns, int64_t count, Pairs* to) {
  for (int64_t i = 0; i < count; i += 2)
    for (int v = 0; v < 2; ++v)
      to[i + v] = round_to_bf16(columns[2 * i + v]) | round_to_bf16(columns[2 * i + 2 + v]) << 16;
}

// A panel of floats as a panel of pairs.
FASTWS_CLONES void to_pairs(const Floats* panel, int64_t columns, Pairs* to) { write_pairs(panel, columns, to); }

// Activations of layer(x) as pairs, or with last its result as floats, for panels of stride vectors.
FASTWS_BF16 void apply_pairs(const PairLinear& layer, Finish kind, const Pairs* x, int64_t stride, int64_t panels,
                             Pairs* y, Floats* last) {
  constexpr int kOuts = Wide::kOuts;
  const int64_t chunk = std::max<int64_t>(1, kChunk / (kOuts * layer.pairs * 4));
  for (int64_t first = 0; first < layer.tiles; first += chunk)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t tile = first; tile < std::min(first + chunk, layer.tiles); ++tile) {
        const Pairs* const inputs = x + panel * stride;
        const int32_t* const weights = layer.weights + tile * layer.pairs * kOuts;
        Floats sums[2 * kOuts];
#pragma GCC unroll 12
        for (int m = 0; m < kOuts; ++m) sums[2 * m] = sums[2 * m + 1] = layer.bias[tile * kOuts + m] - Floats{};
        for (int64_t p = 0; p < layer.pairs; ++p) {
          const Pairs left = inputs[2 * p], right = inputs[2 * p + 1];
#pragma GCC unroll 12
          for (int m = 0; m < kOuts; ++m) {
            sums[2 * m] = add_pair_products(sums[2 * m], left, weights[p * kOuts + m]);
            sums[2 * m + 1] = add_pair_products(sums[2 * m + 1], right, weights[p * kOuts + m]);
          }
        }
        Floats columns[2 * kOuts];
#pragma GCC unroll 24
        for (int i = 0; i < 2 * kOuts; ++i) columns[i] = sums[i];
        if (last) {
          std::copy_n(columns, 2 * kOuts, last + panel * stride + tile * kOuts * 2);
        } else {
          finish<float, 64>(kind, 2 * kOuts, columns, nullptr);
          write_pairs(columns, kOuts, y + panel * stride + tile * kOuts);
        }
      }
}

}  // namespace
}  // namespace fastws

#endif
