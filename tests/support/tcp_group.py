"""A broadcast over TCP in the place of NCCL: rank 0 sends bytes to all others."""

import socket
import struct
import time
from contextlib import suppress

JOINED, LENGTH = struct.Struct("!I"), struct.Struct("!Q")


class TcpGroup:
    """`destroy` may be called by any thread: who waits in a broadcast comes back."""

    def __init__(self, address: str, port: int, rank: int, size: int, *, limit: float = 20.0) -> None:
        """Returns when all have joined. OSError: they did not within `limit` seconds."""
        self.rank, self.size, self.disabled = rank, size, False
        self.peers: dict[int, socket.socket] = {}
        if rank == 0:
            with socket.create_server((address, port)) as server:
                server.settimeout(limit)
                while len(self.peers) < size - 1:
                    peer, _ = server.accept()
                    joined = JOINED.unpack(receive(peer, JOINED.size))[0]
                    assert 0 < joined < size
                    assert joined not in self.peers
                    self.peers[joined] = peer
        else:
            self.peers[0] = connect(address, port, limit)
            self.peers[0].sendall(JOINED.pack(rank))

    def send(self, content: bytes) -> None:
        """A broadcast on rank 0. As NCCL does, it waits for a peer that is gone until the group is destroyed."""
        for peer in self.peers.values():
            try:
                if not self.disabled:
                    peer.sendall(LENGTH.pack(len(content)) + content)
            except OSError:
                while not self.disabled:
                    time.sleep(0.01)

    def receive(self) -> bytes:
        """A broadcast on another rank."""
        peer = self.peers[0]
        return receive(peer, LENGTH.unpack(receive(peer, LENGTH.size))[0])

    def destroy(self) -> None:
        self.disabled = True
        for peer in self.peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


def connect(address: str, port: int, limit: float) -> socket.socket:
    end = time.monotonic() + limit
    while True:
        try:
            return socket.create_connection((address, port))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def receive(peer: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = peer.recv(count - len(found))
        if not part:
            raise OSError("the sender left the group")
        found += part
    return found
