"""The floor: the least that one send for each client and event can cost in Python.

    python -m benchmarks.floor PORT DATABASE_URL

It accepts any request, takes the channel from the end of its URL, and sends every NOTIFY to all clients of the channel,
one after the other. It has no event log, no ids, no heartbeats, no limits, no permission checks, and no second chance
for a slow client. It exists only for comparison.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable

import psycopg2

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n: hi\n\n\r\n"


def main(port: int, url: str) -> None:
    connection = psycopg2.connect(url)
    connection.autocommit = True
    cursor = connection.cursor()
    sends: dict[str, list[Callable[[bytes, int], int]]] = {}
    # Never closed here: the benchmark ends this process after each measurement, so clients that leave do not matter.
    clients: dict[int, socket.socket] = {}
    server = socket.create_server(("127.0.0.1", port), backlog=4096)
    epoll = select.epoll()
    for descriptor in (server.fileno(), connection.fileno()):
        epoll.register(descriptor, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for number, _ in epoll.poll():
            if number == server.fileno():
                client, _ = server.accept()
                clients[client.fileno()] = client
                epoll.register(client.fileno(), select.EPOLLIN)
            elif number == connection.fileno():
                connection.poll()
                for notice in connection.notifies:
                    block = b"data: %b\n\n" % notice.payload.encode()
                    chunk = b"%x\r\n%b\r\n" % (len(block), block)
                    for send in sends[notice.channel]:
                        try:
                            send(chunk, socket.MSG_DONTWAIT)
                        except OSError:  # no room, and no second chance
                            continue
                connection.notifies.clear()
            else:
                client = clients[number]
                asked = client.recv(4096)
                epoll.unregister(number)  # from here on this only writes to it
                if asked:
                    channel = asked.split(b" ", 2)[1].rpartition(b"=")[2].decode()
                    if channel not in sends:
                        sends[channel] = []
                        cursor.execute(f'LISTEN "{channel}"')
                    client.sendall(_HEAD)
                    sends[channel].append(client.send)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
