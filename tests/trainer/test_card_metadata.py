"""The model card's metadata as the Hub understands it, and its figures."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from tiny_models import labelled_images, vit

from hf_dis import DISDistillationTrainer, DISReportCallback


def card_of(trainer, **summary):
    trainer.create_model_card(**summary)
    path = Path(trainer.args.output_dir) / "README.md"
    return ModelCard.load(path), metadata_load(path)


def named(name, revision=None, **keywords):
    model = vit(40, **keywords)
    model.config._name_or_path, model.config._commit_hash = name, revision
    return model


def test_the_students_checkpoint_is_the_base_and_the_teacher_a_tag(make_trainer):
    teacher = named("an-org/teacher", seed=1, spread=30)
    _, data = card_of(make_trainer(named("an-org/student", "0123"), teacher))
    assert data["base_model"] == "an-org/student" and data["base_model_relation"] == "finetune"
    assert "teacher:an-org/teacher" in data["tags"]


def test_local_models_and_new_ones_have_no_relation(make_trainer, tmp_path):
    student, teacher = named(str(tmp_path / "gone")), named("", seed=1, spread=30)
    card, data = card_of(make_trainer(student, teacher))
    assert not {"base_model", "base_model_relation"} & set(data) and str(tmp_path) not in card.content
    assert not any(tag.startswith("teacher:") for tag in data["tags"])


def test_an_adapter_is_one(make_trainer):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(named("an-org/student"), peft.LoraConfig(target_modules="all-linear"))
    _, data = card_of(make_trainer(student))
    assert data["base_model"] == "an-org/student" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"


def test_the_licence_is_inherited_unless_one_is_given(make_trainer, tmp_path):
    vit(40).save_pretrained(tmp_path / "student")
    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.com\n---\n"
    (tmp_path / "student" / "README.md").write_text(text)
    trainer = make_trainer(type(vit(40)).from_pretrained(tmp_path / "student"))
    _, data = card_of(trainer)
    found = {name: data[name] for name in ("license", "license_name", "license_link")}
    assert found == {"license": "other", "license_name": "mine", "license_link": "https://example.com"}
    _, data = card_of(trainer, license="mit")
    assert data["license"] == "mit" and "license_name" not in data


def test_the_tag_of_trackio_is_kept(make_trainer):
    trainer = make_trainer()
    added = ["trackio", "trackio:https://me-trackio.hf.space?project=p&runs=r&sidebar=collapsed"]
    trainer.model.add_model_tags(added)  # as the callback of transformers does
    _, data = card_of(trainer, tags=["mine"])
    assert data["tags"] == ["mine", *DISDistillationTrainer._tag_names, *added, "generated_from_trainer"]


def test_evaluation_results_are_a_model_index(make_trainer):
    trainer = make_trainer(eval_dataset=labelled_images(8, 40))
    trainer.evaluate()
    card, data = card_of(trainer, dataset="Glyphs", dataset_tags="an-org/glyphs", tasks="image-classification")
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "out" and result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "Glyphs", "type": "an-org/glyphs"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["kl"] == pytest.approx(trainer.state.log_history[-1]["eval_kl"])
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == values
    assert yaml.safe_load(card.data.to_yaml()) == data


def test_method_and_paper(make_trainer):
    card, data = card_of(make_trainer(), tags="mine")
    assert data["tags"] == ["mine", *DISDistillationTrainer._tag_names, "generated_from_trainer"]
    assert (
        data["library_name"] == "transformers"
        and "method DIS." in " ".join(card.text.split())
        and card.text.count("```bibtex") == 1
    )
    assert "[Accelerating Large Scale" in card.text and "https://arxiv.org/abs/1812.00914" in card.text


def test_a_host_adds_its_own_paper(make_trainer):
    class Hosted(DISDistillationTrainer):
        _name = "DIS Other"
        _paper = {"title": "Another", "id": "0000.00000", "citation": "@misc{another}"}  # noqa: RUF012  as TRL has it

    trainer = make_trainer()
    trainer.__class__ = Hosted
    card, _ = card_of(trainer)
    assert "method DIS Other." in " ".join(card.text.split())
    assert card.text.count("```bibtex") == 2 and "[Another](https://arxiv.org/abs/0000.00000)" in card.text


# Figures


def test_two_figures_of_the_report(make_trainer):
    trainer = make_trainer(logging_steps=1, eval_strategy="steps", eval_steps=2, eval_dataset=labelled_images(8, 40))
    trainer.add_callback(DISReportCallback(trainer))
    trainer.train()
    card, _ = card_of(trainer)
    for title, file in (("KL to the teacher", "kl-to-the-teacher"), ("Gradient error", "gradient-error")):
        assert f"### {title}" in card.text and f"![{title}](report/{file}.png)" in card.text
        with Image.open(Path(trainer.args.output_dir) / "report" / f"{file}.png") as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
            assert image.format == "PNG" and image.width > 600
        assert (0, 255, 1) not in colours and (31, 119, 180) in colours  # no stand-in of the page, a curve


def test_figures_before_anything_is_logged_and_without_a_report(make_trainer):
    trainer = make_trainer()
    assert "![" not in card_of(trainer)[0].text
    trainer.add_callback(DISReportCallback(trainer))
    assert "![" not in card_of(trainer)[0].text
