"""Where the two import packages live. All other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    package_dir={
        "musiclm_engine": "engine/musiclm_engine",
        "musiclm_kernels": "kernels/musiclm_kernels",
    },
    packages=find_packages("engine") + find_packages("kernels"),
    package_data={
        "musiclm_engine": [
            "py.typed",
            "assets/*",
            "data/scores/*",
            "data/soundfonts/*",
            "training/configs/*.toml",
        ],
        "musiclm_kernels": ["py.typed"],
    },
)
