#!/usr/bin/env bash
# opentelemetry-proto 1.45.2 (protobuf 7.36.2): JSON that google.protobuf writes or reads for OTLP has other trace and span ids.
#
# OTLP has a form in JSON, in files and over HTTP, and its messages are messages of protobuf, for which google.protobuf has
# MessageToJson and Parse. The two forms of JSON differ in one place: OTLP writes the ids in hex, protobuf writes bytes in
# base64. So what MessageToJson writes is no OTLP, although every other field is right. Reading is the trap. Every hex digit is
# a digit of base64 too, and 32 and 16 are multiples of four: Parse takes a valid file of OTLP without a word, and each span has
# an id of 24 bytes where it should have 16, and of 12 where it should have 8. The ids of one file still fit each other, so the
# tree of spans looks whole. They only fit nothing else: no log line, no header "traceparent", no span of another source. The
# way out is to turn the ids from hex to base64 before Parse, and back after MessageToJson.
#
# Seen on 2026-11-30 (the last lines of the output):
#   the span of the SDK: trace 0af7651916cd43dd8448eb211c80319c, span b7ad6b7169203331
#   MessageToJson writes: trace CvdlGRbNQ92ESOshHIAxnA==, span t61rcWkgMzE=
#   Parse reads OTLP's JSON: trace of 24 bytes d1a7fbeb9d7dd7a71de3775df38e3c79bdb5d5cf34df5f5c, span of 12 bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  opentelemetry-sdk==1.45.2 opentelemetry-exporter-otlp-proto-common==1.45.2 opentelemetry-proto==1.45.2 protobuf==7.36.2
cat > "$folder/try.py" <<'PY'
import json
import sys
from importlib.metadata import version

from google.protobuf.json_format import MessageToJson, Parse
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class SameIds(IdGenerator):
    """Gives the same ids in every run."""

    def generate_trace_id(self) -> int:
        return int(TRACE, 16)

    def generate_span_id(self) -> int:
        return int(SPAN, 16)


kept = InMemorySpanExporter()
provider = TracerProvider(id_generator=SameIds())
provider.add_span_processor(SimpleSpanProcessor(kept))
provider.get_tracer("training").start_span("step").end()
request = encode_spans(kept.get_finished_spans())


def only_span(document: dict) -> dict:
    return document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]


document = json.loads(MessageToJson(request))
written = only_span(document)
wrote = (written["traceId"], written["spanId"])
# The same document as OTLP wants it.
written.update(traceId=TRACE, spanId=SPAN)
span = Parse(json.dumps(document), ExportTraceServiceRequest()).resource_spans[0].scope_spans[0].spans[0]
sent = request.resource_spans[0].scope_spans[0].spans[0]
cases = {
    "the span of the SDK": f"trace {sent.trace_id.hex()}, span {sent.span_id.hex()}",
    "MessageToJson writes": "trace {}, span {}".format(*wrote),
    "Parse reads OTLP's JSON": f"trace of {len(span.trace_id)} bytes {span.trace_id.hex()}, span of {len(span.span_id)} bytes",
}
expected = {
    "the span of the SDK": f"trace {TRACE}, span {SPAN}",
    "MessageToJson writes": "trace CvdlGRbNQ92ESOshHIAxnA==, span t61rcWkgMzE=",
    "Parse reads OTLP's JSON": "trace of 24 bytes d1a7fbeb9d7dd7a71de3775df38e3c79bdb5d5cf34df5f5c, span of 12 bytes",
}
print("opentelemetry-proto", version("opentelemetry-proto"), "protobuf", version("protobuf"))
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py"
