"""The divergences straight from their definitions: float64, dense, differentiable by autograd."""

import torch
from torch import Tensor

from hf_dis.loss.divergence import ForwardKL
from hf_dis.loss.f_divergence import JensenShannon, ReverseKL, SkewKL

EVERY = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd 0.5": JensenShannon(),
    "jsd 0.1": JensenShannon(beta=0.1),
    "jsd 0.9": JensenShannon(beta=0.9),
    "skew_kl 0.1": SkewKL(),
    "skew_kl 0.7": SkewKL(alpha=0.7),
}
OTHERS = {name: divergence for name, divergence in EVERY.items() if name != "forward_kl"}
# All but the reverse KL are finite where the teacher masks a class.
BOUNDED = {name: divergence for name, divergence in EVERY.items() if name != "reverse_kl"}


def kl(one: Tensor, other: Tensor) -> Tensor:
    """Σ one log(one / other) of each item; 0 log 0 is 0."""
    safe = torch.where(one > 0, one, 1.0)
    return (safe * (safe.log() - torch.where(one > 0, other, 1.0).log())).where(one > 0, 0.0).sum(1)


def definition(divergence, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """τ² times a divergence of each item, of logits on all classes."""
    student, teacher = ((values.double() / temperature).softmax(1) for values in (logits, teacher_logits))
    match divergence:
        case ForwardKL():
            value = kl(teacher, student)
        case ReverseKL():
            value = kl(student, teacher)
        case JensenShannon(beta=beta):
            mixture = beta * teacher + (1 - beta) * student
            value = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
        case SkewKL(alpha=alpha):
            value = kl(teacher, alpha * teacher + (1 - alpha) * student)
    return temperature**2 * value
