#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/panels_bf16.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256 * 1024;       // bytes of activations that layers hand on, in the second-level cache
constexpr int64_t kGroup = 512;              // rows whose gradients are summed one after the other, at least
constexpr int64_t kGroups = 16;              // sums side by side, at most
constexpr int64_t kSums = int64_t(1) << 28;  // bytes of sums side by side

// What half precision is computed in.
template <typename scalar_t>
using real_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The arguments of a call, contiguous.
struct Arguments {
  std::array<Tensor, 3> tables;
  Tensor grid, rows, hidden_weights, hidden_biases, out_weight, out_bias;
  int64_t count, width, depth, outputs;

  Arguments(const Tensor& layer_table, const Tensor& filter_table, const Tensor& channel_table, const Tensor& grid_,
            const Tensor& rows_, const Tensor& hidden_weights_, const Tensor& hidden_biases_, const Tensor& out_weight_,
            const Tensor& out_bias_)
      : tables{torch::stable::contiguous(layer_table), torch::stable::contiguous(filter_table),
               torch::stable::contiguous(channel_table)},
        grid(torch::stable::contiguous(grid_)),
        rows(torch::stable::contiguous(rows_)),
        hidden_weights(torch::stable::contiguous(hidden_weights_)),
        hidden_biases(torch::stable::contiguous(hidden_biases_)),
        out_weight(torch::stable::contiguous(out_weight_)),
        out_bias(torch::stable::contiguous(out_bias_)),
        count(rows.size(0)),
        width(tables[0].size(1)),
        depth(hidden_weights.size(0)),
        outputs(out_bias.size(0)) {}
};

// A matrix and a bias in tiles. Padding is zero, which all activations keep.
template <typename real_t>
struct Packed {
  std::vector<real_t> weights, bias;
  int64_t tiles, depth;

  // weight(out, in) and bias(out) say what the layer is.
  template <typename Weight, typename Bias>
  Packed(int64_t outs, int64_t depth, int64_t tile, const Weight& weight, const Bias& bias_of)
      : tiles((outs + tile - 1) / tile), depth(depth) {
    weights.resize(tiles * tile * depth);
    bias.resize(tiles * tile);
    for (int64_t out = 0; out < outs; ++out) {
      for (int64_t in = 0; in < depth; ++in)
        weights[(out / tile * depth + in) * tile + out % tile] = real_t(weight(out, in));
      bias[out] = real_t(bias_of(out));
    }
  }

  Linear<real_t> linear() const { return {weights.data(), bias.data(), tiles, depth}; }
};

// The network, in tiles, and where the kernels of each layer of the other network begin.
template <typename real_t, int kBytes>
struct Mlp {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;

  int64_t width, depth, outputs;
  Finish activation;
  int64_t squares, stride;                        // kRows columns each of a row of a table; vectors of a panel
  std::array<Vectors<V>, 3> tables;               // [indices, squares * 2]
  std::vector<Packed<real_t>> forward, backward;  // hidden layers and the last; the same transposed
  std::vector<int64_t> starts, channels;

  template <typename scalar_t>
  Mlp(const Arguments& a, Finish activation, const scalar_t*, bool with_backward)
      : width(a.width),
        depth(a.depth),
        outputs(a.outputs),
        activation(activation),
        squares((a.width + P::kRows - 1) / P::kRows),
        stride(2 * std::max(squares * P::kRows, round_up(std::max(a.width, a.outputs), P::kOuts))) {
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t indices = a.tables[axis].size(0);
      const scalar_t* from = a.tables[axis].template const_data_ptr<scalar_t>();
      tables[axis] = Vectors<V>(indices * squares * 2);
      real_t* to = reinterpret_cast<real_t*>(tables[axis].data());
      for (int64_t i = 0; i < indices; ++i) std::copy_n(from + i * width, width, to + i * squares * P::kRows);
    }
    for (int64_t j = 0; j <= depth; ++j) {
      const bool last = j == depth;
      const int64_t outs = last ? outputs : width;
      const Tensor &weights = last ? a.out_weight : a.hidden_weights, &biases = last ? a.out_bias : a.hidden_biases;
      const scalar_t* w = weights.template const_data_ptr<scalar_t>() + (last ? 0 : j * width * width);
      const scalar_t* b = biases.template const_data_ptr<scalar_t>() + (last ? 0 : j * width);
      forward.emplace_back(
          outs, width, P::kOuts, [=, this](int64_t o, int64_t k) { return w[o * width + k]; },
          [=](int64_t o) { return b[o]; });
      if (with_backward)
        backward.emplace_back(
            width, outs, P::kOuts, [=, this](int64_t k, int64_t o) { return w[o * width + k]; },
            [](int64_t) { return 0; });
    }
    const int64_t* sizes = a.grid.const_data_ptr<int64_t>();
    starts.push_back(0);
    for (int64_t layer = 0; layer < a.grid.size(0); ++layer) {
      starts.push_back(starts.back() + sizes[2 * layer] * sizes[2 * layer + 1]);
      channels.push_back(sizes[2 * layer + 1]);
    }
  }

  // Layer, filter and channel of a kernel.
  std::array<int64_t, 3> coordinates(int64_t row) const {
    const int64_t layer = std::upper_bound(starts.begin(), starts.end(), row) - starts.begin() - 1;
    const int64_t within = row - starts[layer];
    return {layer, within / channels[layer], within % channels[layer]};
  }

  // Panels of a block, so that what one layer hands on stays in cache; wide layers need several all the same, or each
  // would read all weights.
  int64_t panels(int64_t rows) const {
    const int64_t fit = std::clamp<int64_t>(kBlock / (2 * stride * kBytes), 4, 8);
    return std::min(fit, (rows + P::kRows - 1) / P::kRows);
  }
};

// A block of rows on its way through the network.
template <typename real_t, int kBytes>
struct Block {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;

  const Mlp<real_t, kBytes>& mlp;
  const int64_t most;  // panels
  const bool with_slopes;
  Vectors<V> zeros;                             // a row of a table
  Vectors<V> x, slopes;                         // of each layer, or of two in turns
  std::vector<std::array<const V*, 3>> places;  // of each row in the tables
  int64_t panels = 0;

  Block(const Mlp<real_t, kBytes>& mlp, int64_t most, bool with_slopes)
      : mlp(mlp),
        most(most),
        with_slopes(with_slopes),
        zeros(2 * mlp.squares),
        x((with_slopes ? mlp.depth + 1 : 2) * most * mlp.stride),
        slopes(with_slopes ? x.size() : 0),
        places(most * P::kRows) {}

  V* at(Vectors<V>& all, int64_t layer) {
    return all.size() == 0 ? nullptr : all.data() + (with_slopes ? layer : layer % 2) * most * mlp.stride;
  }

  // Input of the first activation, and its activation.
  void embed(const int64_t* rows, int64_t count) {
    panels = (count + P::kRows - 1) / P::kRows;
    for (int64_t row = 0; row < panels * P::kRows; ++row) {
      places[row] = {zeros.data(), zeros.data(), zeros.data()};
      if (row >= count) continue;
      const std::array<int64_t, 3> coordinates = mlp.coordinates(rows[row]);
      for (int axis = 0; axis < 3; ++axis)
        places[row][axis] = mlp.tables[axis].data() + coordinates[axis] * mlp.squares * 2;
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      V* const slope = slopes.size() == 0 ? nullptr : slopes.data() + panel * mlp.stride;
      add_rows<real_t, kBytes>(&places[panel * P::kRows], mlp.squares, mlp.activation, x.data() + panel * mlp.stride,
                               slope);
    }
  }

  // All but the last layer.
  void forward(const int64_t* rows, int64_t count) {
    embed(rows, count);
    for (int64_t j = 0; j < mlp.depth; ++j)
      apply_to(mlp.forward[j], mlp.activation, at(x, j), at(x, j + 1), at(slopes, j + 1));
  }

  // Panels of predictions.
  V* predict(const int64_t* rows, int64_t count) {
    forward(rows, count);
    apply_to(mlp.forward.back(), Finish::kNothing, at(x, mlp.depth), at(x, mlp.depth + 1), nullptr);
    return at(x, mlp.depth + 1);
  }

  void apply_to(const Packed<real_t>& layer, Finish kind, const V* from, V* to, V* slope) const {
    apply<real_t, kBytes>(layer.linear(), kind, from, mlp.stride, panels, to, mlp.stride, slope);
  }

  // Entry [row, column] of panels.
  real_t& entry(V* from, int64_t row, int64_t column) const {
    return reinterpret_cast<real_t*>(from + row / P::kRows * mlp.stride)[column * P::kRows + row % P::kRows];
  }
};

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
                   const scalar_t* grad, int64_t count, typename Lanes<real_t, kBytes>::V* sums) {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;
  Block<real_t, kBytes> block(mlp, mlp.panels(count), true);
  Vectors<V> grads(2 * block.most * mlp.stride), strips(block.most * mlp.squares * P::kRows * 2);
  std::vector<std::array<V*, 3>> targets(block.most * P::kRows);
  V *grad_x = grads.data(), *grad_before = grad_x + block.most * mlp.stride;
  const int64_t step = block.most * P::kRows;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t size = std::min(step, count - first);
    block.forward(rows + first, size);
    std::fill(grad_x, grad_x + block.panels * mlp.stride, V{});
    for (int64_t row = 0; row < size; ++row)
      for (int64_t o = 0; o < mlp.outputs; ++o)
        block.entry(grad_x, row, o) = real_t(grad[(first + row) * mlp.outputs + o]);
    for (int64_t j = mlp.depth; j >= 0; --j) {
      transpose_panels<real_t, kBytes>(block.at(block.x, j), mlp.stride, block.panels, mlp.squares, strips.data());
      add_products<real_t, kBytes>(strips.data(), mlp.squares, grad_x, mlp.stride, block.panels, mlp.forward[j].tiles,
                                   sums + places.weights[j], sums + places.biases[j]);
      block.apply_to(mlp.backward[j], Finish::kSlope, grad_x, grad_before, block.at(block.slopes, j));
      std::swap(grad_x, grad_before);
    }
    transpose_panels<real_t, kBytes>(grad_x, mlp.stride, block.panels, mlp.squares, strips.data());
    for (int64_t row = 0; row < size; ++row)
      for (int axis = 0; axis < 3; ++axis)
        targets[row][axis] = sums + places.tables[axis] + (block.places[row][axis] - mlp.tables[axis].data());
    add_to_rows<real_t, kBytes>(strips.data(), mlp.squares, size, block.panels * P::kRows, targets.data());
  }
}

bool has_wide_vectors() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
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
  V* operator()(Block<real_t, kBytes>& block, const int64_t* rows, int64_t count) const {
    return block.predict(rows, count);
  }
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

  Floats* operator()(Block<float, 64>& block, const int64_t* rows, int64_t count) const {
    if (weights.empty()) return block.predict(rows, count);
    const Mlp<float, 64>& mlp = block.mlp;
    block.embed(rows, count);
    for (int64_t panel = 0; panel < block.panels; ++panel) {
      const int64_t place = panel * mlp.stride;
      to_pairs(block.at(block.x, 0) + place, mlp.squares * Wide::kRows,
               reinterpret_cast<Pairs*>(block.at(block.x, 1)) + place);
    }
    for (int64_t j = 0; j <= mlp.depth; ++j) {
      const Packed<float>& layer = mlp.forward[j];
      Floats *from = block.at(block.x, j + 1), *to = block.at(block.x, j);
      apply_pairs({weights[j].data(), layer.bias.data(), layer.tiles, (layer.depth + 1) / 2}, mlp.activation,
                  reinterpret_cast<const Pairs*>(from), mlp.stride, block.panels, reinterpret_cast<Pairs*>(to),
                  j == mlp.depth ? to : nullptr);
    }
    return block.at(block.x, mlp.depth);
  }
};

#endif

Tensor coordinate_mlp_cpu(const Tensor& layer_table, const Tensor& filter_table, const Tensor& channel_table,
                          const Tensor& grid, const Tensor& rows, const Tensor& hidden_weights,
                          const Tensor& hidden_biases, const Tensor& out_weight, const Tensor& out_bias,
                          int64_t activation) {
  const Arguments a(layer_table, filter_table, channel_table, grid, rows, hidden_weights, hidden_biases, out_weight,
                    out_bias);
  const Tensor predictions = new_empty(layer_table, {a.count, a.outputs});
  if (a.count == 0) return predictions;

  dispatch(predictions.scalar_type(), [&]<typename scalar_t, typename real_t, int kBytes>() {
    using P = Panels<real_t, kBytes>;
    const Mlp<real_t, kBytes> mlp(a, Finish(activation), static_cast<const scalar_t*>(nullptr), false);
    const int64_t* kernels = a.rows.const_data_ptr<int64_t>();
    scalar_t* out = predictions.mutable_data_ptr<scalar_t>();
    const int64_t panels = mlp.panels(a.count), step = panels * P::kRows;
    const Predict<scalar_t, real_t, kBytes> predict(mlp);
    torch::stable::parallel_for(0, (a.count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      Block<real_t, kBytes> block(mlp, panels, false);
      for (int64_t first = begin * step; first < std::min(end * step, a.count); first += step) {
        const int64_t size = std::min(step, a.count - first);
        auto* const y = predict(block, kernels + first, size);
        for (int64_t row = 0; row < size; ++row)
          for (int64_t o = 0; o < mlp.outputs; ++o)
            out[(first + row) * mlp.outputs + o] = scalar_t(block.entry(y, row, o));
      }
    });
  });
  return predictions;
}

// Sums of all rows. Groups of rows are summed on their own, and then in order, so that threads do not matter.
template <typename scalar_t, typename real_t, int kBytes>
Vectors<typename Lanes<real_t, kBytes>::V> sum_gradients(const Mlp<real_t, kBytes>& mlp,
                                                         const Sums<real_t, kBytes>& places, const int64_t* rows,
                                                         const scalar_t* grad, int64_t count) {
  using V = typename Lanes<real_t, kBytes>::V;
  const int64_t fit = std::max<int64_t>(1, kSums / (places.size * kBytes));
  const int64_t groups = std::clamp<int64_t>(count / kGroup, 1, std::min(kGroups, fit));
  std::vector<Vectors<V>> sums(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      sums[group] = Vectors<V>(places.size);
      const int64_t first = count * group / groups, size = count * (group + 1) / groups - first;
      if (size > 0)
        add_gradients<scalar_t, real_t, kBytes>(mlp, places, rows + first, grad + first * mlp.outputs, size,
                                                sums[group].data());
    }
  });
  for (int64_t group = 1; group < groups; ++group) add<real_t, kBytes>(sums[group].data(), places.size, sums[0].data());
  return std::move(sums[0]);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients coordinate_mlp_backward_cpu(const Tensor& grad_, const Tensor& layer_table, const Tensor& filter_table,
                                      const Tensor& channel_table, const Tensor& grid, const Tensor& rows,
                                      const Tensor& hidden_weights, const Tensor& hidden_biases,
                                      const Tensor& out_weight, const Tensor& out_bias, int64_t activation) {
  const Arguments a(layer_table, filter_table, channel_table, grid, rows, hidden_weights, hidden_biases, out_weight,
                    out_bias);
  const Tensor grad = torch::stable::contiguous(grad_);
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
    const auto sums = sum_gradients<scalar_t, real_t, kBytes>(mlp, places, a.rows.const_data_ptr<int64_t>(),
                                                              grad.const_data_ptr<scalar_t>(), a.count);
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
