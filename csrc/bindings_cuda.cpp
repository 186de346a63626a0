// The module `gradshield_fast._cuda`: tensors arrive as (address, dtype code, sizes, strides), so that one build serves
// every version of torch. With GRADSHIELD_EMULATOR the same functions run the kernels on the CPU and check them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "embedding_dot/embedding_dot.h"
#include "ghost_dot/ghost_dot.h"
#include "ghost_dot_lowrank/ghost_dot_lowrank.h"
#include "ghost_norm_sq/ghost_norm_sq.h"
#include "ghost_project/ghost_project.h"

namespace gradshield {
namespace {

using Packed = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;

using Queue = std::pair<uintptr_t, int>;  // stream, device

struct Tensor {
  void* data;
  int32_t dtype;
  std::vector<int64_t> sizes, strides;

  explicit Tensor(const Packed& packed)
      : data(reinterpret_cast<void*>(std::get<0>(packed))),
        dtype(std::get<1>(packed)),
        sizes(std::get<2>(packed)),
        strides(std::get<3>(packed)) {
    if (dtype < kFloat32 || dtype > kInt32 || sizes.size() != strides.size())
      throw std::invalid_argument("a tensor is (address, dtype code 0..4, sizes, strides)");
  }

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

void need(bool condition, const char* op, const char* rule) {
  if (!condition) throw std::invalid_argument(std::string(op) + ": " + rule);
}

// A float32 or integer buffer without gaps, of exactly these sizes.
void need_buffer(const char* op, const char* rule, const Tensor& x, int32_t dtype, const std::vector<int64_t>& sizes) {
  int64_t stride = 1;
  bool dense = x.dtype == dtype && x.sizes == sizes;
  for (size_t d = sizes.size(); dense && d-- > 0; stride *= sizes[d])
    dense = x.count() == 0 || sizes[d] == 1 || x.strides[d] == stride;
  need(dense, op, rule);
}

void need_floats(const char* op, const Tensor& x, size_t dims) {
  need(x.dtype <= kBfloat16 && x.sizes.size() == dims, op, "an input has another dtype or number of axes");
}

#if defined(GRADSHIELD_EMULATOR)
// Lets kernels touch the elements of these tensors and nothing else; afterwards, every output must have been written.
cudaError_t run(const std::vector<const Tensor*>& inputs, const std::vector<const Tensor*>& outputs,
                const std::function<cudaError_t()>& body) {
  auto& machine = emulator::machine();
  machine.forget_buffers();
  const int bytes[] = {4, 2, 2, 8, 4};
  for (const bool output : {false, true})
    for (const Tensor* x : output ? outputs : inputs)
      machine.allow(x->data, x->sizes.data(), x->strides.data(), static_cast<int>(x->sizes.size()), bytes[x->dtype],
                    output);
  const cudaError_t error = body();
  std::string which;
  if (!machine.error().empty()) throw std::runtime_error(machine.error());
  if (error == cudaSuccess && !machine.all_written(&which)) throw std::runtime_error(which);
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "launch failure";
}
#else
template <class Body>
cudaError_t run(const std::vector<const Tensor*>&, const std::vector<const Tensor*>&, const Body& body) {
  return body();
}
#endif

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// The module has a CUDA runtime of its own, which does not know what device torch's has chosen.
cudaStream_t select(const Queue& queue) {
#if !defined(GRADSHIELD_EMULATOR)
  check("cudaSetDevice", cudaSetDevice(queue.second));
#endif
  return reinterpret_cast<cudaStream_t>(queue.first);
}

void bind_ghost_dot(const Packed& a_, const Packed& g_, const Packed& r_, const Packed& parts_, const Packed& u_,
                    int64_t slices, const Queue& queue) {
  const char* op = "ghost_dot";
  const Tensor a(a_), g(g_), r(r_), parts(parts_), u(u_);
  need_floats(op, a, 2);
  need_floats(op, g, 2);
  need_floats(op, r, 3);
  const int64_t tokens = a.sizes[0], d_in = a.sizes[1], d_out = g.sizes[1], directions = r.sizes[0];
  need(g.sizes[0] == tokens && r.sizes[1] == d_out && r.sizes[2] == d_in, op, "a, g and r disagree in shape");
  need(slices >= 1, op, "there is at least one slice");
  const int64_t count = slices * ((d_out + 63) / 64);
  need_buffer(op, "u is float32 [tokens, directions]", u, kFloat32, {tokens, directions});
  need_buffer(op, "parts is float32 [slices * ceil(d_out / 64), or 0 for one, tokens, directions]", parts, kFloat32,
              {count == 1 ? 0 : count, tokens, directions});
  check(op, run({&a, &g, &r}, {&parts, &u}, [&] {
          return ghost_dot(
              {a.data,       g.data,       r.data,       parts.as<float>(), u.as<float>(), tokens,       d_in,
               d_out,        directions,   slices,       a.strides[0],      a.strides[1],  g.strides[0], g.strides[1],
               r.strides[0], r.strides[1], r.strides[2], a.dtype,           g.dtype,       r.dtype},
              select(queue));
        }));
}

ProjectParams project_params(const char* op, const Tensor& x, const Tensor& w, int64_t slices) {
  need_floats(op, x, 2);
  need_floats(op, w, 2);
  need(w.dtype == kFloat32 && w.sizes[0] == x.sizes[1], op, "the factor is float32 and as long as the input is wide");
  need(slices >= 1, op, "there is at least one slice");
  return {x.data, w.as<float>(), nullptr,      nullptr,      x.sizes[0],   x.sizes[1], w.sizes[1],
          slices, x.strides[0],  x.strides[1], w.strides[0], w.strides[1], x.dtype};
}

void bind_lowrank_project(const Packed& x_, const Packed& w_, const Packed& parts_, const Packed& z_, int64_t slices,
                          const Queue& queue) {
  const char* op = "lowrank_project";
  const Tensor x(x_), w(w_), parts(parts_), z(z_);
  ProjectParams p = project_params(op, x, w, slices);
  need_buffer(op, "z is float32 [tokens, ranks]", z, kFloat32, {p.tokens, p.ranks});
  need_buffer(op, "parts is float32 [slices, or 0 for one, tokens, ranks]", parts, kFloat32,
              {slices == 1 ? 0 : slices, p.tokens, p.ranks});
  p.parts = parts.as<float>();
  p.z = z.as<float>();
  check(op, run({&x, &w}, {&parts, &z}, [&] { return lowrank_project(p, select(queue)); }));
}

void bind_lowrank_contract(const Packed& z_, const Packed& g_, const Packed& w_, const Packed& member_,
                           const Packed& parts_, const Packed& u_, int64_t slices, const Queue& queue) {
  const char* op = "lowrank_contract";
  const Tensor z(z_), g(g_), w(w_), member(member_), parts(parts_), u(u_);
  const ProjectParams product = project_params(op, g, w, slices);
  need(z.dtype == kFloat32 && z.sizes == std::vector<int64_t>{product.tokens, product.ranks}, op,
       "z is float32 [tokens, ranks]");
  need(member.dtype == kFloat32 && member.sizes.size() == 2 && member.sizes[0] == product.ranks, op,
       "member is float32 [ranks, directions]");
  const int64_t directions = member.sizes[1], count = slices * ((product.ranks + 31) / 32);
  need_buffer(op, "u is float32 [tokens, directions]", u, kFloat32, {product.tokens, directions});
  need_buffer(op, "parts is float32 [slices * ceil(ranks / 32), or 0 for one, tokens, directions]", parts, kFloat32,
              {count == 1 ? 0 : count, product.tokens, directions});
  check(op, run({&z, &g, &w, &member}, {&parts, &u}, [&] {
          return lowrank_contract({product, z.as<float>(), member.as<float>(), parts.as<float>(), u.as<float>(),
                                   directions, z.strides[0], z.strides[1], member.strides[0], member.strides[1]},
                                  select(queue));
        }));
}

void bind_embedding_dot(const Packed& ids_, const Packed& g_, const Packed& r_, const Packed& u_, const Queue& queue) {
  const char* op = "embedding_dot";
  const Tensor ids(ids_), g(g_), r(r_), u(u_);
  need_floats(op, g, 2);
  need_floats(op, r, 3);
  const int64_t tokens = g.sizes[0], width = g.sizes[1];
  need(ids.dtype == kInt64 && ids.sizes == std::vector<int64_t>{tokens} && r.sizes[2] == width, op,
       "ids, g and r disagree in shape, or ids are not int64");
  need_buffer(op, "u is float32 [tokens, directions]", u, kFloat32, {tokens, r.sizes[0]});
  check(op, run({&ids, &g, &r}, {&u}, [&] {
          return embedding_dot(
              {ids.as<int64_t>(), g.data, r.data, u.as<float>(), tokens, width, r.sizes[1], r.sizes[0], ids.strides[0],
               g.strides[0], g.strides[1], r.strides[0], r.strides[1], r.strides[2], g.dtype, r.dtype},
              select(queue));
        }));
}

void bind_outer_sum(const Packed& left_, const Packed& right_, const Packed& cu_, const Packed& out_,
                    const Queue& queue) {
  const char* op = "outer_sum";
  const Tensor left(left_), right(right_), cu(cu_), out(out_);
  need(left.sizes.size() == 2 && right.sizes.size() == 2 && cu.sizes.size() == 1 && cu.sizes[0] >= 1, op,
       "left and right are matrices and cu_seqlens a vector");
  const int64_t tokens = left.sizes[0], k_out = left.sizes[1], k_in = right.sizes[1], examples = cu.sizes[0] - 1;
  need_buffer(op, "left is float32 [tokens, k_out]", left, kFloat32, {tokens, k_out});
  need_buffer(op, "right is float32 [tokens, k_in]", right, kFloat32, {tokens, k_in});
  need_buffer(op, "cu_seqlens is int64 [examples + 1]", cu, kInt64, {examples + 1});
  need_buffer(op, "out is float32 [examples, k_out, k_in]", out, kFloat32, {examples, k_out, k_in});
  check(op, run({&left, &right, &cu}, {&out}, [&] {
          return outer_sum(
              {left.as<float>(), right.as<float>(), cu.as<int64_t>(), out.as<float>(), tokens, k_out, k_in, examples},
              select(queue));
        }));
}

Factor factor(const char* op, const Tensor& x) {
  need_floats(op, x, 2);
  return {x.data, x.strides[0], x.strides[1], x.dtype};
}

void bind_ghost_inner(const std::vector<Packed>& factors, const Packed& cu_, const Packed& items_, const Packed& parts_,
                      bool outer, bool same, const Queue& queue) {
  const char* op = "ghost_inner";
  need(factors.size() == 4, op, "the factors are left1, right1, left2, right2");
  const Tensor left1(factors[0]), right1(factors[1]), left2(factors[2]), right2(factors[3]);
  const Tensor cu(cu_), items(items_), parts(parts_);
  GhostInnerParams p{};
  p.left1 = factor(op, left1);
  p.right1 = factor(op, right1);
  p.left2 = factor(op, left2);
  p.right2 = factor(op, right2);
  need(left1.sizes == left2.sizes && right1.sizes == right2.sizes && left1.sizes[0] == right1.sizes[0], op,
       "the factors disagree in shape");
  need(items.sizes.size() == 2 && cu.sizes.size() == 1, op, "items is a matrix and cu_seqlens a vector");
  p.count = items.sizes[0];
  need_buffer(op, "cu_seqlens is int64 [examples + 1]", cu, kInt64, {cu.sizes[0]});
  need_buffer(op, "items is int32 [count, 4]", items, kInt32, {p.count, 4});
  need_buffer(op, "parts is float32 [count]", parts, kFloat32, {p.count});
  p.tokens = left1.sizes[0];
  p.left_width = left1.sizes[1];
  p.right_width = right1.sizes[1];
  p.cu_seqlens = cu.as<int64_t>();
  p.items = items.as<int32_t>();
  p.parts = parts.as<float>();
  p.same = same;
  check(op, run({&left1, &right1, &left2, &right2, &cu, &items}, {&parts},
                [&] { return ghost_inner(p, outer, select(queue)); }));
}

void bind_sum_items(const Packed& parts_, const Packed& spans_, const Packed& out_, const Queue& queue) {
  const char* op = "sum_items";
  const Tensor parts(parts_), spans(spans_), out(out_);
  need(out.sizes.size() == 1, op, "out is a vector");
  const int64_t examples = out.sizes[0];
  need_buffer(op, "out is float32 [examples]", out, kFloat32, {examples});
  need_buffer(op, "spans is int64 [examples, 2]", spans, kInt64, {examples, 2});
  need_buffer(op, "parts is float32 [count]", parts, kFloat32, {parts.count()});
  check(op, run({&parts, &spans}, {&out}, [&] {
          return sum_items({parts.as<float>(), spans.as<int64_t>(), out.as<float>(), examples}, select(queue));
        }));
}

}  // namespace
}  // namespace gradshield

// Launches only queue work, so the interpreter lock is kept.
PYBIND11_MODULE(GRADSHIELD_MODULE, m) {
  namespace gs = gradshield;
  m.doc() = "CUDA kernels of gradshield_fast; a tensor is (address, dtype code, sizes, strides in elements)";
  m.def("ghost_dot", &gs::bind_ghost_dot);
  m.def("lowrank_project", &gs::bind_lowrank_project);
  m.def("lowrank_contract", &gs::bind_lowrank_contract);
  m.def("embedding_dot", &gs::bind_embedding_dot);
  m.def("outer_sum", &gs::bind_outer_sum);
  m.def("ghost_inner", &gs::bind_ghost_inner);
  m.def("sum_items", &gs::bind_sum_items);
#if defined(GRADSHIELD_EMULATOR)
  m.def("set_seed", [](uint64_t seed) { emulator::machine().set_seed(seed); });
  m.def("switches", [] { return emulator::machine().switches(); });
#endif
}
