// What the emulated GPU keeps of threads, warps and memory.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator/machine.h"

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;
// State is kept for two bytes at a time: the smallest element of any op.
constexpr size_t kUnit = 2;

enum Kind { kNothing, kBlockBarrier, kWarpBarrier, kExchange };
enum Access : uint8_t { kForbidden, kReadable, kUnwritten, kWritten };
enum Content : uint8_t { kGarbage, kPending, kReady };
constexpr int kNobody = -1, kSeveral = -2, kWarpOf = -3;

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
  std::unique_ptr<uint8_t[], void (*)(void*)> access;  // by unit; zeros that no one touches take no memory
  size_t units;
  std::vector<uint64_t> writer;  // launch, block and thread of the last write
};

// Two bytes of shared memory: who wrote and who read them last, and in which barrier interval.
struct Machine::Cell {
  uint8_t content = kGarbage;
  int writer = kNobody, reader = kNobody;
  uint32_t writer_epoch = 0, writer_warp_epoch = 0, reader_epoch = 0, reader_warp_epoch = 0;
};

}  // namespace emulator
