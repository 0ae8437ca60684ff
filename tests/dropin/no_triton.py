"""A triton that does nothing, to import FLA where there is no GPU: its kernels are defined and never run."""

import importlib.machinery
import sys
import types


class Base:
    """What a class of triton's is to those that derive from it."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name: str):
        return Anything(name)


class Anything(types.ModuleType):
    """Has every attribute, and is what any call of it returns."""

    __version__ = "3.9.0"
    __path__ = ()

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "active":  # no driver is active
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *args, **options):
        return self

    def __getitem__(self, grid):
        raise RuntimeError("a kernel of triton's was launched without a GPU")

    def __mro_entries__(self, bases):
        return (Base,)


class Finder:
    """Finds every module of triton."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Finder) if name.split(".")[0] == "triton" else None

    @staticmethod
    def create_module(spec):
        return Anything(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def torch_without_triton() -> None:
    """Has torch look for triton before there is this one: what it finds it remembers."""
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.utils.flop_counter  # noqa: F401
    from torch.utils._triton import has_triton_package

    assert not has_triton_package()


def install() -> None:
    torch_without_triton()
    sys.meta_path.insert(0, Finder)


def remove() -> None:
    sys.meta_path.remove(Finder)
