#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/trust_tables.h"
#include "dispatch.h"
#include "table.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

// A layer whose rows follow each other in tokens as they do in the flat vector is one piece of memory; otherwise each
// row is copied, closed with its bias, and padded. Begin and end count rows; stop is the entry of tokens at which the
// next layer begins, up to which the last row is padded.
template <typename scalar_t>
void tokenize_rows(const Layer& layer, const scalar_t* flat, scalar_t* tokens, int64_t token_size, int64_t stop,
                   int64_t begin, int64_t end) {
  const int64_t length = layer.row_length, stride = layer.stride(token_size);
  const int64_t first_entry = layer.first_entry(token_size);
  const scalar_t* from = flat + layer.weight_offset;
  scalar_t* to = tokens + first_entry;
  if (length == stride) {
    copy(from + begin * length, to + begin * length, (end - begin) * length);
  } else {
    for (int64_t row = begin; row < end; ++row) {
      scalar_t* token = to + row * stride;
      copy(from + row * length, token, length);
      int64_t entry = length;
      if (layer.bias_offset >= 0) token[entry++] = flat[layer.bias_offset + row];
      std::fill(token + entry, token + stride, scalar_t(0));
    }
  }
  if (begin < end && end == layer.rows) std::fill(to + end * stride, tokens + stop, scalar_t(0));
}

template <typename scalar_t>
void detokenize_rows(const Layer& layer, const scalar_t* tokens, scalar_t* flat, int64_t token_size, int64_t begin,
                     int64_t end) {
  const int64_t length = layer.row_length, stride = layer.stride(token_size);
  const scalar_t* from = tokens + layer.first_entry(token_size);
  scalar_t* to = flat + layer.weight_offset;
  if (length == stride) {
    copy(from + begin * length, to + begin * length, (end - begin) * length);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    copy(from + row * stride, to + row * length, length);
    if (layer.bias_offset >= 0) flat[layer.bias_offset + row] = from[row * stride + length];
  }
}

// Weights that no token holds, which are those between the weights and biases of layers, become 0.
template <typename scalar_t>
void clear_gaps(const Layer* layers, int64_t num_layers, scalar_t* flat, int64_t batch, int64_t numel) {
  std::vector<std::pair<int64_t, int64_t>> parts = {{numel, numel}};
  for (int64_t l = 0; l < num_layers; ++l) {
    const Layer& layer = layers[l];
    parts.emplace_back(layer.weight_offset, layer.weight_offset + layer.rows * layer.row_length);
    if (layer.bias_offset >= 0) parts.emplace_back(layer.bias_offset, layer.bias_offset + layer.rows);
  }
  std::sort(parts.begin(), parts.end());
  int64_t end = 0;
  for (const auto& [first, last] : parts) {
    for (int64_t b = 0; b < batch && first > end; ++b)
      std::fill(flat + b * numel + end, flat + b * numel + first, scalar_t(0));
    end = std::max(end, last);
  }
}

// Calls body(checkpoint, layer, stop, first row, last row) for tokens begin to end of a batch, cut at whole rows: a row
// belongs to the range in which its first entry is. Stop is the entry of tokens at which the next layer begins.
template <typename Body>
void for_rows(const Layer* layers, int64_t num_layers, int64_t num_tokens, int64_t token_size, int64_t begin,
              int64_t end, const Body& body) {
  const int64_t size = num_tokens * token_size;
  for (int64_t entry = begin * token_size; entry < end * token_size;) {
    const int64_t checkpoint = entry / size, first = entry % size;
    const int64_t l = find_layer(layers, 0, num_layers, first / token_size, first % token_size);
    const Layer& layer = layers[l];
    const int64_t stop = l + 1 < num_layers ? layers[l + 1].first_entry(token_size) : size;
    const int64_t left = std::min(end * token_size - entry, stop - first);
    const int64_t start = layer.first_entry(token_size), stride = layer.stride(token_size);
    const auto row_from = [&](int64_t n) { return std::min((n - start + stride - 1) / stride, layer.rows); };
    body(checkpoint, layer, stop, row_from(first), row_from(first + left));
    entry += left;
  }
}

void check_tokens(const char* op, const Layer* layers, int64_t num_layers, int64_t numel, int64_t token_size,
                  int64_t num_tokens) {
  const int64_t expected = check_layers(op, layers, num_layers, numel, token_size);
  STD_TORCH_CHECK(num_tokens == expected, op, ": tokens must be ", expected, ", as the table says, got ", num_tokens);
}

// Where a result is written: of its shape, of the dtype of the input, without gaps.
void check_out(const char* op, const Tensor& out, const Tensor& like, std::initializer_list<int64_t> sizes) {
  check_tensor(op, "out", out, like.scalar_type(), sizes);
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
}

constexpr int64_t kGrain = 64;  // tokens, so that small checkpoints stay on one thread

void tokenize_into(const Tensor& flat, const Tensor& table, int64_t token_size, const Tensor& tokens) {
  const int64_t batch = flat.size(0), numel = flat.size(1), num_layers = table.size(0), num_tokens = tokens.size(1);
  const Layer* layers = read_table("tokenize", table);
  if (tokens.numel() == 0) return;

  dispatch_floating(flat.scalar_type(), "tokenize", [&]<typename scalar_t>() {
    const scalar_t* from = flat.const_data_ptr<scalar_t>();
    scalar_t* to = tokens.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, batch * num_tokens, kGrain, [=](int64_t begin, int64_t end) {
      for_rows(layers, num_layers, num_tokens, token_size, begin, end,
               [=](int64_t checkpoint, const Layer& layer, int64_t stop, int64_t first, int64_t last) {
                 tokenize_rows(layer, from + checkpoint * numel, to + checkpoint * num_tokens * token_size, token_size,
                               stop, first, last);
               });
    });
  });
}

Tensor tokenize_cpu(const Tensor& flat_, const Tensor& table_, int64_t token_size, int64_t num_tokens) {
  const Tensor flat = as_contiguous(flat_), table = as_contiguous(table_);
  check_tensor("tokenize", "flat", flat, flat.scalar_type(), {kAny, kAny});
  check_tokens("tokenize", read_table("tokenize", table), table.size(0), flat.size(1), token_size, num_tokens);
  const Tensor tokens = new_empty(flat, {flat.size(0), num_tokens, token_size});
  tokenize_into(flat, table, token_size, tokens);
  return tokens;
}

void tokenize_out_cpu(const Tensor& flat_, const Tensor& table_, int64_t token_size, const Tensor& out) {
  const Tensor flat = as_contiguous(flat_), table = as_contiguous(table_);
  check_tensor("tokenize", "flat", flat, flat.scalar_type(), {kAny, kAny});
  check_out("tokenize_out", out, flat, {flat.size(0), kAny, token_size});
  check_tokens("tokenize", read_table("tokenize", table), table.size(0), flat.size(1), token_size, out.size(1));
  tokenize_into(flat, table, token_size, out);
}

void detokenize_into(const Tensor& tokens, const Tensor& table, const Tensor& flat) {
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), token_size = tokens.size(2);
  const int64_t num_layers = table.size(0), numel = flat.size(1);
  const Layer* layers = read_table("detokenize", table);

  dispatch_floating(tokens.scalar_type(), "detokenize", [&]<typename scalar_t>() {
    const scalar_t* from = tokens.const_data_ptr<scalar_t>();
    scalar_t* to = flat.mutable_data_ptr<scalar_t>();
    clear_gaps(layers, num_layers, to, batch, numel);
    torch::stable::parallel_for(0, batch * num_tokens, kGrain, [=](int64_t begin, int64_t end) {
      for_rows(layers, num_layers, num_tokens, token_size, begin, end,
               [=](int64_t checkpoint, const Layer& layer, int64_t, int64_t first, int64_t last) {
                 detokenize_rows(layer, from + checkpoint * num_tokens * token_size, to + checkpoint * numel,
                                 token_size, first, last);
               });
    });
  });
}

Tensor detokenize_cpu(const Tensor& tokens_, const Tensor& table_, int64_t numel) {
  const Tensor tokens = as_contiguous(tokens_), table = as_contiguous(table_);
  check_tensor("detokenize", "tokens", tokens, tokens.scalar_type(), {kAny, kAny, kAny});
  check_tokens("detokenize", read_table("detokenize", table), table.size(0), numel, tokens.size(2), tokens.size(1));
  const Tensor flat = new_empty(tokens, {tokens.size(0), numel});
  detokenize_into(tokens, table, flat);
  return flat;
}

void detokenize_out_cpu(const Tensor& tokens_, const Tensor& table_, const Tensor& out) {
  const Tensor tokens = as_contiguous(tokens_), table = as_contiguous(table_);
  check_tensor("detokenize", "tokens", tokens, tokens.scalar_type(), {kAny, kAny, kAny});
  check_out("detokenize_out", out, tokens, {tokens.size(0), kAny});
  check_tokens("detokenize", read_table("detokenize", table), table.size(0), out.size(1), tokens.size(2),
               tokens.size(1));
  detokenize_into(tokens, table, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("tokenize", TORCH_BOX(&tokenize_cpu));
  m.impl("tokenize_out", TORCH_BOX(&tokenize_out_cpu));
  m.impl("detokenize", TORCH_BOX(&detokenize_cpu));
  m.impl("detokenize_out", TORCH_BOX(&detokenize_out_cpu));
}

}  // namespace fastws
