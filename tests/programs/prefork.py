"""A pre-forking server: one client created before the fork, one listening socket for all children.

usage: python prefork.py HOST:PORT
"""

import os
import signal
import socket
import sys

import overlay

leader = overlay.connect(sys.argv[1])  # at import, as settings and applications do


def serve(listening):
    while True:
        connection, _ = listening.accept()
        with connection:
            asked = connection.recv(1000)
            answer = leader.call(asked, timeout=10)
            connection.sendall(b"%d %s" % (os.getpid(), answer.result))


def ask(address, payload):
    with socket.create_connection(address, 20) as connection:
        connection.sendall(payload)
        return connection.recv(1000)


def main():
    listening = socket.create_server(("127.0.0.1", 0))
    children = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            serve(listening)
        children.append(pid)
    try:
        for n in range(6):
            print(ask(listening.getsockname(), b"n%d" % n).decode(), flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


main()
