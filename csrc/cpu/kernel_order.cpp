#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/kernel_order_nearest.h"
#include "cpu/kernel_order_path.h"
#include "cpu/memory.h"
#include "cpu/trust.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;

// Rows of which each is there once, and where equal ones are. A search among many equal rows would have to look at all
// of them, and the smallest number wins.
struct Groups {
  std::vector<int32_t> members;  // row numbers, group after group, ascending in each
  std::vector<int32_t> first;    // where groups begin, and the end
  std::vector<float> rows;       // [groups, d]

  Groups(const float* all, int64_t count, int64_t d) : members(count) {
    const auto compare = [=](int32_t a, int32_t b) { return std::memcmp(all + a * d, all + b * d, d * sizeof(float)); };
    std::iota(members.begin(), members.end(), 0);
    std::sort(members.begin(), members.end(), [&](int32_t a, int32_t b) {
      const int order = compare(a, b);
      return order ? order < 0 : a < b;
    });
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0 && compare(members[i - 1], members[i]) == 0) continue;
      first.push_back(int32_t(i));
      rows.insert(rows.end(), all + members[i] * d, all + (members[i] + 1) * d);
    }
    first.push_back(int32_t(count));
  }

  int64_t size() const { return int64_t(first.size()) - 1; }
};

// The groups in the order of a greedy path from row 0, each as often as it has rows.
std::vector<int32_t> walk(const Groups& groups, int64_t d) {
  const int64_t count = groups.members.size();
  std::vector<int32_t> path, left(groups.first.begin(), groups.first.end()), keys(groups.size()), group_of(count);
  for (int64_t group = 0; group < groups.size(); ++group) {
    keys[group] = groups.members[groups.first[group]];
    for (int32_t i = groups.first[group]; i < groups.first[group + 1]; ++i)
      group_of[groups.members[i]] = int32_t(group);
  }
  Nearest nearest(groups.rows.data(), keys.data(), groups.size(), d);
  std::vector<uint8_t> taken(count);
  int64_t untaken = 0;
  const auto take = [&](int32_t group) {
    taken[groups.members[left[group]]] = 1;
    path.push_back(group);
    if (++left[group] == groups.first[group + 1])
      nearest.remove(group);
    else
      keys[group] = groups.members[left[group]];
  };
  take(group_of[0]);
  while (int64_t(path.size()) < count) {
    const float* const row = groups.rows.data() + path.back() * d;
    if (std::any_of(row, row + d, [](float x) { return x != 0; })) {
      take(nearest.find(path.back(), 1)[0].point);
    } else {  // equally similar to all
      while (taken[untaken]) ++untaken;
      take(group_of[untaken]);
    }
  }
  return path;
}

double total(const Groups& groups, const std::vector<int32_t>& path, int64_t d) {
  double sum = 0;
  const float* const rows = groups.rows.data();
  for (size_t i = 1; i < path.size(); ++i) sum += product(rows + path[i - 1] * d, rows + path[i] * d, d);
  return sum;
}

// A better path through the groups, whose rows follow one another in it.
std::vector<int32_t> improve(const Groups& groups, const std::vector<int32_t>& path, int64_t d) {
  std::vector<int32_t> visited, better;
  std::vector<uint8_t> seen(groups.size());
  std::vector<float> rows;
  for (const int32_t group : path) {
    if (seen[group]) continue;
    seen[group] = 1;
    visited.push_back(group);
    rows.insert(rows.end(), groups.rows.data() + group * d, groups.rows.data() + (group + 1) * d);
  }
  for (const int32_t node : Path(rows.data(), visited.size(), d).improve()) {
    const int32_t group = visited[node];
    better.insert(better.end(), groups.first[group + 1] - groups.first[group], group);
  }
  return total(groups, better, d) > total(groups, path, d) ? better : path;
}

void order_rows(const float* rows, int64_t count, int64_t d, bool improved, int64_t* order) {
  const Groups groups(rows, count, d);
  std::vector<int32_t> path = walk(groups, d), left(groups.first);
  if (improved) path = improve(groups, path, d);
  for (const int32_t group : path) *order++ = groups.members[left[group]++];
}

Tensor kernel_order_cpu(const Tensor& rows_, bool improve) {
  const Tensor rows = as_contiguous(rows_);
  check_tensor("kernel_order", "rows", rows, torch::headeronly::ScalarType::Float, {kAny, kAny, kAny});
  const int64_t batch = rows.size(0), count = rows.size(1), d = rows.size(2);
  STD_TORCH_CHECK(count <= kMostRows, "kernel_order: rows must be at most 2**31 - 1, got ", count);
  STD_TORCH_CHECK(d > 0, "kernel_order: rows must hold at least 1 number each, got 0");
  const Tensor order = torch::stable::new_empty(rows, {batch, count}, torch::headeronly::ScalarType::Long);
  if (count == 0) return order;

  const float* const first = rows.const_data_ptr<float>();
  // what is longer has similarities that searches and moves do not reckon with, and NaN none at all
  const auto lies = [](float x) { return std::abs(x) <= 1; };
  const float* const wrong = std::find_if_not(first, first + rows.numel(), lies);
  STD_TORCH_CHECK(wrong == first + rows.numel(), "kernel_order: rows must be of length 1 or 0, got one with ", *wrong);
  int64_t* const orders = order.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) order_rows(first + b * count * d, count, d, improve, orders + b * count);
  });
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("kernel_order", TORCH_BOX(&kernel_order_cpu)); }

}  // namespace fastws
