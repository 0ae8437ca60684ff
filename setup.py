from setuptools import find_packages, setup

# `templates` and `autotune` stand at the top of the tree and are installed inside the package.
beside = [f"kdagen.{name}" for name in find_packages(include=["templates", "autotune", "autotune.*"])]
setup(packages=find_packages(include=["kdagen", "kdagen.*"]) + beside)
