// How the fused head's work is cut and shared among threads.
#include "csrc/linear_cross_entropy/head.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "csrc/linear_cross_entropy/element.h"

namespace gradshield::head {
namespace {

int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

// Bytes of the packed block of the vocabulary, and of acc, that share a core's L2 with each other.
constexpr int64_t kBlockBytes = 1 << 21, kMaxGroupPairs = 16, kWideSteps = 32;

// Workers that live for one call, so that a fork between calls finds none. Which of them takes an item changes no bit.
template <typename Work>
void parallel(const Kernel& kernel, int threads, int64_t items, int64_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto worker = [&] {
    try {
      const Buffer<uint8_t> scratch = allocate<uint8_t>(scratch_bytes);
      kernel.begin_thread();
      for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, scratch.get());
      kernel.end_thread();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
      next = items;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < std::min<int64_t>(threads, items); ++i) others.emplace_back(worker);
  } catch (const std::system_error&) {
    // fewer threads than asked for do the same work
  }
  worker();
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Leaving terms out counts on errors that cancel over many words. They do not in a column that few words have a part
// in, so a vocabulary that is short, or a weight whose sampled rows are mostly zeros, is taken with every term.
constexpr int64_t kManyWords = 2048, kSampledRows = 64;

bool needs_every_term(const Matrix& weight) {
  if (weight.rows < kManyWords) return true;
  int64_t zeros = 0;
  for (int64_t i = 0; i < kSampledRows; ++i)
    for (int64_t k = 0; k < weight.cols; ++k)
      zeros += element(weight, i * (weight.rows - 1) / (kSampledRows - 1), k) == 0;
  return 2 * zeros > kSampledRows * weight.cols;
}

}  // namespace

Plan make_plan(const Problem& problem) {
  Plan plan = {};
  const int64_t d = problem.h.cols, vocabulary = problem.weight.rows;
  plan.terms_h = terms_of(problem.h.dtype);
  plan.terms_w = terms_of(problem.weight.dtype);
  plan.terms_p = terms_of(problem.p.dtype);
  plan.terms_r = problem.directions > 0 ? terms_of(problem.r[0].dtype) : 0;
  plan.most_terms = problem.exact || plan.terms_h == kMaxTerms || plan.terms_w == kMaxTerms ? kMaxTerms : 1;
  plan.every_term = plan.most_terms > 1 && needs_every_term(problem.weight);
  plan.k_steps = std::max<int64_t>(1, ceil_div(d, kPair));
  plan.rank_pairs = ceil_div(problem.p.cols, kPair);
  plan.half_rank_pair = problem.p.cols % kPair > 0 && problem.p.cols % kPair <= kTile;
  plan.column_pairs = plan.k_steps + plan.rank_pairs;
  plan.pairs = ceil_div(problem.tokens, kPair);

  const int64_t step_bytes =
      2 * kTileBytes *
      (plan.k_steps * (2 * plan.terms_w + problem.directions * plan.terms_r) + plan.rank_pairs * plan.terms_p);
  plan.steps_per_block = std::clamp<int64_t>(kBlockBytes / step_bytes, 2, 7);

  plan.groups = ceil_div(plan.pairs, kMaxGroupPairs);
  plan.group_pairs = ceil_div(plan.pairs, std::max<int64_t>(plan.groups, 1));
  // Wide rows: L2 holds the tiles of either product, but not of both beside a pair's sums.
  plan.pairs_at_once = plan.k_steps > kWideSteps ? plan.group_pairs : 1;
  // Enough items for many cores, yet few enough that the chunks' partial sums stay small beside one row of logits.
  const int64_t wanted = ceil_div(32, std::max<int64_t>(plan.groups, 1));
  const int64_t chunks = std::max<int64_t>(1, std::min({wanted, vocabulary / (8 * d + 1), vocabulary / 1024}));
  const int64_t block_words = plan.steps_per_block * kPair;
  plan.words_per_chunk = ceil_div(ceil_div(vocabulary, chunks), block_words) * block_words;
  plan.chunks = ceil_div(vocabulary, plan.words_per_chunk);
  return plan;
}

void run(const Problem& problem, Level upto) {
  const Level best = std::min(level(), upto);
  const Kernel& kernel = best == Level::kAmx ? kAmxKernel : best == Level::kBf16 ? kBf16Kernel : kAvx512Kernel;
  if (problem.tokens == 0) return;
  const Plan plan = make_plan(problem);
  const int64_t packed_h_bytes = plan.pairs * plan.k_steps * plan.terms_h * 2 * kTileBytes;
  const Buffer<uint8_t> packed = allocate<uint8_t>(packed_h_bytes);
  const int64_t each = plan.chunks * plan.pairs * kPair;
  const Buffer<float> acc = allocate<float>(each * plan.column_pairs * kPair);
  const Buffer<float> top = allocate<float>(each);
  const Buffer<double> sum = allocate<double>(each);
  const Buffer<double> dot = allocate<double>(each * problem.directions);
  const Partial partial = {acc.get(), top.get(), sum.get(), dot.get()};
  const int64_t pair_bytes = packed_h_bytes / plan.pairs;
  parallel(kernel, problem.threads, plan.pairs, 0,
           [&](int64_t pair, uint8_t*) { kernel.pack_h(problem, plan, pair, packed.get() + pair * pair_bytes); });
  parallel(kernel, problem.threads, plan.groups * plan.chunks, kernel.scratch_bytes(problem, plan),
           [&](int64_t item, uint8_t* scratch) {
             kernel.run_item(problem, plan, packed.get(), partial, item % plan.groups, item / plan.groups, scratch);
           });
  parallel(kernel, problem.threads, plan.pairs, 0,
           [&](int64_t pair, uint8_t*) { finish_pair(problem, plan, partial, pair); });
}

}  // namespace gradshield::head
