"""Models, data and settings that are refused before training, with the value and the remedy."""

import logging
from functools import partial

import pytest
import torch
import transformers as hf
from accelerate.parallelism_config import ParallelismConfig
from tiny_models import SMALL, bert_mlm, gpt2, labelled_images, labelled_tokens, patched_modules, vit
from torch import nn

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.autotune import HeadCosts
from hf_dis.teacher.loading import load_teacher


def test_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="no teacher: pass teacher_model"):
        DISDistillationTrainer(vit(40), args=DISConfig(output_dir=str(tmp_path), use_cpu=True))


def test_the_student_as_its_own_teacher(make_trainer):
    student = vit(40)
    with pytest.raises(ValueError, match=r"teacher and student share 24 parameters .*needs parameters of its own"):
        make_trainer(student, student)


def test_other_numbers_of_classes(make_trainer):
    with pytest.raises(ValueError, match=r"teacher has 41 classes, the student 40.*set num_labels"):
        make_trainer(teacher=vit(41))


class WithoutConfig(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


def test_a_teacher_without_config_is_taken_and_its_answers_checked(make_trainer):
    make_trainer(teacher=WithoutConfig(vit(40)), max_steps=1).train()
    with pytest.raises(ValueError, match="teacher has logits of 41 classes, the student of 40"):
        make_trainer(teacher=WithoutConfig(vit(41))).train()


def test_a_student_without_config(make_trainer):
    with pytest.raises(ValueError, match=r"task of WithoutConfig is not known.*config with num_labels.*DISLoss"):
        make_trainer(WithoutConfig(vit(40)))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_problem_types(make_trainer, problem_type):
    with pytest.raises(ValueError, match=f"problem_type is '{problem_type}'.*single-label"):
        make_trainer(vit(40, problem_type=problem_type))


def test_a_single_output(make_trainer):
    with pytest.raises(ValueError, match=r"num_labels is 1 .*two classes or more"):
        make_trainer(vit(1), vit(1))


def test_a_teacher_of_another_kind(make_trainer):
    with pytest.raises(ValueError, match=r"is a masked language model, the student.* a causal language model"):
        make_trainer(gpt2(50), bert_mlm(50), train_dataset=labelled_tokens(8, 50))


def test_one_class_a_token_where_there_is_one_an_example(make_trainer):
    items = [{"pixel_values": torch.zeros(3, 8, 8), "labels": torch.arange(5)} for _ in range(8)]
    with pytest.raises(ValueError, match=r"labels have shape \(8, 5\).*one class id per example"):
        make_trainer(train_dataset=items).train()


def test_compute_loss_func(make_trainer):
    with pytest.raises(ValueError, match=r"compute_loss_func.*override compute_loss"):
        make_trainer(compute_loss_func=lambda *args: 0)


def test_label_smoothing(make_trainer):
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1.*set it to 0"):
        make_trainer(label_smoothing_factor=0.1)


def test_liger_kernels(make_trainer):
    with pytest.raises(ValueError, match=r"use_liger_kernel.*False"):
        make_trainer(use_liger_kernel=True)


def test_an_optimizer_of_ones_own_beside_head_learning_rate(make_trainer):
    student = vit(40)
    optimizers = (torch.optim.SGD(student.parameters(), 0.1), None)
    with pytest.raises(ValueError, match=r"head_learning_rate.*parameter group"):
        make_trainer(student, optimizers=optimizers, head_learning_rate=0.1)
    make_trainer(student, optimizers=optimizers, max_steps=1).train()


def test_plain_training_arguments(tmp_path):
    args = hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"TrainingArguments: .*needs a DISConfig"):
        DISDistillationTrainer(vit(40), vit(40), args)


def test_several_gpus_in_one_process(make_trainer, monkeypatch):
    monkeypatch.setattr(DISConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        make_trainer()


def deit():
    config = hf.DeiTConfig(image_size=8, patch_size=4, num_labels=40, **SMALL)
    return hf.DeiTForImageClassificationWithTeacher(config)


@pytest.fixture
def set_up(monkeypatch):
    """Changes a trainer once its accelerator is made."""
    create = DISDistillationTrainer.create_accelerator_and_postprocess

    def patch(change):
        def created(trainer):
            create(trainer)
            change(trainer)

        monkeypatch.setattr(DISDistillationTrainer, "create_accelerator_and_postprocess", created)

    return patch


def test_processes_of_deepspeed_that_accelerate_does_not_count(make_trainer, monkeypatch, set_up):
    """As on a machine without an accelerator, where each process takes itself for the only one."""

    def count_two(trainer):
        trainer.is_deepspeed_enabled = True
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    set_up(count_two)
    with pytest.raises(ValueError, match=r"DeepSpeed runs 2 processes and accelerate counts 1.*use_cpu=True"):
        make_trainer()


PARALLELISM = {"cp_size": "context", "sp_size": "sequence"}


@pytest.mark.parametrize("size", PARALLELISM)
def test_parallelism_that_splits_sequences(make_trainer, size):
    with pytest.raises(ValueError, match=rf"{size} is 2: {PARALLELISM[size]} parallelism .*Set {size} to 1"):
        make_trainer(parallelism_config=ParallelismConfig(**{size: 2}))
    make_trainer(parallelism_config=ParallelismConfig())


@pytest.mark.parametrize("size", PARALLELISM)
def test_parallelism_that_a_launcher_sets(make_trainer, monkeypatch, set_up, size):
    """accelerate reads the sizes from the environment, so DISConfig does not have them."""
    config = ParallelismConfig(**{size: 2})
    set_up(lambda trainer: monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", config))
    with pytest.raises(ValueError, match=rf"{size} is 2: {PARALLELISM[size]} parallelism .*Set {size} to 1"):
        make_trainer()


def test_tensor_parallelism_of_a_student_that_is_whole(make_trainer, monkeypatch, set_up):
    expected = r"tp_size is 2: .*needs a student that transformers has spread.*tp_size=2.*or set tp_size to 1"
    set_up(lambda trainer: setattr(trainer.model, "_tp_size", 2))
    with pytest.raises(ValueError, match=expected):
        make_trainer()
    config = ParallelismConfig(tp_size=2)
    set_up(lambda trainer: monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", config))
    with pytest.raises(ValueError, match=expected):
        make_trainer()


def test_a_probe_of_two_heads(make_trainer):
    with pytest.raises(ValueError, match=r"probe_steps is 2, but .* cls_classifier and distillation_classifier"):
        make_trainer(deit(), probe_steps=2)
    make_trainer(deit(), max_steps=1).train()


def test_a_head_that_is_not_found_is_no_matter_where_all_classes_are_computed(make_trainer):
    student = vit(16)  # as many classes as hidden units
    given = {"teacher": vit(16), "num_sampled_classes": 2, "train_dataset": labelled_images(8, 16), "max_steps": 1}
    with pytest.raises(ValueError, match=r"the output head of .* was not found"):
        make_trainer(student, **given)
    make_trainer(student, head_mode="exact", **given).train()
    with pytest.raises(ValueError, match=r"the output head of .* was not found"):
        make_trainer(student, head_mode="exact", head_learning_rate=0.1, **given)


def test_an_unknown_head_name(make_trainer):
    with pytest.raises(ValueError, match=r"head_name is 'fc'.*\['classifier'\]"):
        make_trainer(head_name="fc")


def test_a_model_that_changes_the_heads_output(make_trainer):
    class Scaled(hf.ViTForImageClassification):
        def forward(self, pixel_values):
            outputs = super().forward(pixel_values)
            outputs.logits = outputs.logits * torch.linspace(0.5, 1, outputs.logits.shape[1])
            return outputs

    trainer = make_trainer(Scaled(vit(40).config))
    with pytest.raises(ValueError, match=r"Scaled does not return the output of 'classifier'.*head_mode='exact'"):
        trainer.train()
    assert patched_modules(trainer.model) == []


@pytest.mark.parametrize("label", [40, -1, -100])
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_labels_out_of_range(make_trainer, label, mode):
    items = labelled_images(8, 40)
    items[3]["labels"] = label
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are outside 0..39.*check num_labels"):
        make_trainer(train_dataset=items, head_mode=mode).train()


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_a_teacher_that_answers_nan(make_trainer, mode):
    teacher = vit(40, seed=1)
    with torch.no_grad():
        teacher.classifier.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"items \[0, 1, 2, 3, 4, 5, 6, 7\] of the batch"):
        make_trainer(teacher=teacher, head_mode=mode).train()


def warnings_of(make, caplog):
    with caplog.at_level(logging.INFO):
        caplog.clear()
        trainer = make()
        # The line that announces the timing is test_waiting's.
        ours = [one for one in caplog.records if one.name.startswith("hf_dis") and one.module != "progress"]
        return trainer, [record.message for record in ours]


@pytest.mark.parametrize("mode", ["auto", "sampled", "exact"])
def test_more_classes_than_there_are_is_exact_with_one_warning(make_trainer, caplog, mode):
    trainer, (warning,) = warnings_of(partial(make_trainer, num_sampled_classes=64, head_mode=mode), caplog)
    assert trainer.distiller.mode == "exact"
    assert "num_sampled_classes is 64 and there are 40 classes" in warning and "exact" in warning


def test_all_classes_is_exact(make_trainer):
    assert make_trainer(num_sampled_classes=40, head_mode="auto").distiller.mode == "exact"


@pytest.mark.parametrize(("costs", "mode"), [((3.0, 2.0), "sampled"), ((2.2, 2.0), "exact"), ((1.0, 2.0), "exact")])
def test_auto_says_once_what_it_chose_and_why(make_trainer, caplog, monkeypatch, costs, mode):
    monkeypatch.setattr("hf_dis.build.measure_costs", lambda *args, **layout: HeadCosts(*costs))
    trainer, (message,) = warnings_of(partial(make_trainer, head_mode="auto"), caplog)
    assert trainer.distiller.mode == mode and f"chose '{mode}' for 40 classes" in message
    assert all(f"{cost:g} ms" in message for cost in costs)


def test_auto_is_exact_where_the_head_cannot_be_told(make_trainer, caplog):
    student = vit(40)
    student.other = torch.nn.Linear(3, 40)
    trainer, (message,) = warnings_of(partial(make_trainer, student, head_mode="auto"), caplog)
    assert trainer.distiller.mode == "exact" and "classifier" in message and "other" in message
    with pytest.raises(ValueError, match="head_name is 'missing'"):
        make_trainer(student, head_mode="auto", head_name="missing")


def test_more_sampled_classes_than_ranks_to_sample_from(make_trainer):
    with pytest.raises(ValueError, match=r"rank_depth is 10, and num_sampled_classes is 20: .*set rank_depth"):
        make_trainer(num_sampled_classes=20, num_shared_classes=8, rank_depth=10)


def test_a_checkpoint_of_an_unknown_class(tmp_path):
    config = vit(40).config
    config.architectures = ["MyViT"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has under .architectures. MyViT, .*pass the model"):
        load_teacher(str(tmp_path))
