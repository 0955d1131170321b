#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "cpu/token_views_augmentation.h"
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

constexpr int64_t kFew = 4;  // entries, which are moved before a call for them is made
constexpr int64_t kLargestWindow = (int64_t(1) << 31) - 1, kLastStart = int64_t(1) << 62;

// The place of a row in a group that is permuted.
inline int64_t permuted(const int32_t* permutations, int64_t place, int64_t row) {
  return permutations && place >= 0 ? index_of(permutations[place + row]) : row;
}

// Whether the row is negated: -1 or 0.
inline int32_t negated(const int32_t* permutations, int64_t place, int64_t row) {
  return permutations && place >= 0 ? sign_of(permutations[place + row]) : 0;
}

// Where a part of a token comes from: entries of a row of a layer.
struct Place {
  int64_t l, row, entry;
};

// count entries of a row, of which the weights are those at from.
template <typename scalar_t>
void gather(const scalar_t* weights, const scalar_t* from, const Layer& layer, const int32_t* permutations,
            bool has_signs, const Place& place, int64_t count, scalar_t* to) {
  const int64_t begin = place.entry, end = std::min(begin + count, layer.row_length);
  const int32_t negative = has_signs ? negated(permutations, layer.first_out, place.row) : 0;
  const int32_t* in = permutation_at(permutations, layer.first_in);
  if (end > begin) {
    if (!in)
      negative ? copy_signed(from + begin, to, end - begin, negative) : copy(from + begin, to, end - begin);
    else if (has_signs)
      move_row<false, true, scalar_t>(from, to, in, layer.block, layer.units, negative, begin, end);
    else
      move_row<false, false, scalar_t>(from, to, in, layer.block, layer.units, 0, begin, end);
  }
  if (begin + count > layer.row_length) {
    const scalar_t* bias = weights + layer.bias_offset + permuted(permutations, layer.first_bias, place.row);
    copy_signed(bias, to + count - 1, 1, negated(permutations, layer.first_bias, place.row));
  }
}

constexpr int64_t kSmall = 16 * 1024, kLine = 64;  // bytes
constexpr int64_t kShort = 1024;                   // bytes of a row that is read where it is, in whatever order

// Whether the rows of a layer lie in tokens as in the flat vector, and are so short that they are best made together.
template <typename scalar_t>
bool made_together(const Layer& layer, const int32_t* permutations) {
  const bool is_short = layer.row_length * int64_t(sizeof(scalar_t)) <= kShort;
  return layer.dense() && layer.bias_offset < 0 && (is_short || permutations == nullptr);
}

// count entries of rows that follow each other, of a layer without biases.
template <typename scalar_t>
void gather_rows(const scalar_t* weights, const Layer& layer, const int32_t* permutations, bool has_signs,
                 const Place& place, int64_t count, scalar_t* to) {
  const int64_t length = layer.row_length;
  const int32_t *out = permutation_at(permutations, layer.first_out),
                *in = permutation_at(permutations, layer.first_in);
  const scalar_t* from = weights + layer.weight_offset;
  if (!out && !in) return copy(from + place.row * length + place.entry, to, count);
  int64_t row = place.row, begin = place.entry;
  for (int64_t size; count > 0; to += size, count -= size, ++row, begin = 0) {
    size = std::min(count, length - begin);
    const int32_t entry = out ? out[row] : int32_t(row), negative = sign_of(entry);
    const scalar_t* const source = from + index_of(entry) * length;
    if (!in && size < kFew)
      copy_signed(source + begin, to, size, negative);
    else if (!in)
      negative ? copy_signed(source + begin, to, size, negative) : copy(source + begin, to, size);
    else if (has_signs)
      move_row<false, true, scalar_t>(source, to, in, layer.block, layer.units, negative, begin, begin + size);
    else
      move_row<false, false, scalar_t>(source, to, in, layer.block, layer.units, 0, begin, begin + size);
  }
}

// The weights of a row, of which some entries are needed; held near if they are permuted and most are.
template <typename scalar_t>
const scalar_t* read_row(const scalar_t* weights, const Layer& layer, const int32_t* permutations, int64_t row,
                         int64_t entries, NearRow<scalar_t>& near) {
  const scalar_t* from =
      weights + layer.weight_offset + permuted(permutations, layer.first_out, row) * layer.row_length;
  const bool gathers = permutations && layer.first_in >= 0, most = 2 * entries >= layer.row_length;
  return gathers && most && near.fits(layer) ? near.hold(layer, from) : from;
}

struct Views {
  const Layer* table;
  const int64_t *base, *layers, *start;  // [B], [B, 2], [B]
  const int32_t* permutations;           // [B, indices]
  char* has_signs;                       // [B], whether permutations negate units
  int64_t* extents;                      // [B], weights of the network up to the last one that is in a token
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
    views.extents[view] = network->extent;
    if (views.indices > 0)
      views.has_signs[view] = check_permutation("token_views", views.permutations, view, network->largest);
  }
}

// Tokens begin to end of the batch; they follow each other, so that the layer is looked for once a view.
template <typename scalar_t, typename to_t>
class Maker {
 public:
  Maker(const scalar_t* weights, const Views& views, const Options& options, to_t* values, int64_t begin)
      : weights_(weights),
        views_(views),
        options_(options),
        values_(values),
        gathered_(views.token_size),
        wide_(views.token_size),
        runs_(reinterpret_cast<wide_t*>(values), views.lengths, views.token_size, options, begin) {}

  void make(int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end;) {
      const int64_t stop = std::min(end, (k / views_.window + 1) * views_.window);
      begin_view(k / views_.window, k % views_.window);
      for (; k < stop; ++k, ++token_) make_token(k, stop);
    }
    if constexpr (kRuns)
      if (options_.random()) runs_.flush(end);
  }

 private:
  using wide_t = wide_type<scalar_t>;
  // values as wide as the arithmetic are augmented where they are, several tokens at once
  static constexpr bool kStays = std::is_same_v<scalar_t, to_t>, kWide = std::is_same_v<scalar_t, wide_t>,
                        kRuns = std::is_same_v<to_t, wide_t>;

  void begin_view(int64_t view, int64_t token) {
    view_ = view, first_ = views_.layers[2 * view], last_ = views_.layers[2 * view + 1];
    permutations_ = views_.indices > 0 ? views_.permutations + view * views_.indices : nullptr;
    token_ = views_.start[view] + token;
    const int64_t size = views_.token_size, l = find_layer(views_.table, first_, last_, token_, 0);
    const Layer& layer = views_.table[l];
    // tokens far behind the end, which are padding, would make a product that wraps around and points before the
    // weights
    const int64_t behind = layer.rows * layer.stride(size) / size + 2;
    const int64_t entry = std::min(token_ - layer.first_token, behind) * size + (layer.dense() ? layer.chunks : 0);
    place_ = {l, entry / layer.stride(size), entry % layer.stride(size)};
    from_ = nullptr;
    block_ = options_.draw_block(view, views_.extents[view]);
    // a small network is asked for in order, before its rows are read in another one
    const int64_t bytes = views_.extents[view] * int64_t(sizeof(scalar_t));
    const char* const network = reinterpret_cast<const char*>(weights_ + views_.base[view]);
    for (int64_t byte = 0; byte < bytes && bytes <= kSmall; byte += kLine) __builtin_prefetch(network + byte);
  }

  // Token k of the batch, of a view of which tokens up to stop are made here.
  void make_token(int64_t k, int64_t stop) {
    const int64_t size = views_.token_size;
    const bool inside = place_.row < views_.table[place_.l].rows;  // else the sequence is over: padding follows
    write_position(k, inside);
    int64_t length = 0;
    for (bool open = inside; open && length < size;) {
      const Layer& layer = views_.table[place_.l];
      const int64_t rows = made_together<scalar_t>(layer, permutations_) ? layer.rows - place_.row : 1;
      const int64_t count = std::clamp<int64_t>(rows * layer.row_entries() - place_.entry, 0, size - length);
      if (count > 0) make_part(k * size + length, length, count, (stop - k) * size - length, values_ + k * size);
      length += count;
      open = advance(layer, count, length);
    }
    if (place_.row == views_.table[place_.l].rows && place_.l + 1 < last_) place_ = {place_.l + 1, 0, 0};
    views_.lengths[k] = int32_t(length);
    to_t* const token = values_ + k * size;
    if constexpr (!kRuns)
      if (!kStays || options_.arithmetic()) finish(token, length, k * size);
    std::fill(token + length, token + size, to_t(0));
    if constexpr (kRuns)
      if (options_.random()) runs_.add(k);
  }

  void write_position(int64_t k, bool inside) {
    const Layer& layer = views_.table[place_.l];
    const int64_t third = layer.dense() ? token_ - layer.first_token : place_.row;
    const int64_t position[3] = {token_, place_.l - first_, third};
    for (int i = 0; i < 3; ++i) views_.positions[3 * k + i] = inside ? int32_t(position[i]) : 0;
  }

  // Goes behind the entries that a token has just taken; whether more of them follow in the same token.
  bool advance(const Layer& layer, int64_t count, int64_t length) {
    const int64_t size = views_.token_size;
    const bool dense = layer.dense();
    const int64_t stride = layer.stride(size), entry = place_.entry + (dense ? count : size);
    place_.entry = entry;
    if (entry < stride) return false;
    place_.row += entry == stride ? 1 : entry / stride, place_.entry = entry == stride ? 0 : entry % stride;
    from_ = nullptr;
    if (!dense) return false;
    if (place_.row < layer.rows) return true;
    const bool follows = length < size && place_.l + 1 < last_ && views_.table[place_.l + 1].dense() &&
                         views_.table[place_.l + 1].first_token == token_;
    if (follows) place_ = {place_.l + 1, 0, 0};
    return follows;
  }

  // count entries of a row, or of several, from entry begin of a token on, of which this thread needs at most so many:
  // gathered where they can stay, widened for arithmetic if there is any.
  void make_part(int64_t entry, int64_t begin, int64_t count, int64_t needed, to_t* token) {
    const Layer& layer = views_.table[place_.l];
    const scalar_t* const network = weights_ + views_.base[view_];
    const bool together = made_together<scalar_t>(layer, permutations_), has_signs = views_.has_signs[view_];
    if (!together && from_ == nullptr)
      from_ =
          read_row(network, layer, permutations_, place_.row, std::min(layer.row_length - place_.entry, needed), near_);
    wide_t* wide = wide_.data();
    if constexpr (kRuns) wide = token;
    scalar_t* gathered = gathered_.data();
    if constexpr (kWide) gathered = wide;
    if constexpr (kStays && !kWide)
      if (!options_.arithmetic()) gathered = token;
    if (together)
      gather_rows(network, layer, permutations_, has_signs, place_, count, gathered + begin);
    else
      gather(network, from_, layer, permutations_, has_signs, place_, count, gathered + begin);
    if constexpr (kStays && !kWide)
      if (!options_.arithmetic()) return;

    const int64_t l = place_.l;
    if constexpr (!kWide) convert(gathered + begin, wide + begin, count);
    if (options_.scale || options_.shift)
      standardise(wide + begin, count, options_.scale ? options_.scale[l] : 1, options_.shift ? options_.shift[l] : 0);
    if (!options_.additive && block_.end == 0) return;
    // of these, the others are the bias
    const int64_t weight = together ? count : std::min(count, layer.row_length - place_.entry);
    const int64_t target = layer.weight_offset + place_.row * layer.row_length + place_.entry;
    if (weight > 0) runs_.augmentation.add(entry, weight, l, target, block_);
    if (weight < count) runs_.augmentation.add(entry + count - 1, 1, l, layer.bias_offset + place_.row, block_);
  }

  // Stores a token whose values are not as wide as the arithmetic.
  void finish(to_t* token, int64_t length, int64_t entry) {
    runs_.augmentation.apply(wide_.data(), length, entry);
    convert(wide_.data(), token, length);
  }

  const scalar_t* const weights_;
  const Views& views_;
  const Options& options_;
  to_t* const values_;
  std::vector<scalar_t> gathered_;
  std::vector<wide_t> wide_;
  NearRow<scalar_t> near_;
  Runs<wide_t> runs_;
  int64_t view_, first_, last_, token_;  // the view, its rows of the table, and the token that is made
  const int32_t* permutations_;
  const scalar_t* from_;  // the weights of the row that is read, or null
  Place place_;
  Range block_;
};

std::tuple<Tensor, Tensor, Tensor> token_views_cpu(const Tensor& weights, const Tensor& table_, const Tensor& base_,
                                                   const Tensor& layers_, const Tensor& start_,
                                                   const Tensor& permutations_, const Tensor& scale_,
                                                   const Tensor& shift_, int64_t token_size, int64_t window,
                                                   double noise, int64_t erase_threshold, int64_t seed, int64_t offset,
                                                   torch::headeronly::ScalarType dtype,
                                                   const std::optional<Tensor>& additive_, double erase_value,
                                                   int64_t block_threshold, int64_t shortest, int64_t longest) {
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
  const std::optional<Tensor> additive = additive_ ? std::optional(as_contiguous(*additive_)) : std::nullopt;
  if (additive) check_tensor("token_views", "additive", *additive, ScalarType::Float, {num_layers});
  STD_TORCH_CHECK(0 <= shortest && shortest <= longest && longest <= kWhole,
                  "token_views: shortest and longest must be in [0, 2**24] and ascend, got ", shortest, " and ",
                  longest);
  const Tensor values = new_empty(weights, {batch, window, token_size}, dtype);
  const Tensor lengths = torch::stable::new_empty(weights, {batch, window}, ScalarType::Int);
  const Tensor positions = torch::stable::new_empty(weights, {batch, window, 3}, ScalarType::Int);

  std::vector<char> has_signs(batch);
  std::vector<int64_t> extents(batch);
  const Views views = {.table = rows,
                       .base = base.const_data_ptr<int64_t>(),
                       .layers = layers.const_data_ptr<int64_t>(),
                       .start = start.const_data_ptr<int64_t>(),
                       .permutations = permutations.const_data_ptr<int32_t>(),
                       .has_signs = has_signs.data(),
                       .extents = extents.data(),
                       .indices = permutations.size(1),
                       .token_size = token_size,
                       .window = window,
                       .lengths = lengths.mutable_data_ptr<int32_t>(),
                       .positions = positions.mutable_data_ptr<int32_t>()};
  const Options options = {.scale = scale.numel() > 0 ? scale.const_data_ptr<float>() : nullptr,
                           .shift = shift.numel() > 0 ? shift.const_data_ptr<float>() : nullptr,
                           .additive = additive ? additive->const_data_ptr<float>() : nullptr,
                           .noise = float(noise),
                           .erase_value = erase_value,
                           .behind = (batch * window * token_size + 7) / 8 * 8,
                           .erase_threshold = erase_threshold,
                           .block_threshold = block_threshold,
                           .shortest = shortest,
                           .longest = longest,
                           .seed = uint64_t(seed),
                           .offset = uint64_t(offset)};
  const int64_t numel = weights.numel();
  check_views(views, batch, num_layers, numel, weights.dim() == 2 ? weights.size(1) : numel);
  dispatch_floating(weights.scalar_type(), "token_views", [&]<typename scalar_t>() {
    const scalar_t* from = weights.const_data_ptr<scalar_t>();
    dispatch_floating(dtype, "token_views", [&]<typename to_t>() {
      to_t* to = values.mutable_data_ptr<to_t>();
      torch::stable::parallel_for(0, batch * window, 16, [&, from, to](int64_t begin, int64_t end) {
        Maker(from, views, options, to, begin).make(begin, end);
      });
    });
  });
  return {values, lengths, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) { m.impl("token_views", TORCH_BOX(&token_views_cpu)); }

}  // namespace fastws
