"""Token log-probs from hidden states, without ever holding (T, V) logits.

Computes exactly what `losses.sequence_logps` does after the decoder; read that first. The tricks:
1. Only positions that predict a response token reach the head; the caller gathers them.
2. They go through it in chunks. The gradient of log p(y) by the hidden state h is W[y] - softmax(W h) W. It does not
   depend on what comes after, so it is taken while the chunk's softmax is at hand: two products with W instead of the
   three of recomputing the logits in the backward pass, and (S, C) kept instead of (S, V). The head is frozen.
3. The product h W^T multiplies in the model's dtype into a float32 result; bfloat16 logits would cost 3 digits.
"""

import torch
from torch import Tensor

# Rows of float32 logits at a time: 16 MB at V = 32,064; 131 MB on a GPU, so that reading W takes less than multiplying.
CHUNK, CUDA_CHUNK = 128, 1024


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p(target | hidden) of gathered hidden states (S, C), head (V, C), targets (S,) -> (S,) float32."""
    assert not weight.requires_grad, "the head is frozen here: its gradient is not computed"
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenLogps.apply(hidden.to(weight.dtype), weight, targets)


class TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (S, C), weight (V, C), targets (S,) -> (S,), and the gradient by hidden kept for the backward pass.

        log p(y) = z_y - log sum_v exp(z_v) with logits z = W h, so
        d log p(y) / dh = W[y] - sum_v softmax(z)_v W[v] = -(softmax(z) - onehot(y)) W.
        """
        logps = hidden.new_empty(len(targets), dtype=torch.float32)  # (S,)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (S, C)
        rows = CUDA_CHUNK if hidden.is_cuda else CHUNK
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            y = targets[part, None]  # (s, 1)
            logits = float32_logits(hidden[part], weight)  # (s, V)
            top = logits.amax(-1, keepdim=True)  # (s, 1); softmax by hand: one exp, in place
            logp = logits.gather(1, y) - top  # (s, 1)
            p = logits.sub_(top).exp_()  # (s, V)
            total = p.sum(-1, keepdim=True)  # (s, 1)
            logps[part] = (logp - total.log())[:, 0]  # (s, 1) -> (s,)
            if gradient is not None:
                p.div_(total)  # softmax(z)
                p.scatter_add_(1, y, p.new_full(y.shape, -1.0))  # softmax(z) - onehot(y), (s, V)
                gradient[part] = (p.to(weight.dtype) @ weight).neg_()  # d log p(y) / dh: (s, V) @ (V, C) -> (s, C)
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None  # (S, C) * (S, 1) -> (S, C)


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (S, C) and weight (V, C) of one dtype -> (S, V) float32."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T
