"""The short way in: names of the notebooks' modules, re-exported lazily.

The list of names is nbdev's index of the exported symbols (`_modidx.py`), so a new notebook is
reachable by being there. `lazy_loader` does the loading."""

from __future__ import annotations


def public_names(
    package: str,
) -> dict[str, list[str]]:  # submodule (dotted, below the package) -> its public names
    """What a package re-exports: core first, then the chapters in order; a name that two
    modules share belongs to the first, the long path reaches the other."""
    from diffkit._modidx import d

    taken, out = set(), {}
    below = {
        m: s
        for m, s in d["syms"].items()
        if m.startswith(package + ".") and m.split(".")[1] not in ("cli", "site")
    }
    for module in sorted(below, key=lambda m: (not m.startswith("diffkit.core."), m)):
        names = {k[len(module) + 1 :] for k in below[module]}
        names = sorted(
            n for n in names if "." not in n and not n.startswith("_") and n not in taken
        )
        taken |= set(names)
        out[module[len(package) + 1 :]] = names
    return out


def attach(package: str) -> tuple:  # (__getattr__, __dir__, __all__)
    "Attach the public names of a package's modules, loaded on first use."
    import lazy_loader

    names = public_names(package)
    return lazy_loader.attach(
        package, submodules=sorted({m.split(".")[0] for m in names}), submod_attrs=names
    )
