// Causal attention over packed rows: what its driver (cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

namespace gsf::attention {

// A bfloat16 tensor [tokens, heads, d] whose last axis has unit stride; strides count elements.
struct Tokens {
  const uint16_t* data;
  int64_t token_stride, head_stride;

  const uint16_t* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Problem {
  Tokens q, k, v;
  int64_t tokens, heads, kv_heads, d;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // keys that a query sees, itself included: from 1 to a little more than there are tokens

  int64_t group() const { return heads / kv_heads; }
};

// All outputs are contiguous and fully written.
struct Forward {
  uint16_t* out;  // [tokens, heads, d]
  float* lse;     // [heads, tokens], log sum exp of the scaled scores
};

struct Backward {
  Tokens out, dout;
  const float* lse;   // [heads, tokens]
  uint16_t* dq;       // [tokens, heads, d]
  uint16_t *dk, *dv;  // [tokens, kv_heads, d]
};

// A share of the work that no other one writes to: the queries [first, last) of the heads that share one key head, in
// the row of tokens [start, start + length).
struct Item {
  int64_t start, length, kv_head, first, last;
};

struct Kernels {
  const char* name;
  int64_t (*forward_bytes)(const Problem& problem, const Item& item);  // what `scratch` must hold
  void (*forward)(const Problem& problem, const Forward& to, const Item& item, uint8_t* scratch);
  int64_t (*backward_bytes)(const Problem& problem, const Item& item);
  void (*backward)(const Problem& problem, const Backward& with, const Item& item, uint8_t* scratch);
};

extern const Kernels kAmx;
extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512;

}  // namespace gsf::attention
