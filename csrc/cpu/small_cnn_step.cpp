#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/small_cnn_training.h"

namespace fastws {
namespace {

// Ordinary networks, one per lane.
template <typename real_t, int kBytes>
class Group : public Maps<real_t, kBytes> {
 public:
  using Base = Maps<real_t, kBytes>;
  using typename Base::I;
  using typename Base::V;

  explicit Group(const Network& network, bool training)
      : Base(network, network.num_weights * (training ? 4 : 1) + (training ? 3 * network.largest : 0)),
        weights_(memory_.take(network.num_weights)) {
    if (!training) return;
    first_ = memory_.take(network.num_weights), second_ = memory_.take(network.num_weights);
    grad_ = memory_.take(network.num_weights);
    for (V*& map : grad_maps_) map = memory_.take(network.largest);
  }

  int64_t num_parameters() const { return network_.num_weights; }
  V* weights() const { return weights_; }
  V* first() const { return first_; }
  V* second() const { return second_; }

  void begin_step() { std::fill(grad_, grad_ + network_.num_weights, V{}); }

  void begin_sample(int64_t step, int64_t sample) { Base::draw_dropout(step, sample); }

  // From images() to logits().
  void forward(bool training) {
    for (const Operation& operation : network_.operations) {
      const V* x = maps_ + operation.input;
      V* y = maps_ + operation.output;
      const V* bias = operation.bias < 0 ? nullptr : weights_ + operation.bias;
      if (operation.kind != kConvolution)
        Base::pass(operation, training);
      else if (operation.pooled)
        convolve_and_pool<real_t, kBytes>(operation.shape, x, weights_ + operation.weight, bias, y,
                                          reinterpret_cast<I*>(maps_ + operation.extra));
      else
        convolve<real_t, kBytes>(operation.shape, x, weights_ + operation.weight, bias, y);
    }
  }

  // Adds the gradient of the weights, given that of the logits in logits().
  void backward() {
    V *grad = grad_maps_[0], *other = grad_maps_[1];
    std::copy(Base::logits(), Base::logits() + network_.num_classes, grad);
    for (int64_t l = network_.operations.size() - 1; l >= 0; --l) {
      const Operation& operation = network_.operations[l];
      if (operation.kind != kConvolution) {
        Base::pass_back(operation, grad, other);
        continue;
      }
      const Convolution& c = operation.shape;
      if (operation.bias >= 0)
        add_bias_gradient<real_t, kBytes>(c.out_channels, operation.out_size / c.out_channels, grad,
                                          grad_ + operation.bias);
      const V* grad_y = grad;
      if (operation.pooled) {
        const I* winner = reinterpret_cast<const I*>(maps_ + operation.extra);
        spread<real_t, kBytes>(grad, winner, c.out_channels * c.out_height / 2, c.out_width / 2, grad_maps_[2]);
        grad_y = grad_maps_[2];
      }
      add_weight_gradient<real_t, kBytes>(c, maps_ + operation.input, grad_y, grad_ + operation.weight);
      if (l == 0) return;
      input_gradient<real_t, kBytes>(c, weights_ + operation.weight, grad_y, other);
      std::swap(grad, other);
    }
  }

  void end_step(int64_t number) {
    update<real_t, kBytes>(Base::recipes, number, network_.num_weights, grad_, weights_, first_, second_);
  }

 private:
  using Base::maps_;
  using Base::memory_;
  using Base::network_;

  V *weights_, *first_ = nullptr, *second_ = nullptr, *grad_ = nullptr;
  V* grad_maps_[3] = {};
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> small_cnn_step_cpu(
    const Tensor& weights, const Tensor& first, const Tensor& second, const Tensor& images, const Tensor& labels,
    const Tensor& batches, const Tensor& layers, const Tensor& activation, const Tensor& dropout,
    const Tensor& optimizer, const Tensor& lr, const Tensor& weight_decay, const Tensor& seed, int64_t step) {
  StepTensors tensors({&weights, &first, &second, &images, &labels, &batches, &layers, &activation, &dropout,
                       &optimizer, &lr, &weight_decay, &seed});
  const Network network = prepare("small_cnn_step", tensors, 1, step);
  const std::vector<int64_t> order = sort_networks(tensors);
  for_groups(weights.scalar_type(), weights.size(0), [&]<typename real_t, int kBytes>(int64_t number) {
    const Members<Lanes<real_t, kBytes>::kCount> members(order, number);
    Group<real_t, kBytes> group(network, true);
    train_group<real_t, kBytes>(network, tensors.steps<real_t>(step), members, group, [](int64_t) {});
  });
  return {tensors.new_weights, tensors.new_first, tensors.new_second, tensors.losses, tensors.correct};
}

Tensor small_cnn_logits_cpu(const Tensor& weights_, const Tensor& images_, const Tensor& layers_,
                            const Tensor& activation_) {
  const Tensor weights = as_contiguous(weights_), images = as_contiguous(images_);
  const Tensor layers = as_contiguous(layers_), activation = as_contiguous(activation_);
  const Network network = read_network("small_cnn_logits", weights, images, layers, activation, 1);
  const int64_t count = weights.size(0), num_images = images.size(0);
  const Tensor logits = torch::stable::new_empty(weights, {count, num_images, network.num_classes});
  const auto order = sort_networks(activation.const_data_ptr<int32_t>(), nullptr, nullptr, count);

  for_groups(weights.scalar_type(), count, [&]<typename real_t, int kBytes>(int64_t number) {
    using V = typename Lanes<real_t, kBytes>::V;
    constexpr int kCount = Lanes<real_t, kBytes>::kCount;
    const Members<kCount> members(order, number);
    Group<real_t, kBytes> group(network, false);
    set_activation<real_t, kBytes>(members, activation.const_data_ptr<int32_t>(), group.recipes);
    const real_t* rows[kCount];
    members.rows(static_cast<const real_t*>(weights.const_data_ptr()), network.num_weights, rows);
    group.load(rows, network.num_weights, group.weights());
    const real_t* image = static_cast<const real_t*>(images.const_data_ptr());
    real_t* out = static_cast<real_t*>(logits.mutable_data_ptr());
    for (int64_t n = 0; n < num_images; ++n, image += network.image_size) {
      for (int64_t i = 0; i < network.image_size; ++i) group.images()[i] = V{} + image[i];
      group.forward(false);
      for (int64_t lane = 0; lane < members.lanes; ++lane)
        for (int64_t k = 0; k < network.num_classes; ++k)
          out[(members.network[lane] * num_images + n) * network.num_classes + k] = group.logits()[k][lane];
    }
  });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("small_cnn_step", TORCH_BOX(&small_cnn_step_cpu));
  m.impl("small_cnn_logits", TORCH_BOX(&small_cnn_logits_cpu));
}

}  // namespace fastws
