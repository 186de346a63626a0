// Python's way in: pointers as integers, matrices as (pointer, dtype, rows, columns, row stride, column stride).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "csrc/linear_cross_entropy/head.h"

namespace py = pybind11;
using gradshield::head::Dtype;
using gradshield::head::Matrix;
using gradshield::head::Problem;

namespace {

using Described = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

Matrix matrix(const Described& x) {
  const auto& [data, dtype, rows, cols, row_stride, col_stride] = x;
  return {reinterpret_cast<const void*>(data), static_cast<Dtype>(dtype), rows, cols, row_stride, col_stride};
}

void linear_cross_entropy(const Described& h, const Described& weight, const Described& p,
                          const std::vector<Described>& r, uintptr_t index, uintptr_t labels, uintptr_t token_weight,
                          int64_t tokens, float scale, float softcap, uintptr_t loss, uintptr_t dh, uintptr_t pulled,
                          uintptr_t dot, bool exact, int threads, int upto) {
  std::vector<Matrix> directions;
  for (const Described& x : r) directions.push_back(matrix(x));
  Problem problem;
  problem.h = matrix(h);
  problem.weight = matrix(weight);
  problem.p = matrix(p);
  problem.r = directions.data();
  problem.directions = static_cast<int64_t>(directions.size());
  problem.index = reinterpret_cast<const int64_t*>(index);
  problem.labels = reinterpret_cast<const int64_t*>(labels);
  problem.token_weight = reinterpret_cast<const float*>(token_weight);
  problem.tokens = tokens;
  problem.scale = scale;
  problem.softcap = softcap;
  problem.loss = reinterpret_cast<float*>(loss);
  problem.dh = reinterpret_cast<float*>(dh);
  problem.pulled = reinterpret_cast<float*>(pulled);
  problem.dot = reinterpret_cast<float*>(dot);
  problem.exact = exact;
  problem.threads = threads;
  const py::gil_scoped_release release;
  gradshield::head::run(problem, static_cast<gradshield::head::Level>(upto));
}

}  // namespace

PYBIND11_MODULE(_native_head, module) {
  module.doc() = "The fused language-model head on the CPU; called through gradshield_fast.ops.linear_cross_entropy.";
  module.def(
      "level", [] { return static_cast<int>(gradshield::head::level()); },
      "What this CPU offers: 0 nothing that will do, 1 AVX-512, 2 with BF16, 3 with AMX.");
  module.def("linear_cross_entropy", &linear_cross_entropy, py::arg("h"), py::arg("weight"), py::arg("p"), py::arg("r"),
             py::arg("index"), py::arg("labels"), py::arg("token_weight"), py::arg("tokens"), py::arg("scale"),
             py::arg("softcap"), py::arg("loss"), py::arg("dh"), py::arg("pulled"), py::arg("dot"), py::arg("exact"), py::arg("threads"),
             py::arg("upto") = 3);
}
