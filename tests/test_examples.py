"""The examples as a user starts them, on small data."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_cifar
import run_clm
import run_market1501
from archives import write_cifar100_archive
from clm_task import load_texts, tokenized, train_tokenizer
from pages import commands
from tiny_models import vit
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from hf_dis.data import write_glyph_market

ROOT = Path(__file__).parent.parent
ONE_PROCESS = ["--num_processes", "1"]
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2"]


def launch(script, *arguments, processes, cache, check=True, cwd=None):
    """Runs an example under ``accelerate launch``, on CPU and offline."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *processes, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "examples" / script)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, cwd=cwd)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The error that an example tells before it starts."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--output_dir", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        code = ended.value.code  # a message ends a process with 1, and is what it tells
        return (capsys.readouterr().err if code == 2 else code).split("error:")[1]

    return run


def results(output):
    return json.loads((output / "eval_results.json").read_text())


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    return write_cifar100_archive(folder, train=96, test=40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


COMMON = ["--use_cpu", "--head_mode", "sampled", "--num_sampled_classes", "8"]
COMMON += ["--per_device_train_batch_size", "8", "--max_steps", "3", "--logging_steps", "1", "--report_to", "none"]


@pytest.mark.slow
def test_cifar_trains_a_teacher_and_distils_it_in_one_and_two_processes(cifar, cache, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    data = ["--data_dir", str(cifar), "--no_verify_checksum"]
    first = ["--output_dir", str(once), "--teacher_num_train_epochs", "1", *data, *COMMON]
    launch("run_cifar.py", *first, processes=ONE_PROCESS, cache=cache)
    teacher = ["--teacher_model_name_or_path", str(once / "_teacher")]
    second = ["--output_dir", str(twice), "--bf16", *teacher, *data, *COMMON]
    launch("run_cifar.py", *second, processes=TWO_PROCESSES, cache=cache)

    assert (twice / "checkpoint-3" / "dis_state_1.safetensors").is_file()
    for output in (once, twice):
        student = AutoModelForImageClassification.from_pretrained(output)
        assert student.config.num_labels == 100 and student.config.id2label[0] == "apple"
        assert AutoImageProcessor.from_pretrained(output, backend="pil").size["height"] == 32
        assert {"eval_top1", "eval_top5", "eval_kl", "eval_kd_loss", "eval_ce_loss"} <= set(results(output))


def test_cifar_without_data_names_both_ways_out(refused):
    told = refused(run_cifar, "--use_cpu")
    assert "--data_dir" in told and "uoft-cs/cifar100" in told


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return write_glyph_market(tmp_path_factory.mktemp("market") / "data", train_identities=20, test_identities=6)


@pytest.mark.slow
def test_market_trains_a_teacher_and_distils_it_in_one_and_two_processes(market, cache, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    data = ["--data_dir", str(market), "--image_size", "32", "32", "--eval_strategy", "steps", "--eval_steps", "3"]
    first = ["--output_dir", str(once), "--teacher_num_train_epochs", "1", *data, *COMMON]
    launch("run_market1501.py", *first, processes=ONE_PROCESS, cache=cache)
    teacher = ["--teacher_model_name_or_path", str(once / "_teacher")]
    second = ["--output_dir", str(twice), "--per_device_eval_batch_size", "7", *teacher, *data, *COMMON]
    launch("run_market1501.py", *second, processes=TWO_PROCESSES, cache=cache)

    for output in (once, twice):
        student = AutoModelForImageClassification.from_pretrained(output)
        assert student.config.num_labels == 20 and student.config.id2label[0] == "0001"
        assert AutoImageProcessor.from_pretrained(output, backend="pil").size["width"] == 32
        assert results(output)["eval_queries"] == 36 and results(output)["eval_queries_without_match"] == 0
        assert 0 < results(output)["eval_mAP"] <= results(output)["eval_rank10"] <= 1
        evaluated = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        assert [log["eval_mAP"] for log in evaluated if "eval_mAP" in log] == [results(output)["eval_mAP"]]


@pytest.mark.slow
def test_market_takes_any_backbone_by_name(market, cache, tmp_path):
    vit(5).save_pretrained(tmp_path / "backbone")
    backbone = ["--model_name_or_path", str(tmp_path / "backbone"), "--teacher_backbone", str(tmp_path / "backbone")]
    data = ["--glyph_dir", str(market), "--image_size", "8", "8", "--teacher_num_train_epochs", "1"]
    arguments = ["--output_dir", str(tmp_path / "out"), *backbone, *data, *COMMON]
    launch("run_market1501.py", *arguments, processes=ONE_PROCESS, cache=cache)
    for folder in (tmp_path / "out", tmp_path / "out" / "_teacher"):
        config = AutoModelForImageClassification.from_pretrained(folder).config
        assert config.model_type == "vit" and config.num_labels == 20


@pytest.mark.slow
def test_the_recipe_for_glyphs_distils_nearly_as_well_as_exact_distillation(cache, tmp_path):
    """The page's commands with fewer epochs: as they are written they take too long on a slow machine."""
    recipe = [command for command in commands(ROOT / "docs" / "recipes.md") if "--glyph_dir" in command]
    assert len(recipe) == 3
    for command in recipe:
        arguments = command[command.index("examples/run_market1501.py") + 1 :]
        arguments += ["--teacher_num_train_epochs", "2", "--num_train_epochs", "1"]
        launch("run_market1501.py", *arguments, processes=ONE_PROCESS, cache=cache, cwd=tmp_path)
    folder = tmp_path / "runs" / "glyph-market"
    hard, exact, dis = (results(folder / name)["eval_mAP"] for name in ("hard_labels", "exact", "dis"))
    # 0.053, 0.147 and 0.134 with these epochs; the page has DIS 2.5 points behind exact, 30 ahead of hard labels.
    assert hard > 0.03 and dis - hard > 0.6 * (exact - hard) > 0.03, (hard, exact, dis)


@pytest.mark.parametrize("given", [[], ["--data_dir", "a", "--glyph_dir", "b"]], ids=["neither", "both"])
def test_market_without_data_offers_the_glyphs(given, refused):
    told = refused(run_market1501, "--use_cpu", *given)
    assert "--data_dir" in told and "--glyph_dir runs/glyph-market/data" in told


@pytest.mark.slow
def test_the_glyph_demo_writes_results_report_and_plots(cache, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--teacher_epochs", "0.1", "--epochs", "0.1"]
    launch("run_glyphs.py", *arguments, processes=ONE_PROCESS, cache=cache)
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["method"] for record in records] == ["hard_labels", "exact", "dis", "ftis", "topk"]
    for record in records:
        assert set(record) == {"method", "classes", "sampled", "head_rate", "top1", "top5", "kl", "seconds"}
        assert record["classes"] == 3375 and 0 <= record["top1"] <= record["top5"] <= 1
    for name in ("report.md", "quality.svg", "proposal.svg", "confusions.svg"):
        assert (tmp_path / name).stat().st_size > 500


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text file whose tokenizer has some two thousand tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(Path(json.decoder.__file__).read_text() + Path(argparse.__file__).read_text())
    return path


CLM = ["--use_cpu", "--disable_tqdm", "True", "--max_steps", "2", "--eval_steps", "1", "--max_eval_blocks", "3"]
CLM += ["--per_device_train_batch_size", "2", "--head_mode", "sampled"]


@pytest.mark.slow
def test_clm_makes_a_teacher_and_compares_students_in_one_and_two_processes(texts, cache, tmp_path):
    made, given = tmp_path / "made", tmp_path / "given"
    data = ["--train_files", str(texts)]
    launch(
        "run_clm.py",
        "--output_dir",
        str(made),
        "--teacher_steps",
        "2",
        *data,
        *CLM,
        processes=ONE_PROCESS,
        cache=cache,
    )
    records = json.loads((made / "results.json").read_text())
    assert [record["method"] for record in records] == ["exact", "dis", "exact_in_time"]
    vocab = records[0]["vocab"]
    assert vocab < 4096 and [record["sampled"] for record in records] == [vocab, 16 + vocab, vocab]
    for record in records:
        assert record["kl"] > 0 and record["perplexity"] > 1 and record["seconds"] > 0
        assert [point["step"] for point in record["curve"]][:1] == [1] and record["curve"][-1]["step"] == record[
            "steps"
        ]
        student = AutoModelForCausalLM.from_pretrained(made / record["method"])
        assert student.config.vocab_size == len(AutoTokenizer.from_pretrained(made / record["method"]))
    assert (made / "curves.svg").stat().st_size > 500 and "DIS's time" in (made / "report.md").read_text()

    models = ["--teacher_model_name_or_path", str(made / "_teacher"), "--model_name_or_path", str(made / "dis")]
    own = ["--output_dir", str(given), "--row_sparse_head", "--save_strategy", "no", *models, *data, *CLM]
    launch("run_clm.py", *own, processes=TWO_PROCESSES, cache=cache)
    (record,) = json.loads((given / "results.json").read_text())
    assert record["method"] == "dis" and record["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(given).config.vocab_size == record["vocab"]


@pytest.mark.slow
def test_clm_trains_adapters_of_masked_language_models(texts, cache, tmp_path):
    tokenizer = train_tokenizer(load_texts(train_files=[str(texts)])["train"], 2500)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    for name in ("teacher", "student"):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
        BertForMaskedLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    teacher = ["--teacher_model_name_or_path", str(tmp_path / "teacher")]
    student = ["--model_name_or_path", str(tmp_path / "student"), "--output_dir", str(tmp_path / "out")]
    options = ["--mlm", "--use_peft", "--train_files", str(texts), *teacher, *student, *CLM]
    launch("run_clm.py", *options, processes=ONE_PROCESS, cache=cache)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_kl"] > 0


def test_clm_refuses_what_it_cannot_make(refused):
    for options, told in ((["--mlm"], "only causal models"), (["--methods", "ftis"], r"unknown methods ['ftis']")):
        assert told in refused(run_clm, *options)


def test_texts_too_few_for_a_block_and_columns_that_are_not_there(texts):
    splits = load_texts(train_files=[str(texts)])
    tokenizer = train_tokenizer(splits["train"], 500)
    with pytest.raises(ValueError, match=r"does not have 1000000 tokens"):
        tokenized(splits, tokenizer, 1_000_000)
    with pytest.raises(ValueError, match=r"text_column is 'words'.*\['text'\]"):
        load_texts(train_files=[str(texts)], column="words")


def test_blocks_are_the_text_in_order(texts):
    splits = load_texts(train_files=[str(texts)])
    tokenizer = train_tokenizer(splits["train"], 500)
    items = tokenized(splits, tokenizer, 32)["train"]
    assert all(item["labels"] == item["input_ids"] and len(item["input_ids"]) == 32 for item in items)
    joined = tokenizer.decode([token for item in items for token in item["input_ids"]]).replace("<eos>", "")
    assert texts.read_text().startswith(joined[:5000])
