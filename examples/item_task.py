"""The task of run_next_item.py: small Llama models whose tokens are items, their training on labels, their ranking.

A model's output layer is tied to its embedding of items. The loss on labels is sampled softmax: negatives that all
items of a batch share, each less the log of its expected count (logQ). So the estimate of the normaliser is unbiased,
as in the work of Bengio and Senécal (2008). The label's own logit is always there and needs no correction.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clm_task import build_model
from datasets import Dataset
from item_data import Interactions
from run_clm import Stopwatch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_dis import DISConfig, DISDistillationTrainer, RowSparseAdamW, TeacherCache
from hf_dis.distributed import clip_grad_norm_
from hf_dis.metrics import NextItem, top_ranked
from hf_dis.trainer.optimizer import give_head_rate

IGNORED = -100
NUM_NEGATIVES = 4096
EVAL_BATCH = 256
METRIC_DEPTH = 10


def build(num_classes: int, width: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama over items, its output layer tied to its embedding; the same seed gives the same weights."""
    return build_model(num_classes, width, num_layers, seed, tied=True)


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Fills sequences up on the right to the longest: 0 in ``input_ids``, -100 in ``labels``."""
    length = max(len(one["input_ids"]) for one in examples)
    batch = {
        name: torch.tensor([one[name] + [filler] * (length - len(one[name])) for one in examples])
        for name, filler in (("input_ids", 0), ("labels", IGNORED))
    }
    return {**batch, "attention_mask": (batch["labels"] != IGNORED).long()}


class SampledSoftmaxTrainer(Trainer):
    """Trains a model over items on labels alone: cross-entropy on sampled negatives with the logQ correction.

    The negatives of a step are shared by all its items. Half of them are sampled in proportion to the items' counts
    in training, the other half uniformly, with replacement. An item's own label among them is left out. Gradients of
    the item embeddings are sparse, and so are their steps.

    Args:
        counts: of each class in training, ``[C]``; class 0, padding, is never sampled.
        head_learning_rate: of the item embeddings; None: ``learning_rate``.
        num_negatives: M, negatives per step.
        **kwargs: as for ``transformers.Trainer``.

    Raises:
        ValueError: if there are several processes.
    """

    def __init__(
        self,
        *args: Any,
        counts: np.ndarray,
        head_learning_rate: float | None = None,
        num_negatives: int = NUM_NEGATIVES,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise ValueError(
                f"there are {self.args.world_size} processes, and sampled softmax on labels trains in one: start the "
                "script with --num_processes 1"
            )
        self.model_accepts_loss_kwargs = False
        self.head_learning_rate, self.num_negatives = head_learning_rate, num_negatives
        density = torch.tensor(counts[1:] / counts[1:].sum() + 1 / len(counts[1:])) / 2
        self._upto = density.cumsum(0).to(self.args.device)
        self._log_expected = F.pad(num_negatives * density, (1, 0), value=1.0).log().float().to(self.args.device)
        self._generator = torch.Generator().manual_seed(self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        is_item = labels != IGNORED
        labels = labels[is_item]
        body, weight = _body_and_weight(self.accelerator.unwrap_model(model))
        features = body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        features = features.last_hidden_state[is_item]
        at = torch.rand(self.num_negatives, generator=self._generator, dtype=torch.float64).to(labels.device)
        negatives = 1 + torch.searchsorted(self._upto, at * self._upto[-1]).clamp(max=len(self._upto) - 1)
        own = (features * F.embedding(labels, weight, sparse=True)).sum(1, keepdim=True)
        others = features @ F.embedding(negatives, weight, sparse=True).T
        others = (others - self._log_expected[negatives]).masked_fill(labels[:, None] == negatives, -torch.inf)
        logits = torch.cat([own, others], 1)
        return F.cross_entropy(logits, torch.zeros_like(labels))

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        embedding = self.accelerator.unwrap_model(model).get_input_embeddings()
        embedding.sparse = True
        try:
            loss = super().training_step(model, *args, **kwargs)
        finally:
            embedding.sparse = False
        embedding.weight.grad = embedding.weight.grad.coalesce()
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer_cls_and_kwargs = RowSparseAdamW, self.get_optimizer_cls_and_kwargs(self.args)[1]
        optimizer = super().create_optimizer(model)
        if self.head_learning_rate is not None:
            give_head_rate(optimizer, self.model.lm_head.parameters(), self.head_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


def _body_and_weight(model: LlamaForCausalLM) -> tuple[nn.Module, Tensor]:
    """The model without its output layer, and the weight of that layer, ``[C, d]``."""
    return model.get_decoder(), model.get_output_embeddings().weight


@torch.no_grad()
def rank_items(model: LlamaForCausalLM, users: Dataset, k: int = METRIC_DEPTH) -> Tensor:
    """Ranks all items as the next one of each user.

    Args:
        model: over items.
        users: with the column ``input_ids``, each user's history.
        k: items to return.

    Returns:
        the ids of the k best-ranked items by falling score, ``[users, k]``; padding is never among them.
    """
    body, weight = _body_and_weight(model)
    was_training, parts = model.training, []
    model.eval()
    histories = users["input_ids"]
    for at in range(0, len(histories), EVAL_BATCH):
        batch = collate([{"input_ids": one, "labels": one} for one in histories[at : at + EVAL_BATCH]])
        ids, mask = (batch[name].to(weight.device) for name in ("input_ids", "attention_mask"))
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        parts.append(top_ranked(last, weight, k=k, first_class=1).cpu())
    model.train(was_training)
    return torch.cat(parts)


def scores(model: LlamaForCausalLM, users: Dataset) -> dict[str, float]:
    """NDCG@10 and recall@10 over all items of the users' column ``next_item``."""
    return NextItem().compute(predictions=rank_items(model, users), references=users["next_item"], k=(METRIC_DEPTH,))


def popularity_scores(counts: np.ndarray, users: Dataset) -> dict[str, float]:
    """The same scores of the items with the highest counts in training, in the same order for every user."""
    best = 1 + np.argsort(-counts[1:], kind="stable")[:METRIC_DEPTH]
    ranked = np.broadcast_to(best, (len(users), METRIC_DEPTH))
    return NextItem().compute(predictions=ranked, references=users["next_item"], k=(METRIC_DEPTH,))


class TrainingClock(Stopwatch):
    """Records evaluations with the time of training before each; the loader's time counts, an evaluation's does not.

    Attributes:
        seconds, cpu_seconds: of training so far; the second is of all threads.
        curve: a record of each evaluation: ``step``, ``seconds``, ``cpu_seconds``, and what was measured.
    """

    def __init__(self):
        super().__init__()
        self.cpu_seconds = 0.0

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Counts time that was spent before the training."""
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock. It runs between two steps too, where the loader looks up stored targets."""
        self._start()

    def on_step_begin(self, args, state, control, **kwargs):
        """Leaves the clock as it is."""

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu_seconds += time.process_time() - self._cpu_started
        super().on_step_end(args, state, control, **kwargs)
        self._start()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        self.curve[-1]["cpu_seconds"] = self.cpu_seconds
        self._start()

    def _start(self) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    @contextmanager
    def paused(self):
        """Leaves the time within the context out."""
        started = time.perf_counter(), time.process_time()
        yield
        self.seconds -= time.perf_counter() - started[0]
        self.cpu_seconds -= time.process_time() - started[1]


class RankingCurve(TrainingClock):
    """Scores a model at an interval of steps.

    Args:
        users: of the validation.
        every: steps between two scores; the last step is scored too.
    """

    def __init__(self, users: Dataset, every: int):
        super().__init__()
        self.users, self.every = users, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            spent = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
            self.curve.append({"step": state.global_step, **spent, **scores(model, self.users)})
            self._start()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Records nothing: an evaluation has losses, not scores."""


METHODS = {
    "labels": {},
    "exact": {"head_mode": "exact", "row_sparse_head": False, "exact_warmup_steps": 0.0},
    "dis": {},
    "dis_cached": {},
    "topk": {"proposal": "topk", "num_sampled_classes": 64, "num_shared_classes": 0, "num_tails": None},
}
# A method for as long as another one took.
IN_TIME = {
    "exact_in_time": ("exact", "dis"),
    "labels_in_time": ("labels", "dis"),
    "labels_in_cached_time": ("labels", "dis_cached"),
}


def student_trainer(
    method: str,
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM | TeacherCache,
    data: Interactions,
    windows: Dataset,
    args: DISConfig,
    curve: RankingCurve,
    trainer_class: Callable[..., Trainer] = DISDistillationTrainer,
) -> Trainer:
    """Makes the trainer of a student.

    Args:
        method: a name of ``METHODS`` or ``IN_TIME``.
        student: over the items.
        teacher: over the same items, or a cache of its targets for the windows, which ``dis_cached`` takes.
        data: the interactions.
        windows: of the training parts, as :meth:`item_data.Interactions.training` makes them.
        args: of DIS; the method's own settings take the place of those that they name.
        curve: a callback that scores the student.
        trainer_class: makes the trainer of the methods with a teacher.
    """
    name, _ = IN_TIME.get(method, (method, None))
    args = copy.copy(args)
    for setting, value in METHODS[name].items():
        setattr(args, setting, value)
    given = {"model": student, "args": args, "train_dataset": windows, "data_collator": collate, "callbacks": [curve]}
    if name == "labels":
        return SampledSoftmaxTrainer(counts=data.counts(), head_learning_rate=args.head_learning_rate, **given)
    source = "teacher_cache" if isinstance(teacher, TeacherCache) else "teacher_model"
    return trainer_class(**{source: teacher}, **given)


def logits_per_item(trainer: Trainer) -> int:
    """Counts the logits that a student computes per item."""
    if isinstance(trainer, SampledSoftmaxTrainer):
        return 1 + trainer.num_negatives
    distiller = trainer.distiller
    return distiller.num_classes if distiller.mode == "exact" else distiller.sampler.columns


def train_teacher(
    teacher: LlamaForCausalLM, data: Interactions, length: int, args: TrainingArguments, **settings: Any
) -> LlamaForCausalLM:
    """Trains the teacher on labels by :class:`SampledSoftmaxTrainer`, and saves it to ``_teacher`` in ``output_dir``.

    Args:
        teacher: with random weights.
        data: the interactions.
        length: of a training window.
        args: of the student's run: folder, device and precision.
        **settings: of ``TrainingArguments``; ``head_learning_rate`` is that of the item embeddings.
    """
    head_rate = settings.pop("head_learning_rate")
    teacher_args = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "_teacher"),  # push_to_hub leaves out names that start with _
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_strategy="no",
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        disable_tqdm=args.disable_tqdm,
        report_to=args.report_to,
        **settings,
    )
    trainer = SampledSoftmaxTrainer(
        model=teacher,
        args=teacher_args,
        train_dataset=data.training(length),
        data_collator=collate,
        counts=data.counts(),
        head_learning_rate=head_rate,
    )
    trainer.train()
    trainer.save_model()
    return trainer.accelerator.unwrap_model(trainer.model)
