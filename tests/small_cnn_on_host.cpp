#include "cuda_on_host.h"
// the code that is tested follows
#include <cstddef>
#include <cstring>

#include "cuda/small_cnn_training.h"

namespace fastws {
namespace {

// Runs the work for all networks in blocks that have so much memory. Returns the samples of a tile.
template <typename Work>
int64_t launch(Work work, int64_t batch_size, int64_t parts, int64_t half, int64_t whole) {
  constexpr int64_t kGuard = 64;
  const Plan plan = make_plan<Work>(work.network, batch_size, half, whole);
  work.samples = int(plan.samples);
  std::vector<std::max_align_t> shared((plan.bytes + kGuard) / sizeof(std::max_align_t) + 1);
  char* const memory = reinterpret_cast<char*>(shared.data());
  for (int64_t g = 0; g < work.count(); ++g)
    for (int64_t part = 0; part < parts; ++part) {
      memset(memory, 0xFF, plan.bytes + kGuard);
      host::run_block(kThreads, [&] { work.run(g, part, parts, memory); });
      if (std::count(memory + plan.bytes, memory + plan.bytes + kGuard, char(0xFF)) != kGuard)
        throw std::runtime_error("a thread writes past the end of shared memory");
    }
  return plan.samples;
}

template <typename real_t>
Network network_of(const int64_t* sizes, const void* rows, bool noisy) {
  return make_network(static_cast<const Row*>(rows), sizes[1], sizes[2], sizeof(real_t), noisy);
}

template <typename real_t, bool kNoisy>
int64_t train(const int64_t* sizes, void* const* pointers) {
  const auto reals = [&](int i) { return static_cast<real_t*>(pointers[i]); };
  const auto longs = [&](int i) { return static_cast<int64_t*>(pointers[i]); };
  const auto integers = [&](int i) { return static_cast<int32_t*>(pointers[i]); };
  const auto doubles = [&](int i) { return static_cast<double*>(pointers[i]); };
  const Training<real_t, kNoisy> training{.network = network_of<real_t>(sizes, pointers[0], kNoisy),
                                          .steps = {.images = reals(1),
                                                    .weights = reals(2),
                                                    .first = reals(3),
                                                    .second = reals(4),
                                                    .new_weights = reals(5),
                                                    .new_first = reals(6),
                                                    .new_second = reals(7),
                                                    .losses = reals(8),
                                                    .labels = longs(9),
                                                    .seed = longs(10),
                                                    .correct = longs(11),
                                                    .activation = integers(12),
                                                    .optimizer = integers(13),
                                                    .dropout = doubles(14),
                                                    .lr = doubles(15),
                                                    .weight_decay = doubles(16),
                                                    .batches = pointers[17],
                                                    .wide = sizes[9] != 0,
                                                    .networks = sizes[5],
                                                    .count = sizes[6],
                                                    .batch_size = sizes[7],
                                                    .first_step = sizes[8]},
                                          .divergences = reals(18),
                                          .kl_weight = *doubles(19)};
  return launch(training, sizes[7], 1, sizes[3], sizes[4]);
}

template <typename real_t>
int64_t evaluate(const int64_t* sizes, void* const* pointers) {
  const Evaluation<real_t> evaluation{.network = network_of<real_t>(sizes, pointers[0], false),
                                      .images = static_cast<const real_t*>(pointers[1]),
                                      .weights = static_cast<const real_t*>(pointers[2]),
                                      .activation = static_cast<const int32_t*>(pointers[3]),
                                      .logits = static_cast<real_t*>(pointers[4]),
                                      .networks = sizes[5],
                                      .num_images = sizes[6]};
  return launch(evaluation, sizes[6], sizes[7], sizes[3], sizes[4]);
}

}  // namespace
}  // namespace fastws

// sizes: bytes of a number, rows of the table, weights, memory of half and of a whole multiprocessor, networks; then
// steps, images of a batch, the first step and whether batches are int64, or images and the parts that they are dealt
// to. pointers: the table, then the members of Training or Evaluation. All return the samples of a tile.
extern "C" int64_t small_cnn_step(const int64_t* sizes, void* const* pointers) {
  return (sizes[0] == 4 ? fastws::train<float, false> : fastws::train<double, false>)(sizes, pointers);
}

extern "C" int64_t variational_cnn_step(const int64_t* sizes, void* const* pointers) {
  return (sizes[0] == 4 ? fastws::train<float, true> : fastws::train<double, true>)(sizes, pointers);
}

extern "C" int64_t small_cnn_logits(const int64_t* sizes, void* const* pointers) {
  return (sizes[0] == 4 ? fastws::evaluate<float> : fastws::evaluate<double>)(sizes, pointers);
}
