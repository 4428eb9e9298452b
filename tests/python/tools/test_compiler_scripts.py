"""scripts/test-compilers.sh and scripts/test-debian13.sh: what they say before they build anything."""

import os
import subprocess

import pytest


@pytest.fixture
def run_script(repository):
    def run(name, *arguments, **environment):
        return subprocess.run(
            ["/bin/bash", repository / "scripts" / name, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_name_that_is_none_is_refused(run_script):
    result = run_script("test-compilers.sh", "msvc")
    assert result.returncode == 1
    assert "unknown argument msvc" in result.stderr and "clang-19" in result.stderr


@pytest.mark.parametrize(
    ("name", "package"), [("gcc-99", "g++-99"), ("clang-99", "clang-99"), ("clang-", "clang-")]
)
def test_a_compiler_that_was_asked_for_and_is_missing(run_script, name, package):
    result = run_script("test-compilers.sh", "--quick", name)
    assert result.returncode == 1
    assert f"{name} is not here; install the Debian package {package}" in result.stderr


def test_what_is_missing_is_skipped_with_a_reason_but_not_everything(run_script, tmp_path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    result = run_script("test-compilers.sh", PATH=str(tmp_path), HQQ_COMPILERS=str(tmp_path))
    assert "gcc-13: skipped, not here (install the Debian package g++-13" in result.stdout
    assert result.returncode == 1 and "none of these compilers is here" in result.stderr


def test_debian_13_without_root_or_debootstrap_is_skipped(run_script, tmp_path):
    for tool in ("dirname", "id"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    result = run_script("test-debian13.sh", PATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout.startswith("skipped: ")
    assert "root" in result.stdout or "debootstrap" in result.stdout
