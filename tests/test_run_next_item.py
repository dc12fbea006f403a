"""run_next_item.py as a user starts it, on small data, and the trainer on labels beside it."""

import json
import sys

import item_cache
import item_data
import item_task
import numpy as np
import pytest
import run_next_item
import torch
from test_examples import ONE_PROCESS, launch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_dis import DISConfig

SMALL = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--teacher_steps", "4", "--max_steps", "2"]
SMALL += ["--eval_steps", "1", "--max_eval_users", "20", "--num_items", "300", "--num_users", "60"]
SMALL += ["--width", "16", "--teacher_width", "16", "--per_device_train_batch_size", "8"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_next_item.py", *map(str, arguments)])
    run_next_item.main()


def test_every_method_at_small_sizes(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--output_dir", tmp_path, *SMALL, "--num_sampled_classes", 4, "--num_shared_classes", 8)
    records = {one["method"]: one for one in json.loads((tmp_path / "results.json").read_text())}
    assert list(records) == list(run_next_item.METHODS)
    sampled = {"labels": 4097, "exact": 301, "dis": 12, "dis_cached": 14, "topk": 64}
    sampled |= {"exact_in_time": 301, "labels_in_time": 4097, "labels_in_cached_time": 4097}
    assert {name: one["sampled"] for name, one in records.items()} == sampled
    for name, one in records.items():
        assert 0 <= one["ndcg10"] <= one["recall10"] <= 1 and one["seconds"] > 0
        assert one["curve"][-1]["step"] == one["steps"] and len(one["curve"]) == one["steps"]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.vocab_size == 301
    written = json.loads((tmp_path / "_cache.written.json").read_text())["seconds"]
    assert 0 < written < records["dis_cached"]["curve"][0]["seconds"]
    report, out = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert report in out and "simulated by a hidden Markov model" in report and "| top-K KD | 64 |" in report
    assert "| most frequent items |" in report and "| teacher |" in report and "unseen in training" in report
    assert (tmp_path / "curves.svg").stat().st_size > 500
    assert (tmp_path / "items.txt").read_text().split() == [str(item) for item in range(1, 301)]

    # Another number of items than that of the teacher.
    other = [*SMALL, "--num_items", "400", "--teacher_model_name_or_path", tmp_path / "_teacher"]
    with pytest.raises(ValueError, match="is of 300 items, and the catalogue has 400"):
        run(monkeypatch, "--output_dir", tmp_path / "other", *other)


@pytest.mark.slow
def test_a_file_of_ones_own_as_a_user_starts_it(tmp_path_factory, tmp_path):
    file = tmp_path / "shop.txt"
    file.write_text("".join(f"u{n} i{(n + k) % 40}\n" for n in range(80) for k in range(6)) + "short i1\n")
    cache = tmp_path_factory.mktemp("cache")
    given = ["--output_dir", str(tmp_path / "out"), "--interactions", str(file), *SMALL, "--methods", "labels", "dis"]
    given += ["--num_sampled_classes", "4", "--num_shared_classes", "8", "--max_steps", "30"]
    given += ["--teacher_steps", "60", "--learning_rate", "1e-2", "--head_learning_rate", "1e-2"]
    done = launch("run_next_item.py", *given, processes=ONE_PROCESS, cache=cache)
    assert "1 users with fewer than 3 items were left out" in done.stdout
    labels, dis = json.loads((tmp_path / "out" / "results.json").read_text())
    # Each item is followed by the next one: chance is a recall of a quarter.
    assert labels["recall10"] > 0.6 and dis["recall10"] > 0.6
    assert (tmp_path / "out" / "items.txt").read_text().split()[:3] == ["i0", "i1", "i2"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("u a\nu\n", "1 lines of"), ("u a\nu b\n", "no user with 3 items"), (None, "there is no file")],
)
def test_bad_files_are_errors_of_the_command_line(text, told, monkeypatch, tmp_path, capsys):
    file = tmp_path / "bad.txt"
    if text:
        file.write_text(text)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--output_dir", tmp_path, "--use_cpu", "--interactions", file)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        (["ftis"], "unknown methods ['ftis']"),
        (["dis", "exact_in_time"], "exact_in_time needs the time of dis and the"),
    ],
)
def test_methods_that_cannot_be_compared(methods, told, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--output_dir", tmp_path, "--use_cpu", "--methods", *methods)
    assert told in capsys.readouterr().err


@pytest.fixture
def on_labels(tmp_path):
    """Makes a trainer on labels of a small catalogue, and its first batch."""

    def make(**settings):
        data = item_data.simulate(200, 40)
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", learning_rate=1e-2, save_strategy="no")
        model, windows = item_task.build(data.num_classes, 16, 1, seed=0), data.training(20)
        given = {"train_dataset": windows, "data_collator": item_task.collate, "counts": data.counts()}
        trainer = item_task.SampledSoftmaxTrainer(model=model, args=args, **given, **settings)
        return trainer, item_task.collate([windows[place] for place in range(8)])

    return make


def test_sampled_softmax_estimates_the_cross_entropy_on_all_items(on_labels):
    trainer, batch = on_labels(num_negatives=2**17)
    sampled = trainer.compute_loss(trainer.model, batch).detach()
    labels = batch["labels"][:, 1:]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1, 1:]
    exact = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100] - 1).detach()
    assert float(sampled) == pytest.approx(float(exact), rel=3e-3)


def test_negatives_that_are_the_label_are_left_out(on_labels):
    trainer, batch = on_labels(num_negatives=300)
    counts = item_data.simulate(200, 40).counts()[1:]
    density = (counts / counts.sum() + 1 / 200) / 2
    at = torch.rand(300, generator=torch.Generator().manual_seed(42), dtype=torch.float64).numpy()
    negatives = 1 + np.searchsorted(density.cumsum(), at)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses, hits = [], 0
    for row, label in zip(logits.flatten(0, 1).double(), batch["labels"][:, 1:].flatten().tolist(), strict=True):
        if label != -100:
            others = [row[item].exp() / (300 * density[item - 1]) for item in negatives if item != label]
            hits += 300 - len(others)
            losses.append((row[label].exp() + sum(others)).log() - row[label])
    assert hits > 20
    expected = torch.stack(losses).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_steps_on_labels_leave_other_items_as_they_are(on_labels):
    trainer, batch = on_labels(num_negatives=4, head_learning_rate=0.5)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.training_step(trainer.model, batch)
    gradient = trainer.model.lm_head.weight.grad
    assert gradient.is_sparse and gradient.is_coalesced() and trainer.model.get_input_embeddings().sparse is False
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    moved = (trainer.model.lm_head.weight != before).any(1).nonzero()[:, 0].tolist()
    touched = set(batch["input_ids"].flatten().tolist())
    assert 0 < len(set(moved) - touched) <= 4 and max(abs(before - trainer.model.lm_head.weight).flatten()) > 0.1


def test_labels_train_in_one_process(on_labels, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="there are 2 processes, and sampled softmax on labels trains in one"):
        on_labels()


def test_rankings_do_not_depend_on_the_batch_and_leave_padding_out(monkeypatch):
    data = item_data.simulate(200, 30)
    model, users = item_task.build(data.num_classes, 16, 1, seed=0).train(), data.held_out("test", 50)
    ranked = item_task.rank_items(model, users, k=200)
    assert model.training and torch.equal(ranked.sort(1).values, torch.arange(1, 201).expand(30, 200))
    monkeypatch.setattr(item_task, "EVAL_BATCH", 7)
    assert torch.equal(item_task.rank_items(model, users), ranked[:, :10])
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([users[0]["input_ids"]])).logits[0, -1, 1:]
    assert torch.equal(logits.topk(10).indices + 1, ranked[0, :10])


def test_popularity_ranks_the_most_frequent_items():
    counts = np.array([9, 1, 5, 5, *range(20, 32)])
    users = item_data.Interactions([np.array([1, 1, 15])] * 2 + [np.array([1, 1, 1])] * 2, range(1, 16)).held_out(
        "test", 5
    )
    assert item_task.popularity_scores(counts, users) == {"ndcg10": 0.5, "recall10": 0.5}


def test_the_time_includes_the_loader_and_leaves_scoring_and_pauses_out(monkeypatch, tmp_path):
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds
        return {"ndcg10": 0.5, "recall10": 0.5}

    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(item_task.time, name, lambda: now)
    monkeypatch.setattr(item_task, "scores", lambda model, users: work(50.0))
    curve = item_task.RankingCurve(None, every=2)
    state = type("State", (), {"global_step": 0, "max_steps": 3})
    curve.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        work(0.25)  # of the loader
        curve.on_step_begin(None, state, None)
        work(0.75)
        with curve.paused():
            work(7.0)
        state.global_step = step
        curve.on_step_end(None, state, None)
    spent = [{"step": step, "seconds": float(step), "cpu_seconds": float(step)} for step in (2, 3)]
    assert curve.curve == [{**one, "ndcg10": 0.5, "recall10": 0.5} for one in spent]


def test_a_method_changes_its_own_settings_only(tmp_path):
    data = item_data.simulate(300, 20)
    args = DISConfig(str(tmp_path), use_cpu=True, report_to="none", **run_next_item.DEFAULTS)
    student, teacher = (item_task.build(data.num_classes, 16, 1, seed=seed) for seed in (0, 1))
    windows = data.training(20)
    given = student, teacher, data, windows, args, item_task.RankingCurve(None, 1)
    stored = item_cache.stored_targets(teacher, windows, 1.0, tmp_path / "cache")
    assert item_cache.stored_targets(teacher, windows, 1.0, tmp_path / "cache")[1:] == stored[1:]
    from_cache = item_task.student_trainer("dis_cached", student, stored.cache, *given[2:])
    assert from_cache.distiller.teacher.layout.item_bytes <= 60
    trainers = {name: item_task.student_trainer(name, *given) for name in run_next_item.METHODS}
    assert args.proposal == "dis" and args.head_mode == "sampled" and args.row_sparse_head
    assert trainers["exact_in_time"].args.head_mode == "exact" and trainers["topk"].args.proposal == "topk"
    assert type(trainers["labels_in_time"]) is item_task.SampledSoftmaxTrainer
