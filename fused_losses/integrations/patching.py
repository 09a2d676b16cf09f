"""Exchange the entry points of another package for functions of ours, and give them back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

MISSING: Any = object()


class EntryPoints(NamedTuple):
    """What is exchanged: classes get another `apply`, functions are replaced wherever a module has a name for them."""

    classes: list[tuple[Any, Callable]] = []
    functions: list[tuple[Any, Callable]] = []  # theirs, ours


@dataclass
class Patch:
    """The state of a package that may be patched; blocks may be nested.

    Attributes:
        package: The name of the package.
        home: The module that has our functions, whose names stay as they are.
        find: Returns its entry points, all looked up before anything is changed.
    """

    package: str
    home: str
    find: Callable[[], EntryPoints]
    depth: int = 0
    classes: list[tuple[Any, Any]] = field(default_factory=list)  # and their own `apply`, or MISSING
    functions: list[tuple[Any, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Exchange the entry points, unless an outer block has done so."""
        if self.depth == 0:
            found = self.find()
            for cls, ours in found.classes:
                self.classes.append((cls, vars(cls).get("apply", MISSING)))
                cls.apply = staticmethod(ours)
            self.functions.extend(found.functions)
            self._exchange({id(theirs): ours for theirs, ours in self.functions}, only=self.package)
        self.depth += 1

    def end(self) -> None:
        """Give back the entry points, if this is the outermost block.

        Modules that were imported in the meantime, of the package or not, get its own functions too.
        """
        if self.depth == 0:
            raise RuntimeError(f"unpatch: {self.package} is not patched")
        self.depth -= 1
        if self.depth:
            return
        for cls, before in self.classes:
            if before is MISSING:
                del cls.apply
            else:
                cls.apply = before
        self._exchange({id(ours): theirs for theirs, ours in self.functions})
        self.classes.clear()
        self.functions.clear()

    def _exchange(self, new: dict[int, Any], only: str | None = None) -> None:
        """Replace every name in a module that refers to an object with one of these ids, whatever the name is."""
        for name, module in list(sys.modules.items()):
            if name == self.home or (only is not None and name.split(".")[0] != only):
                continue
            for key, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in new:
                    setattr(module, key, new[id(value)])

    @contextmanager
    def block(self) -> Iterator[None]:
        """Patch the package inside the block, and restore it afterwards, also after an error."""
        self.start()
        try:
            yield
        finally:
            self.end()


def check_version(package: str, distribution: str, tested: str) -> None:
    """Raise an ImportError unless the package is there, with the major and minor version of the one that was tested."""
    try:
        module = importlib.import_module(package)
        found = getattr(module, "__version__", None) or version(distribution)
    except (ImportError, PackageNotFoundError) as e:
        raise ImportError(f"{package}: is not installed; tested with {tested}") from e
    wanted = ".".join(tested.split(".")[:2])
    if found.split(".")[:2] != tested.split(".")[:2]:
        raise ImportError(
            f"{package}: expected version {wanted}.x, tested with {tested}, got {found}; nothing is patched"
        )
