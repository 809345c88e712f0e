"""The images, really built and run, by buildah: no docker engine and no GPU are needed.

make docker-test

Debian 12 with PyPI's nvcc in /usr/local/cuda stands in for NVIDIA's image; docker/README.md says what that leaves open.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tvm_frontend.artifact import library_name
from tvm_frontend.cuda_toolchain import cubin_archs

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "artifacts" / "docker-test"
DEBIAN, DEVEL = "localhost/debian:bookworm", "localhost/cuda-devel:bookworm"
NVCC = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
ARTIFACTS = "/gpt-frontend/artifacts"
CALLER = (4321, 8765)  # a user and a group that nobody here has
PACKAGES_CACHED = re.compile(r"RUN --mount=type=secret.*\n--> Using cache")  # in a build's log
ON_THE_CPU = "GPU: none is visible here, so this runs on the CPU"


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own in `folder`. driver: `overlay` where the file system can, else `vfs`."""

    folder: Path
    driver: str
    seconds: dict[str, float] = field(default_factory=dict)  # of what took long

    def __call__(self, *arguments: str | Path) -> str:
        """Run one command and give its output. Raises CalledProcessError."""
        done = self.start(*arguments)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
            done.check_returncode()
        return done.stdout.strip()

    def start(self, *arguments: str | Path, log: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command; its output is kept, or goes to a file."""
        where = ["--storage-driver", self.driver, "--root", self.folder / "storage", "--runroot", self.folder / "run"]
        command = ["buildah", *where, *arguments]
        if log is None:
            return subprocess.run(command, capture_output=True, text=True)
        with log.open("w") as file:
            return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, text=True)

    def build(self, name: str, context: Path, dockerfile: str, *options: str | Path) -> str:
        """Build an image; its log goes to artifacts/docker-test and is returned."""
        log = LOGS / f"{name}.log"
        began = time.monotonic()
        isolated = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", "--pull=never"]
        done = self.start(
            "build", *isolated, *options, "-f", context / dockerfile, "-t", image_of(name), context, log=log
        )
        self.seconds[f"build {name}"] = time.monotonic() - began
        text = log.read_text()
        if done.returncode:
            pytest.fail(f"{dockerfile} did not build; the end of {log}:\n{text[-4000:]}")
        return text

    def copy(self, image: str) -> tuple[str, Path]:
        """A container of an image: its name, and where its files are."""
        name = self("from", "--pull-never", image)
        return name, Path(self("mount", name))


@dataclass(frozen=True)
class Container:
    """One container of an image, run as `docker run IMAGE COMMAND` would."""

    buildah: Buildah
    name: str
    files: Path
    entrypoint: list[str]

    def run(
        self, *command: str, mounted: Path | None = None, entrypoint: list[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command by the entry point; with a folder mounted as artifacts, as the CALLER."""
        # Docker gives a container a name that resolves; here torchrun would wait for one that does not.
        options = ["--isolation", "chroot", "--network", "host", "--hostname", "localhost"]
        if mounted:
            options += ["--user", ":".join(map(str, CALLER)), "--volume", f"{mounted}:{ARTIFACTS}"]
        return self.buildah.start("run", *options, self.name, "--", *(entrypoint or self.entrypoint), *command)


def image_of(name: str) -> str:
    """The name of an image that is built here."""
    return f"localhost/gpt-frontend:{name}"


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command wrote to stdout; a test in which it failed ends here."""
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip_options(folder: Path) -> list[str | Path]:
    """Options that give pip in the build the settings it has here, as a secret, and mount what they point at."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings, volumes = {}, {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value))  # the environment's come first

    def mount(match: re.Match[str]) -> str:
        path = Path(match[2])
        # The folder around it, as the pages of an index name files beside them. Not where it is here: the build may
        # have to write there, as it does to /etc/ssl.
        at = volumes.setdefault(path.parent, f"/run/pip-{len(volumes)}")
        return f"{match[1]}{at}/{path.name}"

    local = re.compile(r"(^|://|(?<=\s))(/\S+)")
    lines = [f"{name} = {local.sub(mount, value)}" for name, value in settings.items()]
    file = folder / "pip.conf"
    file.write_text("\n".join(["[global]", *lines, ""]))
    mounts = [option for path, at in volumes.items() for option in ("--volume", f"{path}:{at}:ro")]
    return ["--secret", f"id=pip,src={file}", *mounts]


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if os.geteuid():
        pytest.exit("make docker-test: run it as root; buildah needs it for chroot, and debootstrap", 2)
    if missing and not shutil.which("apt-get"):
        pytest.exit(f"make docker-test: install {' and '.join(missing)}", 2)
    if missing:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], check=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="docker-test-") as name:
        tried = Buildah(Path(name), "overlay")
        found = tried if tried.start("info").returncode == 0 else Buildah(Path(name), "vfs")
        print(f"\nbuildah's storage: {found.driver}, in {name}; the builds' logs: {LOGS}")
        yield found
        found("rm", "--all")
        found("rmi", "--all", "--force")
        if (mount := found.folder / "storage" / "overlay").is_mount():  # buildah's own, which it leaves
            subprocess.run(["umount", mount], check=True)


@pytest.fixture(scope="module")
def bases(buildah: Buildah) -> None:
    """Debian 12, and with nvcc beside it what stands in for NVIDIA's devel image."""
    began = time.monotonic()
    name, files = buildah.copy("scratch")
    with (LOGS / "debootstrap.log").open("w") as log:
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", files], check=True, stdout=log, stderr=log)
    buildah("commit", "--rm", name, DEBIAN)
    name, files = buildah.copy(DEBIAN)
    packages = buildah.folder / "nvcc"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", *NVCC], check=True)
    shutil.copytree(packages / "nvidia" / "cu13", files / "usr/local/cuda", symlinks=True)
    buildah("commit", "--rm", name, DEVEL)
    shutil.rmtree(packages)
    buildah.seconds["bases"] = time.monotonic() - began


@pytest.fixture(scope="module")
def context(buildah: Buildah) -> Path:
    """The tree in a place where a test may change it."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "artifacts", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, buildah.folder / "context", ignore=ignored))


@pytest.fixture(scope="module")
def cuda_options(bases: None, buildah: Buildah) -> list[str | Path]:
    options = [f"BASE_IMAGE={DEVEL}", f"RUNTIME_IMAGE={DEBIAN}", "ARCH=sm_86,sm_89"]
    return [*pip_options(buildah.folder), *(word for option in options for word in ("--build-arg", option))]


@pytest.fixture(scope="module")
def cuda_log(buildah: Buildah, context: Path, cuda_options: list[str | Path]) -> str:
    return buildah.build("cuda", context, "Dockerfile.cuda", *cuda_options)


@pytest.fixture
def container(buildah: Buildah, cuda_log: str) -> Iterator[Container]:
    yield from started(buildah, "cuda")


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """The CALLER's folder for artifacts."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    os.chown(folder, *CALLER)
    return folder


def started(buildah: Buildah, name: str) -> Iterator[Container]:
    """A new container of an image, gone afterwards."""
    name, files = buildah.copy(image_of(name))
    config = json.loads(buildah("inspect", "--type", "container", name))["Docker"]["config"]
    yield Container(buildah, name, files, config["Entrypoint"])
    buildah("rm", name)


def test_the_build_compiled_for_every_arch_by_both_compilers(cuda_log: str, container: Container) -> None:
    found = (container.files / "gpt-frontend/docker/archs.txt").read_text()
    print(found)
    for arch in ("sm_86", "sm_89"):
        for compiler in (r"nvcc \(/usr/local/cuda/bin/nvcc\)", r"nvrtc \(/gpt-frontend/\.venv/.*\)"):
            assert re.search(rf"{arch}: \d+ kernels, [1-9]\d* on tensor cores, by {compiler}", found)


def test_smoke(buildah: Buildah, container: Container) -> None:
    began = time.monotonic()
    done = container.run("smoke", "--arch", "sm_86,sm_90")
    buildah.seconds["smoke"] = time.monotonic() - began
    print(done.stdout)
    assert succeeded(done).endswith("smoke: all is well\n")
    assert "sm_90" in done.stdout
    assert ON_THE_CPU in done.stderr


def test_it_is_not_root_and_has_a_home(container: Container) -> None:
    script = 'echo "$(id -u):$(id -g)"; touch "$HOME/it" && python -c "import getpass; print(getpass.getuser())"'
    assert succeeded(container.run("sh", "-c", script)).split() == ["10001:10001", "gpt"]


def test_the_pipeline_of_a_caller_without_a_name_here(container: Container, mounted: Path) -> None:
    done = container.run("train", "tiny", "--max-steps", "4", "--compile", mounted=mounted)
    succeeded(done)
    assert ON_THE_CPU in done.stderr
    assert "not writable" not in done.stderr
    succeeded(container.run("export", mounted=mounted))
    succeeded(container.run("compile", mounted=mounted))
    succeeded(container.run("compile", "--target", "cuda", "--arch", "sm_89", mounted=mounted))
    assert cubin_archs((mounted / "tvm-sm_89-O3" / library_name("sm_89")).read_bytes()) == {"sm_89"}
    assert "causal_attention" in succeeded(container.run("inspect", "artifacts/tvm-sm_89-O3", mounted=mounted))
    assert succeeded(container.run("generate", "artifacts/ckpt.pt", "--tokens", "5", mounted=mounted))
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in mounted.rglob("*")}
    assert owners == {CALLER}


def test_demo_does_the_whole_job_and_installs_nothing(buildah: Buildah, container: Container, mounted: Path) -> None:
    began = time.monotonic()
    said = succeeded(container.run("demo", mounted=mounted))
    buildah.seconds["demo"] = time.monotonic() - began
    assert "-m pip" not in said  # of make's commands
    results = json.loads((mounted / "results.json").read_text())
    status = {label: set() for label in ("eager", "inductor", "onnxruntime", "openvino", "sdpa", "tvm O0", "tvm O3")}
    for row in results["rows"]:
        status.setdefault(row["label"], set()).add(row["status"])
    print({label: "/".join(sorted(found)) for label, found in status.items()})
    assert {label for label, found in status.items() if found == {"absent"}} == {"ctranslate2", "relay O0", "relay O3"}
    assert {label for label, found in status.items() if not found or found & {"failed", "disagrees"}} == set()
    report = mounted / "report.html"
    assert "tvm O3" in report.read_text()
    assert (report.stat().st_uid, report.stat().st_gid) == CALLER


def test_compose_trains_by_two_processes(container: Container, mounted: Path) -> None:
    train = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["train"]
    assert train["volumes"][0].endswith(f":{ARTIFACTS}")
    entrypoint = [word.replace("${GPUS:-gpu}", "2") for word in train["entrypoint"]]
    assert not [word for word in entrypoint if "$" in word]
    done = container.run("tiny", "--max-steps", "4", mounted=mounted, entrypoint=entrypoint)
    assert "2 ranks" in succeeded(done) + done.stderr
    assert (mounted / "ckpt.pt").stat().st_uid == CALLER[0]


def test_what_cannot_be_written_is_said(container: Container, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # root's, as docker makes a folder that was not there
    done = container.run("train", "tiny", "--max-steps", "4", mounted=tmp_path)
    assert done.returncode == 2
    assert "artifacts: not writable for user 4321:8765; make the folder before you mount it" in done.stderr


def test_a_changed_line_installs_nothing_again(
    buildah: Buildah, context: Path, cuda_log: str, cuda_options: list[str | Path]
) -> None:
    assert not PACKAGES_CACHED.search(cuda_log)
    with (context / "gpt" / "__init__.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    # Not further: buildah 1.28 cannot mount a stage (RUN --mount=from) that it took from the cache.
    log = buildah.build("changed", context, "Dockerfile.cuda", "--target", "environment", *cuda_options)
    assert PACKAGES_CACHED.search(log)
    # The other image has the same packages here, as pip finds one torch for both.
    log = buildah.build("cpu", context, "Dockerfile", "--build-arg", "TORCH_INDEX=", *cuda_options)
    assert PACKAGES_CACHED.search(log)
    for container in started(buildah, "cpu"):
        assert succeeded(container.run("python", "-c", "import gpt; print(gpt.CHANGED)")) == "True\n"
        assert "python -m gpt.train" in succeeded(container.run("help"))


def test_an_arch_that_is_none_ends_the_check_of_the_build(container: Container) -> None:
    done = container.run("python", "docker/check_archs.py", "sm_50")
    assert done.returncode == 2
    assert "arch 'sm_50': not known" in done.stderr


def test_sizes(buildah: Buildah, container: Container) -> None:
    packages = next((container.files / "gpt-frontend/.venv/lib").glob("python3.*/site-packages"))
    parts = {path.name: megabytes(path) for path in packages.iterdir() if path.is_dir()}
    largest = sorted(parts, key=parts.__getitem__, reverse=True)[:12]
    print(f"\nthe image: {megabytes(container.files)} MB, of which")
    print(f"  {megabytes(container.files / 'usr')} MB /usr, {sum(parts.values())} MB Python packages:")
    print("\n".join(f"  {parts[name]:6} MB {name}" for name in largest))
    for what, seconds in buildah.seconds.items():
        print(f"{seconds:6.0f} s  {what}")
    assert megabytes(container.files / "gpt-frontend/.venv") > megabytes(container.files) / 2


def megabytes(path: Path) -> int:
    """Measure what a folder takes on the disk."""
    done = subprocess.run(["du", "-sm", path], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])
