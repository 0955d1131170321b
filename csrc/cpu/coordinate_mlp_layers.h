#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/trust.h"

// An MLP on coordinates in the form in which blocks of rows run through it.

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMostKernels = int64_t(1) << 62;
constexpr int64_t kBlock = 256 * 1024;  // bytes of activations that layers hand on, in the second-level cache

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
      : tables{as_contiguous(layer_table), as_contiguous(filter_table), as_contiguous(channel_table)},
        grid(as_contiguous(grid_)),
        rows(as_contiguous(rows_)),
        hidden_weights(as_contiguous(hidden_weights_)),
        hidden_biases(as_contiguous(hidden_biases_)),
        out_weight(as_contiguous(out_weight_)),
        out_bias(as_contiguous(out_bias_)),
        count(rows.size(0)),
        width(tables[0].size(1)),
        depth(hidden_weights.size(0)),
        outputs(out_bias.size(0)) {}

  // Looks at all that is read by index.
  void check(const char* op, int64_t activation) const {
    const auto dtype = tables[0].scalar_type();
    const char* const names[] = {"layer_table", "filter_table", "channel_table"};
    for (int axis = 0; axis < 3; ++axis) {
      check_tensor(op, names[axis], tables[axis], dtype, {kAny, width});
      STD_TORCH_CHECK(tables[axis].numel() > 0, op, ": ", names[axis], " must not be empty, got ",
                      shape_of(tables[axis].sizes()));
    }
    check_tensor(op, "grid", grid, torch::headeronly::ScalarType::Long, {kAny, 2});
    check_tensor(op, "rows", rows, torch::headeronly::ScalarType::Long, {kAny});
    check_tensor(op, "hidden_weights", hidden_weights, dtype, {depth, width, width});
    check_tensor(op, "hidden_biases", hidden_biases, dtype, {depth, width});
    check_tensor(op, "out_weight", out_weight, dtype, {outputs, width});
    check_tensor(op, "out_bias", out_bias, dtype, {outputs});
    STD_TORCH_CHECK(outputs > 0, op, ": out_bias must hold at least 1 number, got 0");
    constexpr int64_t kLast = int64_t(Finish::kElu);
    STD_TORCH_CHECK(0 <= activation && activation <= kLast, op, ": activation must be in [0, ", kLast, "], got ",
                    activation);
    check_range(op, "rows", rows.const_data_ptr<int64_t>(), count, 0, count_kernels(op));
  }

 private:
  int64_t count_kernels(const char* op) const {
    const int64_t layers = grid.size(0), *sizes = grid.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(layers <= tables[0].size(0), op, ": layer_table must have a row for each of ", layers,
                    " layers, got ", tables[0].size(0));
    int64_t kernels = 0;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t filters = sizes[2 * layer], channels = sizes[2 * layer + 1];
      const bool lies = 0 < filters && filters <= tables[1].size(0) && 0 < channels && channels <= tables[2].size(0) &&
                        filters <= (kMostKernels - kernels) / channels;
      STD_TORCH_CHECK(lies, op, ": grid must have 1 to ", tables[1].size(0), " filters and 1 to ", tables[2].size(0),
                      " channels in a layer, as there are in the tables, got ", filters, " and ", channels);
      kernels += filters * channels;
    }
    return kernels;
  }
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

// A block of rows on its way through the network. Activations of each layer are kept, and their slopes where they do
// not follow from these, here or in kept, [2 * layers, kept_panels, stride]; without slopes, two layers take turns.
template <typename real_t, int kBytes>
struct Block {
  using P = Panels<real_t, kBytes>;
  using V = typename P::V;

  const Mlp<real_t, kBytes>& mlp;
  const int64_t most;  // panels
  const bool with_slopes;
  const int64_t layer_stride;
  Vectors<V> zeros, storage, predictions;
  V* start;                                     // of the block
  std::vector<std::array<const V*, 3>> places;  // of each row in the tables
  int64_t panels = 0;

  Block(const Mlp<real_t, kBytes>& mlp, int64_t most, bool with_slopes, bool elsewhere, int64_t kept_panels)
      : mlp(mlp),
        most(most),
        with_slopes(with_slopes),
        layer_stride((elsewhere ? kept_panels : most) * mlp.stride),
        zeros(2 * mlp.squares),
        storage(elsewhere ? 0 : (with_slopes ? 2 * (mlp.depth + 1) : 2) * layer_stride),
        predictions(most * mlp.stride),
        start(storage.data()),
        places(most * P::kRows) {}

  V* x(int64_t layer) const { return start + (with_slopes ? layer : layer % 2) * layer_stride; }
  V* slope(int64_t layer) const { return with_slopes ? start + (mlp.depth + 1 + layer) * layer_stride : nullptr; }

  // Where the activation of a layer writes its slope, if anywhere.
  V* stored_slope(int64_t layer) const { return slope_of(mlp.activation) == Finish::kSlope ? slope(layer) : nullptr; }

  // The gradient before an activation, from that behind the next layer.
  void apply_backward(int64_t layer, const V* from, V* to) const {
    const Finish kind = slope_of(mlp.activation);
    apply_to(mlp.backward[layer], kind, from, to, kind == Finish::kSlope ? slope(layer) : x(layer));
  }

  // Finds the coordinates of rows; the last panel is filled up with zeros.
  void locate(const int64_t* rows, int64_t count) {
    panels = (count + P::kRows - 1) / P::kRows;
    for (int64_t row = 0; row < panels * P::kRows; ++row) {
      places[row] = {zeros.data(), zeros.data(), zeros.data()};
      if (row >= count) continue;
      const std::array<int64_t, 3> coordinates = mlp.coordinates(rows[row]);
      for (int axis = 0; axis < 3; ++axis)
        places[row][axis] = mlp.tables[axis].data() + coordinates[axis] * mlp.squares * 2;
    }
  }

  // The first activation.
  void embed() const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t place = panel * mlp.stride;
      add_rows<real_t, kBytes>(&places[panel * P::kRows], mlp.squares, mlp.activation, x(0) + place,
                               stored_slope(0) ? stored_slope(0) + place : nullptr);
    }
  }

  // All but the last layer.
  void forward() const {
    embed();
    for (int64_t j = 0; j < mlp.depth; ++j)
      apply_to(mlp.forward[j], mlp.activation, x(j), x(j + 1), stored_slope(j + 1));
  }

  void predict() {
    forward();
    apply_to(mlp.forward.back(), Finish::kNothing, x(mlp.depth), predictions.data(), nullptr);
  }

  void apply_to(const Packed<real_t>& layer, Finish kind, const V* from, V* to, V* slope) const {
    apply<real_t, kBytes>(layer.linear(), kind, from, mlp.stride, panels, to, mlp.stride, slope);
  }

  // Entry [row, column] of panels.
  real_t& entry(V* from, int64_t row, int64_t column) const {
    return reinterpret_cast<real_t*>(from + row / P::kRows * mlp.stride)[column * P::kRows + row % P::kRows];
  }
};

}  // namespace
}  // namespace fastws
