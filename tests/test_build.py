"""From models and arguments to an engine: what is chosen, and what is refused."""

import copy

import pytest
import torch
from tiny_models import bart, labelled_images, llama, vit

from hf_dis import DISArguments, build_distiller, cache_teacher_targets
from hf_dis import build as build_module
from hf_dis.autotune import HeadCosts
from hf_dis.sampling.cached_sampler import CachedSampler

CLASSES = 40
SAMPLING = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10}


def arguments(**settings):
    return DISArguments(**{**SAMPLING, **settings})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return cache_teacher_targets(
        vit(CLASSES, seed=1, spread=30), labelled_images(8, CLASSES), folder, depth=4, sample_size=5
    )


def test_the_defaults_are_those_of_the_task():
    image = build_distiller(vit(600), vit(600, seed=1), DISArguments(head_mode="sampled"))
    text = build_distiller(llama(2000), llama(2000, seed=1), DISArguments(head_mode="sampled"))
    samplers = image.sampler, text.sampler
    sizes = [(one.num_sampled, one.num_shared, one.num_tails, one.rank_depth) for one in samplers]
    assert sizes == [(96, 416, 16, 96), (16, 1024, 16, 16)]


def test_a_teacher_is_frozen_in_evaluation_mode_and_a_student_is_left_as_it_is():
    student, teacher = vit(CLASSES).train(), vit(CLASSES, seed=1).train()
    build_distiller(student, teacher, arguments())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())


def test_a_cache_is_trained_on_and_a_teacher_beside_it_evaluates(cache):
    teacher = vit(CLASSES, seed=1, spread=30)
    distiller = build_distiller(vit(CLASSES), teacher, arguments(rank_depth=None), teacher_cache=cache)
    assert isinstance(distiller.sampler, CachedSampler) and distiller.sampler.num_stored == 9
    assert distiller.online_teacher.model is teacher and distiller.teacher is not distiller.online_teacher


def test_auto_takes_what_the_clock_says(monkeypatch):
    for exact, mode in ((3.0, "sampled"), (1.0, "exact")):
        costs = HeadCosts(exact, 1.0)
        monkeypatch.setattr(build_module, "measure_costs", lambda *args, costs=costs, **kwargs: costs)
        assert build_distiller(vit(CLASSES), vit(CLASSES, seed=1), arguments(head_mode="auto")).mode == mode


def test_auto_measures_where_the_training_runs(monkeypatch):
    asked = {}

    def measured(num_classes, num_features, spec, **where):
        asked.update(where, classes=num_classes, features=num_features, spec=spec)
        return HeadCosts(1.0, 1.0)

    monkeypatch.setattr(build_module, "measure_costs", measured)
    device = torch.device("cpu", 0)
    build_distiller(
        vit(CLASSES), vit(CLASSES, seed=1), arguments(head_mode="auto", row_sparse_head=True), device=device
    )
    assert asked["device"] == device and asked["row_sparse"] and asked["spec"].num_sampled_classes == 6
    assert (asked["classes"], asked["features"], asked["num_items"], asked["stored"]) == (CLASSES, 16, 128, None)


def test_all_classes_sampled_is_exact_distillation(caplog):
    distiller = build_distiller(vit(CLASSES), vit(CLASSES, seed=1), arguments(num_sampled_classes=50, rank_depth=50))
    assert distiller.mode == "exact" and "num_sampled_classes is 50 and there are 40 classes" in caplog.text


def test_a_head_that_is_not_found_is_computed_whole_unless_it_was_asked_for():
    class TwoHeads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit(CLASSES)
            self.first, self.second = torch.nn.Linear(16, CLASSES), torch.nn.Linear(16, CLASSES)
            self.config = self.vit.config

    for mode in ("auto", "exact"):
        distiller = build_distiller(TwoHeads(), vit(CLASSES, seed=1), arguments(head_mode=mode))
        assert distiller.mode == "exact" and distiller.head_layers == ()
    with pytest.raises(ValueError, match=r"candidates are .*first.*second"):
        build_distiller(TwoHeads(), vit(CLASSES, seed=1), arguments())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"teacher": None}, "there is no teacher: pass a teacher, or teacher_cache"),
        ({"teacher": vit(41)}, "the teacher has 41 classes, the student 40"),
        ({"teacher": llama(CLASSES)}, "both have to be of one kind"),
        ({"arguments": arguments(rank_depth=5)}, "rank_depth is 5, and num_sampled_classes is 6"),
        ({"arguments": arguments(row_sparse_head=True), "is_sharded": True}, "DeepSpeed and FSDP of version 1"),
    ],
    ids=["no teacher", "other classes", "other task", "shallow ranking", "sharded"],
)
def test_models_that_do_not_fit_are_refused(keywords, message):
    given = {"teacher": vit(CLASSES, seed=1), "arguments": arguments(), **keywords}
    with pytest.raises(ValueError, match=message):
        build_distiller(vit(CLASSES), **given)


def test_the_embeddings_of_a_tied_row_sparse_head_are_found():
    distiller = build_distiller(bart(CLASSES), bart(CLASSES, seed=1), arguments(row_sparse_head=True))
    assert "model.shared" in distiller.tied_embeddings
    dense = build_distiller(bart(CLASSES), bart(CLASSES, seed=1), arguments())
    assert dense.tied_embeddings == ()


def test_a_student_with_layers_of_its_teacher_is_refused_naming_them():
    teacher = vit(CLASSES, seed=1)
    student = copy.deepcopy(teacher)
    student.classifier = teacher.classifier
    with pytest.raises(ValueError, match=r"share 2 parameters \(classifier.weight, classifier.bias\)"):
        build_distiller(student, teacher, arguments())
    with pytest.raises(ValueError, match="share"):
        build_distiller(teacher, teacher, arguments())


def test_a_cache_of_another_temperature_is_refused(cache):
    with pytest.raises(ValueError, match="temperature: the cache has 2, the training 3"):
        build_distiller(vit(CLASSES), None, arguments(temperature=3.0, rank_depth=None), teacher_cache=cache)
