#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/kernel_order_nearest.h"
#include "philox.h"

namespace fastws {

// Makes the path 0, 1, 2, ... through rows more similar from row to row: 2-opt and Or-opt with neighbour lists, then
// kicks (two neighbouring pieces of the path change places), each followed by a repair and undone unless that was worth
// it. The path is a tour: a node without a row stands between its end and its beginning, which stay side by side.
class Path {
 public:
  static constexpr int64_t kNeighbors = 6, kLongestSegment = 3, kLongestPiece = 10;
  static constexpr int64_t kLongestReversal = 25'000;               // what takes longer is not tried
  static constexpr int64_t kKicksPerRow = 30, kMostKicks = 75'000;  // the work does not depend on a clock
  static constexpr double kLeast = 1e-9;                            // gain of a move, far above rounding
  static constexpr double kFixed = 1e3;                             // similarity of end and beginning

  Path(const float* rows, int64_t count, int64_t d)
      : rows_(rows, rows + count * d),
        d_(d),
        count_(int32_t(count)),
        tour_(count + 1),
        place_(count + 1),
        waits_(count + 1) {
    std::iota(tour_.begin(), tour_.end(), 0);
    place_ = tour_;
    find_neighbors(rows);
  }

  std::vector<int32_t> improve() {
    for (int32_t node = count_ - 1; node >= 0; --node) wait(node);
    repair();
    const int64_t kicks = count_ < 8 ? 0 : std::min(kKicksPerRow * count_, kMostKicks);
    for (int64_t number = 0; number < kicks; ++number) kick(number);
    std::vector<int32_t> order;
    if (next(count_) != 0) mirrored_ = !mirrored_;
    for (int32_t node = 0; node != count_; node = next(node)) order.push_back(node);
    return order;
  }

 private:
  double similarity(int32_t a, int32_t b) const {
    if (a == count_ || b == count_) return a + b == count_ ? kFixed : 0;
    return product(rows_.data() + a * d_, rows_.data() + b * d_, d_);
  }

  int32_t next(int32_t node) const { return step(node, mirrored_); }
  int32_t previous(int32_t node) const { return step(node, !mirrored_); }

  int32_t step(int32_t node, bool back) const {
    const int32_t place = place_[node];
    return back ? tour_[place == 0 ? count_ : place - 1] : tour_[place == count_ ? 0 : place + 1];
  }

  // Steps from a forward to b.
  int32_t distance(int32_t a, int32_t b) const {
    const int32_t steps = mirrored_ ? place_[a] - place_[b] : place_[b] - place_[a];
    return steps < 0 ? steps + count_ + 1 : steps;
  }

  // Reverses the way from first forward to last; or, where it is shorter, all the rest, and the direction.
  void reverse(int32_t first, int32_t last) {
    int32_t i = place_[first], j = place_[last], size = distance(first, last) + 1;
    if (mirrored_) std::swap(i, j);
    if (2 * size > count_ + 1) {
      std::swap(i, j);
      i = i == count_ ? 0 : i + 1;
      j = j == 0 ? count_ : j - 1;
      size = count_ + 1 - size;
      mirrored_ = !mirrored_;
    }
    done_.push_back({i, j, size});
    swap_places(i, j, size);
  }

  void swap_places(int32_t i, int32_t j, int32_t size) {
    for (int32_t pair = size / 2; pair > 0; --pair) {
      std::swap(tour_[i], tour_[j]);
      place_[tour_[i]] = i;
      place_[tour_[j]] = j;
      i = i == count_ ? 0 : i + 1;
      j = j == 0 ? count_ : j - 1;
    }
  }

  void wait(int32_t node) {
    if (node == count_ || waits_[node]) return;
    waits_[node] = 1;
    queue_.push_back(node);
  }

  void find_neighbors(const float* rows) {
    std::vector<int32_t> keys(count_);
    std::iota(keys.begin(), keys.end(), 0);
    Nearest nearest(rows, keys.data(), count_, d_);
    neighbors_.resize(count_);
    for (int32_t node = 0; node < count_; ++node) {
      neighbors_[node] = nearest.find(node, kNeighbors + 1);
      std::erase_if(neighbors_[node], [=](const Found& found) { return found.point == node; });
      if (int64_t(neighbors_[node].size()) > kNeighbors) neighbors_[node].pop_back();
    }
  }

  // Moves until no node that waits has a move that gains.
  void repair() {
    while (!queue_.empty()) {
      const int32_t node = queue_.back();
      queue_.pop_back();
      waits_[node] = 0;
      while (move(node)) {
      }
    }
  }

  // Moves forward, then backward.
  bool move(int32_t node) {
    for (int direction = 0; direction < 2; ++direction) {
      if (move_forward(node)) return true;
      mirrored_ = !mirrored_;
    }
    return false;
  }

  // Looks for a row x that is more similar to the row c than what follows c.
  bool move_forward(int32_t c) {
    const int32_t after = next(c);
    const double lost = similarity(c, after);
    for (const Found& neighbor : neighbors_[c]) {
      const int32_t x = neighbor.point;
      const double gain = neighbor.similarity - lost;
      if (gain <= kLeast) return false;
      if (std::min(distance(after, x), distance(x, after)) > kLongestReversal) continue;
      if (exchange(c, after, x, gain) || insert(c, after, x, gain)) return true;
    }
    return false;
  }

  // 2-opt: c after ... x y becomes c x ... after y.
  bool exchange(int32_t c, int32_t after, int32_t x, double gain) {
    const int32_t y = next(x);
    gain += similarity(after, y) - similarity(x, y);
    if (gain <= kLeast) return false;
    reverse(after, x);
    gained_ += gain;
    for (const int32_t node : {c, after, x, y}) wait(node);
    return true;
  }

  // Or-opt: the segment e ... c, of up to three rows, comes between x and a neighbour y of it, with c beside x.
  bool insert(int32_t c, int32_t after, int32_t x, double gain) {
    int32_t e = c;
    for (int64_t size = 1; size <= kLongestSegment; ++size, e = previous(e)) {
      const int32_t before = previous(e);
      if (e == count_ || e == x || before == after) return false;
      const double closed = gain + similarity(after, before) - similarity(e, before);
      for (const int32_t y : {previous(x), next(x)}) {
        if (y == e) continue;
        const double all = closed + similarity(e, y) - similarity(x, y);
        if (all <= kLeast) continue;
        bring(e, c, x, y);
        gained_ += all;
        for (const int32_t node : {c, e, after, before, x, y}) wait(node);
        return true;
      }
    }
    return false;
  }

  // Brings the segment e ... c between x and y by reversals, the shorter way around.
  void bring(int32_t e, int32_t c, int32_t x, int32_t y) {
    const int32_t low = next(x) == y ? x : y, high = low == x ? y : x;
    if (distance(c, low) <= distance(high, e)) {
      const int32_t after = next(c);
      reverse(e, low);
      reverse(low, after);
    } else {
      const int32_t before = previous(e);
      reverse(high, c);
      reverse(before, high);
    }
    if (low != x) reverse(c, e);
  }

  // Swaps two pieces of random length behind a random node.
  void kick(int64_t number) {
    const Words words = philox(0, 0, number);
    const auto below = [&](int word, int64_t bound) { return int64_t(words.word[word] * uint64_t(bound) >> 32); };
    const int64_t longest = std::min(kLongestPiece, (count_ - 1) / int64_t{2});
    const int32_t a = int32_t(below(0, count_ + 1)), b = next(a);
    int32_t c = b;
    for (int64_t steps = below(1, longest); steps > 0; --steps) c = next(c);
    const int32_t d = next(c);
    int32_t e = d;
    for (int64_t steps = below(2, longest); steps > 0; --steps) e = next(e);
    const int32_t f = next(e);
    gained_ = similarity(a, d) + similarity(e, b) + similarity(c, f);
    gained_ -= similarity(a, b) + similarity(c, d) + similarity(e, f);
    if (gained_ < -kFixed / 2) return;  // end and beginning stay together
    const bool mirrored = mirrored_;
    done_.clear();
    reverse(b, e);
    reverse(e, d);
    reverse(c, b);
    for (const int32_t node : {a, b, c, d, e, f}) wait(node);
    repair();
    if (gained_ >= 0) return;
    for (; !done_.empty(); done_.pop_back()) swap_places(done_.back().i, done_.back().j, done_.back().size);
    mirrored_ = mirrored;
  }

  struct Reversal {
    int32_t i, j, size;
  };

  std::vector<double> rows_;  // [count, d]
  int64_t d_;
  int32_t count_;                      // the number of the node without a row
  std::vector<int32_t> tour_, place_;  // nodes in order, and where they are
  bool mirrored_ = false;              // the tour is gone through backward
  std::vector<std::vector<Found>> neighbors_;
  std::vector<uint8_t> waits_;
  std::vector<int32_t> queue_;
  std::vector<Reversal> done_;  // since the last kick
  double gained_ = 0;           // since the last kick
};

}  // namespace fastws
