"""Log-probabilities by a Triton kernel as one would write it: a program a row, one pass."""

import torch
import triton
import triton.language as tl

import pytorch
from pytorch import array, begin, closed, numbers, timed

__all__ = ["array", "begin", "closed", "numbers", "timed"]
versions = {"Triton": triton.__version__, **pytorch.versions}


@triton.jit
def kernel(logits, targets, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * columns
    # A maximum and a sum for each lane, so that lanes meet once, at the end.
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(first + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # Lanes that have seen nothing yet hold -inf, and -inf - -inf is no number.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - highest), 0)
    target = tl.load(targets + row)
    logit = tl.load(first + target).to(tl.float32)
    tl.store(out + row, logit - highest - tl.log(total))


def log_probs(arrays, options):
    logits, targets = arrays["logits"], arrays["targets"]
    rows, columns = logits.shape
    out = torch.empty(rows, device=logits.device, dtype=torch.float32)

    def run():
        kernel[(rows,)](logits, targets, out, columns, BLOCK=4096, num_warps=8)
        return out

    return run, run
