"""The switches of one way to ternarize, and the ways that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Method:
    """One way to ternarize a layer. Every switch can be flipped alone (`dataclasses.replace`).

    itf: iterative ternary fitting after the initialisation (Eq. 9, 10).
    aga: activation-aware grid (Eq. 12, 13).
    ssr: reorder columns by structural similarity (Eq. 15, 16), except in tensors whose name
        contains a part named in `ssr_skip`.
    reorder_by: how SSR's order is made: by "similarity", or, to compare with, "hessian" (largest
        diagonal first, as GPTQ's act-order) or "random".
    gptq: compensate each block's error in the later blocks.
    gptaq: weight of GPTAQ's term for the difference between full-precision and quantized inputs;
        above 0 the statistics must hold `cross`.
    gptaq_upfront: apply that term once to all columns before the first block (as QEP does), not
        after each block to the later ones.
    block_size: columns that share alpha and mu; the GGUF types need 128.
    damping: fraction of H's mean diagonal that is added to it, raised if H stays indefinite.
    exact: propagate with the block's whole Cholesky factor, not with its diagonal alone; AGA then
        works under (P_BB)^-1, the cost left after that propagation, instead of H_BB.
    feedback: round a block's columns one by one with error feedback, then refit its grid.
    descent_sweeps: sweeps of coordinate descent over a block's digits, a refit after each.
    stack_shared_inputs: ternarize layers with the same input (q, k, v; gate, up) as one matrix.
    output_tokens: tokens of the calibration text whose gradients tell how much each output matters,
        together with which others: rows then compensate the errors of rows before them. 0: rows do
        not know of each other.
    output_damping: as `damping`, for the second moments of those gradients.
    tuning_epochs: passes over the text in which alpha and mu of the whole model are tuned on its
        logits, digits frozen; 0 leaves them as they are.
    tuning_rate: the learning rate at the start, in units of each block's alpha.
    written_windows: windows of text that the full-precision model writes, to be calibrated and
        tuned on together with the calibration text.
    """

    name: str
    itf: bool = True
    aga: bool = True
    ssr: bool = True
    gptq: bool = True
    gptaq: float = 0.4
    gptaq_upfront: bool = True
    block_size: int = 128
    damping: float = 0.03
    exact: bool = True
    feedback: bool = True
    descent_sweeps: int = 2
    stack_shared_inputs: bool = True
    ssr_skip: tuple[str, ...] = ()
    reorder_by: str = "similarity"
    output_tokens: int = 16384
    output_damping: float = 0.2
    tuning_epochs: int = 1
    tuning_rate: float = 1e-2
    written_windows: int = 64

    def for_tensor(self, name: str) -> Method:
        """The method as it applies to the tensor `name`."""
        if self.ssr and any(part in name for part in self.ssr_skip):
            return replace(self, ssr=False)
        return self


METHODS: dict[str, Method] = {
    # PT2-LLM as its authors released it.
    "paper": Method(
        name="paper",
        gptaq=0.25,
        gptaq_upfront=False,
        damping=0.01,
        exact=False,
        feedback=False,
        descent_sweeps=0,
        stack_shared_inputs=False,
        ssr_skip=("down_proj",),
        output_tokens=0,
        tuning_epochs=0,
        written_windows=0,
    ),
    # The best that we measured (docs/quality.md). Reordering the attention's inputs did not pay,
    # and would cost a permutation tensor for each of its weights.
    "default": Method(name="default", ssr_skip=("attn", "attention")),
}
