// The right factor of a product, packed for the kernels that run.
#pragma once

#include "common/kernels.h"
#include "common/memory.h"

namespace gsf {

// Whether the product of x with a matrix of `cols` columns is worth the matrix unit's form of both.
bool wants_split(const Kernels& run, const Matrix& x, int64_t cols);

// B [depth, cols] in `store`, which must outlive the result. With `try_split` in the matrix unit's form where that is
// exact, else as float32 panels.
Packed pack(const Kernels& run, const Matrix& b, bool try_split, int threads, Buffer& store);

// Threads worth waking for so many multiply-adds: one, or all.
int useful_threads(int threads, int64_t multiply_adds);

// Tokens of one task of a product: whole register blocks, and the same whatever the number of threads.
int64_t task_rows(const Kernels& run, const Packed& b, int64_t tokens);

}  // namespace gsf
