#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

// Tables of small CNNs, and the codes in them and in recipes, as fastws/small_cnn/ has them in Python.

namespace fastws {
namespace {

enum Kind : int64_t { kConvolution, kPooling, kActivation, kDropout };
enum Activation : int32_t { kTanh, kRelu, kSigmoid, kGelu, kActivations };
enum Optimizer : int32_t { kSgd, kHeavyBall, kAdam, kAdamW, kOptimizers };

constexpr int64_t kBudget = int64_t(1) << 17;   // weights and activations of one network and image, at most
constexpr int64_t kLargest = int64_t(1) << 24;  // numbers of an image, at most

// One row of a table: an operation from maps [in_channels, in_height, in_width] to [out_channels, ...].
struct Row {
  int64_t kind, in_channels, in_height, in_width, out_channels, kernel_height, kernel_width, stride_height,
      stride_width, weight_offset, bias_offset, first_unit;

  int64_t out_height() const { return (in_height - kernel_height) / stride_height + 1; }
  int64_t out_width() const { return (in_width - kernel_width) / stride_width + 1; }
  int64_t in_size() const { return in_channels * in_height * in_width; }
  int64_t out_size() const { return out_channels * out_height() * out_width(); }
  int64_t fan_in() const { return in_channels * kernel_height * kernel_width; }
};
static_assert(sizeof(Row) == 12 * sizeof(int64_t));

// How many numbers there are in a map of such sizes, or 0 where it is empty or too large.
inline int64_t size_of(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size < 1 || size > kLargest) return 0;
    product *= size;
    if (product > kLargest) return 0;
  }
  return product;
}

// Whether the numbers of a row belong together, and are small enough to be multiplied.
inline bool is_sound(const Row& row) {
  if (size_of({row.in_channels, row.in_height, row.in_width}) == 0) return false;
  for (const int64_t size : {row.kernel_height, row.kernel_width, row.stride_height, row.stride_width})
    if (size_of({size}) == 0) return false;
  if (row.kernel_height > row.in_height || row.kernel_width > row.in_width) return false;
  if (size_of({row.out_channels, row.out_height(), row.out_width()}) == 0) return false;
  if (row.kind == kConvolution) return true;
  const bool tiles = row.stride_height == row.kernel_height && row.stride_width == row.kernel_width;
  const bool single = row.kind == kPooling || (row.kernel_height == 1 && row.kernel_width == 1);
  return kPooling <= row.kind && row.kind <= kDropout && row.out_channels == row.in_channels && tiles && single;
}

// Rows of which each takes what the one before it gives, the first one an image, and that use all weights.
inline void check_rows(const char* op, const Row* rows, int64_t count, int64_t channels, int64_t height, int64_t width,
                       int64_t num_weights) {
  STD_TORCH_CHECK(count > 0, op, ": layers must be a table of at least 1 row, got 0");
  int64_t used = 0, units = 0, numbers = num_weights;
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const bool same = row.in_channels == channels && row.in_height == height && row.in_width == width;
    const bool flat = row.in_height == 1 && row.in_width == 1 && row.in_channels == size_of({channels, height, width});
    bool fits = (same || flat) && is_sound(row);
    if (fits && row.kind == kConvolution) {
      const int64_t size = row.out_channels * row.fan_in();
      fits = 0 <= row.weight_offset && row.weight_offset <= num_weights - size &&
             row.bias_offset <= num_weights - row.out_channels;
      used += size + (row.bias_offset >= 0 ? row.out_channels : 0);
    } else if (fits && row.kind == kDropout) {
      fits = row.first_unit == units;
      units += row.out_size();
    }
    fits = fits && (numbers += row.out_size()) <= kBudget;
    STD_TORCH_CHECK(fits, op, ": layers must be a table for such images and ", num_weights, " weights, got row ", r,
                    " of another, which does not fit maps of ", channels, " x ", height, " x ", width);
    channels = row.out_channels, height = row.out_height(), width = row.out_width();
  }
  const bool ends = rows[count - 1].kind == kConvolution && height == 1 && width == 1;
  STD_TORCH_CHECK(used == num_weights && ends, op, ": layers must use all of ", num_weights,
                  " weights and end in a dense layer, got one that uses ", used);
}

}  // namespace
}  // namespace fastws
