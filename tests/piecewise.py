"""A server that says what it says piece by piece, and then nothing more."""

import contextlib


def serve(server, pieces, over):
    """Answer one connection of a listening socket, until `over` is set."""
    connection, _ = server.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(65536)
        for piece in pieces:
            connection.sendall(piece)
            if over.wait(0.01):
                return
        over.wait(10)
