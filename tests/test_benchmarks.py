"""The benchmarks: the summaries of their records, and a run of each at sizes too small to measure anything."""

import argparse
import dataclasses
import json
import sys

import cache_match
import cache_quality
import cache_speed
import cache_tasks
import common
import crossover
import estimator_error
import glyph_task
import head_scaling
import language_model
import plots
import proposal_variants
import pytest
import quality_vs_k
import torch
import training_step
from divergences_by_definition import OTHERS, definition
from sampling_methods import Method, Screened, truncations, with_certain
from timing import Stopwatch
from torch import nn

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.data import load_glyphs
from hf_dis.head.sampled_linear import sampled_columns

EXACT = ["exact", "exact (materialised)"]


def test_the_crossover_lies_between_the_sizes_around_it():
    records = [{"classes": classes, "ratio": classes / 4_000} for classes in (1_000, 3_000, 10_000)]
    assert crossover.crossover(records) == pytest.approx(4_000)
    assert crossover.crossover(records[:2]) is None


def test_exact_is_extrapolated_from_the_most_classes_it_ran_with():
    runs = [(1_000, 5.0, False), (10_000, 40.0, False), (100_000, 1.0, True)]
    records = [{"method": "exact", "classes": c, "ms": ms, "extrapolated": guess} for c, ms, guess in runs]
    assert head_scaling.extrapolated(records, 1_000_000) == pytest.approx(4_000)


def test_the_exact_methods_of_a_head_have_the_same_gradient():
    steps = head_scaling.Steps(300, "default")
    gradients = []
    for method in [*EXACT, "chunked_exact"]:
        head_scaling.METHODS[method](steps)
        gradients.append(steps.weight.grad)
        steps.weight.grad = None
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", language_model.BETAS)
@pytest.mark.parametrize(("teacher", "peers"), [("given", []), ("online", ["trl_chunked", "trl_gkd"])])
def test_the_exact_methods_of_a_language_model_have_the_same_gradient(teacher, peers, divergence):
    steps = language_model.Steps(300, 16, 8, teacher, teacher_width=12, divergence=divergence)
    gradients = [torch.autograd.grad(steps.loss(method), steps.weight)[0] for method in [*EXACT, *peers]]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_quality_is_the_mean_over_seeds_and_time_the_latest():
    run = {"method": "dis", "head_rate": 20, "logits": 128, "rows_touched": 99, "top5": 0.9, "kl": 0.2}
    records = [
        {**run, "seed": 0, "top1": 0.60},
        {**run, "seed": 1, "top1": 0.62},
        {**run, "seed": 0, "head_rate": 5, "top1": 0.5},
        {"method": "dis", "student_ms": 9.0},
        {"method": "dis", "student_ms": 7.0},
    ]
    best, other = quality_vs_k.summary(records)
    assert (best["seeds"], best["top1"], best["spread"]) == (2, pytest.approx(0.61), pytest.approx(0.02))
    assert (other["head_rate"], other["seeds"], other["student_ms"]) == (5, 1, 7.0)
    assert "| dis | 128 (3.8%) | 99 | x20 | 2 | 61.0% |" in quality_vs_k.table([best, other])


def test_sizes_are_those_that_a_training_uses():
    sizes = {name: quality_vs_k.sizes(settings) for name, settings in quality_vs_k.METHODS.items()}
    assert sizes["exact"] == {"logits": 3375, "rows_touched": 3375}
    assert sizes["dis 128 row-sparse"] == {"logits": 128, "rows_touched": 256 * 128}
    assert sizes["several tails 32+4x512"] == {"logits": 544, "rows_touched": 256 * 32 + 4 * 512}
    assert sizes["several tails 32+4x512 row-sparse"] == {"logits": 544, "rows_touched": 256 * 16}
    assert sizes["dis 128 warm-up"]["logits"] == round(0.1 * 3375 + 0.9 * 128)


def test_the_students_side_of_a_step_is_all_but_the_teachers():
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    def chunks(inputs, items, number):
        for seconds in (3, 4):
            work(seconds)
            yield seconds

    teacher = quality_vs_k.TimedStream(chunks, Stopwatch(lambda: now))
    times = quality_vs_k.StudentTime(teacher, Stopwatch(lambda: now))
    for _ in range(2):
        times.on_step_begin(None, None, None)
        for _ in teacher({}, None):
            work(10)
        work(5)
        times.on_step_end(None, None, None)
    assert times.milliseconds == [25_000, 25_000]


def main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_the_timings_run_and_are_plotted(tmp_path, monkeypatch, capsys):
    scaling, crossing = tmp_path / "scaling.json", tmp_path / "crossing.json"
    few = ["--classes", 300, 900, "--repeats", 1]
    main(head_scaling, monkeypatch, *few, "--dense_up_to", 300, "--no_peaks", "--json", scaling)
    main(crossover, monkeypatch, *few, "--base_classes", 1200, "--json", crossing)
    assert "extrapolated" in capsys.readouterr().out
    methods = {record["method"] for record in json.loads(scaling.read_text())}
    assert {*EXACT, "chunked_exact", "partial_fc", "dis_dense", "dis_row_sparse"} <= methods
    main(plots, monkeypatch, "--head_scaling", scaling, "--crossover", crossing, "--output_dir", tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"head_scaling.svg", "crossover.svg"}


@pytest.mark.slow
def test_training_steps_run_and_are_plotted(tmp_path, monkeypatch, capsys):
    written = tmp_path / "steps.json"
    main(training_step, monkeypatch, "--classes", 700, "--steps", 1, "--rounds", 1, "--json", written)
    records = json.loads(written.read_text())
    assert [(record["method"], record["layout"]) for record in records] == list(training_step.METHODS)
    assert all(record["ratio_to_floor"] > 0 for record in records)
    assert "| all update |" in capsys.readouterr().out
    main(plots, monkeypatch, "--training_step", written, "--output_dir", tmp_path)
    assert (tmp_path / "training_step.svg").stat().st_size > 500


def test_both_exact_trainers_have_the_same_loss_and_gradient(tmp_path):
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    losses, gradients = [], []
    for method in EXACT:
        args = DISConfig(output_dir=tmp_path, head_mode="exact", hard_label_weight=0.0, use_cpu=True)
        kind = training_step.TRAINERS.get(method, DISDistillationTrainer)
        trainer = kind(training_step.regnet(60, 0), training_step.regnet(60, 1), args, train_dataset=[])
        loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, trainer.model.regnet.embedder.parameters())[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_steps_of_language_models_run(tmp_path, monkeypatch, capsys):
    written = tmp_path / "lm.json"
    sizes = ["--vocab", 1500, "--tokens", 64, "--width", 16, "--repeats", 1]
    main(language_model, monkeypatch, *sizes, "--methods", *EXACT, "dis", "--json", written)
    records = json.loads(written.read_text())
    assert [(r["teacher"], r["method"]) for r in records] == [
        (teacher, method) for teacher in ("given", "online") for method in (*EXACT, "dis")
    ]
    assert all(record["peak_mb"] > 0 and record["device"] == "cpu" for record in records)
    assert all(0 < record["error"] < 0.1 for record in records if record["method"] == "dis")


@pytest.fixture
def glyph_teacher(tmp_path):
    """The folder of a teacher with random weights."""
    glyph_task.build_teacher(3375).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def few_glyphs(monkeypatch):
    """Leaves 512 training and 512 test images of the glyph task; an incomplete batch of either would be dropped."""
    few = {name: split.shuffle(seed=0).select(range(512)) for name, split in load_glyphs().items()}
    for module in (cache_match, cache_tasks, glyph_task):
        monkeypatch.setattr(module, "load_glyphs", lambda: few)


@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_a_truncation_is_the_divergence_of_what_it_keeps(divergence):
    head, features = nn.Linear(5, 10).double(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 10, dtype=torch.float64)
    everything = definition(divergence, head(features), teacher, 2.0).mean()
    exact = torch.autograd.grad(everything, (features, head.weight))
    for method in truncations(10):
        method.divergence = divergence
        found = method.gradients(head, features, teacher, None, 2.0)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (bucket,) = (one for one in truncations(3) if one.of_student and one.has_bucket)
    bucket.divergence = divergence
    found = bucket.gradients(head, features, teacher, None, 2.0)
    probabilities = [(values / 2).softmax(1) for values in (head(features), teacher)]
    ids = probabilities[0].topk(3, dim=1).indices
    kept = [values.gather(1, ids) for values in probabilities]
    kept = [torch.cat([values, 1 - values.sum(1, keepdim=True)], 1).log() for values in kept]
    loss = 4 * definition(divergence, *kept, 1.0).mean()
    for one, other in zip(found, torch.autograd.grad(loss, (features, head.weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_sample_with_the_students_likeliest_classes_counts_each_class_once():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 40, dtype=torch.float64).log_softmax(1), torch.randn(6, 40, dtype=torch.float64)
    method = Screened("dis", "pps", 3, 10, 3, 2, screened=4)
    method.build(40, torch.device("cpu"))
    ids, labels = student.topk(4, dim=1).indices, student.topk(2, dim=1).indices[:, 1]
    log_probs = teacher.log_softmax(1)
    masses = []
    for _ in range(2000):
        sample = with_certain(method.sample(teacher, student, 1.0, labels), ids, log_probs.gather(1, ids))
        columns = sampled_columns(student, sample.item_ids, sample.tail_ids)
        masses.append((columns + sample.log_weights).exp().sum(1))
        torch.testing.assert_close(sample.target.sum(1), torch.ones(6, dtype=torch.float64))
    masses = torch.stack(masses)
    error = masses.std(0) / len(masses) ** 0.5
    assert (masses.mean(0) - 1).abs().lt(4 * error).all()
    places = torch.cat([sample.item_ids, sample.tail_ids[torch.arange(6) % 2]], 1)
    is_used = sample.certain & (sample.log_weights == 0)
    assert ((places[:, :, None] == ids[:, None]) & is_used[:, :, None]).sum(1).eq(1).all()


@pytest.mark.slow
def test_errors_are_measured_of_glyphs(glyph_teacher, monkeypatch):
    """One layout with all updates, with some, and with a proposal that knows the student."""
    monkeypatch.setattr(estimator_error, "WARM_UP_BATCHES", 2)
    task = estimator_error.glyphs(argparse.Namespace(teacher=glyph_teacher, device=torch.device("cpu")))
    layout = (16, 64, 32, 4)
    methods = [
        Method("dis", "pps", *layout),
        Method("dis", "pps", *layout, 2),
        proposal_variants.Variant("oracle", "pps", *layout, knows="both"),
        proposal_variants.Variant("sketch", "pps", *layout, knows="both", rank=8),
        proposal_variants.Variant("started", "pps", *layout, memory="started and counted"),
    ]
    sizes = {"num_samples": 3, "batch_size": 16, "measured_size": 16, "default_layout": layout}
    task = dataclasses.replace(task, steps=(0, 1), methods=methods, **sizes)
    records = estimator_error.run(task)
    assert [record["step"] for record in records] == 5 * [0] + 5 * [1]
    assert [record["default"] for record in records[:5]] == [True, False, False, False, False]
    assert {record["divergence"] for record in records} == {"forward_kl"}
    all_update, some, oracle = records[5:8]
    assert (all_update["rows_touched"], some["rows_touched"]) == (512, 32)
    assert some["error_head"] > all_update["error_head"] and oracle["error"] < all_update["error"]


@pytest.mark.slow
def test_students_from_a_cache_and_with_the_teacher_are_compared(
    glyph_teacher, few_glyphs, tmp_path, monkeypatch, capsys
):
    written = tmp_path / "match.json"
    setting = ["--teacher", glyph_teacher, "--seeds", 0, 1, "--modes", "sampled", "--num_shared_classes", 64]
    main(cache_match, monkeypatch, *setting, "--json", written)
    records = json.loads(written.read_text())
    assert [(record["seed"], record["targets"]) for record in records] == [
        (seed, source) for seed in (0, 1) for source in ("online", "cached")
    ]
    assert all(record["head"] == "sampled" and record["kl"] > 0 and record["seconds"] > 0 for record in records)
    assert "| sampled | mean | cached - online |" in capsys.readouterr().out


@pytest.mark.slow
def test_designs_of_a_cache_are_compared_and_trained_on(glyph_teacher, few_glyphs, tmp_path, monkeypatch):
    written = tmp_path / "quality.json"
    monkeypatch.setattr(cache_quality, "NUM_SAMPLES", 2)
    glyphs = cache_tasks.glyphs
    monkeypatch.setattr(cache_tasks, "glyphs", lambda *given: dataclasses.replace(glyphs(*given), snapshots=(0, 1)))
    main(cache_quality, monkeypatch, "--tasks", "glyphs", "--teacher", glyph_teacher, "--epochs", 1, "--json", written)
    records = {record["design"]: record for record in json.loads(written.read_text())}
    assert list(records) == ["rs_kd", "topk", "topk_tail_bucket", "hf_dis"]
    assert all(record["error"] > 0 and 0 <= record["top1_or_ppl"] <= 1 for record in records.values())
    budget = records["hf_dis"]["bytes_per_item"]
    assert all(0.9 * budget < record["bytes_per_item"] <= budget for record in records.values())
    # Against a flat teacher the classes that are not stored hold most of the mass: a truncation is far off.
    assert records["hf_dis"]["error"] < records["topk"]["error"]


@pytest.mark.slow
def test_caching_is_timed(tmp_path, monkeypatch):
    written = tmp_path / "speed.json"
    main(cache_speed, monkeypatch, "--classes", 100, "--images", 4, "--rounds", 1, "--json", written)
    records = json.loads(written.read_text())
    assert [record["teacher"] for record in records] == list(cache_speed.TEACHERS)
    assert all(record["ratio"] > 0 for record in records)


@pytest.mark.slow
def test_students_are_trained_and_timed(glyph_teacher, few_glyphs, tmp_path, monkeypatch, capsys):
    written = tmp_path / "quality.jsonl"
    setting = ["--teacher", glyph_teacher, "--json", written, "--methods", "dis 32"]
    main(quality_vs_k, monkeypatch, *setting)
    main(quality_vs_k, monkeypatch, *setting, "--time", "--rounds", 1)
    assert "| dis 32 | 32 (0.9%) | 8,192 | x20 | 1 |" in capsys.readouterr().out
    (entry,) = quality_vs_k.summary(quality_vs_k.read(written))
    assert entry["student_ms"] > 0 and entry["kl"] > 0
    main(quality_vs_k, monkeypatch, "--json", written, "--plot", tmp_path / "quality.svg")
    assert (tmp_path / "quality.svg").stat().st_size > 500


def test_a_folder_of_a_stopped_training_has_no_saved_model(tmp_path):
    assert not common.is_saved(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    assert not common.is_saved(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert common.is_saved(tmp_path)
