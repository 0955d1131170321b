#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/trust.h"
#include "signed.h"
#include "table.h"

// What is looked at before tables of layouts and permutations are trusted.

namespace fastws {

inline const Layer* read_table(const char* op, const torch::stable::Tensor& table) {
  check_tensor(op, "table", table, torch::headeronly::ScalarType::Long, {kAny, sizeof(Layer) / sizeof(int64_t)});
  return reinterpret_cast<const Layer*>(table.const_data_ptr<int64_t>());
}

// Layers whose weights and biases lie in a flat vector, and whose entries follow each other in tokens; returns how many
// tokens they have.
inline int64_t check_layers(const char* op, const Layer* layers, int64_t count, int64_t numel, int64_t token_size) {
  int64_t tokens = 0, rest = 0;  // whole ones, and entries of the last one that is begun
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    const int64_t rows = layer.rows, length = layer.row_length, bias = layer.bias_offset >= 0;
    const bool lies = rows > 0 && length > 0 && layer.weight_offset >= 0 && layer.weight_offset <= numel &&
                      length <= (numel - layer.weight_offset) / rows &&
                      (bias == 0 || layer.bias_offset <= numel - rows);
    STD_TORCH_CHECK(lies, op, ": table must be of vectors of ", numel, " weights, got row ", l, " with others");
    const bool goes_on = layer.dense() && layer.first_token == tokens && layer.chunks == -rest;
    const bool begins_anew = layer.first_token == tokens + (rest > 0) && layer.chunks >= 0;
    const bool whole =
        token_size > 0 &&
        (layer.dense() || (layer.chunks - 1 <= length / token_size && layer.chunks * token_size >= length + bias));
    STD_TORCH_CHECK((goes_on || begins_anew) && whole, op, ": table must be made for tokens of ", token_size,
                    ", got row ", l, " of others");
    const int64_t entries = (goes_on ? rest : 0) + rows * (length + bias);
    tokens = layer.first_token + (layer.dense() ? entries / token_size : rows * layer.chunks);
    rest = layer.dense() ? entries % token_size : 0;
  }
  return tokens + (rest > 0);
}

// Layers that cover a flat vector without gaps.
inline void check_cover(const char* op, const Layer* layers, int64_t count, int64_t numel) {
  int64_t end = 0;
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    const bool fits = layer.rows > 0 && layer.row_length > 0 && layer.row_length <= (numel - end) / layer.rows;
    STD_TORCH_CHECK(layer.weight_offset == end && fits, op, ": table must cover vectors of ", numel,
                    " weights without gaps, got row ", l, " at weight ", layer.weight_offset, " in place of ", end);
    end += layer.rows * layer.row_length;
  }
  STD_TORCH_CHECK(end == numel, op, ": table must cover vectors of ", numel, " weights, got one of ", end);
}

// The largest number that each entry of a row of permutations may be: less than the units that its vectors move.
inline std::vector<uint32_t> find_largest(const char* op, const Layer* layers, int64_t count, int64_t indices) {
  std::vector<uint32_t> largest(indices, std::numeric_limits<uint32_t>::max());
  const auto bound = [&](int64_t first, int64_t size, int64_t l) {
    if (first < 0) return;
    const bool lies = size <= indices && first <= indices - size;
    STD_TORCH_CHECK(lies, op, ": table must point into permutations of ", indices, " entries, got row ", l, " at ",
                    first, " for ", size);
    for (int64_t i = first; i < first + size; ++i) largest[i] = std::min(largest[i], uint32_t(size - 1));
  };
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    if (layer.first_in >= 0) {
      const bool divides = layer.block > 0 && layer.units > 0 && layer.units <= layer.row_length / layer.block &&
                           layer.row_length % (layer.units * layer.block) == 0;
      STD_TORCH_CHECK(divides, op, ": table must have whole units in a row of ", layer.row_length, ", got row ", l,
                      " with ", layer.units, " units of ", layer.block);
    }
    bound(layer.first_out, layer.rows, l), bound(layer.first_in, layer.units, l),
        bound(layer.first_bias, layer.rows, l);
  }
  return largest;
}

// A row of permutations of which no index is larger than that; whether any unit is negated.
inline bool check_permutation(const char* op, const int32_t* permutations, int64_t b,
                              const std::vector<uint32_t>& largest) {
  const int64_t indices = largest.size();
  const int32_t* row = permutations + b * indices;
  bool bad = false;
  int32_t signs = 0;
  for (int64_t i = 0; i < indices; ++i) bad |= uint32_t(index_of(row[i])) > largest[i], signs |= row[i];
  for (int64_t i = 0; bad && i < indices; ++i)
    STD_TORCH_CHECK(uint32_t(index_of(row[i])) <= largest[i], op, ": permutations[", b, ", ", i, "] must be in [0, ",
                    largest[i], "], or ~ of that, got ", row[i]);
  return signs < 0;
}

}  // namespace fastws
