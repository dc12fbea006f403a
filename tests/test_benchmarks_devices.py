"""The benchmarks on a device: what is checked, timed and reported there, without a device."""

import argparse
import json
import sys

import accelerator
import common
import head_scaling
import language_model
import peers
import pytest
import quality_vs_k
import timing
import torch
from fake_cuda import fake_cuda
from head_scaling import Place

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture
def cuda_is_there(monkeypatch):
    """Makes torch tell of a card, which has no memory and cannot compute."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CUDA)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card 9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 1))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)


def test_a_device_that_is_not_there_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_main(head_scaling, monkeypatch, "--device", "cuda")
    said = capsys.readouterr().err
    assert "--device is 'cuda'" in said and "finds cpu on this machine" in said and "install a driver" in said
    with pytest.raises(SystemExit):
        run_main(accelerator, monkeypatch)
    assert "--device cpu --quick" in capsys.readouterr().err


def test_processor_time_is_refused_on_a_device(cuda_is_there, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(language_model, monkeypatch, "--device", "cuda", "--cpu_time")
    assert "leave one of them out" in capsys.readouterr().err


def test_the_library_keeps_to_the_processor_if_asked(cuda_is_there, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(sys, "argv", ["script"])
    assert common.parse(common.parser("")).device == CPU
    assert common.os.environ["ACCELERATE_USE_CPU"] == "true"


def test_the_device_is_described(cuda_is_there, tmp_path):
    assert common.machine(CUDA).startswith("Card 9, capability 9.1, CUDA 13.0, ")
    common.write([{"ms": 1}], tmp_path / "records.json", CUDA)
    (record,) = json.loads((tmp_path / "records.json").read_text())
    assert (record["ms"], record["device_name"], record["capability"], record["cuda"]) == (1, "Card 9", "9.1", "13.0")


class FakeEvent:
    """An event of a device whose time is that of a list."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, device, enable_timing):
        assert device == CUDA and enable_timing

    def record(self):
        self.log.append("record")
        self.time = len(self.log)

    def synchronize(self):
        self.log.append("synchronize")

    def elapsed_time(self, last):
        return float(last.time - self.time)


def test_a_device_is_timed_by_its_events(cuda_is_there, monkeypatch):
    monkeypatch.setattr(FakeEvent, "log", [])
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: FakeEvent.log.append("wait"))
    watch = timing.stopwatch(CUDA)
    FakeEvent.log.clear()
    assert watch.milliseconds(lambda: FakeEvent.log.append("step")) == 2
    assert FakeEvent.log == ["wait", "record", "step", "record", "synchronize"]


def test_a_device_without_events_is_waited_for(cuda_is_there, monkeypatch):
    def event(*args, **kwargs):
        raise NotImplementedError("no events")

    log = []
    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append("wait"))
    assert timing.stopwatch(CUDA).milliseconds(lambda: log.append("step")) > 0
    assert log == ["wait", "step", "wait"]


class CountedSteps:
    """Steps that count themselves, and fail where asked to."""

    def __init__(self, errors=()):
        self.counts, self.errors = {}, dict(errors)

    def run(self, method):
        self.counts[method] = self.counts.get(method, 0) + 1
        if method in self.errors:
            raise self.errors[method]


def test_rounds_of_warm_up_are_not_counted(cuda_is_there, monkeypatch):
    times = iter([900.0, 800.0, 700.0, 5.0, 7.0, 6.0])
    monkeypatch.setattr(timing, "EventStopwatch", lambda device: timing.Stopwatch())
    monkeypatch.setattr(timing.Stopwatch, "stop", lambda self: next(times))
    monkeypatch.setattr(timing, "peak_of_a_step", lambda steps, method, device: 12.0)
    measured = timing.measure(CountedSteps, ["dis"], 3, CUDA)
    assert measured.ms == {"dis": 6.0} and measured.peak_mb("dis", "not run") == 12.0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_method_that_needs_too_much_memory_is_left_out(error):
    steps = CountedSteps({"exact": error})
    measured = timing.measure(lambda: steps, ["exact", "dis"], 2, CPU)
    assert list(measured.ms) == ["dis"] and "more memory" in measured.left_out["exact"]
    assert steps.counts == {"exact": 1, "dis": 3}


def test_torchs_allocator_of_the_processor_is_known():
    made = timing.measure(lambda: torch.empty(2**56), ["exact"], 1, CPU)
    assert made.ms == {} and "more memory" in made.left_out["exact"]


def test_only_another_packages_method_may_fail_otherwise():
    error = TypeError("another version")
    measured = timing.measure(lambda: CountedSteps({"liger": error}), ["liger"], 1, CPU, peers=["liger"])
    assert measured.left_out == {"liger": "TypeError: another version"}
    with pytest.raises(TypeError):
        timing.measure(lambda: CountedSteps({"dis": error}), ["dis"], 1, CPU, peers=["liger"])


def test_the_peak_on_a_device_starts_from_what_is_held(cuda_is_there, monkeypatch):
    held = {"peak": 2**30}
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda: 2**24)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: held.update(peak=2**24))
    peak = timing.peak_memory(CUDA)
    assert peak.megabytes() == 0
    held["peak"] += 3 * 2**20
    assert peak.megabytes() == 3
    assert timing.peak_memory(torch.device("mps")) is None


def test_what_was_left_out_is_printed_and_recorded(monkeypatch, capsys, tmp_path):
    def fails(steps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    few = ["--repeats", 1, "--no_peaks", "--json", tmp_path / "records.json"]
    monkeypatch.setitem(language_model.METHODS, "exact", fails)
    sizes = ["--vocab", 300, "--tokens", 16, "--width", 8, "--teacher", "given", "--methods", "exact", "head_product"]
    run_main(language_model, monkeypatch, *sizes, *few)
    assert "| exact | left out: needs more memory than there is |" in capsys.readouterr().out
    records = {record["method"]: record for record in json.loads((tmp_path / "records.json").read_text())}
    assert records["exact"]["ms"] is None and records["head_product"]["ms"] > 0
    monkeypatch.setitem(head_scaling.METHODS, "exact", fails)
    run_main(head_scaling, monkeypatch, "--classes", 300, "--layouts", "default", *few)
    assert "| exact | left out: needs more memory than there is |" in capsys.readouterr().out
    records = {record["method"]: record for record in json.loads((tmp_path / "records.json").read_text())}
    assert records["exact"]["ms"] is None and records["dis_dense"]["ms"] > 0


@pytest.mark.parametrize("method", [method for method in head_scaling.METHODS if method not in head_scaling.NEEDS])
def test_a_head_step_makes_its_tensors_on_the_device(method):
    with fake_cuda({"tolist": [200, 400]}):
        steps = head_scaling.Steps(3000, "default", 16, 8, Place(CUDA, torch.bfloat16))
        steps.run(method)
        held = [value for value in vars(steps).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_cuda for tensor in held) and steps.weight.dtype == torch.float32
        assert steps.teacher_logits.dtype == torch.bfloat16


@pytest.mark.parametrize("teacher", ["given", "online"])
@pytest.mark.parametrize("method", [method for method in language_model.METHODS if "liger" not in method])
def test_a_language_models_step_makes_its_tensors_on_the_device(method, teacher, monkeypatch):
    if method == "trl_chunked":
        monkeypatch.setattr("trl.kernels.chunked_divergence._use_triton", lambda device: False)  # kernels need a card
    with fake_cuda({"tolist": [200, 400]}):
        steps = language_model.Steps(3000, 16, 8, teacher, 12, Place(CUDA, torch.bfloat16))
        steps.run(method)
        held = [value for value in vars(steps).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_cuda for tensor in held) and steps.weight.dtype == torch.float32
        assert steps.teacher_weight.dtype == torch.bfloat16


def test_steps_in_bfloat16_are_near_those_in_float32():
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        steps = language_model.Steps(300, 64, 16, "online", 12, Place(CPU, dtype))
        for method in ("exact", "exact (materialised)", "trl_chunked"):
            gradients[method, dtype] = torch.autograd.grad(steps.loss(method), steps.weight)[0]
    for (method, dtype), gradient in gradients.items():
        exact = gradients[method, torch.float32]
        assert gradient.dtype == torch.float32
        different = (gradient - exact).norm() / exact.norm()
        assert different == 0 if dtype == torch.float32 else 0 < different < 0.02


def test_the_bare_product_has_the_gradients_of_half_the_squared_logits(monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 7 * 30)  # chunks of 7, 7 and 6 items
    features, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    found = torch.autograd.grad(peers.head_product(features, weight), (features, weight))
    expected = torch.autograd.grad((features @ weight.T).square().sum() / 2, (features, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_students_of_two_devices_are_not_mixed(tmp_path):
    path = tmp_path / "quality.jsonl"
    quality_vs_k.append(path, {"method": "exact", "student_ms": 3.0}, CPU)
    quality_vs_k.check_device(quality_vs_k.read(path), CPU, path)
    quality_vs_k.check_device([{"method": "exact"}], CPU, path)  # of an earlier version, always on a processor
    with pytest.raises(SystemExit, match="has records of cpu"):
        quality_vs_k.check_device(quality_vs_k.read(path), CUDA, path)


def test_the_page_has_ratios_to_the_fastest_exact_method(cuda_is_there):
    sizes = {"vocab": 151_936, "tokens": 8192, "width": 2048, "teacher_width": 2048, "teacher": "given"}
    sizes["dtype"] = "bfloat16"
    times = {"exact": 40.0, "liger_kl": 30.0, "head_product": 20.0, "dis": 10.0}
    records = [{**sizes, "method": method, "ms": ms, "peak_mb": 1234.5} for method, ms in times.items()]
    records.append({**sizes, "method": "trl_gkd", "ms": None, "left_out": "needs more memory than there is"})
    records.append({**sizes, "teacher": "online", "method": "exact", "ms": 1.0, "peak_mb": None})
    ended = accelerator.Run("language_model", "python ...", "was stopped after 9 s, before its end", False, records)
    page = accelerator.page([ended], CUDA, quick=False)
    assert "# Steps on Card 9" in page and "capability 9.1, CUDA 13.0" in page
    assert "| given | bfloat16 | dis | 10.00 | 3.00 | 1,234 |" in page
    assert "| given | bfloat16 | head_product | 20.00 | 1.50 | 1,234 |" in page
    assert "| trl_gkd | left out: needs more memory than there is |" in page
    assert "| online | bfloat16 | exact | 1.00 | 1.00 |  |" in page and "was stopped after 9 s" in page


def test_a_script_that_fails_or_takes_too_long_is_named(tmp_path):
    failed = accelerator.run("head_scaling", "--layouts none", CPU, 60)
    assert not failed.succeeded and failed.end == "failed with exit code 2" and failed.records == []
    stopped = accelerator.run("head_scaling", "--classes 300", CPU, 0)
    assert not stopped.succeeded and "was stopped after" in stopped.end


@pytest.mark.slow
def test_all_of_bench_accelerator_runs_on_a_processor(tmp_path, monkeypatch):
    run_main(accelerator, monkeypatch, "--device", "cpu", "--quick", "--output_dir", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "accelerator.jsonl").read_text().splitlines()]
    assert {record["script"] for record in records} == set(accelerator.SETTINGS)
    assert all(record["device"] == "cpu" and record["torch"] == torch.__version__ for record in records)
    assert {"trl_chunked", "head_product", "dis"} <= {r["method"] for r in records if r["script"] == "language_model"}
    page = (tmp_path / "accelerator.md").read_text()
    assert all(f"## {script}" in page for script in accelerator.SETTINGS) and "too small to measure" in page


def test_arguments_of_bench_accelerator_are_known():
    """The settings for a card are only read where there is a card."""
    for settings in (accelerator.SETTINGS, accelerator.QUICK_SETTINGS):
        assert list(settings) == list(accelerator.TABLES)
    for module in (head_scaling, language_model):
        options = accelerator.SETTINGS[module.__name__].split()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["script", *options])
            assert isinstance(module.parse_arguments(), argparse.Namespace)
