"""Log-prob of given tokens under logits: the operation policy-gradient losses read."""

from __future__ import annotations

from torch import Tensor

from deeprec import backends
from deeprec.ops import logprobs_cpu
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.logprob_checks import (
    as_tensors,
    check_floats,
    check_ids,
    check_range,
    check_rows,
    reads_values,
    timed_eagerly,
)
from deeprec.ops.reference import logprobs as reference

__all__ = ["gather_logprobs"]


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    allowed: AllowedTokens | None = None,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax(logits / temperature)`` at ``token_ids``, without writing the log-softmax.

    Results are float32 whatever comes in (float64 for float64 logits, on the reference backend).
    Differentiable in ``logits``, once. A NaN or +inf logit makes its row NaN; −inf is
    probability 0. An id outside its row's ``allowed`` ids has log-prob −inf.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64. Any strides: a slice of a
            larger tensor is not copied as long as its last dimension is contiguous.
        token_ids: integers ``[...]``, or ``[..., K]`` for K tokens a row, in ``[0, V)``.
        temperature: divides the logits; positive and finite.
        mask: bool ``[...]``, True = counted. Elsewhere values, entropy and gradients are 0 and
            neither ids nor logits are read, so −100 is a fine id there.
        allowed: permitted ids of every row (leading dimensions flattened); the softmax runs over
            them alone, as in constrained decoding.
        entropy: also return every row's entropy in nats, differentiable too.
        backend: "cuda", "triton", "cpu", "reference" or None for the first that can run.

    Returns:
        Log-probs of the shape of ``token_ids``, or (log-probs, entropy ``[...]``).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, temperature or backend does not fit.
        IndexError: an id is out of range, on a CPU.

    On a GPU ids are not looked at, because that would wait for the device: in the kernels, one out
    of range has log-prob NaN (−inf, perhaps, in a row limited by ``allowed``).
    """
    logits, token_ids, mask = as_tensors(logits, token_ids, mask)
    check_floats("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V > 0, got {tuple(logits.shape)}")
    lead = logits.shape[:-1]
    if token_ids.ndim == logits.ndim:
        expected, many = (*lead, token_ids.shape[-1]), True
    else:
        expected, many = lead, False
    check_ids(token_ids, expected, "[...] or [..., K]", logits.device)
    check_rows(lead, logits.device, temperature, mask, allowed)

    ids = token_ids if many else token_ids[..., None]
    chosen = backends.select("gather_logprobs", backend, logits)
    values, entropies = chosen.run(logits, ids, float(temperature), mask, allowed, entropy)
    values = values if many else values[..., 0]
    return (values, entropies) if entropy else values


def _run_reference(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    lead, vocabulary = logits.shape[:-1], logits.shape[-1]
    flat_mask = None if mask is None else mask.reshape(-1)
    flat_ids = ids.reshape(lead.numel(), ids.shape[-1]).long()
    if reads_values(logits):
        check_range(flat_ids, flat_mask, None if allowed is None else allowed.ids, vocabulary)
    with timed_eagerly("gather_logprobs", "reference"):
        values, entropies = reference.gather_logprobs(
            logits.reshape(lead.numel(), vocabulary), flat_ids, temperature, flat_mask, allowed
        )
    return values.reshape(ids.shape), entropies.reshape(lead)


backends.register("gather_logprobs", "cpu", logprobs_cpu.run, logprobs_cpu.why_not)
backends.register("gather_logprobs", "reference", _run_reference, lambda logits: None)
