"""The engine without a Trainer: its steps against dense float64 references, and what it leaves behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_models import (
    bart,
    bert_mlm,
    bert_tokens,
    images,
    llama,
    llama_sequences,
    patched_modules,
    spread_out,
    t5,
    tokens,
    vit,
)

from hf_dis import DISArguments, SamplerSpec, build_distiller, make_sampler
from hf_dis.report.gradient_error import MEASURED_ITEMS
from hf_dis.steps import EvaluationStep, ExactStep, SampledStep, WarmupStep

CLASSES, TEMPERATURE, WEIGHT = 40, 2.0, 0.3
SAMPLING = {"num_sampled_classes": 6, "num_shared_classes": 8, "num_tails": 2, "rank_depth": 10}


def image_batch():
    return {"pixel_values": images(6, dtype=torch.float64), "labels": torch.tensor([0, 5, 39, 7, 7, 11])}


def text_batch():
    batch = tokens(5, CLASSES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, :3] = -100  # a span of each kind: whole, cut, and none at all
    labels[3] = -100
    return {**batch, "labels": labels}


def sequence_batch():
    return {**tokens(5, 50), "labels": torch.tensor([0, 5, 39, 7, 11])}


TASKS = {
    "image": (vit, image_batch),
    "causal LM": (llama, text_batch),
    "seq2seq": (t5, text_batch),
    "seq2seq, bias after the head": (bart, text_batch),
    "token classification": (bert_tokens, text_batch),
    "head before pooling": (llama_sequences, sequence_batch),
}


def models(build):
    return build(CLASSES, spread=3).double().train(), build(CLASSES, seed=1, spread=30).double()


def distiller_of(student, teacher, mode="sampled", **settings):
    arguments = DISArguments(
        **{"temperature": TEMPERATURE, "hard_label_weight": WEIGHT, "head_mode": mode, **SAMPLING, **settings}
    )
    return build_distiller(student, teacher, arguments)


def supervised(task, outputs, batch):
    """Logits and labels of the items, as the definition has them."""
    logits, labels = outputs.logits, batch["labels"]
    if task in ("causal LM", "soft cap, tied", "scale after the head"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.dim() == 1:
        return logits, labels
    return logits[labels != -100], labels[labels != -100]


def dense(task, student, teacher, batch):
    """The loss of every item on all classes, from the definition, by autograd in float64."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if task.startswith("seq2seq"):
        inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    with torch.no_grad():
        answer, _ = supervised(task, teacher(**inputs), batch)
    logits, labels = supervised(task, student(**inputs), batch)
    p, log_s = (answer / TEMPERATURE).softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
    kd = TEMPERATURE**2 * (p * (p.log() - log_s)).sum(-1)
    return (1 - WEIGHT) * kd + WEIGHT * F.cross_entropy(logits, labels, reduction="none"), kd


def gradients(model):
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(student, expected, tolerance=1e-10):
    found = gradients(student)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def decoder(name, **config):
    """A language model of transformers by the name of its family, tied where the family is."""

    def build(vocab_size, seed=0, spread=1.0):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = getattr(hf, f"{name}Config")(
            vocab_size=vocab_size, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes, **config
        )
        return spread_out(getattr(hf, f"{name}ForCausalLM")(made), spread)

    return build


STEPS = {
    **TASKS,
    "masked LM": (bert_mlm, text_batch),
    "soft cap, tied": (decoder("Gemma2", final_logit_softcapping=2.0), text_batch),
    "scale after the head": (decoder("Granite", logits_scaling=3.0), text_batch),
}


@pytest.mark.parametrize("holds_logits", [True, False], ids=["whole logits", "blocks"])
@pytest.mark.parametrize("kind", ["exact", "warm-up", "sampled, all classes"])
@pytest.mark.parametrize("task", STEPS)
def test_a_step_on_all_classes_is_exact_distillation(task, kind, holds_logits, monkeypatch):
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", 3 * CLASSES * 8)
    build, make_batch = STEPS[task]
    (student, teacher), batch = models(build), make_batch()
    reference = copy.deepcopy(student)
    expected, _ = dense(task, reference, teacher, batch)
    expected.sum().backward()
    distiller = distiller_of(student, teacher, "exact" if kind == "exact" else "sampled")
    if kind == "sampled, all classes":
        spec = SamplerSpec(num_sampled_classes=CLASSES, num_shared_classes=0, rank_depth=CLASSES)
        distiller.sampler = make_sampler(CLASSES, spec)
        distiller.teacher.depth = CLASSES
    with distiller.step(batch, warming_up=kind == "warm-up", holds_logits=holds_logits) as step:
        outputs = student(**step.inputs)
        loss, terms = step.loss(outputs)
        loss.sum().backward()
    in_blocks = not holds_logits and kind in ("exact", "warm-up") and task != "head before pooling"
    assert outputs.logits.shape[-1] == (1 if in_blocks else CLASSES + kind.startswith("sampled"))  # and the label
    assert type(step) is {"exact": ExactStep, "warm-up": WarmupStep}.get(kind, SampledStep)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert terms.keys() == {"kd_loss", "ce_loss"} and not any(term.requires_grad for term in terms.values())
    assert_same(student, gradients(reference))
    assert patched_modules(student) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_sampled_step_computes_the_sampled_classes_only_and_learns(task):
    build, make_batch = TASKS[task]
    (student, teacher), batch = models(build), make_batch()
    distiller = distiller_of(student, teacher)
    before = {name: value.clone() for name, value in distiller.sampler.state_dict().items()}
    with distiller.step(batch) as step:
        outputs = student(**step.inputs)
        loss, _ = step.loss(outputs)
        loss.mean().backward()
        quality = step.quality()
    assert outputs.logits.shape == (distiller.count(batch), 6 + 1 + 8)  # the label's column between
    assert len(quality.pop("gradient_error").squared_error) == min(len(loss), MEASURED_ITEMS)
    assert loss.shape == (distiller.count(batch),) and all(len(value) == len(loss) for value in quality.values())
    after = distiller.sampler.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before if name != "generator")
    assert not torch.equal(before["generator"], after["generator"])


@pytest.mark.parametrize("holds_logits", [True, False], ids=["whole logits", "blocks"])
@pytest.mark.parametrize(
    "build", [vit, bart, decoder("Gemma2", final_logit_softcapping=2.0)], ids=["vit", "bart", "cap"]
)
def test_a_warm_up_step_teaches_the_sampler_what_a_sampled_step_does(build, holds_logits):
    learnt = []
    for warming_up in (False, True):
        student, teacher = models(build)
        distiller = distiller_of(student, teacher)
        batch = image_batch() if build is vit else text_batch()
        with distiller.step(batch, warming_up=warming_up, holds_logits=holds_logits) as step:
            step.loss(student(**step.inputs))
        learnt.append(distiller.sampler.state_dict())
    for name, value in learnt[0].items():
        torch.testing.assert_close(learnt[1][name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("holds_logits", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_is_exact_with_the_logits_held_or_in_chunks(task, holds_logits):
    build, make_batch = TASKS[task]
    (student, teacher), batch = models(build), make_batch()
    student.eval()
    distiller = distiller_of(student, teacher)
    expected, kd = dense(task, student, teacher, batch)
    widths = []
    with distiller.step(batch, holds_logits=holds_logits) as step, torch.no_grad():
        outputs = student(**step.inputs)
        widths.append(outputs.logits.shape[-1])
        loss, terms = step.loss(outputs)
    assert isinstance(step, EvaluationStep)
    splits = task != "head before pooling"
    assert widths == [1 if splits and not holds_logits else CLASSES]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(terms["kd_loss"], kd, rtol=0, atol=1e-10)
    assert terms.keys() == {"kd_loss", "ce_loss", "kl"} and patched_modules(student) == []


def test_a_bare_loop_trains_the_student():
    student, teacher = models(llama)
    distiller = distiller_of(student, teacher, row_sparse_head=False)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    batch = text_batch()

    def divergence():
        student.eval()
        with distiller.step(batch) as step, torch.no_grad():
            value = step.loss(student(**step.inputs))[1]["kl"].mean().item()
        student.train()
        return value

    before = divergence()
    for _ in range(30):
        with distiller.step(batch) as step:
            loss, _ = step.loss(student(**step.inputs))
            loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert divergence() < 0.5 * before


def test_an_exception_within_a_step_releases_the_head():
    student, teacher = models(vit)
    distiller = distiller_of(student, teacher)
    with pytest.raises(RuntimeError, match="stop"), distiller.step(image_batch()) as step:
        assert patched_modules(student) == ["classifier"]
        student(**step.inputs)
        raise RuntimeError("stop")
    assert patched_modules(student) == []


def test_the_engine_keeps_the_settings_that_it_was_made_with():
    student, teacher = models(vit)
    arguments = DISArguments(head_mode="sampled", temperature=3.0, **SAMPLING)
    distiller = build_distiller(student, teacher, arguments)
    arguments.temperature = 1.0
    assert distiller.arguments.temperature == distiller.teacher.temperature == 3.0


def test_without_labels_the_loss_is_the_divergence():
    student, teacher = models(vit)
    distiller = distiller_of(student, teacher)
    batch = image_batch()
    del batch["labels"]
    with distiller.step(batch) as step:
        loss, terms = step.loss(student(**step.inputs))
    assert terms.keys() == {"kd_loss"} and torch.equal(loss, terms["kd_loss"])


def test_a_batch_without_items_has_an_empty_loss_with_a_gradient_of_zero():
    for mode in ("sampled", "exact"):
        student, teacher = models(llama)
        batch = text_batch()
        batch["labels"] = torch.full_like(batch["labels"], -100)
        distiller = distiller_of(student, teacher, mode)
        with distiller.step(batch) as step:
            loss, _ = step.loss(student(**step.inputs))
            loss.sum().backward()
        assert loss.shape == (0,) and not any(value.any() for value in gradients(student).values())


def test_the_exact_step_computes_the_supervised_tokens_only():
    student, teacher = models(llama)
    batch = text_batch()
    distiller = distiller_of(student, teacher, "exact")
    with distiller.step(batch) as step:
        outputs = student(**step.inputs)
    assert outputs.logits.shape == (distiller.count(batch), CLASSES)
    assert student.eval()(**step.inputs).logits.shape == (*batch["labels"].shape, CLASSES)


@pytest.mark.parametrize("holds_logits", [True, False], ids=["whole logits", "blocks"])
def test_a_second_backward_of_an_exact_loss_is_refused(holds_logits):
    student, teacher = models(vit)
    distiller = distiller_of(student, teacher, "exact")
    with distiller.step(image_batch(), holds_logits=holds_logits) as step:
        loss, _ = step.loss(student(**step.inputs))
        loss.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward pass"):
            loss.sum().backward()


@pytest.mark.parametrize("change", [lambda places: places.flip(0), lambda places: places.repeat_interleave(2)])
def test_positions_that_are_not_ascending_are_refused(change):
    student, teacher = models(llama)
    distiller = build_distiller(student, teacher, DISArguments(head_mode="sampled", **SAMPLING))
    batch = text_batch()
    places = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten().ne(-100).nonzero()[:, 0]
    with distiller.step(batch, positions=places) as step:
        assert len(step.items) == len(places)
    with (
        pytest.raises(ValueError, match=r"positions are not ascending.*positions\.unique"),
        distiller.step(batch, positions=change(places)),
    ):
        pass
