"""Every example in the docstrings and on the pages of docs/ runs and prints what it says."""

import doctest
import inspect
import io
import re
from contextlib import redirect_stdout
from types import ModuleType

import pytest

import hqq_cpp
import hqq_cpp._core
import hqq_cpp.errors

pytest.importorskip("torch", reason="the examples of HqqLinear need torch")

DATA_ATTRIBUTES = {"FORMAT_VERSION", "__version__"}


def public_objects():
    """(dotted name, object) of what users see: functions, classes, their public methods."""
    yield "hqq_cpp", hqq_cpp
    for name in hqq_cpp.__all__:
        if name in DATA_ATTRIBUTES:
            continue
        value = getattr(hqq_cpp, name)
        yield name, value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_"):
                    yield f"{name}.{attribute}", getattr(value, attribute, member)


OBJECTS = dict(public_objects())
DOCUMENTED = {name: value for name, value in OBJECTS.items() if inspect.getdoc(value)}
WITH_EXAMPLE = {name: value for name, value in DOCUMENTED.items() if ">>>" in inspect.getdoc(value)}


@pytest.fixture
def namespace(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"hqq_cpp": hqq_cpp, "model": model, "folder": tmp_path}


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_of_docstrings(name, namespace):
    parser = doctest.DocTestParser()
    text = inspect.getdoc(WITH_EXAMPLE[name])
    test = parser.get_doctest(text, namespace, name, filename=None, lineno=None)
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    result = runner.run(test, out=output.write)
    assert result.attempted > 0 and result.failed == 0, output.getvalue()


def test_a_wrong_example_fails():
    """The runner above notices."""
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(test, out=lambda _: None).failed == 1


ERRORS = {"CudaError", "FormatError", "Interrupted"}


def test_functions_and_classes_have_examples():
    missing = [
        name
        for name, value in OBJECTS.items()
        if "." not in name and name not in WITH_EXAMPLE and name not in ERRORS
    ]
    assert missing == []


def test_functions_say_what_they_take_and_raise():
    for name, value in OBJECTS.items():
        if not inspect.isfunction(value) or "." in name:
            continue
        doc = inspect.getdoc(value)
        signature = inspect.signature(value)
        for parameter in signature.parameters:
            assert re.search(rf"^    {parameter}: \S", doc, re.M), (name, parameter)
        for section in ("Args:", "Raises:", "Example:"):
            assert section in doc, (name, section)


def test_members_are_documented():
    # Attributes that mirror an argument of HqqConfig or a tensor are described at the class.
    for name, value in OBJECTS.items():
        owner, _, member = name.partition(".")
        if not member or owner in ("HqqLinear", "HqqExperts") or isinstance(value, ModuleType):
            continue
        in_class = re.search(rf"\b{member}\b", inspect.getdoc(OBJECTS[owner]))
        assert inspect.getdoc(value) or in_class, name


# ---- docs/*.md -----------------------------------------------------------------------------------


def code_blocks(text):
    """(line, code) of the ```python blocks."""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        yield text[: match.start()].count("\n") + 2, match.group(1)


PAGES = {
    "python": 9,
    "torch": 6,
    "transformers": 6,
    "training": 2,
    "migration": 3,
    "other-libraries": 3,
}


@pytest.mark.parametrize(("name", "least"), PAGES.items())
def test_the_page_runs(repository, namespace, name, least):
    """All blocks in order, in one namespace: what users get by pasting them one after the other."""
    if name not in ("python", "torch"):
        pytest.importorskip("transformers", reason="the page needs Transformers")
        pytest.importorskip("accelerate", reason="the page needs accelerate")
    if name == "migration":
        pytest.importorskip("hqq", reason="the page is for users of the package hqq")
    if name == "training":
        pytest.importorskip("peft", reason="the page needs peft")
    if name == "other-libraries":
        pytest.importorskip("diffusers", reason="the page needs diffusers")
    page = repository / "docs" / f"{name}.md"
    blocks = list(code_blocks(page.read_text()))
    assert len(blocks) >= least
    (namespace["folder"] / "examples").mkdir()
    for example in ("tiny-llama", "text"):
        target = namespace["folder"] / "examples" / example
        target.symlink_to(namespace["model"].parent / example)
    environment = {"__name__": "page"}
    for line, code in blocks:
        # Line numbers of the page in tracebacks.
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        with redirect_stdout(io.StringIO()):
            exec(compiled, environment)


def test_the_pages_name_everything(repository):
    pages = "".join(
        (repository / "docs" / f"{name}.md").read_text() for name in ("python", "torch")
    )
    missing = [name for name in hqq_cpp.__all__ if not re.search(rf"\b{name}\b", pages)]
    assert missing == []
