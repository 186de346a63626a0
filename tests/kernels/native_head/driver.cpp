// Runs the fused head on heap buffers of exactly the sizes it is told, beside a plain double loop. Built with the
// address and undefined-behaviour sanitizers by test_sanitizers.py. Exit status: the number of shapes that came out
// wrong, or 77 where the CPU lacks the instructions.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "linear_cross_entropy/element.h"
#include "linear_cross_entropy/head.h"

using gsf::DType;
using gsf::Matrix;
using gsf::head::element;
using gsf::head::Level;
using gsf::head::Problem;

namespace {

struct Shape {
  int64_t tokens, vocabulary, d, ranks, directions, padding, threads;
  DType dtype;
  float scale, softcap;
  Level upto = Level::kAmx;
};

uint64_t state = 1;

float normal() {
  float sum = 0;
  for (int i = 0; i < 6; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    sum += static_cast<float>(state >> 40) / (1 << 24) - 0.5f;
  }
  return sum * 1.41f;
}

// A row-major matrix whose rows are `padding` apart; the last row has no padding behind it.
struct Owned {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Matrix view;

  Owned(int64_t rows, int64_t cols, int64_t padding, DType dtype, float size) {
    const int64_t stride = cols + padding, count = rows == 0 ? 0 : (rows - 1) * stride + cols;
    if (dtype == DType::kFloat32)
      floats.assign(count, std::numeric_limits<float>::quiet_NaN());
    else
      halves.assign(count, 0x7fff);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < cols; ++k) {
        const float value = normal() * size;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (dtype == DType::kFloat32)
          floats[i * stride + k] = value;
        else if (dtype == DType::kBFloat16)
          halves[i * stride + k] = static_cast<uint16_t>(bits >> 16);
        else  // cut a normal float16 out of the float; what is too small for one becomes zero
          halves[i * stride + k] = std::fabs(value) < 1e-4f ? 0
                                                            : static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                                                                    (((bits >> 23 & 255) - 112) << 10) |
                                                                                    (bits >> 13 & 1023));
      }
    const void* data = dtype == DType::kFloat32 ? static_cast<const void*>(floats.data()) : halves.data();
    view = {static_cast<const char*>(data), rows, cols, stride, 1, dtype};
  }
};

// Largest error of dh and of pulled, relative to the sum of magnitudes of its terms and of the logits' own.
double worst(const Shape& s) {
  const Owned h(s.tokens + 1, s.d, s.padding, s.dtype, 1.f / std::sqrt(static_cast<float>(s.d)));
  const Owned weight(s.vocabulary, s.d, s.padding, s.dtype, 2), p(s.vocabulary, s.ranks, s.padding, DType::kFloat32, 1);
  std::vector<Owned> r;
  std::vector<Matrix> views;
  for (int64_t i = 0; i < s.directions; ++i) r.emplace_back(s.vocabulary, s.d, s.padding, DType::kFloat32, 1.f);
  for (const Owned& x : r) views.push_back(x.view);
  std::vector<int64_t> index, labels;
  for (int64_t t = 0; t < s.tokens; ++t) index.push_back(t + 1), labels.push_back(t * 31 % s.vocabulary);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> loss(s.tokens + 1, nan), dh((s.tokens + 1) * s.d, nan), pulled((s.tokens + 1) * s.ranks, nan),
      dot((s.tokens + 1) * s.directions, nan);
  Problem problem;
  problem.h = h.view, problem.weight = weight.view, problem.p = p.view;
  problem.r = views.data(), problem.directions = s.directions;
  problem.index = index.data(), problem.labels = labels.data(), problem.tokens = s.tokens;
  problem.scale = s.scale, problem.softcap = s.softcap, problem.threads = static_cast<int>(s.threads);
  problem.loss = loss.data(), problem.dh = dh.data(), problem.pulled = pulled.data(), problem.dot = dot.data();
  gsf::head::run(problem, s.upto);

  double most = 0;
  for (int64_t t = 0; t < s.tokens; ++t) {
    std::vector<double> z(s.vocabulary), slope(s.vocabulary, s.scale);
    double top = -1e300, sum = 0;
    for (int64_t v = 0; v < s.vocabulary; ++v) {
      for (int64_t k = 0; k < s.d; ++k) z[v] += element(h.view, t + 1, k) * element(weight.view, v, k);
      z[v] *= s.scale;
      if (s.softcap > 0) {
        const double bent = std::tanh(z[v] / s.softcap);
        slope[v] *= 1 - bent * bent, z[v] = bent * s.softcap;
      }
      top = std::fmax(top, z[v]);
    }
    for (double x : z) sum += std::exp(x - top);
    most = std::fmax(most, std::fabs(loss[t + 1] - (top + std::log(sum) - z[labels[t]])) / 50);
    for (int64_t k = 0; k < s.d + s.ranks; ++k) {
      double value = 0, size = 1e-30;
      for (int64_t v = 0; v < s.vocabulary; ++v) {
        const double g = (std::exp(z[v] - top) / sum - (v == labels[t])) * slope[v];
        const double x = k < s.d ? element(weight.view, v, k) : element(p.view, v, k - s.d);
        value += g * x, size += std::fabs(g * x) + std::exp(z[v] - top) / sum * std::fabs(s.scale * x);
      }
      const double out = k < s.d ? dh[(t + 1) * s.d + k] : pulled[(t + 1) * s.ranks + k - s.d];
      most = std::fmax(most, std::fabs(out - value) / size / 20);
      if (std::isnan(out)) return out;
    }
    for (int64_t i = 0; i < s.directions; ++i)
      if (std::isnan(dot[(t + 1) * s.directions + i])) return nan;
  }
  if (s.tokens > 0 && (!std::isnan(loss[0]) || !std::isnan(dh[0]))) return nan;  // a row that no token points at
  return most;
}

}  // namespace

int main() {
  if (gsf::head::level() == Level::kNone) return 77;
  const Shape shapes[] = {
      {1, 1, 1, 0, 0, 0, 1, DType::kBFloat16, 1, 0},     {0, 9, 8, 1, 1, 0, 2, DType::kBFloat16, 1, 0},
      {33, 65, 33, 3, 1, 5, 2, DType::kBFloat16, 1, 0},  {5, 2500, 40, 17, 0, 1, 3, DType::kBFloat16, 1, 0},
      {40, 90, 31, 40, 2, 3, 2, DType::kFloat32, -2, 4}, {17, 70, 64, 16, 1, 0, 1, DType::kFloat16, 1, 0},
      {3, 40, 700, 1, 1, 2, 1, DType::kBFloat16, 1, 0},  {3, 40, 1100, 1, 1, 2, 2, DType::kFloat32, 1, 0},
      {530, 40, 9, 2, 0, 0, 3, DType::kBFloat16, 0, 0}};
  int wrong = 0;
  for (Level upto : {Level::kAmx, Level::kBf16, Level::kAvx512})
    for (Shape s : shapes) {
      s.upto = upto;
      const double most = worst(s);
      const bool good = most < 8 * 1.2e-7;
      std::printf("%s: %lld tokens, %lld words, d %lld, %lld ranks: %.2g\n", good ? "good" : "WRONG",
                  static_cast<long long>(s.tokens), static_cast<long long>(s.vocabulary), static_cast<long long>(s.d),
                  static_cast<long long>(s.ranks), most);
      wrong += !good;
    }
  return wrong;
}
