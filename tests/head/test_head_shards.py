"""ShardedHead in one process: it takes the place of a linear layer, and what cannot be sharded is refused."""

import copy
import pickle
import re

import pytest
import torch
import transformers as hf
from fake_processes import one_of_four
from peft import LoraConfig, get_peft_model
from tiny_models import bart, gpt2, images, llama, vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_dis import DISLoss, ShardedHead, VocabShard, make_sampler, shard_head
from hf_dis.head.check import check_sharded_head
from hf_dis.head.sampled_linear import sampled_logits

C = 40


@pytest.fixture
def four_processes():
    """This process takes itself for the second of four; nothing is sent."""
    with one_of_four(rank=1):
        yield


def test_a_model_computes_the_same_with_its_head_sharded():
    model, batch = vit(C, spread=30), images(3)
    expected, whole = model(pixel_values=batch).logits, model.classifier
    head = shard_head(model, "classifier")
    assert model.classifier is head and isinstance(head, nn.Linear)
    torch.testing.assert_close(model(pixel_values=batch).logits, expected)
    assert copy.deepcopy(model).classifier.shard == head.shard
    item_ids, tail_ids = torch.randint(C, (3, 5)), torch.arange(0, C, 7)[None]
    features = torch.randn(3, head.in_features)
    found = head.sampled(features, item_ids, tail_ids)
    torch.testing.assert_close(found, sampled_logits(features, whole.weight, whole.bias, item_ids, tail_ids))


def test_each_process_holds_its_part(four_processes):
    model = vit(10)
    weight, bias = model.classifier.weight.detach().clone(), model.classifier.bias.detach().clone()
    head = shard_head(model, "classifier", init_device_mesh("cpu", (4,)))
    assert (head.shard.start, head.shard.stop, head.out_features, len(head.weight)) == (2, 5, 10, 3)
    assert torch.equal(head.weight, weight[2:5]) and torch.equal(head.bias, bias[2:5])
    assert model._ddp_params_and_buffers_to_ignore == ["classifier.weight", "classifier.bias"]
    assert "out_features=10" in repr(head) and "classes 2..4 here" in repr(head)


def test_a_new_head_is_never_whole_anywhere(four_processes):
    model = vit(2)
    before = torch.get_rng_state()
    head = shard_head(model, "classifier", num_classes=100_000, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(head.weight) == 25_000 and model.config.num_labels == model.num_labels == 100_000
    assert 0.015 < float(head.weight.std()) < 0.025 and not head.bias.any()  # initializer_range is 0.02
    on_meta = vit(2)
    on_meta.classifier = nn.Linear(16, 100_000, device="meta")
    assert torch.equal(shard_head(on_meta, "classifier", seed=3).weight, head.weight)


def test_the_rows_of_one_process_are_not_saved_as_the_whole(four_processes, tmp_path):
    model = vit(10)
    shard_head(model, "classifier")
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one.save_pretrained.args == (one,)
        for given in ((), (True, None)):
            with pytest.raises(ValueError, match=r"rows of this process alone.*trainer\.save_model"):
                one.save_pretrained(tmp_path, *given)
    assert not list(tmp_path.iterdir())


def test_a_sharded_head_of_one_process_is_saved_whole(tmp_path):
    model = vit(10)
    shard_head(model, "classifier")
    model.save_pretrained(tmp_path)
    assert torch.equal(
        hf.ViTForImageClassification.from_pretrained(tmp_path).classifier.weight, model.classifier.weight
    )


def test_fewer_classes_than_processes(four_processes):
    with pytest.raises(ValueError, match=r"head of 3 classes .* over 4 processes.*start 3 processes or fewer"):
        shard_head(vit(3), "classifier")


def test_a_mesh_of_other_processes(four_processes):
    mesh = init_device_mesh("cpu", (2, 2))
    with pytest.raises(ValueError, match=re.escape("the mesh has the shape (2, 2) and the run has 4 processes")):
        shard_head(vit(C), "classifier", mesh)


def test_processes_that_are_not_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, which are not joined.*start_processes"):
        shard_head(vit(C), "classifier")


def twice(model):
    shard_head(model, "classifier")
    return model


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (lambda: vit(C), "vit.layernorm", r"vit\.layernorm is a LayerNorm.*plain nn\.Linear"),
        (lambda: twice(vit(C)), "classifier", "sharded already: call shard_head once"),
        (lambda: gpt2(C), "lm_head", r"lm_head is tied to transformer\.wte.*untie"),
        (lambda: bart(C, tie_word_embeddings=False), "lm_head", "adds final_logits_bias"),
    ],
)
def test_heads_that_cannot_be_sharded(model, name, message):
    with pytest.raises(ValueError, match=message):
        shard_head(model(), name)


def test_a_bias_of_another_sharding(four_processes):
    model = vit(C)
    mesh = init_device_mesh("cpu", (4,))
    shards = torch.distributed.tensor.distribute_tensor(model.classifier.bias.detach(), mesh)
    model.classifier.bias = nn.Parameter(shards)
    with pytest.raises(ValueError, match="spread alike"):
        shard_head(model, "classifier")


def test_new_classes_of_a_language_model():
    with pytest.raises(ValueError, match=r"num_classes is 50, and LlamaForCausalLM has no num_labels"):
        shard_head(llama(C), "lm_head", num_classes=50)


# What a trainer refuses


def sharded(num_labels=C, seed=0):
    model = vit(num_labels, seed)
    shard_head(model, "classifier")
    return model


def test_a_sharded_teacher(make_trainer):
    with pytest.raises(ValueError, match=r"head classifier of the teacher is sharded.*keep the teacher whole"):
        make_trainer(teacher=sharded(seed=1))


def test_a_probe_of_a_sharded_head(make_trainer):
    with pytest.raises(ValueError, match=r"probe_steps is 3, but the output head is sharded.*set probe_steps to 0"):
        make_trainer(sharded(), probe_steps=3)


def test_a_sharded_head_in_adapters(make_trainer):
    student = get_peft_model(sharded(), LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(ValueError, match=r"sharded layers are .*without adapters.*leave PEFT out"):
        make_trainer(student)


def test_a_head_that_was_sharded_before_the_processes_were_joined(monkeypatch):
    student = sharded()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"held by 1 processes and the run has 2: call shard_head after"):
        check_sharded_head(student, None, ["classifier"])


def test_a_sharded_head_under_fsdp():
    with pytest.raises(ValueError, match=r"shards this head once more.*ignored_params.*plain data parallelism"):
        check_sharded_head(sharded(), None, ["classifier"], is_sharded=True)


def test_a_sharded_head_that_fsdp2_shards_too(four_processes):
    student = sharded()
    fully_shard(student)
    with pytest.raises(ValueError, match=r"shards this head once more.*ignored_params"):
        check_sharded_head(student, None, ["classifier"], is_sharded=True)
    student = sharded()
    fully_shard(student, ignored_params={*student.classifier.parameters()})
    check_sharded_head(student, None, ["classifier"], is_sharded=True)


def test_a_student_outside_transformers(make_trainer):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = hf.ViTConfig(num_labels=C)
            self.model = vit(C)

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values)

    student = Own()
    shard_head(student, "model.classifier")
    with pytest.raises(TypeError, match=r"student is a Own and its head is sharded.*PreTrainedModel"):
        make_trainer(student)


def test_half_precision(make_trainer, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    with pytest.raises(ValueError, match=r"fp16 is set and the output head is sharded.*bf16=True"):
        make_trainer(sharded())


def test_shards_of_a_loss_that_do_not_hold_every_class_once():
    loss = DISLoss(make_sampler(C), shard=VocabShard(0, 30))
    with pytest.raises(ValueError, match=r"hold the classes \[\[0, 30\]\].*there are 40"):
        loss(torch.randn(2, 5), torch.randn(30, 5), None, torch.randn(2, C))
    with pytest.raises(ValueError, match="weight has 40 rows, and the shard holds 30 classes"):
        loss(torch.randn(2, 5), torch.randn(C, 5), None, torch.randn(2, C))


def test_auto_mode_samples_without_timing(make_trainer, caplog):
    trainer = make_trainer(sharded(), head_mode="auto")
    assert trainer.distiller.mode == "sampled" and trainer.distiller.costs is None
    assert type(trainer.head.module) is ShardedHead
