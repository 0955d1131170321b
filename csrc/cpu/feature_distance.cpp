#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/memory.h"
#include "cpu/trust.h"
#include "dispatch.h"

namespace fastws {
namespace {

using torch::stable::Tensor;

constexpr double kEpsilon = 1e-3;
constexpr int64_t kLanes = 16;  // partial sums side by side: the result does not depend on the vector length

// What entries are multiplied in.
template <typename scalar_t>
using sum_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The sums of a * a, t * t and (a - t)^2 over an image.
struct Sums {
  double student, teacher, apart;
};

// In float64, in which the products are exact: maps that differ in length alone have a distance near zero.
template <typename scalar_t>
FASTWS_CLONES void add_up(const scalar_t* student, const scalar_t* teacher, int64_t size, int64_t begin, int64_t end,
                          Sums* sums) {
  for (int64_t b = begin; b < end; ++b) {
    const scalar_t *a = student + b * size, *t = teacher + b * size;
    const int64_t whole = size / kLanes * kLanes;
    double squares_a[kLanes] = {}, squares_t[kLanes] = {}, apart[kLanes] = {};
    for (int64_t k = 0; k < whole; k += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double x = double(a[k + lane]), y = double(t[k + lane]);
        squares_a[lane] += x * x, squares_t[lane] += y * y, apart[lane] += (x - y) * (x - y);
      }
    for (int64_t k = whole; k < size; ++k) {
      const double x = double(a[k]), y = double(t[k]);
      squares_a[k - whole] += x * x, squares_t[k - whole] += y * y, apart[k - whole] += (x - y) * (x - y);
    }
    sums[b] = {std::accumulate(squares_a, squares_a + kLanes, 0.0), std::accumulate(squares_t, squares_t + kLanes, 0.0),
               std::accumulate(apart, apart + kLanes, 0.0)};
  }
}

// gradient = of_student * a - of_teacher * t.
template <typename scalar_t>
FASTWS_CLONES void combine(const scalar_t* a, const scalar_t* t, double of_student, double of_teacher, int64_t size,
                           scalar_t* gradient) {
  using sum_t = sum_type<scalar_t>;
  using V = typename Lanes<sum_t, 32>::V;
  const sum_t x = sum_t(of_student), y = sum_t(of_teacher);
  const int64_t lanes = Lanes<sum_t, 32>::kCount, whole = size / lanes * lanes;
  for (int64_t k = 0; k < whole; k += lanes) store(x * load<V>(a + k) - y * load<V>(t + k), gradient + k);
  for (int64_t k = whole; k < size; ++k) gradient[k] = scalar_t(x * sum_t(a[k]) - y * sum_t(t[k]));
}

// |a * scale_a - t * scale_t|^2, without the difference of numbers near one.
double distance_of(const Sums& sums) {
  const double length_a = std::sqrt(sums.student), length_t = std::sqrt(sums.teacher);
  const double scale_a = 1 / (length_a + kEpsilon), scale_t = 1 / (length_t + kEpsilon);
  const double longer = (length_a - length_t) * (sums.student * scale_a - sums.teacher * scale_t);
  return scale_a * scale_t * (sums.apart - longer);
}

void check_maps(const char* op, const Tensor& student, const Tensor& teacher) {
  check_tensor(op, "student", student, student.scalar_type(), {kAny, kAny});
  check_like(op, "teacher", teacher, student);
}

std::tuple<Tensor, Tensor> feature_distance_cpu(const Tensor& student_, const Tensor& teacher_, double weight) {
  using torch::headeronly::ScalarType;
  const Tensor student = as_contiguous(student_), teacher = as_contiguous(teacher_);
  check_maps("feature_distance", student, teacher);
  const int64_t batch = student.size(0), size = student.size(1);
  const Tensor distance = torch::stable::new_empty(student, {}, sum_dtype(student.scalar_type()));
  const Tensor sums = torch::stable::new_empty(student, {batch, 3}, ScalarType::Double);

  dispatch_floating(student.scalar_type(), "feature_distance", [&]<typename scalar_t>() {
    const scalar_t *a = student.const_data_ptr<scalar_t>(), *t = teacher.const_data_ptr<scalar_t>();
    Sums* of = reinterpret_cast<Sums*>(sums.mutable_data_ptr<double>());
    torch::stable::parallel_for(0, batch, 1 + (1 << 15) / (size + 1),
                                [=](int64_t begin, int64_t end) { add_up<scalar_t>(a, t, size, begin, end, of); });
    double total = 0;  // added in order: the result does not depend on the threads
    for (int64_t b = 0; b < batch; ++b) total += distance_of(of[b]);
    *distance.mutable_data_ptr<sum_type<scalar_t>>() = sum_type<scalar_t>(weight * total);
  });
  return {distance, sums};
}

Tensor feature_distance_backward_cpu(const Tensor& grad, const Tensor& student_, const Tensor& teacher_,
                                     const Tensor& sums_, double weight) {
  const Tensor student = as_contiguous(student_), teacher = as_contiguous(teacher_);
  const Tensor sums = as_contiguous(sums_);
  check_maps("feature_distance_backward", student, teacher);
  const int64_t batch = student.size(0), size = student.size(1);
  check_tensor("feature_distance_backward", "grad", grad, sum_dtype(student.scalar_type()), {});
  check_tensor("feature_distance_backward", "sums", sums, torch::headeronly::ScalarType::Double, {batch, 3});
  const Tensor gradient = new_empty(student, {batch, size});

  dispatch_floating(student.scalar_type(), "feature_distance_backward", [&]<typename scalar_t>() {
    const scalar_t *a = student.const_data_ptr<scalar_t>(), *t = teacher.const_data_ptr<scalar_t>();
    scalar_t* out = gradient.mutable_data_ptr<scalar_t>();
    const Sums* all = reinterpret_cast<const Sums*>(sums.const_data_ptr<double>());
    const double scale = 2 * weight * double(*grad.const_data_ptr<sum_type<scalar_t>>());
    torch::stable::parallel_for(0, batch, 1 + (1 << 15) / (size + 1), [=](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Sums& of = all[b];
        const double length_a = std::sqrt(of.student), length_t = std::sqrt(of.teacher);
        const double scale_a = 1 / (length_a + kEpsilon), scale_t = 1 / (length_t + kEpsilon);
        const double product = (of.student + of.teacher - of.apart) / 2;
        const double along = length_a > 0 ? (scale_a * of.student - scale_t * product) / length_a : 0;
        const double outer = scale * scale_a, of_student = outer * scale_a * (1 - along), of_teacher = outer * scale_t;
        combine<scalar_t>(a + b * size, t + b * size, of_student, of_teacher, size, out + b * size);
      }
    });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastws, CPU, m) {
  m.impl("feature_distance", TORCH_BOX(&feature_distance_cpu));
  m.impl("feature_distance_backward", TORCH_BOX(&feature_distance_backward_cpu));
}

}  // namespace fastws
