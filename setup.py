"""What setup.cfg cannot say: recipes and published tables are installed as one package of data."""

from setuptools import find_packages, setup

# upstream/common/__init__.py looks for them there where no clone surrounds it
DATA = {
    "speech_ft_bench_data.recipes": "recipes",
    "speech_ft_bench_data.results.published": "results/published",
}
CODE = find_packages(include=["upstream*", "downstream*", "merging*"])

setup(packages=[*CODE, *DATA], package_dir=DATA)
