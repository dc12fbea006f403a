"""run_sft.py as a user starts it, on small data, and the task module beside it."""

import json
import sys
from itertools import islice

import chats
import pytest
import run_sft
import sft_task
from test_examples import ONE_PROCESS, TWO_PROCESSES, launch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--max_steps", "2", "--max_eval_chats", "8"]
RECORD = {"method", "vocab", "sampled", "steps", "exact_steps", "steps_per_second", "kl", "perplexity"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def records(output):
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
def test_it_makes_a_teacher_and_compares_students(cache, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--teacher_steps", "2", "--per_device_train_batch_size", "2", *QUICK]
    done = launch("run_sft.py", *arguments, processes=ONE_PROCESS, cache=cache)
    exact, dis = records(tmp_path)
    assert set(exact) == set(dis) == RECORD and (exact["method"], dis["method"]) == ("exact", "dis")
    assert exact["sampled"] == exact["vocab"] == 32_002 and dis["sampled"] == 16 + 4096
    assert (exact["steps"], exact["exact_steps"], dis["steps"], dis["exact_steps"]) == (2, 2, 2, 1)
    for record in (exact, dis):
        assert record["kl"] > 0 and record["perplexity"] > 1 and record["steps_per_second"] > 0
        student = AutoModelForCausalLM.from_pretrained(tmp_path / record["method"])
        assert student.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / record["method"]))
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout and "| exact KD | 32,002 |" in report and "| DIS | 4,112 |" in report
    assert AutoTokenizer.from_pretrained(tmp_path / "_teacher").chat_template == sft_task.CHAT_TEMPLATE


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Models, a tokenizer and chats of a user's own."""
    folder = tmp_path_factory.mktemp("own")
    for name, model in (("teacher", chats.teacher()), ("student", chats.student())):
        model.save_pretrained(folder / name)
        chats.tokenizer().save_pretrained(folder / name)
    chats.chats(60).to_json(folder / "chats.jsonl")
    chats.chats(30, "prompt").to_parquet(folder / "prompts.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [ONE_PROCESS, TWO_PROCESSES], ids=["one process", "two processes"])
def test_it_distils_models_of_ones_own_on_files(own, cache, tmp_path, processes):
    models = ["--teacher_model_name_or_path", str(own / "teacher"), "--model_name_or_path", str(own / "student")]
    data = ["--train_files", str(own / "chats.jsonl"), "--packing", "--assistant_only_loss", "--max_length", "32"]
    settings = ["--head_mode", "sampled", "--num_sampled_classes", "4", "--num_shared_classes", "8", "--use_peft"]
    arguments = ["--output_dir", str(tmp_path), "--bf16", "False", *models, *data, *settings, *QUICK]
    launch("run_sft.py", *arguments, processes=processes, cache=cache)
    (record,) = records(tmp_path)
    assert record["method"] == "dis" and record["sampled"] == 12 and record["steps"] == 2 and record["kl"] > 0
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "eval_results.json").is_file()


def test_it_refuses_methods_that_are_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run_sft.py", "--output_dir", str(tmp_path), "--methods", "ftis"])
    with pytest.raises(SystemExit):
        run_sft.main()
    assert "unknown methods ['ftis']: choose from exact, dis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "columns", "held_out"),
    [("chats.jsonl", {"messages"}, 3), ("prompts.parquet", {"prompt", "completion"}, 2)],
)
def test_chats_are_read_from_files(own, file, columns, held_out):
    splits = sft_task.load_chats(train_files=[str(own / file)])
    assert set(splits["train"].column_names) == columns and len(splits["validation"]) == held_out
    given = sft_task.load_chats(train_files=[str(own / file)], validation_files=[str(own / file)])
    assert len(given["validation"]) == len(given["train"]) == len(splits["train"]) + held_out


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"chats\.txt has the suffix '\.txt'.*\.json, \.jsonl"):
        sft_task.load_chats(train_files=[str(tmp_path / "chats.txt")])


def test_the_docstrings_answer_questions_about_signatures():
    found = list(islice(sft_task.docstring_chats(), 50))
    for chat in found:
        question, answer = chat["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert ": def " in question["content"] or ": class " in question["content"]
        assert answer["content"] and answer["content"] == answer["content"].strip()
    assert found == list(islice(sft_task.docstring_chats(), 50))


def test_the_answer_and_its_end_are_supervised():
    tokenizer = chats.tokenizer(sft_task.CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": [sft_task.USER, sft_task.ASSISTANT]})
    messages = [{"role": role, "content": f"w{number}"} for number, role in enumerate(("user", "assistant") * 2)]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert " ".join(tokens) == "<|user|> w0 <|assistant|> w1 <eos> <|user|> w2 <|assistant|> w3 <eos>"
    assert found["assistant_masks"] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
