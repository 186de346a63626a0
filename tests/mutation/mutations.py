"""The list: what is broken, where, and which tests should notice."""

from __future__ import annotations

from dataclasses import dataclass

from mutations_attention import IN_ATTENTION, TESTS


@dataclass(frozen=True)
class Mutation:
    """One break.

    Attributes:
        name: short, unique.
        what: what is broken, for the table.
        file: path in the repository.
        old: text that stands in it once.
        new: text in its place.
        tests: files or node ids that should notice.
        builds: whether the CPU extension must be built again.
        interpreted: whether the tests run under Triton's interpreter.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    builds: bool = False
    interpreted: bool = False


TRITON = "tests/kernels/triton/interpreted.py"
NATIVE = ("tests/kernels/native/test_kernels.py",)
CUDA = ("tests/kernels/cuda/test_kernels.py",)
ROOMS = "gradshield_fast/ops"


def _triton(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    path = file if file.startswith(ROOMS) else f"{ROOMS}/{file}/kernel_triton.py"
    return Mutation(
        f"triton-{name}", what, path, old, new, tuple(f"{TRITON}::{test}" for test in tests), interpreted=True
    )


def _native(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(f"native-{name}", what, f"csrc/{file}", old, new, tests or NATIVE, builds=True)


def _cuda(name: str, what: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(f"cuda-{name}", what, f"csrc/{file}", old, new, CUDA)


IN_TRITON = (
    _triton(
        "lowrank-scaled",
        "projections a thousandth too large",
        "ghost_dot_lowrank",
        "tl.store(z_p, b_z, mask",
        "tl.store(z_p, b_z * 1.001, mask",
        "test_lowrank",
    ),
    _triton(
        "lowrank-parts",
        "the parts of a long depth overlap by a block",
        "ghost_dot_lowrank",
        "first = i_s * part\n    b_z = product(",
        "first = i_s * (part - BLOCK_I)\n    b_z = product(",
        "test_lowrank_cuts_a_long_depth",
    ),
    _triton(
        "lowrank-member",
        "columns counted for every direction",
        "ghost_dot_lowrank",
        "tl.sum(b_u * b_m[None, :], axis=1)",
        "tl.sum(b_u, axis=1)",
        "test_lowrank",
    ),
    _triton(
        "depth-mask",
        "the last block of the depth reads past the row",
        f"{ROOMS}/triton_tiles.py",
        "m_i = i + o_i < limit",
        "m_i = i + o_i < limit + 1",
        "test_ghost_dot",
    ),
    _triton(
        "depth-dropped",
        "the first column of the depth left out",
        f"{ROOMS}/triton_tiles.py",
        "m_i = i + o_i < limit",
        "m_i = (i + o_i < limit) & (i + o_i > 0)",
        "test_ghost_dot",
    ),
    _triton(
        "split-two-terms",
        "a float32 factor split into two terms, not three",
        f"{ROOMS}/triton_tiles.py",
        "        if Y == 3:\n            b_p = _dot(b_x0, b_y2, b_p, INTERPRETED)\n",
        "",
        "test_ghost_dot",
        "test_lowrank",
    ),
    _triton(
        "dot-strides",
        "the strides of r swapped",
        "ghost_dot",
        "o_o * stride_r_o, a + o_t * stride_a_t, m_o, m_t, 0, d_in, d_in,\n            stride_r_i,",
        "o_o * stride_r_i, a + o_t * stride_a_t, m_o, m_t, 0, d_in, d_in,\n            stride_r_o,",
        "test_ghost_dot",
    ),
    _triton(
        "dot-direction",
        "every direction is the first",
        "ghost_dot",
        "i_k = (i_p % directions).to(tl.int64)",
        "i_k = (i_p % directions).to(tl.int64) * 0",
        "test_ghost_dot",
    ),
    _triton(
        "embedding-row",
        "ids name the row before",
        "embedding_dot",
        "r_p = r + b_id[:, None] * stride_r_v",
        "r_p = r + tl.maximum(b_id - 1, 0)[:, None] * stride_r_v",
        "test_embedding_and_scale",
    ),
    _triton(
        "scale-bias",
        "the scale taken for a bias",
        "scale_dot",
        "        if not BIAS:",
        "        if BIAS:",
        "test_embedding_and_scale",
    ),
    _triton(
        "norm-once",
        "a pair of tokens counted once, not twice",
        "ghost_norm_sq",
        "tl.where(o_u[None, :] < o_t[:, None], 2.0 * b_pair, b_pair)",
        "b_pair",
        "test_ghost_inner",
    ),
    _triton(
        "norm-neighbour",
        "the first token of the next example counted too",
        "ghost_norm_sq",
        "& (o_u[None, :] < b_last[:, None])",
        "& (o_u[None, :] <= b_last[:, None])",
        "test_ghost_inner",
        "test_ghost_gram",
    ),
    _triton(
        "project-token",
        "the last token of an example left out",
        "ghost_project",
        "last = tl.minimum(first + part, end)",
        "last = tl.minimum(first + part, end - 1)",
        "test_ghost_project",
    ),
    _triton(
        "head-label",
        "the label's logit counted among the others",
        "linear_cross_entropy",
        "m_other = m_v[None, :] & (o_v[None, :] != b_label[:, None])",
        "m_other = m_v[None, :] & (o_v[None, :] >= 0)",
        "test_the_head_in_parts_is_the_head_in_one",
    ),
    _triton(
        "head-slope",
        "the softcap's derivative left out",
        "linear_cross_entropy",
        "b_g *= b_slope * b_share[:, None]",
        "b_g *= scale * b_share[:, None]",
        "test_the_head_in_parts_is_the_head_in_one",
    ),
    _triton(
        "head-parts",
        "a part of the vocabulary replaces those before it",
        "linear_cross_entropy",
        "ADD=add,",
        "ADD=False,",
        "test_the_head_in_parts_is_the_head_in_one",
    ),
    Mutation(
        "triton-described-rows",
        "a described tile begins at the other matrix's row",
        f"{ROOMS}/triton_tiles.py",
        "y_d.load([row_y, i])",
        "y_d.load([row_x, i])",
        ("tests/kernels/triton/interpreted_tilings.py",),
        interpreted=True,
    ),
)

IN_CPP = (
    *(_native(*mutation, TESTS) for mutation in IN_ATTENTION),
    _native(
        "row-lost",
        "the last row of a register block not stored",
        "common/product.h",
        "    if (r < rows)\n#pragma GCC unroll 2",
        "    if (r + 1 < rows)\n#pragma GCC unroll 2",
    ),
    _native(
        "depth-replaced",
        "a block of the depth replaces those before it",
        "common/product.h",
        "store(to, first ? acc[r][p] : add(load(to), acc[r][p]));",
        "store(to, acc[r][p]);",
    ),
    _native(
        "scaled",
        "products a thousandth too large",
        "common/product.h",
        "const Vec left = set1(x[r * kDepth + k]);",
        "const Vec left = set1(x[r * kDepth + k] * 1.001f);",
    ),
    _native(
        "padding",
        "padding columns of a panel read past the row",
        "common/product.h",
        "c < width ? load1(b.at(k + done, first + c), b.dtype) : 0.0f",
        "c <= width ? load1(b.at(k + done, first + c), b.dtype) : 0.0f",
        "tests/kernels/native/test_process.py",
    ),
    _native(
        "tail",
        "the elements behind the last sixteen left out",
        "common/rows.h",
        "    for (; i < width; ++i) tail +=",
        "    for (; i + 1 < width; ++i) tail +=",
    ),
    _native(
        "chunk",
        "only the last thousand elements of a row kept",
        "common/rows.h",
        "    total = add(total, add(add(part[0], part[1]), add(part[2], part[3])));",
        "    total = add(add(part[0], part[1]), add(part[2], part[3]));",
    ),
    _native(
        "member",
        "columns counted for every direction",
        "common/rows.h",
        "load(belongs + c), total);",
        "set1(1.0f), total);",
    ),
    _native(
        "scale-dropped",
        "the normalised activation left out behind the last sixteen",
        "common/rows.h",
        "      for (; i < width; ++i) scaled[i] *= other[i];\n",
        "",
    ),
    _native(
        "split-two",
        "a float32 factor on the matrix unit in two parts, not three",
        "common/packing.cpp",
        "b.dtype == DType::kBFloat16 ? 1 : 3};",
        "b.dtype == DType::kBFloat16 ? 1 : 2};",
    ),
    _native(
        "norm-diagonal",
        "a token's product with itself left out of the norm",
        "ghost_norm_sq/cpu.cpp",
        "if (same && t >= u && t < u + width)",
        "if (same && t > u && t < u + width)",
    ),
    _native(
        "norm-columns",
        "the last column of a block of tokens left out",
        "ghost_norm_sq/cpu.cpp",
        "const int64_t below = same ? most(0, least(width, t - u)) : width,",
        "const int64_t below = same ? most(0, least(width, t - u)) : width - 1,",
    ),
    _native(
        "embedding-direction",
        "every direction is the first",
        "embedding_dot/cpu.cpp",
        "table.data += k * r_step * size_of(r.dtype);",
        "table.data += 0 * k * r_step * size_of(r.dtype);",
    ),
    _native(
        "project-bounds",
        "the first token of an example left out",
        "ghost_project/cpu.cpp",
        "start = bounds[n];",
        "start = bounds[n] + (bounds[n + 1] > bounds[n] ? 1 : 0);",
    ),
    _native(
        "gram-column",
        "the last token of an example's stretch left out of the Gram matrix",
        "ghost_gram/cpu.cpp",
        "run.row_dots(products, begin - u, end - begin,",
        "run.row_dots(products, begin - u, end - begin - 1,",
    ),
    _native(
        "gram-span",
        "tokens of the second batch behind the first thousand left out of the Gram matrix",
        "ghost_gram/cpu.cpp",
        "start < right.a.rows; start += kSpan) {",
        "start < right.a.rows; start += right.a.rows) {",
    ),
    _native(
        "far-row",
        "rows found by 32-bit offsets",
        "common/matrix.h",
        "(i * row_stride + j * col_stride) * size_of(dtype);",
        "static_cast<int32_t>(i * row_stride + j * col_stride) * size_of(dtype);",
    ),
    _native(
        "member-panels",
        "all panels of a direction but the last left out",
        "ghost_dot_lowrank/cpu.cpp",
        "if (end[k] == 0) begin[k] = j / kPanel;",
        "begin[k] = j / kPanel;",
    ),
    _native(
        "tile-special",
        "rows with an infinity left on the matrix unit, which mixes them",
        "common/amx.h",
        "marked |= !add_tiles(acc,",
        "marked |= false & !add_tiles(acc,",
        "tests/kernels/native/test_special_values.py",
    ),
    _native(
        "tile-subnormal",
        "subnormal numbers taken for zero in rows that tiles load where they lie",
        "common/amx.h",
        "            marked = seen.any();\n",
        "",
        "tests/kernels/native/test_special_values.py",
    ),
    _native(
        "tile-subnormal-copied",
        "subnormal numbers taken for zero in rows that are copied",
        "common/amx.h",
        "        if (marked) continue;\n        Rows left[2];",
        "        marked = false;\n        Rows left[2];",
        "tests/kernels/native/test_special_values.py",
    ),
    _native(
        "tile-rows",
        "rows loaded as if they lay side by side",
        "common/amx.h",
        "x.at(t + i * kTile, k)), x.row_stride, 0}",
        "x.at(t + i * kTile, k)), x.cols, 0}",
    ),
    _native(
        "pool-wait",
        "the caller does not wait for the other threads",
        "common/pool.cpp",
        "    done_.wait(lock, [this] { return active_ == 0; });\n",
        "",
        "tests/kernels/native/test_kernels.py",
        "tests/kernels/native/test_process.py",
    ),
)

IN_CUDA = (
    _cuda(
        "scaled",
        "position terms a thousandth too large",
        "ghost_dot/ghost_dot.cuh",
        "store_global(out + (t0 + row) * p.directions + k, u);",
        "store_global(out + (t0 + row) * p.directions + k, u * 1.001f);",
    ),
    _cuda(
        "lowrank-mask",
        "ranks beyond the last written",
        "ghost_dot_lowrank/ghost_dot_lowrank.cuh",
        "if (t < p.tokens && j < p.ranks) store_global",
        "if (t < p.tokens && j <= p.ranks) store_global",
    ),
    _cuda(
        "lowrank-member",
        "columns counted for every direction",
        "ghost_dot_lowrank/ghost_dot_lowrank.cuh",
        "warp_sum(term * share)",
        "warp_sum(term * (0.0f * share + 1.0f))",
    ),
    _cuda(
        "wait",
        "asynchronous copies not waited for",
        "common/tile_mma.cuh",
        "      copy_async_wait<kStages - 2>();\n",
        "",
    ),
    _cuda(
        "mma-barrier",
        "no barrier between the wait and the multiplication",
        "common/tile_mma.cuh",
        "      sync_block();\n      const int64_t ahead",
        "      const int64_t ahead",
    ),
    _cuda(
        "fma-barrier-before",
        "float32 tiles read before all threads have filled them",
        "common/tile_fma.cuh",
        "      put<kN, kPitchB>(tile_b, held_b, b);\n      sync_block();",
        "      put<kN, kPitchB>(tile_b, held_b, b);",
    ),
    _cuda(
        "fma-barrier-after",
        "float32 tiles filled again while others read them",
        "common/tile_fma.cuh",
        "      for (int i = 0; i < kValues; ++i) sums[i] += chain[i];\n      sync_block();",
        "      for (int i = 0; i < kValues; ++i) sums[i] += chain[i];",
    ),
    _cuda(
        "embedding-direction",
        "every direction is the first",
        "embedding_dot/embedding_dot.cuh",
        "static_cast<const TR*>(p.r) + k * p.stride_r_k",
        "static_cast<const TR*>(p.r) + 0 * k * p.stride_r_k",
    ),
    _cuda(
        "embedding-tail",
        "the last element of a row left out",
        "embedding_dot/embedding_dot.cuh",
        "known && i < p.width; i += 32",
        "known && i + 1 < p.width; i += 32",
    ),
    _cuda(
        "project-strides",
        "the strides of a projection swapped",
        "ghost_project/ghost_project.cuh",
        "operand(p.left, kFloat32, p.k_out, 1, p.k_out)",
        "operand(p.left, kFloat32, p.k_out, p.k_out, 1)",
    ),
    _cuda(
        "norm-item",
        "the last tile of an example left out",
        "ghost_norm_sq/ghost_norm_sq.cuh",
        "threadIdx.x % 32; i < stop; i += 32)",
        "threadIdx.x % 32; i + 1 < stop; i += 32)",
    ),
    _cuda(
        "parts",
        "the first part of a cut sum left out",
        "common/reduce.cuh",
        "for (int64_t c = 0; c < p.count; ++c)",
        "for (int64_t c = 1; c < p.count; ++c)",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*IN_TRITON, *IN_CPP, *IN_CUDA)
