#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/small_cnn.h"
#include "small_cnn_table.h"

// Elementwise functions of vectors whose lanes are networks. Those of floats are polynomials, fitted to about a tenth
// of the spacing of floats; those of doubles call the C library lane by lane.

namespace fastws {
namespace {

template <typename real_t, int kBytes>
struct Functions {
  using V = typename Lanes<real_t, kBytes>::V;
  static constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  static constexpr bool kFloat = sizeof(real_t) == 4;

  template <typename Function>
  static FASTWS_INLINE V each_lane(V x, const Function& function) {
    V y = {};
    for (int lane = 0; lane < kCount; ++lane) y[lane] = function(x[lane]);
    return y;
  }

  static FASTWS_INLINE V absolute(V x) { return x < 0 ? -x : x; }

  // e^x; for floats between e^-87 and e^88.
  static FASTWS_INLINE V exponential(V x) {
    if constexpr (kFloat) {
      constexpr float kShift = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which then fills the low bits
      x = x < -87 ? V{} - 87 : x;
      x = x > 88 ? V{} + 88 : x;
      const V shifted = x * 1.44269504f + kShift, n = shifted - kShift;
      const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln(2), ln(2) in two parts
      V p = r * (1.f / 5040) + 1.f / 720;
      p = p * r + 1.f / 120;
      p = p * r + 1.f / 24;
      p = p * r + 1.f / 6;
      p = p * r + 0.5f;
      p = p * r + 1;
      p = p * r + 1;
      typedef uint32_t Bits __attribute__((vector_size(kBytes)));  // unsigned, for those of NaN overflow
      return p * (V)(((Bits)shifted << 23) + 0x3F800000);          // p * 2^n
    } else {
      return each_lane(x, [](double lane) { return std::exp(lane); });
    }
  }

  // For floats to 3 ulps.
  static FASTWS_INLINE V tanh(V x) {
    if constexpr (kFloat) {
      x = x > 9 ? V{} + 9 : x;  // tanh(9) rounds to 1
      x = x < -9 ? V{} - 9 : x;
      const V z = x * x;
      V p = z * 1.3354755252178728e-8f + 2.060915798698654e-5f;
      p = p * z + 3.4955930834698955e-3f;
      p = p * z + 0.13381029932688862f;
      p = p * z + 1;
      V q = z * 7.776599019455587e-7f + 3.2856426704054207e-4f;
      q = q * z + 2.587700142727235e-2f;
      q = q * z + 0.4671434553146547f;
      q = q * z + 1;
      const V y = x * p / q;
      return y > 1 ? V{} + 1 : y < -1 ? V{} - 1 : y;
    } else {
      return each_lane(x, [](double lane) { return std::tanh(lane); });
    }
  }

  static FASTWS_INLINE V sigmoid(V x) { return 1 / (exponential(-x) + 1); }

  // (1 + erf(x / sqrt(2))) / 2, given gauss = exp(-x^2 / 2).
  static FASTWS_INLINE V normal_cdf(V x, V gauss) {
    if constexpr (kFloat) {
      const V a = absolute(x) * 0.70710678f, u = 1 / (a * 0.4f + 1);
      V p = u * -0.028078439245721676f + 0.13474208292021275f;  // of exp(a^2) * erfc(a) / u
      p = p * u - 0.22333978641093483f;
      p = p * u + 0.12311428848831349f;
      p = p * u - 0.03651466467878642f;
      p = p * u + 0.07928073610828261f;
      p = p * u + 0.12027606228355728f;
      p = p * u + 0.17153847505215886f;
      p = p * u + 0.20763006485275076f;
      p = p * u + 0.2256753395954713f;
      p = p * u + 0.22567583725192703f;
      const V tail = p * u * gauss * 0.5f;
      return x < 0 ? tail : 1 - tail;
    } else {
      return each_lane(x, [](double lane) { return 0.5 * std::erfc(-lane * 0.7071067811865475244); });
    }
  }

  // y = activation(x), slope = its derivative.
  static FASTWS_INLINE void activate(int kind, V x, V& y, V& slope) {
    switch (kind) {
      case kTanh:
        y = tanh(x), slope = 1 - y * y;
        break;
      case kRelu:
        y = x <= 0 ? V{} : x, slope = x > 0 ? V{} + 1 : V{};  // so that NaN stays NaN
        break;
      case kSigmoid:
        y = sigmoid(x), slope = y * (1 - y);
        break;
      case kGelu: {
        const V gauss = exponential(x * x * real_t(-0.5)), share = normal_cdf(x, gauss);
        y = x * share, slope = share + x * gauss * real_t(0.3989422804014327);
        break;
      }
    }
  }
};

template <int KIND, typename real_t, int kBytes>
FASTWS_INLINE void activate_map(const typename Lanes<real_t, kBytes>::V* x, int64_t size,
                                typename Lanes<real_t, kBytes>::V* y, typename Lanes<real_t, kBytes>::V* slope) {
  for (int64_t i = 0; i < size; ++i) Functions<real_t, kBytes>::activate(KIND, x[i], y[i], slope[i]);
}

// Each network's own activation of x, and its slope. of_kind[k] has all bits set in the lanes of activation k.
template <typename real_t, int kBytes>
FASTWS_CLONES void activate(const typename Lanes<real_t, kBytes>::V* x, int64_t size,
                            const typename Lanes<real_t, kBytes>::I* of_kind, int only,
                            typename Lanes<real_t, kBytes>::V* y, typename Lanes<real_t, kBytes>::V* slope) {
  using V = typename Lanes<real_t, kBytes>::V;
  switch (only) {
    case kTanh:
      return activate_map<kTanh, real_t, kBytes>(x, size, y, slope);
    case kRelu:
      return activate_map<kRelu, real_t, kBytes>(x, size, y, slope);
    case kSigmoid:
      return activate_map<kSigmoid, real_t, kBytes>(x, size, y, slope);
    case kGelu:
      return activate_map<kGelu, real_t, kBytes>(x, size, y, slope);
  }
  for (int64_t i = 0; i < size; ++i) {  // lanes of several kinds
    V all_y = {}, all_slope = {};
    for (int kind = kTanh; kind <= kGelu; ++kind) {
      V one_y, one_slope;
      Functions<real_t, kBytes>::activate(kind, x[i], one_y, one_slope);
      all_y = of_kind[kind] ? one_y : all_y;
      all_slope = of_kind[kind] ? one_slope : all_slope;
    }
    y[i] = all_y, slope[i] = all_slope;
  }
}

}  // namespace
}  // namespace fastws
