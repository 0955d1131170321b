#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastws {

// Numbers of any floating type are bytes that may be copied, whatever constructors their class has.
template <typename scalar_t>
inline void copy(const scalar_t* from, scalar_t* to, int64_t count) {
  std::memcpy(static_cast<void*>(to), static_cast<const void*>(from), count * sizeof(scalar_t));
}

// x, or a contiguous copy of it. Asking costs less than calling an operator by its name, which a small kernel would
// feel.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A new tensor like x. The kernel hands out fresh memory in pages of 4 KiB and clears each at its first touch, which
// takes several times as long as writing it; large tensors ask for pages of 2 MiB instead.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& x, std::initializer_list<int64_t> sizes,
                                       std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t type = 0, layout = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  if (dtype)
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), sizes.begin(), sizes.size(), &type, &layout, &device,
                                                   x.get_device_index(), nullptr, &made));
  const torch::stable::Tensor out(made);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (begin + out.numel() * out.element_size()) & ~(kPage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal costs nothing
#endif
  return out;
}

}  // namespace fastws
