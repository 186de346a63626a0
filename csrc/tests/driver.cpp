// Runs every kernel of every instruction set that is here on buffers of exactly the size they need, against sums in
// double. It is compiled with the address and undefined-behaviour sanitizers: a read or write one element too far ends
// it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/isa.h"
#include "embedding_dot/cpu.h"
#include "ghost_dot/cpu.h"
#include "ghost_dot_lowrank/cpu.h"
#include "ghost_gram/cpu.h"
#include "ghost_norm_sq/cpu.h"
#include "ghost_project/cpu.h"
#include "scale_dot/cpu.h"
#include "varlen_attention/cpu.h"

namespace {

using gsf::DType;
using gsf::Isa;

std::mt19937 generator(0);
int failures = 0;

// A random matrix in a buffer that ends with its last element, as float32 or bfloat16, and the same in double.
struct Random {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  std::vector<double> exact;
  gsf::Matrix matrix;

  Random(int64_t rows, int64_t cols, int64_t padding, bool transposed, DType dtype) {
    const int64_t outer = transposed ? cols : rows, inner = transposed ? rows : cols, stride = inner + padding;
    const int64_t size = outer > 0 && inner > 0 ? (outer - 1) * stride + inner : 0;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      float x = normal(generator);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == DType::kBFloat16) {
        bits &= 0xffff0000u;
        std::memcpy(&x, &bits, 4);
        narrow.push_back(static_cast<uint16_t>(bits >> 16));
      } else {
        wide.push_back(x);
      }
      exact.push_back(x);
    }
    wide.shrink_to_fit();
    narrow.shrink_to_fit();
    const void* data = dtype == DType::kBFloat16 ? static_cast<const void*>(narrow.data()) : wide.data();
    matrix = {static_cast<const char*>(data), rows, cols, transposed ? 1 : stride, transposed ? stride : 1, dtype};
  }

  double at(int64_t i, int64_t j) const { return exact[i * matrix.row_stride + j * matrix.col_stride]; }
};

void check(const char* what, Isa isa, double got, double truth, double scale) {
  if (std::fabs(got - truth) <= 8 * 0x1p-23 * scale) return;
  std::printf("%s, %s: got %.9g, want %.9g\n", what, gsf::kernels(isa).name, got, truth);
  ++failures;
}

void lowrank(Isa isa, int64_t tokens, int64_t depth, int64_t ranks, DType dtype, bool transposed, int threads) {
  const Random a(tokens, depth, 3, false, dtype), q(depth, ranks, 1, transposed, DType::kFloat32);
  std::vector<float> z(tokens * ranks, NAN), u(tokens, NAN), member(ranks, 1.0f);
  gsf::lowrank_project(a.matrix, q.matrix, z.data(), ranks, false, threads, isa);
  const gsf::Matrix zs{reinterpret_cast<const char*>(z.data()), tokens, ranks, ranks, 1, DType::kFloat32};
  gsf::lowrank_contract(zs, a.matrix, q.matrix, member.data(), 1, u.data(), threads, isa);
  for (int64_t t = 0; t < tokens; ++t) {
    double total = 0, size = 0;
    for (int64_t j = 0; j < ranks; ++j) {
      double truth = 0, scale = 0;
      for (int64_t k = 0; k < depth; ++k) {
        truth += a.at(t, k) * q.at(k, j);
        scale += std::fabs(a.at(t, k) * q.at(k, j));
      }
      check("lowrank_project", isa, z[t * ranks + j], truth, scale);
      total += z[t * ranks + j] * truth;
      size += std::fabs(z[t * ranks + j]) * scale;
    }
    check("lowrank_contract", isa, u[t], total, size);
  }
}

void dense(Isa isa, int64_t tokens, int64_t depth, int64_t width, DType dtype, bool transposed, int threads) {
  const Random a(tokens, depth, 0, false, dtype), g(tokens, width, 2, false, dtype);
  const Random r(width, depth, 1, transposed, DType::kFloat32);
  const Random x_hat(tokens, width, 1, transposed, dtype), w(2, width, 0, transposed, DType::kFloat32);
  std::vector<float> u(tokens, NAN), e(tokens, NAN), scaled(2 * tokens, NAN);
  gsf::scale_dot(&x_hat.matrix, g.matrix, w.matrix, scaled.data(), threads, isa);
  gsf::ghost_dot(a.matrix, g.matrix, r.matrix, 1, 0, u.data(), threads, isa);
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < tokens; ++t) ids.push_back((7 * t) % width);
  gsf::embedding_dot(ids.data(), a.matrix, r.matrix, 1, 0, e.data(), threads, isa);
  for (int64_t t = 0; t < tokens; ++t) {
    double truth = 0, scale = 0, looked_up = 0, size = 0;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t o = 0; o < width; ++o) {
        truth += g.at(t, o) * r.at(o, k) * a.at(t, k);
        scale += std::fabs(g.at(t, o) * r.at(o, k) * a.at(t, k));
      }
      looked_up += a.at(t, k) * r.at(ids[t], k);
      size += std::fabs(a.at(t, k) * r.at(ids[t], k));
    }
    check("ghost_dot", isa, u[t], truth, scale);
    check("embedding_dot", isa, e[t], looked_up, size);
    double second = 0, terms = 0;
    for (int64_t o = 0; o < width; ++o) {
      second += g.at(t, o) * x_hat.at(t, o) * w.at(1, o);
      terms += std::fabs(g.at(t, o) * x_hat.at(t, o) * w.at(1, o));
    }
    check("scale_dot", isa, scaled[2 * t + 1], second, terms);
  }
}

void examples(Isa isa, int64_t tokens, int64_t d_in, int64_t d_out, DType dtype, int threads) {
  const Random a(tokens, d_in, 1, false, dtype), g(tokens, d_out, 0, true, dtype);
  const Random p_in(d_in, 5, 0, false, DType::kFloat32), p_out(d_out, 3, 0, false, DType::kFloat32);
  const std::vector<int64_t> bounds = {0, tokens / 3, tokens / 3, tokens};
  std::vector<int64_t> spans;
  for (size_t n = 0; n < 3; ++n) spans.insert(spans.end(), {bounds[n], bounds[n + 1]});
  std::vector<float> projected(3 * 15, NAN), norm(3, NAN);
  gsf::ghost_project(a.matrix, g.matrix, p_in.matrix, p_out.matrix, bounds.data(), 3, projected.data(), threads, isa);
  const gsf::Factor left[2] = {{g.matrix, nullptr}, {g.matrix, nullptr}};
  const gsf::Factor right[2] = {{a.matrix, nullptr}, {a.matrix, nullptr}};
  gsf::ghost_inner(left, right, true, spans.data(), 3, norm.data(), threads, isa);
  std::vector<float> gram(9, NAN);
  const gsf::Batch batch = {a.matrix, g.matrix, bounds.data(), 3};
  gsf::ghost_gram(batch, batch, gram.data(), threads, isa);
  for (size_t n = 0; n < 3; ++n) {
    double square = 0, size = 0;
    std::vector<double> truth(15), scale(15);
    for (int64_t o = 0; o < d_out; ++o)
      for (int64_t i = 0; i < d_in; ++i) {
        double gradient = 0, magnitude = 0;
        for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t) {
          gradient += g.at(t, o) * a.at(t, i);
          magnitude += std::fabs(g.at(t, o) * a.at(t, i));
        }
        square += gradient * gradient;
        size += magnitude * magnitude;
        for (int64_t x = 0; x < 3; ++x)
          for (int64_t y = 0; y < 5; ++y) {
            truth[5 * x + y] += p_out.at(o, x) * gradient * p_in.at(i, y);
            scale[5 * x + y] += std::fabs(p_out.at(o, x) * p_in.at(i, y)) * magnitude;
          }
      }
    check("ghost_norm_sq", isa, norm[n], square, size);
    check("ghost_gram", isa, gram[4 * n], square, size);
    for (size_t x = 0; x < 15; ++x) check("ghost_project", isa, projected[15 * n + x], truth[x], scale[x]);
  }
}

// Rows of these lengths, two heads to a key head; outputs to a few roundings to bfloat16.
void attention(Isa isa, const std::vector<int64_t>& lengths, int64_t kv_heads, int64_t d, int64_t window, float softcap,
               int threads) {
  if (gsf::attention_isa(isa) == nullptr) return;
  std::vector<int64_t> bounds = {0};
  for (const int64_t n : lengths) bounds.push_back(bounds.back() + n);
  const int64_t tokens = bounds.back(), heads = 2 * kv_heads, rows = static_cast<int64_t>(lengths.size());
  const Random q(tokens, heads * d, 3, false, DType::kBFloat16), k(tokens, kv_heads * d, 0, false, DType::kBFloat16);
  const Random v(tokens, kv_heads * d, 1, false, DType::kBFloat16);
  const Random dout(tokens, heads * d, 0, false, DType::kBFloat16);
  const auto view = [d](const Random& x) { return gsf::attention::Tokens{x.narrow.data(), x.matrix.row_stride, d}; };
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const gsf::attention::Problem problem = {view(q),  view(k), view(v), tokens,  heads,
                                           kv_heads, d,       scale,   softcap, std::min(window, tokens + 64)};
  std::vector<uint16_t> out(tokens * heads * d), dq(tokens * heads * d), dk(tokens * kv_heads * d), dv(dk.size());
  std::vector<float> lse(heads * tokens);
  gsf::attention_forward(problem, {out.data(), lse.data()}, bounds.data(), rows, threads, isa);
  const gsf::attention::Tokens outs = {out.data(), heads * d, d};
  gsf::attention_backward(problem, {outs, view(dout), lse.data(), dq.data(), dk.data(), dv.data()}, bounds.data(), rows,
                          threads, isa);
  const auto number = [](uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return static_cast<double>(x);
  };
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t from = std::max(bounds[n], t - window + 1), key = h / 2;
        std::vector<double> p(t + 1 - from);
        double total = 0;
        for (int64_t u = from; u <= t; ++u) {
          double z = 0;
          for (int64_t i = 0; i < d; ++i) z += q.at(t, h * d + i) * k.at(u, key * d + i) * scale;
          if (softcap > 0) z = softcap * std::tanh(z / softcap);
          total += p[u - from] = std::exp(z);
        }
        check("attention's lse", isa, lse[h * tokens + t], std::log(total), 8);
        for (int64_t i = 0; i < d; ++i) {
          double truth = 0, size = 0;
          for (int64_t u = from; u <= t; ++u) {
            truth += p[u - from] / total * v.at(u, key * d + i);
            size += p[u - from] / total * std::fabs(v.at(u, key * d + i));
          }
          check("attention", isa, number(out[(t * heads + h) * d + i]), truth, size * 0x1p13);
          if (!std::isfinite(number(dq[(t * heads + h) * d + i]))) ++failures;
        }
      }
  for (size_t i = 0; i < dk.size(); ++i)
    if (!std::isfinite(number(dk[i])) || !std::isfinite(number(dv[i]))) ++failures;
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1},     {0, 5, 3},     {3, 33, 17},   {49, 64, 16},
                               {70, 129, 40}, {130, 545, 7}, {51, 210, 131}};
  for (int limit = 0; limit <= static_cast<int>(gsf::best_isa()); ++limit) {
    const Isa isa = static_cast<Isa>(limit);
    for (const auto& s : shapes)
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
        for (const bool transposed : {false, true})
          for (const int threads : {1, 3}) {
            lowrank(isa, s[0], s[1], s[2], dtype, transposed, threads);
            dense(isa, s[0], s[1], s[2], dtype, transposed, threads);
            if (!transposed) examples(isa, s[0], s[1], s[2], dtype, threads);
          }
    for (const int threads : {1, 3}) {
      attention(isa, {1, 0, 33}, 1, 40, 1000, 0.0f, threads);
      attention(isa, {31, 150}, 2, 64, 70, 0.0f, threads);
      attention(isa, {300}, 1, 1, 1000, 2.0f, threads);
      attention(isa, {600}, 1, 33, 1, 0.0f, threads);
    }
    std::printf("%s: done\n", gsf::kernels(isa).name);
  }
  return failures == 0 ? 0 : 1;
}
