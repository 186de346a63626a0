"""What is broken in the CUDA kernels, which the tests run on the emulator."""

from __future__ import annotations

from kinds import cuda

IN_CUDA = (
    cuda(
        "scaled",
        "position terms a thousandth too large",
        "ghost_dot/ghost_dot.cuh",
        "store_global(out + (t0 + row) * p.directions + k, u);",
        "store_global(out + (t0 + row) * p.directions + k, u * 1.001f);",
    ),
    cuda(
        "lowrank-mask",
        "ranks beyond the last written",
        "ghost_dot_lowrank/ghost_dot_lowrank.cuh",
        "if (t < p.tokens && j < p.ranks) store_global",
        "if (t < p.tokens && j <= p.ranks) store_global",
    ),
    cuda(
        "lowrank-member",
        "columns counted for every direction",
        "ghost_dot_lowrank/ghost_dot_lowrank.cuh",
        "warp_sum(term * share)",
        "warp_sum(term * (0.0f * share + 1.0f))",
    ),
    cuda(
        "wait",
        "asynchronous copies not waited for",
        "common/tile_mma.cuh",
        "      copy_async_wait<kStages - 2>();\n",
        "",
    ),
    cuda(
        "mma-barrier",
        "no barrier between the wait and the multiplication",
        "common/tile_mma.cuh",
        "      sync_block();\n      const int64_t ahead",
        "      const int64_t ahead",
    ),
    cuda(
        "fma-barrier-before",
        "float32 tiles read before all threads have filled them",
        "common/tile_fma.cuh",
        "      put<kN, kPitchB>(tile_b, held_b, b);\n      sync_block();",
        "      put<kN, kPitchB>(tile_b, held_b, b);",
    ),
    cuda(
        "fma-barrier-after",
        "float32 tiles filled again while others read them",
        "common/tile_fma.cuh",
        "      for (int i = 0; i < kValues; ++i) sums[i] += chain[i];\n      sync_block();",
        "      for (int i = 0; i < kValues; ++i) sums[i] += chain[i];",
    ),
    cuda(
        "embedding-direction",
        "every direction is the first",
        "embedding_dot/embedding_dot.cuh",
        "static_cast<const TR*>(p.r) + k * p.stride_r_k",
        "static_cast<const TR*>(p.r) + 0 * k * p.stride_r_k",
    ),
    cuda(
        "embedding-tail",
        "the last element of a row left out",
        "embedding_dot/embedding_dot.cuh",
        "known && i < p.width; i += 32",
        "known && i + 1 < p.width; i += 32",
    ),
    cuda(
        "project-strides",
        "the strides of a projection swapped",
        "ghost_project/ghost_project.cuh",
        "operand(p.left, kFloat32, p.k_out, 1, p.k_out)",
        "operand(p.left, kFloat32, p.k_out, p.k_out, 1)",
    ),
    cuda(
        "norm-item",
        "the last tile of an example left out",
        "ghost_norm_sq/ghost_norm_sq.cuh",
        "threadIdx.x % 32; i < stop; i += 32)",
        "threadIdx.x % 32; i + 1 < stop; i += 32)",
    ),
    cuda(
        "parts",
        "the first part of a cut sum left out",
        "common/reduce.cuh",
        "for (int64_t c = 0; c < p.count; ++c)",
        "for (int64_t c = 1; c < p.count; ++c)",
    ),
)
