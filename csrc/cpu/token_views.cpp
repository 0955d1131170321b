#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/random/draw.h"
#include "cpu/random/normal.h"
#include "cpu/rows.h"
#include "cpu/trust_tables.h"
#include "dispatch.h"
#include "table.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

// What arithmetic is done in.
template <typename scalar_t>
using wide_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename from_t, typename to_t>
FASTWS_CLONES void convert(const from_t* from, to_t* to, int64_t size) {
  for (int64_t t = 0; t < size; ++t) to[t] = to_t(from[t]);
}

template <typename wide_t>
FASTWS_CLONES void standardise(wide_t* x, int64_t size, float scale, float shift) {
  for (int64_t t = 0; t < size; ++t) x[t] = x[t] * scale + shift;
}

constexpr int64_t kLargestWindow = (int64_t(1) << 31) - 1, kLastStart = int64_t(1) << 62;
constexpr int64_t kWords = 8 * kPhiloxWords;  // drawn at once

// x[t] *= 1 + noise * normal, where x[0] is entry first of the draw; a word gives two normals.
template <typename wide_t>
FASTWS_CLONES void multiply_noise(wide_t* x, int64_t size, float noise, uint64_t seed, uint64_t offset, int64_t first) {
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
    for (int64_t t = 0; t < to - from; ++t) y[t] *= 1 + noise * normal[t];
  }
}

// x[t] = 0 where the word of entry first + t is below the threshold.
template <typename wide_t>
FASTWS_CLONES void erase(wide_t* x, int64_t size, int64_t threshold, uint64_t seed, uint64_t offset, int64_t first) {
  uint32_t words[kWords];
  for (int64_t begin = first / 4 * 4; begin < first + size; begin += kWords) {
    draw_words(seed, offset, begin / 4, kWords / 4, words);
    const int64_t from = begin > first ? begin : first;
    const int64_t to = begin + kWords < first + size ? begin + kWords : first + size;
    for (int64_t i = from; i < to; ++i) x[i - first] = words[i - begin] < threshold ? wide_t(0) : x[i - first];
  }
}

struct Options {
  const float *scale, *shift;  // per row of the table, or null
  float noise;
  int64_t erase_threshold;
  uint64_t seed, offset;

  bool random() const { return noise > 0 || erase_threshold > 0; }
  bool arithmetic() const { return scale || shift || random(); }
};

// Noise and erasing of entries that follow each other; entry is the number of the first in the draw.
template <typename wide_t>
void augment(wide_t* x, int64_t size, const Options& options, int64_t entry) {
  if (options.noise > 0) multiply_noise(x, size, options.noise, options.seed, 2 * options.offset, entry);
  if (options.erase_threshold > 0) erase(x, size, options.erase_threshold, options.seed, 2 * options.offset + 1, entry);
}

// The place of a row in a group that is permuted.
inline int64_t permuted(const int32_t* permutations, int64_t place, int64_t row) {
  return permutations && place >= 0 ? index_of(permutations[place + row]) : row;
}

// Whether the row is negated: -1 or 0.
inline int32_t negated(const int32_t* permutations, int64_t place, int64_t row) {
  return permutations && place >= 0 ? sign_of(permutations[place + row]) : 0;
}

// Entries 0 to length of one token: chunk q of row c, whose weights are those at from.
template <typename scalar_t>
void gather_token(const scalar_t* weights, const scalar_t* from, const Layer& layer, const int32_t* permutations,
                  bool has_signs, int64_t row, int64_t chunk, int64_t token_size, int64_t length, scalar_t* token) {
  const int64_t begin = chunk * token_size, end = std::min(begin + length, layer.row_length);
  const int32_t negative = has_signs ? negated(permutations, layer.first_out, row) : 0;
  const int32_t* in = permutations + layer.first_in;
  if (end > begin) {
    if (!permutations || layer.first_in < 0)
      negative ? copy_signed(from + begin, token, end - begin, negative) : copy(from + begin, token, end - begin);
    else if (has_signs)
      move_row<false, true, scalar_t>(from, token, in, layer.block, layer.units, negative, begin, end);
    else
      move_row<false, false, scalar_t>(from, token, in, layer.block, layer.units, 0, begin, end);
  }
  if (begin + length > layer.row_length) {
    const scalar_t* bias = weights + layer.bias_offset + permuted(permutations, layer.first_bias, row);
    copy_signed(bias, token + length - 1, 1, negated(permutations, layer.first_bias, row));
  }
}

// The weights of a row, from which some tokens are to be cut; held near if they are permuted and most are needed.
template <typename scalar_t>
const scalar_t* read_row(const scalar_t* weights, const Layer& layer, const int32_t* permutations, int64_t row,
                         int64_t tokens, NearRow<scalar_t>& near) {
  const scalar_t* from =
      weights + layer.weight_offset + permuted(permutations, layer.first_out, row) * layer.row_length;
  const bool gathers = permutations && layer.first_in >= 0, most = 2 * tokens >= layer.chunks;
  return gathers && most && near.fits(layer) ? near.hold(layer, from) : from;
}

// One token: gathered where it can stay, widened for arithmetic if there is any, and stored. Where values are as wide
// as the arithmetic, what is random is left to augment(), which is faster for several tokens at once.
template <typename scalar_t, typename to_t>
void make_token(const scalar_t* weights, const scalar_t* from, const Layer& layer, int64_t l,
                const int32_t* permutations, bool has_signs, int64_t row, int64_t chunk, int64_t token_size,
                int64_t length, int64_t entry, const Options& options, scalar_t* gathered, wide_type<scalar_t>* wide,
                to_t* token) {
  using wide_t = wide_type<scalar_t>;
  constexpr bool kStays = std::is_same_v<scalar_t, to_t>, kWide = std::is_same_v<scalar_t, wide_t>;
  if constexpr (std::is_same_v<wide_t, to_t>) wide = token;
  if constexpr (kWide) gathered = wide;
  if constexpr (kStays && !kWide)
    if (!options.arithmetic()) gathered = token;
  gather_token(weights, from, layer, permutations, has_signs, row, chunk, token_size, length, gathered);
  if constexpr (kStays && !kWide)
    if (!options.arithmetic()) return;

  if constexpr (!kWide) convert(gathered, wide, length);
  if (options.scale || options.shift)
    standardise(wide, length, options.scale ? options.scale[l] : 1, options.shift ? options.shift[l] : 0);
  if constexpr (!std::is_same_v<wide_t, to_t>) {
    augment(wide, length, options, entry);
    convert(wide, token, length);
  }
}

struct Views {
  const Layer* table;
  const int64_t *base, *layers, *start;  // [B], [B, 2], [B]
  const int32_t* permutations;           // [B, indices]
  char* has_signs;                       // [B], whether permutations negate units
  int64_t indices, token_size, window;
  int32_t *lengths, *positions;  // [B, W], [B, W, 3]
};

// What views of a network may touch.
struct Network {
  int64_t first, last;  // rows of the table
  int64_t extent = 0;   // weights from the base of the network on
  std::vector<uint32_t> largest;

  Network(const Views& views, int64_t first, int64_t last, int64_t numel) : first(first), last(last) {
    const Layer* layers = views.table + first;
    check_layers("token_views", layers, last - first, numel, views.token_size);
    for (const Layer* layer = layers; layer < views.table + last; ++layer) {
      extent = std::max(extent, layer->weight_offset + layer->rows * layer->row_length);
      if (layer->bias_offset >= 0) extent = std::max(extent, layer->bias_offset + layer->rows);
    }
    if (views.indices > 0) largest = find_largest("token_views", layers, last - first, views.indices);
  }
};

// numel: of all weights; width: of the row of each network, or numel.
void check_views(const Views& views, int64_t batch, int64_t num_layers, int64_t numel, int64_t width) {
  std::vector<Network> networks;  // the different ones, few
  for (int64_t view = 0; view < batch; ++view) {
    const int64_t first = views.layers[2 * view], last = views.layers[2 * view + 1], base = views.base[view];
    STD_TORCH_CHECK(0 <= first && first < last && last <= num_layers, "token_views: layers must be in [0, ", num_layers,
                    "], got ", first, " to ", last);
    auto network = std::find_if(networks.begin(), networks.end(),
                                [=](const Network& known) { return known.first == first && known.last == last; });
    if (network == networks.end()) network = networks.emplace(network, views, first, last, numel);
    STD_TORCH_CHECK(0 <= base && network->extent <= width && base <= numel - network->extent,
                    "token_views: table must be of networks of ", width, " weights, got one of ", network->extent,
                    " that begins at weight ", base, " of ", numel);
    STD_TORCH_CHECK(0 <= views.start[view] && views.start[view] <= kLastStart,
                    "token_views: start must be in [0, 2**62], got ", views.start[view]);
    if (views.indices > 0)
      views.has_signs[view] = check_permutation("token_views", views.permutations, view, network->largest);
  }
}

// Augments tokens in runs, as long as most of their entries hold weights; padding is 0 and stays 0.
template <typename to_t>
class Runs {
 public:
  Runs(to_t* values, int64_t token_size, const Options& options, int64_t begin)
      : values_(values), size_(token_size), options_(options), first_(begin) {}

  void add(int64_t token, int64_t length) {
    if (2 * length < size_) {
      flush(token);
      augment(values_ + token * size_, length, options_, token * size_);
      first_ = token + 1;
    } else if (token + 1 - first_ == kTokens) {
      flush(token + 1);
    }
  }

  void flush(int64_t end) {
    if (end > first_) augment(values_ + first_ * size_, (end - first_) * size_, options_, first_ * size_);
    first_ = end;
  }

 private:
  static constexpr int64_t kTokens = 8;  // of a few kilobytes, which are still in the nearest cache
  to_t* values_;
  const int64_t size_;
  const Options& options_;
  int64_t first_;
};

// Tokens begin to end of the batch; they follow each other, so that the layer is looked for once a view.
template <typename scalar_t, typename to_t>
void make_tokens(const scalar_t* weights, const Views& views, const Options& options, to_t* values, int64_t begin,
                 int64_t end) {
  std::vector<scalar_t> gathered(views.token_size);
  std::vector<wide_type<scalar_t>> wide(views.token_size);
  NearRow<scalar_t> near;
  const int64_t size = views.token_size;
  constexpr bool kRuns = std::is_same_v<to_t, wide_type<scalar_t>>;  // else make_token has augmented them
  Runs<wide_type<scalar_t>> runs(reinterpret_cast<wide_type<scalar_t>*>(values), size, options, begin);
  for (int64_t k = begin; k < end;) {
    const int64_t view = k / views.window, first = views.layers[2 * view], last = views.layers[2 * view + 1];
    const int32_t* permutations = views.indices > 0 ? views.permutations + view * views.indices : nullptr;
    int64_t token = views.start[view] + k % views.window;
    int64_t l = find_layer(views.table, first, last, token);
    int64_t row = (token - views.table[l].first_token) / views.table[l].chunks;
    int64_t chunk = (token - views.table[l].first_token) % views.table[l].chunks;
    const scalar_t* from = nullptr;  // the weights of this row
    for (const int64_t stop = std::min(end, (view + 1) * views.window); k < stop; ++k, ++token) {
      const Layer& layer = views.table[l];
      const bool inside = row < layer.rows;  // else the sequence is over, and only padding follows
      const int64_t entries = layer.row_length + (layer.bias_offset >= 0) - chunk * size;
      const int64_t length = inside ? std::clamp<int64_t>(entries, 0, size) : 0;
      const scalar_t* network = weights + views.base[view];
      if (length > 0) {
        if (from == nullptr)
          from = read_row(network, layer, permutations, row, std::min(layer.chunks - chunk, stop - k), near);
        make_token(network, from, layer, l, permutations, views.has_signs[view], row, chunk, size, length, k * size,
                   options, gathered.data(), wide.data(), values + k * size);
      }
      std::fill(values + k * size + length, values + (k + 1) * size, to_t(0));
      if constexpr (kRuns)
        if (options.random()) runs.add(k, length);
      views.lengths[k] = int32_t(length);
      const int64_t position[3] = {token, l - first, row};
      for (int i = 0; i < 3; ++i) views.positions[3 * k + i] = inside ? int32_t(position[i]) : 0;
      if (++chunk == layer.chunks) chunk = 0, ++row, from = nullptr;
      if (row == layer.rows && l + 1 < last) row = 0, ++l;
    }
  }
  if constexpr (kRuns)
    if (options.random()) runs.flush(end);
}

std::tuple<Tensor, Tensor, Tensor> token_views_cpu(const Tensor& weights, const Tensor& table_, const Tensor& base_,
                                                   const Tensor& layers_, const Tensor& start_,
                                                   const Tensor& permutations_, const Tensor& scale_,
                                                   const Tensor& shift_, int64_t token_size, int64_t window,
                                                   double noise, int64_t erase_threshold, int64_t seed, int64_t offset,
                                                   torch::headeronly::ScalarType dtype) {
  const Tensor table = as_contiguous(table_), base = as_contiguous(base_);
  const Tensor layers = as_contiguous(layers_), start = as_contiguous(start_);
  const Tensor permutations = as_contiguous(permutations_);
  const Tensor scale = as_contiguous(scale_), shift = as_contiguous(shift_);
  using torch::headeronly::ScalarType;
  check_tensor("token_views", "start", start, ScalarType::Long, {kAny});
  const Layer* rows = read_table("token_views", table);
  const int64_t batch = start.size(0), num_layers = table.size(0);
  STD_TORCH_CHECK(weights.is_contiguous(), "token_views: weights must be contiguous, got strides");
  STD_TORCH_CHECK(0 <= window && window <= kLargestWindow, "token_views: window must be in [0, 2**31), got ", window);
  check_tensor("token_views", "base", base, ScalarType::Long, {batch});
  check_tensor("token_views", "layers", layers, ScalarType::Long, {batch, 2});
  check_tensor("token_views", "permutations", permutations, ScalarType::Int, {batch, kAny});
  check_tensor("token_views", "scale", scale, ScalarType::Float, {scale.numel() > 0 ? num_layers : 0});
  check_tensor("token_views", "shift", shift, ScalarType::Float, {shift.numel() > 0 ? num_layers : 0});
  const Tensor values = new_empty(weights, {batch, window, token_size}, dtype);
  const Tensor lengths = torch::stable::new_empty(weights, {batch, window}, ScalarType::Int);
  const Tensor positions = torch::stable::new_empty(weights, {batch, window, 3}, ScalarType::Int);

  std::vector<char> has_signs(batch);
  const Views views = {.table = rows,
                       .base = base.const_data_ptr<int64_t>(),
                       .layers = layers.const_data_ptr<int64_t>(),
                       .start = start.const_data_ptr<int64_t>(),
                       .permutations = permutations.const_data_ptr<int32_t>(),
                       .has_signs = has_signs.data(),
                       .indices = permutations.size(1),
                       .token_size = token_size,
                       .window = window,
                       .lengths = lengths.mutable_data_ptr<int32_t>(),
                       .positions = positions.mutable_data_ptr<int32_t>()};
  const Options options = {.scale = scale.numel() > 0 ? scale.const_data_ptr<float>() : nullptr,
                           .shift = shift.numel() > 0 ? shift.const_data_ptr<float>() : nullptr,
                           .noise = float(noise),
                           .erase_threshold = erase_threshold,
                           .seed = uint64_t(seed),
                           .offset = uint64_t(offset)};
  const int64_t numel = weights.numel();
  check_views(views, batch, num_layers, numel, weights.dim() == 2 ? weights.size(1) : numel);
  dispatch_floating(weights.scalar_type(), "token_views", [&]<typename scalar_t>() {
    const scalar_t* from = weights.const_data_ptr<scalar_t>();
    dispatch_floating(dtype, "token_views", [&]<typename to_t>() {
      to_t* to = values.mutable_data_ptr<to_t>();
      torch::stable::parallel_for(0, batch * window, 16, [&, from, to](int64_t begin, int64_t end) {
        make_tokens(from, views, options, to, begin, end);
      });
    });
  });
  return {values, lengths, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("token_views", TORCH_BOX(&token_views_cpu)); }

}  // namespace fastws
