// gradshield_fast._native: the CPU kernels for Python. Tensors come as (address, rows, cols, row stride, column stride,
// type code); the Python rooms have checked shapes, types and ids, and keep the tensors alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "embedding_dot/cpu.h"
#include "ghost_dot/cpu.h"
#include "ghost_dot_lowrank/cpu.h"
#include "ghost_gram/cpu.h"
#include "ghost_norm_sq/cpu.h"
#include "ghost_project/cpu.h"
#if defined(GSF_HEAD)
#include "linear_cross_entropy/head.h"
#endif
#include "scale_dot/cpu.h"
#include "varlen_attention/cpu.h"

namespace py = pybind11;

namespace {

using Tensor = std::array<int64_t, 6>;
using Indices = std::vector<int64_t>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

gsf::Matrix matrix(const Tensor& t) {
  if (t[5] < 0 || t[5] > 2) throw std::invalid_argument("unknown type code");
  return {pointer<const char>(t[0]), t[1], t[2], t[3], t[4], static_cast<gsf::DType>(t[5])};
}

// A negative number of columns marks ids.
gsf::Factor factor(const Tensor& t) {
  if (t[2] >= 0) return {matrix(t), nullptr};
  return {{}, pointer<const int64_t>(t[0])};
}

gsf::Isa isa_of(int limit) {
  constexpr int top = static_cast<int>(gsf::Isa::kAmx);
  return static_cast<gsf::Isa>(limit < 0 || limit > top ? top : limit);
}

std::string isa_name(int limit) {
  return gsf::kernels(isa_of(limit)).name;
}

void lowrank_project(const Tensor& a, const Tensor& q, int64_t z, int threads, int isa) {
  const py::gil_scoped_release released;
  gsf::lowrank_project(matrix(a), matrix(q), pointer<float>(z), q[2], false, threads, isa_of(isa));
}

void lowrank_contract(const Tensor& z, const Tensor& g, const Tensor& p, int64_t member, int64_t directions, int64_t u,
                      int threads, int isa) {
  const py::gil_scoped_release released;
  gsf::lowrank_contract(matrix(z), matrix(g), matrix(p), pointer<const float>(member), directions, pointer<float>(u),
                        threads, isa_of(isa));
}

void ghost_dot(const Tensor& a, const Tensor& g, const Tensor& r, int64_t directions, int64_t r_step, int64_t u,
               int threads, int isa) {
  const py::gil_scoped_release released;
  gsf::ghost_dot(matrix(a), matrix(g), matrix(r), directions, r_step, pointer<float>(u), threads, isa_of(isa));
}

void embedding_dot(int64_t ids, const Tensor& g, const Tensor& r, int64_t directions, int64_t r_step, int64_t u,
                   int threads, int isa) {
  const py::gil_scoped_release released;
  gsf::embedding_dot(pointer<const int64_t>(ids), matrix(g), matrix(r), directions, r_step, pointer<float>(u), threads,
                     isa_of(isa));
}

// A negative number of columns in place of x_hat: a bias.
void scale_dot(const Tensor& x_hat, const Tensor& g, const Tensor& r, int64_t u, int threads, int isa) {
  const py::gil_scoped_release released;
  const bool bias = x_hat[2] < 0;
  const gsf::Matrix x = bias ? gsf::Matrix{} : matrix(x_hat);
  gsf::scale_dot(bias ? nullptr : &x, matrix(g), matrix(r), pointer<float>(u), threads, isa_of(isa));
}

void ghost_project(const Tensor& a, const Tensor& g, const Tensor& p_in, const Tensor& p_out, const Indices& bounds,
                   int64_t out, int threads, int isa) {
  const py::gil_scoped_release released;
  gsf::ghost_project(matrix(a), matrix(g), matrix(p_in), matrix(p_out), bounds.data(),
                     static_cast<int64_t>(bounds.size()) - 1, pointer<float>(out), threads, isa_of(isa));
}

void ghost_inner(const std::array<Tensor, 2>& left, const std::array<Tensor, 2>& right, const Indices& spans,
                 int64_t out, int threads, int isa) {
  const py::gil_scoped_release released;
  const gsf::Factor l[2] = {factor(left[0]), factor(left[1])}, r[2] = {factor(right[0]), factor(right[1])};
  gsf::ghost_inner(l, r, left[0] == left[1] && right[0] == right[1], spans.data(),
                   static_cast<int64_t>(spans.size()) / 2, pointer<float>(out), threads, isa_of(isa));
}

void ghost_gram(const std::array<Tensor, 2>& left, const Indices& left_bounds, const std::array<Tensor, 2>& right,
                const Indices& right_bounds, int64_t out, int threads, int isa) {
  const py::gil_scoped_release released;
  const auto batch = [](const std::array<Tensor, 2>& x, const Indices& bounds) {
    return gsf::Batch{matrix(x[0]), matrix(x[1]), bounds.data(), static_cast<int64_t>(bounds.size()) - 1};
  };
  gsf::ghost_gram(batch(left, left_bounds), batch(right, right_bounds), pointer<float>(out), threads, isa_of(isa));
}

// The address of the first element, and the strides of tokens and heads.
using Heads = std::array<int64_t, 3>;
// Tokens, heads, key heads, head size, window.
using Sizes = std::array<int64_t, 5>;

gsf::attention::Tokens tokens(const Heads& x) {
  return {pointer<const uint16_t>(x[0]), x[1], x[2]};
}

gsf::attention::Problem attention_problem(const std::array<Heads, 3>& qkv, const Sizes& sizes, float scale,
                                          float softcap) {
  return {tokens(qkv[0]), tokens(qkv[1]), tokens(qkv[2]), sizes[0], sizes[1],
          sizes[2],       sizes[3],       scale,          softcap,  sizes[4]};
}

std::string attention_isa(int limit) {
  const char* name = gsf::attention_isa(isa_of(limit));
  return name == nullptr ? "" : name;
}

bool attention_forward(const std::array<Heads, 3>& qkv, const Sizes& sizes, float scale, float softcap,
                       const Indices& bounds, int64_t out, int64_t lse, int threads, int isa) {
  const py::gil_scoped_release released;
  return gsf::attention_forward(attention_problem(qkv, sizes, scale, softcap),
                                {pointer<uint16_t>(out), pointer<float>(lse)}, bounds.data(),
                                static_cast<int64_t>(bounds.size()) - 1, threads, isa_of(isa));
}

bool attention_backward(const std::array<Heads, 3>& qkv, const Sizes& sizes, float scale, float softcap,
                        const Indices& bounds, const Heads& out, const Heads& dout, int64_t lse, int64_t dq, int64_t dk,
                        int64_t dv, int threads, int isa) {
  const py::gil_scoped_release released;
  return gsf::attention_backward(attention_problem(qkv, sizes, scale, softcap),
                                 {tokens(out), tokens(dout), pointer<const float>(lse), pointer<uint16_t>(dq),
                                  pointer<uint16_t>(dk), pointer<uint16_t>(dv)},
                                 bounds.data(), static_cast<int64_t>(bounds.size()) - 1, threads, isa_of(isa));
}

#if defined(GSF_HEAD)
namespace head = gsf::head;

void linear_cross_entropy(const Tensor& h, const Tensor& weight, const std::vector<Tensor>& p,
                          const std::vector<Tensor>& r, int64_t index, int64_t labels, int64_t token_weight,
                          int64_t tokens, float scale, float softcap, int64_t loss, int64_t dh, int64_t pulled,
                          int64_t dot, bool exact, int threads, int upto) {
  const py::gil_scoped_release released;
  std::vector<gsf::Matrix> directions;
  for (const Tensor& x : r) directions.push_back(matrix(x));
  head::Problem problem;
  problem.h = matrix(h);
  problem.weight = matrix(weight);
  if (!p.empty()) problem.p = matrix(p[0]);
  problem.r = directions.data();
  problem.directions = static_cast<int64_t>(directions.size());
  problem.index = pointer<const int64_t>(index);
  problem.labels = pointer<const int64_t>(labels);
  problem.token_weight = pointer<const float>(token_weight);
  problem.tokens = tokens;
  problem.scale = scale;
  problem.softcap = softcap;
  problem.loss = pointer<float>(loss);
  problem.dh = pointer<float>(dh);
  problem.pulled = pointer<float>(pulled);
  problem.dot = pointer<float>(dot);
  problem.exact = exact;
  problem.threads = threads;
  head::run(problem, static_cast<head::Level>(upto));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The CPU kernels. Called by the rooms of gradshield_fast.ops, which check what comes in.";
  m.def("isa", &isa_name, py::arg("limit") = 4, "The instruction set that runs, where none above `limit` may.");
  m.def("lowrank_project", &lowrank_project);
  m.def("lowrank_contract", &lowrank_contract);
  m.def("ghost_dot", &ghost_dot);
  m.def("embedding_dot", &embedding_dot);
  m.def("scale_dot", &scale_dot);
  m.def("ghost_project", &ghost_project);
  m.def("ghost_inner", &ghost_inner);
  m.def("ghost_gram", &ghost_gram);
  m.def("attention_isa", &attention_isa, py::arg("limit") = 4, "As `isa`, for attention; empty where none will do.");
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);

#if defined(GSF_HEAD)
  m.def(
      "head_level", [] { return static_cast<int>(head::level()); },
      "What this CPU offers the fused head: 0 nothing that will do, 1 AVX-512, 2 with BF16, 3 with AMX.");
  m.def("linear_cross_entropy", &linear_cross_entropy);
#endif
}
