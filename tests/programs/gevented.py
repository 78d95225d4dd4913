"""A program with the threads of gevent or eventlet: `connect` says what gRPC needs.

usage: python gevented.py HOST:PORT gevent | gevent-grpc | eventlet
"""

import sys

address, kind = sys.argv[1:]
if kind == "eventlet":
    import eventlet

    eventlet.monkey_patch()
else:
    from gevent import monkey

    monkey.patch_all()
    if kind == "gevent-grpc":
        import grpc.experimental.gevent

        grpc.experimental.gevent.init_gevent()

import overlay  # noqa: E402 - after the monkey patches

for connect in (overlay.connect, overlay.connect_async):
    try:
        connect(address)
    except RuntimeError as e:
        print(e)
if kind == "gevent-grpc":
    import gevent

    with overlay.connect(address) as leader:
        print(leader.call("x", timeout=10).result)
        asked = [gevent.spawn(leader.call, f"{n}", timeout=10) for n in range(3)]
        print(*(greenlet.get(timeout=20).result for greenlet in asked))
        print(list(leader.map(None, ["y"] * 3)))
