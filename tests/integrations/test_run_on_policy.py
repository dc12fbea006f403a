"""run_on_policy.py as a user starts it, on small data, and the task module beside it."""

import json

import chats
import on_policy_task
import own_text
import pytest
import torch
from datasets import DatasetDict
from divergences_by_definition import definition
from test_examples import ONE_PROCESS, TWO_PROCESSES, launch
from transformers import AutoModelForCausalLM

from hf_dis.loss.divergence import ForwardKL
from hf_dis.loss.f_divergence import ReverseKL

QUICK = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--max_steps", "2", "--max_eval_prompts", "8"]
QUALITY = {"method", "kl", "reverse_kl", "log_likelihood", "length"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_it_makes_a_teacher_and_compares_students(cache, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--teacher_steps", "2", "--student_steps", "2"]
    arguments += ["--per_device_train_batch_size", "2", "--max_completion_length", "4", *QUICK]
    done = launch("run_on_policy.py", *arguments, processes=ONE_PROCESS, cache=cache)
    initial, exact, dis = json.loads((tmp_path / "results.json").read_text())
    assert set(initial) == QUALITY and set(exact) == set(dis) > QUALITY
    assert [one["method"] for one in (initial, exact, dis)] == ["initial", "exact", "dis"]
    assert exact["sampled"] == exact["vocab"] == 32_002 and dis["sampled"] == 16 + 4096 + 1
    assert (exact["steps"], exact["exact_steps"], dis["steps"], dis["exact_steps"]) == (2, 2, 2, 1)
    for record in (initial, exact, dis):
        assert record["kl"] > 0 and record["reverse_kl"] > 0 > record["log_likelihood"] and record["length"] == 4
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout and "| exact KD | 32,002 |" in report and "| initial |" in report
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dis").config.vocab_size == 32_002


@pytest.mark.slow
@pytest.mark.parametrize("processes", [ONE_PROCESS, TWO_PROCESSES], ids=["one process", "two processes"])
def test_it_distils_models_of_ones_own_on_files(cache, tmp_path, processes):
    for name, model in (("teacher", chats.teacher()), ("student", chats.student())):
        model.save_pretrained(tmp_path / name)
        chats.tokenizer().save_pretrained(tmp_path / name)
    own_text.prompts(60).to_json(tmp_path / "prompts.jsonl")
    given = {
        "teacher_model_name_or_path": tmp_path / "teacher",
        "model_name_or_path": tmp_path / "student",
        "train_files": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "out",
        "beta": 0.5,
        "head_mode": "sampled",
        "num_sampled_classes": 4,
        "num_shared_classes": 8,
        "max_completion_length": 6,
        "bf16": False,
    }
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    launch("run_on_policy.py", *arguments, *QUICK, processes=processes, cache=cache)
    initial, dis = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(initial) == QUALITY and dis["method"] == "dis" and dis["sampled"] == 13 and dis["steps"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_prompts_are_taken_out_of_chats():
    made = on_policy_task.prompts_of(DatasetDict(train=chats.chats(5)))["train"]
    assert made.column_names == ["prompt"]
    assert list(made["prompt"]) == [row["messages"][:-1] for row in chats.chats(5)]
    kept = on_policy_task.prompts_of(DatasetDict(train=chats.chats(5, "prompt")))["train"]
    assert kept.column_names == ["prompt"] and list(kept["prompt"]) == list(chats.chats(5, "prompt")["prompt"])
    with pytest.raises(ValueError, match="columns text: prompts are read from the column 'prompt'"):
        on_policy_task.prompts_of(DatasetDict(train=chats.chats(5, "text")))


@pytest.mark.parametrize("form", ["messages", "text"])
def test_the_quality_is_that_of_the_tokens_that_were_written(form):
    student, teacher, tokenizer = chats.student(), chats.teacher(), chats.tokenizer()
    data = own_text.prompts(9, form)
    found = on_policy_task.quality(student, teacher, tokenizer, data, max_new_tokens=8, batch_size=4, seed=0)
    torch.manual_seed(0)
    rows, lengths = [], []
    for start in range(0, 9, 4):
        batch = data[start : start + 4]["prompt"]
        for (ids, length), prompt in zip(on_policy_task.written(student, tokenizer, batch, 8), batch, strict=True):
            text = prompt if form == "text" else f"<user> {prompt[0]['content']} <assistant>"
            assert tokenizer.decode(ids[:length]) == text
            assert 1 <= len(ids) - length <= 8 and chats.SPECIAL.index("<eos>") not in ids[length:-1].tolist()
            lengths.append(len(ids) - length)
            with torch.no_grad():
                own, theirs = (model(input_ids=ids[None]).logits[0, length - 1 : -1] for model in (student, teacher))
            likelihood = theirs.double().log_softmax(1).gather(1, ids[length:, None])[:, 0]
            kls = [definition(one, own, theirs, 1.0) for one in (ForwardKL(), ReverseKL())]
            rows.append(torch.stack([*kls, likelihood]))
    expected = [*torch.cat(rows, 1).mean(1).tolist(), sum(lengths) / 9]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4) and len(set(lengths)) > 1
