// Memory: who may read and write what, and when.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "emulator/machine.h"
#include "emulator/state.h"

namespace emulator {

void Machine::allow(const void* base, const int64_t* sizes, const int64_t* strides, int dims, int item_bytes,
                    bool output) {
  int64_t count = 1, last = 0;
  for (int d = 0; d < dims; ++d) {
    count *= sizes[d];
    last += (sizes[d] - 1) * strides[d];
  }
  if (count <= 0) return;
  static_assert(kForbidden == 0, "what is not marked is forbidden");
  const size_t units = static_cast<size_t>(last + 1) * item_bytes / kUnit;
  Region region{static_cast<const char*>(base), {static_cast<uint8_t*>(std::calloc(units, 1)), std::free}, units, {}};
  if (region.access == nullptr) throw std::bad_alloc();
  region.writer.assign(output ? units : 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, at = 0;
    for (int d = dims - 1; d >= 0; --d) {
      at += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    std::fill_n(region.access.get() + at * item_bytes / kUnit, item_bytes / kUnit, output ? kUnwritten : kReadable);
    if (output) memset(static_cast<char*>(const_cast<void*>(base)) + at * item_bytes, 0xff, item_bytes);  // a NaN
  }
  regions_.push_back(std::move(region));
}

bool Machine::all_written(std::string* which) const {
  for (size_t r = 0; r < regions_.size(); ++r) {
    if (regions_[r].writer.empty()) continue;
    const uint8_t *access = regions_[r].access.get(), *end = access + regions_[r].units;
    const uint8_t* hole = std::find(access, end, static_cast<uint8_t>(kUnwritten));
    if (hole == end) continue;
    *which = "buffer " + std::to_string(r) + " was not written at byte " +
             std::to_string((hole - access) * static_cast<long>(kUnit));
    return false;
  }
  return true;
}

Machine::Region* Machine::find(const void* p, size_t bytes, bool write, std::string* why) {
  *why = "outside every buffer";
  if (reinterpret_cast<uintptr_t>(p) % (bytes & -bytes)) {
    *why = "not aligned to its " + std::to_string(bytes & -bytes) + " bytes";
    return nullptr;
  }
  for (Region& region : regions_) {
    const auto at = static_cast<const char*>(p) - region.base;
    if (at < 0 || (at + bytes) / kUnit > region.units) continue;
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

void Machine::copy_async_commit() {
  ++threads_[current_]->groups;
}

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
