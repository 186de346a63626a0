"""The list: what is broken, where, and which tests should notice."""

from __future__ import annotations

from in_attention import IN_ATTENTION
from in_cpp import IN_CPP
from in_cuda import IN_CUDA
from in_head import IN_HEAD
from in_triton import IN_TRITON
from kinds import Mutation

MUTATIONS: tuple[Mutation, ...] = (*IN_TRITON, *IN_ATTENTION, *IN_HEAD, *IN_CPP, *IN_CUDA)
