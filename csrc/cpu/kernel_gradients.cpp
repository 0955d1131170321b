#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/clones.h"
#include "cpu/panels.h"
#include "dispatch.h"

// The gradient of one kernel is a sum over the entries of two planes: a channel of the inputs, shifted nine times, and
// a filter of the gradient. Images come channel by channel, so some are turned into planes, which stay in cache while
// all kernels go by.

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBytes = 32;               // of a vector: nine sums of a kernel stay in 16 registers
constexpr int64_t kPlanes = 256 * 1024;  // bytes of planes at a time, in the second-level cache
constexpr int64_t kParts = 4;            // of the images, summed on their own, so that threads do not matter
constexpr int64_t kTaps = 9;

template <typename real_t>
using Vector = typename Lanes<real_t, kBytes>::V;

template <typename real_t>
constexpr int kCount = Lanes<real_t, kBytes>::kCount;

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
template <typename real_t>
FASTWS_CLONES void fill(const Planes& p, const real_t* image, real_t* planes) {
  using V = Vector<real_t>;
  constexpr int kLanes = kCount<real_t>;
  const int64_t width = p.width, all = p.channels, size = p.size, border = p.border;
  const int64_t columns = width / kLanes * kLanes, channels = all / kLanes * kLanes;
  const bool apart = p.stride > 1;
  for (int64_t h = 0; h < p.height; ++h) {
    const real_t* from = image + h * width * all;
    real_t* to = planes + (h + border) * p.row;
    for (int64_t w = 0; w < columns; w += kLanes)
      for (int64_t c = 0; c < channels; c += kLanes) {
        V block[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i) std::memcpy(&block[i], from + (w + i) * all + c, kBytes);
        transpose<real_t, kBytes>(block);
        if (apart) {
          for (int i = 0; i < kLanes; ++i)
            for (int lane = 0; lane < kLanes; ++lane) to[(c + i) * size + p.place(w + lane)] = block[i][lane];
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kLanes; ++i) std::memcpy(to + (c + i) * size + w + border, &block[i], kBytes);
        }
      }
    for (int64_t w = 0; w < p.width; ++w)
      for (int64_t c = w < columns ? channels : 0; c < p.channels; ++c)
        to[c * p.size + p.place(w)] = from[w * p.channels + c];
  }
}

// Adds to sums, [kernels][9], what some images contribute.
template <typename real_t>
FASTWS_CLONES void add_images(const Planes& in, const real_t* inputs, const Planes& out, const real_t* grads,
                              int64_t images, const int64_t* kernels, int64_t count, Vector<real_t>* sums) {
  using V = Vector<real_t>;
  const int64_t in_image = in.channels * in.size, out_image = out.channels * out.size, height = out.height;
  const int64_t down = in.stride * in.row, row = out.row;
  int64_t taps[kTaps];
  for (int64_t tap = 0; tap < kTaps; ++tap)
    taps[tap] = tap / 3 * in.row + tap % 3 % in.stride * in.half + tap % 3 / in.stride;
  for (int64_t n = 0; n < count; ++n) {
    const real_t* x = inputs + kernels[n] % in.channels * in.size;
    const real_t* g = grads + kernels[n] / in.channels * out.size;
    V total[kTaps] = {};
    for (int64_t image = 0; image < images; ++image, x += in_image, g += out_image)
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < row; w += kCount<real_t>) {
          V grad;
          std::memcpy(&grad, g + h * row + w, kBytes);
#pragma GCC unroll 9
          for (int tap = 0; tap < kTaps; ++tap) {
            V entries;
            std::memcpy(&entries, x + h * down + w + taps[tap], kBytes);
            total[tap] += grad * entries;
          }
        }
    for (int tap = 0; tap < kTaps; ++tap) sums[n * kTaps + tap] += total[tap];
  }
}

// Sums of the images from first to last.
template <typename real_t>
Vectors<Vector<real_t>> sum_images(const Planes& in, const real_t* inputs, const Planes& out, const real_t* grads,
                                   int64_t first, int64_t last, const int64_t* kernels, int64_t count) {
  const int64_t in_size = in.channels * in.size, out_size = out.channels * out.size;
  const int64_t step = std::max<int64_t>(1, kPlanes / ((in_size + out_size) * int64_t(sizeof(real_t))));
  std::vector<real_t> x(step * in_size), g(step * out_size);
  Vectors<Vector<real_t>> sums(count * kTaps);
  for (; first < last; first += step) {
    const int64_t images = std::min(step, last - first);
    for (int64_t image = 0; image < images; ++image) {
      fill<real_t>(in, inputs + (first + image) * in.height * in.width * in.channels, x.data() + image * in_size);
      fill<real_t>(out, grads + (first + image) * out.height * out.width * out.channels, g.data() + image * out_size);
    }
    add_images<real_t>(in, x.data(), out, g.data(), images, kernels, count, sums.data());
  }
  return sums;
}

template <typename real_t>
void compute(const Tensor& inputs, const Tensor& grad, const Tensor& kernels, int64_t stride, const Tensor& result) {
  const int64_t images = inputs.size(0), count = kernels.size(0), width = round_up(grad.size(2), kCount<real_t>);
  const Planes in(inputs, 1, stride, width + kCount<real_t>), out(grad, 0, 1, width);
  const int64_t parts = std::min(images, kParts);
  std::vector<Vectors<Vector<real_t>>> sums(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      sums[part] = sum_images<real_t>(in, inputs.const_data_ptr<real_t>(), out, grad.const_data_ptr<real_t>(),
                                      images * part / parts, images * (part + 1) / parts,
                                      kernels.const_data_ptr<int64_t>(), count);
  });
  real_t* to = result.mutable_data_ptr<real_t>();
  for (int64_t i = 0; i < count * kTaps; ++i) {
    to[i] = 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int lane = 0; lane < kCount<real_t>; ++lane) to[i] += sums[part].data()[i][lane];
  }
}

Tensor kernel_gradients_cpu(const Tensor& inputs_, const Tensor& grad_, const Tensor& kernels_, int64_t stride) {
  const Tensor inputs = torch::stable::contiguous(inputs_), grad = torch::stable::contiguous(grad_);
  const Tensor kernels = torch::stable::contiguous(kernels_);
  const Tensor result = torch::stable::new_empty(inputs, {kernels.size(0), 3, 3});
  if (inputs.scalar_type() == ScalarType::Double)
    compute<double>(inputs, grad, kernels, stride, result);
  else
    compute<float>(inputs, grad, kernels, stride, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("kernel_gradients", TORCH_BOX(&kernel_gradients_cpu)); }

}  // namespace fastws
