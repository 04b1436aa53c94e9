"""The table of components: what it finds here, and what it says of versions and packages that are known to be wrong."""

import ast
import json

import pytest
import torch
from boreal_megatron import cli, doctor
from packaging.requirements import Requirement
from tests.support.launch import ROOT

BY_NAME = {component.name: component for component in doctor.COMPONENTS}


def state(name, version, here=None):
    return doctor.judge(BY_NAME[name], version, here)


def test_what_is_installed_here_is_found(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["components"]}
    assert torch.__version__.startswith(rows["torch"]["found"]) and rows["torch"]["state"] == doctor.OK
    assert rows["megatron-core"]["state"] == rows["ptxas"]["state"] == doctor.OK
    assert all(row["buys"] and row["instead"] for row in rows.values())
    assert any("transformer-engine" in line for line in found["install"])
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in rows)


def test_ranges_are_those_of_setup():
    """What setup.py asks of an extra, the table asks of it too."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = [
        k.value
        for k in ast.walk(tree)
        if isinstance(k, ast.keyword) and k.arg in ("install_requires", "extras_require")
    ]
    texts = [c.value for node in wanted for c in ast.walk(node) if isinstance(c, ast.Constant)]
    asked = {r.name: r.specifier for r in map(Requirement, texts)}
    shared = asked.keys() & BY_NAME.keys()
    assert {"torch", "megatron-core", "gigatoken", "transformers"} <= shared
    for name in shared:
        assert doctor.SpecifierSet(BY_NAME[name].needed) == asked[name], name


@pytest.mark.parametrize(
    "name, version, installed, here, expected",
    [
        ("triton", "3.6.0", {"flash-linear-attention": "0.6.0"}, (9, 0), doctor.BAD),
        (
            "triton",
            "3.6.0",
            {"flash-linear-attention": "0.6.0"},
            (10, 0),
            doctor.ELSEWHERE,
        ),
        ("triton", "3.6.0", {}, (9, 0), doctor.ELSEWHERE),
        ("triton", "3.7.1", {"flash-linear-attention": "0.6.0"}, (9, 0), doctor.OK),
        ("ptxas", "12.9", {}, (9, 0), doctor.BAD),
        ("ptxas", "13.3", {}, (9, 0), doctor.OK),
        ("nccl", "2.28.3", {"nvidia-resiliency-ext": "0.6"}, (9, 0), doctor.BAD),
        ("nccl", "2.28.8", {}, (9, 0), doctor.ELSEWHERE),
        ("nccl", "2.28.9", {"nvidia-resiliency-ext": "0.6"}, (9, 0), doctor.OK),
        ("tilelang", "0.1.8", {"flash-qla": "0.1.2"}, (9, 0), doctor.BAD),
        ("flash-qla", "0.1.1", {}, (9, 0), doctor.OLD),
        ("gigatoken", "0.11", {}, None, doctor.OLD),
        ("torch", None, {}, None, doctor.MISSING),
    ],
)
def test_versions_known_to_be_wrong(monkeypatch, name, version, installed, here, expected):
    monkeypatch.setattr(doctor, "found", installed.get)
    found, advice = state(name, version, here)
    assert found == expected
    assert bool(advice) == (expected != doctor.OK)


@pytest.mark.parametrize(
    "files, nvidia",
    [
        (("__init__.py",), False),
        (("__init__.py", "multi_tensor_apply/__init__.py"), True),
    ],
)
def test_nvidias_apex_is_told_from_pypis(tmp_path, monkeypatch, files, nvidia):
    for file in files:
        path = tmp_path / "apex" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('looked at, not imported')\n")
    record = tmp_path / "apex-0.9.10.dev0.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n")
    assert doctor.is_nvidia_apex() is None  # neither is installed where the tests run
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.is_nvidia_apex() is nvidia
    found, advice = state("apex", doctor.found("apex"))
    assert (found, "another" in found) == ((doctor.OK, False) if nvidia else (doctor.OTHER, True))
    assert nvidia or "pip uninstall apex" in advice
