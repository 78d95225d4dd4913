"""What pyproject.toml cannot say: the stubs of overlay.proto are made when the package is built.

They are made by the oldest grpcio-tools that is allowed (pyproject.toml, [build-system]): generated
code runs with the protobuf and grpcio that made it and with later ones, and refuses older ones. A
clone makes its own with build_proto.sh; `pip install -e .` makes those.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

HERE = Path(__file__).resolve().parent
STUBS = ("overlay_pb2.py", "overlay_pb2.pyi", "overlay_pb2_grpc.py")


class BuildWithStubs(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            make_stubs(HERE)
            return
        target = Path(self.build_lib)
        make_stubs(target)
        # A program at the top level of this folder, a module of the package where it is installed:
        # nothing else there is called `node`. overlay/server/main.py runs either.
        self.copy_file(str(HERE / "node.py"), str(target / "overlay" / "server" / "node.py"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = [*STUBS, "overlay/server/node.py"] if not self.editable_mode else []
        made = [str(Path(self.build_lib, name)) for name in made]
        return list(dict.fromkeys([*super().get_outputs(include_bytecode), *made]))


def make_stubs(folder: Path) -> None:
    import grpc_tools
    from grpc_tools import protoc

    includes = Path(grpc_tools.__file__).with_name("_proto")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    words = ["protoc", f"-I{HERE}", f"-I{includes}", *outputs, str(HERE / "overlay.proto")]
    if protoc.main(words) != 0:
        raise ExecError("protoc could not make the stubs of overlay.proto; its message is above")


def packages_to_run() -> list[str]:
    """Those of requirements.txt, but for the one that only makes stubs."""
    lines = (HERE / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    return [line for line in wanted if line and not line.startswith("grpcio-tools")]


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    setup(cmdclass={"build_py": BuildWithStubs}, install_requires=packages_to_run())
