"""Prefill: from a prompt to the logits of its last token, and a cache, as fast as the device allows.

A parallel block is two matrix products (queries, feed-forward, keys and values as one; both ways out as another),
attention, and three passes of `kernels.pointwise`. The last block computes keys and values for all tokens, and the rest
for the last token alone. In fp8 the products of all blocks but the last multiply e4m3 numbers:

* e4m3 is a floating-point format: a scale only has to keep values in its range of 17 binary orders, not to fit them
  closely. Weights have a scale an output.
* What LayerNorm gives is at most sqrt(dim) long without its weight, which the matrices take over. Hence a fixed scale
  that cannot overflow; and bounds for values, so for means of them, and for squared ReLU (`weights`). So on a Hopper
  GPU the feed-forward's product, activation and rounding are one kernel, and attention writes e4m3.
* Elsewhere, in the first block of a DeepNorm model, which no LayerNorm precedes, and with other activations,
  attention's output and the activation have a scale a row, measured; it is multiplied in after the product.
* Normalised queries and keys need no measuring. Of the global heads, which do most of attention's work in a long
  prompt, q.k multiplies e4m3 numbers too, with the temperature shared among both sides; xPos's decay would leave
  e4m3's range.

`coverage` says what the kernels can run, `weights` packs a model's, `memory` is what all blocks share, `blocks` is what
they compute, and `runner` is the way in. `memory` and `blocks` need triton, so the first prompt imports them.

Shapes: B batch, T tokens, H query heads, D dim_head, R = T + shift_tokens rows a sequence (see `kernels.pointwise`).
"""

from andromeda.inference.prefill.coverage import PRECISIONS, heads_in_fp8, why_not
from andromeda.inference.prefill.runner import Prefill

__all__ = ["PRECISIONS", "Prefill", "heads_in_fp8", "why_not"]
