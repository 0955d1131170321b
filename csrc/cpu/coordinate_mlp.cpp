#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/coordinate_mlp_layers.h"
#include "cpu/memory.h"
#include "cpu/panels_bf16.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kGroup = 512;              // rows whose gradients are summed one after the other, at least
constexpr int64_t kGroups = 16;              // sums side by side, at most
constexpr int64_t kSums = int64_t(1) << 28;  // bytes of sums side by side

// Where the sums of a backward pass lie in one vector.
template <typename real_t, int kBytes>
struct Sums {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;

  const Mlp<real_t, kBytes>& mlp;
  std::array<int64_t, 3> tables;
  std::vector<int64_t> weights, biases;
  int64_t size = 0;

  explicit Sums(const Mlp<real_t, kBytes>& mlp) : mlp(mlp) {
    for (int axis = 0; axis < 3; ++axis) tables[axis] = take(mlp.tables[axis].size());
    for (const Packed<real_t>& layer : mlp.forward) {
      weights.push_back(take(mlp.squares * layer.tiles * P::kOuts * 2));
      biases.push_back(take(layer.tiles * P::kOuts));
    }
  }

  int64_t take(int64_t count) { return std::exchange(size, size + count); }

  template <typename scalar_t>
  void read_table(const Vectors<V>& sums, int axis, scalar_t* grad) const {
    const real_t* from = reinterpret_cast<const real_t*>(sums.data() + tables[axis]);
    const int64_t padded = mlp.squares * P::kRows, indices = mlp.tables[axis].size() / (mlp.squares * 2);
    for (int64_t i = 0; i < indices; ++i)
      for (int64_t k = 0; k < mlp.width; ++k) grad[i * mlp.width + k] = scalar_t(from[i * padded + k]);
  }

  template <typename scalar_t>
  void read_layer(const Vectors<V>& sums, int64_t j, int64_t outs, scalar_t* grad_weight, scalar_t* grad_bias) const {
    const real_t* from = reinterpret_cast<const real_t*>(sums.data() + weights[j]);
    const int64_t padded = mlp.forward[j].tiles * P::kOuts;
    for (int64_t o = 0; o < outs; ++o) {
      for (int64_t k = 0; k < mlp.width; ++k)
        grad_weight[o * mlp.width + k] = scalar_t(from[(k / P::kRows * padded + o) * P::kRows + k % P::kRows]);
      real_t total = 0;
      for (int lane = 0; lane < P::kCount; ++lane) total += sums.data()[biases[j] + o][lane];
      grad_bias[o] = scalar_t(total);
    }
  }
};

// Adds what some rows contribute to the gradients.
template <typename scalar_t, typename real_t, int kBytes>
void add_gradients(const Mlp<real_t, kBytes>& mlp, const Sums<real_t, kBytes>& places, const int64_t* rows,
                   const scalar_t* grad, int64_t count, typename Lanes<real_t, kBytes>::V* kept, int64_t kept_panels,
                   typename Lanes<real_t, kBytes>::V* sums) {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;
  Block<real_t, kBytes> block(mlp, mlp.panels(count), true, kept != nullptr, kept_panels);
  Vectors<V> grads(2 * block.most * mlp.stride), strips(block.most * mlp.squares * P::kRows * 2);
  std::vector<std::array<V*, 3>> targets(block.most * P::kRows);
  V *grad_x = grads.data(), *grad_before = grad_x + block.most * mlp.stride;
  const int64_t step = block.most * P::kRows;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t size = std::min(step, count - first);
    block.locate(rows + first, size);
    if (kept)
      block.start = kept + first / P::kRows * mlp.stride;
    else
      block.forward();
    std::fill(grad_x, grad_x + block.panels * mlp.stride, V{});
    for (int64_t row = 0; row < size; ++row)
      for (int64_t o = 0; o < mlp.outputs; ++o)
        block.entry(grad_x, row, o) = real_t(grad[(first + row) * mlp.outputs + o]);
    for (int64_t j = mlp.depth; j >= 0; --j) {
      transpose_panels<real_t, kBytes>(block.x(j), mlp.stride, block.panels, mlp.squares, strips.data());
      add_products<real_t, kBytes>(strips.data(), mlp.squares, grad_x, mlp.stride, block.panels, mlp.forward[j].tiles,
                                   sums + places.weights[j], sums + places.biases[j]);
      block.apply_backward(j, grad_x, grad_before);
      std::swap(grad_x, grad_before);
    }
    transpose_panels<real_t, kBytes>(grad_x, mlp.stride, block.panels, mlp.squares, strips.data());
    for (int64_t row = 0; row < size; ++row)
      for (int axis = 0; axis < 3; ++axis)
        targets[row][axis] = sums + places.tables[axis] + (block.places[row][axis] - mlp.tables[axis].data());
    add_to_rows<real_t, kBytes>(strips.data(), mlp.squares, size, block.panels * P::kRows, targets.data());
  }
}

// Calls body with the numbers of the call, those that are computed with, and the bytes of a vector.
template <typename Body>
void dispatch(ScalarType dtype, const Body& body) {
  dispatch_floating(dtype, "coordinate_mlp", [&]<typename scalar_t>() {
    if (has_wide_vectors())
      body.template operator()<scalar_t, real_type<scalar_t>, 64>();
    else
      body.template operator()<scalar_t, real_type<scalar_t>, 32>();
  });
}

// Panels of predictions of a block.
template <typename scalar_t, typename real_t, int kBytes>
struct Predict {
  using V = typename Lanes<real_t, kBytes>::V;

  explicit Predict(const Mlp<real_t, kBytes>&) {}
  void operator()(Block<real_t, kBytes>& block) const { block.predict(); }
};

#if defined(FASTWS_BF16)

// The same in products of bfloat16, where the processor has them.
template <>
struct Predict<torch::headeronly::BFloat16, float, 64> {
  std::vector<std::vector<int32_t>> weights;

  explicit Predict(const Mlp<float, 64>& mlp) {
    if (!has_bf16_products()) return;
    for (const Packed<float>& layer : mlp.forward) weights.push_back(pair_weights(layer));
  }

  // Neighbouring inputs of a layer, whose weights are numbers of 16 bits, in one integer.
  static std::vector<int32_t> pair_weights(const Packed<float>& layer) {
    const int64_t outs = Wide::kOuts, pairs = (layer.depth + 1) / 2;
    std::vector<int32_t> all(layer.tiles * pairs * outs);
    for (int64_t tile = 0; tile < layer.tiles; ++tile)
      for (int64_t in = 0; in < layer.depth; ++in)
        for (int64_t m = 0; m < outs; ++m) {
          const uint32_t bits = std::bit_cast<uint32_t>(layer.weights[(tile * layer.depth + in) * outs + m]);
          all[(tile * pairs + in / 2) * outs + m] |= int32_t(in % 2 == 0 ? bits >> 16 : bits);
        }
    return all;
  }

  void operator()(Block<float, 64>& block) const {
    if (weights.empty() || block.with_slopes) return block.predict();
    const Mlp<float, 64>& mlp = block.mlp;
    block.embed();
    for (int64_t panel = 0; panel < block.panels; ++panel)
      to_pairs(block.x(0) + panel * mlp.stride, mlp.squares * Wide::kRows,
               reinterpret_cast<Pairs*>(block.x(1)) + panel * mlp.stride);
    for (int64_t j = 0; j <= mlp.depth; ++j) {
      const Packed<float>& layer = mlp.forward[j];
      apply_pairs({weights[j].data(), layer.bias.data(), layer.tiles, (layer.depth + 1) / 2}, mlp.activation,
                  reinterpret_cast<const Pairs*>(block.x(j + 1)), mlp.stride, block.panels,
                  reinterpret_cast<Pairs*>(block.x(j)), j == mlp.depth ? block.predictions.data() : nullptr);
    }
  }
};

#endif

// Room for what the backward pass would compute again; enough for panels of any width.
std::array<int64_t, 3> kept_shape(const Arguments& a) {
  return {2 * (a.depth + 1), round_up(a.count, 32), round_up(std::max(a.width, a.outputs), 96)};
}

Tensor new_kept(const Tensor& like, const Arguments& a, bool keep) {
  const auto [layers, rows, columns] = kept_shape(a);
  const ScalarType dtype = sum_dtype(like.scalar_type());
  return keep ? new_empty(like, {layers, rows, columns}, dtype) : new_empty(like, {0}, dtype);
}

std::tuple<Tensor, Tensor> coordinate_mlp_cpu(const Tensor& layer_table, const Tensor& filter_table,
                                              const Tensor& channel_table, const Tensor& grid, const Tensor& rows,
                                              const Tensor& hidden_weights, const Tensor& hidden_biases,
                                              const Tensor& out_weight, const Tensor& out_bias, int64_t activation,
                                              bool keep) {
  const Arguments a(layer_table, filter_table, channel_table, grid, rows, hidden_weights, hidden_biases, out_weight,
                    out_bias);
  a.check("coordinate_mlp", activation);
  const Tensor predictions = new_empty(layer_table, {a.count, a.outputs}), kept = new_kept(layer_table, a, keep);
  if (a.count == 0) return {predictions, kept};

  dispatch(predictions.scalar_type(), [&]<typename scalar_t, typename real_t, int kBytes>() {
    using P = Panels<real_t, kBytes>;
    const Mlp<real_t, kBytes> mlp(a, Finish(activation), static_cast<const scalar_t*>(nullptr), false);
    const int64_t* kernels = a.rows.const_data_ptr<int64_t>();
    scalar_t* out = predictions.mutable_data_ptr<scalar_t>();
    auto* const keep_at = keep ? reinterpret_cast<typename P::V*>(kept.mutable_data_ptr<real_t>()) : nullptr;
    const int64_t panels = mlp.panels(a.count), step = panels * P::kRows, all = round_up(a.count, P::kRows) / P::kRows;
    const Predict<scalar_t, real_t, kBytes> predict(mlp);
    torch::stable::parallel_for(0, (a.count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      Block<real_t, kBytes> block(mlp, panels, keep, keep, all);
      for (int64_t first = begin * step; first < std::min(end * step, a.count); first += step) {
        const int64_t size = std::min(step, a.count - first);
        if (keep) block.start = keep_at + first / P::kRows * mlp.stride;
        block.locate(kernels + first, size);
        predict(block);
        for (int64_t row = 0; row < size; ++row)
          for (int64_t o = 0; o < mlp.outputs; ++o)
            out[(first + row) * mlp.outputs + o] = scalar_t(block.entry(block.predictions.data(), row, o));
      }
    });
  });
  return {predictions, kept};
}

// Sums of all rows. Groups of whole panels are summed on their own, and then in order, so that threads do not matter.
template <typename scalar_t, typename real_t, int kBytes>
Vectors<typename Lanes<real_t, kBytes>::V> sum_gradients(const Mlp<real_t, kBytes>& mlp,
                                                         const Sums<real_t, kBytes>& places, const int64_t* rows,
                                                         const scalar_t* grad, int64_t count,
                                                         typename Lanes<real_t, kBytes>::V* kept) {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;
  const int64_t panels = round_up(count, P::kRows) / P::kRows;
  const int64_t fit = std::max<int64_t>(1, kSums / (places.size * kBytes));
  const int64_t groups = std::clamp<int64_t>(count / kGroup, 1, std::min(kGroups, fit));
  std::vector<Vectors<V>> sums(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      sums[group] = Vectors<V>(places.size);
      const int64_t panel = panels * group / groups, first = panel * P::kRows;
      const int64_t size = std::min(panels * (group + 1) / groups * P::kRows, count) - first;
      if (size > 0)
        add_gradients<scalar_t, real_t, kBytes>(mlp, places, rows + first, grad + first * mlp.outputs, size,
                                                kept ? kept + panel * mlp.stride : nullptr, panels, sums[group].data());
    }
  });
  for (int64_t group = 1; group < groups; ++group) add<real_t, kBytes>(sums[group].data(), places.size, sums[0].data());
  return std::move(sums[0]);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients coordinate_mlp_backward_cpu(const Tensor& grad_, const Tensor& kept_, const Tensor& layer_table,
                                      const Tensor& filter_table, const Tensor& channel_table, const Tensor& grid,
                                      const Tensor& rows, const Tensor& hidden_weights, const Tensor& hidden_biases,
                                      const Tensor& out_weight, const Tensor& out_bias, int64_t activation) {
  const Arguments a(layer_table, filter_table, channel_table, grid, rows, hidden_weights, hidden_biases, out_weight,
                    out_bias);
  const Tensor grad = as_contiguous(grad_), kept = as_contiguous(kept_);
  a.check("coordinate_mlp_backward", activation);
  check_tensor("coordinate_mlp_backward", "grad", grad, a.tables[0].scalar_type(), {a.count, a.outputs});
  const auto [kept_layers, kept_rows, kept_columns] = kept_shape(a);
  const ScalarType kept_dtype = sum_dtype(grad.scalar_type());
  if (kept.numel() > 0)
    check_tensor("coordinate_mlp_backward", "kept", kept, kept_dtype, {kept_layers, kept_rows, kept_columns});
  const std::array<Tensor, 3> grad_tables = {torch::stable::empty_like(a.tables[0]),
                                             torch::stable::empty_like(a.tables[1]),
                                             torch::stable::empty_like(a.tables[2])};
  const Tensor grad_weights = torch::stable::empty_like(a.hidden_weights);
  const Tensor grad_biases = torch::stable::empty_like(a.hidden_biases);
  const Tensor grad_weight = torch::stable::empty_like(a.out_weight);
  const Tensor grad_bias = torch::stable::empty_like(a.out_bias);

  dispatch(grad.scalar_type(), [&]<typename scalar_t, typename real_t, int kBytes>() {
    const Mlp<real_t, kBytes> mlp(a, Finish(activation), static_cast<const scalar_t*>(nullptr), true);
    const Sums<real_t, kBytes> places(mlp);
    using V = typename Lanes<real_t, kBytes>::V;
    V* const kept_at = kept.numel() > 0 ? reinterpret_cast<V*>(kept.mutable_data_ptr<real_t>()) : nullptr;  // only read
    const auto sums = sum_gradients<scalar_t, real_t, kBytes>(mlp, places, a.rows.const_data_ptr<int64_t>(),
                                                              grad.const_data_ptr<scalar_t>(), a.count, kept_at);
    for (int axis = 0; axis < 3; ++axis)
      places.read_table(sums, axis, grad_tables[axis].template mutable_data_ptr<scalar_t>());
    for (int64_t j = 0; j < a.depth; ++j)
      places.read_layer(sums, j, a.width, grad_weights.mutable_data_ptr<scalar_t>() + j * a.width * a.width,
                        grad_biases.mutable_data_ptr<scalar_t>() + j * a.width);
    places.read_layer(sums, a.depth, a.outputs, grad_weight.mutable_data_ptr<scalar_t>(),
                      grad_bias.mutable_data_ptr<scalar_t>());
  });
  return {grad_tables[0], grad_tables[1], grad_tables[2], grad_weights, grad_biases, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("coordinate_mlp", TORCH_BOX(&coordinate_mlp_cpu));
  m.impl("coordinate_mlp_backward", TORCH_BOX(&coordinate_mlp_backward_cpu));
}

}  // namespace fastws
