"""The extension points: compute_loss with super, and the two recipes of docs/subclassing.md, taken from the page."""

import copy
from pathlib import Path

import pytest
import torch
from pages import ROOT, run_page
from safetensors.torch import load_file
from tiny_models import labelled_images, vit

from hf_dis import DISConfig, DISDistillationTrainer

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        torch.manual_seed(0)
        return run_page(ROOT / "docs" / "subclassing.md", {})


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# compute_loss


class Penalised(DISDistillationTrainer):
    """Adds the squared norm of the head's weight, as a user would."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 100 * self.head.module.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_an_override_that_calls_super_adds_to_the_loss(make_trainer, tmp_path, mode):
    plain = make_trainer(vit(40), head_mode=mode, max_steps=1, logging_steps=1, **SGD)
    student = vit(40)
    norm = 100 * student.classifier.weight.square().sum().item()
    args = copy.deepcopy(plain.args)
    items = labelled_images(32, 40)
    trainer = Penalised(student, vit(40, seed=1, spread=30), args, train_dataset=items, eval_dataset=items)
    before = student.classifier.weight.clone()
    plain.train()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0] + norm, rel=1e-4) and norm > 1
    expected = plain.model.classifier.weight - 0.1 * 200 * before
    torch.testing.assert_close(student.classifier.weight, expected, rtol=0, atol=1e-5)
    assert trainer.evaluate()["eval_kl"] > 0


# The feature loss


def feature_trainer(page, output, **keywords):
    student = page["ProjectingViT"](
        page["ViTConfig"](**page["shape"], hidden_size=16, intermediate_size=32, projection_size=32)
    )
    args = DISConfig(output_dir=str(output), use_cpu=True, **page["settings"] | {"logging_steps": 1} | keywords)
    return page["FeatureDistillationTrainer"](student, page["teacher"], args, train_dataset=page["train_dataset"])


def test_the_feature_recipe_brings_the_features_nearer(page, tmp_path):
    weightless = feature_trainer(page, tmp_path, logging_steps=5)
    weightless.feature_weight = 0.0
    weightless.train()
    logged, without = (
        [log["feature_loss"] for log in trainer.state.log_history if "feature_loss" in log]
        for trainer in (page["feature_trainer"], weightless)
    )
    assert len(logged) == 4 and logged[-1] < 0.8 * logged[0]
    assert without[-1] > 1.2 * logged[-1]


def test_the_feature_loss_is_added_and_trains_the_projection(page, tmp_path):
    trainer = feature_trainer(page, tmp_path, head_mode="exact", max_steps=1)
    before = trainer.model.projection.weight.clone()
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "feature_loss" in log]
    expected = 0.9 * log["kd_loss"] + 0.1 * log["ce_loss"] + log["feature_loss"]
    assert log["loss"] == pytest.approx(expected, rel=1e-4) and log["feature_loss"] > 0.1
    assert not torch.equal(before, trainer.model.projection.weight)


def test_accumulation_weighs_the_feature_loss_as_one_large_batch(page, tmp_path):
    results = []
    for name, size, steps, more in (("one", 8, 1, {}), ("two", 4, 2, {}), ("probed", 8, 1, {"probe_steps": 1})):
        torch.manual_seed(0)
        trainer = feature_trainer(
            page,
            tmp_path / name,
            num_sampled_classes=40,
            rank_depth=40,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **SGD,
            **more,
        )
        trainer.train()
        results.append(trainer.model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(results[2][name], value, rtol=0, atol=0, msg=name)


def test_the_plain_class_loads_the_saved_student(page, tmp_path):
    trainer = feature_trainer(page, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    plain = page["ViTForImageClassification"].from_pretrained(tmp_path).eval()
    pixels = torch.randn(3, 3, 8, 8)
    assert torch.equal(plain(pixels).logits, trainer.model.eval()(pixels).logits)


# The proposal


def test_the_proposal_recipe_learns_logs_and_is_sampled_from(page):
    trainer, proposal = page["trainer"], page["trainer"].distiller.sampler.proposal
    logged = [log["dis/power"] for log in trainer.state.log_history if "dis/power" in log]
    assert len(logged) == 4 and logged[-1] == pytest.approx(proposal.power.item()) and len(set(logged)) > 1
    assert type(proposal).__name__ == "PowerLawProposal" and 0.5 < proposal.power < 2


def test_the_proposal_recipe_resumes(page, tmp_path):
    def make(name):
        settings = page["settings"] | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "use_cpu": True}
        args = DISConfig(output_dir=str(tmp_path / name), **settings)
        trainer = DISDistillationTrainer(vit(40), page["teacher"], args, train_dataset=page["train_dataset"])
        layout = (
            trainer.distiller.num_classes,
            trainer.distiller.sampler.num_ranks,
            trainer.distiller.sampler.rank_depth,
        )
        trainer.distiller.sampler.proposal = page["PowerLawProposal"](*layout)
        return trainer

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    saved = load_file(checkpoint / "dis_state_0.safetensors")
    assert (saved["sums"] > 0).all() and not torch.equal(saved["sums"], whole.distiller.sampler.proposal.sums)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.distiller.sampler.proposal.sums, whole.distiller.sampler.proposal.sums)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_with_all_classes_sampled_the_proposal_recipe_is_exact_distillation(page, make_trainer):
    results = []
    for own in (False, True):
        trainer = make_trainer(num_sampled_classes=10, rank_depth=10, num_shared_classes=40, **SGD)
        if own:
            trainer.distiller.sampler.proposal = page["PowerLawProposal"](40, 10, 10)
        trainer.train()
        results.append(trainer.model.classifier.weight)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
