"""Every public name is documented: what it is, each argument, its source, a place in the site."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import pysmooth
from pysmooth.composition import ComposedOptimizer
from pysmooth.optim._base import FusedOptimizer

API = Path(__file__).parents[1] / "docs" / "api"
MODULES = [
    "pysmooth",
    *(
        f"pysmooth.{name}"
        for name in ("optim", "compressors", "composition", "composition.parts", "distributed")
    ),
    *(
        f"pysmooth.{name}"
        for name in ("diagnostics", "federated", "federated.flower", "peft", "sde", "reference")
    ),
]


def public(module: str) -> dict[str, Any]:
    """The names of a module's `__all__`, else what it defines without an underscore."""
    home = importlib.import_module(module)
    names = getattr(home, "__all__", None)
    if names is None:
        defined = ((n, getattr(home, n)) for n in vars(home) if not n.startswith("_"))
        names = [n for n, x in defined if getattr(x, "__module__", None) == module and callable(x)]
    return {f"{module}.{name}": getattr(home, name) for name in names}


# One entry per object, under the first name that it is met by.
OBJECTS: dict[int, tuple[str, Any]] = {}
for module in MODULES:
    for name, thing in public(module).items():
        OBJECTS.setdefault(id(thing), (name, thing))
CALLED = [
    pytest.param(name, x, id=name)
    for name, x in OBJECTS.values()
    if inspect.isclass(x) or inspect.isfunction(x)
]


def documented_arguments(doc: str) -> set[str]:
    """The names in the Args section."""
    found = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    if found is None:
        return set()
    lines = re.findall(r"^    ((?:\*{0,2}\w+(?:, )?(?:\n    )?)+):", found[1], re.M)
    return {name.strip("*") for line in lines for name in re.split(r",\s*", line)}


def documentation(thing: Any) -> list[str]:
    """The docstring of a function; of a class also those of what it derives from here."""
    if not inspect.isclass(thing):
        return [thing.__doc__ or ""]
    kin = [c for c in inspect.getmro(thing) if c.__module__.startswith("pysmooth")]
    return [inspect.cleandoc(c.__dict__.get("__doc__") or "") for c in kin]


def arguments(thing: Any) -> set[str]:
    skipped = {"self", "args", "kwargs", "_"}
    try:
        return set(inspect.signature(thing).parameters) - skipped
    except ValueError:  # an exception's
        return set()


@pytest.mark.parametrize(("name", "thing"), CALLED)
def test_says_what_it_is(name: str, thing: Any) -> None:
    doc = inspect.cleandoc(thing.__dict__.get("__doc__") or "") if inspect.isclass(thing) else None
    doc = inspect.cleandoc(thing.__doc__ or "") if doc is None else doc
    summary = doc.split("\n\n")[0]
    assert len(summary) > 15, "no summary"
    assert not re.match(rf"{re.escape(name.rpartition('.')[2])}\(", summary), "made by dataclass"


@pytest.mark.parametrize(("name", "thing"), CALLED)
def test_says_what_each_argument_is(name: str, thing: Any) -> None:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    known = set().union(*map(documented_arguments, map(inspect.cleandoc, documentation(thing))))
    assert not arguments(thing) - known


def refuses(thing: Any) -> bool:
    """Whether a function, or a class that is made, raises or checks something in its own code."""
    made = ("__init__", "__post_init__", "check_group")
    functions = [thing]
    if inspect.isclass(thing):
        kin = [c for c in thing.__mro__ if c.__module__.startswith("pysmooth")]
        functions = [vars(c)[name] for c in kin for name in made if name in vars(c)]
    for function in filter(inspect.isfunction, functions):
        if "pysmooth" not in function.__code__.co_filename:
            continue  # made by dataclass
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            called = getattr(node, "func", None)
            name = getattr(called, "id", getattr(called, "attr", ""))
            if isinstance(node, ast.Raise) or name.lstrip("_").startswith("check"):
                return True
    return False


@pytest.mark.parametrize(("name", "thing"), CALLED)
def test_says_what_it_raises(name: str, thing: Any) -> None:
    if refuses(thing) and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        assert any("Raises:\n" in doc for doc in documentation(thing))


def test_the_test_above_sees_most() -> None:
    seen = sum(refuses(x) for _, x in OBJECTS.values())
    assert seen > 60


@pytest.mark.parametrize(("name", "thing"), CALLED)
def test_no_property_begins_like_a_type(name: str, thing: Any) -> None:
    """Sphinx would take what is before a colon in the first line for the property's type."""
    for key, value in vars(thing).items() if inspect.isclass(thing) else ():
        if isinstance(value, property):
            assert ":" not in (value.__doc__ or "").split("\n")[0], key


OPTIMIZERS = [
    pytest.param(x, id=x.__name__)
    for _, x in OBJECTS.values()
    if inspect.isclass(x) and issubclass(x, FusedOptimizer) and x is not ComposedOptimizer
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_optimizer_says_what_it_computes_and_where_it_is_from(cls: type) -> None:
    whole = "\n".join(documentation(cls))
    assert "::\n" in whole, "no equivalent in plain torch"
    assert "Raises:\n" in whole
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|JMLR", whole), "no source"
    assert re.search(r"^State", whole, re.M), "does not say what it keeps"


# ---- the site ------------------------------------------------------------------------------------

DIRECTIVE = re.compile(
    r"^\.\. auto(module|class|function):: (pysmooth[\w.]*)\n((?:   .*\n)*)", re.MULTILINE
)


def shown() -> set[int]:
    """The objects that the pages of docs/api have; that the names exist Sphinx sees."""
    out = set()
    for page in API.glob("*.rst"):
        for kind, name, options in DIRECTIVE.findall(page.read_text() + "\n"):
            if kind != "module":
                home, _, last = name.rpartition(".")
                out.add(id(getattr(importlib.import_module(home), last)))
            elif ":members:" in options:
                out |= {id(x) for x in public(name).values()}
    return out


SHOWN = shown()  # now: once somebody imports the module pysmooth.doctor, it hides the function


def test_every_public_name_has_its_place_in_the_site() -> None:
    missing = [name for name, x in OBJECTS.values() if callable(x) and id(x) not in SHOWN]
    assert not missing


def test_the_modules_are_all_there_are() -> None:
    """A new folder of the package is public, or said here not to be."""
    root = Path(pysmooth.__file__).parent
    found = {f"pysmooth.{p.stem}" for p in root.glob("[a-z]*") if p.suffix in (".py", "")}
    assert found - {"pysmooth.engine", "pysmooth.doctor", "pysmooth.py"} <= set(MODULES)
