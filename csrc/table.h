#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace fastws {

// One row of a layout table; docs/design.md says what the columns mean.
struct Layer {
  int64_t weight_offset, bias_offset, rows, row_length, block, units, chunks, first_token, first_out, first_in,
      first_bias;
};
static_assert(sizeof(Layer) == 11 * sizeof(int64_t));

// The layer that token n is in: the last one, from first to last - 1, whose first token is not behind n.
C10_HOST_DEVICE inline int64_t find_layer(const Layer* layers, int64_t first, int64_t last, int64_t token) {
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (layers[middle].first_token <= token ? first : last) = middle;
  }
  return first;
}

}  // namespace fastws
