// The matrix unit's configuration.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gsf::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles' configuration for the time of a call. What was configured before is configured again at the end: other
// libraries on this thread remember what they set.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    const TileConfig mine;
    // the compiler counts on eight bytes of a configuration being read or written, not on all of it
    asm volatile("" : : "r"(&mine), "r"(&before_) : "memory");
    _tile_loadconfig(&mine);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

}  // namespace gsf::amx
