#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/memory.h"
#include "cpu/trust_tables.h"
#include "dispatch.h"
#include "table.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

// A layer whose rows are whole tokens is one piece of memory; otherwise each row is copied, closed with its bias, and
// padded. Begin and end count rows.
template <typename scalar_t>
void tokenize_rows(const Layer& layer, const scalar_t* flat, scalar_t* tokens, int64_t token_size, int64_t begin,
                   int64_t end) {
  const int64_t length = layer.row_length, padded = layer.chunks * token_size;
  const scalar_t* from = flat + layer.weight_offset;
  scalar_t* to = tokens + layer.first_token * token_size;
  if (length == padded) {
    copy(from + begin * length, to + begin * length, (end - begin) * length);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    scalar_t* token = to + row * padded;
    copy(from + row * length, token, length);
    int64_t entry = length;
    if (layer.bias_offset >= 0) token[entry++] = flat[layer.bias_offset + row];
    std::fill(token + entry, token + padded, scalar_t(0));
  }
}

template <typename scalar_t>
void detokenize_rows(const Layer& layer, const scalar_t* tokens, scalar_t* flat, int64_t token_size, int64_t begin,
                     int64_t end) {
  const int64_t length = layer.row_length, padded = layer.chunks * token_size;
  const scalar_t* from = tokens + layer.first_token * token_size;
  scalar_t* to = flat + layer.weight_offset;
  if (length == padded) {
    copy(from + begin * length, to + begin * length, (end - begin) * length);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    copy(from + row * padded, to + row * length, length);
    if (layer.bias_offset >= 0) flat[layer.bias_offset + row] = from[row * padded + length];
  }
}

// Calls body(checkpoint, layer, first row, last row) for tokens begin to end of a batch, cut at whole rows: a row
// belongs to the range in which its first token is.
template <typename Body>
void for_rows(const Layer* layers, int64_t num_layers, int64_t num_tokens, int64_t begin, int64_t end,
              const Body& body) {
  for (int64_t token = begin; token < end;) {
    const int64_t checkpoint = token / num_tokens, first = token % num_tokens;
    const Layer& layer = layers[find_layer(layers, 0, num_layers, first)];
    const int64_t left = std::min(end - token, layer.first_token + layer.rows * layer.chunks - first);
    const auto row_from = [&](int64_t n) { return (n - layer.first_token + layer.chunks - 1) / layer.chunks; };
    body(checkpoint, layer, row_from(first), row_from(first + left));
    token += left;
  }
}

void check_tokens(const char* op, const Layer* layers, int64_t num_layers, int64_t numel, int64_t token_size,
                  int64_t num_tokens) {
  const int64_t expected = check_layers(op, layers, num_layers, numel, token_size);
  STD_TORCH_CHECK(num_tokens == expected, op, ": tokens must be ", expected, ", as the table says, got ", num_tokens);
}

constexpr int64_t kGrain = 64;  // tokens, so that small checkpoints stay on one thread

Tensor tokenize_cpu(const Tensor& flat_, const Tensor& table_, int64_t token_size, int64_t num_tokens) {
  const Tensor flat = as_contiguous(flat_), table = as_contiguous(table_);
  check_tensor("tokenize", "flat", flat, flat.scalar_type(), {kAny, kAny});
  const Layer* layers = read_table("tokenize", table);
  const int64_t batch = flat.size(0), numel = flat.size(1), num_layers = table.size(0);
  check_tokens("tokenize", layers, num_layers, numel, token_size, num_tokens);
  const Tensor tokens = new_empty(flat, {batch, num_tokens, token_size});
  if (tokens.numel() == 0) return tokens;

  dispatch_floating(flat.scalar_type(), "tokenize", [&]<typename scalar_t>() {
    const scalar_t* from = flat.const_data_ptr<scalar_t>();
    scalar_t* to = tokens.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, batch * num_tokens, kGrain, [=](int64_t begin, int64_t end) {
      for_rows(layers, num_layers, num_tokens, begin, end,
               [=](int64_t checkpoint, const Layer& layer, int64_t first, int64_t last) {
                 tokenize_rows(layer, from + checkpoint * numel, to + checkpoint * num_tokens * token_size, token_size,
                               first, last);
               });
    });
  });
  return tokens;
}

Tensor detokenize_cpu(const Tensor& tokens_, const Tensor& table_, int64_t numel) {
  const Tensor tokens = as_contiguous(tokens_), table = as_contiguous(table_);
  check_tensor("detokenize", "tokens", tokens, tokens.scalar_type(), {kAny, kAny, kAny});
  const Layer* layers = read_table("detokenize", table);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), token_size = tokens.size(2);
  const int64_t num_layers = table.size(0);
  check_tokens("detokenize", layers, num_layers, numel, token_size, num_tokens);
  const Tensor flat = new_empty(tokens, {batch, numel});

  dispatch_floating(tokens.scalar_type(), "detokenize", [&]<typename scalar_t>() {
    const scalar_t* from = tokens.const_data_ptr<scalar_t>();
    scalar_t* to = flat.mutable_data_ptr<scalar_t>();
    int64_t covered = 0;
    for (int64_t l = 0; l < num_layers; ++l)
      covered += layers[l].rows * (layers[l].row_length + (layers[l].bias_offset >= 0));
    if (covered < numel) std::fill(to, to + flat.numel(), scalar_t(0));  // weights that no token holds
    torch::stable::parallel_for(0, batch * num_tokens, kGrain, [=](int64_t begin, int64_t end) {
      for_rows(layers, num_layers, num_tokens, begin, end,
               [=](int64_t checkpoint, const Layer& layer, int64_t first, int64_t last) {
                 detokenize_rows(layer, from + checkpoint * num_tokens * token_size, to + checkpoint * numel,
                                 token_size, first, last);
               });
    });
  });
  return flat;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("tokenize", TORCH_BOX(&tokenize_cpu));
  m.impl("detokenize", TORCH_BOX(&detokenize_cpu));
}

}  // namespace fastws
