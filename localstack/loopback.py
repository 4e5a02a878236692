"""Runs LocalStack on loopback only: whatever GATEWAY_LISTEN says, it opens its IPv4 port on all interfaces."""

from localstack.runtime.main import main
from twisted.internet import endpoints


class LoopbackEndpoint(endpoints.TCP4ServerEndpoint):
    def __init__(self, reactor, port, backlog=50, interface="127.0.0.1"):
        super().__init__(reactor, port, backlog, interface)


endpoints.TCP4ServerEndpoint = LoopbackEndpoint
main()
