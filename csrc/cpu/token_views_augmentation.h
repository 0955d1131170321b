#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/clones.h"
#include "cpu/random/draw.h"
#include "cpu/random/normal.h"

// What is random in token views: noise, and what is erased.

namespace fastws {
namespace {

constexpr int64_t kWhole = int64_t(1) << 24;  // a network, of which lengths of blocks are parts
constexpr int64_t kWords = 8 * kPhiloxWords;  // drawn at once

// x[t] *= 1 + noise * normal, or x[t] += noise * normal, where x[0] is entry first of the draw; a word gives two
// normals.
template <bool kAdds, typename wide_t>
FASTWS_CLONES void apply_noise(wide_t* x, int64_t size, float noise, uint64_t seed, uint64_t offset, int64_t first) {
  uint32_t words[kWords];
  float normals[2 * kWords];
  for (int64_t begin = first / 8 * 8; begin < first + size; begin += 2 * kWords) {
    const int64_t needed = (first + size - begin + 2 * kPhiloxWords - 1) / (2 * kPhiloxWords) * kPhiloxWords;
    const int64_t count = needed < kWords ? needed : kWords;
    draw_words(seed, offset, begin / 8, count / 4, words);
    for (int64_t i = 0; i < count; ++i) normal_pair(words[i], normals[2 * i], normals[2 * i + 1]);
    const int64_t from = begin > first ? begin : first;
    const int64_t to = begin + 2 * count < first + size ? begin + 2 * count : first + size;
    wide_t* y = x + (from - first);
    const float* normal = normals + (from - begin);
    if constexpr (kAdds)
      for (int64_t t = 0; t < to - from; ++t) y[t] += noise * normal[t];
    else
      for (int64_t t = 0; t < to - from; ++t) y[t] *= 1 + noise * normal[t];
  }
}

// x[t] = value[t * step] where the word of entry first + t is below the threshold.
template <int step, typename wide_t>
FASTWS_CLONES void erase(wide_t* x, int64_t size, int64_t threshold, const wide_t* value, uint64_t seed,
                         uint64_t offset, int64_t first) {
  uint32_t words[kWords];
  for (int64_t begin = first / 4 * 4; begin < first + size; begin += kWords) {
    draw_words(seed, offset, begin / 4, kWords / 4, words);
    const int64_t from = begin > first ? begin : first;
    const int64_t to = begin + kWords < first + size ? begin + kWords : first + size;
    for (int64_t i = from; i < to; ++i)
      x[i - first] = words[i - begin] < threshold ? value[(i - first) * step] : x[i - first];
  }
}

// Parts of a network from begin to end.
struct Range {
  int64_t begin = 0, end = 0;
};

constexpr uint64_t kNewDraws = uint64_t(1) << 63;  // where the draws of additive noise and of blocks begin
constexpr int64_t kTries = 10, kCounters = 6;      // of a block that would pass the end; for each view

struct Options {
  const float *scale, *shift, *additive;  // per row of the table, or null
  float noise;
  double erase_value;  // NaN: normals of the draw of additive noise, from entry behind on
  int64_t behind;
  int64_t erase_threshold, block_threshold, shortest, longest;
  uint64_t seed, offset;

  bool random() const { return noise > 0 || additive || erase_threshold > 0 || block_threshold > 0; }
  bool arithmetic() const { return scale || shift || random(); }
  // padding is 0; a factor below 0 would make it -0
  bool fills_padding() const { return noise > 0.2f || additive || erase_value != 0; }

  // The weights that a view of a network erases; fastws/ops/token_views.py has the formula.
  Range draw_block(int64_t view, int64_t weights) const {
    const auto word = [&](int64_t i) {
      return int64_t(philox(seed, kNewDraws + 2 * offset + 1, kCounters * view + i / 4).word[i % 4]);
    };
    if (block_threshold == 0 || word(0) >= block_threshold) return {};
    for (int64_t attempt = 0; attempt < kTries; ++attempt) {
      const int64_t part = shortest + ((longest - shortest) * (word(2 + 2 * attempt) >> 8) >> 24);
      const int64_t length = weights * part >> 24, begin = weights * (word(3 + 2 * attempt) >> 8) >> 24;
      if (begin + length < weights) return {begin, begin + length};
    }
    return {};
  }
};

// What is random in entries that follow each other, and is done once they are all there, because draws are cheaper
// for many entries at once. Entries are counted in the draw.
class Augmentation {
 public:
  explicit Augmentation(const Options& options) : options_(options) {}

  // Entries of layer l have been written from there on; of the flat vector they are those from target on.
  void add(int64_t entry, int64_t count, int64_t l, int64_t target, Range block) {
    if (options_.additive && (parts_.empty() || parts_.back().noise != options_.additive[l]))
      parts_.push_back({entry, options_.additive[l]});
    const int64_t begin = std::max(target, block.begin), end = std::min(target + count, block.end);
    if (begin < end) erased_.push_back({entry + begin - target, entry + end - target});
  }

  // x[0] is entry first of size.
  template <typename wide_t>
  void apply(wide_t* x, int64_t size, int64_t first) {
    const Options& o = options_;
    if (o.noise > 0) apply_noise<false>(x, size, o.noise, o.seed, 2 * o.offset, first);
    for (size_t i = 0; i < parts_.size(); ++i) {
      const int64_t begin = parts_[i].entry, end = i + 1 < parts_.size() ? parts_[i + 1].entry : first + size;
      const float noise = parts_[i].noise;
      if (noise > 0)
        apply_noise<true>(x + (begin - first), end - begin, noise, o.seed, kNewDraws + 2 * o.offset, begin);
    }
    if (std::isnan(o.erase_value)) {
      std::vector<wide_t> normals(size);
      apply_noise<true>(normals.data(), size, 1, o.seed, kNewDraws + 2 * o.offset, o.behind + first);
      erase_to<1>(x, size, first, normals.data());
    } else {
      const wide_t value = wide_t(o.erase_value);
      erase_to<0>(x, size, first, &value);
    }
    parts_.clear(), erased_.clear();
  }

 private:
  // Every entry gets a value of its own, or all the same.
  template <int step, typename wide_t>
  void erase_to(wide_t* x, int64_t size, int64_t first, const wide_t* value) {
    const Options& o = options_;
    if (o.erase_threshold > 0) erase<step>(x, size, o.erase_threshold, value, o.seed, 2 * o.offset + 1, first);
    for (const Range& range : erased_)
      for (int64_t i = range.begin - first; i < range.end - first; ++i) x[i] = value[i * step];
  }

  struct Part {
    int64_t entry;  // the first; it ends where the next part begins
    float noise;
  };
  const Options& options_;
  std::vector<Part> parts_;
  std::vector<Range> erased_;
};

// Augments tokens in runs, as long as most of their entries hold weights.
template <typename to_t>
class Runs {
 public:
  Runs(to_t* values, const int32_t* lengths, int64_t token_size, const Options& options, int64_t begin)
      : augmentation(options),
        values_(values),
        lengths_(lengths),
        size_(token_size),
        fills_padding_(options.fills_padding()),
        first_(begin) {}

  // A token is written; augmentation knows its parts.
  void add(int64_t token) {
    if (2 * lengths_[token] < size_ || token + 1 - first_ == kTokens) flush(token + 1);
  }

  void flush(int64_t end) {
    if (end == first_) return;
    // where a token is mostly padding, only the rest of it is augmented; padding is 0, which factors leave
    const int64_t last = end - 1,
                  size = (last - first_) * size_ + (2 * lengths_[last] < size_ ? lengths_[last] : size_);
    augmentation.apply(values_ + first_ * size_, size, first_ * size_);
    for (int64_t token = first_; token < end && fills_padding_; ++token)
      std::fill(values_ + token * size_ + lengths_[token], values_ + (token + 1) * size_, to_t(0));
    first_ = end;
  }

  Augmentation augmentation;

 private:
  static constexpr int64_t kTokens = 8;  // of a few kilobytes, which are still in the nearest cache
  to_t* values_;
  const int32_t* lengths_;
  const int64_t size_;
  const bool fills_padding_;
  int64_t first_;
};

}  // namespace
}  // namespace fastws
