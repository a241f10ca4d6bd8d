"""What a health prober asks: grpc.health.v1 and HTTP, on one port. usage: health_probe.py http://HOST:PORT"""

import json
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expect import Checks, server_url

TIMEOUT_S = 10.0

check = Checks()


def grpc_health(target):
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "baton.v1.Baton", "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status
            check(status == health_pb2.HealthCheckResponse.SERVING, f"Check {service!r} is SERVING: {status}")
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Baton"), timeout=TIMEOUT_S)
        check(next(watch).status == health_pb2.HealthCheckResponse.SERVING, "Watch says so at once")
        watch.cancel()
        try:
            stub.Check(health_pb2.HealthCheckRequest(service="baton.v1.Nothing"), timeout=TIMEOUT_S)
            check(False, "an unknown service is NOT_FOUND: it was found")
        except grpc.RpcError as error:
            check(error.code() == grpc.StatusCode.NOT_FOUND, f"an unknown service is NOT_FOUND: {error.code()}")


def http_health(url):
    for path in ("/health", "/version", "/metrics", "/v1/models"):
        with urllib.request.urlopen(url + path, timeout=TIMEOUT_S) as answer:
            body = answer.read()
            check(answer.status == 200, f"GET {path} is 200: {answer.status}")
        if path == "/version":
            check("version" in json.loads(body), f"it names a version: {body[:100]!r}")
        if path == "/metrics":
            check(b"# TYPE baton" in body, "it has metrics of ours")


def main():
    url = server_url()
    check.group("grpc.health.v1", grpc_health, url.split("://", 1)[1])
    check.group("HTTP", http_health, url)
    check.finish()


main()
