"""The generated code is of the .proto beside it, and leaves room for other clients of etcd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool

import micro_plugin_etcd
from micro_plugin_etcd import _etcd_pb2

SOURCES = Path(micro_plugin_etcd.__file__).parents[1]
PROTO = "micro_plugin_etcd/_etcd.proto"


def checked_in() -> descriptor_pb2.FileDescriptorProto:
    found = descriptor_pb2.FileDescriptorProto()
    _etcd_pb2.DESCRIPTOR.CopyToProto(found)
    return found


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    descriptors = tmp_path / "descriptors"
    compile_ = ("-m", "grpc_tools.protoc", f"-I{SOURCES}", f"-o{descriptors}", PROTO)
    subprocess.run([sys.executable, *compile_], check=True)
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file
    # The names in JSON follow from the others; code for Python has none.
    for field in [field for message in compiled.message_type for field in message.field]:
        field.ClearField("json_name")
    assert compiled == checked_in()


def test_the_messages_are_of_a_file_and_a_package_of_our_own() -> None:
    assert _etcd_pb2.DESCRIPTOR.name == PROTO
    assert _etcd_pb2.DESCRIPTOR.package == "micro_plugin_etcd"


def test_a_file_of_etcds_own_names_can_be_registered_beside_it() -> None:
    pool = descriptor_pool.Default()
    theirs = checked_in()
    theirs.name, theirs.package = "rpc.proto", "etcdserverpb"
    for field in [field for message in theirs.message_type for field in message.field]:
        if field.type_name:
            field.type_name = field.type_name.replace(".micro_plugin_etcd.", ".etcdserverpb.")
    pool.AddSerializedFile(theirs.SerializeToString())
    assert pool.FindFileByName("rpc.proto").package == "etcdserverpb"
    assert pool.FindFileByName(PROTO) == _etcd_pb2.DESCRIPTOR
