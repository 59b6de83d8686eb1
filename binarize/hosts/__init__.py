"""Hosts: families of networks whose structure is known."""

from binarize.hosts.base import Edit, Host, find_host, list_hosts, register_host
from binarize.hosts.diffusers import DiffusersUNetHost, UNet2DConditionModelHost, UNet2DModelHost
from binarize.hosts.srunet import SRUNetHost

__all__ = ["Edit", "Host", "find_host", "list_hosts", "register_host"]
__all__ += ["DiffusersUNetHost", "SRUNetHost", "UNet2DConditionModelHost", "UNet2DModelHost"]
