"""Registration of further hosts."""

from __future__ import annotations

from collections.abc import Callable

from binarize.errors import BinarizeError
from binarize.hosts.base import HOSTS, H, Host


def register_host(name: str, *, replace: bool = False) -> Callable[[H], H]:
    """Return a class decorator that registers a `Host` subclass. Hosts registered later are asked first.

    Args:
        name: How reports and errors call the family.
        replace: Allow an existing name to be taken over.

    Raises:
        BinarizeError: If the name is taken or the class is not a `Host`.
    """

    def add(cls: H) -> H:
        if not (isinstance(cls, type) and issubclass(cls, Host)):
            raise BinarizeError(f"host {name!r} must be a class derived from binarize.hosts.Host; got {cls!r}.")
        HOSTS.register(name, replace=replace)(cls)
        cls.name = name
        return cls

    return add


def list_hosts() -> list[str]:
    """Return the names of all registered hosts, sorted."""
    return list(HOSTS)
