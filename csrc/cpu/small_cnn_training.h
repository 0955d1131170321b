#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/memory.h"
#include "cpu/small_cnn_network.h"
#include "cpu/trust.h"
#include "dispatch.h"
#include "small_cnn_tensors.h"

// What training steps of small CNNs share: recipes, the loss, the optimizers, and the loop over steps and samples.

namespace fastws {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kLastStep = int64_t(1) << 62;

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
  if constexpr (sizeof(real_t) == 4) {
    typedef uint32_t Bits __attribute__((vector_size(kBytes)));  // unsigned, for negative numbers overflow
    V r = (V)(0x5F375A86 - ((Bits)x >> 1));                      // about 1 / sqrt(x), then by Newton's method
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

template <typename real_t, int kBytes>
void set_recipes(const Steps<real_t>& steps, const Members<Lanes<real_t, kBytes>::kCount>& members,
                 Recipes<real_t, kBytes>& r) {
  set_activation<real_t, kBytes>(members, steps.activation, r);
  for (int lane = 0; lane < r.kDrawn; ++lane) {
    const int64_t g = members.network[std::min(lane, Lanes<real_t, kBytes>::kCount - 1)];
    r.seed[lane] = steps.seed[g];
    r.threshold[lane] = std::min(std::round(steps.dropout[g] * 0x1p32), 4294967295.0);
    r.drops |= steps.dropout[g] > 0;
    r.adaptive |= steps.optimizer[g] >= kAdam;
  }
  for (int lane = 0; lane < Lanes<real_t, kBytes>::kCount; ++lane) {
    const int64_t g = members.network[lane];
    const int32_t optimizer = steps.optimizer[g];
    const double lr = steps.lr[g], decay = steps.weight_decay[g];
    const bool adaptive = optimizer >= kAdam;
    r.scale[lane] = 1 / (1 - steps.dropout[g]);
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

// Makes all steps of a group of networks; calls done(s) after step s.
template <typename real_t, int kBytes, typename Group, typename Done>
void train_group(const Network& network, const Steps<real_t>& steps,
                 const Members<Lanes<real_t, kBytes>::kCount>& members, Group& group, const Done& done) {
  constexpr int kCount = Lanes<real_t, kBytes>::kCount;
  set_recipes<real_t, kBytes>(steps, members, group.recipes);

  const real_t* rows[kCount];
  const auto load = [&](const real_t* from, auto* to) {
    members.rows(from, group.num_parameters(), rows);
    group.load(rows, group.num_parameters(), to);
  };
  load(steps.weights, group.weights()), load(steps.first, group.first()), load(steps.second, group.second());

  for (int64_t s = 0; s < steps.count; ++s) {
    double losses[kCount] = {};
    int64_t correct[kCount] = {}, labels[kCount];
    group.begin_step();
    for (int64_t b = 0; b < steps.batch_size; ++b) {
      for (int lane = 0; lane < kCount; ++lane) {
        const int64_t image = steps.image((members.network[lane] * steps.count + s) * steps.batch_size + b);
        rows[lane] = steps.images + image * network.image_size;
        labels[lane] = steps.labels[image];
      }
      interleave<real_t, kCount>(rows, network.image_size, reinterpret_cast<real_t*>(group.images()));
      group.begin_sample(steps.first_step + s, b);
      group.forward(true);
      cross_entropy<real_t, kBytes>(labels, network.num_classes, steps.batch_size, group.logits(), losses, correct);
      group.backward();
    }
    group.end_step(steps.first_step + s + 1);
    for (int64_t lane = 0; lane < members.lanes; ++lane) {
      const int64_t place = members.network[lane] * steps.count + s;
      steps.losses[place] = losses[lane] / steps.batch_size;
      steps.correct[place] = correct[lane];
    }
    done(s);
  }

  real_t* out[kCount];
  const auto store = [&](const auto* from, real_t* to) {
    members.rows(to, group.num_parameters(), out);
    group.store(from, group.num_parameters(), members.lanes, out);
  };
  store(group.weights(), steps.new_weights), store(group.first(), steps.new_first);
  store(group.second(), steps.new_second);
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

// Checks what networks of any operator are made of, and reads their table. sets: how many flat vectors each has.
inline Network read_network(const char* op, const Tensor& weights, const Tensor& images, const Tensor& layers,
                            const Tensor& activation, int64_t sets) {
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": weights must be Float or Double, got ", torch::headeronly::toString(dtype));
  if (sets > 1)
    check_tensor(op, "weights", weights, dtype, {kAny, sets, kAny});
  else
    check_tensor(op, "weights", weights, dtype, {kAny, kAny});
  const int64_t count = weights.size(0), num_weights = weights.size(weights.dim() - 1);
  check_tensor(op, "images", images, dtype, {kAny, kAny, kAny, kAny});
  check_tensor(op, "layers", layers, ScalarType::Long, {kAny, sizeof(Row) / sizeof(int64_t)});
  check_tensor(op, "activation", activation, ScalarType::Int, {count});
  check_range(op, "activation", activation.const_data_ptr<int32_t>(), count, 0, kActivations);
  const Row* rows = reinterpret_cast<const Row*>(layers.const_data_ptr<int64_t>());
  check_rows(op, rows, layers.size(0), images.size(1), images.size(2), images.size(3), num_weights);
  return {rows, layers.size(0), num_weights};
}

// Checks all that steps read by index, makes what they return, and reads the table.
inline Network prepare(const char* op, StepTensors& tensors, int64_t sets, int64_t step) {
  const Tensor &weights = tensors.weights, &batches = tensors.batches;
  const Network network = read_network(op, weights, tensors.images, tensors.layers, tensors.activation, sets);
  const int64_t count = weights.size(0), num_images = tensors.images.size(0);
  const bool wide = tensors.has_wide_batches();
  check_like(op, "first", tensors.first, weights), check_like(op, "second", tensors.second, weights);
  check_tensor(op, "labels", tensors.labels, ScalarType::Long, {num_images});
  check_tensor(op, "batches", batches, wide ? ScalarType::Long : ScalarType::Int, {count, kAny, kAny});
  check_tensor(op, "optimizer", tensors.optimizer, ScalarType::Int, {count});
  check_tensor(op, "seed", tensors.seed, ScalarType::Long, {count});
  check_tensor(op, "dropout", tensors.dropout, ScalarType::Double, {count});
  check_tensor(op, "lr", tensors.lr, ScalarType::Double, {count});
  check_tensor(op, "weight_decay", tensors.weight_decay, ScalarType::Double, {count});
  check_range(op, "labels", tensors.labels.const_data_ptr<int64_t>(), num_images, 0, network.num_classes);
  if (wide)
    check_range(op, "batches", batches.const_data_ptr<int64_t>(), batches.numel(), 0, num_images);
  else
    check_range(op, "batches", batches.const_data_ptr<int32_t>(), batches.numel(), 0, num_images);
  check_range(op, "optimizer", tensors.optimizer.const_data_ptr<int32_t>(), count, 0, kOptimizers);
  check_range(op, "dropout", tensors.dropout.const_data_ptr<double>(), count, 0, 1);
  STD_TORCH_CHECK(batches.size(2) > 0, op, ": batches must hold at least 1 image each, got 0");
  STD_TORCH_CHECK(0 <= step && step <= kLastStep - batches.size(1), op, ": step must be in [0, 2**62), got ", step);
  tensors.make_outputs();
  return network;
}

// As sort_networks, by all that training tells apart.
inline std::vector<int64_t> sort_networks(const StepTensors& tensors) {
  return sort_networks(tensors.activation.const_data_ptr<int32_t>(), tensors.optimizer.const_data_ptr<int32_t>(),
                       tensors.dropout.const_data_ptr<double>(), tensors.weights.size(0));
}

}  // namespace
}  // namespace fastws
