"""tests/fuzz/corpus is what its generator writes, and small."""

import importlib.util

import pytest

pytest.importorskip("hqq_cpp")

LARGEST, ALL = 4096, 300_000


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_corpus_is_what_its_generator_writes(repository, tmp_path):
    script = repository / "tests" / "fuzz" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", script)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.OUT = tmp_path / "corpus"
    generator.main()
    written = contents(generator.OUT)
    assert written == contents(script.parent / "corpus"), "run tests/fuzz/make_corpus.py"
    assert max(map(len, written.values())) <= LARGEST and sum(map(len, written.values())) <= ALL


def test_each_target_has_a_corpus(repository):
    fuzz = repository / "tests" / "fuzz"
    targets = {path.name.removesuffix("_fuzz.cpp") for path in fuzz.glob("*_fuzz.cpp")}
    # The headers start from tests/golden/hostile.
    assert targets - {"safetensors"} == {path.name for path in (fuzz / "corpus").iterdir()}
