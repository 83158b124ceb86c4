"""Packaging: everything is read from settings.ini, the project's one configuration file."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
lines = lambda key: [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]
extras = {k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")}
apart = ("cluster", "dev", "docs", "bench")  # not what the notebooks use
extras["all"] = sorted({r for k, v in extras.items() if k not in apart for r in v})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # "." makes an editable install a plain entry of sys.path: then a folder of the name diffkit,
    # such as this checkout seen from its parent, does not hide the package
    package_dir={"": "."},
    packages=find_packages(include=["diffkit", "diffkit.*"]),
    package_data={"diffkit": ["data/*", "data/*/*", "assets/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
