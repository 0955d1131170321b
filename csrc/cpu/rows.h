#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "signed.h"
#include "table.h"

namespace fastws {

// Numbers of any floating type, which change their sign where negative is -1 and keep it where it is 0.
template <typename scalar_t>
inline void copy_signed(const scalar_t* __restrict from, scalar_t* __restrict to, int64_t count, int32_t negative) {
  using bits_t = std::conditional_t<sizeof(scalar_t) == 8, uint64_t,
                                    std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint16_t>>;
  const bits_t sign = bits_t(bits_t(negative) << (8 * sizeof(bits_t) - 1));
  for (int64_t i = 0; i < count; ++i) {
    bits_t bits;
    std::memcpy(&bits, static_cast<const void*>(from + i), sizeof(bits));
    bits ^= sign;
    std::memcpy(static_cast<void*>(to + i), &bits, sizeof(bits));
  }
}

// The permutation that begins at a place of a row of them; null where nothing moves.
inline const int32_t* permutation_at(const int32_t* permutations, int64_t place) {
  return permutations && place >= 0 ? permutations + place : nullptr;
}

// Entries begin to end of a row whose input units are permuted: out[f - begin] = row[...], the formula of
// docs/design.md; with Inverse the same addresses are written instead of read: row[...] = out[f - begin]. A block of a
// size known to the compiler is a few vector moves. Signed: units say whether they are negated, negative whether the
// whole row is.
template <int64_t kBlock, bool kInverse, bool kSigned, typename scalar_t>
inline void move_units(std::conditional_t<kInverse, scalar_t, const scalar_t>* row,
                       std::conditional_t<kInverse, const scalar_t, scalar_t>* out, const int32_t* in, int64_t block_,
                       int64_t units, int32_t negative, int64_t begin, int64_t end) {
  const int64_t block = kBlock > 0 ? kBlock : block_, period = units * block;
  const auto move = [&](int64_t unit, int64_t rest, auto* o, int64_t count) {
    auto* const r = row + (kSigned ? index_of(in[unit]) : in[unit]) * block + rest;
    if constexpr (kSigned && kInverse)
      copy_signed(o, r, count, negative ^ sign_of(in[unit]));
    else if constexpr (kSigned)
      copy_signed(r, o, count, negative ^ sign_of(in[unit]));
    else if constexpr (kInverse)
      copy(o, r, count);
    else
      copy(r, o, count);
  };
  // divisions once a call, not once a block; a period is mostly the whole row
  const int64_t turn = begin < period ? 0 : begin / period;
  int64_t unit = (begin - turn * period) / block, rest = begin - turn * period - unit * block;
  row += turn * period;
  for (int64_t f = begin; f < end;) {
    if (rest > 0 || end - f < block) {  // a piece of a block, at either end of a token
      const int64_t count = std::min(block - rest, end - f);
      move(unit, rest, out + (f - begin), count);
      f += count, rest = 0, ++unit;
    } else {
      auto* const to = out + (f - begin) - unit * block;
      const int64_t last = unit + std::min(units - unit, (end - f) / block);
      f += (last - unit) * block;
      for (; unit < last; ++unit) move(unit, 0, to + unit * block, block);
    }
    if (unit == units) unit = 0, row += period;
  }
}

template <bool kInverse, bool kSigned, typename scalar_t>
inline void move_row(std::conditional_t<kInverse, scalar_t, const scalar_t>* row,
                     std::conditional_t<kInverse, const scalar_t, scalar_t>* out, const int32_t* in, int64_t block,
                     int64_t units, int32_t negative, int64_t begin, int64_t end) {
  switch (block) {
    case 1:
      return move_units<1, kInverse, kSigned, scalar_t>(row, out, in, block, units, negative, begin, end);
    case 9:
      return move_units<9, kInverse, kSigned, scalar_t>(row, out, in, block, units, negative, begin, end);
    case 25:
      return move_units<25, kInverse, kSigned, scalar_t>(row, out, in, block, units, negative, begin, end);
    default:
      return move_units<0, kInverse, kSigned, scalar_t>(row, out, in, block, units, negative, begin, end);
  }
}

// One row in the nearest caches. Units in random order are what no hardware foresees; a row that is copied as it is, in
// order, is taken apart here without waiting.
template <typename scalar_t>
class NearRow {
 public:
  static bool fits(const Layer& layer) { return layer.row_length * int64_t(sizeof(scalar_t)) <= kBytes; }

  const scalar_t* hold(const Layer& layer, const scalar_t* row) {
    if (int64_t(row_.size()) < layer.row_length) row_.resize(layer.row_length);
    copy(row, row_.data(), layer.row_length);
    return row_.data();
  }

 private:
  static constexpr int64_t kBytes = 64 * 1024;  // a part of the second cache
  std::vector<scalar_t> row_;
};

}  // namespace fastws
