"""``gradient_error`` in the trainer: the sample follows it, all classes where no sample will do, and resuming."""

import warnings

import pytest
import torch
from tiny_models import assert_near, labelled_images, labelled_tokens, llama, vit

from hf_dis import cache_teacher_targets, distiller
from hf_dis.sampling import budget

CLASSES = 600
CALM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}  # Adam turns noise into steps where the gradient is small


@pytest.fixture(autouse=True)
def measured_often(monkeypatch):
    monkeypatch.setattr(budget, "BATCHES", 2)


def settings(steps, **changes):
    given = {"train_dataset": labelled_images(8 * steps, CLASSES), "max_steps": steps, "learning_rate": 1e-3}
    sizes = dict.fromkeys(("num_sampled_classes", "num_shared_classes", "num_tails", "rank_depth"))
    return {**given, **sizes, "head_mode": "sampled", "logging_steps": 1, **changes}


def logs(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def models(number=CLASSES):
    return vit(number, seed=0), vit(number, seed=1, spread=30)


@pytest.mark.parametrize("row_sparse_head", [False, True], ids=["dense", "row-sparse"])
def test_the_sample_follows_the_accepted_error(make_trainer, row_sparse_head):
    """A larger accepted error has fewer classes, and the logged error is near the accepted one."""
    means = []
    for accepted in (0.1, 0.4):
        common = settings(16, gradient_error=accepted, row_sparse_head=row_sparse_head)
        trainer = make_trainer(*models(), **common)
        trainer.train()
        sampler = trainer.distiller.sampler
        sizes, errors = (logs(trainer, name)[8:] for name in ("dis/num_shared_classes", "dis/gradient_error"))
        means.append(sum(sizes) / len(sizes))
        assert sum(errors) / len(errors) < 1.2 * accepted
        assert sampler.num_updated == (max(16, sampler.num_shared // 32) if row_sparse_head else None)
    assert means[0] > 1.5 * means[1]


@pytest.mark.parametrize("row_sparse_head", [False, True], ids=["dense", "row-sparse"])
def test_an_error_that_no_sample_meets_is_exact_distillation(make_trainer, row_sparse_head):
    """From the step after the first measurement on; the first steps have samples with an error of rounding."""
    common = settings(6, num_shared_classes=CLASSES // 2, num_sampled_classes=128, rank_depth=128, **CALM)
    exact = make_trainer(*models(), **common | {"head_mode": "exact"})
    exact.train()
    common |= {"num_shared_classes": None, "exact_warmup_steps": 1, "row_sparse_head": row_sparse_head}
    trainer = make_trainer(*models(), **common, gradient_error=1e-6)
    with pytest.warns(RuntimeWarning, match=r"gradient_error is 1e-06, and a sample of .* all classes are computed"):
        trainer.train()
    assert trainer.distiller.wants_all_classes
    assert_near(trainer.model.state_dict(), exact.model.state_dict(), tolerance=2e-6)


def test_it_samples_again_once_a_sample_will_do(make_trainer):
    trainer = make_trainer(*models(), **settings(8, gradient_error=0.3))
    trainer.distiller.sampler.budget.wants_all_classes = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert not trainer.distiller.wants_all_classes
    assert all(0 < error < 1 for error in logs(trainer, "dis/gradient_error"))


def test_a_resumed_training_has_the_same_sizes(make_trainer, tmp_path):
    common = settings(12, gradient_error=0.2, save_strategy="steps", save_steps=5)
    whole = make_trainer(*models(), **common)
    whole.train()
    resumed = make_trainer(*models(), **common)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    name = "dis/num_shared_classes"
    assert logs(whole, name) == logs(resumed, name) and len(set(logs(whole, name))) > 1
    assert_near(resumed.model.state_dict(), whole.model.state_dict(), tolerance=0)


def test_from_stored_targets_the_tail_alone_follows(make_trainer, tmp_path):
    student, teacher = models()
    data = labelled_images(64, CLASSES)
    cache = cache_teacher_targets(teacher, data, tmp_path / "cache", batch_size=8, show_progress=False)
    given = settings(12, gradient_error=0.3, train_dataset=data)
    trainer = make_trainer(student, None, teacher_cache=cache, **given)
    stored = trainer.distiller.sampler.num_stored
    trainer.train()
    sizes = logs(trainer, "dis/num_shared_classes")
    assert sizes[-1] < 512 and trainer.distiller.sampler.columns == stored + sizes[-1]


def test_of_a_language_model_the_ranked_tokens_stay(make_trainer):
    given = settings(4, gradient_error=0.05, train_dataset=labelled_tokens(64, 5000))
    trainer = make_trainer(llama(5000, seed=0), llama(5000, seed=1, spread=30), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert set(logs(trainer, "dis/num_sampled_classes")) == {16}
    assert logs(trainer, "dis/num_shared_classes")[-1] > 1024


def test_processes_take_the_same_sizes(make_trainer):
    """The errors of all processes are summed before the sizes are chosen."""
    trainer = make_trainer(*models(), **settings(1, gradient_error=0.2))
    sampler, seen = trainer.distiller.sampler, []

    def reduce(sums):
        seen.append(sums)
        return {"errors": torch.tensor([0.0, 0.04 * 512 / 300, 1.0])}

    sampler.follow(trainer.distiller.gradient_error(*_step(trainer)), reduce)
    assert seen[0]["errors"].shape == (3,) and sampler.num_shared == sampler.budget.sizes.num_shared


def _step(trainer):
    batch = {name: value for name, value in next(iter(trainer.get_train_dataloader())).items()}
    with trainer.distiller.step(batch) as step:
        step.loss(trainer.model.train()(**step.inputs))
    return step.sample, step.result


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"gradient_error is 0: it has to be above 0 and finite; 0.1 to 0.5 is usual"),
        (-0.1, r"gradient_error is -0.1: it has to be above 0"),
        (float("nan"), r"gradient_error is nan: it has to be above 0"),
        (float("inf"), r"gradient_error is inf: it has to be above 0 and finite"),
    ],
)
def test_values_out_of_range(make_trainer, value, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(gradient_error=value)


@pytest.mark.parametrize("other", [{"proposal": "topk"}, {"head_mode": "exact"}], ids=str)
def test_settings_whose_error_no_sample_shows(make_trainer, other):
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=rf"gradient_error is 0.3 and {name} is '{value}'.*set another {name}"):
        make_trainer(gradient_error=0.3, **other)
    with pytest.raises(TypeError, match=r"gradient_error is '0.3', a str: it has to be a number"):
        make_trainer(gradient_error="0.3")


def test_a_head_whose_error_cannot_be_estimated(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_dis.build._student_stream", lambda *_: None)  # as of several layers, or a sharded head
    with pytest.raises(ValueError, match=r"gradient_error is 0.3, and the error can be estimated only for.*Leave"):
        make_trainer(*models(), **settings(1, gradient_error=0.3))


def test_an_error_that_the_budget_measured_is_not_measured_again(make_trainer, monkeypatch):
    calls, measure = [], distiller.gradient_error
    monkeypatch.setattr(distiller, "gradient_error", lambda *given: calls.append(given) or measure(*given))
    trainer = make_trainer(*models(), **settings(1, gradient_error=0.3))
    trainer.train()
    assert len(calls) == len(logs(trainer, "dis/gradient_error")) == 1
