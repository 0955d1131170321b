#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/trust.h"
#include "dispatch.h"

// The gradient of one kernel is a sum over the entries of two planes: a channel of the inputs, shifted nine times, and
// a filter of the gradient. Images come channel by channel, so some are turned into planes, which stay in cache while
// all kernels go by.

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kNarrow = 32;              // bytes of a vector: nine sums of a kernel stay in 16 registers
constexpr int64_t kPlanes = 256 * 1024;  // bytes of planes at a time, in the second-level cache
constexpr int64_t kParts = 4;            // of the images, summed on their own, so that threads do not matter
constexpr int64_t kTaps = 9;
constexpr int64_t kAhead = 8192;  // bytes; processors do not foresee the loads of a transposition, which then wait

// Images of [height, width, channels] as planes: column w of row h is at (h + border) * row + place(w).
struct Planes {
  int64_t height, width, channels, border, stride, half, row, size;

  // Of padded inputs, whose even and odd columns lie apart if the stride is 2, or of gradients.
  Planes(const Tensor& images, int64_t border, int64_t stride, int64_t half)
      : height(images.size(1)),
        width(images.size(2)),
        channels(images.size(3)),
        border(border),
        stride(stride),
        half(half),
        row(half * stride),
        size((height + 2 * border) * row) {}

  int64_t place(int64_t column) const { return (column + border) % stride * half + (column + border) / stride; }
};

// Fills the planes of one image; borders are zero already.
template <typename scalar_t, typename real_t>
FASTWS_CLONES void fill(const Planes& p, const scalar_t* image, real_t* planes) {
  using V = typename Lanes<real_t, kNarrow>::V;
  constexpr int kLanes = Lanes<real_t, kNarrow>::kCount;
  const int64_t width = p.width, all = p.channels, size = p.size, border = p.border;
  const int64_t columns = width / kLanes * kLanes, channels = all / kLanes * kLanes;
  const bool apart = p.stride > 1;
  for (int64_t h = 0; h < p.height; ++h) {
    const scalar_t* from = image + h * width * all;
    real_t* to = planes + (h + border) * p.row;
    for (int64_t w = 0; w < columns; w += kLanes)
      for (int64_t c = 0; c < channels; c += kLanes) {
        V block[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i) {
          const scalar_t* const entries = from + (w + i) * all + c;
          block[i] = load<V>(entries);
          __builtin_prefetch(reinterpret_cast<const char*>(entries) + kAhead);
        }
        transpose<real_t, kNarrow>(block);
        if (apart) {
          for (int i = 0; i < kLanes; ++i)
            for (int lane = 0; lane < kLanes; ++lane) to[(c + i) * size + p.place(w + lane)] = block[i][lane];
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kLanes; ++i) std::memcpy(to + (c + i) * size + w + border, &block[i], kNarrow);
        }
      }
    for (int64_t w = 0; w < p.width; ++w)
      for (int64_t c = w < columns ? channels : 0; c < p.channels; ++c)
        to[c * p.size + p.place(w)] = from[w * p.channels + c];
  }
}

// Adds to sums, [kernels][9], what some images contribute. kApart: even and odd columns of the inputs lie apart.
template <typename real_t, int kBytes, bool kApart>
FASTWS_CLONES void add_images(const Planes& in, const real_t* inputs, const Planes& out, const real_t* grads,
                              int64_t images, const int64_t* kernels, int64_t count,
                              typename Lanes<real_t, kBytes>::V* sums) {
  using V = typename Lanes<real_t, kBytes>::V;
  const int64_t in_image = in.channels * in.size, out_image = out.channels * out.size, height = out.height;
  const int64_t down = in.stride * in.row, in_row = in.row, half = in.half, row = out.row;
  for (int64_t n = 0; n < count; ++n) {
    const real_t* x = inputs + kernels[n] % in.channels * in.size;
    const real_t* g = grads + kernels[n] / in.channels * out.size;
    V total[kTaps] = {};
    for (int64_t image = 0; image < images; ++image, x += in_image, g += out_image)
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < row; w += Lanes<real_t, kBytes>::kCount) {
          const V grad = load<V>(g + h * row + w);
          const real_t* const corner = x + h * down + w;
#pragma GCC unroll 9
          for (int tap = 0; tap < kTaps; ++tap) {
            const int column = tap % 3;
            const int64_t place = kApart ? column % 2 * half + column / 2 : column;
            total[tap] += grad * load<V>(corner + tap / 3 * in_row + place);
          }
        }
    for (int tap = 0; tap < kTaps; ++tap) sums[n * kTaps + tap] += total[tap];
  }
}

// Sums of the images from first to last.
template <typename scalar_t, typename real_t, int kBytes>
Vectors<typename Lanes<real_t, kBytes>::V> sum_images(const Planes& in, const scalar_t* inputs, const Planes& out,
                                                      const scalar_t* grads, int64_t first, int64_t last,
                                                      const int64_t* kernels, int64_t count) {
  const int64_t in_size = in.channels * in.size, out_size = out.channels * out.size;
  const int64_t step = std::max<int64_t>(1, kPlanes / ((in_size + out_size) * int64_t(sizeof(real_t))));
  std::vector<real_t> x(step * in_size), g(step * out_size);
  Vectors<typename Lanes<real_t, kBytes>::V> sums(count * kTaps);
  for (; first < last; first += step) {
    const int64_t images = std::min(step, last - first);
    for (int64_t image = 0; image < images; ++image) {
      fill(in, inputs + (first + image) * in.height * in.width * in.channels, x.data() + image * in_size);
      fill(out, grads + (first + image) * out.height * out.width * out.channels, g.data() + image * out_size);
    }
    const auto add = in.stride > 1 ? add_images<real_t, kBytes, true> : add_images<real_t, kBytes, false>;
    add(in, x.data(), out, g.data(), images, kernels, count, sums.data());
  }
  return sums;
}

template <typename scalar_t, typename real_t, int kBytes>
void compute_with(const Tensor& inputs, const Tensor& grad, const Tensor& kernels, int64_t stride,
                  const Tensor& result) {
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  const int64_t images = inputs.size(0), count = kernels.size(0), width = round_up(grad.size(2), kCount);
  const Planes in(inputs, 1, stride, width + kCount), out(grad, 0, 1, width);
  const int64_t parts = std::min(images, kParts);
  std::vector<Vectors<typename Lanes<real_t, kBytes>::V>> sums(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      sums[part] = sum_images<scalar_t, real_t, kBytes>(
          in, inputs.const_data_ptr<scalar_t>(), out, grad.const_data_ptr<scalar_t>(), images * part / parts,
          images * (part + 1) / parts, kernels.const_data_ptr<int64_t>(), count);
  });
  real_t* to = result.mutable_data_ptr<real_t>();
  for (int64_t i = 0; i < count * kTaps; ++i) {
    to[i] = 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int lane = 0; lane < kCount; ++lane) to[i] += sums[part].data()[i][lane];
  }
}

// Rows too short for wide vectors would fill half of them with zeros.
template <typename scalar_t, typename real_t>
void compute(const Tensor& inputs, const Tensor& grad, const Tensor& kernels, int64_t stride, const Tensor& result) {
  if (has_wide_vectors() && grad.size(2) > Lanes<real_t, kNarrow>::kCount)
    compute_with<scalar_t, real_t, 2 * kNarrow>(inputs, grad, kernels, stride, result);
  else
    compute_with<scalar_t, real_t, kNarrow>(inputs, grad, kernels, stride, result);
}

void check(const char* op, const Tensor& inputs, const Tensor& grad, const Tensor& kernels, int64_t stride) {
  const ScalarType dtype = inputs.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(known, op, ": inputs must be Float, Double or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  check_tensor(op, "inputs", inputs, dtype, {kAny, kAny, kAny, kAny});
  STD_TORCH_CHECK(inputs.numel() > 0, op, ": inputs must not be empty, got ", shape_of(inputs.sizes()));
  const auto outputs = [=](int64_t size) { return (size + stride - 1) / stride; };
  check_tensor(op, "grad", grad, dtype, {inputs.size(0), outputs(inputs.size(1)), outputs(inputs.size(2)), kAny});
  check_tensor(op, "kernels", kernels, ScalarType::Long, {kAny});
  const int64_t all = grad.size(3) * inputs.size(3);
  check_range(op, "kernels", kernels.const_data_ptr<int64_t>(), kernels.size(0), 0, all);
}

Tensor kernel_gradients_cpu(const Tensor& inputs_, const Tensor& grad_, const Tensor& kernels_, int64_t stride) {
  const Tensor inputs = as_contiguous(inputs_), grad = as_contiguous(grad_);
  const Tensor kernels = as_contiguous(kernels_);
  check("kernel_gradients", inputs, grad, kernels, stride);
  const ScalarType dtype = sum_dtype(inputs.scalar_type());
  const Tensor result = torch::stable::new_empty(inputs, {kernels.size(0), 3, 3}, dtype);
  if (dtype == ScalarType::Double)
    compute<double, double>(inputs, grad, kernels, stride, result);
  else if (inputs.scalar_type() == ScalarType::BFloat16)
    compute<torch::headeronly::BFloat16, float>(inputs, grad, kernels, stride, result);
  else
    compute<float, float>(inputs, grad, kernels, stride, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("kernel_gradients", TORCH_BOX(&kernel_gradients_cpu)); }

}  // namespace fastws
