"""Several trainings by one trainer: changed settings are used throughout, and trials share nothing."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import labelled_images, labelled_tokens, llama, vit
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_dis import RowSparseAdamW

# A step is left over after the last log, whose means the next training must not find.
SETTINGS = {"logging_steps": 3, "max_steps": 4}


@pytest.fixture(autouse=True)
def without_a_backend(monkeypatch):
    """Trainer asks the backend's package only for the values of a trial."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)


def init():
    return vit(40, seed=0)


def run_trial(trainer, **values):
    """A trial as Trainer.hyperparameter_search runs it."""
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    trainer.hp_name = None
    trainer.train(trial=SimpleNamespace(number=0, params=values))


def result(trainer):
    """Parameters, the sampler's state, and all that was logged of the last training but the times."""
    state = {**trainer.model.state_dict(), **trainer.distiller.sampler.state_dict()}
    times = ("runtime", "per_second")
    logs = [{name: v for name, v in log.items() if not name.endswith(times)} for log in trainer.state.log_history]
    return {name: value.clone() for name, value in state.items()}, logs


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys() and found[1] == expected[1]
    assert [name for name, value in found[0].items() if not torch.equal(value, expected[0][name])] == []


TRIALS = {
    "temperature": {"temperature": 4.0},
    "nothing": {},
    "weight of the labels": {"hard_label_weight": 0.6},
    "sizes": {"num_sampled_classes": 3, "rank_depth": 5, "num_shared_classes": 12, "num_tails": 2},
    "per item": {"num_shared_classes": 0, "num_tails": 1, "design": "replacement"},
    "proposal": {"proposal": "teacher", "proposal_floor": 0.5},
    "exact": {"head_mode": "exact"},
    "warm-up": {"exact_warmup_steps": 2.0},
    "rates": {"learning_rate": 3e-3, "head_learning_rate": 5e-2},
    "row-sparse": {"row_sparse_head": True},
    "seed": {"seed": 7},
}


@pytest.mark.parametrize("name", TRIALS)
def test_a_second_trial_is_the_run_of_a_fresh_trainer_to_the_bit(make_trainer, name):
    fresh = make_trainer(model_init=init, **SETTINGS, **TRIALS[name])
    fresh.train()
    trainer = make_trainer(model_init=init, **SETTINGS, num_tails=3)
    run_trial(trainer, temperature=3.0, learning_rate=1e-2)
    first, before = trainer.distiller, result(trainer)
    others = {"temperature": 2.0, "num_tails": None, "learning_rate": 1e-2}
    for field, value in {**others, **TRIALS[name]}.items():  # Trainer casts a value to the type of the former value
        setattr(trainer.args, field, value)
    run_trial(trainer, **TRIALS[name])
    assert trainer.distiller is not first and trainer.distiller.student is trainer.model
    assert_same(result(trainer), result(fresh))
    assert before[1] != result(trainer)[1], "both trials are alike: the test tests nothing"


def test_the_optimizer_of_a_row_sparse_head_has_the_rate_of_its_trial(make_trainer):
    """And a dense head that follows has the optimizer of ``optim``."""
    trainer = make_trainer(model_init=init, row_sparse_head=True, max_steps=1, lr_scheduler_type="constant")
    for rate in (1e-2, 1e-3):
        run_trial(trainer, learning_rate=rate)
        assert type(trainer.optimizer.optimizer) is RowSparseAdamW
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}
    run_trial(trainer, row_sparse_head=False)
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


def test_a_row_sparse_head_needs_its_optimizer_in_later_trainings_too(make_trainer):
    trainer = make_trainer(model_init=init, optim="sgd", max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"optim is 'sgd': it has to be one of adamw_torch"):
        run_trial(trainer, row_sparse_head=True)
    going_on = make_trainer(max_steps=1, row_sparse_head=False)
    going_on.train()
    going_on.args.row_sparse_head = True
    with pytest.raises(ValueError, match=r"the optimizer is AdamW.*use hf_dis.RowSparseAdamW"):
        going_on.train()


@pytest.mark.parametrize("head_mode", ["sampled", "exact"])
def test_teacher_sampler_and_loss_have_the_changed_temperature(make_trainer, dense_kd, head_mode):
    """All classes are computed, so the first loss is known from the definition."""
    items = labelled_images(8, 40)
    layout = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": 40, "head_mode": head_mode}
    settings = {"hard_label_weight": 0.0, "train_dataset": items, "max_steps": 1, "logging_steps": 1}
    teacher = vit(40, seed=1, spread=30)
    trainer = make_trainer(teacher=teacher, model_init=init, **layout, **settings)
    pixels = torch.stack([item["pixel_values"] for item in items])
    logits, target = (model.eval()(pixels).logits.detach() for model in (init(), teacher))
    for temperature in (1.0, 5.0):
        run_trial(trainer, temperature=temperature)
        expected = dense_kd(logits, target, temperature).mean().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        assert trainer.distiller.arguments.temperature == trainer.distiller.teacher.temperature == temperature


def test_an_evaluation_has_the_changed_temperature(make_trainer):
    items = labelled_images(16, 40)
    trainer = make_trainer(eval_dataset=items)
    before = trainer.evaluate()
    trainer.args.temperature = 5.0
    found, expected = trainer.evaluate(), make_trainer(eval_dataset=items, temperature=5.0).evaluate()
    assert found["eval_kd_loss"] == expected["eval_kd_loss"] != before["eval_kd_loss"]


def test_a_value_that_a_trial_must_not_have_is_refused(make_trainer):
    trainer = make_trainer(model_init=init)
    with pytest.raises(ValueError, match=r"temperature is -1.0: it has to be above 0"):
        run_trial(trainer, temperature=-1.0)


class AtStart(TrainerCallback):
    def __init__(self, record):
        self.record = record

    def on_train_begin(self, *args, **kwargs):
        self.record()


def test_a_second_training_goes_on_with_what_the_proposal_learnt(make_trainer):
    trainer = make_trainer(**SETTINGS)
    distiller, states = trainer.distiller, []

    def remember():
        states.append({name: value.clone() for name, value in distiller.sampler.state_dict().items()})

    trainer.add_callback(AtStart(remember))
    trainer.train()
    remember()
    trainer.train()
    remember()
    at_start, after_first, at_second, at_end = states
    assert trainer.distiller is distiller
    assert all(torch.equal(value, after_first[name]) for name, value in at_second.items())
    for before, after in ((at_start, after_first), (at_second, at_end)):
        assert [name for name in before if torch.equal(before[name], after[name])] == ["not_finite"]


def test_the_logs_of_a_second_training_are_its_own(make_trainer):
    """A mean over steps of both trainings would not be that of the loss, which Trainer starts again."""
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.9 * log["kd_loss"] + 0.1 * log["ce_loss"], rel=1e-4)


def test_a_second_training_without_supervised_tokens_is_refused(make_trainer):
    items = labelled_tokens(16, 50)
    trainer = make_trainer(llama(50), llama(50, seed=1), train_dataset=items, max_steps=2)
    trainer.train()
    trainer.train_dataset = [{**item, "labels": torch.full_like(item["labels"], -100)} for item in items]
    with pytest.raises(ValueError, match="no token of the training data is supervised"):
        trainer.train()


def test_a_student_that_training_has_wrapped_is_no_new_student(make_trainer):
    """FSDP leaves its wrapper in ``model``; the proposal that was learnt stays."""
    trainer = make_trainer(eval_dataset=labelled_images(8, 40))
    distiller, expected = trainer.distiller, trainer.evaluate()["eval_kl"]
    trainer.model = torch.nn.DataParallel(trainer.model)
    trainer.model.config = trainer.model.module.config
    assert trainer.evaluate()["eval_kl"] == expected and trainer.distiller is distiller


def test_another_student_is_told_from_the_last(make_trainer):
    trainer = make_trainer()
    trainer.model = vit(40, seed=3)
    features = trainer.extract_features(labelled_images(4, 40))
    expected = make_trainer(vit(40, seed=3)).extract_features(labelled_images(4, 40))
    assert torch.equal(features, expected) and trainer.distiller.student is trainer.model
