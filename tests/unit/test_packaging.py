"""The wheel: complete, importable from anywhere, and in nobody's way."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {
    PurePosixPath(package).name: ROOT / package
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; dependencies come from this one, which is put behind it."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=venv.parent,
    )
    (site_packages,) = venv.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but .pth files under it are not read: no editable install leaks in.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_the_wheel_holds_baton_and_nothing_else(wheel_files: set[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel_files}
    dist_info = {name for name in top_level if name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top_level - dist_info == set(PACKAGES)


def test_the_wheel_holds_every_file_of_the_packages(wheel_files: set[str]) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - wheel_files == set()
    assert {"deploy/configs/demo-cpu.yaml", "baton_proto/worker.proto"} <= wheel_files


def test_every_package_is_imported_from_the_wheel_in_another_directory(clean_venv: Path) -> None:
    code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    modules = [*PACKAGES, "baton_proto.worker_pb2_grpc", "deploy.config"]
    files = run(clean_venv / "bin" / "python", "-I", "-c", code, *modules, cwd=clean_venv.parent).splitlines()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(clean_venv) for file in files), files


def test_the_installed_command_runs_in_another_directory(clean_venv: Path) -> None:
    assert "serve" in run(clean_venv / "bin" / "baton", "--help", cwd=clean_venv.parent)


def test_no_name_collides_with_an_installed_package_or_the_standard_library() -> None:
    foreign = {
        name
        for name, owners in packages_distributions().items()
        if set(owners) != {PROJECT["project"]["name"]}
    }
    assert PACKAGES.keys() & (foreign | sys.stdlib_module_names) == set()


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "docs"])
def test_what_is_not_the_product_is_not_packaged(folder: str, wheel_files: set[str]) -> None:
    assert not any(name.startswith(f"{folder}/") for name in wheel_files)
