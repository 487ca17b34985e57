"""Every family has an example that prints what it says; every public name is described, with its shapes."""

import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ferrum_models
import ferrum_ops

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
FAMILIES = sorted({op.family for op in ferrum_ops.OPS.values()})
PACKETS = {name.partition(".")[0] for name in ferrum_ops.OPS}


@pytest.mark.parametrize("name", [*FAMILIES, "formats", "models", "runtime"])
def test_example(name, monkeypatch, capsys):
    """An example runs from the repository's root, and each print's comment is what it prints."""
    path = EXAMPLES / f"{name}.py"
    assert path.exists(), f"{name}: expected an example, docs/examples/{name}.py"
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", path.read_text(), flags=re.MULTILINE)
    assert expected, f"{name}: expected at least one line `print(...)  # what it prints`"
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(path))
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_example_shows_its_family(family):
    text = (EXAMPLES / f"{family}.py").read_text()
    names = {op.name.partition(".")[0] for op in ferrum_ops.OPS.values() if op.family == family}
    assert any(f"ferrum_ops.{name}(" in text for name in names), f"{family}: expected a call of one of {sorted(names)}"


def test_every_example_has_a_page():
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= {*FAMILIES, "formats", "models", "runtime"}


def gives_shapes(name):
    text = inspect.getdoc(getattr(ferrum_ops, name)) or ""
    return bool(re.search(r"`[^`]*\[[^`]+\]", text)) or "shape" in text


def states_shapes(name):
    """Whether the docstring gives a shape, says "any shape" or the like, or names an op that does."""
    names = re.findall(r"`(\w+)`", inspect.getdoc(getattr(ferrum_ops, name)) or "")
    return any(gives_shapes(other) for other in [name, *names] if other in PACKETS)


@pytest.mark.parametrize("name", ferrum_ops.__all__)
def test_public_names_are_described(name):
    value = getattr(ferrum_ops, name)
    if callable(value):
        assert value.__doc__, f"{name}: expected a docstring"
    if name in PACKETS:
        assert states_shapes(name), f"{name}: expected the shapes of its tensors, such as `[T, H]`, in its docstring"


@pytest.mark.parametrize("name", ferrum_models.__all__)
def test_public_names_of_models_are_described(name):
    assert getattr(ferrum_models, name).__doc__, f"{name}: expected a docstring"


needs_sphinx = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="needs the docs extra: `make docs`"
)


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_sphinx
def test_every_public_name_stands_on_one_page(reference):
    pages = reference.pages()
    ops = {path: text for path, text in pages.items() if path.startswith("ops/") or path == "runtime.md"}
    found = [name for text in ops.values() for name in re.findall(r"^`+\{py:\w+\} (\w+)", text, flags=re.MULTILINE)]
    public = [name for name in found if hasattr(ferrum_ops, name)]
    assert sorted(public) == sorted(ferrum_ops.__all__)
    assert {f"ops/{family}.md" for family in FAMILIES} <= set(ops)


@needs_sphinx
def test_constants_are_described(reference):
    for name in ferrum_ops.__all__:
        if not callable(getattr(ferrum_ops, name)):
            assert reference.comment_of(name, ferrum_ops), f"{name}: expected a comment `#: ...` above it"


@needs_sphinx
def test_sections_of_a_docstring_become_fields(reference):
    docstring = """\
Rows.

Args:
    x, y: `[T]`
        and more
    eps: a number.

Raises:
    ValueError: no.

Not a field: `x`."""
    expected = """\
Rows.

:Parameters:
    - `x, y`: `[T]`
        and more
    - `eps`: a number.

:Raises:
    - `ValueError`: no.


Not a field: `x`."""
    assert reference.markdown(docstring) == expected


@needs_sphinx
def test_a_link_without_a_target_fails_the_build(reference, tmp_path):
    """The build's warnings are errors: seen to fail on the smallest tree, without the reference."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text("# Title\n\n{py:obj}`ferrum_ops.no_such_op`\n")
    shutil.copy(ROOT / "docs" / "conf.py", source)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "no_such_op" in result.stderr
