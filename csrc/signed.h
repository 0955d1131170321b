#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace fastws {

// An entry of a signed permutation is p, or ~p where the unit is negated as well: its index, and -1 or 0.
C10_HOST_DEVICE inline int32_t sign_of(int32_t entry) { return entry >> 31; }
C10_HOST_DEVICE inline int32_t index_of(int32_t entry) { return entry ^ sign_of(entry); }

}  // namespace fastws
