// The right factor of a product, packed for the kernels that run.
#pragma once

#include "common/kernels.h"
#include "common/memory.h"

namespace gsf {

// Whether a product with x as its left factor is worth the matrix unit's form of B: bfloat16 rows, enough of them.
bool wants_split(const Kernels& run, const Matrix& x);

// B [depth, cols] in `store`, which must outlive the result. With `try_split` in the matrix unit's form where that is
// exact, else as float32 panels.
Packed pack(const Kernels& run, const Matrix& b, bool try_split, int threads, Buffer& store);

// Threads worth waking for so many multiply-adds.
int useful_threads(int threads, int64_t multiply_adds);

// Tokens of one task of a product: whole register blocks, and the same whatever the number of threads.
int64_t task_rows(const Kernels& run, const Packed& b, int64_t tokens);

}  // namespace gsf
