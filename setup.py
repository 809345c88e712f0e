"""Leave the pytest files that lie in bench/ out of the wheel; pyproject.toml has all other settings."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithoutTests(build_py):
    """Copy the modules of each package except its tests, which setuptools has no setting for."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, path) of each module to install."""
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if each[1] != "conftest" and not each[1].startswith("test_")]


setup(cmdclass={"build_py": BuildWithoutTests})
