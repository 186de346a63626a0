// The fused language-model head on the CPU: what crosses between its files. No torch headers: raw pointers in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/matrix.h"

namespace gsf::head {

// The bf16 terms whose sum is exactly a value of the dtype: 24, 11 or 8 significand bits in pieces of 8.
constexpr int terms_of(DType dtype) {
  return dtype == DType::kFloat32 ? 3 : dtype == DType::kFloat16 ? 2 : 1;
}

// Tokens and words are taken 32 at a time: two tiles of 16 on either side.
constexpr int64_t kTile = 16, kPair = 32, kTileBytes = 1024, kMaxTerms = 3;

struct Problem {
  Matrix h, weight, p;        // [live tokens through `index`, d] [vocabulary, d] [vocabulary, ranks] or no data
  const Matrix* r = nullptr;  // [directions] of [vocabulary, d]
  int64_t directions = 0;
  const int64_t* index = nullptr;       // [tokens] the rows of h that have a loss
  const int64_t* labels = nullptr;      // [tokens] their labels
  const float* token_weight = nullptr;  // [tokens] or null: 1
  int64_t tokens = 0;
  float scale = 1, softcap = 0;  // softcap 0: none
  float* loss = nullptr;         // [rows of h], zero where no token points
  float* dh = nullptr;           // [rows of h, d]
  float* pulled = nullptr;       // [rows of h, ranks]
  float* dot = nullptr;          // [rows of h, directions]
  bool exact = true;             // false: 16-bit inputs take the first bf16 term of P alone, in products with W and p
  int threads = 1;
};

// How the work is cut: a function of the problem alone, never of the threads, so that the bits are the same.
struct Plan {
  int64_t k_steps, rank_pairs, column_pairs;  // d in 32s, ranks in 32s, their sum
  int64_t pairs, group_pairs, groups;         // tokens in 32s; groups of them that share packed words
  int64_t words_per_chunk, chunks;            // the vocabulary, cut for the threads
  int64_t steps_per_block;                    // words in 32s whose rows are packed at once, for the first product
  int64_t steps_per_window;                   // words in 32s whose P is kept until the second product; whole blocks
  int64_t slice_pairs;                        // columns in 32s that are packed at once, for the second product
  int terms_h, terms_w, terms_p, terms_r;
  bool half_rank_pair;  // the last 32 ranks are 16 or fewer
  bool every_term;      // leave no term of the shares out
  int most_terms;       // of P in the second products: 3, or 1 where it may be rounded
};

// Partial sums of every chunk, [chunks, pairs, ...]; acc holds tiles of 16 columns by 16 tokens.
struct Partial {
  float* acc;   // [chunks, pairs, column_pairs, 2 columns, 2 tokens, 16, 16]
  float* top;   // [chunks, pairs, 32] the logit that the exponentials are relative to
  double* sum;  // [chunks, pairs, 32] sum over every word but the label of exp(z - top)
  double* dot;  // [chunks, pairs, directions, 32]
};

template <typename T>
struct Free {
  void operator()(T* x) const { std::free(x); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free<T>>;

// Memory on cache-line boundaries, not filled.
template <typename T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// What is compiled once for each instruction set, in {amx,bf16,avx512}_item.cpp.
struct Kernel {
  void (*pack_h)(const Problem& problem, const Plan& plan, int64_t pair, uint8_t* packed);
  int64_t (*scratch_bytes)(const Problem& problem, const Plan& plan);
  void (*begin_thread)();
  void (*end_thread)();
  void (*run_item)(const Problem& problem, const Plan& plan, const uint8_t* packed_h, const Partial& out, int64_t group,
                   int64_t chunk, uint8_t* scratch);
};
extern const Kernel kAmxKernel, kBf16Kernel, kAvx512Kernel;

// finish.cpp
void finish_pair(const Problem& problem, const Plan& plan, const Partial& in, int64_t pair);

// The instruction sets that this CPU and its system offer; each includes the ones before.
enum class Level : int { kNone = 0, kAvx512 = 1, kBf16 = 2, kAmx = 3 };

// head.cpp
Level level();
Plan make_plan(const Problem& problem);
void run(const Problem& problem, Level upto);

}  // namespace gsf::head
