#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/activations.h"
#include "cpu/draw_lanes.h"
#include "cpu/small_cnn.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kMomentum = 0.9, kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
enum Optimizer { kSgd, kHeavyBall, kAdam, kAdamW };

enum Kind { kConvolution, kPooling, kActivation, kDropout };

// A row of the table of layers, and where its maps lie in the memory of a group of networks, in vectors.
struct Layer {
  int64_t kind;
  Convolution shape;
  bool pooled;  // a convolution together with the pooling by 2 x 2 behind it
  int64_t weight, bias, unit;
  int64_t input, output, extra;  // extra: slopes of activations, factors of dropout, winners of pooling
  int64_t in_size, out_size;
};

struct Network {
  std::vector<Layer> layers;
  int64_t num_weights, image_size, num_classes;
  int64_t units = 0;    // of dropout
  int64_t memory = 0;   // vectors of all maps
  int64_t largest = 0;  // vectors of the largest map or gradient

  Network(const Tensor& table, int64_t num_weights) : num_weights(num_weights) {
    constexpr int64_t kColumns = 12;
    const int64_t* row = table.const_data_ptr<int64_t>();
    for (int64_t l = 0; l < table.size(0); ++l, row += kColumns) {
      const int64_t height = (row[2] - row[5]) / row[7] + 1, width = (row[3] - row[6]) / row[8] + 1;
      const Convolution shape{row[1], row[2], row[3], row[4], height, width, row[5], row[6], row[7], row[8]};
      Layer* before = layers.empty() ? nullptr : &layers.back();
      if (row[0] == kPooling && row[5] == 2 && row[6] == 2 && before && before->kind == kConvolution) {
        before->pooled = true;
        before->shape.out_height = 2 * height, before->shape.out_width = 2 * width;
        before->out_size = row[4] * height * width;
      } else {
        layers.push_back({row[0], shape, false, row[9], row[10], row[11], 0, 0, 0, row[1] * row[2] * row[3],
                          row[4] * height * width});
      }
      largest = std::max(largest, row[4] * height * width);
      if (row[0] == kDropout) units = row[11] + layers.back().out_size;
    }
    image_size = memory = layers.front().in_size;
    largest = std::max(largest, image_size);
    int64_t input = 0;
    for (Layer& layer : layers) {
      layer.input = input, layer.output = memory, layer.extra = memory + layer.out_size;
      input = memory;
      memory += (layer.kind == kConvolution && !layer.pooled ? 1 : 2) * layer.out_size;
    }
    num_classes = layers.back().out_size;
  }
};

// What networks of one group have of their own.
template <typename real_t, int kBytes>
struct Recipes {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  static constexpr int kDrawn = std::max<int>(Lanes<real_t, kBytes>::kCount, kDrawLanes);
  I of_kind[4] = {};  // all bits set in the lanes with this activation
  int activation;     // that of all lanes, or -1
  bool drops = false, adaptive = false;
  uint32_t threshold[kDrawn];
  uint64_t seed[kDrawn];
  V scale;               // of what dropout keeps
  V lr, decay, coupled;  // decay: factor of weights in AdamW; coupled: weight decay of the others
  V old_first, new_first, old_second, new_second;  // first = old_first * first + new_first * gradient, ...
  V from_gradient;                                 // 1 where the weights follow the gradient itself
  I is_adaptive;
};

// Memory for one group of networks, aligned as vectors must be.
template <typename V>
class Memory {
 public:
  explicit Memory(int64_t count) : start_(static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(64)))) {}
  ~Memory() { ::operator delete(start_, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  V* take(int64_t count) {
    V* taken = start_ + used_;
    used_ += count;
    return taken;
  }

 private:
  V* start_;
  int64_t used_ = 0;
};

// x[i][lane] = rows[lane][i]
template <typename real_t, int kCount>
FASTWS_CLONES void interleave(const real_t* const* rows, int64_t size, real_t* x) {
  for (int64_t i = 0; i < size; ++i)
    for (int lane = 0; lane < kCount; ++lane) x[i * kCount + lane] = rows[lane][i];
}

// rows[lane][i] = x[i][lane]
template <typename real_t, int kCount>
FASTWS_CLONES void separate(const real_t* x, int64_t size, int64_t lanes, real_t* const* rows) {
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < size; ++i) rows[lane][i] = x[i * kCount + lane];
}

// y = x * factor, where factor = scale for the words from threshold on, else 0.
template <typename real_t, int kBytes>
FASTWS_CLONES void drop(const Recipes<real_t, kBytes>& recipes, const real_t* x, const uint32_t* words, int64_t size,
                        real_t* y, real_t* factor) {
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  const real_t* scale = reinterpret_cast<const real_t*>(&recipes.scale);
  for (int64_t i = 0; i < size; ++i)
    for (int lane = 0; lane < kCount; ++lane) {
      const bool kept = words[i * recipes.kDrawn + lane] >= recipes.threshold[lane];
      factor[i * kCount + lane] = kept ? scale[lane] : 0;
      y[i * kCount + lane] = x[i * kCount + lane] * factor[i * kCount + lane];
    }
}

template <typename V>
FASTWS_CLONES void multiply(const V* slope, int64_t size, V* grad) {
  for (int64_t i = 0; i < size; ++i) grad[i] *= slope[i];
}

// Adds cross-entropies to losses and hits to correct, and makes the logits their gradient divided by the batch size.
template <typename real_t, int kBytes>
FASTWS_CLONES void cross_entropy(const int64_t* labels, int64_t num_classes, real_t batch_size,
                                 typename Lanes<real_t, kBytes>::V* logits, double* losses, int64_t* correct) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  V largest = logits[0], sum = {};
  I best = {}, label;
  for (int lane = 0; lane < kCount; ++lane) label[lane] = labels[lane];
  for (int64_t k = 1; k < num_classes; ++k) {
    const I larger = logits[k] > largest;
    best = larger ? I{} + int(k) : best;
    largest = larger ? logits[k] : largest;
  }
  V of_label = {};
  for (int64_t k = 0; k < num_classes; ++k) {
    const V logit = logits[k] - largest;
    of_label = label == int(k) ? logit : of_label;
    logits[k] = Functions<real_t, kBytes>::exponential(logit);
    sum += logits[k];
  }
  for (int64_t k = 0; k < num_classes; ++k)
    logits[k] = (logits[k] / sum - (label == int(k) ? V{} + 1 : V{})) / batch_size;
  for (int lane = 0; lane < kCount; ++lane) {
    losses[lane] += std::log(double(sum[lane])) - double(of_label[lane]);
    correct[lane] += best[lane] == label[lane];
  }
}

// Square root of numbers from 0 on, to 2 ulps for floats: the library's may set errno, which keeps loops from being
// vectors.
template <typename real_t, int kBytes>
FASTWS_INLINE typename Lanes<real_t, kBytes>::V square_root(typename Lanes<real_t, kBytes>::V x) {
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  if constexpr (sizeof(real_t) == 4) {
    V r = (V)(0x5F375A86 - ((I)x >> 1));  // about 1 / sqrt(x), then by Newton's method
    for (int round = 0; round < 3; ++round) r = r * (1.5f - 0.5f * x * r * r);
    return x * r;
  } else {
    return Functions<real_t, kBytes>::each_lane(x, [](double lane) { return std::sqrt(lane); });
  }
}

// The formulas of torch.optim; step counts from 1.
template <typename real_t, int kBytes>
FASTWS_CLONES void update(const Recipes<real_t, kBytes>& r, int64_t step, int64_t size,
                          const typename Lanes<real_t, kBytes>::V* grad, typename Lanes<real_t, kBytes>::V* weights,
                          typename Lanes<real_t, kBytes>::V* first, typename Lanes<real_t, kBytes>::V* second) {
  using V = typename Lanes<real_t, kBytes>::V;
  const real_t root = 1 / std::sqrt(1 - std::pow(kBeta2, double(step)));
  const V adaptive_lr = r.lr * real_t(1 / (1 - std::pow(kBeta1, double(step))));
  for (int64_t i = 0; i < size; ++i) {
    const V weight = weights[i] * r.decay, g = grad[i] + weight * r.coupled;
    first[i] = first[i] * r.old_first + g * r.new_first;
    V change = r.lr * (r.from_gradient != 0 ? g : first[i]);
    if (r.adaptive) {
      second[i] = second[i] * r.old_second + g * g * r.new_second;
      const V denominator = square_root<real_t, kBytes>(second[i]) * root + real_t(kEpsilon);
      change = r.is_adaptive ? adaptive_lr * first[i] / denominator : change;
    }
    weights[i] = weight - change;
  }
}

// A group of networks, one per lane, with the maps of one sample.
template <typename real_t, int kBytes>
class Group {
 public:
  using V = typename Lanes<real_t, kBytes>::V;
  using I = typename Lanes<real_t, kBytes>::I;
  static constexpr int kCount = Lanes<real_t, kBytes>::kCount;

  explicit Group(const Network& network, bool training)
      : network_(network),
        memory_(network.num_weights * (training ? 4 : 1) + network.memory + (training ? 3 * network.largest : 0)),
        weights_(memory_.take(network.num_weights)),
        maps_(memory_.take(network.memory)) {
    if (!training) return;
    first_ = memory_.take(network.num_weights), second_ = memory_.take(network.num_weights);
    grad_ = memory_.take(network.num_weights);
    for (V*& map : grad_maps_) map = memory_.take(network.largest);
    words_.resize((network.units / 4 + 2) * 4 * Recipes<real_t, kBytes>::kDrawn);
  }

  Recipes<real_t, kBytes> recipes;

  V* weights() const { return weights_; }
  V* first() const { return first_; }
  V* second() const { return second_; }
  V* images() const { return maps_; }
  V* logits() const { return maps_ + network_.layers.back().output; }

  void load(const real_t* const* rows, V* vectors) const {
    interleave<real_t, kCount>(rows, network_.num_weights, reinterpret_cast<real_t*>(vectors));
  }

  void store(const V* vectors, int64_t lanes, real_t* const* rows) const {
    separate<real_t, kCount>(reinterpret_cast<const real_t*>(vectors), network_.num_weights, lanes, rows);
  }

  void clear_gradient() { std::fill(grad_, grad_ + network_.num_weights, V{}); }

  // Draws what dropout needs for one sample of the minibatch.
  void draw(int64_t offset, int64_t sample) {
    if (!recipes.drops) return;
    const int64_t begin = sample * network_.units;
    const int64_t counters = (begin + network_.units + 3) / 4 - begin / 4;
    for (int lane = 0; lane < recipes.kDrawn; lane += kDrawLanes)
      draw_lanes(recipes.seed + lane, offset, begin / 4, counters, words_.data() + lane, recipes.kDrawn);
    shift_ = begin % 4;
  }

  // From images() to logits().
  void forward(bool training) {
    for (const Layer& layer : network_.layers) {
      const V* x = maps_ + layer.input;
      V *y = maps_ + layer.output, *extra = maps_ + layer.extra;
      I* winner = reinterpret_cast<I*>(extra);
      const V* bias = layer.bias < 0 ? nullptr : weights_ + layer.bias;
      if (layer.kind == kConvolution && layer.pooled)
        convolve_and_pool<real_t, kBytes>(layer.shape, x, weights_ + layer.weight, bias, y, winner);
      else if (layer.kind == kConvolution)
        convolve<real_t, kBytes>(layer.shape, x, weights_ + layer.weight, bias, y);
      else if (layer.kind == kPooling)
        pool<real_t, kBytes>(layer.shape, x, y, winner);
      else if (layer.kind == kActivation)
        activate<real_t, kBytes>(x, layer.out_size, recipes.of_kind, recipes.activation, y, extra);
      else if (training && recipes.drops)
        drop<real_t, kBytes>(recipes, reinterpret_cast<const real_t*>(x), words_of(layer), layer.out_size,
                             reinterpret_cast<real_t*>(y), reinterpret_cast<real_t*>(extra));
      else
        std::copy(x, x + layer.out_size, y);
    }
  }

  // Adds the gradient of the weights, given that of the logits in logits().
  void backward() {
    V *grad = grad_maps_[0], *other = grad_maps_[1];
    std::copy(logits(), logits() + network_.num_classes, grad);
    for (int64_t l = network_.layers.size() - 1; l >= 0; --l) {
      const Layer& layer = network_.layers[l];
      const V* x = maps_ + layer.input;
      const V* extra = maps_ + layer.extra;
      const I* winner = reinterpret_cast<const I*>(extra);
      if (layer.kind == kConvolution) {
        const Convolution& c = layer.shape;
        if (layer.bias >= 0)
          add_bias_gradient<real_t, kBytes>(c.out_channels, layer.out_size / c.out_channels, grad, grad_ + layer.bias);
        const V* grad_y = grad;
        if (layer.pooled) {
          spread<real_t, kBytes>(grad, winner, c.out_channels * c.out_height / 2, c.out_width / 2, grad_maps_[2]);
          grad_y = grad_maps_[2];
        }
        add_weight_gradient<real_t, kBytes>(c, x, grad_y, grad_ + layer.weight);
        if (l == 0) return;
        input_gradient<real_t, kBytes>(c, weights_ + layer.weight, grad_y, other);
        std::swap(grad, other);
      } else if (layer.kind == kPooling) {
        unpool<real_t, kBytes>(layer.shape, grad, winner, other);
        std::swap(grad, other);
      } else if (layer.kind == kActivation || recipes.drops) {
        multiply<V>(extra, layer.out_size, grad);
      }
    }
  }

  void step(int64_t number) {
    update<real_t, kBytes>(recipes, number, network_.num_weights, grad_, weights_, first_, second_);
  }

 private:
  const uint32_t* words_of(const Layer& layer) const {
    return words_.data() + (shift_ + layer.unit) * Recipes<real_t, kBytes>::kDrawn;
  }

  const Network& network_;
  Memory<V> memory_;
  V *weights_, *maps_, *first_ = nullptr, *second_ = nullptr, *grad_ = nullptr;
  V* grad_maps_[3] = {};
  std::vector<uint32_t> words_;
  int64_t shift_ = 0;
};

// Networks sorted so that those of one activation, then of one kind of optimizer, then with dropout stand together.
std::vector<int64_t> sort_networks(const int32_t* activation, const int32_t* optimizer, const double* dropout,
                                   int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto kind = [=](int64_t g) {
    return 4 * activation[g] + (optimizer ? 2 * (dropout[g] > 0) + (optimizer[g] >= kAdam) : 0);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kind(a) < kind(b); });
  return order;
}

// The networks in the lanes of a group; the last one fills lanes that are left over.
template <int kCount>
struct Members {
  int64_t lanes, network[kCount];

  Members(const std::vector<int64_t>& order, int64_t group) {
    const int64_t first = group * kCount, count = order.size();
    lanes = std::min<int64_t>(kCount, count - first);
    for (int lane = 0; lane < kCount; ++lane) network[lane] = order[std::min(first + lane, count - 1)];
  }

  template <typename T>
  void rows(T* start, int64_t size, T** row) const {
    for (int lane = 0; lane < kCount; ++lane) row[lane] = start + network[lane] * size;
  }
};

template <typename real_t, int kBytes>
void set_activation(const Members<Lanes<real_t, kBytes>::kCount>& members, const int32_t* activation,
                    Recipes<real_t, kBytes>& recipes) {
  recipes.activation = activation[members.network[0]];
  for (int lane = 0; lane < Lanes<real_t, kBytes>::kCount; ++lane) {
    const int kind = activation[members.network[lane]];
    recipes.of_kind[kind][lane] = -1;
    if (kind != recipes.activation) recipes.activation = -1;
  }
}

struct Arguments {
  const Network& network;
  const void *images, *weights, *first, *second;
  void *new_weights, *new_first, *new_second, *losses;
  const int64_t *labels, *seed;
  int64_t* correct;
  const int32_t *activation, *optimizer;
  const double *dropout, *lr, *weight_decay;
  const void* batches;
  bool wide;  // int64 batches
  int64_t steps, batch_size, step;
  std::vector<int64_t> order;

  int64_t image(int64_t network, int64_t s, int64_t b) const {
    const int64_t place = (network * steps + s) * batch_size + b;
    return wide ? static_cast<const int64_t*>(batches)[place] : static_cast<const int32_t*>(batches)[place];
  }
};

template <typename real_t, int kBytes>
void set_recipes(const Arguments& a, const Members<Lanes<real_t, kBytes>::kCount>& members,
                 Recipes<real_t, kBytes>& r) {
  set_activation<real_t, kBytes>(members, a.activation, r);
  for (int lane = 0; lane < r.kDrawn; ++lane) {
    const int64_t g = members.network[std::min(lane, Lanes<real_t, kBytes>::kCount - 1)];
    r.seed[lane] = a.seed[g];
    r.threshold[lane] = std::min(std::round(a.dropout[g] * 0x1p32), 4294967295.0);
    r.drops |= a.dropout[g] > 0;
    r.adaptive |= a.optimizer[g] >= kAdam;
  }
  for (int lane = 0; lane < Lanes<real_t, kBytes>::kCount; ++lane) {
    const int64_t g = members.network[lane];
    const int32_t optimizer = a.optimizer[g];
    const double lr = a.lr[g], decay = a.weight_decay[g];
    const bool adaptive = optimizer >= kAdam;
    r.scale[lane] = 1 / (1 - a.dropout[g]);
    r.lr[lane] = lr;
    r.decay[lane] = optimizer == kAdamW ? 1 - lr * decay : 1;
    r.coupled[lane] = optimizer == kAdamW ? 0 : decay;
    r.old_first[lane] = optimizer == kSgd ? 1 : adaptive ? kBeta1 : kMomentum;
    r.new_first[lane] = optimizer == kSgd ? 0 : adaptive ? 1 - kBeta1 : 1;
    r.old_second[lane] = adaptive ? kBeta2 : 1;
    r.new_second[lane] = adaptive ? 1 - kBeta2 : 0;
    r.from_gradient[lane] = optimizer == kSgd;
    r.is_adaptive[lane] = adaptive ? -1 : 0;
  }
}

template <typename real_t, int kBytes>
void train_group(const Arguments& a, int64_t number) {
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  const Network& network = a.network;
  const Members<kCount> members(a.order, number);
  Group<real_t, kBytes> group(network, true);
  set_recipes<real_t, kBytes>(a, members, group.recipes);

  const real_t* rows[kCount];
  const auto load = [&](const void* from, auto* to) {
    members.rows(static_cast<const real_t*>(from), network.num_weights, rows);
    group.load(rows, to);
  };
  load(a.weights, group.weights()), load(a.first, group.first()), load(a.second, group.second());

  for (int64_t s = 0; s < a.steps; ++s) {
    double losses[kCount] = {};
    int64_t correct[kCount] = {}, labels[kCount];
    group.clear_gradient();
    for (int64_t b = 0; b < a.batch_size; ++b) {
      for (int lane = 0; lane < kCount; ++lane) {
        const int64_t image = a.image(members.network[lane], s, b);
        rows[lane] = static_cast<const real_t*>(a.images) + image * network.image_size;
        labels[lane] = a.labels[image];
      }
      interleave<real_t, kCount>(rows, network.image_size, reinterpret_cast<real_t*>(group.images()));
      group.draw(a.step + s, b);
      group.forward(true);
      cross_entropy<real_t, kBytes>(labels, network.num_classes, a.batch_size, group.logits(), losses, correct);
      group.backward();
    }
    group.step(a.step + s + 1);
    for (int64_t lane = 0; lane < members.lanes; ++lane) {
      const int64_t place = members.network[lane] * a.steps + s;
      static_cast<real_t*>(a.losses)[place] = losses[lane] / a.batch_size;
      a.correct[place] = correct[lane];
    }
  }

  real_t* out[kCount];
  const auto store = [&](const auto* from, void* to) {
    members.rows(static_cast<real_t*>(to), network.num_weights, out);
    group.store(from, members.lanes, out);
  };
  store(group.weights(), a.new_weights), store(group.first(), a.new_first), store(group.second(), a.new_second);
}

// Whether vectors of 64 bytes are single registers here.
bool has_wide_vectors() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Calls body<real_t, kBytes>(group) for every group of networks, in threads.
template <typename Body>
void for_groups(ScalarType dtype, int64_t count, const Body& body) {
  const int64_t bytes = has_wide_vectors() ? 64 : 32, size = dtype == ScalarType::Float ? 4 : 8;
  const int64_t lanes = bytes / size;
  torch::stable::parallel_for(0, (count + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      if (size == 4)
        bytes == 64 ? body.template operator()<float, 64>(group) : body.template operator()<float, 32>(group);
      else
        bytes == 64 ? body.template operator()<double, 64>(group) : body.template operator()<double, 32>(group);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> small_cnn_step_cpu(
    const Tensor& weights_, const Tensor& first_, const Tensor& second_, const Tensor& images_, const Tensor& labels_,
    const Tensor& batches_, const Tensor& layers_, const Tensor& activation_, const Tensor& dropout_,
    const Tensor& optimizer_, const Tensor& lr_, const Tensor& weight_decay_, const Tensor& seed_, int64_t step) {
  using torch::stable::contiguous;
  const Tensor weights = contiguous(weights_), first = contiguous(first_), second = contiguous(second_);
  const Tensor images = contiguous(images_), labels = contiguous(labels_), batches = contiguous(batches_);
  const Tensor layers = contiguous(layers_), activation = contiguous(activation_), dropout = contiguous(dropout_);
  const Tensor optimizer = contiguous(optimizer_), lr = contiguous(lr_), weight_decay = contiguous(weight_decay_);
  const Tensor seed = contiguous(seed_);
  const int64_t count = weights.size(0), steps = batches.size(1);
  const Tensor new_weights = torch::stable::empty_like(weights), new_first = torch::stable::empty_like(weights);
  const Tensor new_second = torch::stable::empty_like(weights);
  const Tensor losses = torch::stable::new_empty(weights, {count, steps});
  const Tensor correct = torch::stable::new_empty(labels, {count, steps});

  const Network network(layers, weights.size(1));
  const Arguments arguments{network,
                            images.const_data_ptr(),
                            weights.const_data_ptr(),
                            first.const_data_ptr(),
                            second.const_data_ptr(),
                            new_weights.mutable_data_ptr(),
                            new_first.mutable_data_ptr(),
                            new_second.mutable_data_ptr(),
                            losses.mutable_data_ptr(),
                            labels.const_data_ptr<int64_t>(),
                            seed.const_data_ptr<int64_t>(),
                            correct.mutable_data_ptr<int64_t>(),
                            activation.const_data_ptr<int32_t>(),
                            optimizer.const_data_ptr<int32_t>(),
                            dropout.const_data_ptr<double>(),
                            lr.const_data_ptr<double>(),
                            weight_decay.const_data_ptr<double>(),
                            batches.const_data_ptr(),
                            batches.scalar_type() == ScalarType::Long,
                            steps,
                            batches.size(2),
                            step,
                            sort_networks(activation.const_data_ptr<int32_t>(), optimizer.const_data_ptr<int32_t>(),
                                          dropout.const_data_ptr<double>(), count)};
  for_groups(weights.scalar_type(), count,
             [&]<typename real_t, int kBytes>(int64_t group) { train_group<real_t, kBytes>(arguments, group); });
  return {new_weights, new_first, new_second, losses, correct};
}

Tensor small_cnn_logits_cpu(const Tensor& weights_, const Tensor& images_, const Tensor& layers_,
                            const Tensor& activation_) {
  const Tensor weights = torch::stable::contiguous(weights_), images = torch::stable::contiguous(images_);
  const Tensor layers = torch::stable::contiguous(layers_), activation = torch::stable::contiguous(activation_);
  const int64_t count = weights.size(0), num_images = images.size(0);
  const Network network(layers, weights.size(1));
  const Tensor logits = torch::stable::new_empty(weights, {count, num_images, network.num_classes});
  const auto order = sort_networks(activation.const_data_ptr<int32_t>(), nullptr, nullptr, count);

  for_groups(weights.scalar_type(), count, [&]<typename real_t, int kBytes>(int64_t number) {
    using V = typename Lanes<real_t, kBytes>::V;
    constexpr int kCount = Lanes<real_t, kBytes>::kCount;
    const Members<kCount> members(order, number);
    Group<real_t, kBytes> group(network, false);
    set_activation<real_t, kBytes>(members, activation.const_data_ptr<int32_t>(), group.recipes);
    const real_t* rows[kCount];
    members.rows(static_cast<const real_t*>(weights.const_data_ptr()), network.num_weights, rows);
    group.load(rows, group.weights());
    const real_t* image = static_cast<const real_t*>(images.const_data_ptr());
    real_t* out = static_cast<real_t*>(logits.mutable_data_ptr());
    for (int64_t n = 0; n < num_images; ++n, image += network.image_size) {
      for (int64_t i = 0; i < network.image_size; ++i) group.images()[i] = V{} + image[i];
      group.forward(false);
      for (int64_t lane = 0; lane < members.lanes; ++lane)
        for (int64_t k = 0; k < network.num_classes; ++k)
          out[(members.network[lane] * num_images + n) * network.num_classes + k] = group.logits()[k][lane];
    }
  });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("small_cnn_step", TORCH_BOX(&small_cnn_step_cpu));
  m.impl("small_cnn_logits", TORCH_BOX(&small_cnn_logits_cpu));
}

}  // namespace fastws
