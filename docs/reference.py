"""The pages of the documentation, written from what the code says of itself.

    python docs/reference.py DIRECTORY

One page per family of `ferrum_ops.OPS`, and pages for the runtime, the formats, the models and the table of ops. A page
is the module's docstring, the example of `docs/examples/` where there is one, and every public object with its
docstring. Docstrings are Markdown in Google's style; Sphinx reads the pages with MyST.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sphinx.pycode import ModuleAnalyzer

import ferrum_models
import ferrum_models.moe
import ferrum_ops
import ferrum_ops.formats
from ferrum_ops.table import table

DOCS = Path(__file__).parent
EXAMPLES = DOCS / "examples"
FENCE = "`" * 6  # longer than any fence in a docstring

FAMILIES = sorted({op.family for op in ferrum_ops.OPS.values()})


def modules_of(package: ModuleType) -> list[ModuleType]:
    """The package and its public submodules."""
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]


def family_of(name: str) -> str | None:
    """The family of a public name of `ferrum_ops`; None for what belongs to no op."""
    for op in ferrum_ops.OPS.values():
        if op.name.partition(".")[0] == name:
            return op.family
    package, _, stem = getattr(getattr(ferrum_ops, name), "__module__", "").rpartition(".")
    return stem if package == "ferrum_ops.ops" and stem in FAMILIES else None


# Docstrings


def link(text: str, known: dict[str, str]) -> str:
    """Names in backticks that have an entry of their own, and arXiv numbers, as links."""
    names = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    text = re.sub(rf"(?<!`)`({names})`(?!`)", lambda m: f"{{py:obj}}`{m[1]} <{known[m[1]]}>`", text)
    return re.sub(r"\barXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def markdown(docstring: str) -> str:
    """Google's sections as field lists, `Args` and `Raises` with one item per name; everything else as it stands."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        header = re.fullmatch(r"(Args|Returns|Yields|Raises|Attributes):", line)
        if header:
            section = header[1]
            title = "Parameters" if section == "Args" else section
            lines += [f":{title}:"]
        elif section and line and not line.startswith(" "):
            section = ""
            lines += ["", line]
        elif section in ("Args", "Raises", "Attributes"):
            lines.append(re.sub(r"^    (\w[\w, *.]*):(?= |$)", r"    - `\1`:", line))
        else:
            lines.append(line)
    return "\n".join(lines)


class _Text:
    """An annotation that prints as it was written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Callable[..., Any], skip_first: bool = False) -> str:
    """`(x: torch.Tensor, eps: float = 1e-06) -> torch.Tensor`, annotations as in the source."""

    def raw(annotation: Any) -> Any:
        return _Text(annotation) if isinstance(annotation, str) else annotation

    found = inspect.signature(function)
    parameters = [p.replace(annotation=raw(p.annotation)) for p in found.parameters.values()][skip_first:]
    return str(found.replace(parameters=parameters, return_annotation=raw(found.return_annotation)))


# Entries


def directive(kind: str, argument: str, body: str) -> str:
    return f"{FENCE}{{py:{kind}}} {argument}\n{body}\n{FENCE}\n"


def class_entry(name: str, cls: type) -> str:
    """A class with the documented public methods and properties that it defines itself."""
    members = []
    for member, value in vars(cls).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        function = function.fget if isinstance(function, property) else function
        if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        body = markdown(inspect.getdoc(function) or "")
        if isinstance(value, property):
            members.append((f"{{py:property}} {member}", body))
        else:
            option = {classmethod: ":classmethod:\n", staticmethod: ":staticmethod:\n"}.get(type(value), "")
            shown = signature(function, skip_first=not isinstance(value, staticmethod))
            members.append((f"{{py:method}} {member}{shown}", f"{option}\n{body}"))
    inner = "\n".join(f"{FENCE}{head}\n{body}\n{FENCE}\n" for head, body in members)
    arguments = "" if issubclass(cls, BaseException) or inspect.isabstract(cls) else signature(cls)
    body = f"{markdown(inspect.getdoc(cls) or '')}\n\n{inner}"
    outer = "`" + FENCE
    kind = "exception" if issubclass(cls, BaseException) else "class"
    return f"{outer}{{py:{kind}}} {name}{arguments.partition(' -> ')[0]}\n{body}\n{outer}\n"


def comment_of(name: str, package: ModuleType) -> str:
    """The `#:` comment above a constant, from whichever of the package's modules defines it."""
    for module_name in sorted(m for m in sys.modules if m.startswith(f"{package.__name__}.")):
        if getattr(sys.modules[module_name], "__file__", None):
            found = ModuleAnalyzer.for_module(module_name).find_attr_docs().get(("", name))
            if found:
                return "\n".join(found).strip()
    return ""


def entry(name: str, package: ModuleType) -> str:
    """The reference of one public object."""
    value = getattr(package, name)
    if inspect.isclass(value):
        return class_entry(name, value)
    if callable(value):
        return directive("function", f"{name}{signature(value)}", markdown(inspect.getdoc(value) or ""))
    return directive("data", name, comment_of(name, package))


def in_source_order(names: Iterable[str], package: ModuleType) -> list[str]:
    """Constants first and exceptions last, between them functions and classes as they stand in their files."""

    def place(name: str) -> tuple[bool, str, int]:
        value = getattr(package, name)
        if not callable(value):
            return False, "", 0
        is_error = inspect.isclass(value) and issubclass(value, BaseException)
        return is_error, value.__module__, inspect.getsourcelines(inspect.unwrap(value))[1]

    return sorted(names, key=place)


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the documented functions and classes a module without it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and value.__doc__
    ]


def section(module: ModuleType, names: Iterable[str]) -> str:
    return f"```{{py:currentmodule}} {module.__name__}\n```\n\n" + "\n".join(
        entry(name, module) for name in in_source_order(names, module)
    )


# Pages


def example(stem: str) -> str:
    path = EXAMPLES / f"{stem}.py"
    if not path.exists():
        return ""
    return f"```python\n{path.read_text(encoding='utf-8').strip()}\n```\n"


def schemas(names: Iterable[str]) -> str:
    def schema(name: str) -> str:
        packet, _, overload = name.partition(".")
        return str(getattr(getattr(torch.ops.ferrum, packet), overload or "default")._schema)

    return "```text\n" + "\n".join(schema(name) for name in names) + "\n```\n"


def table_of(family: str | None = None) -> str:
    lines = table().splitlines()
    return "\n".join(lines[:2] + [row for row in lines[2:] if family in (None, row.split("|")[1].strip())]) + "\n"


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"


def family_page(family: str) -> str:
    names = [name for name in ferrum_ops.__all__ if family_of(name) == family]
    ops = sorted(op.name for op in ferrum_ops.OPS.values() if op.family == family)
    module = importlib.import_module(f"ferrum_ops.ops.{family}")
    return page(
        family,
        inspect.getdoc(module) or "",
        example(family),
        section(ferrum_ops, names),
        "## Schemas",
        schemas(ops),
        "## Devices",
        table_of(family),
    )


def runtime_page() -> str:
    names = [name for name in ferrum_ops.__all__ if family_of(name) is None]
    return page("Runtime", "What serves an op, and how that is chosen.", example("runtime"), section(ferrum_ops, names))


def formats_page() -> str:
    parts = [inspect.getdoc(ferrum_ops.formats) or "", example("formats")]
    for module in modules_of(ferrum_ops.formats)[1:]:
        stem = module.__name__.rpartition(".")[2]
        head = f"## {stem}\n\n```{{py:module}} {module.__name__}\n```\n"
        parts += [head, inspect.getdoc(module) or "", section(module, public_names(module))]
    return page("Formats", *parts)


def models_page() -> str:
    parts = [inspect.getdoc(ferrum_models) or "", example("models"), section(ferrum_models, ferrum_models.__all__)]
    moe = ferrum_models.moe
    parts += ["## Mixture of Experts", inspect.getdoc(moe) or "", section(moe, moe.__all__)]
    return page("Models", *parts)


def table_page() -> str:
    return page(
        "Ops by device",
        '"kernel" is compiled code, "reference" the same formula in PyTorch, "composite" a line of ATen that needs no '
        "kernel. `ferrum_ops.backends()` says the same of the running process.",
        table_of(),
    )


def linkable() -> dict[str, str]:
    """What docstrings name in backticks, and where it is described: a public name, with or without its package."""
    paths = {module.__name__: module.__name__ for module in modules_of(ferrum_ops.formats)[1:]}
    for package in (ferrum_models, ferrum_ops):
        for name in package.__all__:
            paths[name] = paths[f"{package.__name__}.{name}"] = f"{package.__name__}.{name}"
    return paths


def pages() -> dict[str, str]:
    """Every generated page by its path."""
    known = linkable()
    found = {f"ops/{family}.md": family_page(family) for family in FAMILIES}
    found |= {
        "runtime.md": runtime_page(),
        "formats.md": formats_page(),
        "models.md": models_page(),
        "table.md": table_page(),
    }
    return {path: text if path == "table.md" else linked(text, known) for path, text in found.items()}


def linked(text: str, known: dict[str, str]) -> str:
    """`link` outside code blocks."""
    parts = re.split(r"(^```(?:python|text)\n.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else link(part, known) for i, part in enumerate(parts))


def write(directory: Path) -> None:
    """The generated pages and the written ones, `docs/*.md`, in a directory of their own."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "ops").mkdir(parents=True)
    for path in DOCS.glob("*.md"):
        shutil.copy(path, directory)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
