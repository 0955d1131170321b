#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/memory.h"
#include "cpu/random/draw.h"
#include "cpu/rows.h"
#include "cpu/trust_tables.h"
#include "dispatch.h"
#include "table.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLargestGroup = (int64_t(1) << 31) - 1;

// Rows begin to end of one tensor of one checkpoint. Inverse: from and to change roles, row by row.
template <bool kInverse, bool kSigned, typename scalar_t>
void permute_rows(const Layer& layer, const int32_t* permutations, const scalar_t* from, scalar_t* to, int64_t begin,
                  int64_t end) {
  const int64_t length = layer.row_length;
  const int32_t *out = permutation_at(permutations, layer.first_out),
                *in = permutation_at(permutations, layer.first_in);
  from += layer.weight_offset, to += layer.weight_offset;
  if (out == nullptr && in == nullptr) return copy(from + begin * length, to + begin * length, (end - begin) * length);
  NearRow<scalar_t> near;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t other = out == nullptr ? row : kSigned ? index_of(out[row]) : out[row];
    const int32_t negative = kSigned && out != nullptr ? sign_of(out[row]) : 0;
    const scalar_t* source = from + (kInverse ? row : other) * length;
    scalar_t* target = to + (kInverse ? other : row) * length;
    if (in == nullptr && negative == 0) {
      copy(source, target, length);
    } else if (in == nullptr) {
      copy_signed(source, target, length, negative);
    } else if constexpr (kInverse) {
      move_row<true, kSigned, scalar_t>(target, source, in, layer.block, layer.units, negative, 0, length);
    } else {
      if (near.fits(layer)) source = near.hold(layer, source);
      move_row<false, kSigned, scalar_t>(source, target, in, layer.block, layer.units, negative, 0, length);
    }
  }
}

// Permutes the weights from begin to end, which count through the whole batch, cut at whole rows: a row belongs to the
// range in which it begins.
template <typename scalar_t>
void permute_range(const Layer* layers, int64_t num_layers, int64_t numel, const int32_t* permutations, int64_t indices,
                   const char* has_signs, const scalar_t* from, scalar_t* to, bool inverse, int64_t begin,
                   int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t checkpoint = i / numel, weight = i % numel;
    const auto behind = [](int64_t w, const Layer& layer) { return w < layer.weight_offset; };
    const Layer& layer = *(std::upper_bound(layers, layers + num_layers, weight, behind) - 1);
    const int64_t length = layer.row_length, first = weight - layer.weight_offset;
    const int64_t left = std::min(end - i, layer.rows * length - first);
    const int64_t row = (first + length - 1) / length, last = (first + left + length - 1) / length;
    const auto plain = inverse ? &permute_rows<true, false, scalar_t> : &permute_rows<false, false, scalar_t>;
    const auto negating = inverse ? &permute_rows<true, true, scalar_t> : &permute_rows<false, true, scalar_t>;
    const auto rows = has_signs[checkpoint] ? negating : plain;
    rows(layer, permutations + checkpoint * indices, from + checkpoint * numel, to + checkpoint * numel, row, last);
    i += left;
  }
}

Tensor permute_cpu(const Tensor& flat_, const Tensor& table_, const Tensor& permutations_, bool inverse) {
  const Tensor flat = as_contiguous(flat_), table = as_contiguous(table_);
  const Tensor permutations = as_contiguous(permutations_);
  check_tensor("permute", "flat", flat, flat.scalar_type(), {kAny, kAny});
  const Layer* layers = read_table("permute", table);
  const int64_t batch = flat.size(0), numel = flat.size(1), num_layers = table.size(0);
  check_tensor("permute", "permutations", permutations, torch::headeronly::ScalarType::Int, {batch, kAny});
  const int64_t indices = permutations.size(1);
  const int32_t* index = permutations.const_data_ptr<int32_t>();
  check_cover("permute", layers, num_layers, numel);
  const std::vector<uint32_t> largest = find_largest("permute", layers, num_layers, indices);
  std::vector<char> signs(batch);
  for (int64_t b = 0; b < batch; ++b) signs[b] = check_permutation("permute", index, b, largest);
  const Tensor permuted = new_empty(flat, {batch, numel});

  dispatch_floating(flat.scalar_type(), "permute", [&]<typename scalar_t>() {
    const scalar_t* from = flat.const_data_ptr<scalar_t>();
    scalar_t* to = permuted.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, batch * numel, 16384, [=, &signs](int64_t begin, int64_t end) {
      permute_range(layers, num_layers, numel, index, indices, signs.data(), from, to, inverse, begin, end);
    });
  });
  return permuted;
}

// One draw of all groups, of which the words begin at word first of the stream.
void shuffle_groups(const int64_t* starts, int64_t groups, uint64_t seed, uint64_t offset, int64_t first,
                    int32_t* permutation) {
  constexpr int64_t kWords = 32 * kPhiloxWords;
  uint32_t words[kWords];
  int64_t drawn = 0, end = 0;  // the words of the stream that are at hand
  for (int64_t group = 0; group < groups; ++group) {
    int32_t* entries = permutation + starts[group];
    const int64_t size = starts[group + 1] - starts[group], begin = first + starts[group];
    for (int64_t i = 0; i < size;) {
      if (begin + i >= end) {
        drawn = (begin + i) / 4 * 4;
        const int64_t left = (first + starts[groups] - drawn + kPhiloxWords - 1) / kPhiloxWords * kPhiloxWords;
        end = drawn + std::min(left, kWords);
        draw_words(seed, offset, drawn / 4, (end - drawn) / 4, words);
      }
      const uint32_t* word = words + (begin - drawn);
#pragma GCC unroll 8
      for (const int64_t last = std::min(size, end - begin); i < last; ++i) {
        const int64_t j = word[i] * uint64_t(i + 1) >> 32;
        entries[i] = entries[j], entries[j] = int32_t(i);
      }
    }
  }
}

// Groups that follow each other, of which the last ends at total.
void check_starts(const Tensor& starts, int64_t total) {
  check_tensor("random_permutations", "starts", starts, torch::headeronly::ScalarType::Long, {kAny});
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t count = starts.size(0);
  const bool ends = count > 0 && start[0] == 0 && start[count - 1] == total;
  STD_TORCH_CHECK(ends, "random_permutations: starts must go from 0 to total, ", total, ", got others");
  for (int64_t group = 1; group < count; ++group) {
    const bool follows = start[group] >= start[group - 1] && start[group] - start[group - 1] <= kLargestGroup;
    STD_TORCH_CHECK(follows, "random_permutations: starts must be of groups of 0 to 2**31 - 1 units, got ",
                    start[group - 1], " before ", start[group]);
  }
}

Tensor random_permutations_cpu(const Tensor& starts_, int64_t total, int64_t batch, int64_t seed, int64_t offset) {
  const Tensor starts = as_contiguous(starts_);
  check_starts(starts, total);
  const Tensor permutations = torch::stable::new_empty(starts, {batch, total}, torch::headeronly::ScalarType::Int);
  const int64_t* start = starts.const_data_ptr<int64_t>();
  int32_t* to = permutations.mutable_data_ptr<int32_t>();
  const int64_t groups = starts.size(0) - 1, grain = 1 + 4096 / (total + 1);
  torch::stable::parallel_for(0, batch, grain, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) shuffle_groups(start, groups, seed, offset, b * total, to + b * total);
  });
  return permutations;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("permute", TORCH_BOX(&permute_cpu));
  m.impl("random_permutations", TORCH_BOX(&random_permutations_cpu));
}

}  // namespace fastws
