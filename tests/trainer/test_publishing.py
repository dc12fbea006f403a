"""The model card, and publishing: the Hub's own client against a server on localhost."""

import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, LocalHub
from huggingface_hub import ModelCard
from tiny_models import labelled_images, vit

from hf_dis.sampling.proposal import Proposal
from hf_dis.trainer import card as card_module
from hf_dis.trainer.publishing import check_upload

ROOT = Path(__file__).parents[2]
# A fresh process that cannot import hf_dis.
LOADER = """
import sys
sys.modules["hf_dis"] = None
import torch
from transformers import AutoModelForImageClassification
student = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
kept = torch.load(sys.argv[2])
assert torch.equal(student(kept["pixel_values"]).logits, kept["logits"])
try:
    import hf_dis
except ImportError:
    print("loaded without hf_dis")
"""


def run(code, *arguments, endpoint, home, token=TOKEN):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'data'}"} | (
        {"HF_TOKEN": token} if token else {}
    )
    done = subprocess.run([sys.executable, *code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def server():
    with LocalHub() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("hub")
    vit(40, seed=1, spread=30).save_pretrained(folder / "teacher")
    server.files["tester/teacher"] = {file.name: file.read_bytes() for file in (folder / "teacher").iterdir()}
    return folder


def worked(mode, folder, server, **keywords):
    worker = [str(ROOT / "tests" / "trainer" / "hub_worker.py")]
    done = run(worker, mode, str(folder), endpoint=server.endpoint, home=folder / "home", **keywords)
    return json.loads((folder / f"{mode}.json").read_text()), done.stderr + done.stdout


@pytest.fixture(scope="module")
def published(folder, server):
    return worked("publish", folder, server)


def loaded(repo, kept, folder, server):
    done = run(["-c", LOADER, repo, str(kept)], endpoint=server.endpoint, home=folder / "other-home")
    return done.stdout


# The end to end of it


def test_the_student_and_nothing_else_is_published(published, folder, server):
    files = server.files["tester/student"]
    report = {
        f"report/{name}" for name in ("report.html", "records.jsonl", "gradient-error.png", "kl-to-the-teacher.png")
    }
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} | report == set(files)
    assert list((folder / "student").rglob("dis_state*")) and list((folder / "student").rglob("optimizer*"))
    pieces = [p.detach().numpy().tobytes()[:64] for p in vit(40, seed=1, spread=30).parameters() if p.dim() > 1]
    for repo, stored in server.files.items():
        for path, content in stored.items() if repo != "tester/teacher" else ():
            assert not any(piece in content for piece in pieces), path
            assert not re.search("dis_state|optimizer|scheduler|rng_state", path), path


@pytest.mark.slow
def test_a_process_without_the_package_loads_the_same_student(published, folder, server):
    assert "loaded without" in loaded("tester/student", folder / "published.pt", folder, server)


@pytest.mark.slow
def test_the_student_of_run_cifar_is_the_same_without_the_package(folder, server):
    report, _ = worked("cifar", folder, server)
    assert {"_teacher", "checkpoint-3", "model.safetensors"} <= set(report["left"])
    published = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin"}
    assert set(server.files["tester/cifar"]) == published | {"all_results.json", "eval_results.json"}
    assert "loaded without" in loaded("tester/cifar", folder / "cifar.pt", folder, server)
    card = ModelCard(server.files["tester/cifar"]["README.md"].decode())
    assert facts(card)["Dataset"] == "cifar100" and "gap (sampled - exact)" in facts(card)


def test_a_failing_server_leaves_the_student_and_a_second_try(published, folder):
    report, _ = published
    for at in ("lfs", "commit"):
        assert "not published" in report[at] and "answered 500" in report[at]
        assert str(folder / "student") in report[at] and "push_to_hub() again" in report[at]
    assert report["intact"] and "/tester/student/commit/" in report["commit url"]


def test_metadata_that_the_hub_refuses_is_told(published, folder):
    said = published[0]["metadata"]
    assert "license must be one of" in said and "Correct this first" in said and str(folder / "student") in said


def test_the_published_card_names_the_loading_line_and_the_data(published, server):
    text = server.files["tester/student"]["README.md"].decode()
    assert 'ViTForImageClassification.from_pretrained("tester/student")' in text
    assert "| Dataset | Glyphs |" in text and "| Teacher | teacher (a local directory) |" in text
    assert ModelCard(text).data.license == "apache-2.0"


def test_the_figures_of_the_published_card_are_there(published, server):
    files = server.files["tester/student"]
    shown = re.findall(r"!\[.*?\]\((.*?)\)", files["README.md"].decode())
    assert len(shown) == 2 and all(files[name].startswith(b"\x89PNG") for name in shown)


def test_the_card_names_a_teacher_of_the_hub_and_its_commit(published, server):
    found = facts(ModelCard(server.files["an-org/named"]["README.md"].decode()))
    assert found["Teacher"] == "tester/teacher"
    assert found["Teacher's revision"] == server.revision("tester/teacher")
    assert "teacher:tester/teacher" in ModelCard(server.files["an-org/named"]["README.md"].decode()).data.tags


def test_checkpoints_and_save_model_publish_the_card_too(published, server):
    for repo in ("tester/at-checkpoints", "an-org/named"):
        card = ModelCard(server.files[repo]["README.md"].decode())
        assert "hf_dis" in card.data.tags and f'from_pretrained("{repo}")' in card.text


def test_a_checkpoint_lost_in_the_background_is_told(published, server):
    assert server.files["tester/lost-in-the-background"] == {}
    assert re.search("a checkpoint was not published: .*answered 500", published[1], re.DOTALL)


@pytest.mark.slow
def test_without_token_or_network_it_says_what_to_do_and_where_the_student_is(folder, server):
    report, _ = worked("refused", folder, server, token=None)
    for case in ("no token", "no network"):
        assert f"saved in {folder / 'kept'}" in report[case]
    for case in ("no token", "no token at the start"):
        assert "hf auth login" in report[case] and "HF_TOKEN" in report[case]
    assert "Training has not started" in report["no token at the start"]
    assert "check the network" in report["no network"]
    assert (folder / "kept" / "model.safetensors").is_file()


def test_offline_is_told_and_the_student_is_saved_first(make_trainer):
    trainer = make_trainer()
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is not set") as told:
        trainer.push_to_hub()
    assert trainer.args.output_dir in str(told.value)
    saved = vit(40).from_pretrained(trainer.args.output_dir)
    assert torch.equal(saved.classifier.weight, trainer.model.classifier.weight)


def test_a_teacher_in_the_output_folder_is_not_published_with_the_student(make_trainer):
    trainer = make_trainer()
    trainer.distiller.teacher.model.save_pretrained(Path(trainer.args.output_dir) / "teacher")
    with pytest.raises(RuntimeError, match=r"would be published too: teacher/model\.safetensors; move them"):
        trainer.push_to_hub()
    with pytest.raises(RuntimeError, match=r"would be published too.*Training has not started"):
        make_trainer(push_to_hub=True)


WEIGHTS = ["t.safetensors", "t.bin", "t.pt", "t.pth", "t.ckpt", "t.gguf", "t.onnx", "t.msgpack", "t.h5", "t.GGUF"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("folder", ["teacher", "a/b"])
def test_weights_of_every_format_are_found(tmp_path, folder, name):
    (tmp_path / folder).mkdir(parents=True)
    check_upload(tmp_path)
    (tmp_path / folder / name).touch()
    with pytest.raises(ValueError, match=rf"would be published too: {folder}/{name}; move them elsewhere"):
        check_upload(tmp_path)


def test_files_that_are_not_published_or_hold_no_weights_are_no_matter(tmp_path):
    paths = ["_teacher/t.pt", "checkpoint-4/optimizer.pt", "model.safetensors", "training_args.bin", "runs/events.log"]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    check_upload(tmp_path)


# The card


def card_of(trainer, **summary):
    trainer.create_model_card(**summary)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def facts(card):
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.MULTILINE))


def test_the_card_states_every_setting(make_trainer):
    trainer = make_trainer(
        temperature=3.0,
        hard_label_weight=0.25,
        divergence="jsd",
        jsd_beta=0.3,
        scale_by_temperature=False,
        learning_rate=1e-3,
        head_learning_rate=4e-3,
        exact_warmup_steps=2,
    )
    found = facts(card_of(trainer, dataset=["a|b", "c"]))
    expected = {
        "Teacher": "unknown (ViTForImageClassification)",
        "Teacher's revision": "unknown",
        "Dataset": r"a\|b, c",
        "Classes (C)": "40",
        "Classes sampled per item (K)": "6",
        "Classes of a shared tail (K_t)": "8",
        "Shared tails per step": "16",
        "Classes per item that update the head": "16",
        "Rank depth (m)": "10",
        "Proposal": "dis",
        "Design": "pps",
        "Exact warm-up steps": "2",
        "Divergence": "jsd, beta 0.3, without the factor τ²",
        "Temperature": "3",
        "Weight of the hard labels": "0.25",
        "Head mode": "sampled",
        "Head's learning rate": "0.004",
    }
    assert expected.items() <= found.items()


def test_the_teachers_name_and_revision(make_trainer):
    teacher = vit(40, seed=1, spread=30)
    teacher.config._name_or_path, teacher.config._commit_hash = "an-org/teacher", "0123abcd"
    found = facts(card_of(make_trainer(teacher=teacher)))
    assert (found["Teacher"], found["Teacher's revision"]) == ("an-org/teacher", "0123abcd")


def test_what_is_not_known_is_unknown_and_not_left_out(make_trainer):
    card = card_of(make_trainer())
    assert facts(card)["Dataset"] == "unknown"
    assert (
        "Unknown: the two were not compared (`probe_steps=0`)" in card.text and "No evaluation was logged" in card.text
    )
    assert card.data.eval_results is None and card.data.license is None and card.data.datasets is None


def test_a_dataset_made_in_memory_is_unknown_and_a_named_one_is_named(make_trainer):
    data = Dataset.from_dict({"pixel_values": [torch.zeros(3, 8, 8).tolist()], "labels": [0]})
    assert facts(card_of(make_trainer(train_dataset=data)))["Dataset"] == "unknown"
    data.info.builder_name = "glyphs"
    card = card_of(make_trainer(train_dataset=data))
    assert facts(card)["Dataset"] == "glyphs" and card.data.datasets == ["glyphs"]


def test_of_a_local_teacher_only_the_last_part_of_its_path_is_told(make_trainer, tmp_path):
    teacher = vit(40, seed=1, spread=30)
    teacher.config._name_or_path = str(tmp_path / "gone")
    card = card_of(make_trainer(teacher=teacher))
    assert facts(card)["Teacher"] == "gone (a local directory)" and str(tmp_path) not in card.content


def test_the_card_of_exact_distillation_claims_no_sample(make_trainer):
    card = card_of(make_trainer(head_mode="exact"))
    found = facts(card)
    for name in ("Classes sampled per item (K)", "Rank depth (m)", "Proposal", "Design"):
        assert found[name] == card_module.NOT_USED
    assert "Nothing was sampled" in card.text and found["Head mode"] == "exact"


def test_a_proposal_of_the_users_own_is_named(make_trainer):
    class Mine(Proposal):
        pass

    trainer = make_trainer()
    trainer.distiller.sampler.proposal = Mine(40, 10, 10)
    assert facts(card_of(trainer))["Proposal"] == "Mine"


def test_the_card_carries_the_last_probe_and_the_last_evaluation(make_trainer):
    trainer = make_trainer(
        probe_steps=1,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        eval_dataset={"near": labelled_images(8, 40), "far": labelled_images(8, 40, seed=5)},
    )
    trainer.train()
    last_log = [log for log in trainer.state.log_history if "probe/cosine" in log][-1]
    evaluated = {k: v for log in trainer.state.log_history if log["step"] == 4 for k, v in log.items() if "_kl" in k}
    card = card_of(trainer)
    found = facts(card)
    exact, sampled = last_log["probe/exact_kd_loss"], last_log["probe/sampled_kd_loss"]
    assert float(found["gap (sampled - exact)"]) == pytest.approx(sampled - exact, rel=1e-4)
    assert float(found["exact distillation loss"]) == pytest.approx(exact, rel=1e-4)
    assert float(found["cosine of the gradients"]) == pytest.approx(last_log["probe/cosine"], rel=1e-4)
    assert "step 4" in card.text and "near_runtime" not in found
    assert set(evaluated) == {"eval_near_kl", "eval_far_kl"}
    for name, value in evaluated.items():
        assert float(found[name.removeprefix("eval_")]) == pytest.approx(value, rel=1e-4)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["near_kl"] == evaluated["eval_near_kl"]
    assert {result.dataset_name for result in card.data.eval_results} == {"unknown"}


def test_a_value_that_is_no_number_is_shown_but_kept_out_of_the_metadata(make_trainer):
    trainer = make_trainer()
    trainer.state.log_history = [{"eval_kl": float("nan"), "eval_worst": "a|b", "eval_top1": 0.5, "step": 1}]
    card = card_of(trainer)
    assert facts(card)["kl"] == "nan" and facts(card)["worst"] == r"a\|b"
    assert [r.metric_type for r in card.data.eval_results] == ["top1"]


@pytest.mark.parametrize("summary", [{"tags": 5}, {"licence": "mit"}], ids=["no text", "no such name"])
def test_what_makes_no_card_is_refused(make_trainer, summary):
    with pytest.raises(ValueError, match="no valid model card can be made") as told:
        card_of(make_trainer(), **summary)
    assert str(summary) in str(told.value)


def test_the_template_is_packaged():
    packaged = ConfigParser()
    packaged.read(ROOT / "setup.cfg")
    patterns = packaged["options.package_data"]["hf_dis.trainer"].replace(",", " ").split()
    assert any(fnmatch(card_module.TEMPLATE.name, pattern) for pattern in patterns) and card_module.TEMPLATE.is_file()
