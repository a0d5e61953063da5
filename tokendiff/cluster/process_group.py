"""The process group of training workers on several machines: over the network that Ray uses.

Gloo listens at the address that a machine's own name stands for. On many machines, Debian's among
them, this is 127.0.1.1, where the workers of other machines cannot reach it.
"""

import os
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass
class RayNetwork(TorchConfig):
    """Ray's own way to start a process group, at the addresses by which its nodes know each other.

    An interface that the environment names stays. Groups of NCCL find the network by themselves;
    those of gloo beside them, which save a sharded model, do not.
    """

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            worker_group.execute(name_interface)
            super().on_start(worker_group, backend_config)
        except Exception:
            # Ray Train forgets workers that it could not connect, and the room that they have: the
            # next attempt would wait for it.
            worker_group.abort()
            raise


def name_interface() -> None:
    """Tell gloo in this process the interface of the node's address; nothing where that is a
    loopback one, and so all nodes are on this machine.
    """
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    if _INTERFACE_VARIABLE in os.environ or _is_loopback(address):
        return
    for name, addresses in psutil.net_if_addrs().items():
        if address in [each.address for each in addresses]:
            os.environ[_INTERFACE_VARIABLE] = name
            return


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # `ray start --node-ip-address` takes a name too
        return False
