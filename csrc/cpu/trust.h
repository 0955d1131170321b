#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

// What is looked at before shapes, indices and lengths are trusted: Python checks less under torch.compile, and
// nothing where torch.ops is called. On a CPU that costs nothing beside the weights, and a wrong number is a sentence
// instead of a crash; on a GPU it would wait for the device.

namespace fastws {

constexpr int64_t kAny = -1;  // stands for any size

template <typename Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == kAny ? "*" : std::to_string(size));
  return "[" + text + "]";
}

inline void check_tensor(const char* op, const char* name, const torch::stable::Tensor& x,
                         torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const auto same = [](int64_t wanted, int64_t size) { return wanted == kAny || wanted == size; };
  const auto given = x.sizes();
  const bool fits = x.scalar_type() == dtype && x.is_cpu() &&
                    std::equal(sizes.begin(), sizes.end(), given.begin(), given.end(), same);
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", shape_of(sizes), " ", torch::headeronly::toString(dtype),
                  " on a CPU, got ", shape_of(given), " ", torch::headeronly::toString(x.scalar_type()));
}

inline void check_like(const char* op, const char* name, const torch::stable::Tensor& x,
                       const torch::stable::Tensor& like) {
  const auto wanted = like.sizes(), given = x.sizes();
  const bool fits = x.scalar_type() == like.scalar_type() && x.is_cpu() &&
                    std::equal(wanted.begin(), wanted.end(), given.begin(), given.end());
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", shape_of(wanted), " ",
                  torch::headeronly::toString(like.scalar_type()), " on a CPU, got ", shape_of(given), " ",
                  torch::headeronly::toString(x.scalar_type()));
}

// Values from low on, and below high.
template <typename number_t>
void check_range(const char* op, const char* name, const number_t* values, int64_t count, int64_t low, int64_t high) {
  const auto lies = [=](number_t value) { return low <= value && value < high; };
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= lies(values[i]);
  STD_TORCH_CHECK(all, op, ": ", name, " must be in [", low, ", ", high, "), got ",
                  *std::find_if_not(values, values + count, lies));
}

inline void check_lengths(const char* op, const int32_t* lengths, int64_t count, int64_t token_size) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(lengths[i] >= 0 && lengths[i] <= token_size, op, ": lengths must be in [0, ", token_size, "], got ",
                    lengths[i]);
}

}  // namespace fastws
