// From the chunks' partial sums to losses, dL/dh and the head's position terms, in float64 where a token has one
// number.
#include <cmath>
#include <cstring>

#include "linear_cross_entropy/element.h"
#include "linear_cross_entropy/head.h"

namespace gsf::head {
namespace {

double row_product(const Matrix& x, int64_t i, const Matrix& y, int64_t j) {
  double sum = 0;
  for (int64_t k = 0; k < x.cols; ++k) sum += element(x, i, k) * element(y, j, k);
  return sum;
}

struct Shares {
  double others;  // factor of the chunks' sums, which are relative to the common reference
  double label;   // g of the label
};

// loss = log(1 + Z / e^own), Z the sum over every word but the label; g of a word is its share of Z + e^own, and the
// label's is minus the others' together, so that neither cancels where the model is sure.
Shares loss_and_shares(const Problem& problem, int64_t token, double top, double sum, float* loss) {
  const int64_t row = problem.index[token], label = problem.labels[token];
  double own = row_product(problem.h, row, problem.weight, label) * static_cast<double>(problem.scale);
  double slope = static_cast<double>(problem.scale);
  if (problem.softcap > 0) {
    const double cap = static_cast<double>(problem.softcap), bent = std::tanh(own / cap);
    slope *= 1 - bent * bent;
    own = cap * bent;
  }
  if (sum == 0) {
    *loss = 0;
    return {0, 0};
  }
  const double gap = top + std::log(sum) - own;
  const double value = gap > 0 ? gap + std::log1p(std::exp(-gap)) : std::log1p(std::exp(gap));
  const double weight = problem.token_weight == nullptr ? 1 : static_cast<double>(problem.token_weight[token]);
  const double share = weight * std::exp(top - own - value);
  *loss = static_cast<float>(value);
  return {share * static_cast<double>(problem.scale), -share * sum * slope};
}

}  // namespace

void finish_pair(const Problem& problem, const Plan& plan, const Partial& in, int64_t pair) {
  const int64_t d = problem.h.cols, ranks = problem.p.cols, columns = plan.column_pairs * kPair;
  const int64_t acc_size = plan.column_pairs * 1024;
  const Buffer<float> rows = allocate<float>(kPair * columns);
  std::memset(rows.get(), 0, sizeof(float) * kPair * columns);
  double top[kPair], sum[kPair];
  for (int64_t t = 0; t < kPair; ++t) {
    top[t] = -HUGE_VAL;
    sum[t] = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t at = (chunk * plan.pairs + pair) * kPair + t;
      if (in.sum[at] != 0 && !(in.top[at] <= top[t])) top[t] = in.top[at];
    }
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t at = (chunk * plan.pairs + pair) * kPair + t;
      if (in.sum[at] != 0) sum[t] += in.sum[at] * std::exp(in.top[at] - top[t]);
    }
  }
  const int64_t live = problem.tokens - pair * kPair < kPair ? problem.tokens - pair * kPair : kPair;
  Shares shares[kPair] = {};
  for (int64_t t = 0; t < live; ++t) {
    const int64_t token = pair * kPair + t;
    shares[t] = loss_and_shares(problem, token, top[t], sum[t], problem.loss + problem.index[token]);
  }
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t at = chunk * plan.pairs + pair;
    float factor[kPair];
    for (int64_t t = 0; t < kPair; ++t) {
      const double relative = in.sum[at * kPair + t] == 0 ? 0 : std::exp(in.top[at * kPair + t] - top[t]);
      factor[t] = static_cast<float>(relative * shares[t].others);
    }
    const float* acc = in.acc + at * acc_size;
    for (int64_t tile = 0; tile < plan.column_pairs * 4; ++tile)
      for (int64_t i = 0; i < kTile; ++i)
        for (int64_t t = 0; t < kTile; ++t) {
          const int64_t lane = tile % 2 * kTile + t;
          rows[lane * columns + tile / 2 * kTile + i] += factor[lane] * acc[tile * 256 + i * kTile + t];
        }
  }
  for (int64_t t = 0; t < live; ++t) {
    const int64_t token = pair * kPair + t, row = problem.index[token], label = problem.labels[token];
    const double own = shares[t].label;
    const float* from = rows.get() + t * columns;
    for (int64_t i = 0; i < d; ++i)
      problem.dh[row * d + i] =
          static_cast<float>(static_cast<double>(from[i]) + own * element(problem.weight, label, i));
    for (int64_t i = 0; i < ranks; ++i)
      problem.pulled[row * ranks + i] =
          static_cast<float>(static_cast<double>(from[plan.k_steps * kPair + i]) + own * element(problem.p, label, i));
    for (int64_t j = 0; j < problem.directions; ++j) {
      double dot = own * row_product(problem.h, row, problem.r[j], label);
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t at = chunk * plan.pairs + pair;
        if (in.sum[at * kPair + t] != 0)
          dot += std::exp(in.top[at * kPair + t] - top[t]) * shares[t].others *
                 in.dot[(at * problem.directions + j) * kPair + t];
      }
      problem.dot[row * problem.directions + j] = static_cast<float>(dot);
    }
  }
}

}  // namespace gsf::head
