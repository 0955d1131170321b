#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/trust.h"

namespace fastws {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 8;     // units of a target side by side
constexpr int64_t kRows = 4;      // units of a network whose products are added up at a time
constexpr int64_t kSweeps = 100;  // at most; a few are enough
constexpr double kNoise = 1e-6;   // gains below this share of the similarities are rounding

// A row of the table of groups, as fastws/ops/matched_distance.py has it: units that move together.
struct Group {
  int64_t size, length, first, first_part, parts, may_flip;
};

// A row of the table of parts: weights of a unit that lie in one tensor. `other` is the group of that tensor's other
// axis, or -1; its units are blocks of `block` weights, `before` times one behind the other.
struct Part {
  int64_t start, width, other, before, block, negated;
};

struct Tables {
  const Group* groups;
  const Part* parts;
  int64_t num_groups, num_parts, packed;  // packed: weights of a packed network
};

typedef float Units __attribute__((vector_size(kLanes * sizeof(float))));

// S[i, j] = sum over l from begin to end of rows[i, l] * columns[l, j], for n rows and a multiple of kLanes columns:
// the units of a target stand in columns, so that vectors hold units and no sum goes across a vector.
FASTWS_CLONES void similarities(const float* rows, const float* columns, int64_t n, int64_t length, int64_t padded,
                                int64_t begin, int64_t end, float* result) {
  for (int64_t i = 0; i < n; i += kRows) {
    const float* row[kRows];
    for (int64_t r = 0; r < kRows; ++r) row[r] = rows + std::min(i + r, n - 1) * length;
    for (int64_t j = 0; j < padded; j += kLanes) {
      Units sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
      for (int64_t l = begin; l < end; ++l) {
        Units column;
        std::memcpy(&column, columns + l * padded + j, sizeof(Units));
        sum0 += row[0][l] * column, sum1 += row[1][l] * column;
        sum2 += row[2][l] * column, sum3 += row[3][l] * column;
      }
      const Units sums[kRows] = {sum0, sum1, sum2, sum3};
      for (int64_t r = 0; r < std::min(kRows, n - i); ++r)
        std::memcpy(result + (i + r) * padded + j, &sums[r], sizeof(Units));
    }
  }
}

// Sum of ((a - b) * weights)^2; the partial sums make the result independent of the vector length.
FASTWS_CLONES double squared_distance(const float* a, const float* b, const float* weights, int64_t size) {
  double sums[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double error = (double(a[i + lane]) - b[i + lane]) * weights[i + lane];
      sums[lane] += error * error;
    }
  for (int64_t i = whole; i < size; ++i) {
    const double error = (double(a[i]) - b[i]) * weights[i];
    sums[i - whole] += error * error;
  }
  return std::accumulate(sums, sums + kLanes, 0.0);
}

// The units that a row of the search for a shortest path reaches, at lower cost than before: distances by way of one
// place, at distance start. Places that are done have a distance of -inf and stay.
FASTWS_CLONES void relax(const float* cost, const float* price, float start, int32_t from, int64_t padded,
                         float* distance, int32_t* way) {
  for (int64_t j = 0; j < padded; ++j) {
    const float by_way = start + cost[j] - price[j];
    way[j] = by_way < distance[j] ? from : way[j];
    distance[j] = by_way < distance[j] ? by_way : distance[j];
  }
}

// The best assignment of units to places: place p gets unit[p], so that the sum of gain[unit[p] * padded + p] is
// largest. Prices of places make one of them the cheapest for most units; the others get theirs by shortest augmenting
// paths (Jonker and Volgenant, 1987).
class Assignment {
 public:
  void solve(const float* gain, int64_t n, int64_t padded, std::vector<int64_t>& unit) {
    constexpr float kFar = std::numeric_limits<float>::max();
    cost_.assign(n * padded, kFar), price_.assign(padded, 0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) cost_[i * padded + j] = -gain[i * padded + j];
    owner_.assign(padded, -1), place_.assign(n, -1);
    for (int64_t j = n - 1; j >= 0; --j) {  // the price of a place is its least cost, and who has it takes it
      int64_t least = 0;
      for (int64_t i = 1; i < n; ++i)
        if (cost_[i * padded + j] < cost_[least * padded + j]) least = i;
      price_[j] = cost_[least * padded + j];
      if (place_[least] < 0) place_[least] = j, owner_[j] = least;
    }
    for (int64_t i = 0; i < n; ++i)
      if (place_[i] < 0) augment(i, n, padded);
    unit.resize(n);
    for (int64_t j = 0; j < n; ++j) unit[j] = owner_[j];
  }

 private:
  void augment(int64_t i, int64_t n, int64_t padded) {
    constexpr float kInfinite = std::numeric_limits<float>::infinity();
    distance_.assign(padded, kInfinite), way_.assign(padded, -1), reached_.clear();
    float start = 0;
    int64_t row = i, place = -1;
    for (;;) {
      // costs are told from that of the row's own place on, which is 0 by its price
      const float own = place < 0 ? 0 : cost_[row * padded + place] - price_[place];
      relax(cost_.data() + row * padded, price_.data(), start - own, int32_t(place), padded, distance_.data(),
            way_.data());
      int64_t next = -1;
      for (int64_t j = 0; j < n; ++j)
        if (distance_[j] > -kInfinite && (next < 0 || distance_[j] < distance_[next])) next = j;
      start = distance_[next], place = next;
      reached_.push_back({place, start});
      distance_[place] = -kInfinite;
      if (owner_[place] < 0) break;
      row = owner_[place];
    }
    for (const Reached& done : reached_) price_[done.place] += done.distance - start;
    for (int64_t j = place; j >= 0;) {  // every place on the path gets the unit of the place before
      const int64_t before = way_[j];
      owner_[j] = before < 0 ? i : owner_[before];
      place_[owner_[j]] = j;
      j = before;
    }
  }

  struct Reached {
    int64_t place;
    float distance;
  };
  std::vector<float> cost_, price_, distance_;
  std::vector<int64_t> owner_, place_;
  std::vector<int32_t> way_;
  std::vector<Reached> reached_;
};

// Brings a packed network towards another, group by group. In a packed network every group has its units as rows, with
// all weights that belong to a unit side by side; a weight between two groups is in both. So similarities are products
// of rows, and a group that moves moves rows of its own and blocks within the rows of its neighbours.
class Matcher {
 public:
  explicit Matcher(const Tables& tables) : tables_(tables) {}

  // What networks are to be brought towards; its units are put into columns, once for all networks.
  void aim(const float* target) {
    columns_.resize(tables_.num_groups);
    for (int64_t g = 0; g < tables_.num_groups; ++g) {
      const Group& group = tables_.groups[g];
      const int64_t n = group.size, length = group.length, padded = pad(n);
      columns_[g].assign(length * padded, 0.0f);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t l = 0; l < length; ++l) columns_[g][l * padded + j] = target[group.first + j * length + l];
    }
  }

  // Coordinate descent from how the network lies now, in place.
  void match(float* network, bool may_flip) {
    waiting_.assign(tables_.num_groups, 1);
    int64_t left = tables_.num_groups;
    for (int64_t sweep = 0; sweep < kSweeps && left > 0; ++sweep)
      for (int64_t k = 0; k < tables_.num_groups; ++k) {
        const int64_t g = sweep % 2 ? tables_.num_groups - 1 - k : k;
        if (!waiting_[g]) continue;
        waiting_[g] = 0, --left;
        if (!improve(network, g, may_flip && tables_.groups[g].may_flip)) continue;
        for (const Part& part : parts_of(tables_.groups[g]))
          if (part.other >= 0 && !waiting_[part.other]) waiting_[part.other] = 1, ++left;
      }
  }

 private:
  static int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  bool improve(float* network, int64_t g, bool may_flip) {
    const Group& group = tables_.groups[g];
    const int64_t n = group.size, length = group.length, first = group.first, padded = pad(n);
    // what keeps its sign when a unit is flipped stands before what does not
    int64_t even = 0;
    for (const Part& part : parts_of(group))
      if (!part.negated) even += part.width;
    odd_.resize(n * padded), kept_.assign(n * padded, 0.0f), gain_.resize(n * padded);
    const float *own = network + first, *goal = columns_[g].data();
    similarities(own, goal, n, length, padded, even, length, odd_.data());
    if (even) similarities(own, goal, n, length, padded, 0, even, kept_.data());
    for (int64_t i = 0; i < n * padded; ++i) gain_[i] = kept_[i] + (may_flip ? std::fabs(odd_[i]) : odd_[i]);
    assignment_.solve(gain_.data(), n, padded, unit_);
    double before = 0, after = 0, size = 0;
    sign_.assign(n, 0);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t here = unit_[j] * padded + j;
      sign_[j] = may_flip && odd_[here] < 0;
      before += kept_[j * padded + j] + odd_[j * padded + j];
      after += gain_[here], size += std::fabs(gain_[here]);
    }
    if (after - before <= kNoise * size) return false;
    move_rows(network + first, n, length, even);
    for (const Part& part : parts_of(group))
      if (part.other >= 0) move_blocks(network, g, tables_.groups[part.other]);
    return true;
  }

  void move_rows(float* rows, int64_t n, int64_t length, int64_t even) {
    scratch_.assign(rows, rows + n * length);
    for (int64_t j = 0; j < n; ++j) {
      std::copy_n(scratch_.data() + unit_[j] * length, length, rows + j * length);
      if (sign_[j])
        for (int64_t i = even; i < length; ++i) rows[j * length + i] = -rows[j * length + i];
    }
  }

  // Moves the units of group g inside of the rows of another group.
  void move_blocks(float* network, int64_t g, const Group& other) {
    const int64_t n = tables_.groups[g].size;
    for (const Part& part : parts_of(other)) {
      if (part.other != g) continue;
      const int64_t block = part.block;
      for (int64_t row = 0; row < other.size; ++row) {
        float* x = network + other.first + row * other.length + part.start;
        scratch_.assign(x, x + part.width);
        for (int64_t k = 0; k < part.before; ++k)
          for (int64_t j = 0; j < n; ++j) {
            const float* from = scratch_.data() + (k * n + unit_[j]) * block;
            float* to = x + (k * n + j) * block;
            if (sign_[j] && part.negated)
              for (int64_t i = 0; i < block; ++i) to[i] = -from[i];
            else
              std::copy_n(from, block, to);
          }
      }
    }
  }

  std::span<const Part> parts_of(const Group& group) const {
    return {tables_.parts + group.first_part, size_t(group.parts)};
  }

  const Tables tables_;
  Assignment assignment_;
  std::vector<std::vector<float>> columns_;  // of each group: the target's units [length, padded]
  std::vector<float> gain_, odd_, kept_, scratch_;
  std::vector<int64_t> unit_;
  std::vector<char> sign_, waiting_;
};

// Whether size * length numbers lie in a stretch of `whole` from `first` on.
bool lies(int64_t first, int64_t size, int64_t length, int64_t whole) {
  return first >= 0 && first <= whole && size > 0 && length >= 0 && length <= (whole - first) / size;
}

// Groups whose units lie in a packed network, and whose parts lie side by side in them.
void check_tables(const Tables& tables) {
  for (int64_t g = 0; g < tables.num_groups; ++g) {
    const Group& group = tables.groups[g];
    STD_TORCH_CHECK(lies(group.first, group.size, group.length, tables.packed),
                    "matched_distance: groups must be of networks of ", tables.packed, " weights, got group ", g,
                    " of another");
    const bool has_parts = group.parts >= 0 && lies(group.first_part, 1, group.parts, tables.num_parts);
    STD_TORCH_CHECK(has_parts, "matched_distance: groups must have parts in [0, ", tables.num_parts, "), got group ", g,
                    " with others");
    int64_t even = 0;
    for (int64_t p = group.first_part; p < group.first_part + group.parts; ++p) {
      const Part& part = tables.parts[p];
      bool fits = lies(part.start, 1, part.width, group.length) && part.other < tables.num_groups;
      if (fits && part.other >= 0)  // blocks of all units, some times
        fits = part.block >= 0 && part.before >= 0 && lies(0, tables.groups[part.other].size, part.block, part.width) &&
               part.before <= part.width / std::max<int64_t>(tables.groups[part.other].size * part.block, 1);
      even += fits && !part.negated ? part.width : 0;
      STD_TORCH_CHECK(fits && even <= group.length, "matched_distance: parts must lie in the ", group.length,
                      " weights of a unit of group ", g, ", got part ", p, " outside");
    }
  }
}

Tensor matched_distance_cpu(const Tensor& queries_, const Tensor& references_, const Tensor& candidates_,
                            const Tensor& may_flip_, const Tensor& flips_, const Tensor& groups_, const Tensor& parts_,
                            const Tensor& once_) {
  const Tensor queries = as_contiguous(queries_), references = as_contiguous(references_);
  const Tensor candidates = as_contiguous(candidates_), groups = as_contiguous(groups_);
  const Tensor may_flip = as_contiguous(may_flip_), flips = as_contiguous(flips_);
  const Tensor parts = as_contiguous(parts_), once = as_contiguous(once_);
  const char* const op = "matched_distance";
  check_tensor(op, "queries", queries, ScalarType::Float, {kAny, kAny});
  const int64_t rows = queries.size(0), packed = queries.size(1);
  check_tensor(op, "references", references, ScalarType::Float, {kAny, packed});
  check_tensor(op, "candidates", candidates, ScalarType::Long, {rows, kAny});
  check_tensor(op, "query_flips", may_flip, ScalarType::Bool, {rows});
  check_tensor(op, "reference_flips", flips, ScalarType::Bool, {references.size(0)});
  check_tensor(op, "groups", groups, ScalarType::Long, {kAny, sizeof(Group) / sizeof(int64_t)});
  check_tensor(op, "parts", parts, ScalarType::Long, {kAny, sizeof(Part) / sizeof(int64_t)});
  check_tensor(op, "once", once, ScalarType::Float, {packed});
  const int64_t count = candidates.size(1);
  const Tensor squares = torch::stable::new_empty(queries, {rows, count}, ScalarType::Double);
  const Tables tables = {.groups = reinterpret_cast<const Group*>(groups.const_data_ptr<int64_t>()),
                         .parts = reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>()),
                         .num_groups = groups.size(0),
                         .num_parts = parts.size(0),
                         .packed = packed};
  check_tables(tables);
  const float *q = queries.const_data_ptr<float>(), *r = references.const_data_ptr<float>();
  const float* weights = once.const_data_ptr<float>();
  const int64_t* chosen = candidates.const_data_ptr<int64_t>();
  const bool *query_flips = may_flip.const_data_ptr<bool>(), *reference_flips = flips.const_data_ptr<bool>();
  double* out = squares.mutable_data_ptr<double>();
  check_range(op, "candidates", chosen, rows * count, 0, references.size(0));

  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Matcher matcher(tables);
    std::vector<float> moved(packed);
    for (int64_t i = begin; i < end; ++i) {
      matcher.aim(q + i * packed);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t reference = chosen[i * count + k];
        std::copy_n(r + reference * packed, packed, moved.data());
        matcher.match(moved.data(), query_flips[i] && reference_flips[reference]);
        // weights between two groups are packed twice and count once
        out[i * count + k] = squared_distance(q + i * packed, moved.data(), weights, packed);
      }
    }
  });
  return squares;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("matched_distance", TORCH_BOX(&matched_distance_cpu)); }

}  // namespace fastws
