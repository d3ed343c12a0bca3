"""Stand-in for sglang's compiled kernels, whose wheel needs CUDA.

With SGLANG_USE_CPU_ENGINE=1 sglang imports the names below, mostly for speculative decoding. None is called on the
paths of this bed, and each raises if it is.
"""

from collections.abc import Callable
from typing import Any

import torch

__version__ = "0.0.0+cpu.bed"

_FUNCTIONS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)

# Operators looked up when the Qwen processors are imported: a schema is enough, no kernel stands behind it.
# Hazard: sglang takes the mere presence of convert_weight_packed, fused_qk_norm_cpu or fused_qk_norm_rope_cpu for "the
# optimised CPU path is there", so those must stay undeclared.
_OPERATORS = (
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate) -> ()",
    "fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _absent(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on the CPU bed")

    function.__name__ = name
    return function


globals().update({name: _absent(name) for name in _FUNCTIONS})

_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _schema in _OPERATORS:
    _library.define(_schema)
