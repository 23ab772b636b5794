"""doctor: what is found is said, what is missing is named, and a broken part is a finding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import exgrpo_fast
from exgrpo_fast.cli import doctor, machine
from exgrpo_kernels import self_check


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def found(report, name):
    return next(check for check in report["checks"] if check["name"] == name)


def test_the_report_is_json_and_says_what_there_is(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert report["devices"][-1]["id"] == "cpu"
    assert report["cores"] >= 1
    assert report["ram_gib"] > 0.5
    import torch

    base, _, build = torch.__version__.partition("+")  # a wheel's own version may lack the build
    assert report["packages"]["torch"] in (base, f"{base}+{build}")


def test_the_self_tests_ran(report):
    loss, worker = found(report, "fused loss on cpu"), found(report, "reward worker")
    assert loss["status"] == "ok", loss
    assert loss["detail"].startswith("largest error")
    assert worker["status"] == "ok", worker
    assert report["ok"]


def test_looking_alone_starts_nothing():
    names = {check["name"] for check in machine.collect()["checks"]}
    assert "reward worker" not in names
    assert "torch" in names


def test_render_is_one_line_a_check(report):
    text = doctor.render(report)
    lines = text.splitlines()
    assert lines[0] == f"python {report['python']} on {report['platform']}"
    assert len(lines) == len(report["checks"]) + 4
    assert lines[-1].startswith("ready to train (")
    checks = [
        {"name": "vllm", "status": "warn", "detail": "not installed", "advice": "do this"},
        {"name": "x", "status": "fail", "detail": "bro\x1bken", "advice": ""},
    ]
    text = doctor.render(report | {"checks": checks, "ok": False})
    assert "\nwarn  vllm  not installed; do this\nFAIL  x     bro\\eken\n" in text
    narrow = doctor.render(report | {"checks": checks, "ok": False}, columns=40)
    assert "\nwarn  vllm  not installed; do this\n" in narrow
    long = [checks[0] | {"advice": "pip install 'exgrpo-fast[vllm]'"}]
    narrow = doctor.render(report | {"checks": long, "ok": False}, columns=43)
    assert "\nwarn  vllm  not installed; pip install\n            'exgrpo-fast[vllm]'\n" in narrow
    assert "not ready: see FAIL above (0 ok, 1 warn, 1 fail)" in text


@pytest.mark.parametrize(
    ("name", "version", "status", "part"),
    [
        ("torch", "2.13.0+cpu", "ok", ""),
        ("torch", "2.4.1", "fail", "2.11 or newer"),
        ("torch", machine.ABSENT, "fail", "nothing runs"),
        (
            "vllm",
            machine.ABSENT,
            "warn",
            "rollouts use transformers; pip install 'exgrpo-fast[vllm]'",
        ),
        ("vllm", "0.32.0", "ok", ""),
        ("transformers", "5.9.0", "fail", "5.17 or newer"),
        ("transformers", "5.24.1", "ok", ""),
        ("transformers", "5.25.0", "warn", "not tested; 5.17 up to below 5.25 is proven"),
        ("triton", "3.9.1", "ok", ""),
        ("triton", "3.10", "warn", "below 3.10"),
    ],
)
def test_versions_are_judged(name, version, status, part):
    check = machine.check_package(name, version)
    assert check.status == status
    assert part in check.advice
    assert bool(check.advice) == (status != "ok")


def test_the_proven_range_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = {}
    for requirement in asked:
        name, *versions = re.split(r"[>=<,; ]+", requirement)
        if ">=" in requirement and "<" in requirement:
            bounds.setdefault(name, (versions[0], versions[1]))
    for name, package in machine.PACKAGES.items():
        assert bounds[name] == (package.floor, package.below), name


def test_versions_come_from_metadata():
    assert machine.version_of("pytest") == pytest.__version__
    assert machine.version_of("no-such-package-anywhere") == machine.ABSENT


def test_a_gpu_is_described_and_its_absence_explained(monkeypatch):
    gpu = {"id": "cuda:0", "name": "Big GPU", "memory_gib": 140.0, "capability": "9.0"}
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    described, compiler = machine.check_devices([gpu], "2.13.0")
    assert described.detail == "Big GPU, 140.0 GiB, capability 9.0"
    assert (compiler.name, compiler.status) == ("C compiler", "fail")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert len(machine.check_devices([gpu], "2.13.0")) == 1
    (absent,) = machine.check_devices([{"id": "cpu"}], "2.13.0+cpu")
    assert absent.status == "warn"
    assert "built without CUDA" in absent.advice


def test_small_disks_and_open_doors_are_told():
    room = {"disk_free_gib": 3.0, "ram_gib": 4.0, "cores": 2}
    assert [check.status for check in machine.check_room(room)] == ["warn", "warn"]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}
    assert [check.name for check in machine.check_environment(variables)] == [
        "VLLM_SERVER_DEV_MODE"
    ]


def test_a_broken_part_is_a_finding():
    def broken():
        raise RuntimeError("two\nlines")

    check = doctor.attempt("part", broken)
    assert (check.status, check.detail) == ("fail", "RuntimeError: two\\nlines")


@pytest.mark.parametrize("fault", ["loss", "gradient", "nan"])
def test_a_wrong_kernel_does_not_pass(monkeypatch, fault):
    correct = self_check.linear_policy_loss

    def wrong(*args, **kwargs):
        factor = {"loss": 1.01, "gradient": 1.0, "nan": float("nan")}[fault]
        result = correct(*args, **kwargs)
        # the value stays, its gradient is off by 1 %
        skewed = result.loss + 0.01 * (result.loss - result.loss.detach())
        return result._replace(loss=skewed if fault == "gradient" else result.loss * factor)

    assert "largest error" in doctor.fused_loss_test("cpu")
    monkeypatch.setattr(self_check, "linear_policy_loss", wrong)
    with pytest.raises(ArithmeticError, match="is off by"):
        doctor.fused_loss_test("cpu")


def test_importing_doctor_is_light():
    code = "import sys, exgrpo_fast.cli.doctor; sys.exit('torch' in sys.modules)"
    folder = str(Path(exgrpo_fast.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": folder}
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=environment).returncode == 0
