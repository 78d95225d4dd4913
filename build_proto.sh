#!/bin/sh
# Makes overlay_pb2.py and overlay_pb2_grpc.py from overlay.proto, beside it.
# They belong to the installed protobuf version, so each machine makes its own.
set -eu
cd "$(dirname "$0")"
if [ -n "${PYTHON:-}" ]; then :
elif [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python
else PYTHON=python3
fi
"$PYTHON" -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. overlay.proto
echo "made overlay_pb2.py and overlay_pb2_grpc.py"
