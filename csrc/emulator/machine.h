// One emulated GPU: runs grids block by block, a block's threads as fibers, and checks what they do to memory.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

struct Index3 {
  unsigned x, y, z;
  Index3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// What one lane hands to the other lanes of its warp.
struct Deposit {
  char bytes[64];
};

// Thrown in the fiber that did wrong, caught at the fiber's root.
struct Fault {};

class Machine {
 public:
  Machine();
  ~Machine();

  // Between launches.
  void set_seed(uint64_t seed);
  void forget_buffers();
  void allow(const void* base, const int64_t* sizes, const int64_t* strides, int dims, int item_bytes, bool output);
  bool all_written(std::string* which) const;
  const std::string& error() const { return error_; }
  int64_t switches() const { return switches_; }
  bool launch(const char* name, Index3 grid, int threads, int shared_bytes, const std::function<void()>& body);

  // From inside a kernel.
  Index3 thread_index() const;
  Index3 block_index() const { return block_; }
  Index3 block_size() const;
  Index3 grid_size() const { return grid_; }
  int lane() const;
  char* shared();
  void read_global(const void* p, size_t bytes);
  void write_global(const void* p, size_t bytes);
  void read_shared(const void* p, size_t bytes);
  void write_shared(const void* p, size_t bytes);
  void sync_block(int line);
  void sync_warp(int line);
  const Deposit* exchange(int line, const void* mine, size_t bytes);
  void copy_async(void* to_shared, const void* from_global, int bytes);
  void copy_async_commit();
  void copy_async_wait(int newest_left);
  [[noreturn]] void fault(const std::string& what, const void* address = nullptr);

 private:
  struct Thread;
  struct Warp;
  struct Region;
  struct Cell;
  struct Copy;

  static void enter_fiber();
  void run_block(uint64_t order);
  void resume(int thread);
  void yield_until_released();
  void arrive(int kind, int line);
  Region* find(const void* p, size_t bytes, bool write, std::string* why);
  Cell* cells(const void* p, size_t bytes);
  void claim(Cell* cell, const void* p, bool pending);
  uint64_t random();

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<Region> regions_;
  std::vector<Cell> cells_;
  std::vector<char> arena_;
  const std::function<void()>* body_ = nullptr;
  std::string kernel_, error_;
  Index3 grid_, block_;
  jmp_buf scheduler_;
  int current_ = 0, count_ = 0, waiting_ = 0, finished_ = 0, shared_bytes_ = 0;
  uint32_t epoch_ = 0;
  uint64_t seed_ = 0, state_ = 1, launch_ = 0;
  int64_t switches_ = 0;
  bool failed_ = false;
};

Machine& machine();

}  // namespace emulator
