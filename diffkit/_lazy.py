"""The short way in: names of the notebooks' modules, re-exported lazily.

The list of names is nbdev's index of the exported symbols (`_modidx.py`), so a new notebook is
reachable by being there. `lazy_loader` does the loading. A name that is reached this way gets a
docstring that lists its parameters with their comments, so that `help(dk.apg)` says what the
source says. A name that nearly exists gets a suggestion."""

from __future__ import annotations

import difflib
import inspect

# in the order of their numbers: of two modules with one name the earlier chapter keeps it
CHAPTERS = (
    "core",
    "models",
    "solvers",
    "guidance",
    "distill",
    "nas",
    "causal",
    "adaptive",
    "privacy",
    "audio",
)
LISTED = "\n\nParameters\n----------\n"  # where the list begins: numpy's form, which IDEs know


def public_names(
    package: str,  # "diffkit" or a chapter of it
) -> dict[str, list[str]]:  # submodule (dotted, below the package) -> its public names
    """What a package re-exports: core first, then the chapters in order; a name that two modules
    share belongs to the first, the long path reaches the other."""
    from diffkit._modidx import d

    taken, out = set(), {}
    below = {
        m: s
        for m, s in d["syms"].items()
        if m.startswith(package + ".") and m.split(".")[1] not in ("cli", "site")
    }
    place = {f"diffkit.{c}": i for i, c in enumerate(CHAPTERS)}
    chapter = lambda m: place.get(m.rsplit(".", 1)[0], len(place))
    for module in sorted(below, key=lambda m: (chapter(m), m)):
        names = {k[len(module) + 1 :] for k in below[module]}
        names = sorted(n for n in names if "." not in n and not n.startswith("_"))
        out[module[len(package) + 1 :]] = [n for n in names if n not in taken]
        taken |= set(names)
    return out


def _comments(f) -> dict[str, str]:  # parameter -> its comment, "return" included
    from fastcore.docments import docments

    return {k: " ".join(v.split()) for k, v in docments(f).items() if v}


def _row(p: inspect.Parameter, said: str) -> str:  # numpy's form: name : type, then the comment
    kind = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
    facts = [kind] if p.annotation is not p.empty else []
    facts += [f"default {p.default!r}"] if p.default is not p.empty else []
    return p.name + (" : " + ", ".join(facts) if facts else "") + (f"\n    {said}" if said else "")


def describe(obj) -> None:
    "Append the parameters and their comments to the docstring of a function or class, once."
    doc = obj.__doc__ or ""
    if LISTED in doc or not (inspect.isfunction(obj) or inspect.isclass(obj)):
        return
    try:
        said, signature = _comments(obj), inspect.signature(obj)
    except (OSError, TypeError, ValueError, SyntaxError):  # no source at hand: as it was
        return
    rows = [_row(p, said.get(p.name, "")) for p in signature.parameters.values()]
    if not said or not rows:
        return
    back = f"\n\nReturns\n-------\n{said['return']}" if "return" in said else ""
    obj.__doc__ = inspect.cleandoc(doc) + LISTED + "\n".join(rows) + back


def missing(package: str, name: str, known: list[str]) -> AttributeError:
    "The error for a name that a package does not have, with the nearest one that it has."
    said, lower = f"module {package!r} has no attribute {name!r}", {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1) if name[0] != "_" else []
    # naming the attribute, but no object, keeps Python from adding a suggestion of its own
    return AttributeError(said + "".join(f"; did you mean {lower[k]!r}?" for k in near), name=name)


def attach(package: str) -> tuple:  # (__getattr__, __dir__, __all__)
    "Attach the public names of a package's modules, loaded on first use."
    import lazy_loader

    names = public_names(package)
    modules = sorted({m.split(".")[0] for m in names})
    load, listing, every = lazy_loader.attach(package, submodules=modules, submod_attrs=names)

    def get(name):
        if name not in every:
            raise missing(package, name, every)
        obj = load(name)
        if getattr(obj, "__module__", "").startswith("diffkit."):
            describe(obj)
        return obj

    return get, listing, every
