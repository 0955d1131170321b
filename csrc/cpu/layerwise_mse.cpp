#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/clones.h"
#include "cpu/memory.h"
#include "cpu/trust.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLanes = 16;     // partial sums side by side: the result does not depend on the vector length
constexpr int64_t kGrain = 16384;  // weights per task

// What errors are computed and added up in.
template <typename scalar_t>
using sum_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// B flat checkpoints [B, P] and the layers that are compared in them.
template <typename scalar_t>
struct Networks {
  const scalar_t* prediction;
  const scalar_t* target;
  int64_t size;            // P
  const int64_t* offsets;  // [L, 2]
  const sum_type<scalar_t>* sigma;
  int64_t layers;  // L
  sum_type<scalar_t> clip;
};

// sums[b, l] = sum over layer l of min(((prediction[b, p] - target[b, p]) / sigma[l])^2, clip), for b from begin to
// end.
template <typename scalar_t>
FASTWS_CLONES void layer_sums(Networks<scalar_t> networks, int64_t begin, int64_t end, double* sums) {
  using sum_t = sum_type<scalar_t>;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t l = 0; l < networks.layers; ++l) {
      const int64_t first = networks.offsets[2 * l], size = networks.offsets[2 * l + 1] - first;
      const scalar_t* x = networks.prediction + b * networks.size + first;
      const scalar_t* y = networks.target + b * networks.size + first;
      const sum_t scale = 1 / networks.sigma[l], clip = networks.clip;
      const int64_t whole = size / kLanes * kLanes;
      sum_t lanes[kLanes] = {};
      for (int64_t p = 0; p < whole; p += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const sum_t error = (sum_t(x[p + lane]) - sum_t(y[p + lane])) * scale, square = error * error;
          lanes[lane] += square > clip ? clip : square;  // in this order NaN stays NaN
        }
      for (int64_t p = whole; p < size; ++p) {
        const sum_t error = (sum_t(x[p]) - sum_t(y[p])) * scale, square = error * error;
        lanes[p - whole] += square > clip ? clip : square;
      }
      sums[b * networks.layers + l] = std::accumulate(lanes, lanes + kLanes, 0.0);
    }
}

// grad[b, p] = slopes[l] * (prediction[b, p] - target[b, p]) / sigma[l] in layer l where it is not clipped, else 0.
template <typename scalar_t>
FASTWS_CLONES void scaled_errors(Networks<scalar_t> networks, const sum_type<scalar_t>* slopes, int64_t begin,
                                 int64_t end, scalar_t* grad) {
  using sum_t = sum_type<scalar_t>;
  for (int64_t b = begin; b < end; ++b) {
    scalar_t* out = grad + b * networks.size;
    int64_t done = 0;
    for (int64_t l = 0; l < networks.layers; ++l) {
      const int64_t first = networks.offsets[2 * l], size = networks.offsets[2 * l + 1] - first;
      const scalar_t* x = networks.prediction + b * networks.size + first;
      const scalar_t* y = networks.target + b * networks.size + first;
      const sum_t scale = 1 / networks.sigma[l], clip = networks.clip, slope = slopes[l];
      std::fill(out + done, out + first, scalar_t(0));
      for (int64_t p = 0; p < size; ++p) {
        const sum_t error = (sum_t(x[p]) - sum_t(y[p])) * scale;
        out[first + p] = scalar_t(error * error > clip ? sum_t(0) : slope * error);
      }
      done = first + size;
    }
    std::fill(out + done, out + networks.size, scalar_t(0));
  }
}

// Layers lie in the vector one behind the other; writing the gradient trusts it.
void check_offsets(const char* op, const int64_t* offsets, int64_t layers, int64_t size) {
  int64_t end = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const bool lies = end <= offsets[2 * l] && offsets[2 * l] <= offsets[2 * l + 1] && offsets[2 * l + 1] <= size;
    STD_TORCH_CHECK(lies, op, ": offsets[", l, "] must have ", end, " <= begin <= end <= ", size, ", got [",
                    offsets[2 * l], ", ", offsets[2 * l + 1], "]");
    end = offsets[2 * l + 1];
  }
}

void check_layers(const char* op, const Tensor& prediction, const Tensor& target, const Tensor& offsets,
                  const Tensor& sigma, const Tensor& share) {
  const auto dtype = prediction.scalar_type();
  check_tensor(op, "prediction", prediction, dtype, {kAny, kAny});
  check_like(op, "target", target, prediction);
  check_tensor(op, "offsets", offsets, torch::headeronly::ScalarType::Long, {kAny, 2});
  check_tensor(op, "sigma", sigma, sum_dtype(dtype), {offsets.size(0)});
  check_tensor(op, "share", share, sum_dtype(dtype), {offsets.size(0)});
  check_offsets(op, offsets.const_data_ptr<int64_t>(), offsets.size(0), prediction.size(1));
}

template <typename scalar_t>
Networks<scalar_t> make_networks(const Tensor& prediction, const Tensor& target, const Tensor& offsets,
                                 const Tensor& sigma, double clip) {
  return {.prediction = prediction.const_data_ptr<scalar_t>(),
          .target = target.const_data_ptr<scalar_t>(),
          .size = prediction.size(1),
          .offsets = offsets.const_data_ptr<int64_t>(),
          .sigma = sigma.const_data_ptr<sum_type<scalar_t>>(),
          .layers = offsets.size(0),
          .clip = sum_type<scalar_t>(clip)};
}

// Networks per task.
int64_t grain_of(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)); }

std::tuple<Tensor, Tensor> layerwise_mse_cpu(const Tensor& prediction_, const Tensor& target_, const Tensor& offsets_,
                                             const Tensor& sigma_, const Tensor& share_, double clip) {
  const Tensor prediction = as_contiguous(prediction_), target = as_contiguous(target_);
  const Tensor offsets = as_contiguous(offsets_), sigma = as_contiguous(sigma_);
  const Tensor share = as_contiguous(share_);
  check_layers("layerwise_mse", prediction, target, offsets, sigma, share);
  const int64_t batch = prediction.size(0), layers = offsets.size(0);
  const Tensor loss = torch::stable::new_empty(sigma, {}), sums = torch::stable::new_empty(sigma, {layers});

  dispatch_floating(prediction.scalar_type(), "layerwise_mse", [&]<typename scalar_t>() {
    using sum_t = sum_type<scalar_t>;
    const auto networks = make_networks<scalar_t>(prediction, target, offsets, sigma, clip);
    std::vector<double> parts(batch * layers);  // added in order: the result does not depend on the threads
    torch::stable::parallel_for(0, batch, grain_of(networks.size), [&](int64_t begin, int64_t end) {
      layer_sums<scalar_t>(networks, begin, end, parts.data());
    });
    std::vector<double> totals(layers);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t l = 0; l < layers; ++l) totals[l] += parts[b * layers + l];
    double weighted = 0;
    for (int64_t l = 0; l < layers; ++l) {
      sums.mutable_data_ptr<sum_t>()[l] = sum_t(totals[l]);
      weighted += totals[l] * double(share.const_data_ptr<sum_t>()[l]);
    }
    *loss.mutable_data_ptr<sum_t>() = sum_t(weighted);
  });
  return {loss, sums};
}

Tensor layerwise_mse_backward_cpu(const Tensor& grad, const Tensor& prediction_, const Tensor& target_,
                                  const Tensor& offsets_, const Tensor& sigma_, const Tensor& share_, double clip) {
  const Tensor prediction = as_contiguous(prediction_), target = as_contiguous(target_);
  const Tensor offsets = as_contiguous(offsets_), sigma = as_contiguous(sigma_);
  const Tensor share = as_contiguous(share_);
  check_layers("layerwise_mse_backward", prediction, target, offsets, sigma, share);
  check_tensor("layerwise_mse_backward", "grad", grad, sigma.scalar_type(), {});
  const Tensor grad_prediction = new_empty(prediction, {prediction.size(0), prediction.size(1)});

  dispatch_floating(prediction.scalar_type(), "layerwise_mse_backward", [&]<typename scalar_t>() {
    using sum_t = sum_type<scalar_t>;
    const auto networks = make_networks<scalar_t>(prediction, target, offsets, sigma, clip);
    std::vector<sum_t> slopes(networks.layers);
    for (int64_t l = 0; l < networks.layers; ++l)
      slopes[l] = 2 * *grad.const_data_ptr<sum_t>() * share.const_data_ptr<sum_t>()[l] / networks.sigma[l];
    scalar_t* out = grad_prediction.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, prediction.size(0), grain_of(networks.size), [&](int64_t begin, int64_t end) {
      scaled_errors<scalar_t>(networks, slopes.data(), begin, end, out);
    });
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("layerwise_mse", TORCH_BOX(&layerwise_mse_cpu));
  m.impl("layerwise_mse_backward", TORCH_BOX(&layerwise_mse_backward_cpu));
}

}  // namespace fastws
