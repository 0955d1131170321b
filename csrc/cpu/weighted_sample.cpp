#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "cpu/memory.h"
#include "cpu/random/integers.h"
#include "cpu/trust.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 16;  // columns that are filled one after the other
constexpr int64_t kAhead = 512;      // draws whose columns are on the way from memory
constexpr int64_t kPart = 4096;      // draws that one thread makes
constexpr int64_t kShareBits = 32;
constexpr int64_t kLargestTotal = int64_t(1) << 62;

// A column of an alias table, an entry of the tensor: draws whose fraction is at most last give the alias.
struct Column {
  uint32_t alias, last;
};
static_assert(sizeof(Column) == sizeof(int64_t) && std::endian::native == std::endian::little);

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
    constexpr int64_t kWhole = int64_t(1) << kShareBits;
    if (given == 0) return {uint32_t(i), 0};
    int64_t share = double(given) / double(capacity(i)) * double(kWhole) + 0.5;
    if (given < capacity(i)) share = std::min(share, kWhole - 1);
    return share > 0 ? Column{uint32_t(alias), uint32_t(share - 1)} : Column{uint32_t(i), 0};
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
  int64_t behind = w.empty[from], light = from * kChunk - 1, before = -1, given = 0;
  for (int64_t i = chunk * kChunk; i < w.last(chunk); ++i) {
    const int64_t beyond = w.beyond(i);
    if (beyond < 0) continue;
    end += beyond;
    while (behind < end) behind += std::max<int64_t>(-w.beyond(++light), 0);
    if (before >= 0) columns[before] = w.column(before, given, i);
    before = i, given = behind - end;
  }
  if (before < 0) return;
  int64_t next = w.last(chunk);
  while (next < w.count && w.beyond(next) < 0) ++next;
  columns[before] = w.column(before, given, next < w.count ? next : before);
}

Tensor alias_table_cpu(const Tensor& weights_) {
  const Tensor weights = as_contiguous(weights_);
  check_tensor("alias_table", "weights", weights, torch::headeronly::ScalarType::Long, {kAny});
  const int64_t count = weights.size(0), chunks = (count + kChunk - 1) / kChunk;
  const Tensor table = new_empty(weights, {count});
  Column* columns = reinterpret_cast<Column*>(table.mutable_data_ptr<int64_t>());
  const int64_t* weight = weights.const_data_ptr<int64_t>();
  if (count == 0) return table;
  STD_TORCH_CHECK(count <= int64_t(1) << kShareBits, "alias_table: weights must be at most 2**32, got ", count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(weight[i] >= 0 && weight[i] <= kLargestTotal - total,
                    "alias_table: weights must be at least 0 and sum to at most 2**62, got weights[", i,
                    "] = ", weight[i], " behind a sum of ", total);
    total += weight[i];
  }
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
  const Tensor columns = as_contiguous(columns_);
  check_tensor("weighted_sample", "columns", columns, torch::headeronly::ScalarType::Long, {kAny});
  STD_TORCH_CHECK(0 <= first && 0 <= count && count <= kLargestTotal - first,
                  "weighted_sample: first and count must be at least 0 and sum to at most 2**62, got ", first, " and ",
                  count);
  const Tensor sample = new_empty(columns, {count});
  const Column* column = reinterpret_cast<const Column*>(columns.const_data_ptr<int64_t>());
  const int64_t bound = columns.size(0);
  STD_TORCH_CHECK(bound > 0 || count == 0, "weighted_sample: columns must be at least 1, got ", bound);
  int64_t* out = sample.mutable_data_ptr<int64_t>();
  const auto draw_part = [=](int64_t begin, int64_t end) {
    for (int64_t drawn = begin; begin < end;) {
      while (drawn < std::min(end, begin + kAhead)) {  // the sample holds the numbers until their columns are there
        uint64_t* numbers = reinterpret_cast<uint64_t*>(out + drawn);
        const int64_t more = draw_numbers(seed, offset, first + drawn, first + end, numbers);
        for (int64_t i = 0; i < more; ++i) __builtin_prefetch(column + draw_below(numbers[i], bound).integer);
        drawn += more;
      }
      for (const int64_t stop = std::min(drawn, begin + kDraws); begin < stop; ++begin) {
        const Draw draw = draw_below(out[begin], bound);
        const Column found = column[draw.integer];
        out[begin] = draw.fraction >> (kFractionBits - kShareBits) <= found.last ? found.alias : draw.integer;
      }
    }
  };
  torch::stable::parallel_for(0, count, kPart, draw_part);
  return sample;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("alias_table", TORCH_BOX(&alias_table_cpu));
  m.impl("weighted_sample", TORCH_BOX(&weighted_sample_cpu));
}

}  // namespace fastws
