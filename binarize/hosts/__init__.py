"""Hosts: the families of networks whose structure the toolkit knows."""

from binarize.hosts._base import Edit, Host, find_host
from binarize.hosts._register import list_hosts, register_host
from binarize.hosts._srunet import SRUNetHost

__all__ = ["Edit", "Host", "SRUNetHost", "find_host", "list_hosts", "register_host"]
