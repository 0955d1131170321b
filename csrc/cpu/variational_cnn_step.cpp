#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/random/normal.h"
#include "cpu/small_cnn_training.h"

namespace fastws {
namespace {

constexpr double kTiny = 1e-15;  // keeps logarithms and roots of zero away
constexpr double kK1 = 0.63576, kK2 = 1.8732, kK3 = 1.48695;
constexpr double kConvolutionBound = 8, kDenseBound = 10;  // of log alpha
constexpr int64_t kAlignment = 8;                          // normals of one counter
constexpr int64_t kChunk = 16;                             // counters of one draw

// Consecutive parameters whose log alpha has one bound.
struct Span {
  int64_t begin, size;
  double bound;
};

// Two normals from a word; fastws/random/philox.py has the formula.
inline void normals_of(uint32_t word, float& first, float& second) { normal_pair(word, first, second); }
inline void normals_of(uint32_t word, double& first, double& second) {
  const double radius = std::sqrt(-std::log((double(word & 0xFFFF) + 0.5) * 0x1p-16));
  const double t = (double(word >> 16 & 0x3FFF) - 8191.5) * (3.14159265358979323846 / 32768);
  const double sine = std::sin(t), cosine = std::cos(t);
  first = (word >> 31 & 1 ? -radius : radius) * (cosine - sine);
  second = (word >> 30 & 1 ? -radius : radius) * (cosine + sine);
}

// z[2 i + k][lane] = normal k of words[i][lane], of rows that may be longer
template <typename real_t, int kCount, int kDrawn>
FASTWS_CLONES void draw_normals(const uint32_t* __restrict words, int64_t count, real_t* __restrict z) {
  for (int64_t i = 0; i < count; ++i)
    for (int lane = 0; lane < kCount; ++lane)
      normals_of(words[i * kDrawn + lane], z[2 * i * kCount + lane], z[(2 * i + 1) * kCount + lane]);
}

// y += d * z; slope = derivative of d * z by the variance, where d = sqrt(variance + tiny), which it replaces.
template <typename real_t>
FASTWS_CLONES void perturb(const real_t* __restrict z, int64_t size, real_t* __restrict y, real_t* __restrict slope) {
  for (int64_t i = 0; i < size; ++i) {
    const real_t deviation = std::sqrt(slope[i] + real_t(kTiny));
    y[i] += deviation * z[i];
    slope[i] = real_t(0.5) * z[i] / deviation;
  }
}

template <typename V>
FASTWS_CLONES void square(const V* x, int64_t size, V* squares) {
  for (int64_t i = 0; i < size; ++i) squares[i] = x[i] * x[i];
}

// y = a * b
template <typename V>
FASTWS_CLONES void product(const V* a, const V* b, int64_t size, V* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = a[i] * b[i];
}

// grad_x += 2 * x * grad_square
template <typename V>
FASTWS_CLONES void add_through_square(const V* x, const V* grad_square, int64_t size, V* grad_x) {
  for (int64_t i = 0; i < size; ++i) grad_x[i] += 2 * x[i] * grad_square[i];
}

// y = largest of each 2 x 2 entries of maps; of the largest also its slope and its number. What fills no block is left
// out.
template <typename real_t, int kBytes>
FASTWS_CLONES void pool_noisy(const Convolution& c, const typename Lanes<real_t, kBytes>::V* x,
                              const typename Lanes<real_t, kBytes>::V* slopes, typename Lanes<real_t, kBytes>::V* y,
                              typename Lanes<real_t, kBytes>::V* slope, typename Lanes<real_t, kBytes>::I* winner) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  for (int64_t channel = 0; channel < c.out_channels; ++channel)
    for (int64_t row = 0; row < c.out_height / 2; ++row)
      for (int64_t column = 0; column < c.out_width / 2; ++column) {
        const int64_t corner = (channel * c.out_height + 2 * row) * c.out_width + 2 * column;
        V largest = x[corner], of_largest = slopes[corner];
        I place = {};
#pragma GCC unroll 8
        for (int p = 1; p < 4; ++p) {
          const int64_t at = corner + p / 2 * c.out_width + p % 2;
          const I larger = x[at] > largest;
          place = larger ? I{} + p : place;
          of_largest = larger ? slopes[at] : of_largest;
          largest = larger ? x[at] : largest;
        }
        *y++ = largest, *slope++ = of_largest, *winner++ = place;
      }
}

// The gradients of what pool_noisy pooled, and of its variance.
template <typename real_t, int kBytes>
FASTWS_CLONES void unpool_noisy(const Convolution& c, const typename Lanes<real_t, kBytes>::V* grad,
                                const typename Lanes<real_t, kBytes>::V* slope,
                                const typename Lanes<real_t, kBytes>::I* winner,
                                typename Lanes<real_t, kBytes>::V* grad_mean,
                                typename Lanes<real_t, kBytes>::V* grad_variance) {
  using V = typename Lanes<real_t, kBytes>::V;
  if (c.out_height % 2 || c.out_width % 2) {
    std::fill(grad_mean, grad_mean + c.out_channels * c.out_size(), V{});
    std::fill(grad_variance, grad_variance + c.out_channels * c.out_size(), V{});
  }
  for (int64_t channel = 0; channel < c.out_channels; ++channel)
    for (int64_t row = 0; row < c.out_height / 2; ++row)
      for (int64_t column = 0; column < c.out_width / 2; ++column, ++grad, ++slope, ++winner) {
        const int64_t corner = (channel * c.out_height + 2 * row) * c.out_width + 2 * column;
        const V of_variance = *grad * *slope;
#pragma GCC unroll 8
        for (int p = 0; p < 4; ++p) {
          const int64_t at = corner + p / 2 * c.out_width + p % 2;
          grad_mean[at] = *winner == p ? *grad : V{};
          grad_variance[at] = *winner == p ? of_variance : V{};
        }
      }
}

// Natural logarithm of positive numbers: 2^e * m with m between the roots of 1/2 and 2, and log m by the series of
// artanh.
template <typename real_t, int kBytes>
FASTWS_INLINE typename Lanes<real_t, kBytes>::V logarithm(typename Lanes<real_t, kBytes>::V x) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  if constexpr (sizeof(real_t) == 4) {
    const I bits = (I)x, e = (bits - 0x3F3504F3) >> 23;
    const V m = (V)(bits - (e << 23));
    const V s = (m - 1) / (m + 1), z = s * s;
    const V p = 2 + z * (2 / 3.f + z * (2 / 5.f + z * (2 / 7.f + z * (2 / 9.f))));
    const V exponent = __builtin_convertvector(e, V);
    return s * p + exponent * -2.12194440e-4f + exponent * 0.693359375f;
  } else {
    return Functions<real_t, kBytes>::each_lane(x, [](double lane) { return std::log(lane); });
  }
}

// alpha = log alpha before it is clamped, and variance = alpha * theta^2.
template <typename real_t, int kBytes>
FASTWS_CLONES void find_variance(const Span& span, const typename Lanes<real_t, kBytes>::V* theta,
                                 const typename Lanes<real_t, kBytes>::V* log_sigma,
                                 typename Lanes<real_t, kBytes>::V* alpha,
                                 typename Lanes<real_t, kBytes>::V* variance) {
  using V = typename Lanes<real_t, kBytes>::V;
  using F = Functions<real_t, kBytes>;
  const V high = V{} + real_t(span.bound), low = -high;
  for (int64_t i = span.begin; i < span.begin + span.size; ++i) {
    alpha[i] = log_sigma[i] - 2 * logarithm<real_t, kBytes>(F::absolute(theta[i]) + real_t(kTiny));
    const V clamped = alpha[i] < low ? low : alpha[i] > high ? high : alpha[i];
    variance[i] = F::exponential(clamped) * theta[i] * theta[i];
  }
}

// Completes the gradients: grad_theta has that of the means, grad_log_sigma, which it replaces, that of the variances.
// Adds the divergences.
template <typename real_t, int kBytes>
FASTWS_CLONES void finish_gradient(const Span& span, real_t kl_weight, const typename Lanes<real_t, kBytes>::V* theta,
                                   const typename Lanes<real_t, kBytes>::V* alpha,
                                   const typename Lanes<real_t, kBytes>::V* variance,
                                   typename Lanes<real_t, kBytes>::V* grad_theta,
                                   typename Lanes<real_t, kBytes>::V* grad_log_sigma, double* divergence) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  using F = Functions<real_t, kBytes>;
  constexpr int64_t kBlock = 16;  // summed in real_t
  const V high = V{} + real_t(span.bound), low = -high;
  for (int64_t block = span.begin; block < span.begin + span.size; block += kBlock) {
    V sum = {};
    for (int64_t i = block; i < std::min(block + kBlock, span.begin + span.size); ++i) {
      const I inside = (alpha[i] >= low) & (alpha[i] <= high);
      const V clamped = alpha[i] < low ? low : alpha[i] > high ? high : alpha[i];
      const V inverse = F::exponential(-clamped), sum_of_one = 1 + inverse;
      const V share = F::sigmoid(real_t(kK2) + real_t(kK3) * clamped);
      // log(1 + inverse), with what is lost in 1 + inverse
      const V log_of_sum = logarithm<real_t, kBytes>(sum_of_one) - ((sum_of_one - 1) - inverse) / sum_of_one;
      sum += real_t(kK1) - real_t(kK1) * share + real_t(0.5) * log_of_sum;
      const V slope = kl_weight * (real_t(-kK1 * kK3) * share * (1 - share) - real_t(0.5) * inverse / sum_of_one);
      const V towards_zero = (theta[i] < 0   ? V{} - 1
                              : theta[i] > 0 ? V{} + 1
                                             : V{}) /
                             (F::absolute(theta[i]) + real_t(kTiny));
      const V of_variance = grad_log_sigma[i];
      // inside its bounds, alpha * theta^2 is sigma^2 and does not depend on theta
      grad_theta[i] -= inside ? 2 * slope * towards_zero : -2 * theta[i] / inverse * of_variance;
      grad_log_sigma[i] = inside ? variance[i] * of_variance + slope : V{};
    }
    for (int lane = 0; lane < Lanes<real_t, kBytes>::kCount; ++lane) divergence[lane] += sum[lane];
  }
}

// Networks with variational dropout, one per lane. Parameters: theta, then log sigma^2.
template <typename real_t, int kBytes>
class VariationalGroup : public Maps<real_t, kBytes> {
 public:
  using Base = Maps<real_t, kBytes>;
  using Base::kCount;
  using typename Base::I;
  using typename Base::V;

  VariationalGroup(const Network& network, double kl_weight)
      : Base(network, 10 * network.num_weights + network.memory + 7 * network.largest), kl_weight_(kl_weight) {
    const int64_t size = network.num_weights;
    weights_ = memory_.take(2 * size), first_ = memory_.take(2 * size), second_ = memory_.take(2 * size);
    grad_ = memory_.take(2 * size), alpha_ = memory_.take(size), variance_ = memory_.take(size);
    slopes_ = memory_.take(network.memory);
    for (V** map : {&mean_, &spread_, &squares_, &grad_maps_[0], &grad_maps_[1], &grad_maps_[2], &grad_maps_[3]})
      *map = memory_.take(network.largest);
    std::fill(variance_, variance_ + size, V{});  // where there is none it stays 0
    for (const Operation& operation : network.operations) {
      if (operation.kind != kConvolution) continue;
      shapes_.push_back(full(operation));
      const Convolution& c = shapes_.back();
      const bool dense = is_dense(c);
      spans_.push_back({operation.weight, c.out_channels * c.fan_in(), dense ? kDenseBound : kConvolutionBound});
      if (operation.bias >= 0 && !dense) spans_.push_back({operation.bias, c.out_channels, kConvolutionBound});
      first_counters_.push_back(counters_);
      counters_ += (c.out_channels * c.out_size() + kAlignment - 1) / kAlignment;
    }
  }

  int64_t num_parameters() const { return 2 * network_.num_weights; }
  V* weights() const { return weights_; }
  V* first() const { return first_; }
  V* second() const { return second_; }
  const double* divergence() const { return divergence_; }

  void begin_step() {
    const int64_t size = network_.num_weights;
    std::fill(grad_, grad_ + 2 * size, V{});
    for (const Span& span : spans_) find_variance<real_t, kBytes>(span, weights_, weights_ + size, alpha_, variance_);
  }

  void begin_sample(int64_t step, int64_t sample) {
    Base::draw_dropout(2 * step, sample);
    step_ = step, sample_ = sample;
  }

  // From images() to logits().
  void forward(bool) {
    int64_t number = 0;
    for (const Operation& operation : network_.operations) {
      if (operation.kind != kConvolution) {
        Base::pass(operation, true);
        continue;
      }
      const Convolution& c = shapes_[number];
      const V* x = maps_ + operation.input;
      V *y = maps_ + operation.output, *slope = slopes_ + operation.output;
      square<V>(x, operation.in_size, squares_);
      const auto run = [&](int64_t first, int64_t n) {
        const int64_t place = first * c.out_size();
        V *mean = operation.pooled ? mean_ : y + place, *spread = operation.pooled ? spread_ : slope + place;
        const Convolution some = channels(c, n);
        convolve<real_t, kBytes>(some, x, weights_ + operation.weight + first * c.fan_in(),
                                 operation.bias < 0 ? nullptr : weights_ + operation.bias + first, mean);
        convolve<real_t, kBytes>(some, squares_, variance_ + operation.weight + first * c.fan_in(),
                                 operation.bias < 0 || is_dense(c) ? nullptr : variance_ + operation.bias + first,
                                 spread);
        add_noise(kAlignment * first_counters_[number] + place, n * c.out_size(), mean, spread);
        if (!operation.pooled) return;
        const int64_t pooled = first * (operation.out_size / c.out_channels);
        pool_noisy<real_t, kBytes>(some, mean, spread, y + pooled, slope + pooled,
                                   reinterpret_cast<I*>(maps_ + operation.extra) + pooled);
      };
      if (operation.pooled)  // a few channels at a time, whose maps stay in cache until they are pooled
        for_channels(c.out_channels, [&]<int n>(int64_t first) { run(first, n); });
      else
        run(0, c.out_channels);
      ++number;
    }
  }

  // Adds the gradients of means and variances, given that of the logits in logits().
  void backward() {
    V *grad = grad_maps_[0], *other = grad_maps_[1];
    std::copy(Base::logits(), Base::logits() + network_.num_classes, grad);
    int64_t number = shapes_.size();
    for (int64_t l = network_.operations.size() - 1; l >= 0; --l) {
      const Operation& operation = network_.operations[l];
      if (operation.kind != kConvolution) {
        Base::pass_back(operation, grad, other);
        continue;
      }
      const Convolution& c = shapes_[--number];
      const V *x = maps_ + operation.input, *slope = slopes_ + operation.output, *of_mean = grad;
      if (operation.pooled) {
        const I* winner = reinterpret_cast<const I*>(maps_ + operation.extra);
        unpool_noisy<real_t, kBytes>(c, grad, slope, winner, mean_, spread_);
        of_mean = mean_;
      } else {
        product<V>(grad, slope, operation.out_size, spread_);
      }
      square<V>(x, operation.in_size, squares_);
      V* grad_variance = grad_ + network_.num_weights;
      add_weight_gradient<real_t, kBytes>(c, x, of_mean, grad_ + operation.weight);
      add_weight_gradient<real_t, kBytes>(c, squares_, spread_, grad_variance + operation.weight);
      if (operation.bias >= 0)
        add_bias_gradient<real_t, kBytes>(c.out_channels, c.out_size(), of_mean, grad_ + operation.bias);
      if (operation.bias >= 0 && !is_dense(c))
        add_bias_gradient<real_t, kBytes>(c.out_channels, c.out_size(), spread_, grad_variance + operation.bias);
      if (l == 0) return;
      input_gradient<real_t, kBytes>(c, weights_ + operation.weight, of_mean, other);
      input_gradient<real_t, kBytes>(c, variance_ + operation.weight, spread_, grad_maps_[2]);
      add_through_square<V>(x, grad_maps_[2], operation.in_size, other);
      std::swap(grad, other);
    }
  }

  void end_step(int64_t number) {
    const int64_t size = network_.num_weights;
    std::fill(divergence_, divergence_ + kCount, 0);
    for (const Span& span : spans_)
      finish_gradient<real_t, kBytes>(span, kl_weight_, weights_, alpha_, variance_, grad_, grad_ + size, divergence_);
    update<real_t, kBytes>(Base::recipes, number, size, grad_, weights_, first_, second_);
    for (const Span& span : spans_) {
      const int64_t at = size + span.begin;
      update<real_t, kBytes>(Base::recipes, number, span.size, grad_ + at, weights_ + at, first_ + at, second_ + at);
    }
  }

 private:
  using Base::maps_;
  using Base::memory_;
  using Base::network_;

  static bool is_dense(const Convolution& c) { return c.in_height == 1 && c.in_width == 1; }

  static Convolution channels(Convolution c, int64_t count) {
    c.out_channels = count;
    return c;
  }

  // A convolution with the outputs that pooling leaves out.
  static Convolution full(const Operation& operation) {
    Convolution c = operation.shape;
    c.out_height = (c.in_height - c.kernel_height) / c.stride_height + 1;
    c.out_width = (c.in_width - c.kernel_width) / c.stride_width + 1;
    return c;
  }

  // The next outputs of a convolution: `size` from number `first` of those of a sample on.
  void add_noise(int64_t first, int64_t size, V* mean, V* spread) {
    constexpr int kDrawn = Recipes<real_t, kBytes>::kDrawn;
    uint32_t words[4 * kChunk * kDrawn];
    V normals[kAlignment * kChunk];
    real_t* z = reinterpret_cast<real_t*>(normals);
    for (int64_t done = 0; done < size;) {
      const int64_t skip = (first + done) % kAlignment, count = std::min(kAlignment * kChunk - skip, size - done);
      const int64_t counter = sample_ * counters_ + (first + done) / kAlignment;
      const int64_t counters = (skip + count + kAlignment - 1) / kAlignment;
      for (int lane = 0; lane < kDrawn; lane += kDrawLanes)
        draw_lanes(Base::recipes.seed + lane, 2 * step_ + 1, counter, counters, words + lane, kDrawn);
      draw_normals<real_t, kCount, kDrawn>(words, 4 * counters, z);
      perturb<real_t>(z + skip * kCount, count * kCount, reinterpret_cast<real_t*>(mean + done),
                      reinterpret_cast<real_t*>(spread + done));
      done += count;
    }
  }

  const double kl_weight_;
  V *weights_, *first_, *second_, *grad_, *alpha_, *variance_;
  V *slopes_, *mean_, *spread_, *squares_;
  V* grad_maps_[4];
  std::vector<Convolution> shapes_;      // of the convolutions
  std::vector<int64_t> first_counters_;  // of their normals
  std::vector<Span> spans_;
  int64_t counters_ = 0, step_ = 0, sample_ = 0;
  double divergence_[kCount] = {};
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> variational_cnn_step_cpu(
    const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& images, const Tensor& labels,
    const Tensor& batches, const Tensor& layers, const Tensor& activation, const Tensor& dropout,
    const Tensor& optimizer, const Tensor& lr, const Tensor& weight_decay, const Tensor& seed, double kl_weight,
    int64_t step) {
  StepTensors tensors({&weights, &first, &second, &images, &labels, &batches, &layers, &activation, &dropout,
                       &optimizer, &lr, &weight_decay, &seed});
  const Network network = prepare("variational_cnn_step", tensors, 2, step);
  const std::vector<int64_t> order = sort_networks(tensors);
  const Tensor divergences = torch::stable::empty_like(tensors.losses);
  for_groups(weights.scalar_type(), weights.size(0), [&]<typename real_t, int kBytes>(int64_t number) {
    const Members<Lanes<real_t, kBytes>::kCount> members(order, number);
    VariationalGroup<real_t, kBytes> group(network, kl_weight);
    const Steps<real_t> steps = tensors.steps<real_t>(step);
    real_t* out = divergences.mutable_data_ptr<real_t>();
    train_group<real_t, kBytes>(network, steps, members, group, [&](int64_t s) {
      for (int64_t lane = 0; lane < members.lanes; ++lane)
        out[members.network[lane] * steps.count + s] = group.divergence()[lane];
    });
  });
  return {tensors.new_weights, tensors.new_first, tensors.new_second, tensors.losses, tensors.correct, divergences};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("variational_cnn_step", TORCH_BOX(&variational_cnn_step_cpu)); }

}  // namespace fastws
