#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace fastws {

// One row of a layout table; docs/design.md says what the columns mean.
struct Layer {
  int64_t weight_offset, bias_offset, rows, row_length, block, units, chunks, first_token, first_out, first_in,
      first_bias;

  // Entries of a row in tokens: its weights, and its bias if it has one.
  C10_HOST_DEVICE int64_t row_entries() const { return row_length + (bias_offset >= 0); }
  // Whether rows follow each other without padding, so that a token may span several.
  C10_HOST_DEVICE bool dense() const { return chunks <= 0; }
  // Where the layer begins in a network's tokens, counted in entries.
  C10_HOST_DEVICE int64_t first_entry(int64_t token_size) const {
    return first_token * token_size - (dense() ? chunks : 0);
  }
  // Entries of tokens from the beginning of a row to that of the next.
  C10_HOST_DEVICE int64_t stride(int64_t token_size) const { return dense() ? row_entries() : chunks * token_size; }
  // Whether the layer begins at an entry of a token or before.
  C10_HOST_DEVICE bool begins_by(int64_t token, int64_t entry) const {
    return first_token < token || (first_token == token && (dense() ? -chunks : 0) <= entry);
  }
};
static_assert(sizeof(Layer) == 11 * sizeof(int64_t));

// The layer that an entry of a token is in: the last one, from first to last - 1, that does not begin behind it.
C10_HOST_DEVICE inline int64_t find_layer(const Layer* layers, int64_t first, int64_t last, int64_t token,
                                          int64_t entry) {
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (layers[middle].begins_by(token, entry) ? first : last) = middle;
  }
  return first;
}

}  // namespace fastws
