// Products of up to 32 rows with a panel on the matrix unit.
//
// Tiles  0 and 1: the sums of 16 rows each; 4 to 6: the parts of a step of the panel, used for all rows; 7: rows
// Sums   A product adds 32 of k in float32 before it adds to a sum, so that kSteps steps are rounding chains of
//        16 + 3 kSteps (narrow) or 16 + 6 kSteps (wide), fewer than the float32 product allows.
#pragma once

#include "common/amx_left.h"

namespace gsf::amx {

// Where tiles find 16 rows: strides in numbers, from a row to the next and from a part to the next.
struct Rows {
  const uint16_t* data;
  int64_t row, part;
};

// A part of the rows times the first `parts` parts of the panel. Tiles are named by literals: hence a macro.
#define GSF_ROWS_TIMES(sums, from, bytes, parts) \
  do {                                           \
    _tile_loadd(7, from, bytes);                 \
    _tile_dpbf16ps(sums, 7, 4);                  \
    if ((parts) > 1) _tile_dpbf16ps(sums, 7, 5); \
    if ((parts) > 2) _tile_dpbf16ps(sums, 7, 6); \
  } while (false)

#define GSF_STEP_OF(sums, x)                                                                    \
  do {                                                                                          \
    const uint16_t* from = (x).data + s * kStep;                                                \
    GSF_ROWS_TIMES(sums, from, 2 * (x).row, kRight);                                            \
    if (kLeft > 1) GSF_ROWS_TIMES(sums, from + (x).part, 2 * (x).row, kRight < 2 ? kRight : 2); \
    if (kLeft > 2) GSF_ROWS_TIMES(sums, from + 2 * (x).part, 2 * (x).row, 1);                   \
  } while (false)

// acc [tiles][16][16] = the rows of x times a panel over `steps` steps, where kLeft and kRight count their parts and
// terms of three parts are left out with those that are smaller; beside(s) is what else there is to do meanwhile.
template <int kLeft, int kRight, typename Beside>
inline void multiply(const Rows* x, int64_t tiles, const uint16_t* right, int64_t steps, float* acc, Beside&& beside) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t* part = right + s * kRight * kTileHalves;
    _tile_loadd(4, part, 64);
    if (kRight > 1) _tile_loadd(5, part + kTileHalves, 64);
    if (kRight > 2) _tile_loadd(6, part + 2 * kTileHalves, 64);
    GSF_STEP_OF(0, x[0]);
    if (tiles > 1) GSF_STEP_OF(1, x[1]);
    beside(s);
  }
  _tile_stored(0, acc, 64);
  if (tiles > 1) _tile_stored(1, acc + 256, 64);
}

#undef GSF_STEP_OF
#undef GSF_ROWS_TIMES

}  // namespace gsf::amx
