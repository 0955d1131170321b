#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/memory.h"
#include "cpu/random/integers.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 16;  // columns that are filled one after the other

// A column of an alias table, a row of the tensor.
struct Column {
  int64_t share;  // of 2^kFractionBits, that the alias gets
  int64_t alias;
};

// Integer weights, and how much each has beyond its column. Chunks are filled side by side: what the light weights
// before a chunk leave empty, and what the heavy ones exceed, says where each chunk has to begin.
struct Weights {
  const int64_t* weights;
  int64_t count, whole, extra;
  std::vector<int64_t> empty, excess;  // sums before each chunk, and over all

  int64_t capacity(int64_t i) const { return whole + (i < extra); }
  int64_t beyond(int64_t i) const { return weights[i] - capacity(i); }
  int64_t last(int64_t chunk) const { return std::min(count, (chunk + 1) * kChunk); }

  // share in the way of the reference, bit for bit
  Column column(int64_t i, int64_t given, int64_t alias) const {
    return {int64_t(double(given) / double(capacity(i)) * double(int64_t(1) << kFractionBits)), alias};
  }
};

// The last chunk before which the sum is at most value.
inline int64_t chunk_of(const std::vector<int64_t>& sums, int64_t value) {
  return std::upper_bound(sums.begin(), sums.end() - 1, value) - sums.begin() - 1;
}

void sum_chunk(Weights& w, int64_t chunk) {
  int64_t empty = 0, excess = 0;
  for (int64_t i = chunk * kChunk; i < w.last(chunk); ++i) {
    const int64_t beyond = w.beyond(i);
    empty += std::max<int64_t>(-beyond, 0), excess += std::max<int64_t>(beyond, 0);
  }
  w.empty[chunk + 1] = empty, w.excess[chunk + 1] = excess;
}

// Light weights: the alias is the first heavy weight whose excess ends behind the beginning of the empty part.
void fill_lights(const Weights& w, int64_t chunk, Column* columns) {
  int64_t begin = w.empty[chunk];
  const int64_t from = chunk_of(w.excess, begin);
  int64_t end = w.excess[from], heavy = from * kChunk - 1;
  for (int64_t i = chunk * kChunk; i < w.last(chunk); ++i) {
    const int64_t beyond = w.beyond(i);
    if (beyond >= 0) continue;
    while (end <= begin) end += std::max<int64_t>(w.beyond(++heavy), 0);
    columns[i] = w.column(i, -beyond, heavy);
    begin -= beyond;
  }
}

// Heavy weights: the alias is the next heavy weight, which gives back what the last empty part has taken too much.
void fill_heavies(const Weights& w, int64_t chunk, Column* columns) {
  int64_t end = w.excess[chunk];
  const int64_t from = chunk_of(w.empty, end);
  int64_t behind = w.empty[from], light = from * kChunk - 1, before = -1;
  for (int64_t i = chunk * kChunk; i < w.last(chunk); ++i) {
    const int64_t beyond = w.beyond(i);
    if (beyond < 0) continue;
    end += beyond;
    while (behind < end) behind += std::max<int64_t>(-w.beyond(++light), 0);
    columns[i] = w.column(i, behind - end, i);
    if (before >= 0) columns[before].alias = i;
    before = i;
  }
  int64_t next = w.last(chunk);
  while (before >= 0 && next < w.count && w.beyond(next) < 0) ++next;
  if (before >= 0 && next < w.count) columns[before].alias = next;
}

Tensor alias_table_cpu(const Tensor& weights_) {
  const Tensor weights = torch::stable::contiguous(weights_);
  const int64_t count = weights.size(0), chunks = (count + kChunk - 1) / kChunk;
  const Tensor table = new_empty(weights, {count, 2});
  Column* columns = reinterpret_cast<Column*>(table.mutable_data_ptr<int64_t>());
  const int64_t* weight = weights.const_data_ptr<int64_t>();
  const int64_t total = std::accumulate(weight, weight + count, int64_t(0));
  if (count == 0) return table;
  Weights w = {weight, count, total / count, total % count};
  w.empty.resize(chunks + 1), w.excess.resize(chunks + 1);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) sum_chunk(w, chunk);
  });
  std::partial_sum(w.empty.begin(), w.empty.end(), w.empty.begin());
  std::partial_sum(w.excess.begin(), w.excess.end(), w.excess.begin());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      fill_lights(w, chunk, columns);
      fill_heavies(w, chunk, columns);
    }
  });
  return table;
}

Tensor weighted_sample_cpu(const Tensor& columns_, int64_t first, int64_t count, int64_t seed, int64_t offset) {
  const Tensor columns = torch::stable::contiguous(columns_);
  const Tensor sample = new_empty(columns, {count});
  const Column* column = reinterpret_cast<const Column*>(columns.const_data_ptr<int64_t>());
  const int64_t bound = columns.size(0);
  int64_t* out = sample.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(first, first + count, 8 * kDraws, [=](int64_t begin, int64_t end) {
    uint64_t numbers[kDraws];
    while (begin < end) {
      const int64_t drawn = draw_numbers(seed, offset, begin, end, numbers);
      for (int64_t i = 0; i < drawn; ++i) __builtin_prefetch(column + draw_below(numbers[i], bound).integer);
      for (int64_t i = 0; i < drawn; ++i) {
        const Draw draw = draw_below(numbers[i], bound);
        const Column& found = column[draw.integer];
        out[begin - first + i] = draw.fraction < found.share ? found.alias : draw.integer;
      }
      begin += drawn;
    }
  });
  return sample;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("alias_table", TORCH_BOX(&alias_table_cpu));
  m.impl("weighted_sample", TORCH_BOX(&weighted_sample_cpu));
}

}  // namespace fastws
