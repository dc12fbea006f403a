"""``hf-dis cache``: caches of texts and images that a training takes, and input that it refuses."""

import pytest
from datasets import Dataset
from PIL import Image
from tiny_models import bert_mlm, gpt2, llama, vit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_dis import DISConfig, DISDistillationTrainer, TeacherCache
from hf_dis.commands.main import main
from hf_dis.commands.prepared import prepared_images, prepared_texts

WORDS = [f"w{number}" for number in range(47)]


@pytest.fixture
def text_teacher(tmp_path):
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "teacher"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    llama(50, seed=1, spread=30).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(" ".join(WORDS[n % 7 : n % 7 + 20]) for n in range(16)))
    return str(folder)


@pytest.fixture
def images(tmp_path):
    made = [Image.new("RGB", (8, 8), (16 * n, 255 - 16 * n, n)) for n in range(12)]
    Dataset.from_dict({"image": made, "label": [n % 5 for n in range(12)]}).save_to_disk(tmp_path / "images")
    return str(tmp_path / "images")


@pytest.fixture
def image_teacher(tmp_path):
    folder = tmp_path / "teacher"
    vit(40, seed=1, spread=30).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def refused(capsys, *words):
    try:
        code = main(["cache", *words])
    except SystemExit as error:  # of argparse
        code = error.code
    err = capsys.readouterr().err.splitlines()
    assert code == 2 and err[-1].startswith("hf-dis cache: error: ")
    return err[-1]


def trained(student, cache, dataset, folder):
    args = DISConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=4,
        head_mode="sampled",
        remove_unused_columns=False,
        save_strategy="no",
    )
    trainer = DISDistillationTrainer(student, args=args, teacher_cache=cache, train_dataset=dataset)
    return trainer.train().training_loss


def test_texts(text_teacher, texts, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    words = ["--teacher", text_teacher, "--dataset", texts, "--output_dir", cache, "--block_size", "16"]
    assert main(["cache", *words]) == 0
    out = capsys.readouterr().out
    assert "20 examples in" in out and f"prepared_texts({texts!r}, {text_teacher!r}, split='train'" in out
    stored = TeacherCache(cache)
    assert len(stored) == 20 and stored.header.num_classes == 50 and stored.header.tokenizer is not None
    dataset = prepared_texts(texts, text_teacher, block_size=16)
    assert trained(llama(50), stored, dataset, tmp_path / "out") > 0


def test_images(image_teacher, images, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    assert main(["cache", "--teacher", image_teacher, "--dataset", images, "--output_dir", cache]) == 0
    assert "12 examples in" in capsys.readouterr().out
    dataset = prepared_images(images, image_teacher)
    assert dataset[0]["pixel_values"].shape == (3, 8, 8) and dataset[3]["labels"] == 3
    assert trained(vit(40), TeacherCache(cache), dataset, tmp_path / "out") > 0


def test_input_that_cannot_be_used(text_teacher, texts, tmp_path, capsys):
    given = {"--teacher": text_teacher, "--dataset": texts, "--output_dir": str(tmp_path / "cache")}

    def told(**changed):
        words = given | {f"--{name}": value for name, value in changed.items()}
        return refused(capsys, *(word for pair in words.items() for word in pair))

    assert "the teacher 'absent' cannot be loaded" in told(teacher="absent")
    student = llama(50)
    student.config.save_pretrained(tmp_path / "config")
    assert "has under 'architectures' no class: load the teacher yourself" in told(teacher=str(tmp_path / "config"))
    student.save_pretrained(tmp_path / "config")
    (tmp_path / "config" / "model.safetensors").unlink()
    assert "config' cannot be loaded: " in told(teacher=str(tmp_path / "config"))
    assert "cannot be loaded" in told(dataset=str(tmp_path / "absent"))
    assert "has no split 'test': it has train; set --split" in told(split="test")
    assert "has no column 'words': it has text; set --column" in told(column="words")
    assert "fewer than 99999 tokens" in told(block_size="99999")
    assert "block_size is 1" in told(block_size="1")
    assert "temperature is -1.0" in told(temperature="-1", block_size="16")
    bert_mlm(50).save_pretrained(tmp_path / "masked")
    assert "is a BertForMaskedLM: hf-dis cache takes" in told(teacher=str(tmp_path / "masked"))


def test_columns_and_models_that_do_not_fit(text_teacher, texts, images, tmp_path, capsys):
    def told(teacher, dataset, *more):
        words = ["--teacher", str(teacher), "--dataset", str(dataset), "--output_dir", str(tmp_path / "cache")]
        return refused(capsys, *words, *more)

    unread, bare = tmp_path / "no_tokenizer", tmp_path / "no_processor"
    llama(50).save_pretrained(unread)
    vit(40).save_pretrained(bare)
    assert "has no tokenizer that can be loaded: " in told(unread, texts)
    assert "has no image processor that can be loaded: " in told(bare, images)
    assert "holds values of the type int: they have to be images" in told(bare, images, "--column", "label")
    Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "numbers")
    assert "holds values of the type int: they have to be text" in told(text_teacher, tmp_path / "numbers")


def test_another_teacher_in_the_same_folder_is_refused(text_teacher, texts, tmp_path, capsys):
    words = ["--dataset", texts, "--output_dir", str(tmp_path / "cache"), "--block_size", "16", "--teacher"]
    assert main(["cache", *words, text_teacher]) == 0
    gpt2(50).save_pretrained(text_teacher)
    assert "holds another cache" in refused(capsys, *words, text_teacher)
