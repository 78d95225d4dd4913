"""An older client: it has only older.proto and plain gRPC, without the overlay package.

    python older_client.py FOLDER_OF_STUBS HOST:PORT PAYLOAD

Prints the results of one Forward and one GetMetrics as JSON. It is a separate program, because a
process can have only one message of a name.
"""

import json
import sys

import grpc

folder, address, payload = sys.argv[1:]
sys.path.insert(0, folder)
import older_pb2  # noqa: E402
import older_pb2_grpc  # noqa: E402

with grpc.insecure_channel(address) as channel:
    stub = older_pb2_grpc.OverlayNodeStub(channel)
    seen = {}
    try:
        response, call = stub.Forward.with_call(older_pb2.Request(payload=payload), timeout=10)
        seen.update(result=response.result, hops=list(response.hops))
    except grpc.RpcError as e:
        call = e
    metrics = stub.GetMetrics(older_pb2.MetricsRequest(), timeout=10)

trailers = {k: v for k, v in call.trailing_metadata() if isinstance(v, str)}
seen.update(code=call.code().name, details=call.details(), trailers=trailers)
seen["metrics"] = {field.name: getattr(metrics, field.name) for field in metrics.DESCRIPTOR.fields}
print(json.dumps(seen))
