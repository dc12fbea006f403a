"""The package as a user gets it: built, installed without the repository, and used; files that it reads are safe."""

import ast
import sys
from pathlib import Path

import pytest
from built import build, install, run

import hf_dis

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "hf_dis").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]

USE = """
import hf_dis, torch
from importlib.metadata import entry_points
from pathlib import Path
assert "site" in hf_dis.__file__, hf_dis.__file__
assert (Path(hf_dis.__file__).parent / "trainer" / "model_card_template.md").is_file()
assert (Path(hf_dis.__file__).parent / "py.typed").is_file()
assert (Path(hf_dis.__file__).parent / "report" / "page.html").is_file()
(command,) = entry_points(group="console_scripts", name="hf-dis")
assert command.load()(["--help"]) == 0
from hf_dis.data import load_cifar100, load_glyphs
from hf_dis.metrics import ReID, TopKAccuracy
head = torch.nn.Linear(8, 100)
loss = hf_dis.DISLoss(hf_dis.make_sampler(100, hf_dis.SamplerSpec(num_sampled_classes=8)))
loss(torch.randn(4, 8), head.weight, head.bias, torch.randn(4, 100), torch.arange(4)).backward()
print("used", hf_dis.__version__, head.weight.grad.abs().sum() > 0)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works_without_the_repository(built, kind, tmp_path):
    """Dependencies come from this environment: the package does not contain them."""
    site = tmp_path / "site"
    install(built[kind], site)
    told = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site), HF_HUB_OFFLINE="1").stdout
    assert "hf-dis COMMAND --help" in told and told.split()[-3:] == ["used", hf_dis.__version__, "tensor(True)"]


def calls(path):
    """Each call in a file: the dotted name of the function, and the keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_no_file_is_unpickled_and_no_remote_code_run():
    """Weights are safetensors; torch loads weights only; only the restricted reader reads pickles."""
    for path in SOURCES:
        for name, keywords in calls(path):
            where = f"{path.relative_to(ROOT)}: {name}"
            assert keywords.get("trust_remote_code", "False") == "False", where
            if name in ("torch.load", "load") and name.startswith("torch"):
                assert keywords.get("weights_only") == "True", where
            assert name not in ("pickle.load", "pickle.loads", "torch.save", "eval", "exec", "os.system"), where
            assert keywords.get("shell", "False") == "False", where
            assert keywords.get("allow_pickle", "False") == "False", where
            if name.endswith(".extractall") or name.endswith(".extract"):
                pytest.fail(where)
