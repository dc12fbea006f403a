"""Names on the Hub, and the licence of the checkpoint that a model was loaded from."""

import pytest
from tiny_models import vit
from torch import nn

from hf_dis.models import provenance
from hf_dis.models.provenance import hub_name, known_license


def named(name, revision=None):
    model = vit(4)
    model.config._name_or_path, model.config._commit_hash = name, revision
    return model


def saved(folder, metadata):
    model = vit(4)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A card\n")
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("an-org/model", None, "an-org/model"),
        ("gpt2", "0123abcd", "gpt2"),
        ("gpt2", None, None),  # as well a folder that has gone
        ("/gone/model", None, None),
        ("", None, None),
    ],
)
def test_names_of_the_hub(name, revision, expected):
    assert hub_name(named(name, revision)) == expected


def test_a_module_without_a_configuration_has_neither_name_nor_licence():
    assert hub_name(nn.Linear(2, 2)) is None and known_license(nn.Linear(2, 2)) == {}


def test_the_licence_of_the_card_in_a_folder(tmp_path):
    assert known_license(saved(tmp_path, "license: mit")) == {"license": "mit"}


def test_a_licence_of_its_own_keeps_its_name_and_a_link_that_still_leads_there(tmp_path):
    card = "license: other\nlicense_name: mine\nlicense_link: "
    expected = {"license": "other", "license_name": "mine"}
    assert known_license(saved(tmp_path, card + "LICENSE")) == expected
    link = {"license_link": "https://example.com/license"}
    assert known_license(saved(tmp_path, card + link["license_link"])) == expected | link


def test_the_licence_of_a_card_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    asked = []
    monkeypatch.setattr(
        provenance, "hf_hub_download", lambda *args, **options: asked.append((args, options)) or tmp_path / "README.md"
    )
    found = known_license(named("an-org/model", "0123abcd"))
    assert found == {"license": "other", "license_link": "https://huggingface.co/an-org/model/blob/main/LICENSE"}
    assert asked == [(("an-org/model", "README.md"), {"revision": "0123abcd"})]


def test_without_a_card_the_configuration_tells(tmp_path):
    model = named("an-org/never-downloaded")  # HF_HUB_OFFLINE is set
    assert known_license(model) == {}
    model.config.license = "apache-2.0"
    assert known_license(model) == {"license": "apache-2.0"}


@pytest.mark.parametrize("metadata", ["license: [", "- a list", "license: 5", "license: [mit, apache-2.0]"])
def test_a_damaged_card_counts_as_none(tmp_path, metadata):
    assert known_license(saved(tmp_path, metadata)) == {}
