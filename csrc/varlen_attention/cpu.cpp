#include "varlen_attention/cpu.h"

#include <algorithm>
#include <vector>

#include "common/memory.h"
#include "common/pool.h"

namespace gsf {
namespace {

using attention::Item;
using attention::Problem;

// The build defines GSF_<NAME> for each instruction set that the compiler knows.
const attention::Kernels* kernels_of(Isa isa) {
  const Isa limit = isa < best_isa() ? isa : best_isa();
#if defined(GSF_AMX_ATTENTION)
  if (limit >= Isa::kAmx) return &attention::kAmx;
#endif
#if defined(GSF_AVX512_BF16_ATTENTION)
  if (limit >= Isa::kAvx512Bf16) return &attention::kAvx512Bf16;
#endif
#if defined(GSF_AVX512_ATTENTION)
  if (limit >= Isa::kAvx512) return &attention::kAvx512;
#endif
  (void)limit;
  return nullptr;
}

// A row that is longer than this is several items of the forward pass: each packs the keys before it again.
constexpr int64_t kQueries = 512;

// The longest first, so that none is left for the end; what an item computes does not depend on the others.
template <typename Run>
void run_items(const Problem& p, const int64_t* bounds, int64_t rows, int64_t queries, int threads, Run&& run) {
  std::vector<Item> items;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t length = bounds[n + 1] - bounds[n], most = queries > 0 ? queries : length;
    for (int64_t first = 0; first < length; first += most)
      for (int64_t head = 0; head < p.kv_heads; ++head)
        items.push_back({bounds[n], length, head, first, std::min(length, first + most)});
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.last > b.last; });
  parallel(threads, static_cast<int64_t>(items.size()), [&](int64_t i) { run(items[static_cast<size_t>(i)]); });
}

uint8_t* scratch(int64_t bytes) {
  return reinterpret_cast<uint8_t*>(block_scratch(0, (bytes + 3) / 4));
}

}  // namespace

const char* attention_isa(Isa isa) {
  const attention::Kernels* best = kernels_of(isa);
  return best == nullptr ? nullptr : best->name;
}

bool attention_forward(const Problem& problem, const attention::Forward& to, const int64_t* bounds, int64_t rows,
                       int threads, Isa isa) {
  const attention::Kernels* best = kernels_of(isa);
  if (best == nullptr) return false;
  run_items(problem, bounds, rows, kQueries, threads,
            [&](const Item& item) { best->forward(problem, to, item, scratch(best->forward_bytes(problem, item))); });
  return true;
}

bool attention_backward(const Problem& problem, const attention::Backward& with, const int64_t* bounds, int64_t rows,
                        int threads, Isa isa) {
  const attention::Kernels* best = kernels_of(isa);
  if (best == nullptr) return false;
  run_items(problem, bounds, rows, 0, threads, [&](const Item& item) {
    best->backward(problem, with, item, scratch(best->backward_bytes(problem, item)));
  });
  return true;
}

}  // namespace gsf
