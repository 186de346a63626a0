// What the halves of ghost_dot_lowrank ask of their caller; kernels and costs are in ghost_dot_lowrank.cuh.
#pragma once

#include "common/runtime.h"

namespace gradshield {

struct ProjectParams {
  const void* x;     // [tokens, width]
  const float* w;    // [width, ranks]
  float *parts, *z;  // [slices, tokens, ranks] [tokens, ranks], every element written
  int64_t tokens, width, ranks, slices;
  int64_t stride_x_t, stride_x_i, stride_w_i, stride_w_j;  // in elements
  int32_t dtype_x;
};

struct ContractParams {
  ProjectParams product;    // x = g, w = p; parts and z unused
  const float *z, *member;  // [tokens, ranks] [ranks, directions]
  float *parts, *u;  // [slices * ceil(ranks / 32), tokens, directions] [tokens, directions], every element written
  int64_t directions, stride_z_t, stride_z_j, stride_member_j, stride_member_k;
};

cudaError_t lowrank_project(const ProjectParams& p, cudaStream_t stream);
cudaError_t lowrank_contract(const ContractParams& p, cudaStream_t stream);

}  // namespace gradshield
