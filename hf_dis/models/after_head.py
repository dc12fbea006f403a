"""AfterHead: the bias, scale and soft-cap that some models apply to the logits of their output layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class AfterHead(NamedTuple):
    """Applies a model's bias, then its scale, then its soft-cap to the logits of the output layer.

    Attributes:
        bias: added, ``[1, C]`` (Bart, Marian, Pegasus, ...), or None.
        scale: multiplied by (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        soft_cap: c in ``c tanh(z / c)`` (Gemma), or None.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> AfterHead:
        """Reads the operations from a transformers model.

        A model may do more than that: :class:`hf_dis.teacher.stream.LogitStream` compares it with the whole model.
        """
        settings = vars(model.config.get_text_config())
        scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
        buffers = dict(model.named_buffers(recurse=False))
        return cls(buffers.get("final_logits_bias"), scale, settings.get("final_logit_softcapping"))

    def __call__(self, logits: Tensor) -> Tensor:
        """Applies the operations to the logits of the output layer, ``[n, C]``; returns logits of that shape."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits

    def gradient(self, gradient: Tensor, results: Tensor) -> Tensor:
        """Computes the gradient on the logits of the output layer.

        Args:
            gradient: on the results, ``[n, C]``.
            results: of the call, ``[n, C]``.
        """
        if self.soft_cap is not None:
            gradient = gradient * (1 - (results / self.soft_cap).square())
        return gradient if self.scale == 1 else gradient * self.scale
