"""row_sparse_head through the real Trainer: dense AdamW where every class is sampled, lazy where not."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import assert_near, labelled_images, patched_modules, resnet, vit
from transformers import TrainerCallback

from hf_dis import DISDistillationTrainer, RowSparseAdamW
from hf_dis.distributed.processes import kept_from_ddp
from hf_dis.distributed.sums import average_rows
from hf_dis.trainer.checks import check_optimizer

ALL = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": 40}
PER_ITEM = {"num_shared_classes": 0, "num_sampled_classes": 2, "hard_label_weight": 0.0}
CALM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}  # Adam turns noise into steps where the gradient is small
BUILDS = {"ViT": vit, "ResNet": resnet}


def trained(trainer):
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("clipping", [{"max_grad_norm": 0.05}, {"max_grad_norm": 0.0}], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("num_tails", [1, 3])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_with_all_classes_sampled_it_is_dense_adamw(make_trainer, build, num_tails, clipping):
    """Parameters and logged gradient norms, with decay, a head rate of its own and a schedule."""
    settings = {"head_learning_rate": 3e-2, "max_steps": 6, "logging_steps": 1, "num_tails": num_tails}
    settings |= CALM | ALL | clipping
    dense, sparse = (make_trainer(build(40), row_sparse_head=flag, **settings) for flag in (False, True))
    assert_near(trained(sparse), trained(dense), 2e-6)
    assert type(sparse.optimizer.optimizer) is RowSparseAdamW and type(dense.optimizer.optimizer) is torch.optim.AdamW
    assert sparse.optimizer.state[sparse.head.module.weight]["step"].tolist() == [6.0] * 40
    norms = [[log["grad_norm"] for log in one.state.log_history if "loss" in log] for one in (dense, sparse)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and max(norms[0]) > 0.05


def test_it_is_the_default_where_the_trainer_makes_an_adamw(make_trainer):
    trainer = make_trainer(max_steps=2)
    assert trainer.distiller.row_sparse
    trainer.train()
    assert type(trainer.optimizer.optimizer) is RowSparseAdamW
    assert trainer.optimizer.param_groups[0]["catch_up"]


@pytest.mark.parametrize(("sizes", "gain"), [((4, 8), 1.175), ((12, 0), 1.0), ((20, 20), 1.0)])
def test_rows_gain_speed_where_shared_tails_leave_classes_out(make_trainer, sizes, gain):
    """Not in steps that compute all classes."""
    given = {"num_sampled_classes": sizes[0], "num_shared_classes": sizes[1], "rank_depth": 20}
    gains = []

    class Seen(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            gains.extend({group["gain"] for group in optimizer.param_groups})

    settings = {"exact_warmup_steps": 2, "head_learning_rate": 3e-2, "callbacks": [Seen()]}
    make_trainer(head_mode="sampled", **settings, **given).train()
    assert gains == pytest.approx([1.0, 1.0, gain, gain])


def test_the_gain_of_an_optimizer_of_ones_own_stays(make_trainer):
    given = {"num_sampled_classes": 4, "num_shared_classes": 8, "rank_depth": 20, "row_sparse_head": True}
    student = vit(40)
    optimizer = RowSparseAdamW(student.parameters(), gain=1.7)
    make_trainer(student, optimizers=(optimizer, None), head_mode="sampled", max_steps=2, **given).train()
    assert [group["gain"] for group in optimizer.param_groups] == [1.7]


def own_optimizer(self, model=None):
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
    return self.optimizer


def own_optimizer_and_scheduler(self, num_training_steps):
    self.create_scheduler(num_training_steps, own_optimizer(self))


METHODS = {
    "create_optimizer": own_optimizer,
    "create_optimizer_and_scheduler": own_optimizer_and_scheduler,
    "get_optimizer_cls_and_kwargs": staticmethod(lambda args, model=None: (torch.optim.NAdam, {"lr": 1e-3})),
}


@pytest.mark.parametrize("case", ["another optimizer", "an optimizer of the user's", *METHODS])
def test_elsewhere_the_default_is_dense(make_trainer, monkeypatch, case):
    if case in METHODS:
        monkeypatch.setattr(DISDistillationTrainer, case, METHODS[case])
    settings = {"optim": "sgd"} if case == "another optimizer" else {}

    def make(**more):
        student = vit(40)
        given = {"optimizers": (torch.optim.AdamW(student.parameters()), None)} if "optimizer of" in case else {}
        return make_trainer(student, max_steps=1, **given, **settings, **more)

    trainer = make()
    assert not trainer.distiller.row_sparse
    trainer.train()
    assert type(trainer.optimizer.optimizer) is not RowSparseAdamW
    with pytest.raises(ValueError, match=r"num_updated_classes is 4, and .* dense, since the optimizer .*: leave"):
        make(num_updated_classes=4)


def test_only_sampled_rows_are_touched(make_trainer):
    trainer = make_trainer(max_steps=3, row_sparse_head=True, weight_decay=0.1, **PER_ITEM)
    before = vit(40).classifier.weight
    sampled, sample = [], trainer.distiller.sampler.sample

    def record(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    trainer.distiller.sampler.sample = record
    trainer.train()
    ids = torch.cat([one.item_ids.flatten() for one in sampled]).unique()
    assert 0 < len(ids) < 40
    moved = (trainer.model.classifier.weight != before).any(1).nonzero()[:, 0]
    assert moved.tolist() == ids.tolist()


def test_a_part_of_the_sampled_classes_updates_the_head(make_trainer):
    """A class per item, 8 for each batch, the largest gradients first; all sampled classes give the same training."""
    settings = {**PER_ITEM, "num_sampled_classes": 10, "max_steps": 1, "row_sparse_head": True}
    with_label = settings["num_sampled_classes"] + 1
    everything, all_sampled, some = (
        make_trainer(num_updated_classes=number, **settings) for number in (None, with_label, 1)
    )
    whole = trained(everything)
    for name, value in trained(all_sampled).items():
        assert torch.equal(value, whole[name])
    trained(some)
    moved = [(one.model.classifier.weight != vit(40).classifier.weight).any(1).sum() for one in (some, everything)]
    assert 0 < moved[0] <= 8 < moved[1]


def test_the_student_learns(make_trainer):
    trainer = make_trainer(max_steps=40, eval_dataset=labelled_images(32, 40), row_sparse_head=True)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.3 * before["eval_kl"]
    assert patched_modules(trainer.model) == [] and not hasattr(trainer.model, "_ddp_params_and_buffers_to_ignore")


def test_accumulation_is_one_large_batch(make_trainer):
    student, results = vit(40), []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            copy.deepcopy(student),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            row_sparse_head=True,
            proposal="topk",
            num_shared_classes=0,
            **CALM,
        )
        results.append(trained(trainer))
    assert_near(results[1], results[0])
    assert_near(results[2], results[0])


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("layout", [{}, PER_ITEM], ids=["strata", "per item"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, build, layout):
    """Five steps of four in an epoch, stopped at step 2 with decay outstanding, resumed with another student."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "row_sparse_head": True, "weight_decay": 0.1}
    whole = make_trainer(build(40), head_learning_rate=3e-2, **saving, **layout)
    expected = trained(whole)
    resumed = make_trainer(build(40, seed=7), head_learning_rate=3e-2, **saving, **layout)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    found = resumed.model.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    states = [one.optimizer.state[one.head.module.weight] for one in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name])), name
    plain = load_file(f"{whole.args.output_dir}/checkpoint-4/model.safetensors")
    build(40).save_pretrained(f"{whole.args.output_dir}/plain")
    assert plain.keys() == load_file(f"{whole.args.output_dir}/plain/model.safetensors").keys()


@pytest.mark.parametrize("how", [{"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adamw_torch"}], ids=str)
def test_it_trains_with(make_trainer, how):
    trainer = make_trainer(row_sparse_head=True, max_steps=2, **how)
    trainer.train()
    assert not torch.equal(trainer.model.classifier.weight, vit(40).classifier.weight)
    assert trainer.model.classifier.weight.grad is None or trainer.model.classifier.weight.grad.is_sparse


def test_model_init_makes_the_student_that_is_trained(make_trainer):
    found = trained(make_trainer(model_init=lambda: vit(40), row_sparse_head=True))
    assert_near(found, trained(make_trainer(row_sparse_head=True)), 0)


def test_a_frozen_head_stays(make_trainer):
    student = vit(40)
    student.classifier.requires_grad_(False)
    found = trained(make_trainer(student, row_sparse_head=True))
    assert torch.equal(found["classifier.weight"], vit(40).classifier.weight)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_its_optimizer_may_be_given(make_trainer, how):
    student = vit(40)
    arguments = {"lr": 1e-2, "weight_decay": 0.0}
    given = {
        "optimizers": (RowSparseAdamW(student.parameters(), **arguments), None),
        "optimizer_cls_and_kwargs": (RowSparseAdamW, arguments),
    }[how]
    trained(make_trainer(student, row_sparse_head=True, max_steps=1, optim="adafactor", **{how: given}))


# Refusals


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_another_optimizer_is_refused(make_trainer, how):
    student = vit(40)
    given = {
        "optimizers": (torch.optim.SGD(student.parameters(), 0.1), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
    }[how]
    with pytest.raises(ValueError, match=r"the optimizer is SGD.*use hf_dis.RowSparseAdamW"):
        make_trainer(student, row_sparse_head=True, **{how: given})


def test_another_optim_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"optim is 'sgd': it has to be one of adamw_torch, adamw_torch_fused"):
        make_trainer(row_sparse_head=True, optim="sgd")


def test_an_exact_head_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"row_sparse_head is set and head_mode is 'exact'"):
        make_trainer(row_sparse_head=True, head_mode="exact")


@pytest.mark.parametrize("auto", [{"head_mode": "auto"}, {"num_sampled_classes": 64}], ids=["auto", "all"])
def test_a_head_that_falls_to_exact_trains_densely_with_a_warning(make_trainer, caplog, auto):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(row_sparse_head=True, max_steps=1, **auto)
    assert any("row_sparse_head has no effect" in record.message for record in caplog.records)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


def test_a_head_with_the_weight_of_a_dense_layer_is_refused(make_trainer):
    student = vit(40)
    student.other = torch.nn.Linear(16, 40)
    student.other.weight = student.classifier.weight
    with pytest.raises(ValueError, match=r"the head classifier is tied to other, and the Linear"):
        make_trainer(student, row_sparse_head=True, head_name="classifier")


def test_sharded_training_is_refused(make_trainer):
    trainer = make_trainer(row_sparse_head=True)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):  # FSDP of version 1
        setattr(trainer, name, True)
        with pytest.raises(ValueError, match="DeepSpeed and FSDP of version 1 shard dense gradients only"):
            trainer._make_distiller()
        setattr(trainer, name, False)


def test_settings_that_heads_that_fsdp2_shards_cannot_have(make_trainer, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    trainer = make_trainer(row_sparse_head=True)
    assert trainer.distiller.row_sparse and make_trainer().distiller.row_sparse is False
    trainer.is_fsdp_enabled = True
    check_optimizer(trainer)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="fp16 and row_sparse_head are set, and FSDP shards the head"):
        check_optimizer(trainer)
    monkeypatch.setattr(Accelerator, "mixed_precision", "bf16")
    trainer.args.offload_moments = True
    with pytest.raises(ValueError, match="offload_moments is set, and the head is spread over processes"):
        check_optimizer(trainer)


# One process


def test_one_process_only_coalesces():
    parameter, frozen = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    parameter.grad = torch.sparse_coo_tensor([[3, 1, 3]], torch.ones(3, 2), (5, 2))
    average_rows([parameter, frozen])
    assert parameter.grad.is_coalesced() and frozen.grad is None
    assert parameter.grad.to_dense()[:, 0].tolist() == [0, 1, 0, 2, 0]


def test_what_ddp_was_told_to_ignore_before_it_ignores_after():
    model = vit(40)
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    with kept_from_ddp(model, ["classifier"]):
        assert model._ddp_params_and_buffers_to_ignore == ["mine", "classifier.weight", "classifier.bias"]
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]


def test_the_moments_are_as_the_settings_say(make_trainer):
    trainer = make_trainer(offload_moments=True, moment_dtype="bfloat16", max_steps=2)
    found = trained(trainer)
    assert trainer.optimizer.optimizer.defaults["offload_moments"]
    weight = trainer.head.module.weight
    assert trainer.optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16
    expected = trained(make_trainer(max_steps=2))
    assert_near(found, expected, 1e-4)
    assert not torch.equal(found["classifier.weight"], expected["classifier.weight"])
    trainer.args.max_steps = 3  # a second training, with the optimizer of the first
    trainer._refresh_distiller()
    trainer.args.moment_dtype = "float32"
    with pytest.raises(ValueError, match=r"the optimizer was given without it: .* moment_dtype=torch.float32"):
        trainer._refresh_distiller()


def test_a_run_with_moments_in_bfloat16_is_resumed_to_the_bit(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "moment_dtype": "bfloat16"}
    whole = make_trainer(**settings)
    expected = trained(whole)
    resumed = make_trainer(vit(40, seed=7), **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_near(resumed.model.state_dict(), expected, 0)


DENSE = {
    "sgd": ({"optim": "sgd"}, "the gradient of the head is dense, .* set head_mode='sampled' and row_sparse_head"),
    "slower": ({"head_mode": "auto"}, "all classes are computed, .* set head_mode='sampled'"),
    "given": ({}, "the optimizer was given without it: give RowSparseAdamW the argument {name}={value}"),
}
SET = {"offload_moments": (True, "True"), "moment_dtype": ("bfloat16", "torch.bfloat16")}


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize(("settings", "told"), DENSE.values(), ids=DENSE)
def test_settings_of_moments_that_reach_no_optimizer_are_refused(make_trainer, monkeypatch, settings, told, name):
    if settings.get("head_mode") == "auto":
        monkeypatch.setattr("hf_dis.build._choose_mode", lambda *args, **keywords: ("exact", None))
    student = vit(40)
    given = {} if settings else {"optimizers": (RowSparseAdamW(student.parameters()), None)}
    value, of_optimizer = SET[name]
    with pytest.raises(ValueError, match=f"{name} is set, and {told.format(name=name, value=of_optimizer)}"):
        make_trainer(student, **{name: value}, **settings, **given)
