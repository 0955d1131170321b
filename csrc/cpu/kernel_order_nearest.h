#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/clones.h"

namespace fastws {

// Scalar product of rows of floats, added in float64 from the first entry on. Products of two floats are exact there,
// so that fused multiplication and addition, or none, makes no difference.
template <typename A, typename B>
double product(const A* a, const B* b, int64_t size, int64_t stride = 1) {
  double sum = 0;
  for (int64_t k = 0; k < size; ++k) sum += double(a[k]) * double(b[k * stride]);
  return sum;
}

namespace nearest {

constexpr int64_t kLeaf = 64, kLeaves = 16;  // points in a leaf, leaves in a node

// Squared distances of q [d] from boxes, whose bounds are [d, count].
inline FASTWS_CLONES void box_distances(const float* q, const float* low, const float* high, int64_t d, int64_t count,
                                        float* __restrict__ squared) {
  for (int64_t i = 0; i < count; ++i) squared[i] = 0;
  for (int64_t k = 0; k < d; ++k) {
    const float x = q[k], *lows = low + k * count, *highs = high + k * count;
    for (int64_t i = 0; i < count; ++i) {
      float outside = std::max(lows[i] - x, x - highs[i]);
      outside = outside > 0 ? outside : 0;
      squared[i] += outside * outside;
    }
  }
}

// Scalar products, in float, of q [d] and the points of a leaf [d, kLeaf]; returns the largest.
inline FASTWS_CLONES float leaf_products(const float* q, const float* points, int64_t d, float* __restrict__ products) {
  constexpr int64_t kLanes = 16;
  float sums[kLeaf] = {}, largest[kLanes];
  for (int64_t k = 0; k < d; ++k)
    for (int64_t i = 0; i < kLeaf; ++i) sums[i] += q[k] * points[k * kLeaf + i];
  std::copy(sums, sums + kLanes, largest);
  for (int64_t i = kLanes; i < kLeaf; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      largest[lane] = largest[lane] > sums[i + lane] ? largest[lane] : sums[i + lane];
  std::copy(sums, sums + kLeaf, products);
  for (int64_t lane = 1; lane < kLanes; ++lane) largest[0] = std::max(largest[0], largest[lane]);
  return largest[0];
}

}  // namespace nearest

// A point that was found, by its number.
struct Found {
  double similarity;
  int32_t point;
};

// Finds the points of largest scalar product with one of them, exactly, among those that have not been removed. Points
// lie in leaves, which are boxes made by splitting at medians, and leaves in nodes. A box at distance r from q holds no
// product above (|q|^2 + |x|^2 - r^2) / 2, with the largest |x|, so most boxes are never looked into. Products in float
// only say which points are worth one in float64.
class Nearest {
 public:
  // rows: the points, [count, d]. keys: of points with equal products, the one with the smaller key is nearer. Both
  // stay the caller's, who may change the key of a point.
  Nearest(const float* rows, const int32_t* keys, int64_t count, int64_t d)
      : rows_(rows), keys_(keys), d_(d), leaf_of_(count), slot_of_(count), norms_(count) {
    std::vector<int32_t> points(count);
    std::iota(points.begin(), points.end(), 0);
    for (int64_t i = 0; i < count; ++i) norms_[i] = product(row(i), row(i), d);
    largest_ = count ? *std::max_element(norms_.begin(), norms_.end()) : 0;
    build(std::move(points));
  }

  void remove(int32_t point) {
    const int64_t leaf = leaf_of_[point], slot = slot_of_[point], last = --counts_[leaf];
    int32_t* const points = points_.data() + leaf * kLeaf;
    float* const values = values_.data() + leaf * kLeaf * d_;
    points[slot] = points[last];
    slot_of_[points[last]] = int32_t(slot);
    for (int64_t k = 0; k < d_; ++k) values[k * kLeaf + slot] = values[k * kLeaf + last];
    if (--remaining_ < kThin * built_ && built_ > kLeaf) rebuild();
  }

  // The `count` nearest points to one that is here or has been removed, nearest first; fewer if fewer are here.
  const std::vector<Found>& find(int32_t point, int64_t count) {
    query_ = row(point);
    query_norm_ = norms_[point];
    wanted_ = count;
    found_.clear();
    slack_ = (d_ + 8) * 0x1p-22 * (query_norm_ + largest_);
    threshold_ = -std::numeric_limits<float>::infinity();
    reach_ = std::numeric_limits<float>::infinity();
    nearest::box_distances(query_, node_low_.data(), node_high_.data(), d_, nodes_, distances_.data());
    const int64_t closest = std::min_element(distances_.begin(), distances_.end()) - distances_.begin();
    visit(closest);
    queue_.clear();
    for (int64_t node = 0; node < nodes_; ++node)
      if (node != closest && distances_[node] <= reach_) queue_.emplace_back(distances_[node], node);
    std::sort(queue_.begin(), queue_.end());
    for (const auto& [distance, node] : queue_) {
      if (distance > reach_) break;
      visit(node);
    }
    return found_;
  }

 private:
  static constexpr int64_t kLeaf = nearest::kLeaf, kLeaves = nearest::kLeaves;
  static constexpr double kThin = 0.6;  // leaves are made anew when this share of their points is left

  const float* row(int64_t point) const { return rows_ + point * d_; }

  void visit(int64_t node) {
    float distances[kLeaves];
    const int64_t first = node * kLeaves;
    nearest::box_distances(query_, low_.data() + first * d_, high_.data() + first * d_, d_, kLeaves, distances);
    const int64_t closest = std::min_element(distances, distances + kLeaves) - distances;
    look_into(first + closest);
    for (int64_t leaf = 0; leaf < kLeaves; ++leaf)
      if (leaf != closest && distances[leaf] <= reach_) look_into(first + leaf);
  }

  void look_into(int64_t leaf) {
    const float* const values = values_.data() + leaf * kLeaf * d_;
    float products[kLeaf];
    if (nearest::leaf_products(query_, values, d_, products) < threshold_) return;
    for (int64_t slot = 0; slot < counts_[leaf]; ++slot)
      if (products[slot] >= threshold_)
        offer({product(query_, values + slot, d_, kLeaf), points_[leaf * kLeaf + slot]});
  }

  void offer(Found candidate) {
    const auto nearer = [this](const Found& a, const Found& b) {
      return a.similarity != b.similarity ? a.similarity > b.similarity : keys_[a.point] < keys_[b.point];
    };
    found_.insert(std::upper_bound(found_.begin(), found_.end(), candidate, nearer), candidate);
    if (int64_t(found_.size()) > wanted_) found_.pop_back();
    if (int64_t(found_.size()) < wanted_) return;
    threshold_ = float(found_.back().similarity - slack_);
    reach_ = float(query_norm_ + largest_ - 2 * found_.back().similarity + slack_);
  }

  // Makes leaves of the points that are left.
  void build(std::vector<int32_t> points) {
    const int64_t count = points.size(), leaves = std::max<int64_t>(1, (count + kLeaf - 1) / kLeaf);
    nodes_ = (leaves + kLeaves - 1) / kLeaves;
    built_ = remaining_ = count;
    counts_.assign(nodes_ * kLeaves, 0);
    points_.assign(nodes_ * kLeaves * kLeaf, -1);
    values_.assign(nodes_ * kLeaves * kLeaf * d_, 0);
    constexpr float kFar = std::numeric_limits<float>::max();  // an empty box is far from everything
    low_.assign(nodes_ * kLeaves * d_, kFar);
    high_.assign(nodes_ * kLeaves * d_, -kFar);
    node_low_.assign(nodes_ * d_, kFar);
    node_high_.assign(nodes_ * d_, -kFar);
    distances_.resize(nodes_);
    split(points.data(), count, 0, leaves);
  }

  // Deals points to leaves, in halves, along the axis of largest variance.
  void split(int32_t* points, int64_t count, int64_t first, int64_t leaves) {
    if (leaves == 1) return fill(points, count, first);
    const int64_t left = leaves / 2, middle = count * left / leaves, axis = widest(points, count);
    std::nth_element(points, points + middle, points + count, [&](int32_t a, int32_t b) {
      const float x = row(a)[axis], y = row(b)[axis];
      return x != y ? x < y : a < b;
    });
    split(points, middle, first, left);
    split(points + middle, count - middle, first + left, leaves - left);
  }

  int64_t widest(const int32_t* points, int64_t count) const {
    std::vector<double> sums(d_), squares(d_);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < d_; ++k) {
        const double x = row(points[i])[k];
        sums[k] += x;
        squares[k] += x * x;
      }
    for (int64_t k = 0; k < d_; ++k) squares[k] -= sums[k] * sums[k] / count;
    return std::max_element(squares.begin(), squares.end()) - squares.begin();
  }

  void fill(const int32_t* points, int64_t count, int64_t leaf) {
    const int64_t node = leaf / kLeaves, side = leaf % kLeaves;
    counts_[leaf] = int32_t(count);
    for (int64_t k = 0; k < d_; ++k) {
      float* const values = values_.data() + (leaf * d_ + k) * kLeaf;
      float &low = low_[(node * d_ + k) * kLeaves + side], &high = high_[(node * d_ + k) * kLeaves + side];
      for (int64_t slot = 0; slot < count; ++slot) {
        values[slot] = row(points[slot])[k];
        low = std::min(low, values[slot]);
        high = std::max(high, values[slot]);
      }
      node_low_[k * nodes_ + node] = std::min(node_low_[k * nodes_ + node], low);
      node_high_[k * nodes_ + node] = std::max(node_high_[k * nodes_ + node], high);
    }
    for (int64_t slot = 0; slot < count; ++slot) {
      points_[leaf * kLeaf + slot] = points[slot];
      leaf_of_[points[slot]] = int32_t(leaf);
      slot_of_[points[slot]] = int32_t(slot);
    }
  }

  void rebuild() {
    std::vector<int32_t> points;
    for (size_t leaf = 0; leaf < counts_.size(); ++leaf)
      points.insert(points.end(), &points_[leaf * kLeaf], &points_[leaf * kLeaf] + counts_[leaf]);
    build(std::move(points));
  }

  const float* rows_;    // [count, d]
  const int32_t* keys_;  // [count]
  int64_t d_, nodes_ = 0, built_ = 0, remaining_ = 0;
  std::vector<int32_t> leaf_of_, slot_of_;  // of points
  std::vector<double> norms_;               // squared
  double largest_;
  std::vector<int32_t> counts_;              // [leaves]
  std::vector<int32_t> points_;              // [leaves, kLeaf]
  std::vector<float> values_;                // [leaves, d, kLeaf]
  std::vector<float> low_, high_;            // [nodes, d, kLeaves]
  std::vector<float> node_low_, node_high_;  // [d, nodes]

  // of one search
  const float* query_ = nullptr;
  double query_norm_ = 0, slack_ = 0;
  int64_t wanted_ = 0;
  float threshold_ = 0, reach_ = 0;  // products in float, and distances, that are worth a look
  std::vector<float> distances_;     // [nodes]
  std::vector<std::pair<float, int64_t>> queue_;
  std::vector<Found> found_;
};

}  // namespace fastws
