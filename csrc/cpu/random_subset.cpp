#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/random/integers.h"
#include "cpu/trust.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRound = int64_t(1) << 40;  // draws from which a round takes its own
constexpr int64_t kDense = 1024;              // a bit for each number, where one in this many is taken
constexpr int64_t kChunk = 1 << 16;           // numbers that are looked through one after the other
constexpr int64_t kBits = 64;
constexpr int64_t kMostBits = int64_t(1) << 40;  // 128 GiB

// A bit for each number that is taken.
class Bits {
 public:
  explicit Bits(int64_t population) : words_(population / kBits + 1) {}
  bool insert(int64_t i) {
    const uint64_t bit = uint64_t(1) << i % kBits, before = words_[i / kBits];
    words_[i / kBits] = before | bit;
    return !(before & bit);
  }
  const uint64_t* words() const { return words_.data(); }

 private:
  std::vector<uint64_t> words_;
};

// The taken numbers themselves, by linear probing.
class Table {
 public:
  explicit Table(int64_t count) : slots_(std::bit_ceil(uint64_t(2 * count)), -1) {}
  bool insert(int64_t i) {
    const uint64_t mask = slots_.size() - 1;
    uint64_t slot = uint64_t(i) * 0x9E3779B97F4A7C15 >> 20 & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask)
      if (slots_[slot] == i) return false;
    slots_[slot] = i;
    return true;
  }

 private:
  std::vector<int64_t> slots_;
};

// The first count distinct numbers of the stream of integers below bound that begins at draw first.
template <typename Set>
void draw_distinct(Set& taken, uint64_t seed, uint64_t offset, int64_t first, int64_t bound, int64_t count,
                   int64_t* out) {
  uint64_t numbers[kDraws];
  for (int64_t found = 0; found < count;) {
    const int64_t drawn = draw_numbers(seed, offset, first, first + count - found, numbers);
    for (int64_t i = 0; i < drawn; ++i) {
      out[found] = draw_below(numbers[i], bound).integer;
      found += taken.insert(out[found]);
    }
    first += drawn;
  }
}

// Numbers from begin to end of which the bit is not set, ascending; returns how many.
FASTWS_CLONES int64_t count_left(const uint64_t* words, int64_t begin, int64_t end) {
  int64_t taken = 0;
  for (int64_t word = begin / kBits; word < (end + kBits - 1) / kBits; ++word) taken += std::popcount(words[word]);
  return end - begin - taken;
}

FASTWS_CLONES void list_left(const uint64_t* words, int64_t begin, int64_t end, int64_t* out) {
  int64_t next = begin;
  for (int64_t word = begin / kBits; word < (end + kBits - 1) / kBits; ++word)
    for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1) {
      const int64_t taken = word * kBits + std::countr_zero(bits);
      for (int64_t i = 0; i < taken - next; ++i) out[i] = next + i;
      out += taken - next, next = taken + 1;
    }
  for (int64_t i = 0; i < end - next; ++i) out[i] = next + i;
}

std::vector<int64_t> chunk_starts(const uint64_t* words, int64_t population) {
  const int64_t chunks = (population + kChunk - 1) / kChunk;
  std::vector<int64_t> starts(chunks + 1);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    starts[chunk + 1] = starts[chunk] + count_left(words, chunk * kChunk, std::min(population, (chunk + 1) * kChunk));
  return starts;
}

void list_all_left(const uint64_t* words, int64_t population, const std::vector<int64_t>& starts, int64_t* out) {
  torch::stable::parallel_for(0, starts.size() - 1, 8, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      list_left(words, chunk * kChunk, std::min(population, (chunk + 1) * kChunk), out + starts[chunk]);
  });
}

Tensor random_subset_cpu(const Tensor& place, int64_t population, int64_t count, int64_t seed, int64_t offset) {
  check_tensor("random_subset", "place", place, torch::headeronly::ScalarType::Long, {kAny});
  STD_TORCH_CHECK(0 <= count && count <= population, "random_subset: count must be in [0, ", population, "], got ",
                  count);
  const Tensor subset = new_empty(place, {count});
  int64_t* out = subset.mutable_data_ptr<int64_t>();
  std::vector<int64_t> numbers, left;  // those that can be drawn; all at first, which is not written down
  for (int64_t first = 0; count > 0; first += kRound) {
    const int64_t wanted = std::min(count, population - population / 2);
    if (population > kDense * wanted) {  // then this is the last round
      Table taken(wanted);
      draw_distinct(taken, seed, offset, first, population, wanted, out);
    } else {
      Bits taken(population);
      draw_distinct(taken, seed, offset, first, population, wanted, out);
      if (wanted < count) {
        left.resize(population - wanted);
        list_all_left(taken.words(), population, chunk_starts(taken.words(), population), left.data());
      }
    }
    if (first > 0) {
      for (int64_t i = 0; i < wanted; ++i) out[i] = numbers[out[i]];
      if (wanted < count)
        for (int64_t& number : left) number = numbers[number];
    }
    numbers.swap(left);
    out += wanted, count -= wanted, population -= wanted;
  }
  return subset;
}

Tensor complement_cpu(const Tensor& indices_, int64_t population) {
  const Tensor indices = as_contiguous(indices_);
  check_tensor("complement", "indices", indices, torch::headeronly::ScalarType::Long, {kAny});
  STD_TORCH_CHECK(0 <= population && population <= kMostBits, "complement: population must be in [0, 2**40], got ",
                  population);
  const int64_t* index = indices.const_data_ptr<int64_t>();
  check_range("complement", "indices", index, indices.size(0), 0, population);
  Bits taken(population);
  for (int64_t i = 0; i < indices.size(0); ++i) taken.insert(index[i]);
  const std::vector<int64_t> starts = chunk_starts(taken.words(), population);
  const Tensor left = new_empty(indices, {starts.back()});
  list_all_left(taken.words(), population, starts, left.mutable_data_ptr<int64_t>());
  return left;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("random_subset", TORCH_BOX(&random_subset_cpu));
  m.impl("complement", TORCH_BOX(&complement_cpu));
}

}  // namespace fastws
