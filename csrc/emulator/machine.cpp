// Scheduling: blocks one after the other, their threads as fibers that run until they wait for each other.
#include "emulator/machine.h"

#include <cstdio>
#include <cstring>
#include <utility>

#include "emulator/state.h"

namespace emulator {
namespace {

std::string hex(const void* p) {
  char text[24];
  std::snprintf(text, sizeof text, "%p", p);
  return text;
}

std::string show(const Index3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

Machine::Machine() = default;
Machine::~Machine() = default;

void Machine::set_seed(uint64_t seed) {
  seed_ = seed;
}

void Machine::forget_buffers() {
  regions_.clear();
  error_.clear();
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

Index3 Machine::thread_index() const {
  return Index3(current_, 0, 0);
}
Index3 Machine::block_size() const {
  return Index3(count_);
}
int Machine::lane() const {
  return current_ % kWarp;
}

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

void Machine::sync_warp(int line) {
  arrive(kWarpBarrier, line);
}

const Deposit* Machine::exchange(int line, const void* mine, size_t bytes) {
  // Two sets of slots: a lane can be one exchange ahead of another that still reads, never two.
  Deposit* slots = warps_[current_ / kWarp].slots[threads_[current_]->exchanges++ % 2];
  memcpy(slots[lane()].bytes, mine, bytes);
  arrive(kExchange, line);
  return slots;
}

}  // namespace emulator
