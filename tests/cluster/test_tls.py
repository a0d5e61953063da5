"""TLS between two nodes of this machine, with certificates of a CA of the test's own.

    TESTS_OF_TLS=1 python -m pytest tests/cluster/test_tls.py

It is left out otherwise: it starts a Ray of its own, and is about Ray alone. Nothing here sets TLS
up; `docs/how-to/hardening.md` says how a cluster is.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif("TESTS_OF_TLS" not in os.environ, reason="TESTS_OF_TLS is not set"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl"),
]

# In a process of its own: Ray reads these variables once.
SCRIPT = """
import json, os, socket, ssl
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1, resources={"second": 1})
ray.init(address=cluster.address, log_to_driver=False)
where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
nodes = ray.get([where.remote(), where.options(resources={"second": 1}).remote()])
host, port = cluster.address.split(":")
ca, cert, key = (os.environ[f"RAY_TLS_{name}"] for name in ("CA_CERT", "SERVER_CERT", "SERVER_KEY"))
PREFACE = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

def answer(context):
    # The first bytes of the server of the cluster's state to a client of gRPC.
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        try:
            talk = plain if context is None else context.wrap_socket(plain, server_hostname=host)
            talk.sendall(PREFACE)
            return talk.recv(9).hex()
        except OSError:  # an alert, or the end
            return ""

ours = ssl.create_default_context(cafile=ca)
ours.set_alpn_protocols(["h2"])
nameless = ssl.create_default_context(cafile=ca)
nameless.set_alpn_protocols(["h2"])
ours.load_cert_chain(cert, key)
found = {
    "nodes": nodes,
    "with a certificate": answer(ours),
    "without one": answer(nameless),
    "in plain": answer(None),
}
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
"""


def certificates(folder: Path, address: str) -> dict[str, str]:
    """A CA and a certificate for the nodes of one address, as a user would make them."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=ca")
    openssl(*new, "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=node")
    (folder / "names").write_text(f"subjectAltName=IP:{address},IP:127.0.0.1,DNS:localhost\n")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl(*("x509", "-req", "-in", "node.csr", *signed, "-out", "node.crt", "-extfile", "names"))
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
    }


def test_nodes_speak_tls_with_those_that_have_a_certificate(tmp_path: Path) -> None:
    import ray.util

    environment = {**os.environ, **certificates(tmp_path, ray.util.get_node_ip_address())}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(found["nodes"])) == 2  # work was done on both
    # Byte 3 of an HTTP/2 frame is its type, and 4 is SETTINGS, which a server begins with.
    assert found["with a certificate"][6:8] == "04"
    assert found["without one"] == ""
    assert found["in plain"][6:8] != "04"
