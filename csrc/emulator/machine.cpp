#include "emulator/machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;
// State is kept for two bytes at a time: the smallest element of any op.
constexpr size_t kUnit = 2;

enum Kind { kNothing, kBlockBarrier, kWarpBarrier, kExchange };
enum Access : uint8_t { kForbidden, kReadable, kUnwritten, kWritten };
enum Content : uint8_t { kGarbage, kPending, kReady };
constexpr int kNobody = -1, kSeveral = -2, kWarpOf = -3;

std::string hex(const void* p) {
  char text[24];
  std::snprintf(text, sizeof text, "%p", p);
  return text;
}

std::string show(const Index3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

struct Machine::Copy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};

struct Machine::Thread {
  ucontext_t context;
  jmp_buf resume_at;
  std::vector<char> stack = std::vector<char>(kStack);
  std::vector<Copy> copies;
  int64_t groups = 0;
  uint32_t exchanges = 0;
  int waits_for = kNothing, line = 0;
  bool started = false, finished = false;
};

struct Machine::Warp {
  Deposit slots[2][kWarp];
  int size = 0, arrived = 0, kind = kNothing, line = 0;
  uint32_t epoch = 0;
};

// A buffer that kernels may touch: only the elements of the view, not what lies between its rows.
struct Machine::Region {
  const char* base;
  std::vector<uint8_t> access;
  std::vector<uint64_t> writer;  // launch, block and thread of the last write
};

// Two bytes of shared memory: who wrote and who read them last, and in which barrier interval.
struct Machine::Cell {
  uint8_t content = kGarbage;
  int writer = kNobody, reader = kNobody;
  uint32_t writer_epoch = 0, writer_warp_epoch = 0, reader_epoch = 0, reader_warp_epoch = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

Machine::Machine() = default;
Machine::~Machine() = default;

void Machine::set_seed(uint64_t seed) { seed_ = seed; }

void Machine::forget_buffers() {
  regions_.clear();
  error_.clear();
}

void Machine::allow(const void* base, const int64_t* sizes, const int64_t* strides, int dims, int item_bytes,
                    bool output) {
  int64_t count = 1, last = 0;
  for (int d = 0; d < dims; ++d) {
    count *= sizes[d];
    last += (sizes[d] - 1) * strides[d];
  }
  if (count <= 0) return;
  Region region{static_cast<const char*>(base), {}, {}};
  const size_t units = static_cast<size_t>(last + 1) * item_bytes / kUnit;
  region.access.assign(units, kForbidden);
  region.writer.assign(output ? units : 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, at = 0;
    for (int d = dims - 1; d >= 0; --d) {
      at += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    std::fill_n(region.access.begin() + at * item_bytes / kUnit, item_bytes / kUnit, output ? kUnwritten : kReadable);
    if (output) memset(static_cast<char*>(const_cast<void*>(base)) + at * item_bytes, 0xff, item_bytes);  // a NaN
  }
  regions_.push_back(std::move(region));
}

bool Machine::all_written(std::string* which) const {
  for (size_t r = 0; r < regions_.size(); ++r) {
    const auto& access = regions_[r].access;
    const auto hole = std::find(access.begin(), access.end(), static_cast<uint8_t>(kUnwritten));
    if (hole == access.end()) continue;
    *which = "buffer " + std::to_string(r) + " was not written at byte " +
             std::to_string((hole - access.begin()) * static_cast<long>(kUnit));
    return false;
  }
  return true;
}

uint64_t Machine::random() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

bool Machine::launch(const char* name, Index3 grid, int threads, int shared_bytes, const std::function<void()>& body) {
  if (!error_.empty()) return false;
  kernel_ = name;
  grid_ = grid;
  count_ = threads;
  shared_bytes_ = shared_bytes;
  body_ = &body;
  failed_ = false;
  ++launch_;
  state_ = seed_ * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  while (static_cast<int>(threads_.size()) < threads) threads_.push_back(std::make_unique<Thread>());
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (seed_)
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  for (uint64_t i = 0; i < blocks && !failed_; ++i) run_block(order[i]);
  return !failed_;
}

void Machine::run_block(uint64_t order) {
  block_ = Index3(order % grid_.x, order / grid_.x % grid_.y, order / grid_.x / grid_.y);
  arena_.assign(shared_bytes_ + 16, '\xff');
  cells_.assign(shared_bytes_ / kUnit, Cell());
  warps_.assign((count_ + kWarp - 1) / kWarp, Warp());
  epoch_ = 0;
  waiting_ = finished_ = 0;
  for (int t = 0; t < count_; ++t) {
    Thread& thread = *threads_[t];
    thread.copies.clear();
    thread.groups = thread.exchanges = 0;
    thread.waits_for = kNothing;
    thread.started = thread.finished = false;
    ++warps_[t / kWarp].size;
  }
  std::vector<int> turn(count_);
  for (int t = 0; t < count_; ++t) turn[t] = t;
  while (finished_ < count_ && !failed_) {
    bool moved = false;
    if (seed_)
      for (int i = count_; i > 1; --i) std::swap(turn[i - 1], turn[random() % i]);
    for (int i = 0; i < count_ && !failed_; ++i) {
      const Thread& thread = *threads_[turn[i]];
      if (thread.finished || thread.waits_for != kNothing) continue;
      moved = true;
      resume(turn[i]);
    }
    if (moved || failed_) continue;
    std::string who;
    for (int t = 0; t < count_ && who.size() < 200; ++t) {
      if (threads_[t]->waits_for == kNothing) continue;
      who += " thread " + std::to_string(t) + " waits at line " + std::to_string(threads_[t]->line) + ";";
    }
    error_ = kernel_ + ": block " + show(block_) + ": barrier divergence: " + std::to_string(finished_) + " of " +
             std::to_string(count_) + " threads have ended;" + who;
    failed_ = true;
  }
}

void Machine::resume(int thread) {
  current_ = thread;
  ++switches_;
  if (_setjmp(scheduler_)) return;
  Thread& next = *threads_[thread];
  if (next.started) _longjmp(next.resume_at, 1);
  next.started = true;
  getcontext(&next.context);
  next.context.uc_stack.ss_sp = next.stack.data();
  next.context.uc_stack.ss_size = next.stack.size();
  next.context.uc_link = nullptr;
  makecontext(&next.context, &Machine::enter_fiber, 0);
  setcontext(&next.context);
}

void Machine::enter_fiber() {
  Machine& m = machine();
  try {
    (*m.body_)();
    if (!m.threads_[m.current_]->copies.empty()) m.fault("ends with asynchronous copies that nobody waited for");
  } catch (const Fault&) {
    m.failed_ = true;
  }
  m.threads_[m.current_]->finished = true;
  ++m.finished_;
  _longjmp(m.scheduler_, 1);
}

void Machine::yield_until_released() {
  if (!_setjmp(threads_[current_]->resume_at)) _longjmp(scheduler_, 1);
}

void Machine::fault(const std::string& what, const void* address) {
  error_ = kernel_ + ": block " + show(block_) + ", thread " + std::to_string(current_) + ": " + what;
  if (address) error_ += ", address " + hex(address);
  throw Fault();
}

Index3 Machine::thread_index() const { return Index3(current_, 0, 0); }
Index3 Machine::block_size() const { return Index3(count_); }
int Machine::lane() const { return current_ % kWarp; }

char* Machine::shared() {
  const auto start = reinterpret_cast<uintptr_t>(arena_.data());
  return arena_.data() + ((start + 15) / 16 * 16 - start);
}

void Machine::sync_block(int line) {
  Thread& me = *threads_[current_];
  me.line = line;
  if (waiting_++) {
    for (int t = 0; t < count_; ++t)
      if (threads_[t]->waits_for == kBlockBarrier && threads_[t]->line != line)
        fault("barrier divergence: at the barrier of line " + std::to_string(line) + ", thread " + std::to_string(t) +
              " at that of line " + std::to_string(threads_[t]->line));
  }
  if (waiting_ < count_) {
    me.waits_for = kBlockBarrier;
    return yield_until_released();
  }
  waiting_ = 0;
  ++epoch_;
  for (int t = 0; t < count_; ++t) threads_[t]->waits_for = kNothing;
}

void Machine::arrive(int kind, int line) {
  Thread& me = *threads_[current_];
  Warp& warp = warps_[current_ / kWarp];
  me.line = line;
  if (warp.arrived && (warp.kind != kind || warp.line != line))
    fault("warp divergence: at line " + std::to_string(line) + ", other lanes at line " + std::to_string(warp.line));
  warp.kind = kind;
  warp.line = line;
  if (++warp.arrived < warp.size) {
    me.waits_for = kind;
    return yield_until_released();
  }
  warp.arrived = 0;
  if (kind == kWarpBarrier) ++warp.epoch;
  const int first = current_ / kWarp * kWarp;
  for (int t = first; t < first + warp.size; ++t) threads_[t]->waits_for = kNothing;
}

void Machine::sync_warp(int line) { arrive(kWarpBarrier, line); }

const Deposit* Machine::exchange(int line, const void* mine, size_t bytes) {
  // Two sets of slots: a lane can be one exchange ahead of another that still reads, never two.
  Deposit* slots = warps_[current_ / kWarp].slots[threads_[current_]->exchanges++ % 2];
  memcpy(slots[lane()].bytes, mine, bytes);
  arrive(kExchange, line);
  return slots;
}

Machine::Region* Machine::find(const void* p, size_t bytes, bool write, std::string* why) {
  *why = "outside every buffer";
  if (reinterpret_cast<uintptr_t>(p) % (bytes & -bytes)) {
    *why = "not aligned to its " + std::to_string(bytes & -bytes) + " bytes";
    return nullptr;
  }
  for (Region& region : regions_) {
    const auto at = static_cast<const char*>(p) - region.base;
    if (at < 0 || (at + bytes) / kUnit > region.access.size()) continue;
    bool good = true;
    for (size_t i = at / kUnit; i < (at + bytes) / kUnit; ++i) {
      const uint8_t access = region.access[i];
      if (access != kForbidden && (write ? access >= kUnwritten : access != kUnwritten)) continue;
      if (access != kForbidden) *why = write ? "in a read-only buffer" : "never written";
      good = false;
    }
    if (good) return &region;
  }
  return nullptr;
}

void Machine::read_global(const void* p, size_t bytes) {
  std::string why;
  Region* region = find(p, bytes, false, &why);
  if (!region) fault("reads " + std::to_string(bytes) + " bytes of global memory " + why, p);
  if (region->writer.empty()) return;
  const uint64_t block = block_.x + grid_.x * (block_.y + static_cast<uint64_t>(grid_.y) * block_.z);
  const uint64_t me = (launch_ << 40) + (block << 11) + current_ + 1;
  const auto at = (static_cast<const char*>(p) - region->base) / kUnit;
  if (region->writer[at] >> 40 == launch_ && region->writer[at] != me)
    fault("reads global memory that another thread of this launch wrote", p);
}

void Machine::write_global(const void* p, size_t bytes) {
  std::string why;
  Region* region = find(p, bytes, true, &why);
  if (!region) fault("writes " + std::to_string(bytes) + " bytes of global memory " + why, p);
  const uint64_t block = block_.x + grid_.x * (block_.y + static_cast<uint64_t>(grid_.y) * block_.z);
  const uint64_t me = (launch_ << 40) + (block << 11) + current_ + 1;
  const auto at = (static_cast<const char*>(p) - region->base) / kUnit;
  for (size_t i = at; i < at + bytes / kUnit; ++i) {
    if (region->writer[i] >> 40 == launch_ && region->writer[i] != me)
      fault("writes global memory that another thread of this launch wrote", p);
    region->writer[i] = me;
    region->access[i] = kWritten;
  }
}

Machine::Cell* Machine::cells(const void* p, size_t bytes) {
  const auto at = static_cast<const char*>(p) - shared();
  if (at < 0 || at + static_cast<int64_t>(bytes) > shared_bytes_)
    fault("touches shared memory outside its " + std::to_string(shared_bytes_) + " bytes", p);
  if (reinterpret_cast<uintptr_t>(p) % (bytes & -bytes)) fault("touches shared memory that is not aligned", p);
  return &cells_[at / kUnit];
}

void Machine::read_shared(const void* p, size_t bytes) {
  Cell* cell = cells(p, bytes);
  const uint32_t warp_epoch = warps_[current_ / kWarp].epoch;
  for (size_t i = 0; i < bytes / kUnit; ++i, ++cell) {
    if (cell->content == kPending) fault("reads shared memory before its asynchronous copy was waited for", p);
    if (cell->content == kGarbage) fault("reads shared memory that was never written", p);
    const bool same_warp = cell->writer / kWarp == current_ / kWarp;
    if (cell->writer != current_ && cell->writer_epoch == epoch_ &&
        !(same_warp && cell->writer_warp_epoch < warp_epoch))
      fault("reads shared memory that thread " + std::to_string(cell->writer) + " wrote, with no barrier between", p);
    if (cell->reader == kNobody || cell->reader_epoch < epoch_) {
      cell->reader = current_;
    } else if (cell->reader != current_) {
      const int theirs = cell->reader <= kWarpOf ? kWarpOf - cell->reader : cell->reader / kWarp;
      cell->reader = cell->reader != kSeveral && theirs == current_ / kWarp ? kWarpOf - theirs : kSeveral;
    }
    cell->reader_epoch = epoch_;
    cell->reader_warp_epoch = warp_epoch;
  }
}

void Machine::claim(Cell* cell, const void* p, bool pending) {
  const Warp& warp = warps_[current_ / kWarp];
  const int my_warp = current_ / kWarp;
  if (cell->content == kPending) fault("writes shared memory where an asynchronous copy is under way", p);
  if (cell->writer != kNobody && cell->writer != current_ && cell->writer_epoch == epoch_ &&
      !(cell->writer / kWarp == my_warp && cell->writer_warp_epoch < warp.epoch))
    fault("writes shared memory that thread " + std::to_string(cell->writer) + " wrote, with no barrier between", p);
  if (cell->reader != kNobody && cell->reader != current_ && cell->reader_epoch == epoch_) {
    const int theirs = cell->reader <= kWarpOf ? kWarpOf - cell->reader : cell->reader / kWarp;
    if (cell->reader == kSeveral || theirs != my_warp || cell->reader_warp_epoch >= warp.epoch)
      fault("writes shared memory that another thread reads, with no barrier between", p);
  }
  cell->content = pending ? kPending : kReady;
  cell->writer = current_;
  cell->reader = kNobody;
  cell->writer_epoch = epoch_;
  cell->writer_warp_epoch = warp.epoch;
}

void Machine::write_shared(const void* p, size_t bytes) {
  Cell* cell = cells(p, bytes);
  for (size_t i = 0; i < bytes / kUnit; ++i) claim(cell + i, p, false);
}

void Machine::copy_async(void* to_shared, const void* from_global, int bytes) {
  if (bytes < 0 || bytes > 16) fault("copies " + std::to_string(bytes) + " bytes of 16", from_global);
  if (reinterpret_cast<uintptr_t>(from_global) % 16) fault("copies from an address not aligned to 16", from_global);
  for (int i = 0; i < bytes; i += kUnit) read_global(static_cast<const char*>(from_global) + i, kUnit);
  Cell* cell = cells(to_shared, 16);
  for (size_t i = 0; i < 16 / kUnit; ++i) claim(cell + i, to_shared, true);
  memset(to_shared, 0xff, 16);
  Thread& me = *threads_[current_];
  me.copies.push_back({to_shared, from_global, bytes, me.groups});
}

void Machine::copy_async_commit() { ++threads_[current_]->groups; }

void Machine::copy_async_wait(int newest_left) {
  Thread& me = *threads_[current_];
  const auto is_left = [&](const Copy& copy) { return copy.group >= me.groups - newest_left; };
  for (const Copy& copy : me.copies) {
    if (is_left(copy)) continue;
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.bytes);
    Cell* cell = cells(copy.to, 16);
    for (size_t i = 0; i < 16 / kUnit; ++i) {
      cell[i].content = kReady;
      cell[i].writer_epoch = epoch_;
      cell[i].writer_warp_epoch = warps_[current_ / kWarp].epoch;
    }
  }
  me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), [&](const Copy& c) { return !is_left(c); }),
                  me.copies.end());
}

}  // namespace emulator
