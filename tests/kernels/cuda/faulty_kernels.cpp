// Kernels of a few lines, most of them wrong in one way each: what the emulator must catch, and what it must let pass.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/reduce.cuh"

namespace {

using namespace gradshield;

struct Buffers {
  const float* in;  // [2, 40] of which columns 0 .. 31 may be read, rows 48 apart
  float* out;       // [64]
};

constexpr int kStride = 48;

int thread() {
  return static_cast<int>(threadIdx.x);
}
float* shared() {
  return reinterpret_cast<float*>(dynamic_shared());
}

void neighbour_with_barrier(Buffers b) {
  store_shared(shared() + thread(), load_global(b.in + thread() % 32));
  sync_block();
  store_global(b.out + thread(), load_shared(shared() + (thread() + 33) % 64));
}

void neighbour_without_barrier(Buffers b) {
  store_shared(shared() + thread(), load_global(b.in + thread() % 32));
  store_global(b.out + thread(), load_shared(shared() + (thread() + 33) % 64));
}

void lane_with_warp_barrier(Buffers b) {
  store_shared(shared() + thread(), load_global(b.in + thread() % 32));
  sync_warp();
  store_global(b.out + thread(), load_shared(shared() + (thread() ^ 1)));
}

void lane_without_warp_barrier(Buffers b) {
  store_shared(shared() + thread(), load_global(b.in + thread() % 32));
  store_global(b.out + thread(), load_shared(shared() + (thread() ^ 1)));
}

void warp_barrier_is_not_enough(Buffers b) {
  store_shared(shared() + thread(), load_global(b.in + thread() % 32));
  sync_warp();
  store_global(b.out + thread(), load_shared(shared() + (thread() ^ 32)));
}

// The second round overwrites what the first round's readers may still need.
void second_round_too_early(Buffers b) {
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    store_shared(shared() + thread(), load_global(b.in + thread() % 32 + round * kStride));
    sync_block();
    sum += load_shared(shared() + (thread() ^ 32));
  }
  store_global(b.out + thread(), sum);
}

void copy_with_wait(Buffers b) {
  copy_async_16(shared() + 4 * thread(), b.in + thread() % 8 * 4, 12);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  store_global(b.out + thread(),
               load_shared(shared() + (4 * thread() + 4) % 256) + load_shared(shared() + (4 * thread() + 7) % 256));
}

void copy_without_wait(Buffers b) {
  copy_async_16(shared() + 4 * thread(), b.in + thread() % 8 * 4, 16);
  copy_async_commit();
  sync_block();
  store_global(b.out + thread(), load_shared(shared() + 4 * thread()));
  copy_async_wait<0>();
}

void copy_waited_for_too_little(Buffers b) {
  for (int i = 0; i < 2; ++i) {
    copy_async_16(shared() + 4 * thread() + 256 * i, b.in + thread() % 8 * 4, 16);
    copy_async_commit();
  }
  copy_async_wait<1>();
  store_global(b.out + thread(), load_shared(shared() + 256 + 4 * thread()));
  copy_async_wait<0>();
}

void copy_without_barrier(Buffers b) {
  copy_async_16(shared() + 4 * thread(), b.in + thread() % 8 * 4, 16);
  copy_async_commit();
  copy_async_wait<0>();
  store_global(b.out + thread(), load_shared(shared() + (4 * thread() + 4) % 256));
}

void copy_never_waited_for(Buffers b) {
  copy_async_16(shared() + 4 * thread(), b.in + thread() % 8 * 4, 16);
  copy_async_commit();
  store_global(b.out + thread(), 0.0f);
}

void copy_from_an_odd_address(Buffers b) {
  copy_async_16(shared() + 4 * thread(), b.in + 1, 16);
  copy_async_wait<0>();
}

void reads_past_the_buffer(Buffers b) {
  store_global(b.out + thread(), load_global(b.in + kStride + thread()));
}
void reads_between_rows(Buffers b) {
  store_global(b.out + thread(), load_global(b.in + thread() % 33));
}
void writes_past_the_buffer(Buffers b) {
  store_global(b.out + thread() + 1, 0.0f);
}
void writes_an_input(Buffers b) {
  store_global(const_cast<float*>(b.in), 0.0f);
}
void reads_an_unwritten_output(Buffers b) {
  store_global(b.out + thread(), load_global(b.out + (thread() ^ 1)));
}
void leaves_an_output(Buffers b) {
  if (thread()) store_global(b.out + thread(), 0.0f);
}
void two_threads_write_one_place(Buffers b) {
  store_global(b.out + thread() / 2, 0.0f);
}

void reads_unwritten_shared(Buffers b) {
  if (thread() < 63) store_shared(shared() + thread(), 1.0f);
  sync_block();
  store_global(b.out + thread(), load_shared(shared() + thread()));
}

void reads_past_shared(Buffers b) {
  store_global(b.out + thread(), load_shared(shared() + 512 + thread()));
}

void some_skip_the_barrier(Buffers b) {
  if (thread() < 40) sync_block();
  store_global(b.out + thread(), 0.0f);
}

void two_barriers(Buffers b) {
  if (thread() < 32) {
    sync_block();
  } else {
    sync_block();
  }
  store_global(b.out + thread(), 0.0f);
}

void lanes_diverge(Buffers b) {
  float x = 1.0f;
  if (thread() % 2) {
    x = shuffle_xor(x, 2);
  } else {
    x = shuffle_xor(x, 2);
  }
  store_global(b.out + thread(), x);
}

void sums_a_warp(Buffers b) {
  store_global(b.out + thread(), warp_sum(load_global(b.in + thread() % 32)));
}

const std::map<std::string, void (*)(Buffers)> kKernels = {
#define KERNEL(name) {#name, name}
    KERNEL(neighbour_with_barrier),
    KERNEL(neighbour_without_barrier),
    KERNEL(lane_with_warp_barrier),
    KERNEL(lane_without_warp_barrier),
    KERNEL(warp_barrier_is_not_enough),
    KERNEL(second_round_too_early),
    KERNEL(copy_with_wait),
    KERNEL(copy_without_wait),
    KERNEL(copy_waited_for_too_little),
    KERNEL(copy_without_barrier),
    KERNEL(copy_never_waited_for),
    KERNEL(copy_from_an_odd_address),
    KERNEL(reads_past_the_buffer),
    KERNEL(reads_between_rows),
    KERNEL(writes_past_the_buffer),
    KERNEL(writes_an_input),
    KERNEL(reads_an_unwritten_output),
    KERNEL(leaves_an_output),
    KERNEL(two_threads_write_one_place),
    KERNEL(reads_unwritten_shared),
    KERNEL(reads_past_shared),
    KERNEL(some_skip_the_barrier),
    KERNEL(two_barriers),
    KERNEL(lanes_diverge),
    KERNEL(sums_a_warp),
#undef KERNEL
};

// Runs one of the kernels with 64 threads; the result, or what the emulator found.
std::pair<std::string, std::vector<float>> run_kernel(const std::string& name, uint64_t seed) {
  // one piece of memory with gaps, so that a step beyond one buffer does not land in the other
  alignas(16) static float memory[5 * 128];
  float *in = memory + 128, *out = memory + 3 * 128;
  for (int i = 0; i < 2 * kStride; ++i) in[i] = static_cast<float>(i);
  auto& machine = emulator::machine();
  machine.forget_buffers();
  machine.set_seed(seed);
  const int64_t in_sizes[] = {2, 32}, in_strides[] = {kStride, 1}, out_sizes[] = {64}, out_strides[] = {1};
  machine.allow(in, in_sizes, in_strides, 2, 4, false);
  machine.allow(out, out_sizes, out_strides, 1, 4, true);
  std::string problem;
  launch(name.c_str(), kKernels.at(name), dim3(1), 64, 2048, nullptr, Buffers{in, out});
  if (machine.error().empty()) machine.all_written(&problem);
  return {machine.error().empty() ? problem : machine.error(), std::vector<float>(out, out + 64)};
}

struct Matrices {
  const uint16_t *a, *b;  // [16, 16] and [8, 16], bfloat16 or float16 bits
  const float* c;         // [16, 8]
  float* out;             // [16, 8]
};

template <bool kBfloat>
void multiplies_matrices(Matrices m) {
  uint16_t* a = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* b = a + 256;
  for (int i = thread(); i < 384; i += 32)
    store_shared(a + i, i < 256 ? load_global(m.a + i) : load_global(m.b + i - 256));
  sync_warp();
  const int lane = thread();
  uint32_t x[4], y[4];
  float c[4];
  load_matrices(x, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(y, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  for (int i = 0; i < 4; ++i) c[i] = load_global(m.c + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2);
  multiply_16x8x16<kBfloat>(c, x, {y[0], y[1]}, false);
  for (int i = 0; i < 4; ++i) store_global(m.out + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, c[i]);
}

std::vector<float> multiply(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, const std::vector<float>& c,
                            bool bfloat) {
  std::vector<float> out(128);
  auto& machine = emulator::machine();
  machine.forget_buffers();
  const int64_t one = 1, n_a = 256, n_b = 128;
  machine.allow(a.data(), &n_a, &one, 1, 2, false);
  machine.allow(b.data(), &n_b, &one, 1, 2, false);
  machine.allow(c.data(), &n_b, &one, 1, 4, false);
  machine.allow(out.data(), &n_b, &one, 1, 4, true);
  launch("multiply", bfloat ? multiplies_matrices<true> : multiplies_matrices<false>, dim3(1), 32, 1024, nullptr,
         Matrices{a.data(), b.data(), c.data(), out.data()});
  if (!machine.error().empty()) throw std::runtime_error(machine.error());
  return out;
}

}  // namespace

PYBIND11_MODULE(GRADSHIELD_MODULE, m) {
  m.def("run", &run_kernel);
  m.def("multiply", &multiply);
  m.def("split", [](float x) {
    uint32_t terms[3];
    split_pair(x, 1.0f, terms);
    return std::vector<uint32_t>{terms[0] & 0xffff, terms[1] & 0xffff, terms[2] & 0xffff};
  });
}
