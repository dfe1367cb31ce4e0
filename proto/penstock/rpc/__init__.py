"""Typed messages on grpcio: handlers, stubs, rich errors, TLS, health, reflection.

The client path (``channel``, ``stubs``, ``errors``, ``codec``, ``tls``) needs grpcio, grpcio-status and protobuf;
``health`` and ``reflection`` need their grpcio packages too and are imported by servers only.
"""

import penstock.v1  # noqa: F401  # it says how betterproto2 is imported, before anybody does
