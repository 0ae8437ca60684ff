from setuptools import find_packages, setup

# `templates` and `autotune` stand at the top of the tree and are installed inside the package.
setup(packages=find_packages(include=["kdagen", "kdagen.*"]) + ["kdagen.templates", "kdagen.autotune"])
