"""The wheel that scripts/build-wheel.sh makes: what it holds and what it needs of the system."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hqq_cpp

# What every Linux that the tag of the wheel names has: glibc and the libraries of GCC.
SYSTEM = re.compile(r"(linux-vdso|ld-linux\S*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|cuda))\.so\.\d+")
LICENSES = ["CLI11", "Eigen", "Highway", "PCRE2", "nlohmann-json", "pybind11", "xxHash"]


@pytest.fixture(scope="module")
def wheel() -> metadata.Distribution:
    """hqq-cpp as pip installed it; skipped where the tests run on a build folder or a plain `pip install .`."""
    try:
        found = metadata.distribution("hqq-cpp")
    except metadata.PackageNotFoundError:
        found = None
    if found is None or not Path(hqq_cpp.__file__).is_relative_to(found.locate_file("")):
        pytest.skip("hqq_cpp is not the one that pip installed")
    if "HQQ_TEST_WHEEL" not in os.environ and "manylinux" not in found.read_text("WHEEL"):
        pytest.skip("the wheel was not made by scripts/build-wheel.sh")
    return found


def foreign_libraries(listing: str, own: Path) -> list[str]:
    """Lines of ldd's listing for libraries that are neither in the folder `own` nor part of every system."""
    foreign = []
    for line in filter(None, map(str.strip, listing.splitlines())):
        # "NAME => PATH (ADDRESS)", "NAME => not found", "NAME (ADDRESS)"
        name, _, path = re.sub(r" \(0x\w+\)$", "", line).partition(" => ")
        if SYSTEM.fullmatch(Path(name).name) or Path(path).is_relative_to(own):
            continue
        foreign.append(line)
    return foreign


def test_tag(wheel):
    tags = re.findall(r"^Tag: (.*)$", wheel.read_text("WHEEL"), re.M)
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert tags and all(tag.startswith(f"{version}-{version}-manylinux_2_") for tag in tags)


def test_needs_nothing_of_the_system_but_glibc(wheel):
    site = Path(wheel.locate_file(""))
    libraries = [site / file for file in wheel.files if re.search(r"\.so(\.\d+)*$", file.name)]
    assert any(file.name.startswith("_core.") for file in libraries)
    for file in libraries:
        done = subprocess.run(["ldd", file.resolve()], capture_output=True, text=True, check=True)
        assert foreign_libraries(done.stdout, site.resolve()) == [], file


def test_libraries_of_the_system_are_found_out():
    listing = """
        linux-vdso.so.1 (0x00007ffd)
        libhwy-1a2b.so.1 => /site/hqq_cpp.libs/libhwy-1a2b.so.1 (0x00007f)
        libhwy.so.1 => /usr/lib/libhwy.so.1 (0x00007f)
        libpcre2-8.so.0 => not found
        libstdc++.so.6 => /usr/lib/libstdc++.so.6 (0x00007f)
        /lib64/ld-linux-x86-64.so.2 (0x00007f)"""
    assert foreign_libraries(listing, Path("/site")) == [
        "libhwy.so.1 => /usr/lib/libhwy.so.1 (0x00007f)",
        "libpcre2-8.so.0 => not found",
    ]


def test_brings_the_hook(wheel):
    site = Path(wheel.locate_file(""))
    assert (site / "hqq_cpp.pth").is_file() and (site / "_hqq_cpp_hook.py").is_file()


def test_brings_the_licenses_of_what_is_inside(wheel, repository):
    names = {Path(file).stem for file in wheel.metadata.get_all("License-File")}
    assert names == {"LICENSE", *LICENSES}
    assert sorted(path.stem for path in (repository / "LICENSES").iterdir()) == sorted(LICENSES)
    for name in LICENSES:
        (file,) = (file for file in wheel.files if file.name == f"{name}.txt")
        assert file.read_text() == (repository / "LICENSES" / f"{name}.txt").read_text()


def test_works_with_numpy_alone(wheel, run_python):
    done = run_python("""
import numpy, sys, hqq_cpp
W = numpy.random.default_rng(0).standard_normal((64, 128), dtype=numpy.float32)
q = hqq_cpp.quantize(W, {"nbits": 4, "group_size": 64})
assert abs(hqq_cpp.dequantize(q) - W).max() < 0.5
assert "torch" not in sys.modules
""")
    assert done.returncode == 0, done.stderr


def test_brings_the_command(wheel):
    command = Path(sys.executable).with_name("hqq-cpp")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == wheel.version


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--speed"], "unknown option --speed (there are --quick and --python)"),
        (["--python"], "--python needs the path of a Python"),
        (["--python", "/nowhere/python3"], "none of these is a Python >= 3.10: /nowhere/python3"),
        (["one", "two"], "two folders for the results: one and two"),
    ],
)
def test_the_script_refuses(repository, tmp_path, arguments, message):
    script = repository / "scripts" / "build-wheel.sh"
    done = subprocess.run(
        ["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
