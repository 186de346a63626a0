// How the fused head's work is cut and shared among threads.
#include "linear_cross_entropy/head.h"

#include <algorithm>

#include "common/memory.h"
#include "common/pool.h"
#include "common/processor.h"
#include "linear_cross_entropy/element.h"

namespace gsf::head {
namespace {

// Bytes of W packed for either product, which take half of a core's L2; the window that makes reading and writing acc
// cheap beside the second product; the tokens that share what is packed.
constexpr int64_t kPackedBytes = 1 << 20, kWindowSteps = 16, kMaxGroupPairs = 32;

// The unit's state while a thread works on an item.
class Tiles {
 public:
  explicit Tiles(const Kernel& kernel) : kernel_(kernel) { kernel_.begin_thread(); }
  ~Tiles() { kernel_.end_thread(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const Kernel& kernel_;
};

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

  const int64_t step_bytes = 2 * kTileBytes * plan.k_steps * (plan.terms_w + problem.directions * plan.terms_r);
  plan.steps_per_block = std::clamp<int64_t>(kPackedBytes / step_bytes, 2, kWindowSteps);
  plan.steps_per_window = kWindowSteps / plan.steps_per_block * plan.steps_per_block;
  const int64_t column_bytes = 2 * kTileBytes * plan.steps_per_window * plan.terms_w;
  plan.slice_pairs = std::clamp<int64_t>(kPackedBytes / column_bytes, 1, plan.k_steps);

  plan.groups = ceil_div(plan.pairs, kMaxGroupPairs);
  plan.group_pairs = ceil_div(plan.pairs, std::max<int64_t>(plan.groups, 1));
  // Enough items for many cores, yet few enough that the chunks' partial sums stay small beside one row of logits; an
  // even number, for the cores of small machines.
  const int64_t wanted = ceil_div(32, std::max<int64_t>(plan.groups, 1));
  const int64_t chunks =
      std::max<int64_t>(1, std::min({wanted, (vocabulary / (8 * d + 1) + 1) / 2 * 2, vocabulary / 1024}));
  plan.words_per_chunk = ceil_div(ceil_div(vocabulary, chunks), kPair) * kPair;
  plan.chunks = ceil_div(vocabulary, plan.words_per_chunk);
  return plan;
}

Level level() {
  const Isa isa = best_isa();
  if (isa < Isa::kAvx512) return Level::kNone;
  return isa < Isa::kAvx512Bf16 ? Level::kAvx512 : isa < Isa::kAmx ? Level::kBf16 : Level::kAmx;
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
  gsf::parallel(problem.threads, plan.pairs,
                [&](int64_t pair) { kernel.pack_h(problem, plan, pair, packed.get() + pair * pair_bytes); });
  gsf::parallel(problem.threads, plan.groups * plan.chunks, [&](int64_t item) {
    static thread_local gsf::Buffer scratch;
    uint8_t* memory = scratch.get<uint8_t>(kernel.scratch_bytes(problem, plan));
    const Tiles tiles(kernel);
    kernel.run_item(problem, plan, packed.get(), partial, item % plan.groups, item / plan.groups, memory);
  });
  gsf::parallel(problem.threads, plan.pairs, [&](int64_t pair) { finish_pair(problem, plan, partial, pair); });
}

}  // namespace gsf::head
